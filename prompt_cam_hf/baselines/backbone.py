# SPDX-License-Identifier: MIT
"""The backbone inside any of the models that are compared."""

from transformers import PreTrainedModel

from prompt_cam_hf.modeling.backbone_prompt_cam import grid_size, patch_size
from prompt_cam_hf.modeling.base_prompt_cam import MapLayout
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import check_backbone_family


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


__all__ = ["backbone_of", "map_layout"]
