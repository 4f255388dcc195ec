# SPDX-License-Identifier: MIT
"""What is a trained Prompt-CAM, for the functions that take one? A folder, a Hub id, a pipeline or a loaded model."""

import hashlib
import os
from typing import NamedTuple

import torch
from transformers import AutoConfig, Pipeline, PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf.modeling import PromptCAMForImageClassification, PromptCAMImageClassificationPipeline
from prompt_cam_hf.modeling.checkpoint_prompt_cam import explained_load_errors


class Classifier(NamedTuple):
    """A model and the image processor that it was trained with."""

    model: PromptCAMForImageClassification
    image_processor: BaseImageProcessor


# All that stands for a trained model.
ClassifierLike = str | os.PathLike | Pipeline | PreTrainedModel | Classifier


def load_pipeline(model: str | os.PathLike, device: str | None = None) -> PromptCAMImageClassificationPipeline:
    """Load a model with its image processor (`.model`, `.image_processor`), on the best device by default.

    Raises:
        ValueError: it is not a Prompt-CAM.
        OSError: it cannot be found.
    """
    name = os.fspath(model)
    # Loaded here, for transformers' pipeline() would answer any failure with a traceback in a message.
    with explained_load_errors(name):
        check_prompt_cam(AutoConfig.from_pretrained(name), name)
        image_processor = AutoImageProcessor.from_pretrained(name)
    return PromptCAMImageClassificationPipeline(
        PromptCAMForImageClassification.from_pretrained(name),
        image_processor=image_processor,
        device=device,
        task="image-classification",
    )


def as_classifier(model: ClassifierLike, image_processor: BaseImageProcessor | None = None) -> Classifier:
    """The model and its image processor, loaded where only a name was given.

    The image processor is for a loaded model, or in place of a pipeline's own.

    Raises:
        ValueError: it is not a Prompt-CAM, or a loaded model comes without image processor.
        OSError: it cannot be found.
    """
    if isinstance(model, str | os.PathLike):
        model = load_pipeline(model)
    if isinstance(model, Pipeline | Classifier):
        image_processor = image_processor or model.image_processor
        model = model.model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model; give a folder, a Hub id, a pipeline or a loaded model.")
    check_prompt_cam(model.config, model.name_or_path or "The model")
    if image_processor is None:
        raise ValueError("A loaded model needs its image processor: give image_processor=, a folder, or a pipeline.")
    return Classifier(model, image_processor)


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over all weights of a model as they are, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_prompt_cam(config: PreTrainedConfig, name: str | os.PathLike) -> None:
    """Refuse, with a ValueError, other models, which have no trait maps."""
    if config.model_type != "prompt_cam":
        raise ValueError(f"{name} is a model of type {config.model_type!r}, not a Prompt-CAM, and has no trait maps.")
