# SPDX-License-Identifier: MIT
"""Sanity checks: how maps change under random parameters, for another class, and under changes that should not matter.

Adebayo et al. (Sanity checks for saliency maps, NeurIPS 2018): a map that survives when the model's parameters are
randomised does not explain the model. Changes of the image that leave the prediction alone should leave the map alone.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from scipy.stats import spearmanr
from torch import nn

from prompt_cam_hf.explanations.ranking import RankingMethod, rank_heads
from prompt_cam_hf.metrics.scoring import Explainer, Scorer, asked_classes, class_logits
from prompt_cam_hf.metrics.specificity import other_classes
from prompt_cam_hf.modeling import PromptCAMForImageClassification

# Modules through which an image goes before the first layer; the second name is CLIP's own spelling.
_BEFORE_THE_LAYERS = {"embeddings", "pre_layrnorm"}


class RandomisationTest(NamedTuple):
    """The similarity of maps to the intact model's while more and more of the model is randomised.

    Attributes:
        classes: (batch,), the class asked about at every stage.
        stages: What was randomised at each stage, in addition to all stages before it.
        similarity: (batch, stages), float64: Spearman's rank correlation of the map with the intact model's, -1 to 1.
            NaN where one of the two maps is constant.
    """

    classes: torch.Tensor
    stages: tuple[str, ...]
    similarity: torch.Tensor


class Stability(NamedTuple):
    """The similarity of explanations before and after changes of the image that should not matter.

    Attributes:
        classes: (batch,), the class asked about.
        noise: (batch,), float64: Spearman's rank correlation with the intact image's explanation, under noise.
        flip: (batch,), the same for the image mirrored left to right.
        noise_kept: (batch,), boolean: the prediction is the same under noise. Where it is not, the explanation may
            change too.
        flip_kept: (batch,), the same for the mirrored image.
    """

    classes: torch.Tensor
    noise: torch.Tensor
    flip: torch.Tensor
    noise_kept: torch.Tensor
    flip_kept: torch.Tensor


def rank_correlation(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of each pair, (batch,), float64, from two tensors (batch, ...).

    Equal values share their mean rank. NaN where one of a pair is constant.
    """
    pairs = zip(first.flatten(1).cpu().double().numpy(), second.flatten(1).cpu().double().numpy(), strict=True)
    return torch.tensor(
        [float("nan") if a.min() == a.max() or b.min() == b.max() else spearmanr(a, b).statistic for a, b in pairs],
        dtype=torch.float64,
    )


def parameter_randomisation(
    model: nn.Module,
    pixel_values: torch.Tensor,
    explain: Explainer,
    classes: torch.Tensor | None = None,
    seed: int = 0,
) -> RandomisationTest:
    """Randomise a model from its end to its beginning, and compare the maps with the intact model's at every stage.

    The cascading test of Adebayo et al. The stages of a Prompt-CAM are its class prompts, its classifier,
    its agnostic prompts, then each layer from the last to the first, and the embeddings (`randomisation_stages`).
    Attention maps cannot depend on the classifier: their similarity does not change at that stage.

    A departure from the paper: values are not initialised anew but shuffled within each tensor, so that the network
    keeps the scale of its weights and no knowledge of its initialisation is needed.

    Args:
        model: The model, in evaluation mode. It is copied, and stays as it is.
        pixel_values: (batch, channels, height, width).
        explain: Makes the maps, (model, pixel_values, classes (batch,)) -> (batch, rows, cols).
        classes: (batch,), such as the true classes. None: those that the intact model predicts.
        seed: The seed of the shuffling.

    Raises:
        ValueError: classes do not fit, or the model has no list of layers.
    """
    classes = asked_classes(model, pixel_values, classes)
    intact = explain(model, pixel_values, classes)
    stages, similarities = [], []
    for stage, randomised in randomise(model, seed):
        stages.append(stage)
        similarities.append(rank_correlation(intact.detach(), explain(randomised, pixel_values, classes).detach()))
    return RandomisationTest(classes.cpu(), tuple(stages), torch.stack(similarities, dim=1))


