# SPDX-License-Identifier: MIT
"""Figures of trait maps beside the truth: drawn birds with their traits outlined, clear cases and failures.

Which birds are shown is fixed by a rule that is written over each function, not chosen by eye.
"""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.explanations.figures import overlay
from prompt_cam_hf.modeling import PromptCAMForImageClassification

from .classes import BIRD_CLASSES, BirdSpec
from .dataset import row_spec
from .drawing import draw_bird
from .evaluation import BirdReading, without_values

# Birds are drawn again at this size, so that an image of 96 pixels need not be enlarged.
_SIDE = 240
_INCHES = 1.9
# Dark on light and light on dark, and no colour of the maps.
_OUTLINE = ("#101010", "#7fffd4")
_RANKS = ("1st", "2nd", "3rd")
_EVERY_NTH_CLASS = 4


class _Panel(NamedTuple):
    """An image, or a map on it, with the true traits' pixels (height, width; boolean) outlined."""

    title: str
    image: Image.Image
    traits: np.ndarray
    trait_map: np.ndarray | None = None


def plot_trait_hits(birds: datasets.Dataset, reading: BirdReading) -> Figure:
    """Draw where the first three heads look, and where the first one looks for another class; a row for each bird.

    Shown is the first correctly classified bird of every fourth class. The other class is the best-scoring one that
    shares no part with the true one.
    """
    return _plot([_hit_row(birds, reading, row) for row in _clear_cases(reading)])


def plot_failures(birds: datasets.Dataset, reading: BirdReading, count: int = 3) -> Figure | None:
    """Draw what goes wrong: misread birds, and correctly read ones whose first head misses the trait.

    A misread bird has the two first heads of the predicted class, and the same two asked by the true class. Shown are
    the first `count` birds of each kind; the answer is None where nothing went wrong.
    """
    misread = np.flatnonzero(reading.predictions != reading.labels)[:count].tolist()
    beside = np.flatnonzero((reading.predictions == reading.labels) & (reading.hits == 0))[:count].tolist()
    if not misread and not beside:
        return None
    return _plot(
        [_misread_row(birds, reading, row) for row in misread]
        + [_hit_row(birds, reading, row, "read correctly, but the first head misses the trait") for row in beside]
    )


@torch.no_grad()
def plot_counterfactuals(
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    birds: datasets.Dataset,
    reading: BirdReading,
) -> Figure:
    """Draw the same birds with and without the traits of their class: scores, and the map of the same head.

    Shown are the birds of `plot_trait_hits`, drawn at the size that the model was trained on, a row for each.
    """
    rows = []
    for row in _clear_cases(reading):
        bird, label, head = birds[row], int(reading.labels[row]), int(reading.head_order[row, 0])
        specs = (row_spec(bird), without_values(row_spec(bird), BIRD_CLASSES[label].parts))
        images = [draw_bird(spec, bird["image"].width)[0] for spec in specs]
        pixel_values = image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
        output = model(pixel_values, trait_classes=torch.tensor([label]))
        scores, maps = output.logits.softmax(dim=-1).cpu(), output.trait_maps[:, 0, head].cpu().numpy()
        panels = []
        for spec, score, trait_map, what in zip(specs, scores, maps, ("as drawn", "without the trait"), strict=True):
            image, traits = _draw_again(spec, label)
            best = int(score.argmax())
            read_as = "the same class" if best == label else BIRD_CLASSES[best].name
            panels += [
                _Panel(f"{what}: {score[best]:.0%}\n{_broken(read_as)}", image, traits),
                _Panel(f"head {head}\n{_peak(trait_map)}", image, traits, trait_map),
            ]
        rows.append((BIRD_CLASSES[label].name, panels))
    return _plot(rows)


