# SPDX-License-Identifier: MIT
"""Linear probes: how well a backbone's features tell the classes apart, without any prompt.

A linear probe is transformers' own classification model of the family, of which the classifier alone is trained. What
is saved is that model, and needs nothing but transformers. What each family hands to its classifier is listed in
docs/baselines.md.
"""

import copy
import os
from typing import Any, cast

import torch
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from prompt_cam_hf.modeling.backbone_prompt_cam import fingerprint_backbone
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import SUPPORTED_BACKBONES


def build_linear_probe(
    backbone: str | os.PathLike | PreTrainedModel, *, id2label: dict[int, str], **hub: Any
) -> PreTrainedModel:
    """Transformers' own classification model on a pre-trained backbone, with a new, untrained classifier.

    Args:
        backbone: A Hub id, a folder, or a loaded transformers model, which is copied and left as it is.
        id2label: Class names, numbered from 0.
        **hub: The Hub keywords of `from_pretrained`: revision, subfolder, cache_dir and the like.

    Returns:
        The model in evaluation mode, in float32, its backbone frozen.

    Raises:
        ValueError: transformers has no classification model for the family.
        OSError: the backbone cannot be found.
    """
    source = load_backbone(backbone, **hub)
    family = source.config.model_type
    classifier = SUPPORTED_BACKBONES[family].classifier
    if classifier is None:
        raise ValueError(
            f"transformers has no image classification model for backbones of type {family!r}, so there is no linear "
            "probe on them; VPT without prompts (num_prompts=0; in a recipe method: vpt, num_agnostic_prompts: 0) is "
            "one on CLS."
        )
    model_class = getattr(transformers, classifier)
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if model_class.config_class.model_type == family:
        config = copy.deepcopy(source.config)
        config.update(labels)
    elif family == "vit_mae":  # its encoder is ViT's, and so are the settings of the same names
        shared = model_class.config_class().to_dict().keys() & source.config.to_dict().keys() - {"model_type"}
        config = model_class.config_class(**{key: getattr(source.config, key) for key in shared} | labels)
    else:  # CLIP and SigLIP: the vision model is one of two towers
        config = model_class.config_class(vision_config=source.config.to_dict(), **labels)
    model = model_class._from_config(config, dtype=torch.float32)
    missing = load_backbone(model).load_state_dict(source.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(
            f"{type(source).__name__} lacks {len(missing)} weights of {model_class.__name__}, such as {missing[0]}."
        )
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model.eval()


@strict
class LinearProbeConfig(PreTrainedConfig):
    """What the cache of features has to know about a probe in training; never saved.

    Args:
        backbone_config: The vision model's own configuration.
        backbone_fingerprint: Digest of its weights.
        fixed_prefix_layers: All layers.
    """

    model_type = "linear_probe"

    backbone_config: PreTrainedConfig | None = None
    backbone_fingerprint: str | None = None
    fixed_prefix_layers: int = 0


class LinearProbe(nn.Module):
    """A linear probe in training: the backbone runs without gradient, or not at all where its features are cached."""

    def __init__(self, model: PreTrainedModel):
        """Train the classifier of `model`, which comes from `build_linear_probe`."""
        super().__init__()
        self.model = model
        backbone = self.backbone
        self.config = LinearProbeConfig(
            backbone_config=backbone.config,
            backbone_fingerprint=fingerprint_backbone(backbone),
            fixed_prefix_layers=backbone.config.num_hidden_layers,
        )
        self.config._attn_implementation = backbone.config._attn_implementation

    @property
    def backbone(self) -> PreTrainedModel:
        """The frozen vision model."""
        return load_backbone(self.model)

    @property
    def _classifier(self) -> nn.Module:
        return cast(nn.Module, self.model.classifier)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def train(self, mode: bool = True) -> "LinearProbe":
        """Set the mode of the classifier; the backbone always stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        prefix_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Score images.

        Args:
            pixel_values: (batch, channels, height, width).
            labels: (batch,); with them the loss (cross-entropy) is returned.
            prefix_hidden_states: (batch, features) from `encode_prefix`, in place of pixel_values.
            **kwargs: What batches hold besides; a classifier needs no grid of patches.

        Raises:
            ValueError: there are not exactly one of the two inputs.
        """
        if (pixel_values is None) == (prefix_hidden_states is None):
            raise ValueError("Give either pixel_values or prefix_hidden_states.")
        features = prefix_hidden_states if pixel_values is None else self.encode_prefix(pixel_values)
        logits = self._classifier(features)
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def encode_prefix(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the model hands to its classifier, (batch, features): a fixed function of the image."""
        features: list[torch.Tensor] = []
        hook = self._classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
        try:
            self.model(pixel_values)
        finally:
            hook.remove()
        return features[0]


__all__ = ["LinearProbe", "build_linear_probe"]
