# SPDX-License-Identifier: MIT
"""Scoring images whose pixels are replaced in the order of a map, which insertion, deletion and ROAD all do.

A `Scorer` is anything that turns pixel_values into logits: a model for image classification of transformers, or a
function.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from prompt_cam_hf.modeling.outputs_prompt_cam import check_class_numbers

# (batch, channels, height, width) -> logits (batch, num_labels), or an output that has them as `logits`.
Scorer = Callable[[torch.Tensor], Any]
# (model, pixel_values, classes) -> one map an image, (batch, rows, cols); higher is stronger.
Explainer = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.no_grad()
def class_logits(model: Scorer, pixel_values: torch.Tensor) -> torch.Tensor:
    """The scores of all classes, float32, (batch, num_labels), on the device of the images."""
    output = model(pixel_values)
    return (output if isinstance(output, torch.Tensor) else output.logits).to(pixel_values.device, torch.float32)


def class_probability(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The softmax probability of one class an image, (batch,), from (batch, num_labels) and (batch,)."""
    check_class_numbers(classes, logits.shape[1], "classes")
    return logits.softmax(dim=-1).gather(-1, classes[:, None])[:, 0]


def asked_classes(model: Scorer, pixel_values: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
    """The classes to ask about, (batch,): those given, such as the true ones, or for None the predicted ones.

    Raises:
        ValueError: `classes` is not one whole number an image.
    """
    if classes is None:
        return class_logits(model, pixel_values).argmax(dim=-1)
    classes = torch.as_tensor(classes, device=pixel_values.device)
    if classes.shape != pixel_values.shape[:1] or classes.is_floating_point():
        raise ValueError(
            f"classes has the shape {tuple(classes.shape)} and the type {classes.dtype}; it must be one whole number "
            f"for each of the {len(pixel_values)} images, or None for the predicted classes."
        )
    return classes.long()


def pixel_ranks(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The place of each pixel when the strongest comes first: int32, (batch, height, width), 0 to height * width - 1.

    A map of any grid is brought to `size` by bilinear interpolation between the centres of its cells. Equal pixels
    keep the order of reading: row by row from the top, left to right. The order is found on the CPU, with values that
    are interpolated in double precision and rounded to single, so that an image has the same order alone, in any
    batch and on any device.

    Args:
        maps: (batch, rows, cols), finite; higher is stronger.
        size: Height and width in pixels.

    Raises:
        ValueError: the maps have another shape, or numbers that are not finite.
    """
    if maps.ndim != 3:
        raise ValueError(f"maps have the shape {tuple(maps.shape)}; they must be (batch, rows, cols), one an image.")
    values = maps.detach().cpu().double()
    if not values.isfinite().all():
        raise ValueError("maps hold numbers that are not finite; pixels cannot be ordered by them.")
    resized = nn.functional.interpolate(values[:, None], size=size, mode="bilinear").flatten(1).float()
    order = resized.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(order.shape[1], dtype=torch.int32).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places).unflatten(1, size)


def check_one_map_an_image(maps: torch.Tensor, pixel_values: torch.Tensor) -> None:
    """Refuse, with a ValueError, another number of maps than of images."""
    if len(maps) != len(pixel_values):
        raise ValueError(f"There are {len(maps)} maps for {len(pixel_values)} images; give one an image.")


def probabilities_after_replacing(
    model: Scorer,
    original: torch.Tensor,
    replacement: torch.Tensor,
    ranks: torch.Tensor,
    counts: torch.Tensor,
    classes: torch.Tensor,
    batch_size: int,
) -> torch.Tensor:
    """The probability of a class when its image's first pixels are replaced, float32, (batch, counts), on the CPU.

    The pixel values `original` become those of `replacement`, both (batch, channels, height, width), in the order of
    `ranks` (`pixel_ranks`), as many as each number in `counts` says: one evaluation of the model for every image.
    """
    if not len(counts):
        return torch.empty(len(original), 0)
    ranks, counts = ranks.to(original.device), counts.to(original.device)
    evaluations = torch.arange(len(original) * len(counts), device=original.device)
    probabilities = []
    for chunk in evaluations.split(batch_size):
        images = chunk // len(counts)
        replaced = ranks[images] < counts[chunk % len(counts), None, None]
        mixed = torch.where(replaced[:, None], replacement[images], original[images])
        probabilities.append(class_probability(class_logits(model, mixed), classes[images]))
    return torch.cat(probabilities).view(len(original), -1).cpu()
