# SPDX-License-Identifier: MIT
"""Ranking the last layer's heads by their importance for a class, and counting how many of them suffice.

A head is blurred when its attention from the class prompt is made uniform (Prompt-CAM, Chowdhury et al., CVPR 2025,
section 3). The network runs once; after that, every set of blurred heads costs one row of its last layer.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch

from prompt_cam_hf.explanations.class_names import check_classes
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.outputs_prompt_cam import LastLayerState
from prompt_cam_hf.modeling.ranking_prompt_cam import BlurredScores, check_blur, rank_heads_greedily

RankingMethod = Literal["greedy", "exact", "shapley"]

# With more heads, trying all sets of them takes too long.
_MAX_HEADS_TO_ENUMERATE = 16
# Sets of blurred heads that go through the last layer's MLP at once: enough to be fast, few enough to fit anywhere.
_ROWS_AT_ONCE = 4096


class HeadRanking(NamedTuple):
    """The heads of the last layer, ranked by their importance for the score of a class.

    The shapes are those of `classes` in `rank_heads`, (batch,) or (batch, k), followed by the axes given here.

    Attributes:
        order: (heads,), the most important head first.
        scores: (heads,), in head order. Greedy: the class score left when that head is blurred in its turn. Exact: the
            score left when it alone is blurred. Shapley: the head's share of the score.
        sufficient: No further axis: the number of heads, taken from the start of `order`, that keep the class on top
            when all others are blurred; heads + 1 where the class is not on top even with all heads.
        num_smallest_sets: No further axis, for the exact method only: the number of sets of that size that keep the
            class on top; `order` starts with the set that leaves the highest score.
    """

    order: torch.Tensor
    scores: torch.Tensor
    sufficient: torch.Tensor
    num_smallest_sets: torch.Tensor | None = None


@torch.no_grad()
def rank_heads(
    model: PromptCAMForImageClassification,
    pixel_values: torch.Tensor,
    classes: torch.Tensor | None = None,
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
) -> HeadRanking:
    """Rank the last layer's heads for a class on an image.

    - "greedy" (the paper's): blur, again and again, the head whose blurring leaves the highest score of the class.
    - "exact": try all sets of heads, and find the smallest that keeps the class on top.
    - "shapley": with v(S) the class's score when the heads S stay sharp, a head's value is the mean of
      v(S + head) - v(S) over all orders in which heads can be added. The values sum to v(all) - v(none).

    Args:
        model: The model, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        classes: (batch,) or (batch, k), the classes asked about. None: the predicted class.
        method: See above. "exact" and "shapley" try all 2^heads sets.
        blur: "tokens" spreads a head over all tokens, as the official implementation does; "patches" over the patches
            alone, as the paper writes.
        interpolate_pos_encoding: As in the model's `forward`.

    Returns:
        The ranking for each image, or for each image and class where `classes` is (batch, k).

    Raises:
        ValueError: `method` or `blur` is unknown, `classes` does not fit, or there are too many heads to enumerate.

    Example:
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> from prompt_cam_hf import rank_heads
        >>> pipe = pipeline("image-classification", model="my_model")
        >>> pixel_values = pipe.image_processor(Image.open("bird.jpg"), return_tensors="pt")["pixel_values"]
        >>> ranking = rank_heads(pipe.model, pixel_values, method="exact")
        >>> ranking.order[0, : ranking.sufficient[0]]  # the heads that suffice for the prediction
    """
    check_ranking(model, method, blur)
    state = model.last_layer_state(pixel_values, interpolate_pos_encoding)
    logits = model.last_layer_logits(state)
    asked = check_classes(logits.argmax(dim=-1) if classes is None else classes.to(logits.device), *logits.shape)
    ranking = rank_heads_from_state(model, state, logits, asked, method, blur)
    if classes is not None and classes.ndim == 2:
        return ranking
    order, scores, sufficient, number = ranking
    return HeadRanking(order[:, 0], scores[:, 0], sufficient[:, 0], None if number is None else number[:, 0])


@torch.no_grad()
def rank_heads_from_state(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    logits: torch.Tensor,
    classes: torch.Tensor,
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
) -> HeadRanking:
    """Rank heads as `rank_heads` does, from a state of the network that is there already.

    `logits` are (batch, num_labels) of that state, `classes` (batch, k).
    """
    check_ranking(model, method, blur)
    rivals = logits[:, None].expand(-1, classes.shape[1], -1).scatter(-1, classes[..., None], -torch.inf).amax(-1)
    if method == "greedy":
        order, scores = rank_heads_greedily(model, state, classes, blur)
        # From all heads sharp to none: what is left after each removal, least important head first.
        left = torch.cat((logits.gather(1, classes)[..., None], scores.gather(-1, order).flip(-1)), dim=-1)
        return HeadRanking(order, scores, _count_sufficient(left, rivals))
    blurred_scores = BlurredScores(model, state, classes, blur)
    all_sets = _all_sets(state.projections.keys.shape[1], classes.device)
    values = _score_sets(blurred_scores, all_sets, classes)
    rank = _rank_exactly if method == "exact" else _rank_by_shapley_value
    return rank(values, all_sets, rivals)


@torch.no_grad()
def scores_with_first_heads(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    classes: torch.Tensor,
    order: torch.Tensor,
    blur: Literal["tokens", "patches"] = "tokens",
) -> torch.Tensor:
    """Score classes with the first heads of an order kept and all others blurred, for every number of heads.

    The scores of the other classes do not change: only the class's own prompt looks through the blurred heads.

    Args:
        model: The model, in evaluation mode.
        state: From `model.last_layer_state`.
        classes: (batch, k), the classes asked about.
        order: (batch, k, heads), such as `HeadRanking.order`.
        blur: As in `rank_heads`.

    Returns:
        (batch, k, heads + 1), the scores with 0, 1, ... and all heads kept.

    Raises:
        ValueError: `blur` is unknown.
    """
    kept = torch.arange(order.shape[-1] + 1, device=order.device)
    blurred = order.argsort(dim=-1)[..., None, :] >= kept[:, None]
    return BlurredScores(model, state, classes, blur)(blurred)


def check_ranking(model: PromptCAMForImageClassification, method: str, blur: str) -> None:
    """Refuse, with a ValueError and before anything is computed, what `rank_heads` would refuse."""
    if method not in get_args(RankingMethod):
        raise ValueError(f'method={method!r} is not known; use "greedy", "exact" or "shapley".')
    heads = model.num_trait_heads
    if method != "greedy" and heads > _MAX_HEADS_TO_ENUMERATE:
        raise ValueError(
            f"method={method!r} tries all sets of heads, and 2^{heads} are too many; up to {_MAX_HEADS_TO_ENUMERATE} "
            'heads are possible. Use method="greedy".'
        )
    check_blur(blur)


def _count_sufficient(left: torch.Tensor, rivals: torch.Tensor) -> torch.Tensor:
    """The number of heads that suffice, from the scores (..., heads + 1) left with all heads, one fewer, ..., none."""
    wins = (left > rivals[..., None]).long().cumprod(dim=-1).sum(dim=-1)
    return left.shape[-1] - wins


def _all_sets(heads: int, device: torch.device) -> torch.Tensor:
    """All sets of sharp heads, (2^heads, heads); bit h of a set's number says whether head h is in it."""
    numbers = torch.arange(2**heads, device=device)
    return (numbers[:, None] >> torch.arange(heads, device=device)) & 1 == 1


def _score_sets(blurred_scores: BlurredScores, sets: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The class's score when only the heads of a set are sharp, (batch, k, sets)."""
    chunks = sets.split(max(_ROWS_AT_ONCE // classes.numel(), 1))
    return torch.cat([blurred_scores(~chunk.expand(*classes.shape, -1, -1)) for chunk in chunks], dim=-1)


def _rank_exactly(values: torch.Tensor, sets: torch.Tensor, rivals: torch.Tensor) -> HeadRanking:
    heads, sizes = sets.shape[1], sets.sum(dim=1)
    wins = values > rivals[..., None]
    smallest = torch.where(wins, sizes, heads + 1).amin(dim=-1)
    candidates = wins & (sizes == smallest[..., None])
    num_candidates = candidates.sum(dim=-1)
    # The last set holds all heads; it stands in where no set wins.
    candidates[..., -1] |= num_candidates == 0
    best = sets[values.masked_fill(~candidates, -torch.inf).argmax(dim=-1)]
    all_but_one = len(sets) - 1 - 2 ** torch.arange(heads, device=sets.device)
    scores = values[..., all_but_one]
    # Heads of the best set first; within it and outside, the head first whose own blurring leaves the lowest score.
    places = scores.argsort(dim=-1, stable=True).argsort(dim=-1)
    order = (places - heads * best.long()).argsort(dim=-1)
    return HeadRanking(order, scores, smallest, num_candidates)


def _rank_by_shapley_value(values: torch.Tensor, sets: torch.Tensor, rivals: torch.Tensor) -> HeadRanking:
    heads = sets.shape[1]
    # Of all orders of adding heads, those in which exactly the set S stands before head h: |S|! (heads - |S| - 1)!
    weights = torch.tensor(
        [math.factorial(size) * math.factorial(heads - size - 1) / math.factorial(heads) for size in range(heads)],
        dtype=torch.float64,
        device=sets.device,
    )
    numbers, sizes = torch.arange(len(sets), device=sets.device), sets.sum(dim=1)
    shares = []
    for head in range(heads):
        without = numbers[~sets[:, head]]
        gains = values[..., without + 2**head].double() - values[..., without].double()
        shares.append((gains * weights[sizes[without]]).sum(dim=-1))
    scores = torch.stack(shares, dim=-1)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # Sets of the first m heads of the order, for m from all heads to none.
    members = torch.cat((torch.zeros_like(order[..., :1]), (2**order).cumsum(dim=-1)), dim=-1).flip(-1)
    return HeadRanking(order, scores.to(values.dtype), _count_sufficient(values.gather(-1, members), rivals))
