# SPDX-License-Identifier: MIT
"""Class specificity: how a map changes when another class is asked about, and when a trait in the image changes.

A map that is the same for every class is saliency: it may lie on the bird, but it does not show a trait of a class.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from prompt_cam_hf.metrics.localization import relevance_mass_accuracy
from prompt_cam_hf.metrics.scoring import Explainer, Scorer, asked_classes, class_logits, class_probability


class ClassSpecificity(NamedTuple):
    """How the maps of different classes differ, for each image of a batch; all on the CPU.

    Attributes:
        classes: (batch, 3): the given class; the runner-up, which has the highest score among the others; and a random
            one of the rest.
        maps: (batch, 3, rows, cols), the map of each.
        distance: (batch, 2), 1 - cosine between the given class's map and that of the runner-up, of the random class:
            0 for maps of the same shape, 1 for maps without common patches, up to 2 where maps have negative values.
            NaN where a map is zero everywhere.
        overlap: (batch, 2), intersection over union of the strongest patches of the same two pairs, 0 to 1.
        mass: (batch, 3), the part of each map's sum on the mask (`relevance_mass_accuracy`); None without masks. A map
            that is specific has less on the trait when another class is asked about.
    """

    classes: torch.Tensor
    maps: torch.Tensor
    distance: torch.Tensor
    overlap: torch.Tensor
    mass: torch.Tensor | None


def class_specificity(
    model: Scorer,
    pixel_values: torch.Tensor,
    explain: Explainer,
    classes: torch.Tensor,
    masks: ArrayLike | None = None,
    top: float = 0.1,
    seed: int = 0,
) -> ClassSpecificity:
    """Ask for the map of the true class, of the runner-up and of a random class.

    Args:
        model: The classifier, in evaluation mode, of at least three classes.
        pixel_values: (batch, channels, height, width).
        explain: Makes the maps, (model, pixel_values, classes (batch,)) -> (batch, rows, cols). To compare
            the same head, choose the head by something other than the class asked about.
        classes: (batch,), the true classes.
        masks: (batch, height, width), boolean, where the true class's traits are: on the grid of the maps, or pixels.
        top: The part of the patches that count as strongest for `overlap`, at least one patch.
        seed: Of the random class. It depends on this, the true class and the runner-up alone, so that an image gets
            the same one in any batch.

    Raises:
        ValueError: the model has fewer than three classes, classes do not fit, or `top` is not above 0 and at most 1.
    """
    logits = class_logits(model, pixel_values)
    classes = asked_classes(model, pixel_values, classes)
    asked = torch.stack((classes, *other_classes(logits, classes, seed)), dim=1)
    maps = torch.stack([explain(model, pixel_values, one).detach().float().cpu() for one in asked.T], dim=1)
    return specificity_of_maps(asked, maps, masks, top)


def specificity_of_maps(
    classes: torch.Tensor, maps: torch.Tensor, masks: ArrayLike | None = None, top: float = 0.1
) -> ClassSpecificity:
    """Compare maps that are there already: `classes` (batch, 3) and their `maps` (batch, 3, rows, cols).

    All else, errors included, is as in `class_specificity`.
    """
    if not 0 < top <= 1:
        raise ValueError(f"top is {top}; it must be above 0 and at most 1, the part of the patches that count.")
    flat = maps.flatten(2)
    norms = flat.norm(dim=-1)
    cosine = nn.functional.cosine_similarity(flat[:, :1], flat[:, 1:], dim=-1)
    distance = torch.where((norms[:, :1] > 0) & (norms[:, 1:] > 0), 1 - cosine, torch.nan)
    strongest = _strongest(flat, max(round(top * flat.shape[-1]), 1))
    common = (strongest[:, :1] & strongest[:, 1:]).sum(-1) / (strongest[:, :1] | strongest[:, 1:]).sum(-1)
    mass = None if masks is None else torch.from_numpy(relevance_mass_accuracy(maps, np.asarray(masks)[:, None]))
    return ClassSpecificity(classes.cpu(), maps, distance, common, mass)


def other_classes(logits: torch.Tensor, classes: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The runner-up and a random one of the remaining classes, each (batch,), from logits (batch, num_labels).

    Raises:
        ValueError: there are fewer than three classes.
    """
    num_labels = logits.shape[1]
    if num_labels < 3:
        raise ValueError(f"The model has {num_labels} classes; a runner-up and a random class need at least three.")
    runner_up = logits.scatter(1, classes[:, None], -torch.inf).argmax(dim=1)
    random = [
        np.random.default_rng((seed, *pair)).choice([label for label in range(num_labels) if label not in pair])
        for pair in zip(classes.tolist(), runner_up.tolist(), strict=True)
    ]
    return runner_up, torch.tensor(random, device=classes.device)


def _strongest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean, of the shape of `values`: the `count` highest along the last axis, of equal ones the first."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(values, dtype=torch.bool).scatter(-1, order[..., :count], True)


class CounterfactualChange(NamedTuple):
    """The effect of a changed trait, for each pair of a batch; on the CPU. The last axis of each pair: before, after.

    Attributes:
        classes: (batch,), the class asked about.
        scores: (batch, 2), its logit.
        probabilities: (batch, 2), its softmax probability.
        predictions: (batch, 2), the class with the highest score.
        mass: (batch, 2), the part of its map's sum on the trait; None without maps.
    """

    classes: torch.Tensor
    scores: torch.Tensor
    probabilities: torch.Tensor
    predictions: torch.Tensor
    mass: torch.Tensor | None


def counterfactual_change(
    model: Scorer,
    before: torch.Tensor,
    after: torch.Tensor,
    classes: torch.Tensor | None = None,
    explain: Explainer | None = None,
    masks: ArrayLike | None = None,
) -> CounterfactualChange:
    """Compare images with the same images in which one trait was redrawn or taken away.

    `prompt_cam_hf.birds.counterfactual` makes such pairs of drawn birds, `remove_trait` of photographs.

    Args:
        model: The classifier, in evaluation mode.
        before: pixel_values (batch, channels, height, width) of the images as they were.
        after: The same of the changed ones.
        classes: (batch,), such as the true classes. None: the class predicted before.
        explain: Makes maps as in `class_specificity`; with it give masks.
        masks: (batch, height, width), boolean, where the trait is: on the grid of the maps, or pixels.

    Raises:
        ValueError: the images are not in pairs, or only one of `explain` and `masks` is given.
    """
    if before.shape != after.shape:
        raise ValueError(f"before has the shape {tuple(before.shape)} and after {tuple(after.shape)}; pairs need one.")
    if (explain is None) != (masks is None):
        raise ValueError("Give both explain and masks for the map's mass on the trait, or neither.")
    classes = asked_classes(model, before, classes)
    logits = [class_logits(model, pixel_values) for pixel_values in (before, after)]
    mass = None
    if explain is not None:
        maps = torch.stack([explain(model, images, classes).detach().cpu() for images in (before, after)], dim=1)
        mass = torch.from_numpy(relevance_mass_accuracy(maps, np.asarray(masks)[:, None]))
    return CounterfactualChange(
        classes.cpu(),
        torch.stack([values.gather(1, classes[:, None])[:, 0] for values in logits], dim=1).cpu(),
        torch.stack([class_probability(values, classes) for values in logits], dim=1).cpu(),
        torch.stack([values.argmax(dim=1) for values in logits], dim=1).cpu(),
        mass,
    )
