# SPDX-License-Identifier: MIT
"""Measurements of a Prompt-CAM on drawn birds: is it right, and for the right reason, each beside what chance reaches.

Real images cannot tell. A drawn bird has a mask of every part, and can be drawn again without its trait.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.explanations.removal import remove_region
from prompt_cam_hf.metrics.localization import (
    chance_level,
    patch_mask,
    pointing_game,
    region_iou,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
    top_k_intersection,
)
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.ranking_prompt_cam import rank_heads_greedily
from prompt_cam_hf.progress import follow

from .classes import BIRD_CLASSES, TRAIT_PARTS, BirdSpec, counterfactual
from .dataset import row_spec
from .drawing import draw_bird

# Patches that are blurred together, and images that go through the network together.
_TOP_PATCHES = 3
_BATCH_SIZE = 64


@dataclass(frozen=True)
class BirdReading:
    """What a model makes of labelled birds, one entry a bird.

    Attributes:
        labels: (birds,), the true classes.
        logits: (birds, classes), the scores.
        head_order: (birds, heads), heads by importance for the predicted class, the most important one first.
        trait_maps: (birds, classes, heads, rows, cols), float32: attention of every class's prompt.
        trait_patches: (birds, rows, cols), boolean: patches on the parts that define the true class.
        bird_patches: (birds, rows, cols), boolean: patches on the bird.
    """

    labels: np.ndarray
    logits: np.ndarray
    head_order: np.ndarray
    trait_maps: np.ndarray
    trait_patches: np.ndarray
    bird_patches: np.ndarray

    @property
    def predictions(self) -> np.ndarray:
        """(birds,), the classes with the highest score."""
        return self.logits.argmax(axis=1)

    @property
    def hits(self) -> np.ndarray:
        """(birds,): 1 where the first head, asked by the true class, looks at the trait, else 0 (`pointing_game`)."""
        return pointing_game(self.first_head_maps[np.arange(len(self.labels)), self.labels], self.trait_patches)

    @property
    def first_head_maps(self) -> np.ndarray:
        """(birds, classes, rows, cols): the first head of each bird, asked by every class."""
        return self.trait_maps[np.arange(len(self.labels)), :, self.head_order[:, 0]]


@torch.no_grad()
def read_birds(
    model: PromptCAMForImageClassification, image_processor: BaseImageProcessor, birds: datasets.Dataset
) -> BirdReading:
    """Classify birds of `birds_dataset`, rank the heads, and keep every class's trait maps beside the true places.

    Raises:
        ValueError: the model was trained on other classes than `BIRD_CLASSES`.
    """
    names = [bird.name for bird in BIRD_CLASSES]
    if list(model.config.id2label.values()) != names:
        raise ValueError(
            f"The model's classes are not the {len(names)} drawn birds, so their traits are unknown to it."
        )
    found: list[tuple[torch.Tensor, ...]] = []
    prepared = model.prepared()
    for images in _batches(follow(birds["image"], len(birds), "Reading traits", " images")):
        with prepared:
            state = model.last_layer_state(_pixel_values(model, image_processor, images))
        logits = model.last_layer_logits(state)
        order = rank_heads_greedily(model, state, logits.argmax(dim=-1, keepdim=True)).order[:, 0]
        classes = torch.arange(len(names), device=model.device).expand(len(images), -1)
        found.append((logits.cpu(), order.cpu(), model.trait_maps(state, classes).cpu()))
    logits, order, maps = (torch.cat(tensors).numpy() for tensors in zip(*found, strict=True))
    grid = maps.shape[-2:]
    traits = np.stack([np.asarray(mask) > 0 for mask in birds["discriminative_mask"]])
    seen = np.stack([np.asarray(bits) > 0 for bits in birds["masks"]])
    return BirdReading(
        np.asarray(birds["label"]), logits, order, maps, patch_mask(traits, grid), patch_mask(seen, grid)
    )


def measure_localisation(reading: BirdReading) -> dict[str, dict[str, float]]:
    """Measure how well the first-ranked heads' maps hit the traits, on the birds that were classified correctly.

    Returns:
        By metric, the mean of: `first_head`, asked by the true class; `other_classes`, the same heads asked by all
        other classes (some share a trait with the true one); `bird_patches` and `any_patches`, chance levels.

    Raises:
        ValueError: no bird was classified correctly.
    """
    correct = _correct_rows(reading)
    rows = correct[reading.trait_patches[correct].any(axis=(1, 2))]
    maps, labels = reading.first_head_maps[rows], reading.labels[rows]
    traits, bird = reading.trait_patches[rows], reading.bird_patches[rows]
    is_true = np.arange(maps.shape[1]) == labels[:, None]
    metrics = {
        "pointing_game": pointing_game(maps, traits[:, None]),
        f"top_{_TOP_PATCHES}_intersection": top_k_intersection(maps, traits[:, None], _TOP_PATCHES),
        "relevance_mass_accuracy": relevance_mass_accuracy(maps, traits[:, None]),
        "relevance_rank_accuracy": relevance_rank_accuracy(maps, traits[:, None]),
        "region_iou": region_iou(maps, traits[:, None]),
    }
    bird_level, any_level = chance_level(traits, within=bird).mean(), chance_level(traits).mean()
    chance = {name: (bird_level, any_level) for name in metrics}
    chance["region_iou"] = (region_iou(bird, traits).mean(), region_iou(np.ones_like(bird), traits).mean())
    return {
        name: {
            "first_head": float(scores[is_true].mean()),
            "other_classes": float(scores[~is_true].mean()),
            "bird_patches": float(chance[name][0]),
            "any_patches": float(chance[name][1]),
        }
        for name, scores in metrics.items()
    }


def measure_removal(
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    birds: datasets.Dataset,
    reading: BirdReading,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Measure what becomes of correct predictions when a place, or a trait, is taken out of the birds that were read.

    The seed draws the places and parts that the traits are compared with.

    Returns:
        `accuracy_left`, on the birds that were classified correctly: after blurring the first head's three
        `strongest_patches`, and three random `bird_patches`. `predictions_flipped`: after `all_traits` of the class
        got their natural tint; after `one_trait` did (each in its turn; the rest may fit two classes equally well);
        and after one `other_part` did, a random one of those that are coloured (NaN where no bird has one).

    Raises:
        ValueError: no bird was classified correctly.
    """
    correct = _correct_rows(reading).tolist()
    maps = reading.first_head_maps
    changed: list[tuple[str, int, Image.Image]] = []
    shown = follow(correct, len(correct), "Taking traits away", " images")
    for row, bird in zip(shown, birds.select(correct), strict=True):
        rng = np.random.default_rng((seed, row))
        strongest = np.argsort(-maps[row, reading.labels[row]], axis=None, kind="stable")[:_TOP_PATCHES]
        random = rng.permutation(np.flatnonzero(reading.bird_patches[row]))[:_TOP_PATCHES]
        for name, patches in (("strongest_patches", strongest), ("bird_patches", random)):
            changed.append((name, row, _without_patches(bird["image"], patches, maps.shape[-2:])))
        spec, traits = row_spec(bird), BIRD_CLASSES[bird["label"]].parts
        for name, parts in _parts_to_take(spec, traits, rng):
            changed.append((name, row, draw_bird(without_values(spec, parts), bird["image"].width)[0]))
    names, rows, images = zip(*changed, strict=True)
    predictions = _predict(model, image_processor, follow(images, len(images), "Reading them again", " images"))
    same = predictions == reading.labels[list(rows)]
    kept = {name: float(same[[other == name for other in names]].mean()) for name in dict.fromkeys(names)}
    return {
        "accuracy_left": {name: kept[name] for name in ("strongest_patches", "bird_patches")},
        "predictions_flipped": {
            name: 1 - kept.get(name, np.nan) for name in ("all_traits", "one_trait", "other_part")
        },
    }


