# SPDX-License-Identifier: MIT
"""Combining the maps of all heads into one map.

The paper shows heads one by one, and sums up its top heads where a metric needs a single map (section 4); it does not
say how many. docs/evaluation.md compares the ways below on birds whose traits are known.
"""

from typing import Literal, get_args

import torch

from prompt_cam_hf.explanations.class_names import check_classes
from prompt_cam_hf.explanations.maps import MapKind, maps_from_state
from prompt_cam_hf.explanations.ranking import rank_heads_from_state
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.outputs_prompt_cam import LastLayerState

Aggregation = Literal[
    "attention_sum",
    "attention_first",
    "attention_top3",
    "attention_sufficient",
    "attention_shapley",
    "attention_evidence",
    "attention_shapley_evidence",
    "evidence_sum",
    "evidence_positive",
]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
# The best on drawn validation birds; docs/evaluation.md has the search and the numbers.
DEFAULT_AGGREGATION: Aggregation = "attention_evidence"
_NUM_TOP_HEADS = 3


# Evidence needs gradients, so tensors that were not made in inference mode, whatever the caller's mode is.
@torch.inference_mode(False)
def aggregate_maps(
    model: PromptCAMForImageClassification,
    pixel_values: torch.Tensor,
    classes: torch.Tensor | None = None,
    how: Aggregation = DEFAULT_AGGREGATION,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Combine the maps of all heads into one map for each class and image.

    The first word of `how` is the kind of the heads' maps (as in `trait_maps`), the second how they are combined:

    - "sum": the sum over all heads. Negative evidence is subtracted.
    - "first", "top3": the sum over the first head, or the first three, of the greedy ranking.
    - "sufficient": the sum over the heads that keep the class on top by themselves, by the greedy ranking.
    - "shapley": the sum over all heads, each weighted by its Shapley value; negative values count as 0. All sets of
      heads are tried, so the model may have up to 16 heads.
    - "evidence": the sum over all heads of attention times what is above 0 of the evidence at the same patch.
    - "shapley_evidence": the same, each head weighted by its Shapley value as well.
    - "positive": the sum over all heads of what is above 0 in them.

    Args:
        model: The model, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        classes: (batch,) or (batch, k), the classes asked about. None: the predicted class.
        how: One of `AGGREGATIONS`.
        interpolate_pos_encoding: As in the model's `forward`.

    Returns:
        (batch, rows, cols), or (batch, k, rows, cols) where `classes` has that axis; float32.

    Raises:
        ValueError: `how` is unknown, `classes` does not fit, or there are too many heads for Shapley values.
    """
    if how not in AGGREGATIONS:
        raise ValueError(f"how={how!r} is not known; use one of {', '.join(AGGREGATIONS)}.")
    with torch.no_grad():
        state = model.last_layer_state(pixel_values, interpolate_pos_encoding)
        logits = model.last_layer_logits(state)
        asked = check_classes(logits.argmax(dim=-1) if classes is None else classes.to(logits.device), *logits.shape)
    maps = aggregate_maps_from_state(model, state, logits, asked, how)
    return maps if classes is not None and classes.ndim == 2 else maps[:, 0]


@torch.inference_mode(False)
def aggregate_maps_from_state(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    logits: torch.Tensor,
    classes: torch.Tensor,
    how: Aggregation = DEFAULT_AGGREGATION,
) -> torch.Tensor:
    """Combine maps as `aggregate_maps` does, from a state of the network that is there already.

    `logits` are (batch, num_labels) of that state, `classes` (batch, k); the maps are (batch, k, rows, cols).
    """
    kind: MapKind
    kind, *ways = how.split("_")  # type: ignore[assignment]
    maps = maps_from_state(model, state, classes, kind)
    for way in ways:
        if way == "positive":
            maps = maps.relu()
        elif way == "evidence":
            maps = maps * maps_from_state(model, state, classes, "evidence").relu()
        elif way != "sum":
            maps = maps * _head_weights(model, state, logits, classes, way)[..., None, None]
    return maps.sum(dim=2)


def _head_weights(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    logits: torch.Tensor,
    classes: torch.Tensor,
    way: str,
) -> torch.Tensor:
    """The weight of each head in the sum, (batch, k, heads)."""
    if way == "shapley":
        return rank_heads_from_state(model, state, logits, classes, "shapley").scores.relu()
    ranking = rank_heads_from_state(model, state, logits, classes)
    count = {"first": torch.tensor(1), "top3": torch.tensor(_NUM_TOP_HEADS)}.get(way, ranking.sufficient)
    places = ranking.order.argsort(dim=-1)
    return (places < count.to(places.device)[..., None]).float()
