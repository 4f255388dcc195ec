# SPDX-License-Identifier: MIT
"""Ranking the heads that the score of a class rests on.

A head is blurred when its attention from the class prompt becomes uniform (paper, section 3). That changes one row of
the last layer only, so the network runs once, and every question after that costs one row of one layer.
"""

from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

import torch

from .backbone_prompt_cam import attention_weights
from .outputs_prompt_cam import LastLayerState


class ScoringModel(Protocol):
    """What a ranking, and a pipeline, ask of a Prompt-CAM, or of another model with a query for each class."""

    def prepared(self) -> AbstractContextManager:
        """Inside this block, what the prompts bring to the layers is computed once."""

    def last_layer_state(self, pixel_values: torch.Tensor) -> LastLayerState:
        """What the last layer leaves behind, for images (batch, channels, height, width)."""

    def last_layer_logits(self, state: LastLayerState) -> torch.Tensor:
        """The class scores (batch, num_labels)."""

    def trait_maps(self, state: LastLayerState, classes: torch.Tensor) -> torch.Tensor:
        """Maps of `classes` (batch, k), (batch, k, heads, rows, cols)."""

    def class_queries(self, state: LastLayerState, classes: torch.Tensor) -> torch.Tensor:
        """The last layer's queries of the prompts of `classes` (batch, k), (batch, heads, k, head size)."""

    def finish_last_layer(self, prompts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """The last layer's outputs from its input (batch, rows, hidden_size) and contexts (..., heads, head size)."""

    def score(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class scores from the last layer's outputs, (..., hidden_size) to (...)."""


def check_blur(blur: str) -> None:
    """Refuse an unknown way of blurring.

    Raises:
        ValueError: it is unknown.
    """
    if blur not in ("tokens", "patches"):
        raise ValueError(f'blur={blur!r} is not known; use "tokens" or "patches".')


class HeadContexts(NamedTuple):
    """What the last layer's heads hand on to the prompts of classes, before the output projection.

    Attributes:
        prompts: (batch, k, hidden_size), the layer's input at the prompts, for `finish_last_layer`.
        weights: (batch, heads, k, tokens), float32, the heads' own attention.
        sharp: (batch, k, heads, head size), what each head hands on with its own attention.
        blurred: (batch, 1, heads, head size), the same with a uniform one.
    """

    prompts: torch.Tensor
    weights: torch.Tensor
    sharp: torch.Tensor
    blurred: torch.Tensor


def head_contexts(
    model: ScoringModel,
    state: LastLayerState,
    classes: torch.Tensor,
    blur: Literal["tokens", "patches"] = "tokens",
) -> HeadContexts:
    """What each head hands on to the prompts of classes with its own attention, and when it is blurred.

    Args:
        model: The model.
        state: Its last layer's state for some images.
        classes: (batch, k), the classes asked about.
        blur: "tokens" spreads a head over all tokens, as the official implementation does; "patches" over the patches
            alone, as the paper writes.

    Raises:
        ValueError: `blur` is neither.
    """
    check_blur(blur)
    weights = attention_weights(model.class_queries(state, classes), state.projections.keys)
    values = state.projections.values
    spread_over = values if blur == "tokens" else values[:, :, -state.grid[0] * state.grid[1] :]
    prompts = state.class_prompts.expand(values.shape[0], -1, -1)
    rows = classes.to(prompts.device)[..., None].expand(-1, -1, prompts.shape[-1])
    return HeadContexts(
        prompts=prompts.gather(1, rows),
        weights=weights,
        sharp=(weights.to(values.dtype) @ values).transpose(1, 2),
        blurred=spread_over.mean(dim=2).unsqueeze(1),
    )


class BlurredScores:
    """The score of classes, with any of the last layer's heads blurred; arguments as in `head_contexts`."""

    def __init__(
        self,
        model: ScoringModel,
        state: LastLayerState,
        classes: torch.Tensor,
        blur: Literal["tokens", "patches"] = "tokens",
    ):
        self._model = model
        self._contexts = head_contexts(model, state, classes, blur)

    def __call__(self, blurred: torch.Tensor) -> torch.Tensor:
        """Scores (batch, k, subsets) with the heads blurred where `blurred` (batch, k, subsets, heads) is True."""
        batch, k, subsets, _ = blurred.shape
        prompts, _, *both = self._contexts
        sharp_contexts, blurred_contexts = (contexts[:, :, None] for contexts in both)
        contexts = torch.where(blurred[..., None], blurred_contexts, sharp_contexts)
        prompts = prompts[:, :, None].expand(-1, -1, subsets, -1)
        outputs = self._model.finish_last_layer(prompts.flatten(1, 2), contexts.flatten(1, 2))
        return self._model.score(outputs).view(batch, k, subsets)


class GreedyRanking(NamedTuple):
    """Heads by importance.

    Attributes:
        order: (batch, k, heads), most important head first.
        scores: (batch, k, heads), in head order: the class score left when that head is blurred in its turn.
    """

    order: torch.Tensor
    scores: torch.Tensor


@torch.no_grad()
def rank_heads_greedily(
    model: ScoringModel,
    state: LastLayerState,
    classes: torch.Tensor,
    blur: Literal["tokens", "patches"] = "tokens",
) -> GreedyRanking:
    """Blur, again and again, the head whose blurring leaves the highest score of the class (paper, section 3).

    Args:
        model: The model.
        state: From `model.last_layer_state`.
        classes: (batch, k), the classes asked about.
        blur: As in `head_contexts`.
    """
    blurred_scores = BlurredScores(model, state, classes, blur)
    heads = state.projections.keys.shape[1]
    one_head = torch.eye(heads, dtype=torch.bool, device=classes.device)
    blurred = one_head.new_zeros((*classes.shape, heads))
    removed, left = [], []
    for _ in range(heads):
        candidates = blurred_scores(blurred[:, :, None] | one_head)
        best = candidates.masked_fill(blurred, -torch.inf).max(dim=-1)
        removed.append(best.indices)
        left.append(best.values)
        blurred = blurred | one_head[best.indices]
    order = torch.stack(removed, dim=-1)
    scores = torch.stack(left, dim=-1)
    return GreedyRanking(order.flip(-1), torch.empty_like(scores).scatter(-1, order, scores))


__all__ = [
    "BlurredScores",
    "GreedyRanking",
    "HeadContexts",
    "ScoringModel",
    "check_blur",
    "head_contexts",
    "rank_heads_greedily",
]
