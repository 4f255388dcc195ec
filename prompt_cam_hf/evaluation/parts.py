# SPDX-License-Identifier: MIT
"""How does a run survive being killed, and how do several processes share it? Each part of the images is a file.

Parts are independent of each other, so any process may make any of them, in any order. A part's file is there as a
whole or not at all.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_cam_hf.evaluation.measure import ROW_SCHEMA
from prompt_cam_hf.explanations.results import write_atomically

# Images in a part: what a process loses at most when it is killed.
PART_SIZE = 16
_FOLDER, _SETTINGS = "evaluation_parts", "settings.json"


class Parts:
    """The folder of the parts of an unfinished evaluation."""

    def __init__(self, out: Path, number: int):
        """Name the files, without touching them.

        Args:
            out: The folder of the results.
            number: How many parts there are to be.
        """
        self._folder = out / _FOLDER
        self._number = number

    def are_there(self) -> bool:
        """Whether a run has begun here and has not come to its end."""
        return (self._folder / _SETTINGS).exists()

    def open(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, or check that what an interrupted run left there has the same settings.

        Raises:
            FileExistsError: the folder holds files of something else.
            ValueError: it has others, and `overwrite` is not set.
        """
        path = self._folder / _SETTINGS
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if found is None and self._folder.is_dir() and any(self._folder.glob("[!.]*")):
            raise FileExistsError(f"{self._folder} holds files that no evaluation has made; choose another folder.")
        if found is not None and found != settings:
            if not overwrite:
                other = ", ".join(sorted(key for key in settings if found.get(key) != settings[key]))
                raise ValueError(
                    f"{self._folder} holds an unfinished evaluation with other settings ({other}); finish it with "
                    "those, choose another folder, or set overwrite (--overwrite) to drop it."
                )
            self.drop()
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings, indent=1).encode())

    def missing(self) -> list[int]:
        """Numbers of the parts that are still to be made."""
        return [number for number in range(self._number) if not self._part(number).exists()]

    def add(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Write a part."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), buffer)
        write_atomically(self._part(number), buffer.getvalue())

    def tables(self) -> Iterator[pa.Table]:
        """All parts in order, one in memory at a time."""
        for number in range(self._number):
            yield pq.read_table(self._part(number))

    def join(self, path: Path) -> None:
        """Write all parts as one file."""
        partial = path.with_name(f".{path.name}.partial")
        with pq.ParquetWriter(partial, ROW_SCHEMA) as writer:
            for table in self.tables():
                writer.write_table(table)
        os.replace(partial, path)

    def drop(self) -> None:
        """Remove the parts, and nothing else."""
        for pattern in ("part-[0-9]*.parquet", ".*.partial", _SETTINGS):
            for path in self._folder.glob(pattern):
                path.unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"


__all__ = ["PART_SIZE", "Parts"]
