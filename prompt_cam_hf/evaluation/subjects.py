# SPDX-License-Identifier: MIT
"""The models that are compared (`Subject`), and the maps that can be measured on them (`MAPS`)."""

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from transformers import Pipeline, PreTrainedModel

from prompt_cam_hf.baselines.cams import ATTENTION_MAPS, CAM_METHODS, CamMethod, CamRun
from prompt_cam_hf.baselines.intr_config import INTRConfig
from prompt_cam_hf.explanations.aggregate import (
    AGGREGATIONS,
    DEFAULT_AGGREGATION,
    Aggregation,
    aggregate_maps_from_state,
)
from prompt_cam_hf.explanations.ranking import check_ranking
from prompt_cam_hf.loading import has_trait_maps, load_classifier, model_name
from prompt_cam_hf.metrics.scoring import Explainer

_FINER = "finer_"
# As in the code of Finer-CAM's authors.
_SIMILAR_CLASSES = 3
# Finer-CAM contrasts scores, so it needs a map that is computed from scores.
_POST_HOC = (*CAM_METHODS, *(f"{_FINER}{name}" for name in ("grad_cam", "hires_cam", "layer_cam")))
MAPS = (*AGGREGATIONS, *_POST_HOC)
# Those of the paper's Table 2 and stronger, later ones.
_DEFAULT_BASELINE_MAPS = (
    "grad_cam",
    "hires_cam",
    "layer_cam",
    "eigen_cam",
    "rollout",
    "chefer_cam",
    "finer_hires_cam",
)


class Subject(NamedTuple):
    """A model in evaluation mode with its name in tables, its image processor, and which of `MAPS` are measured."""

    name: str
    model: PreTrainedModel
    image_processor: Any
    maps: tuple[str, ...]

    @property
    def config(self) -> Any:
        """The model's configuration, in whose common class each field may be None."""
        return self.model.config


def load_subject(
    model: str | os.PathLike | Pipeline, maps: Sequence[str] | None = None, device: str | None = None
) -> Subject:
    """Load a Prompt-CAM, INTR, linear probe or VPT (from a folder, the Hub, or a pipeline), and choose its maps.

    For None as `maps`: the aggregated map of a Prompt-CAM or INTR, the usual post-hoc maps of other models.

    Raises:
        ValueError: a map is unknown, the model does not allow it, or it is damaged or needs code of its own.
        OSError: the model cannot be found.
    """
    if not isinstance(model, Pipeline):
        model = load_classifier(model, device)
    explains_itself = has_trait_maps(model.model.config.model_type)
    name = model_name(model.model.name_or_path or "") or type(model.model).__name__
    if maps is None:
        maps = (DEFAULT_AGGREGATION,) if explains_itself else _DEFAULT_BASELINE_MAPS
        maps = [one for one in maps if _fits(one, model.model)]
    for one in maps:
        if one not in MAPS:
            raise ValueError(f"There is no map {one!r}; choose among {', '.join(MAPS)}.")
        if not _fits(one, model.model):
            raise ValueError(
                f"{name} has no map {one!r}: its kind, or its number of heads or classes, does not allow it."
            )
    return Subject(name, model.model.eval(), model.image_processor, tuple(dict.fromkeys(maps)))


def _fits(name: str, model: PreTrainedModel) -> bool:
    if name in AGGREGATIONS:
        return has_trait_maps(model.config.model_type) and ("shapley" not in name or _has_few_heads(model))
    config: Any = model.config
    if config.model_type == INTRConfig.model_type and (config.is_on_resnet or name in ATTENTION_MAPS):
        return False
    return not name.startswith(_FINER) or config.num_labels > _SIMILAR_CLASSES


def _has_few_heads(model: PreTrainedModel) -> bool:
    """Whether Shapley values can be computed."""
    try:
        check_ranking(model, "shapley", "tokens")
    except ValueError:
        return False
    return True


class Reading:
    """What a model makes of images: its scores, and any map of any class, for which the network runs once.

    Args:
        model: The model, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        names: The maps, of `MAPS`, that will be asked for.

    Attributes:
        logits: (batch, num_labels), the scores, float32.
    """

    def __init__(self, model: PreTrainedModel, pixel_values: torch.Tensor, names: Iterable[str]):
        names = set(names)
        self._model = cast(Any, model)
        self._run = CamRun(model, pixel_values) if names - set(AGGREGATIONS) else None
        with torch.no_grad():
            if names & set(AGGREGATIONS):
                self._state = self._model.last_layer_state(pixel_values)
                logits = self._model.last_layer_logits(self._state)
            else:
                logits = self._run.logits if self._run else self._model(pixel_values).logits
        self.logits = logits.detach().float()

    def maps(self, name: str, classes: torch.Tensor) -> torch.Tensor:
        """The map `name` of `classes` (batch, k), (batch, k, rows, cols), on the CPU."""
        if name in AGGREGATIONS:
            how = cast(Aggregation, name)
            found = aggregate_maps_from_state(self._model, self._state, self.logits, classes, how)
        else:
            assert self._run is not None  # the name was announced
            similar = _SIMILAR_CLASSES if name.startswith(_FINER) else 0
            found = self._run.maps(cast(CamMethod, name.removeprefix(_FINER)), classes, similar)
        return found.detach().cpu()


def explainer(name: str) -> Explainer:
    """The function that computes a map: (model, pixel_values, classes (batch,)) -> (batch, rows, cols)."""
    return lambda model, pixel_values, classes: Reading(model, pixel_values, [name]).maps(name, classes[:, None])[:, 0]


def check_same_classes(first: Subject, second: Subject) -> None:
    """Refuse, with a ValueError, two models whose classes have other names or numbers."""
    mine, others = first.config.id2label, second.config.id2label
    for number in sorted(mine.keys() | others.keys()):
        if mine.get(number) != others.get(number):
            raise ValueError(
                f"{first.name} and {second.name} have different classes: number {number} is {mine.get(number)!r} in "
                f"the one and {others.get(number)!r} in the other. Compare models that were trained on the same data."
            )
