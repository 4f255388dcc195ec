# SPDX-License-Identifier: MIT
"""Which settings does an INTR have, and on which backbones can it stand?"""

import copy
from typing import Any, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from prompt_cam_hf.modeling.backbone_prompt_cam import vision_config as vit_config
from prompt_cam_hf.modeling.configuration_prompt_cam import SUPPORTED_BACKBONES

RESNET = "resnet"


@strict
class INTRConfig(PreTrainedConfig):
    """Configuration of an INTR. Sizes have DETR's names, and the published values as defaults.

    Args:
        backbone_config: That of a ResNet, or of a vision model of a family in `SUPPORTED_BACKBONES`.
        backbone_name_or_path: Hub id or folder that the backbone was loaded from.
        backbone_revision: Branch, tag or commit of that repository.
        backbone_subfolder: Where it lies in that repository or folder.
        backbone_fingerprint: Digest of a vision transformer's weights, see `fingerprint_backbone`.
        freeze_backbone: Leave the backbone as it is in training. The stem and the first stage of a ResNet, and all its
            batch norms, always stay.
        d_model: Width of encoder and decoder.
        encoder_layers, decoder_layers: Their numbers of layers.
        encoder_attention_heads, decoder_attention_heads: Their heads; the decoder's each have a map.
        encoder_ffn_dim, decoder_ffn_dim: Widths of their feed-forward networks.
        activation_function: Of these networks.
        dropout, attention_dropout, activation_dropout: Probabilities of dropping in training: a branch's output,
            attention weights, and what is inside a feed-forward network.

    Raises:
        ValueError: a field is out of range, or there is no `backbone_config`.
    """

    model_type = "intr"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads it off the class
    attribute_map = {"hidden_size": "d_model"}  # noqa: RUF012 - transformers reads it off the class
    has_no_defaults_at_init = True

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_subfolder: str | None = None
    backbone_fingerprint: str | None = None
    freeze_backbone: bool = True
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    activation_function: str = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            raise ValueError("INTRConfig needs backbone_config, the configuration of a ResNet or vision transformer.")
        if isinstance(self.backbone_config, dict):
            family = self.backbone_config.get("model_type", "")
            _check_feature_source(family)
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        self.backbone_config = _vision_config(self.backbone_config)
        super().__post_init__(**kwargs)
        for field in ("d_model", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1.")
        if self.encoder_layers < 0:
            raise ValueError(f"encoder_layers={self.encoder_layers} must be 0 or more.")
        for field in ("encoder_attention_heads", "decoder_attention_heads"):
            heads = getattr(self, field)
            if heads < 1 or self.d_model % heads or self.d_model % 4:
                raise ValueError(
                    f"d_model={self.d_model} must be a multiple of 4, for sine positions, and of {field}={heads}."
                )
        for field in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")

    @property
    def vision(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        return cast(PreTrainedConfig, self.backbone_config)

    @property
    def is_on_resnet(self) -> bool:
        """Whether the features are a ResNet's, and not the patches of a vision transformer."""
        return self.vision.model_type == RESNET

    @property
    def fixed_prefix_layers(self) -> int:
        """How many of the first layers are a fixed function of the image: all of a frozen vision transformer."""
        return 0 if self.is_on_resnet or not self.freeze_backbone else self.vision.num_hidden_layers

    # No prompt stands in the backbone, and what is frozen there has no dropout; see `PromptedModel`.
    prompt_dropout = drop_path_rate = 0.0


def _check_feature_source(model_type: str) -> None:
    """Refuse a backbone that an INTR cannot stand on.

    Raises:
        ValueError: it is neither a ResNet nor of a family in `SUPPORTED_BACKBONES`.
    """
    if model_type != RESNET and model_type not in SUPPORTED_BACKBONES:
        raise ValueError(
            f"INTR does not support backbones of type {model_type!r}; supported are {RESNET} with the weights of a "
            f"DETR, and {', '.join(sorted(SUPPORTED_BACKBONES))}."
        )


def _vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy, of a ResNet with the last stage as its output."""
    if config.model_type != RESNET:
        _check_feature_source(getattr(config, "vision_config", config).model_type)
        return vit_config(config)
    config = copy.deepcopy(config)
    config.out_features = [config.stage_names[-1]]
    return config


__all__ = ["RESNET", "INTRConfig"]
