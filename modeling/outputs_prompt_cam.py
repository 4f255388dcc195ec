# SPDX-License-Identifier: MIT
"""What a Prompt-CAM returns, for which classes, and what is read off its last layer."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from transformers.modeling_outputs import ImageClassifierOutput

from .backbone_prompt_cam import Projections, attention_weights


@dataclass
class PromptCAMOutput(ImageClassifierOutput):
    """What a Prompt-CAM returns.

    Attributes:
        loss: Cross-entropy (of each class on its own, where images have several), a scalar; where labels were given.
        logits: (batch, num_labels), the class scores before the softmax.
        trait_maps: (batch, classes, heads, rows, cols), float32: the last layer's softmax attention from each class
            prompt to each patch. A map sums to less than 1; the rest fell on prompts and CLS.
        trait_classes: (batch, classes), the class that each map belongs to.
        attentions: One tensor a layer, (batch, heads, queries, tokens), float32. Tokens stand in the order prompts,
            CLS and other prefix tokens, patches. Queries are the same without the agnostic prompts; in the last layer
            they are the class prompts alone.
        hidden_states: The embeddings (or the given prefix_hidden_states), then each layer's output, (batch, tokens,
            hidden_size); the last one is (batch, num_labels, hidden_size), before the final norm.
    """

    trait_maps: torch.Tensor | None = None
    trait_classes: torch.Tensor | None = None


class LastLayerState(NamedTuple):
    """What the last layer leaves behind: all that scores, trait maps and the ranking of heads are made from.

    Attributes:
        class_prompts: (batch or 1, num_labels, hidden_size), what the layer adds to at the class prompts: its input.
        projections: Queries of the class prompts; keys and values of class prompts, prefix tokens and patches, in this
            order, the patches last.
        outputs: (batch, num_labels, hidden_size), the layer's output at the class prompts, before the final norm.
        grid: Rows and columns of patches.
    """

    class_prompts: torch.Tensor
    projections: Projections
    outputs: torch.Tensor
    grid: tuple[int, int]


class LastLayerReader:
    """What is read off a `LastLayerState` alike in all models that have a query for each class."""

    def score(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class scores from the last layer's outputs, (..., hidden_size) to (...)."""
        raise NotImplementedError

    def last_layer_logits(self, state: LastLayerState) -> torch.Tensor:
        """The class scores (batch, num_labels)."""
        return self.score(state.outputs)

    def trait_maps(self, state: LastLayerState, classes: torch.Tensor) -> torch.Tensor:
        """Attention of the prompts of `classes` (batch, k) to the patches, (batch, k, heads, rows, cols), float32."""
        weights = attention_weights(self.class_queries(state, classes), state.projections.keys)
        return patch_attention(weights, state.grid)

    def class_queries(self, state: LastLayerState, classes: torch.Tensor) -> torch.Tensor:
        """The last layer's queries of the prompts of `classes` (batch, k), (batch, heads, k, head size)."""
        batch, heads, _, head_size = state.projections.keys.shape
        queries = state.projections.queries.expand(batch, -1, -1, -1)
        return queries.gather(2, classes[:, None, :, None].expand(-1, heads, -1, head_size))


def check_class_numbers(classes: torch.Tensor, num_labels: int, name: str) -> None:
    """Refuse numbers that are not those of classes; `name` is the argument's.

    Where the computation is compiled or exported its values are not known, and are not looked at.

    Raises:
        ValueError: a value is not a whole number, or there is no such class.
    """
    known = not torch.compiler.is_compiling()
    if classes.is_floating_point() or (known and ((classes < 0) | (classes >= num_labels)).any()):
        raise ValueError(f"{name} must be whole numbers from 0 to {num_labels - 1}.")


def find_trait_classes(classes: torch.Tensor | Literal["all"] | None, logits: torch.Tensor) -> torch.Tensor:
    """The classes whose maps are asked for, (batch, k), from what `forward` takes as `trait_classes`.

    Raises:
        ValueError: the argument's shape or a class number is wrong.
    """
    batch, num_labels = logits.shape
    if classes is None:
        return logits.argmax(dim=-1, keepdim=True)
    if isinstance(classes, str):
        if classes != "all":
            raise ValueError(f'trait_classes={classes!r} is not known; give "all", None or a tensor of classes.')
        return torch.arange(num_labels, device=logits.device).expand(batch, -1)
    classes = torch.as_tensor(classes, device=logits.device)
    if classes.ndim not in (1, 2) or (classes.ndim == 2 and classes.shape[0] != batch):
        raise ValueError(
            f"trait_classes has shape {tuple(classes.shape)}; it must be (k,) or (batch, k), with batch={batch}."
        )
    check_class_numbers(classes, num_labels, "trait_classes")
    return classes.expand(batch, -1)


def patch_attention(weights: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The patches among attention weights (batch, heads, classes, tokens), (batch, classes, heads, rows, cols)."""
    return weights[..., -grid[0] * grid[1] :].unflatten(-1, grid).transpose(1, 2)


__all__ = [
    "LastLayerReader",
    "LastLayerState",
    "PromptCAMOutput",
    "check_class_numbers",
    "find_trait_classes",
    "patch_attention",
]
