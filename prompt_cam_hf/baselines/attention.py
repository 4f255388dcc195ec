# SPDX-License-Identifier: MIT
"""Attention of the token that the score is read from, in the last layer and through all layers.

That token is CLS; in SigLIP, which has none, all patches on average; in a Prompt-CAM the prompt of each class. So
these maps are the same for all classes, but for a Prompt-CAM's.

Fused attention returns no weights, so the layers run from their own pieces, whichever attention the model is set to.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from prompt_cam_hf.modeling.backbone_prompt_cam import (
    LayerOutput,
    backbone_layers,
    embed,
    grid_size,
    rotary_positions,
    run_layer,
)
from prompt_cam_hf.modeling.configuration_prompt_cam import num_prefix_tokens

from .backbone import backbone_of
from .intr_config import INTRConfig
from .vpt import VPTConfig


@torch.no_grad()
def raw_attention(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> torch.Tensor:
    """The last layer's attention to the patches, head by head.

    Args:
        model: A linear probe, a VPT or a Prompt-CAM, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        interpolate_pos_encoding: As in the model's `forward`.

    Returns:
        (batch, 1, heads, rows, cols); of a Prompt-CAM (batch, num_labels, heads, rows, cols), its trait maps. Softmax
        weights in float32, not renormalised over the patches.
    """
    (weights,) = deque(_layer_attentions(model, pixel_values, interpolate_pos_encoding), maxlen=1)
    grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
    patches = weights[..., -grid[0] * grid[1] :].unflatten(-1, grid)
    return scored_rows(model, patches.transpose(1, 2), grid)


@torch.no_grad()
def attention_rollout(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False
) -> torch.Tensor:
    """How much of each patch attention has carried to the token that the score is read from.

    Abnar & Zuidema (*Quantifying Attention Flow in Transformers*, ACL 2020, section 3): the product over all layers of
    0.5 A + 0.5 I, where A is the attention averaged over heads and I stands for the residual connection. The rows of A
    sum to 1, and so do those of the sum. Prompts join on the way and bring nothing of any patch.

    Args:
        model: A linear probe, a VPT or a Prompt-CAM, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        interpolate_pos_encoding: As in the model's `forward`.

    Returns:
        (batch, 1, rows, cols), of a Prompt-CAM (batch, num_labels, rows, cols); float32. A map sums to at most 1;
        the rest came from prefix tokens and prompts.
    """
    grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
    attentions = (weights.mean(dim=1) for weights in _layer_attentions(model, pixel_values, interpolate_pos_encoding))
    made_of = follow_layers(model, attentions, grid, lambda residual, carried: 0.5 * residual + 0.5 * carried)
    return scored_rows(model, made_of, grid).unflatten(-1, grid)


def follow_layers(
    model: PreTrainedModel,
    attentions: Iterable[torch.Tensor],
    grid: tuple[int, int],
    add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """What each of the last layer's queries is made of, in patches, by a rule for one layer.

    Args:
        model: A linear probe, a VPT or a Prompt-CAM.
        attentions: Of each layer, (batch, queries, tokens), without an axis of heads; prompts stand first.
        grid: Rows and columns of patches.
        add: The rule: takes what the queries were made of before the layer, and that of all tokens carried to them by
            attention, and returns what they are made of after it; all (batch, queries, patches).

    Returns:
        (batch, queries, patches), of the last layer's queries. At first a patch is made of itself, a prefix token or
        prompt of no patch.
    """
    made_of = torch.eye(grid[0] * grid[1])[None]
    made_of = nn.functional.pad(made_of, (0, 0, num_prefix_tokens(backbone_of(model).config), 0))
    last = backbone_of(model).config.num_hidden_layers - 1
    for index, attention in enumerate(attentions):
        num_queries, num_tokens = attention.shape[1:]
        # Prompts stand in front.
        made_of = nn.functional.pad(made_of.to(attention.device), (0, 0, num_tokens - made_of.shape[1], 0))
        # The queries of a Prompt-CAM's last layer are its class prompts; of any other layer, the last tokens.
        is_of_prompts = model.config.model_type == "prompt_cam" and index == last
        residual = made_of[:, :num_queries] if is_of_prompts else made_of[:, -num_queries:]
        made_of = add(residual, attention @ made_of)
    return made_of


def _layer_attentions(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> Iterator[torch.Tensor]:
    """Attention of each layer, (batch, heads, queries, tokens), float32; prompts stand first."""
    if model.config.model_type in ("prompt_cam", VPTConfig.model_type):
        options = {"output_attentions": True, "interpolate_pos_encoding": interpolate_pos_encoding}
        yield from model(pixel_values, **options).attentions
        return
    for output in run_own_layers(model, pixel_values, interpolate_pos_encoding):
        assert output.attentions is not None  # they were asked for
        yield output.attentions


def run_own_layers(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> Iterator[LayerOutput]:
    """Run the layers of a model of transformers one after another, from their own pieces, with their attention.

    Raises:
        ValueError: the model is an INTR.
    """
    if model.config.model_type == INTRConfig.model_type:
        raise ValueError(
            "An INTR reads no token of its backbone, so attention there explains nothing; its own maps are trait_maps."
        )
    backbone = backbone_of(model)
    hidden = embed(backbone, pixel_values.to(backbone.dtype), interpolate_pos_encoding)
    grid = grid_size(backbone.config, *pixel_values.shape[-2:])
    rotary = rotary_positions(backbone, hidden, grid, num_prefix_tokens(backbone.config))
    for layer in backbone_layers(backbone):
        output = run_layer(layer, hidden, backbone.config, query_rotary=rotary, output_attentions=True)
        hidden = output.hidden_states
        yield output


def scored_rows(model: PreTrainedModel, rows: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Of the last layer's queries, (batch, queries, ...), the one that is scored, (batch, 1 or num_labels, ...)."""
    if model.config.model_type == "prompt_cam":
        return rows
    num_patches, num_prefix = grid[0] * grid[1], num_prefix_tokens(backbone_of(model).config)
    if not num_prefix:
        return rows[:, -num_patches:].mean(dim=1, keepdim=True)
    return rows[:, -num_prefix - num_patches :][:, :1]


__all__ = ["attention_rollout", "raw_attention"]
