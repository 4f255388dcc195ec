# SPDX-License-Identifier: MIT
"""Figures of titled rows of images with colour bars below, in which nothing is cut and nothing overlaps.

matplotlib's constrained layout places everything; here are only the size of the figure and the breaks of its lines.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import TextPath

OUTLINE_COLOUR = "#7fffd4"

# All lengths are in inches.
_PANEL_SIDE = 1.9  # of a square image; others have the same area
_MAX_WIDTH, _MAX_HEIGHT = 2.4, 3.4  # of images that are far from square
_MIN_CELL = 1.5  # room for the longest line over a panel
_PANELS_PER_LINE = 5
_PAD = 0.05  # around every panel
_ROW_GAP = 0.06
_BAR_WIDTH, _BAR_HEIGHT = 2.6, 0.13
_FONT, _TITLE_FONT = 10, 11.5  # points
_LINE_HEIGHT = 1.3 * _FONT / 72
_TITLE_LINE_HEIGHT = 1.3 * _TITLE_FONT / 72


@dataclass(frozen=True)
class Panel:
    """An image (height, width, 3), uint8, with short lines over it, each of at most about 16 characters.

    All images of a figure have one size. Outlines are drawn at `levels` of `outline`, (height, width).
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
    """A legend of colours, (1, n, 3), uint8, from left to right, under a label.

    Ticks are places from 0 (left) to 1, and text; `lines` are places of marks in the colour of outlines.
    """

    label: str
    colours: np.ndarray
    ticks: Sequence[tuple[float, str]]
    lines: Sequence[float] = ()


def draw_rows(rows: Sequence[Row], bars: Sequence[ColourBar] = ()) -> Figure:
    """Draw rows of panels, and colour bars below them."""
    pixels = rows[0].panels[0].pixels
    aspect = pixels.shape[1] / pixels.shape[0]
    width = min(_PANEL_SIDE * math.sqrt(aspect), _MAX_WIDTH, _MAX_HEIGHT * aspect)
    columns = min(max(2, *(len(row.panels) for row in rows)), _PANELS_PER_LINE)
    room = columns * (max(width, _MIN_CELL) + 2 * _PAD)
    lines = [math.ceil(max(len(row.panels) - 1, 1) / (columns - 1)) for row in rows]
    titles = [wrap_text(row.title, room - 2 * _PAD, _TITLE_FONT) for row in rows]
    labels = [wrap_text(bar.label, room - 2 * _PAD, _FONT) for bar in bars]
    heights = []
    for row, count, title in zip(rows, lines, titles, strict=True):
        over_panels = max(panel.title.count("\n") + 1 for panel in row.panels) * _LINE_HEIGHT
        line_height = width / aspect + over_panels + 3 * _PAD
        heights.append(len(title) * _TITLE_LINE_HEIGHT + 2 * _PAD + count * line_height + _ROW_GAP)
    heights += [(len(label) + 1) * _LINE_HEIGHT + _BAR_HEIGHT + 5 * _PAD for label in labels]
    figure = Figure((room, sum(heights)), layout=ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD, wspace=0, hspace=0))
    parts = figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0]
    for part, row, count, title in zip(parts, rows, lines, titles, strict=False):
        part.suptitle("\n".join(title), x=_PAD / room, ha="left", fontsize=_TITLE_FONT)
        axes = part.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, panel in zip([axes[0, 0], *axes[:, 1:].flat], row.panels, strict=False):
            _draw_panel(axis, panel)
    for part, bar, label in zip(parts[len(rows) :], bars, labels, strict=True):
        part.suptitle("\n".join(label), x=_PAD / room, ha="left", fontsize=_FONT)
        axis, rest = part.subplots(1, 2, width_ratios=(_BAR_WIDTH, room - _BAR_WIDTH))
        rest.set_axis_off()
        _draw_bar(axis, bar)
    return figure


def _draw_panel(axis: Axes, panel: Panel) -> None:
    axis.imshow(panel.pixels)
    axis.set_anchor("N")
    axis.set_title(panel.title, fontsize=_FONT, pad=3, linespacing=1.15)
    if panel.outline is not None:
        levels = [level for level in panel.levels if panel.outline.min() < level < panel.outline.max()]
        if levels:
            axis.contour(panel.outline, levels, colors=OUTLINE_COLOUR, linewidths=1.4, linestyles="solid")


def _draw_bar(axis: Axes, bar: ColourBar) -> None:
    axis.imshow(bar.colours, aspect="auto", extent=(0, 1, 0, 1))
    axis.set_xticks([place for place, _ in bar.ticks], [text for _, text in bar.ticks], fontsize=_FONT - 1)
    axis.tick_params(length=3, pad=1.5)
    first, *_, last = axis.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
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
    for length in range(len(text), 1, -1):
        lines = textwrap.wrap(text, length)
        if all(text_width(line, font) <= width for line in lines):
            return lines
    return list(text)
