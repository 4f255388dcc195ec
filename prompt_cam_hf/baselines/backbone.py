# SPDX-License-Identifier: MIT
"""The backbone inside any of the models that are compared."""

from transformers import PreTrainedModel

from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The vision model inside a Prompt-CAM, a VPT, or a classification model of transformers.

    Raises:
        ValueError: its family is not supported.
    """
    own = getattr(model, "backbone", None)
    return own if isinstance(own, PreTrainedModel) else load_backbone(model)


__all__ = ["backbone_of"]