def randomise(model: nn.Module, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """Shuffle the parameters of a copy of a model, stage by stage; see `parameter_randomisation`.

    Yields:
        What was shuffled last, and the copy, which is the same object at every stage.

    Raises:
        ValueError: the model has no list of layers.
    """
    randomised = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for stage, parameters in randomisation_stages(randomised):
        for parameter in parameters:
            _shuffle(parameter, generator)
        yield stage, randomised


def randomisation_stages(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    """A model's parameters in groups, from its end to its beginning; each belongs to one group.

    The layers are those of the model's longest list of modules. The embeddings, with CLIP's norm of them, come last;
    all else (class prompts, classifier, norms, poolers, agnostic prompts) comes before the layers, by its own name.

    Raises:
        ValueError: the model has no list of modules.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of layers to randomise one by one.")
    layers = max(lists, key=lambda name: len(lists[name]))
    is_layer = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if found := is_layer.match(name):
            group = f"layer {found[1]}"
        elif _BEFORE_THE_LAYERS & set(name.split(".")):
            group = "embeddings"
        else:
            group = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1].replace("_", " ")
        groups.setdefault(group, []).append(parameter)
    # Prompts of the inner layers come behind the norm that ends the network.
    places = {"class prompts": 0, "classifier": 1, "embeddings": 5}

    def place(group: str) -> tuple[int, int]:
        if group.startswith("layer "):
            return 4, -int(group.removeprefix("layer "))
        return places.get(group, 3 if "prompts" in group else 2), 0

    for group in sorted(groups, key=place):
        yield group, groups[group]


@torch.no_grad()
def _shuffle(parameter: nn.Parameter, generator: torch.Generator) -> None:
    order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
    parameter.copy_(parameter.flatten()[order].view_as(parameter))


def random_class_similarity(
    model: Scorer, pixel_values: torch.Tensor, explain: Explainer, classes: torch.Tensor | None = None, seed: int = 0
) -> torch.Tensor:
    """Spearman's rank correlation of a class's map with that of a random other class, (batch,), float64; low is good.

    The random class, drawn by `seed`, is neither the class itself nor its runner-up; see `other_classes`. Maps that do
    not change with the class do not explain it. The other arguments are those of `parameter_randomisation`.

    Raises:
        ValueError: classes do not fit, or the model has fewer than three classes.
    """
    classes = asked_classes(model, pixel_values, classes)
    _, random = other_classes(class_logits(model, pixel_values), classes, seed)
    return rank_correlation(*(explain(model, pixel_values, asked).detach() for asked in (classes, random)))


def map_stability(
    model: Scorer,
    pixel_values: torch.Tensor,
    explain: Explainer,
    image_std: Sequence[float],
    classes: torch.Tensor | None = None,
    noise_std: float = 5.0,
    seed: int = 0,
) -> Stability:
    """Compare maps with those of the image under noise, and mirrored, where the map is mirrored back.

    Args:
        model: The classifier, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        explain: Makes the maps, as in `parameter_randomisation`.
        image_std: Standard deviation that each channel was normalised with, as in the image processor.
        classes: (batch,), asked about in all three images. None: those predicted on the intact one.
        noise_std: Standard deviation of the noise, in grey levels of 0 to 255.
        seed: The seed of the noise, which is the same for all images.

    Raises:
        ValueError: classes or `image_std` do not fit.
    """
    return _stability(model, pixel_values, explain, lambda maps: maps.flip(-1), image_std, classes, noise_std, seed)


def add_noise(
    pixel_values: torch.Tensor, image_std: Sequence[float], noise_std: float = 5.0, seed: int = 0
) -> torch.Tensor:
    """Images with the noise of `map_stability`, of the same shape.

    Raises:
        ValueError: `image_std` does not fit.
    """
    if len(image_std) != pixel_values.shape[1]:
        raise ValueError(f"image_std is {image_std}; it must be {pixel_values.shape[1]} numbers, one a channel.")
    noise = torch.randn(pixel_values.shape[1:], generator=torch.Generator().manual_seed(seed)) * noise_std / 255
    noise = noise / torch.tensor(list(image_std)).view(-1, 1, 1)
    return pixel_values + noise.to(pixel_values)


def head_stability(
    model: PromptCAMForImageClassification,
    pixel_values: torch.Tensor,
    image_std: Sequence[float],
    classes: torch.Tensor | None = None,
    noise_std: float = 5.0,
    seed: int = 0,
    method: RankingMethod = "greedy",
) -> Stability:
    """Compare the ranking of a Prompt-CAM's heads with that of the image under noise, and mirrored.

    `method` is that of `prompt_cam_hf.explanations.ranking.rank_heads`; all else, errors included, is as in
    `map_stability`.
    """

    def places(model: PromptCAMForImageClassification, images: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        return rank_heads(model, images, asked, method).order.argsort(dim=-1)

    return _stability(model, pixel_values, places, lambda ranks: ranks, image_std, classes, noise_std, seed)


def _stability(
    model: Scorer,
    pixel_values: torch.Tensor,
    explain: Explainer,
    flip_back: Callable[[torch.Tensor], torch.Tensor],
    image_std: Sequence[float],
    classes: torch.Tensor | None,
    noise_std: float,
    seed: int,
) -> Stability:
    noisy, mirrored = add_noise(pixel_values, image_std, noise_std, seed), pixel_values.flip(-1)
    predictions, noisy_predictions, mirrored_predictions = (
        class_logits(model, images).argmax(dim=-1).cpu() for images in (pixel_values, noisy, mirrored)
    )
    classes = asked_classes(model, pixel_values, predictions if classes is None else classes)
    intact = explain(model, pixel_values, classes).detach()
    return Stability(
        classes.cpu(),
        rank_correlation(intact, explain(model, noisy, classes).detach()),
        rank_correlation(intact, flip_back(explain(model, mirrored, classes).detach())),
        noisy_predictions == predictions,
        mirrored_predictions == predictions,
    )
