# SPDX-License-Identifier: MIT
"""The base class of all results: export as JSON and CSV, figures, and files that are written as a whole."""

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
from prompt_cam_hf.messages import printable

# At the size of a README, and sharp in print.
_DOTS_PER_INCH = 150
_FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


class Result(ABC):
    """A result that can be printed, exported and drawn."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result in the types of JSON."""

    @abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """The result as rows of a table; all have the same columns."""

    @abstractmethod
    def figure(self, heads: int | None = None, outline: bool = False, scale: Scale = "figure") -> Figure:
        """Draw the result.

        Args:
            heads: The number of heads whose maps are drawn; 4 by default, or all where there are fewer.
            outline: Whether to outline what reaches half of the scale.
            scale: "figure": one scale for all maps; "head": each map on its own, which shows weak heads.

        Raises:
            ValueError: the model has fewer heads, or `scale` is unknown.
        """

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1)

    def to_csv(self) -> str:
        """`to_rows` as text, with the names of the columns in the first line."""
        rows = self.to_rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def save(self, path: str | os.PathLike, **options: Any) -> None:
        """Write a figure, JSON or a table, depending on the file's ending. An existing file is replaced.

        Args:
            path: .png, .pdf, .svg, .jpg or .webp for the figure; .json or .csv.
            **options: Passed on to `figure`.

        Raises:
            ValueError: the file has another ending.
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
    """Plain text with aligned columns, each line indented by two spaces; names are made printable."""
    columns, rows = list(map(printable, columns)), [list(map(printable, row)) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (columns, *rows))
    return "\n".join(f"  {line}".rstrip() for line in lines)
