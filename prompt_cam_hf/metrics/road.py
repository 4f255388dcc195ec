# SPDX-License-Identifier: MIT
"""ROAD: whether a score depends on the pixels that a map marks, with removed pixels filled in from around them.

Rong et al. (A consistent and efficient evaluation strategy for attribution methods, ICML 2022): pixels that are set to
one colour leave their outline behind, and its shape alone can tell the class. Here each removed pixel becomes the
weighted mean of its eight neighbours, with a little noise: removed neighbours too, so a linear system is solved.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from prompt_cam_hf.explanations.holes import hole_system, solve_exactly
from prompt_cam_hf.metrics.scoring import (
    Scorer,
    asked_classes,
    check_one_map_an_image,
    class_logits,
    class_probability,
    pixel_ranks,
)

PERCENTILES = (10, 20, 30, 40, 50, 60, 70, 80, 90)
# As in the authors' code: weights of direct and of diagonal neighbours, and the noise in units of pixel_values.
DIRECT_WEIGHT, DIAGONAL_WEIGHT = 1 / 6, 1 / 12
NOISE = 0.01
_NEIGHBOUR_WEIGHTS = {
    (down, right): DIAGONAL_WEIGHT if down and right else DIRECT_WEIGHT
    for down in (-1, 0, 1)
    for right in (-1, 0, 1)
    if down or right
}


class RoadCurves(NamedTuple):
    """The result of ROAD for each image of a batch; all tensors are on the CPU.

    Attributes:
        classes: (batch,), the class whose probability was followed.
        percentiles: Parts of the pixels that were removed, in per cent.
        morf: (batch, percentiles): the class's softmax probability without that part of the pixels, the
            most relevant removed first; low is good.
        lerf: The same with the least relevant removed first; high is good.
        combined: (batch,), the mean over the percentiles of (lerf - morf) / 2, from -0.5 to 0.5; high is good, and
            an uninformative map gets about 0.
    """

    classes: torch.Tensor
    percentiles: tuple[float, ...]
    morf: torch.Tensor
    lerf: torch.Tensor
    combined: torch.Tensor


def road(
    model: Scorer,
    pixel_values: torch.Tensor,
    maps: torch.Tensor,
    classes: torch.Tensor | None = None,
    percentiles: Sequence[float] = PERCENTILES,
    noise: float = NOISE,
    seed: int = 0,
    batch_size: int = 32,
) -> RoadCurves:
    """Remove a map's most and least relevant pixels, fill the holes from around them, and classify the images again.

    The combined score is that of pytorch-grad-cam's `ROADCombined`. Equal pixels differ: there a threshold removes all
    of them or none, here they are removed in the order of `prompt_cam_hf.metrics.scoring.pixel_ranks`.

    Args:
        model: The classifier, in evaluation mode.
        pixel_values: (batch, channels, height, width), from the image processor.
        maps: (batch, rows, cols), one map an image; higher is more relevant.
        classes: (batch,), such as the true classes. None: the predicted class of the whole image.
        percentiles: Which parts of the pixels to remove, in per cent, above 0 and below 100.
        noise: Standard deviation of the noise on what fills the holes, in units of pixel_values.
        seed: Of the noise, which is the same for all images.
        batch_size: The number of images that go through the model at once.

    Raises:
        ValueError: classes or maps do not fit the images, or a percentile leaves no pixel or removes none.
    """
    check_one_map_an_image(maps, pixel_values)
    height, width = pixel_values.shape[-2:]
    counts = [round(percentile / 100 * height * width) for percentile in percentiles]
    if not counts or not all(0 < count < height * width for count in counts):
        raise ValueError(
            f"percentiles are {list(percentiles)}; of {height} x {width} pixels each must remove at least one and "
            "leave at least one, so be above 0 and below 100."
        )
    ranks = pixel_ranks(maps, (height, width)).numpy()
    classes = asked_classes(model, pixel_values, classes)
    noise_image = noise * torch.randn(pixel_values.shape[1:], generator=torch.Generator().manual_seed(seed))
    curves = []
    for image, rank, label in zip(pixel_values, ranks, classes, strict=True):
        most_first = [rank < count for count in counts]
        least_first = [rank >= height * width - count for count in counts]
        images = torch.stack([impute(image, removed, noise_image) for removed in most_first + least_first])
        chunks = [class_logits(model, chunk.to(image.device)) for chunk in images.split(batch_size)]
        logits = torch.cat(chunks)
        curves.append(class_probability(logits, label.expand(len(logits))).cpu().view(2, -1))
    morf, lerf = torch.stack(curves, dim=1)
    return RoadCurves(classes.cpu(), tuple(percentiles), morf, lerf, ((lerf - morf) / 2).mean(dim=-1))


def impute(image: torch.Tensor, removed: np.ndarray, noise_image: torch.Tensor) -> torch.Tensor:
    """Fill holes (`removed`, with at least one pixel left) by noisy linear imputation.

    Image and noise are (channels, height, width); the answer is on the CPU, in the precision of `image`.
    """
    pixels = image.detach().cpu().double().permute(1, 2, 0).numpy().copy()
    noise = noise_image.double().permute(1, 2, 0).numpy()
    pixels[removed] = solve_exactly(*hole_system(pixels, removed, _NEIGHBOUR_WEIGHTS)) + noise[removed]
    return torch.from_numpy(pixels).permute(2, 0, 1).to(image.dtype)
