# SPDX-License-Identifier: MIT
"""Insertion and deletion: whether a score depends on the pixels that a map marks, by protocols that have names.

Petsiuk et al. (RISE, BMVC 2018). Insertion shows a blurred image's pixels sharp again, the map's
strongest first: the score should rise early, so a large area under its curve is good. Deletion takes the pixels away:
a small area is good. Numbers of different protocols cannot be compared, so every result carries its preset's name.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import nn

from prompt_cam_hf.metrics.scoring import (
    Scorer,
    asked_classes,
    check_one_map_an_image,
    class_logits,
    class_probability,
    pixel_ranks,
    probabilities_after_replacing,
)

# RISE blurs with a kernel of 11 pixels and a standard deviation of 5, whatever the image's size.
_BLUR_PIXELS, _BLUR_SIGMA = 11, 5


@dataclass(frozen=True)
class Preset:
    """A protocol of insertion and deletion.

    Attributes:
        step: How many pixels change between two evaluations. "row": as many as one row of the image has, so 224 at
            224 pixels, and as many steps as the image has rows. "growing": an eighth of these steps, so 28 at 224
            pixels; after step k of n the part (k / n)^2 of the pixels has changed, for curves bend at their beginning.
            "patch": as many as one cell of the map covers, which is a patch for maps on the patch grid, and as many
            steps as the map has cells.
        deleted: What a deleted pixel becomes. "zeros": zero in pixel_values, the mean colour of the processor's
            normalisation. "black": black in the image.
    """

    step: Literal["row", "growing", "patch"]
    deleted: Literal["zeros", "black"]


PRESETS = MappingProxyType(
    {
        "rise": Preset(step="row", deleted="zeros"),
        "rise-eighth": Preset(step="growing", deleted="zeros"),
        "rise-black": Preset(step="row", deleted="black"),
        "fast": Preset(step="patch", deleted="zeros"),
    }
)


Metric = Literal["insertion", "deletion"]


class FaithfulnessCurve(NamedTuple):
    """The result of insertion or deletion for each image of a batch.

    All tensors are on the CPU.

    Attributes:
        metric: "insertion" or "deletion".
        preset: The name of the protocol.
        classes: (batch,), the class whose probability was followed.
        curve: (batch, num_steps + 1), float32: its softmax probability after 0, 1, ... num_steps steps.
        auc: (batch,), the area under the curve, 0 to 1.
        num_steps: Steps from none to all of the pixels; `changed_parts` says how far each goes.
    """

    metric: Metric
    preset: str
    classes: torch.Tensor
    curve: torch.Tensor
    auc: torch.Tensor
    num_steps: int


def insertion(
    model: Scorer,
    pixel_values: torch.Tensor,
    maps: torch.Tensor,
    classes: torch.Tensor | None = None,
    preset: str = "rise",
    batch_size: int = 32,
) -> FaithfulnessCurve:
    """Follow the probability of a class while a blurred image gets its pixels back, the map's strongest first.

    The blur is that of RISE's published code: pixel_values with zeros beyond the border, under a Gaussian kernel of 11
    pixels and standard deviation 5. Pixels are ordered by `prompt_cam_hf.metrics.scoring.pixel_ranks`, which describes
    how maps of other grids are resized and equal pixels are ordered.

    Args:
        model: The classifier, in evaluation mode.
        pixel_values: (batch, channels, height, width), from the image processor.
        maps: (batch, rows, cols), one map an image; higher is stronger.
        classes: (batch,), such as the true classes. None: the predicted class of the whole image.
        preset: A key of `PRESETS`.
        batch_size: The number of images that go through the model at once.

    Raises:
        ValueError: the preset is unknown, or classes or maps do not fit the images.
    """
    return follow_maps(model, pixel_values, [maps], classes, preset, batch_size, metrics=("insertion",))[0]


def deletion(
    model: Scorer,
    pixel_values: torch.Tensor,
    maps: torch.Tensor,
    classes: torch.Tensor | None = None,
    preset: str = "rise",
    batch_size: int = 32,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> FaithfulnessCurve:
    """Follow the probability of a class while an image loses its pixels, the map's strongest first.

    All but the last two arguments are those of `insertion`.

    Args:
        image_mean: The mean of each channel in the image processor. Needed for deletion to black.
        image_std: The standard deviation of each channel in the image processor. Needed for deletion to black.

    Raises:
        ValueError: `insertion` would refuse the arguments, or the preset deletes to black and `image_mean` or
            `image_std` is missing.
    """
    statistics = image_mean, image_std
    return follow_maps(model, pixel_values, [maps], classes, preset, batch_size, *statistics, metrics=("deletion",))[0]


def follow_maps(
    model: Scorer,
    pixel_values: torch.Tensor,
    maps: Sequence[torch.Tensor],
    classes: torch.Tensor | None = None,
    preset: str = "rise",
    batch_size: int = 32,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    metrics: Sequence[Metric] = ("insertion", "deletion"),
) -> list[FaithfulnessCurve]:
    """Insertion and deletion for several maps of the same images, for all of which the curves' ends are computed once.

    Args:
        maps: Each (batch, rows, cols), one map an image.
        metrics: Which of the two.

    The other arguments and the errors are those of `deletion`.

    Returns:
        For each of the maps, the curves of all metrics: map by map.
    """
    if preset not in PRESETS:
        raise ValueError(f"There is no preset {preset!r}; choose one of {', '.join(PRESETS)}.")
    settings = PRESETS[preset]
    ends: dict[Metric, tuple[torch.Tensor, torch.Tensor]] = {}
    if "insertion" in metrics:
        ends["insertion"] = blur(pixel_values), pixel_values
    if "deletion" in metrics:
        is_black = settings.deleted == "black"
        blank = black(pixel_values, image_mean, image_std) if is_black else torch.zeros_like(pixel_values)
        ends["deletion"] = pixel_values, blank
    for one in maps:
        check_one_map_an_image(one, pixel_values)
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    ranks = [pixel_ranks(one, size) for one in maps]
    classes = asked_classes(model, pixel_values, classes)
    # Insertion ends where deletion begins: with the whole image.
    scored: dict[int, torch.Tensor] = {}
    for images in (images for pair in ends.values() for images in pair):
        if id(images) not in scored:
            logits = torch.cat([class_logits(model, chunk) for chunk in images.split(batch_size)])
            scored[id(images)] = class_probability(logits, classes).cpu()[:, None]
    found = []
    for one, rank in zip(maps, ranks, strict=True):
        counts = changed_pixels(preset, size, one.shape[-2:])
        parts = changed_parts(preset, len(counts) - 1).float()
        for metric, (first, last) in ends.items():
            inner = probabilities_after_replacing(model, first, last, rank, counts[1:-1], classes, batch_size)
            curve = torch.cat((scored[id(first)], inner, scored[id(last)]), dim=1)
            area = torch.trapezoid(curve, parts)
            found.append(FaithfulnessCurve(metric, preset, classes.cpu(), curve, area, len(counts) - 1))
    return found


def changed_pixels(preset: str, size: tuple[int, int], grid: Sequence[int]) -> torch.Tensor:
    """How many pixels have changed after 0, 1, ... num_steps steps, (num_steps + 1,).

    Args:
        preset: A key of `PRESETS`.
        size: Height and width of the image.
        grid: Rows and columns of the map.
    """
    height, width = size
    if PRESETS[preset].step == "growing":
        return (changed_parts(preset, math.ceil(height / 8)) * height * width).round().long()
    step = width if PRESETS[preset].step == "row" else math.ceil(height * width / math.prod(grid))
    return torch.arange(math.ceil(height * width / step) + 1) * step


def changed_parts(preset: str, num_steps: int) -> torch.Tensor:
    """The horizontal axis of a curve, (num_steps + 1,), double, 0 to 1: the part of the pixels that has changed.

    Where the last step is shorter, it counts as much as the others.
    """
    steps = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return steps**2 if PRESETS[preset].step == "growing" else steps


def blur(pixel_values: torch.Tensor) -> torch.Tensor:
    """The image from which insertion starts, of the same shape."""
    impulse = np.zeros(_BLUR_PIXELS)
    impulse[_BLUR_PIXELS // 2] = 1
    # RISE blurs an impulse in an 11 x 11 box, reflected at its border: not quite a Gaussian that is cut off.
    kernel = torch.from_numpy(gaussian_filter1d(impulse, _BLUR_SIGMA)).to(pixel_values.device, torch.float32)
    channels = pixel_values.shape[1]
    columns = kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
    padding = _BLUR_PIXELS // 2
    blurred = nn.functional.conv2d(pixel_values.float(), columns, padding=(padding, 0), groups=channels)
    blurred = nn.functional.conv2d(blurred, columns.mT, padding=(0, padding), groups=channels)
    return blurred.to(pixel_values.dtype)


def black(
    pixel_values: torch.Tensor, image_mean: Sequence[float] | None, image_std: Sequence[float] | None
) -> torch.Tensor:
    """Black images as an image processor would normalise them, of the shape of `pixel_values`."""
    channels = pixel_values.shape[1]
    if image_mean is None or image_std is None or not len(image_mean) == len(image_std) == channels:
        raise ValueError(
            f"image_mean is {image_mean} and image_std {image_std}; black in pixel_values needs both, as the image "
            f"processor has them: {channels} numbers, one a channel."
        )
    mean, std = (pixel_values.new_tensor(list(values)).view(1, -1, 1, 1) for values in (image_mean, image_std))
    return (-mean / std).expand_as(pixel_values)
