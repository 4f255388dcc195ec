# SPDX-License-Identifier: MIT
"""Figures of trait maps beside the truth: drawn birds with their traits outlined, clear cases and failures.

Which birds are shown is fixed by a rule that is written over each function, not chosen by eye.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.explanations.figures import MapStyle, find_scale
from prompt_cam_hf.explanations.sheet import Panel, Row, Sheet, draw_sheet
from prompt_cam_hf.modeling import PromptCAMForImageClassification

from .classes import BIRD_CLASSES, BirdSpec
from .dataset import row_spec
from .drawing import draw_bird
from .evaluation import BirdReading, without_values

# Birds are drawn again at this size, so that an image of 96 pixels need not be enlarged.
_SIDE = 240
_RANKS = ("most important", "second", "third")
_EVERY_NTH_CLASS = 4


class _Shown(NamedTuple):
    """A bird, with the true traits' pixels (height, width; boolean) outlined, or what a head makes of it."""

    title: str
    image: Image.Image
    traits: np.ndarray
    head: int | None = None
    trait_map: np.ndarray | None = None


def plot_trait_hits(birds: datasets.Dataset, reading: BirdReading) -> Figure:
    """Draw where the first three heads look, and where the first one looks for another class; a row for each bird.

    Shown is the first correctly classified bird of every fourth class. The other class is the best-scoring one that
    shares no part with the true one.
    """
    return _plot([_hit_row(birds, reading, row) for row in _clear_cases(reading)], "head")


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
        + [_hit_row(birds, reading, row, "read correctly, but the first head misses the trait") for row in beside],
        "head",
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
                _Shown(f"{what}: {read_as} ({score[best]:.0%})", image, traits),
                _Shown("most important head", image, traits, head, trait_map),
            ]
        rows.append((BIRD_CLASSES[label].name, panels))
    return _plot(rows, "map")


def _clear_cases(reading: BirdReading) -> list[int]:
    """The first correctly classified bird of every fourth class, where there is one."""
    correct = reading.predictions == reading.labels
    labels = range(0, len(BIRD_CLASSES), _EVERY_NTH_CLASS)
    found = [np.flatnonzero(correct & (reading.labels == label))[:1].tolist() for label in labels]
    return [row for rows in found for row in rows]


def _hit_row(birds: datasets.Dataset, reading: BirdReading, row: int, remark: str = "") -> tuple[str, list[_Shown]]:
    label = int(reading.labels[row])
    image, traits = _draw_again(row_spec(birds[row]), label)
    heads = reading.head_order[row, : len(_RANKS)].tolist()
    maps = reading.trait_maps[row]
    panels = [_Shown("true trait outlined", image, traits)]
    for rank, head in zip(_RANKS, heads, strict=False):
        panels.append(_Shown(rank, image, traits, head, maps[label, head]))
    other = _rival(reading.logits[row], label)
    title = f"asked by {BIRD_CLASSES[other].name}"
    panels.append(_Shown(title, image, traits, heads[0], maps[other, heads[0]]))
    return BIRD_CLASSES[label].name + (f" ({remark})" if remark else ""), panels


def _misread_row(birds: datasets.Dataset, reading: BirdReading, row: int) -> tuple[str, list[_Shown]]:
    label, predicted = int(reading.labels[row]), int(reading.predictions[row])
    image, traits = _draw_again(row_spec(birds[row]), label)
    maps = reading.trait_maps[row]
    panels = [_Shown("true trait outlined", image, traits)]
    for who, asked in (("predicted", predicted), ("true", label)):
        for head in reading.head_order[row, :2].tolist():
            panels.append(_Shown(f"asked by {who} class", image, traits, head, maps[asked, head]))
    return f"{BIRD_CLASSES[label].name}, misread as {BIRD_CLASSES[predicted].name}", panels


def _rival(logits: np.ndarray, label: int) -> int:
    """The best-scoring class that shares no part with the true one."""
    parts = set(BIRD_CLASSES[label].parts)
    shares = np.array([bool(parts & set(bird.parts)) for bird in BIRD_CLASSES])
    return int(np.where(shares, -np.inf, logits).argmax())


def _draw_again(spec: BirdSpec, label: int) -> tuple[Image.Image, np.ndarray]:
    image, masks = draw_bird(spec, _SIDE)
    return image, np.logical_or.reduce([masks[part] for part in BIRD_CLASSES[label].parts])


def _plot(birds: Sequence[tuple[str, Sequence[_Shown]]], scale: Literal["map", "head"]) -> Figure:
    """A row for each bird; a head's scale is that of its maps in the row."""
    rows = []
    for title, shown in birds:
        maps = [(part.head, part.trait_map) for part in shown if part.head is not None and part.trait_map is not None]
        scales = find_scale(maps, scale)
        panels: list[Panel] = []
        for part in shown:
            style = MapStyle(part.image, None, "attention", scales, outline=False, scale=scale)
            if part.head is None or part.trait_map is None:
                panels.append(style.image_panel(part.title, part.traits))
            else:
                panel = style.draw(part.head, part.trait_map, part.title)
                panels.append(replace(panel, outline=part.traits.astype(np.float32)))
        rows.append(Row(title, panels))
    bar = style.colour_bar()
    in_row = " in the row" if scale == "head" else ""
    bar = replace(bar, label=f"{bar.label}{in_row}; outlined: the traits that define the class")
    return draw_sheet(Sheet(rows, [bar]))