def _correct_rows(reading: BirdReading) -> np.ndarray:
    rows = np.flatnonzero(reading.predictions == reading.labels)
    if not len(rows):
        raise ValueError(
            f"None of the {len(reading.labels)} birds was read correctly, so there is nothing to measure."
        )
    return rows


def without_values(spec: BirdSpec, parts: Iterable[str]) -> BirdSpec:
    """Give some trait parts of a bird their natural tint, in the same image."""
    return reduce(counterfactual, parts, spec)


def _parts_to_take(
    spec: BirdSpec, traits: tuple[str, ...], rng: np.random.Generator
) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield "all_traits", traits
    yield from (("one_trait", (part,)) for part in traits)
    others = [part for part in TRAIT_PARTS if part not in traits and spec.values[part]]
    yield from (("other_part", (part,)) for part in rng.permutation(others)[:1].tolist())


def _without_patches(image: Image.Image, patches: np.ndarray, grid: tuple[int, int]) -> Image.Image:
    """The image with the patches of these numbers blurred; its sides are multiples of the grid's."""
    mask = np.zeros(grid, dtype=bool)
    mask.flat[patches] = True
    pixels = np.kron(mask, np.ones((image.height // grid[0], image.width // grid[1]), dtype=bool))
    return remove_region(image, pixels, "blur")


@torch.no_grad()
def _predict(
    model: PromptCAMForImageClassification, image_processor: BaseImageProcessor, images: Iterable[Image.Image]
) -> np.ndarray:
    logits = [model(_pixel_values(model, image_processor, batch)).logits for batch in _batches(images)]
    return torch.cat(logits).argmax(dim=-1).cpu().numpy()


def _batches(images: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    iterator = iter(images)
    while batch := list(islice(iterator, _BATCH_SIZE)):
        yield batch


def _pixel_values(
    model: PromptCAMForImageClassification, image_processor: BaseImageProcessor, images: list[Image.Image]
) -> torch.Tensor:
    return image_processor(images, return_tensors="pt")["pixel_values"].to(model.device)
