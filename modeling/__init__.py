# SPDX-License-Identifier: MIT
"""The model: the code that travels with a checkpoint to the Hub."""

from .configuration_prompt_cam import PromptCAMConfig
from .modeling_prompt_cam import PromptCAMForImageClassification, PromptCAMOutput
from .pipeline_prompt_cam import PromptCAMImageClassificationPipeline

__all__ = [
    "PromptCAMConfig",
    "PromptCAMForImageClassification",
    "PromptCAMImageClassificationPipeline",
    "PromptCAMOutput",
]
