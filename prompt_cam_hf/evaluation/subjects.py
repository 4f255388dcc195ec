# SPDX-License-Identifier: MIT
"""Which models are compared, and which maps of each?"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from transformers import Pipeline, PreTrainedModel, pipeline
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.baselines import CAM_METHODS, cam_maps
from prompt_cam_hf.explanations.aggregate import AGGREGATIONS, DEFAULT_AGGREGATION, aggregate_maps
from prompt_cam_hf.explanations.ranking import check_ranking
from prompt_cam_hf.metrics.scoring import Explainer

_FINER = "finer_"
# The number of similar classes in the code of Finer-CAM's authors.
_SIMILAR_CLASSES = 3
# Finer-CAM contrasts scores, so it needs a map that is made from them.
_POST_HOC = (*CAM_METHODS, *(f"{_FINER}{name}" for name in ("grad_cam", "hires_cam", "layer_cam")))
MAPS = (*AGGREGATIONS, *_POST_HOC)
# Of a Prompt-CAM the first that fits; of others, those of the paper's Table 2 with the strongest rivals since.
_DEFAULT_MAPS = (DEFAULT_AGGREGATION, "attention_top3")
_DEFAULT_BASELINE_MAPS = ("grad_cam", "hires_cam", "layer_cam", "eigen_cam", "rollout", "finer_hires_cam")


class Subject(NamedTuple):
    """A model, and the maps of it that are measured.

    Attributes:
        name: As tables show it.
        model: In evaluation mode.
        image_processor: The model's.
        maps: Names of `MAPS`.
    """

    name: str
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    maps: tuple[str, ...]


def load_subject(
    model: str | os.PathLike | Pipeline, maps: Sequence[str] | None = None, device: str | None = None
) -> Subject:
    """Load a model and choose its maps.

    Args:
        model: A Prompt-CAM, a linear probe or a VPT: a folder, a Hub id, or a pipeline.
        maps: Names of `MAPS`. None: for a Prompt-CAM its aggregated map, for others the usual rivals.
        device: Where a model is loaded to.

    Raises:
        ValueError: a map is unknown, or the model has no such map.
        OSError: the model cannot be found.
    """
    if not isinstance(model, Pipeline):
        model = pipeline("image-classification", model=os.fspath(model), device=device)
    is_prompt_cam = model.model.config.model_type == "prompt_cam"
    name = _short_name(str(model.model.name_or_path)) or type(model.model).__name__
    if maps is None:
        maps = _DEFAULT_MAPS if is_prompt_cam else _DEFAULT_BASELINE_MAPS
        maps = [one for one in maps if _fits(one, model.model)][: 1 if is_prompt_cam else None]
    for one in maps:
        if one not in MAPS:
            raise ValueError(f"There is no map {one!r}; choose among {', '.join(MAPS)}.")
        if not _fits(one, model.model):
            raise ValueError(
                f"{name} has no map {one!r}: its kind, or its number of heads or classes, does not allow it."
            )
    return Subject(name, model.model.eval(), model.image_processor, tuple(dict.fromkeys(maps)))


def _short_name(path: str) -> str:
    """The last word of a Hub id or of a folder's path; "" for none."""
    return os.path.basename(os.path.abspath(path) if os.path.isdir(path) else path)


def _fits(name: str, model: PreTrainedModel) -> bool:
    if name in AGGREGATIONS:
        return model.config.model_type == "prompt_cam" and (name.split("_")[1] != "shapley" or _has_few_heads(model))
    return not name.startswith(_FINER) or model.config.num_labels > _SIMILAR_CLASSES


def _has_few_heads(model: PreTrainedModel) -> bool:
    """Whether Shapley values can be computed."""
    try:
        check_ranking(model, "shapley", "tokens")
    except ValueError:
        return False
    return True


def explainer(name: str) -> Explainer:
    """The function that makes a map, (model, pixel_values, classes (batch,)) -> (batch, rows, cols)."""
    if name in AGGREGATIONS:
        return partial(_aggregated, how=name)
    return partial(_post_hoc, name=name)


def _aggregated(model: PreTrainedModel, pixel_values: torch.Tensor, classes: torch.Tensor, how: str) -> torch.Tensor:
    return aggregate_maps(model, pixel_values, classes, how)


def _post_hoc(model: PreTrainedModel, pixel_values: torch.Tensor, classes: torch.Tensor, name: str) -> torch.Tensor:
    method = name.removeprefix(_FINER)
    similar = _SIMILAR_CLASSES if name != method else 0
    return cam_maps(model, pixel_values, method, classes, similar_classes=similar)


def check_same_classes(first: Mapping[int, str], second: Mapping[int, str], names: tuple[str, str]) -> None:
    """Refuse to compare models of other classes.

    Raises:
        ValueError: names or numbers of the classes differ.
    """
    if dict(first) != dict(second):
        differing = next((n for n in sorted(set(first) | set(second)) if first.get(n) != second.get(n)), None)
        raise ValueError(
            f"{names[0]} and {names[1]} have different classes: number {differing} is {first.get(differing)!r} in the "
            f"one and {second.get(differing)!r} in the other. Compare models that were trained on the same data."
        )


__all__ = ["MAPS", "Subject", "check_same_classes", "explainer", "load_subject"]
