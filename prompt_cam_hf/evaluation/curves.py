# SPDX-License-Identifier: MIT
"""The mean curves of insertion and deletion: as a file of their own, and as a page draws them."""

import io
import math
from typing import NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from prompt_cam_hf.evaluation.summary import Evaluation
from prompt_cam_hf.metrics.faithfulness import changed_parts

# Okabe and Ito's colours for all kinds of colour vision (https://jfly.uni-koeln.de/color). Curves can be told apart
# without them, too: by markers and dashes.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#000000", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = "os^DPvX"
# The same as SVG paths, 9 wide.
MARKER_PATHS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.5-3.5h7v7h-7z", "M0-4.5l4.5 8h-9z", "M0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z",
    "M-1.5-4.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", "M0 4.5l4.5-8h-9z",
    "M-4.5-2.5l2-2 2.5 2.5 2.5-2.5 2 2-2.5 2.5 2.5 2.5-2 2-2.5-2.5-2.5 2.5-2-2 2.5-2.5z",
)  # fmt: skip
_DASHES = ("", "8 3", "8 3 2 3", "2 3")
_MARKERS_ON_A_LINE = 5
_CHART_WIDTH, _CHART_HEIGHT = 380, 240
_AXES = {"insertion": "share of the pixels that is shown", "deletion": "share of the pixels that is taken away"}


class Line(NamedTuple):
    """How the curves of a map are drawn: numbers of `COLOURS` and `MARKER_PATHS`, and dashes as in SVG."""

    label: str
    colour: int
    marker: int
    dashes: str


class Chart(NamedTuple):
    """The curves of one metric in the coordinates of SVG, in a frame of `width` and `height`.

    `curves` holds each line with its points as text and the places of its markers, `ticks` heights and what they mean.
    """

    metric: str
    axis: str
    width: int
    height: int
    curves: list[tuple[Line, str, list[tuple[float, float]]]]
    ticks: list[tuple[float, str]]


def lines(found: Evaluation) -> dict[tuple[str, str], Line]:
    """A line for each (model, map); the first 49 differ in colour or marker."""
    keys = dict.fromkeys((model, map_name) for model, map_name, _ in found.curves)
    kinds = len(COLOURS)
    return {
        key: Line(": ".join(key), place % kinds, (place + place // kinds) % kinds, _DASHES[place % len(_DASHES)])
        for place, key in enumerate(keys)
    }


def _marked(place: int, parts: np.ndarray) -> list[int]:
    """The points of a curve that get a marker, others for each line; `parts` are its places from 0 to 1."""
    share = (place % len(COLOURS)) / len(COLOURS)
    wanted = (np.arange(_MARKERS_ON_A_LINE) + share) / _MARKERS_ON_A_LINE
    return np.abs(parts[:, None] - wanted).argmin(axis=0).tolist()


def draw_curves(found: Evaluation) -> bytes:
    """Draw the mean curves side by side, as SVG."""
    shown = lines(found)
    figure = Figure(figsize=(9, 3.4 + 0.2 * math.ceil(len(shown) / 2)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (metric, meaning) in zip(axes, _AXES.items(), strict=True):
        for place, ((model, map_name), line) in enumerate(shown.items()):
            curve = found.curves[model, map_name, metric]
            parts = changed_parts(found.protocol.preset, len(curve) - 1).numpy()
            (drawn,) = axis.plot(
                parts, curve, linewidth=1.4, label=line.label, color=COLOURS[line.colour],
                marker=_MARKERS[line.marker], markersize=5, markevery=_marked(place, parts),
            )  # fmt: skip
            if line.dashes:
                drawn.set_dashes([float(length) / 1.4 for length in line.dashes.split()])
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel(meaning)
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean probability of the class")
    axes[0].set_ylim(0, None)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=2, handlelength=5)
    buffer = io.BytesIO()
    # Without it, the identifiers inside are random.
    with rc_context({"svg.hashsalt": "prompt_cam_hf"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def charts(found: Evaluation) -> list[Chart]:
    """The chart of each metric; all have one scale, from 0 to a tick above the highest value."""
    highest = min(max(float(curve.max()) for curve in found.curves.values()), 1.0)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if highest <= 5 * step)
    num_steps = max(math.ceil(highest / step), 1)
    ticks = [(_CHART_HEIGHT * (1 - number / num_steps), f"{number * step:.2g}") for number in range(num_steps + 1)]
    found_charts = []
    for metric, axis in _AXES.items():
        curves = []
        for place, ((model, map_name), line) in enumerate(lines(found).items()):
            curve = np.asarray(found.curves[model, map_name, metric], np.float64)
            parts = changed_parts(found.protocol.preset, len(curve) - 1).numpy()
            across = (_CHART_WIDTH * parts).round(1).tolist()
            down = (_CHART_HEIGHT * (1 - curve / (num_steps * step))).round(1).tolist()
            points = list(zip(across, down, strict=True))
            text = " ".join(f"{x:g},{y:g}" for x, y in points)
            curves.append((line, text, [points[index] for index in _marked(place, parts)]))
        found_charts.append(Chart(metric, axis, _CHART_WIDTH, _CHART_HEIGHT, curves, ticks))
    return found_charts
