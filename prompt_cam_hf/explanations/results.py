# SPDX-License-Identifier: MIT
"""How does a result become text, a table or a file? The same way for all of them."""

import csv
import io
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from prompt_cam_hf.explanations.figures import Scale
from prompt_cam_hf.files import write_atomically

# At the size of a README, and sharp in print.
_DOTS_PER_INCH = 150
_FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


class Result(ABC):
    """An answer that can be read, exported and drawn."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The answer as JSON knows it."""

    @abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """The answer as rows of a table; all have the same columns."""

    @abstractmethod
    def figure(self, heads: int | None = None, outline: bool = False, scale: Scale = "figure") -> Figure:
        """Draw the answer.

        Args:
            heads: How many heads' maps; 4 by default, or all where there are fewer.
            outline: Outline what reaches half of the scale.
            scale: "figure": one scale for all maps; "head": each map on its own, which shows weak heads.

        Raises:
            ValueError: there are not so many heads, or `scale` is unknown.
        """

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def to_csv(self) -> str:
        """`to_rows` as text, names of the columns first."""
        rows = self.to_rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | os.PathLike, **options: Any) -> None:
        """Write a figure, or the table, as the file's ending says. A file that is there is replaced, as a whole.

        Args:
            path: .png, .pdf, .svg, .jpg or .webp for the figure; .json or .csv.
            **options: Passed on to `figure`.

        Raises:
            ValueError: the ending is another one.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _FIGURE_SUFFIXES:
            buffer = io.BytesIO()
            self.figure(**options).savefig(buffer, format=suffix[1:], dpi=_DOTS_PER_INCH)
            content = buffer.getvalue()
        elif suffix in (".json", ".csv"):
            content = (self.to_json() if suffix == ".json" else self.to_csv()).encode()
        else:
            endings = ", ".join((*_FIGURE_SUFFIXES, ".json", ".csv"))
            raise ValueError(f"{path} has the ending {path.suffix!r}; a result can be saved as {endings}.")
        write_atomically(path, content)


def format_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns, each line set in by two."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))
    return "\n".join(f"  {line}".rstrip() for line in lines)


__all__ = ["Result", "format_table"]
