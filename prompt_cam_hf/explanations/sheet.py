# SPDX-License-Identifier: MIT
"""Figures of titled rows of images with colour bars below, in which nothing is cut and nothing overlaps.

matplotlib's constrained layout places everything; here are only the size of the figure and the breaks of its lines.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import Normal, withStroke
from matplotlib.textpath import TextPath

from prompt_cam_hf.explanations.fonts import find_fonts, keep_order

# Light on dark, and no colour of the maps.
OUTLINE_COLOUR = "#7fffd4"
_OUTLINE_EDGE = "#101010"

# All lengths are in inches.
_PANEL_SIDE = 1.9  # of a square image; others have the same area
_MAX_WIDTH, _MAX_HEIGHT = 2.4, 3.4  # of images that are far from square
_MAX_ASPECT = 4.0  # images that are longer are drawn thicker than they are
_MIN_CELL = 1.5  # room for the longest line over a panel
_MIN_CELL_ON_PAPER = 0.4
_PANELS_PER_LINE = 5
_PAD = 0.05  # around every panel
_ROW_GAP = 0.06
_BAR_WIDTH, _BAR_HEIGHT = 2.6, 0.13
_MILLIMETRES = 25.4  # in an inch
_FONT, _MIN_FONT = 10.0, 6.0  # points
_FONT_PER_INCH = 7.2  # of a panel's room, where that is less than usual
_TITLE_FONT = 1.15  # times the font
_LINE_HEIGHT = 1.3 / 72  # times the font


@dataclass(frozen=True)
class Panel:
    """An image (height, width, 3), uint8, with short lines over it, each of at most about 16 characters.

    All images of a figure have one size. Outlines are drawn at `levels` of `outline`, (height, width).
    """

    pixels: np.ndarray
    title: str
    outline: np.ndarray | None = None
    levels: tuple[float, ...] = (0.5,)


class Row(NamedTuple):
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


class Sheet(NamedTuple):
    """All that a figure shows, from top to bottom."""

    rows: Sequence[Row]
    bars: Sequence[ColourBar]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Page:
    """How a figure is laid out: panels in a line, its width in millimetres, the size of its font in points.

    None is what suits a screen; where a width is given, the number of panels and the font that suit that width.
    """

    columns: int | None = None
    width: float | None = None
    font_size: float | None = None

    def __post_init__(self) -> None:
        for name, value, lowest, highest in (
            ("columns", self.columns, 2, 50),
            ("width", self.width, 30, 1000),
            ("font_size", self.font_size, 4, 40),
        ):
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"{name}={value}; it must be from {lowest} to {highest}.")


def draw_sheet(sheet: Sheet, page: Page = Page()) -> Figure:
    """Draw rows of panels, and colour bars and notes below them.

    Raises:
        ValueError: the page is too narrow for its columns.
    """
    texts = [*sheet.notes, *(bar.label for bar in sheet.bars)]
    texts += [text for row in sheet.rows for text in (row.title, *(panel.title for panel in row.panels))]
    families, replaced = find_fonts("".join(texts))
    # Texts keep the families that were set when they were made.
    with mpl.rc_context({"font.family": families, "text.parse_math": False}):
        return _draw(sheet, page, replaced)


def _draw(sheet: Sheet, page: Page, replaced: dict[int, str]) -> Figure:
    rows = sheet.rows
    height, true_width, _ = rows[0].panels[0].pixels.shape
    aspect = min(max(true_width / height, 1 / _MAX_ASPECT), _MAX_ASPECT)
    stretch = true_width / height / aspect
    most_panels = max(2, *(len(row.panels) for row in rows))
    if page.width is None:
        width = min(_PANEL_SIDE * math.sqrt(aspect), _MAX_WIDTH, _MAX_HEIGHT * aspect)
        columns = min(most_panels, page.columns or _PANELS_PER_LINE)
        cell = max(width, _MIN_CELL)
        room = columns * (cell + 2 * _PAD)
    else:
        room = page.width / _MILLIMETRES
        columns = min(most_panels, page.columns or min(max(int(room), 2), _PANELS_PER_LINE))
        cell = room / columns - 2 * _PAD
        if cell < _MIN_CELL_ON_PAPER:
            raise ValueError(f"A width of {page.width:g} mm is too narrow for {columns} columns; ask for fewer.")
        width = min(cell, _MAX_HEIGHT * aspect)
    font = page.font_size or min(max(_FONT_PER_INCH * cell, _MIN_FONT), _FONT)
    title_font, line_height = _TITLE_FONT * font, _LINE_HEIGHT * font

    def wrap(text: str, across: float = room - 2 * _PAD, size: float = font) -> list[str]:
        parts = text.translate(replaced).split("\n")
        return [keep_order(line) for part in parts for line in wrap_text(part, across, size)]

    panels = [[(panel, wrap(panel.title, cell)) for panel in row.panels] for row in rows]
    titles = [wrap(row.title, size=title_font) for row in rows]
    notes = [wrap(note) for note in (*sheet.notes, _tell_stretch(stretch)) if note]
    labels = [wrap(bar.label) for bar in sheet.bars]
    lines = [math.ceil(max(len(row.panels) - 1, 1) / (columns - 1)) for row in rows]
    heights = []
    for drawn, count, title in zip(panels, lines, titles, strict=True):
        over_panels = max(len(over) for _, over in drawn) * line_height
        heights.append(
            len(title) * _TITLE_FONT * line_height
            + 2 * _PAD
            + count * (width / aspect + over_panels + 3 * _PAD)
            + _ROW_GAP
        )
    heights += [(len(label) + 1) * line_height + _BAR_HEIGHT + 5 * _PAD for label in labels]
    heights += [len(note) * line_height + 2 * _PAD for note in notes]
    figure = Figure((room, sum(heights)), layout=ConstrainedLayoutEngine(w_pad=_PAD, h_pad=_PAD, wspace=0, hspace=0))
    parts = iter(figure.subfigures(len(heights), squeeze=False, height_ratios=heights)[:, 0])

    def write(part: SubFigure, text: list[str], size: float) -> None:
        part.suptitle("\n".join(text), x=_PAD / room, ha="left", fontsize=size)

    for drawn, count, title in zip(panels, lines, titles, strict=True):
        part = next(parts)
        write(part, title, title_font)
        axes = part.subplots(count, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (panel, over) in zip([axes[0, 0], *axes[:, 1:].flat], drawn, strict=False):
            _draw_panel(axis, panel, stretch)
            axis.set_title("\n".join(over), fontsize=font, pad=3, linespacing=1.15)
    for bar, label in zip(sheet.bars, labels, strict=True):
        part = next(parts)
        write(part, label, font)
        bar_width = min(_BAR_WIDTH, 0.9 * room)
        axis, rest = part.subplots(1, 2, width_ratios=(bar_width, room - bar_width))
        rest.set_axis_off()
        _draw_bar(axis, bar, font)
    for note in notes:
        write(next(parts), note, font)
    return figure


def _tell_stretch(stretch: float) -> str:
    """What is said of images that are drawn in another shape; `stretch` is the width that was taken from them."""
    if stretch == 1:
        return ""
    direction, times = ("high", stretch) if stretch > 1 else ("wide", 1 / stretch)
    return f"Images are drawn {times:.3g} times as {direction} as they are, so that something can be seen."


def _draw_panel(axis: Axes, panel: Panel, stretch: float) -> None:
    axis.imshow(panel.pixels, aspect=stretch)
    axis.set_anchor("N")
    if panel.outline is not None:
        levels = [level for level in panel.levels if panel.outline.min() < level < panel.outline.max()]
        if levels:
            lines = axis.contour(panel.outline, levels, colors=OUTLINE_COLOUR, linewidths=1.2, linestyles="solid")
            lines.set_path_effects([withStroke(linewidth=2.4, foreground=_OUTLINE_EDGE), Normal()])


def _draw_bar(axis: Axes, bar: ColourBar, font: float) -> None:
    axis.imshow(bar.colours, aspect="auto", extent=(0, 1, 0, 1))
    axis.set_xticks([place for place, _ in bar.ticks], [text for _, text in bar.ticks], fontsize=0.9 * font)
    axis.tick_params(length=3, pad=1.5)
    first, *_, last = axis.get_xticklabels()
    first.set_horizontalalignment("left")
    last.set_horizontalalignment("right")
    axis.set_yticks([])
    for place in bar.lines:
        axis.axvline(place, color=OUTLINE_COLOUR, linewidth=1.4)


@lru_cache(maxsize=4096)
def _character_width(character: str, families: tuple[str, ...]) -> float:
    """What a character adds to a line, in units of the font's size; measured between bars, as spaces have no ink."""
    font = FontProperties(family=families)
    with_it, without = (
        TextPath((0, 0), text, size=10, prop=font).get_extents().width for text in (f"|{character}|", "||")
    )
    return (with_it - without) / 10


def text_width(text: str, font: float) -> float:
    """About the inches that a line takes, rather too many than too few; `font` in points."""
    # Fonts are fitted to pixels, which can make a line a little wider than its outlines.
    families = tuple(mpl.rcParams["font.family"])
    return 1.03 * sum(_character_width(character, families) for character in text) * font / 72


def wrap_text(text: str, width: float, font: float) -> list[str]:
    """Break a text into lines of at most `width` inches, between words where they fit; `font` in points."""
    for length in range(len(text), 1, -1):
        lines = textwrap.wrap(text, length)
        if all(text_width(line, font) <= width for line in lines):
            return lines
    return list(text)
