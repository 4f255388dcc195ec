# SPDX-License-Identifier: MIT
"""How does an atlas survive being killed? Finished parts lie in a folder of its own until everything is done.

A part is a Parquet file with the rows of the next so many images. After each, the sums of the trait maps so far are
written in one file together with the number of finished parts. That number alone says what is done: a part that was
written after it is made again, and comes out the same.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prompt_cam_hf.class_atlas.collect import ROW_SCHEMA, MapSums
from prompt_cam_hf.explanations.results import write_atomically

# Images in a part: what is lost at most when a run is killed.
PART_SIZE = 256
IMAGES, CLASSES, PAGE = "images.parquet", "classes.parquet", "index.html"
_FOLDER = "atlas_parts"
_SETTINGS, _SUMS = "settings.json", "sums.npz"


class Store:
    """The folder of an atlas: its results, and the parts of an unfinished one."""

    def __init__(self, out: str | os.PathLike, settings: Mapping[str, Any], overwrite: bool):
        """Open the folder, and find out what an interrupted run has left.

        Args:
            out: The folder; it is made.
            settings: What a run must agree on to go on with another's parts, as JSON knows it.
            overwrite: Replace the results of an earlier run, and drop parts of a run with other settings.

        Raises:
            FileExistsError: there are results of an earlier run, and `overwrite` is not set; or the folder for parts
                holds files of something else.
            ValueError: there are parts of a run with other settings, and `overwrite` is not set.
        """
        self.out = Path(out)
        self._parts = self.out / _FOLDER
        self.settings = dict(settings)
        found = self._read_settings()
        if not overwrite:
            # The page comes last: where it is, a run has come to its end. Tables without it may be this run's own.
            ours = (PAGE,) if found == self.settings else (PAGE, IMAGES, CLASSES)
            if there := [name for name in ours if (self.out / name).exists()]:
                raise FileExistsError(
                    f"{self.out / there[0]} exists already; choose another folder, or set overwrite (--overwrite)."
                )
            if found is not None and found != self.settings:
                other = ", ".join(sorted(key for key in settings if found.get(key) != settings[key]))
                raise ValueError(
                    f"{self._parts} holds an unfinished atlas with other settings ({other}); finish it with those, "
                    "choose another folder, or set overwrite (--overwrite) to drop it."
                )
        if found is None and self._parts.is_dir() and any(self._parts.glob("[!.]*")):
            raise FileExistsError(f"{self._parts} holds files that no atlas has made; choose another folder.")
        if found != self.settings:
            self._drop_parts()
            self._parts.mkdir(parents=True, exist_ok=True)
            write_atomically(self._parts / _SETTINGS, json.dumps(self.settings, indent=1).encode())

    def _read_settings(self) -> dict[str, Any] | None:
        path = self._parts / _SETTINGS
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def restore(self, empty: MapSums) -> tuple[int, MapSums]:
        """The number of finished parts and the sums after them; `empty` where there are none."""
        path = self._parts / _SUMS
        if not path.exists():
            return 0, empty
        with np.load(path) as saved:
            return int(saved["parts"]), MapSums(saved["sums"], saved["counts"])

    def add_part(self, number: int, rows: list[dict[str, Any]], sums: MapSums) -> None:
        """Write the rows of part `number`, then the sums up to it."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROW_SCHEMA), buffer)
        write_atomically(self._part(number), buffer.getvalue())
        buffer = io.BytesIO()
        np.savez(buffer, parts=number + 1, sums=sums.sums, counts=sums.counts)
        write_atomically(self._parts / _SUMS, buffer.getvalue())

    def rows(self, parts: int, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
        """The rows of the first `parts` parts, in order, a part in memory at a time."""
        for number in range(parts):
            yield from pq.read_table(self._part(number), columns=columns).to_pylist()

    def finish(self, parts: int, classes: pa.Table, page: str) -> None:
        """Put the results in their places, each as a whole and the page last; then drop the parts."""
        self._write(IMAGES, lambda path: _join([self._part(number) for number in range(parts)], path))
        self._write(CLASSES, lambda path: pq.write_table(classes, path))
        write_atomically(self.out / PAGE, page.encode())
        for left_behind in self.out.glob(f".{PAGE}.*.partial"):
            left_behind.unlink()
        self._drop_parts()

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        partial = self.out / f".{name}.partial"
        write(partial)
        os.replace(partial, self.out / name)

    def _part(self, number: int) -> Path:
        return self._parts / f"part-{number:06d}.parquet"

    def _drop_parts(self) -> None:
        """Remove what this class has made, and nothing else; the sums first, so that no part counts without them."""
        if not self._parts.is_dir():
            return
        for pattern in (_SUMS, "part-[0-9]*.parquet", ".*.partial", _SETTINGS):
            for path in sorted(self._parts.glob(pattern)):
                path.unlink()
        if not any(self._parts.iterdir()):
            self._parts.rmdir()


def _join(parts: list[Path], path: Path) -> None:
    """Copy the tables of all parts into one, a part in memory at a time."""
    with pq.ParquetWriter(path, ROW_SCHEMA) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))


__all__ = ["CLASSES", "IMAGES", "PAGE", "PART_SIZE", "Store"]
