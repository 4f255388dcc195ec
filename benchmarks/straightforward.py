# SPDX-License-Identifier: MIT
"""Prompt-CAM the long way, for comparison: prompts are ordinary tokens of every layer, as in the official code.

It runs transformers' own ViT layers. With explicit attention (`eager`) it does what the official code does, which
keeps every attention matrix; with fused attention (`sdpa`) the only difference to ours is the work done.
"""

from typing import Literal

import torch
from torch import nn

from prompt_cam_hf import PromptCAMForImageClassification


class StraightforwardPromptCAM(nn.Module):
    """Prompt-CAM-Deep on a ViTModel; takes over the model that it is made from."""

    def __init__(self, model: PromptCAMForImageClassification, attention: Literal["eager", "sdpa"]):
        super().__init__()
        self.model = model
        self.model.backbone.set_attn_implementation(attention)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None):
        """Logits, or with labels the loss."""
        backbone, num_classes = self.model.backbone, self.model.config.num_labels
        hidden = backbone.embeddings(pixel_values)
        for index, layer in enumerate(backbone.layers):
            last = index == len(backbone.layers) - 1
            prompts = self.model.class_prompts if last else self.model.agnostic_prompts[index]
            hidden = torch.cat((prompts.expand(len(hidden), -1, -1), hidden), dim=1)
            hidden = layer(hidden)
            if not last:
                hidden = hidden[:, num_classes:]
        logits = self.model.classifier(backbone.layernorm(hidden)[:, :num_classes]).squeeze(-1)
        return logits if labels is None else nn.functional.cross_entropy(logits, labels)
