# SPDX-License-Identifier: MIT
"""Where is the backbone of any of the models that are compared, and which of its tokens are patches?"""

from transformers import PreTrainedConfig, PreTrainedModel

from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import SUPPORTED_BACKBONES


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The vision model inside a Prompt-CAM, a VPT, or a classification model of transformers.

    Raises:
        ValueError: its family is not supported.
    """
    return model.backbone if hasattr(model, "backbone") else load_backbone(model)


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Tokens before the patches, from a backbone's configuration: CLS, distillation token and registers."""
    return SUPPORTED_BACKBONES[config.model_type][1] + getattr(config, "num_register_tokens", 0)


__all__ = ["backbone_of", "num_prefix_tokens"]
