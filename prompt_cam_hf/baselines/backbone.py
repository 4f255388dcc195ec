# SPDX-License-Identifier: MIT
"""The backbone inside any of the models that are compared."""

from transformers import PreTrainedModel

from prompt_cam_hf.modeling.backbone_prompt_cam import grid_size
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


def map_grid(model: PreTrainedModel, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the maps of any of the models, on images of so many pixels."""
    layout = getattr(model, "map_layout", None)
    return layout(height, width).grid if layout else grid_size(backbone_of(model).config, height, width)


__all__ = ["backbone_of", "map_grid"]
