# SPDX-License-Identifier: MIT
"""The model: the code that travels with a checkpoint to the Hub.

Importing this package, which does not travel itself, registers the model with transformers' Auto classes and the
pipeline with `pipeline("image-classification")`.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, ImageClassificationPipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_prompt_cam import PromptCAMConfig
from .modeling_prompt_cam import PromptCAMForImageClassification, PromptCAMOutput
from .pipeline_prompt_cam import PromptCAMImageClassificationPipeline


class _RegisteredPipeline(ImageClassificationPipeline):
    """Makes a Prompt-CAM's pipeline for a Prompt-CAM, and transformers' own for every other model."""

    def __new__(cls, model: PreTrainedModel, **options: Any) -> Any:
        if model.config.model_type == PromptCAMConfig.model_type:
            return PromptCAMImageClassificationPipeline(model, **options)
        return ImageClassificationPipeline(model, **options)


# exist_ok: a module reload, or a second copy of the package on the path, must not break the import.
AutoConfig.register(PromptCAMConfig.model_type, PromptCAMConfig, exist_ok=True)
AutoModelForImageClassification.register(PromptCAMConfig, PromptCAMForImageClassification, exist_ok=True)
# Not by register_pipeline, which would warn that the task is taken.
PIPELINE_REGISTRY.supported_tasks["image-classification"]["impl"] = _RegisteredPipeline

__all__ = [
    "PromptCAMConfig",
    "PromptCAMForImageClassification",
    "PromptCAMImageClassificationPipeline",
    "PromptCAMOutput",
]
