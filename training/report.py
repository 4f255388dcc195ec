# SPDX-License-Identifier: MIT
"""What a finished run says of itself: numbers beside what they are worth, a learning curve, confusion matrices."""

import io
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.explanations.fonts import find_fonts, keep_order
from prompt_cam_hf.messages import printable
from prompt_cam_hf.metrics.classification import ClassificationReport

METRICS = {"top1": "top-1", "top5": "top-5", "macro_accuracy": "macro accuracy"}

# Below this number of images, the standard error of an accuracy can exceed five points: sqrt(0.25 / 100) = 0.05.
FEW_IMAGES = 100
# How many times its even share the largest class may have before it is said.
_UNEVEN = 1.5
# A confusion matrix of more classes has no names, one of more than these no numbers.
_MAX_NAMES, _MAX_NUMBERS = 250, 15
# Longer names are cut.
_MAX_LETTERS = 50
_DOTS_PER_INCH = 120


def standard_error(share: float, number: int) -> float:
    """The standard error of a share that was found in a number of independent images, 0 to 0.5."""
    return math.sqrt(share * (1 - share) / number)


def trivial_metrics(data: ImageData) -> dict[str, dict[str, float]]:
    """What can be reached without looking at any image.

    Returns:
        `chance`, with every class equally often; `largest_class`, where classes are always named in the order of
        their number of training images. Each has the metrics of `METRICS`, 0 to 1, the second one on the last of the
        splits train, validation and test that there is.
    """
    num_classes = len(data.id2label)
    chance = dict.fromkeys(METRICS, 1 / num_classes) | {"top5": min(5, num_classes) / num_classes}
    labels = np.asarray((data.test or data.validation or data.train)["label"])
    scores = np.tile(_class_sizes(data).astype(np.float32), (len(labels), 1))
    report = ClassificationReport(keep_in_memory=True).compute(predictions=scores, references=labels)
    return {"chance": chance, "largest_class": {name: report[name] for name in METRICS}}


def _class_sizes(data: ImageData) -> np.ndarray:
    return np.bincount(data.train["label"], minlength=len(data.id2label))


def find_weaknesses(data: ImageData) -> list[str]:
    """Say in sentences what makes the numbers of a run on these images worth less than they seem."""
    notes = []
    if data.validation is not None and len(data.validation) < FEW_IMAGES:
        points = 100 * standard_error(0.5, len(data.validation))
        notes.append(
            f"The best epoch is chosen on {len(data.validation)} validation images, where an accuracy has a standard "
            f"error of up to {points:.0f} points: epochs that differ by less cannot be told apart. More images in "
            "validation/, or a larger validation_fraction, would make the choice surer."
        )
    sizes = _class_sizes(data)
    share, even_share = sizes.max() / sizes.sum(), 1 / len(sizes)
    if share > _UNEVEN * even_share:
        largest = printable(data.id2label[int(sizes.argmax())])
        notes.append(
            f"{share:.0%} of the training images are of the class {largest}, where an even share is {even_share:.0%}: "
            "compare top-1 with the column `largest class`, which looks at no image, and macro accuracy, in which "
            "classes count alike, with chance."
        )
    for names in _alike(data.id2label.values()):
        notes.append(
            f"The classes {' and '.join(map(repr, names))} differ only in case, spaces, hyphens or underscores; if "
            "they are one class, put their images together."
        )
    return notes


def _alike(names: Any) -> list[list[str]]:
    found = defaultdict(list)
    for name in names:
        found[re.sub(r"[\s_-]", "", unicodedata.normalize("NFKC", name)).casefold()].append(name)
    return [group for group in found.values() if len(group) > 1]


def print_results(
    title: str, metrics: Mapping[str, Mapping[str, float]], num_images: Mapping[str, int], notes: Sequence[str]
) -> None:
    """Print a table of all metrics, with the standard error of top-1, and the notes below it."""
    shown = {
        name: values
        for name, values in metrics.items()
        if name != "largest_class" or f"{values['top1']:.1%}" != f"{metrics['chance']['top1']:.1%}"
    }
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in shown:
        heading = name.replace("_", " ")
        table.add_column(f"{heading} ({num_images[name]} images)" if name in num_images else heading, justify="right")
    for key, label in METRICS.items():
        cells = [f"{values[key]:.1%}" for values in shown.values()]
        if key == "top1":
            errors = [values.get("top1_standard_error") for values in shown.values()]
            cells = [
                cell if error is None else f"{cell} ± {100 * error:.1f}"
                for cell, error in zip(cells, errors, strict=True)
            ]
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    for note in notes:
        console.print(f"Note: {note}", markup=False, highlight=False, soft_wrap=True)


