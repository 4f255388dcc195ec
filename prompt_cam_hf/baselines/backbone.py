# SPDX-License-Identifier: MIT
"""The backbone inside any of the models that are compared."""

from typing import Any

from transformers import PreTrainedModel

from prompt_cam_hf.modeling.backbone_prompt_cam import grid_size, patch_size
from prompt_cam_hf.modeling.base_prompt_cam import MapLayout
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import SUPPORTED_BACKBONES, check_backbone_family


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The vision model inside a Prompt-CAM, a VPT, an INTR, or a classification model of transformers.

    Raises:
        ValueError: its family is not supported.
    """
    own = getattr(model, "backbone", None)
    if isinstance(own, PreTrainedModel):
        check_backbone_family(own.config.model_type)
        return own
    return load_backbone(model)


def map_layout(model: PreTrainedModel, height: int, width: int) -> MapLayout:
    """How the maps of any of the models lie on images of so many pixels."""
    own = getattr(model, "map_layout", None)
    if own is not None:
        return own(height, width)
    config = backbone_of(model).config
    return MapLayout(grid_size(config, height, width), patch_size(config))


def forward_options(model: PreTrainedModel, interpolate_pos_encoding: bool) -> dict[str, Any]:
    """What a model's `forward` is given so that it takes images of any size, if that is asked for."""
    # Transformers' own classes of some families take any size, and do not know the argument.
    takes_any_size = SUPPORTED_BACKBONES[backbone_of(model).config.model_type].takes_any_size
    if not interpolate_pos_encoding or (takes_any_size and not hasattr(model, "backbone")):
        return {}
    return {"interpolate_pos_encoding": True}


__all__ = ["backbone_of", "forward_options", "map_layout"]
