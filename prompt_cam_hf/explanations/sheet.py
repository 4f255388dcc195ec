# SPDX-License-Identifier: MIT
"""How do titled rows of images become a figure in which nothing is cut and nothing overlaps?

All sizes are in inches and every line of text is measured, whatever the shape of the images and the length of names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

OUTLINE_COLOUR = "#7fffd4"

_PANEL_SIDE = 1.9  # of a square image; others have the same area
_MAX_WIDTH, _MAX_HEIGHT = 2.4, 3.4  # of images that are far from square
_MIN_CELL = 1.5  # room for the longest line over a panel
_PANELS_PER_LINE = 5
_MARGIN, _GAP, _LINE_GAP, _ROW_GAP = 0.12, 0.1, 0.08, 0.14
_BAR_WIDTH, _BAR_HEIGHT, _BAR_INDENT, _BAR_TICKS = 2.6, 0.13, 0.3, 0.06
_FONT, _TITLE_FONT = 10, 11.5  # points
_LINE_HEIGHT = 1.3 * _FONT / 72
_TITLE_LINE_HEIGHT = 1.3 * _TITLE_FONT / 72


@dataclass(frozen=True)
class Panel:
    """An image with short lines over it.

    Attributes:
        pixels: (height, width, 3), uint8; all panels of a figure have one size.
        title: Lines of at most about 16 characters.
        outline: (height, width): outlines are drawn at `levels` of it.
        levels: See above.
    """

    pixels: np.ndarray
    title: str
    outline: np.ndarray | None = None
    levels: tuple[float, ...] = (0.5,)


@dataclass(frozen=True)
class Row:
    """A title over panels. Many panels take several lines; the first one then has the first column to itself."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class ColourBar:
    """What colours mean.

    Attributes:
        label: Stands over the bar.
        colours: (1, n, 3), uint8, from left to right.
        ticks: Place from 0 (left) to 1, and text.
        lines: Places of marks in the colour of outlines.
    """

    label: str
    colours: np.ndarray
    ticks: Sequence[tuple[float, str]]
    lines: Sequence[float] = ()


def draw_rows(rows: Sequence[Row], bars: Sequence[ColourBar] = ()) -> Figure:
    """Draw rows of panels, and colour bars below them."""
    height, width = rows[0].panels[0].pixels.shape[:2]
    return _Sheet(width / height, max(len(row.panels) for row in rows)).draw(rows, bars)


class _Sheet:
    """Things are placed from the top down; when the height is known, the figure is made."""

    def __init__(self, aspect: float, panels: int):
        self._width = min(_PANEL_SIDE * math.sqrt(aspect), _MAX_WIDTH, _MAX_HEIGHT * aspect)
        self._height = self._width / aspect
        self._cell = max(self._width, _MIN_CELL) + _GAP
        self._columns = min(max(panels, 2), _PANELS_PER_LINE)
        self._room = self._columns * self._cell - _GAP
        self._top = _MARGIN
        self._texts: list[tuple[float, str, float]] = []
        self._panels: list[tuple[float, float, Panel]] = []
        self._bars: list[tuple[float, ColourBar]] = []

    def draw(self, rows: Sequence[Row], bars: Sequence[ColourBar]) -> Figure:
        """The finished figure."""
        for row in rows:
            self._place_text(row.title, _TITLE_FONT, _TITLE_LINE_HEIGHT)
            first, *others = row.panels
            step = self._columns - 1
            for start in range(0, max(len(others), 1), step):
                line = list(enumerate(others[start : start + step], 1))
                self._place_panels([(0, first), *line] if start == 0 else line)
            self._top += _ROW_GAP
        for bar in bars:
            self._place_text(bar.label, _FONT, _LINE_HEIGHT)
            self._top += 0.04
            self._bars.append((self._top, bar))
            self._top += _BAR_HEIGHT + _BAR_TICKS + _LINE_HEIGHT + _LINE_GAP
        return self._make()

    def _place_text(self, text: str, font: float, line_height: float) -> None:
        for line in wrap_text(text, self._room, font):
            self._texts.append((self._top, line, font))
            self._top += line_height

    def _place_panels(self, line: Sequence[tuple[int, Panel]]) -> None:
        self._top += max(panel.title.count("\n") + 1 for _, panel in line) * _LINE_HEIGHT + 0.04
        for column, panel in line:
            self._panels.append((column * self._cell + (self._cell - _GAP - self._width) / 2, self._top, panel))
        self._top += self._height + _LINE_GAP

    def _make(self) -> Figure:
        width, height = self._room + 2 * _MARGIN, self._top + _MARGIN
        figure = Figure(figsize=(width, height))

        def axes(left: float, top: float, across: float, down: float) -> Axes:
            return figure.add_axes(
                ((_MARGIN + left) / width, 1 - (top + down) / height, across / width, down / height)
            )

        for top, text, font in self._texts:
            figure.text(_MARGIN / width, 1 - top / height, text, fontsize=font, va="top", ha="left")
        for left, top, panel in self._panels:
            _draw_panel(axes(left, top, self._width, self._height), panel)
        for top, bar in self._bars:
            _draw_bar(axes(_BAR_INDENT, top, min(_BAR_WIDTH, self._room - 2 * _BAR_INDENT), _BAR_HEIGHT), bar)
        return figure


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels, aspect="auto")
    axis.set_axis_off()
    axis.set_title(panel.title, fontsize=_FONT, pad=3, linespacing=1.15)
    if panel.outline is not None:
        levels = [level for level in panel.levels if panel.outline.min() < level < panel.outline.max()]
        if levels:
            axis.contour(panel.outline, levels, colors=OUTLINE_COLOUR, linewidths=1.4, linestyles="solid")


def _draw_bar(axis: Axes, bar: ColourBar) -> None:
    axis.imshow(bar.colours, aspect="auto", extent=(0, 1, 0, 1))
    axis.set_xticks([place for place, _ in bar.ticks], [text for _, text in bar.ticks], fontsize=_FONT - 1)
    axis.tick_params(length=3, pad=1.5)
    axis.set_yticks([])
    for place in bar.lines:
        axis.axvline(place, color=OUTLINE_COLOUR, linewidth=1.4)


@lru_cache(maxsize=4096)
def _character_width(character: str) -> float:
    """What a character adds to a line, in units of the font's size; measured between bars, as spaces have no ink."""
    with_it, without = (TextPath((0, 0), text, size=10).get_extents().width for text in (f"|{character}|", "||"))
    return (with_it - without) / 10


def text_width(text: str, font: float) -> float:
    """About the inches that a line takes, rather too many than too few; `font` in points."""
    # Fonts are fitted to pixels, which can make a line a little wider than its outlines.
    return 1.03 * sum(map(_character_width, text)) * font / 72


def wrap_text(text: str, width: float, font: float) -> list[str]:
    """Break a text into lines of at most `width` inches, between words where they fit; `font` in points."""
    lines, line = [], ""
    for word in text.split():
        if line and text_width(f"{line} {word}", font) <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and text_width(word, font) > width:
            fitting = next(
                end for end in range(len(word) - 1, 0, -1) if end == 1 or text_width(word[:end], font) <= width
            )
            lines.append(word[:fitting])
            word = word[fitting:]
        line = word
    return [*lines, line] if line else lines


__all__ = ["OUTLINE_COLOUR", "ColourBar", "Panel", "Row", "draw_rows", "text_width", "wrap_text"]
