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

import matplotlib as mpl
from matplotlib.figure import Figure

from prompt_cam_hf.explanations.figures import Scale
from prompt_cam_hf.explanations.sheet import Page, Sheet, draw_sheet
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.messages import printable

# At the size of a README; and where the figure's width on paper is given, in print.
_DOTS_PER_INCH, _PRINTED_DOTS_PER_INCH = 150, 300
_FIGURE_SUFFIXES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")


class Result(ABC):
    """A result that can be printed, exported and drawn."""

    # The scale of its figure, where none is asked for.
    _scale: Scale = "map"

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The result in the types of JSON."""

    @abstractmethod
    def to_rows(self) -> list[dict[str, Any]]:
        """The result as rows of a table; all have the same columns."""

    @abstractmethod
    def sheet(self, heads: int | None, outline: bool, scale: Scale) -> Sheet:
        """What `figure` draws."""

    def figure(
        self,
        heads: int | None = None,
        outline: bool = False,
        scale: Scale | None = None,
        *,
        columns: int | None = None,
        width: float | None = None,
        font_size: float | None = None,
    ) -> Figure:
        """Draw the result.

        Args:
            heads: The number of heads whose maps are drawn; 4 by default, or all where there are fewer.
            outline: Whether to outline what reaches half of the scale.
            scale: "map": each map on its own scale, with its peak over it; "head": one scale for all maps of a head,
                so that rows can be compared; "figure": one scale for all maps, on which weak heads are dark. By
                default "map", and "head" for comparisons.
            columns: Panels in a line, the image included; 5 by default, or fewer where `width` is small.
            width: The figure's width in millimetres; a column of a paper is about 85 wide, a page 175. None: as wide
                as its panels, for a screen.
            font_size: In points; 10 by default, or less where `width` is small.

        Raises:
            ValueError: the model has fewer heads, `scale` is unknown, or the figure cannot be laid out so.
        """
        page = Page(columns, width, font_size)
        return draw_sheet(self.sheet(heads, outline, scale or self._scale), page)

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
            dots = _DOTS_PER_INCH if options.get("width") is None else _PRINTED_DOTS_PER_INCH
            # Publishers refuse the fonts of type 3 that matplotlib puts into a PDF by default.
            with mpl.rc_context({"pdf.fonttype": 42}):
                self.figure(**options).savefig(buffer, format=suffix[1:], dpi=dots)
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
