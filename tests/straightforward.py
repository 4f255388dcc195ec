# SPDX-License-Identifier: MIT
"""Prompt-CAM the long way: every prompt is an ordinary token of every layer, run through the family's own layers.

Shares nothing with the package but the parameters: no memory, no shortcuts, attention by the textbook.
"""

from typing import NamedTuple

import torch
from torch import nn

from prompt_cam_hf import PromptCAMForImageClassification


class Answer(NamedTuple):
    logits: torch.Tensor
    trait_maps: torch.Tensor  # (batch, classes, heads, rows, cols)


def run_straightforwardly(
    model: PromptCAMForImageClassification, pixel_values: torch.Tensor, **embedding_options
) -> Answer:
    """Scores and maps of all classes, sequence order [prompts, prefix tokens, patches], outputs dropped by hand."""
    backbone, config = model.backbone, model.config
    hidden = backbone.embeddings(pixel_values, **embedding_options)
    if hasattr(backbone, "pre_layrnorm"):
        hidden = backbone.pre_layrnorm(hidden)
    options = {}
    if hasattr(backbone, "rope_embeddings"):
        options["position_embeddings"] = backbone.rope_embeddings(pixel_values)
    if config.backbone_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        options["attention_mask"] = None
    layers = _layers(backbone)
    batch, num_classes = len(pixel_values), config.num_labels
    class_layer = config.class_prompt_layer if config.class_prompt_layer >= 0 else len(layers) - 1
    agnostic = 0
    class_states = None
    for index, layer in enumerate(layers):
        if index == class_layer:
            class_states = model.class_prompts.expand(batch, -1, -1)
        if class_states is not None:
            prompts = class_states
        elif model.agnostic_prompts is not None and index >= config.first_prompt_layer:
            prompts = model.agnostic_prompts[agnostic].expand(batch, -1, -1)
            agnostic += 1
        else:
            prompts = hidden[:, :0]
        sequence = torch.cat((prompts, hidden), dim=1)
        if index == len(layers) - 1:
            weights = _textbook_attention(layer, sequence, config.backbone_config.num_attention_heads, options)
        sequence = layer(sequence, **options)
        hidden = sequence[:, prompts.shape[1] :]
        if class_states is not None:
            class_states = sequence[:, :num_classes]
    norms = [getattr(backbone, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(backbone, name)]
    logits = model.classifier(norms[0](class_states)).squeeze(-1)
    rows, columns = (side // config.backbone_config.patch_size for side in pixel_values.shape[-2:])
    maps = weights[:, :, :num_classes, -rows * columns :]
    return Answer(logits, maps.unflatten(-1, (rows, columns)).transpose(1, 2))


def _layers(backbone: nn.Module) -> nn.ModuleList:
    """The longest list of modules is the list of layers."""
    return max((m for m in backbone.modules() if isinstance(m, nn.ModuleList)), key=len)


def _textbook_attention(layer: nn.Module, sequence: torch.Tensor, num_heads: int, options: dict) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of a layer's input, with the q and k that its own projections put out."""
    outputs = {}
    kinds = {"q_proj": "q", "query": "q", "k_proj": "k", "key": "k"}

    def keep(kind):
        return lambda module, inputs, output: outputs.setdefault(kind, output)

    parts = ((name.split(".")[-1], module) for name, module in layer.named_modules())
    hooks = [module.register_forward_hook(keep(kinds[name])) for name, module in parts if name in kinds]
    layer(sequence, **options)
    for hook in hooks:
        hook.remove()
    batch, tokens, width = sequence.shape
    q, k = (outputs[kind].view(batch, tokens, num_heads, -1).transpose(1, 2) for kind in "qk")
    if "position_embeddings" in options:
        q, k = (_rotate(states, *options["position_embeddings"]) for states in (q, k))
    return torch.softmax(q @ k.transpose(2, 3) / (width / num_heads) ** 0.5, dim=-1)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding as complex multiplication: channel i is the real, channel i + d/2 the imaginary part."""
    half, patches = states.shape[-1] // 2, cos.shape[0]
    numbers = torch.complex(states[..., -patches:, :half], states[..., -patches:, half:])
    turned = numbers * torch.complex(cos[:, :half], sin[:, :half])
    return torch.cat((states[..., :-patches, :], torch.cat((turned.real, turned.imag), dim=-1)), dim=-2)
