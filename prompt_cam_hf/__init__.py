# SPDX-License-Identifier: MIT
"""Prompt-CAM for Hugging Face transformers: class prompts whose attention shows the traits of each class.

Importing the package registers the model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageClassification

from prompt_cam_hf.modeling import (
    PromptCAMConfig,
    PromptCAMForImageClassification,
    PromptCAMImageClassificationPipeline,
    PromptCAMOutput,
)
from prompt_cam_hf.version import __version__

# exist_ok: a module reload, or a second copy of the package on the path, must not break the import.
AutoConfig.register("prompt_cam", PromptCAMConfig, exist_ok=True)
AutoModelForImageClassification.register(PromptCAMConfig, PromptCAMForImageClassification, exist_ok=True)

__all__ = [
    "PromptCAMConfig",
    "PromptCAMForImageClassification",
    "PromptCAMImageClassificationPipeline",
    "PromptCAMOutput",
    "__version__",
]