def _clear_cases(reading: BirdReading) -> list[int]:
    """The first correctly classified bird of every fourth class, where there is one."""
    correct = reading.predictions == reading.labels
    labels = range(0, len(BIRD_CLASSES), _EVERY_NTH_CLASS)
    found = [np.flatnonzero(correct & (reading.labels == label))[:1].tolist() for label in labels]
    return [row for rows in found for row in rows]


def _hit_row(birds: datasets.Dataset, reading: BirdReading, row: int, remark: str = "") -> tuple[str, list[_Panel]]:
    label = int(reading.labels[row])
    image, traits = _draw_again(row_spec(birds[row]), label)
    heads = reading.head_order[row, : len(_RANKS)].tolist()
    maps = reading.trait_maps[row]
    panels = [_Panel("true trait outlined\n", image, traits)]
    for rank, head in zip(_RANKS, heads, strict=False):
        panels.append(_Panel(f"{rank}: head {head}\n{_peak(maps[label, head])}", image, traits, maps[label, head]))
    other = _rival(reading.logits[row], label)
    title = f"head {heads[0]} asked by\n{_broken(BIRD_CLASSES[other].name)}"
    panels.append(_Panel(title, image, traits, maps[other, heads[0]]))
    return BIRD_CLASSES[label].name + (f" ({remark})" if remark else ""), panels


def _misread_row(birds: datasets.Dataset, reading: BirdReading, row: int) -> tuple[str, list[_Panel]]:
    label, predicted = int(reading.labels[row]), int(reading.predictions[row])
    image, traits = _draw_again(row_spec(birds[row]), label)
    maps = reading.trait_maps[row]
    panels = [_Panel("true trait outlined\n", image, traits)]
    for who, asked in (("predicted", predicted), ("true", label)):
        for head in reading.head_order[row, :2].tolist():
            panels.append(
                _Panel(f"{who} class, head {head}\n{_peak(maps[asked, head])}", image, traits, maps[asked, head])
            )
    return f"{BIRD_CLASSES[label].name}, misread as {BIRD_CLASSES[predicted].name}", panels


def _rival(logits: np.ndarray, label: int) -> int:
    """The best-scoring class that shares no part with the true one."""
    parts = set(BIRD_CLASSES[label].parts)
    shares = np.array([bool(parts & set(bird.parts)) for bird in BIRD_CLASSES])
    return int(np.where(shares, -np.inf, logits).argmax())


def _draw_again(spec: BirdSpec, label: int) -> tuple[Image.Image, np.ndarray]:
    image, masks = draw_bird(spec, _SIDE)
    return image, np.logical_or.reduce([masks[part] for part in BIRD_CLASSES[label].parts])


def _peak(trait_map: np.ndarray) -> str:
    return f"peak {trait_map.max():.0%}"


def _broken(name: str) -> str:
    return name.replace(", ", ",\n")


def _plot(rows: Sequence[tuple[str, Sequence[_Panel]]]) -> Figure:
    """Rows of panels, each under its title; all maps of a row are on one scale."""
    columns = max(len(panels) for _, panels in rows)
    lines = [max(panel.title.count("\n") for panel in panels) for _, panels in rows]
    heights = [_INCHES + 0.42 + 0.14 * count for count in lines]
    figure = Figure(figsize=(columns * _INCHES, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for (title, panels), part in zip(rows, parts, strict=True):
        part.suptitle(title, fontsize=10, fontweight="bold", x=0.01, ha="left")
        vmax = max(panel.trait_map.max() for panel in panels if panel.trait_map is not None)
        for axis, panel in zip(part.subplots(1, columns, squeeze=False)[0], panels, strict=False):
            shown = panel.image if panel.trait_map is None else overlay(panel.image, panel.trait_map, vmax)
            axis.imshow(shown)
            axis.contour(panel.traits, [0.5], colors=_OUTLINE[0], linewidths=2.2)
            axis.contour(panel.traits, [0.5], colors=_OUTLINE[1], linewidths=1.0)
            axis.set_title(panel.title, fontsize=8)
            axis.set_axis_off()
    return figure