def plot_learning_curve(
    history: Sequence[Mapping[str, float]], best_epoch: int, metrics: Mapping[str, Mapping[str, float]]
) -> Figure:
    """Draw loss and validation accuracy by epoch, from the log of a Trainer."""
    has_validation = any("eval_top1" in line for line in history)
    figure = Figure(figsize=(9 if has_validation else 4.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 1 + has_validation, squeeze=False)[0]
    for panel, key, title in zip(panels, ("loss", "eval_top1"), ("Training loss", "Validation top-1"), strict=False):
        epochs, values = zip(*((line["epoch"], line[key]) for line in history if key in line), strict=True)
        panel.plot(epochs, values, color="#1f5fa8", marker="o" if len(epochs) < 30 else None, markersize=4)
        panel.axvline(best_epoch, color="#c05000", linestyle="--", label=f"epoch {best_epoch}, the one that is saved")
        panel.set(title=title, xlabel="Epoch", xlim=(0, max(epochs) * 1.03))
        panel.set_ylim(0, 1.08 * max(values) or 1)  # of an axis without length matplotlib would warn
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    if has_validation:
        panels[1].axhline(metrics["chance"]["top1"], color="#555555", linestyle=":", label="chance")
        panels[1].set_ylim(0, 1.03)
        panels[1].yaxis.set_major_formatter(PercentFormatter(1))
    panels[-1].legend(loc="best", fontsize="small")
    return figure


def plot_confusion(counts: pd.DataFrame, split: str) -> Figure:
    """Draw a confusion matrix: for each true class, a row, the share of its images that each class was named for.

    Args:
        counts: Rows are true classes, columns named ones.
        split: The images that were counted, for the title.
    """
    number = len(counts)
    totals = counts.sum(axis=1).to_numpy()
    shares = counts.to_numpy() / np.maximum(totals, 1)[:, None]
    side = float(np.clip(0.15 * number, 3, 36))
    size = 9 if number <= 30 else 7
    shown = list(map(printable, counts.index)) if number <= _MAX_NAMES else []
    families, replaced = find_fonts("".join(shown))
    short = (name if len(name) <= _MAX_LETTERS else f"{name[: _MAX_LETTERS - 1]}…" for name in shown)
    names = [keep_order(name.translate(replaced)) for name in short]
    margin = 0.0085 * size * max(map(len, names), default=4)
    figure = Figure(figsize=(side + margin + 1.8, side + margin + 1), layout="constrained")
    axes = figure.subplots()
    # The root of the share, so that a single mistake among many images has a colour.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1))
    figure.colorbar(
        image,
        ax=axes,
        label="share of the true class's images",
        ticks=[0, 0.05, 0.2, 0.4, 0.6, 0.8, 1],
        format=PercentFormatter(1),
        aspect=max(20, 4 * side),
        pad=0.01,
    )
    axes.set(xlabel="Predicted class", ylabel="True class", title=f"Confusions, {int(totals.sum())} {split} images")
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(10 + side / 3)
    # A dollar in a name is a dollar.
    style: dict[str, Any] = {"fontsize": size, "fontfamily": families, "parse_math": False}
    axes.set_xticks(range(len(names)), names, rotation=90, **style)
    axes.set_yticks(range(len(names)), names, **style)
    axes.set_xticks(np.arange(number + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(number + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dddddd", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    if number <= _MAX_NUMBERS:
        for row, col in zip(*np.nonzero(counts.to_numpy()), strict=True):
            colour = "white" if shares[row, col] > 0.4 else "black"
            axes.text(col, row, counts.iat[row, col], ha="center", va="center", fontsize=9, color=colour)
    return figure


def as_png(figure: Figure) -> bytes:
    """Draw a figure as the content of a PNG file."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH, bbox_inches="tight")
    return drawn.getvalue()
