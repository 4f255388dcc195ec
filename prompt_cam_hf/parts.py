# SPDX-License-Identifier: MIT
"""The store of runs over many images that can be interrupted and resumed: `Parts`.

The images are divided into parts of the same size. The rows measured on the images of a part go into one Parquet
file, which is written when the part is finished and is never there incomplete. These files lie in a folder of their
own inside the output folder, together with the settings of the run; at the end they are joined into one table and
removed. The files of parts do not depend on one another, so several processes may write them in any order.
"""

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prompt_cam_hf.files import replacing, write_atomically
from prompt_cam_hf.version import __version__

_SETTINGS, _STATE = "settings.json", "state"


@dataclass(frozen=True)
class Parts:
    """The output folder of a run, and the parts of the run while it is unfinished.

    Attributes:
        out: The output folder.
        kind: What a run makes ("atlas"); the folder of the parts is named after it.
        results: Names of all files that a finished run leaves in `out`. The last one is written last: where it exists,
            a run is complete.
        schema: The columns of the rows.
        total: The number of images.
        size: Images in a part: what a process loses at most when it is killed.
    """

    out: Path
    kind: str
    results: tuple[str, ...]
    schema: pa.Schema
    total: int
    size: int

    def __len__(self) -> int:
        return -(-self.total // self.size)

    def places(self, number: int) -> range:
        """The images of a part, counted from 0."""
        return range(number * self.size, min((number + 1) * self.size, self.total))

    def open(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Make the folder, or check that the parts that an interrupted run left there can be used.

        Args:
            settings: What two runs must agree on to share parts, as values that JSON can hold. The message about parts
                of another run names the keys that differ. The version of this package is added.
            overwrite: Replace the results of an earlier run once there are new ones, and drop the parts of an
                unfinished run with other settings.

        Raises:
            FileExistsError: there are results and `overwrite` is not set, or the folder of the parts holds files of
                something else.
            ValueError: there are parts of a run with other settings, and `overwrite` is not set.
        """
        # As it will be read back: tuples become lists, and numbers as keys become text.
        settings = json.loads(json.dumps({**settings, "version": __version__}, sort_keys=True, default=str))
        path = self._folder / _SETTINGS
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        # Beside parts, all results but the last may be those of the unfinished run itself.
        names = self.results[::-1] if found is None else self.results[-1:]
        if not overwrite and (there := [name for name in names if (self.out / name).exists()]):
            raise FileExistsError(
                f"{self.out / there[0]} exists already; choose another folder, or set overwrite (--overwrite)."
            )
        if found is None and self._folder.is_dir() and any(self._folder.glob("[!.]*")):
            raise FileExistsError(f"{self._folder} holds files that no {self.kind} has made; choose another folder.")
        if found is not None and found != settings:
            if not overwrite:
                other = ", ".join(sorted(key for key in settings if found.get(key) != settings[key]))
                raise ValueError(
                    f"{self._folder} holds an unfinished {self.kind} with other settings ({other}); finish it with "
                    "those, choose another folder, or set overwrite (--overwrite) to drop it."
                )
            self._drop()
        if found != settings:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=1).encode())

    def missing(self) -> list[int]:
        """The numbers of the parts that are not finished."""
        return [number for number in range(len(self)) if not self._part(number).exists()]

    def add(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Write the rows of a part. A column that a row does not have is null in it."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, self.schema), buffer)
        write_atomically(self._part(number), buffer.getvalue())

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows of all parts in order, with all columns or some; one part is in memory at a time."""
        for number in range(len(self)):
            yield pq.read_table(self._part(number), columns=columns)

    @property
    def state(self) -> Path:
        """A file for what a run carries from one part to the next; it is removed together with the parts."""
        return self._folder / _STATE

    def finish(self, table: str, contents: Mapping[str, bytes | None]) -> None:
        """Write the results, each of them as a whole, then remove the parts.

        `table` is the result that holds the rows of all parts; `contents` are the others in the order of writing, None
        for one that the run does not have and that an earlier run may have left.
        """
        with replacing(self.out / table) as partial, pq.ParquetWriter(partial, self.schema) as writer:
            for rows in self.tables():
                writer.write_table(rows)
        for name, content in contents.items():
            if content is None:
                (self.out / name).unlink(missing_ok=True)
            else:
                write_atomically(self.out / name, content)
        for name in self.results:
            for left_by_a_killed_run in self.out.glob(f".{name}.*.partial"):
                left_by_a_killed_run.unlink()
        self._drop()

    @property
    def _folder(self) -> Path:
        return self.out / f"{self.kind}_parts"

    def _part(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"

    def _drop(self) -> None:
        """Remove what this class has written and nothing else, the state first: it says which parts count."""
        for pattern in (_STATE, "part-[0-9]*.parquet", ".*.partial", _SETTINGS):
            for path in sorted(self._folder.glob(pattern)):
                path.unlink()
        if not any(self._folder.iterdir()):
            self._folder.rmdir()
