# SPDX-License-Identifier: MIT
"""What is a trained model with trait maps, for the functions that take one? A folder, a Hub id, a pipeline or a model.

That is a Prompt-CAM, or an INTR, which is explained by the same functions.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from transformers import (
    AutoModelForImageClassification,
    ImageClassificationPipeline,
    Pipeline,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf.baselines.intr import INTRForImageClassification
from prompt_cam_hf.baselines.intr_config import INTRConfig
from prompt_cam_hf.data.images import MAX_SIDE
from prompt_cam_hf.messages import one_line
from prompt_cam_hf.modeling import (
    PromptCAMConfig,
    PromptCAMForImageClassification,
    PromptCAMImageClassificationPipeline,
)
from prompt_cam_hf.modeling.checkpoint_prompt_cam import explained_load_errors, find_cause

# The models that have trait maps, by the type in their configuration.
_TRAIT_MODELS: dict[str, Any] = {
    PromptCAMConfig.model_type: PromptCAMForImageClassification,
    INTRConfig.model_type: INTRForImageClassification,
}


class Classifier(NamedTuple):
    """A model and the image processor that it was trained with."""

    model: PromptCAMForImageClassification
    image_processor: BaseImageProcessor


# All that stands for a trained model.
ClassifierLike = str | os.PathLike | Pipeline | PreTrainedModel | Classifier


def load_pipeline(model: str | os.PathLike, device: str | None = None) -> PromptCAMImageClassificationPipeline:
    """Load a model with its image processor (`.model`, `.image_processor`), on the best device by default.

    Raises:
        ValueError: it has no trait maps, it is damaged or incomplete, or it needs code of its own, which is never run.
        OSError: it cannot be found.
    """
    name = os.fspath(model)
    # Loaded here, for transformers' pipeline() would answer any failure with a traceback in a message, and would run
    # the code of an image processor.
    model_type = load_model_type(name)
    check_trait_maps(model_type, name)
    image_processor = load_image_processor(name)
    loaded = load_complete(_TRAIT_MODELS[model_type], name)
    return PromptCAMImageClassificationPipeline(
        loaded, image_processor=image_processor, device=device, task="image-classification"
    )


def load_classifier(model: str | os.PathLike, device: str | None = None) -> Pipeline:
    """Load a model with trait maps as `load_pipeline` does, or an image classifier of another kind.

    Args:
        model: A Hub id or a folder.
        device: As for `load_pipeline`.

    Raises:
        ValueError, OSError: as in `load_pipeline`.
    """
    name = os.fspath(model)
    if has_trait_maps(load_model_type(name)):
        return load_pipeline(name, device)
    image_processor = load_image_processor(name)
    loaded = load_complete(AutoModelForImageClassification, name, trust_remote_code=False)
    return ImageClassificationPipeline(
        loaded, image_processor=image_processor, device=device, task="image-classification"
    )


def load_image_processor(name: str | os.PathLike) -> BaseImageProcessor:
    """Load the image processor of a model, and check that it makes numbers of pixels.

    Args:
        name: A Hub id or a folder.

    Raises:
        ValueError: it is damaged, or it needs code of its own, which is never run.
        OSError: it cannot be found.
    """
    with _refusals(name):
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        settings = processor.to_dict()
        wanted = {"image_mean": 3, "image_std": 3} if settings.get("do_normalize") else {}
        wanted |= {"rescale_factor": 1} if settings.get("do_rescale") else {}
        for field, length in wanted.items():
            values = np.atleast_1d(np.asarray(settings[field], dtype=float))
            if len(values) != length or not np.isfinite(values).all() or (field != "image_mean" and values.min() <= 0):
                raise ValueError(
                    f"The image processor of {name} has the {field} {settings[field]}; finite numbers are needed, and "
                    "deviations and factors above 0."
                )
        for side in {**(settings.get("size") or {}), **(settings.get("crop_size") or {})}.values():
            if not 0 < side <= MAX_SIDE:
                raise ValueError(
                    f"The image processor of {name} makes images of {side} pixels a side; 1 to {MAX_SIDE} can be."
                )
    return processor


def load_complete(model_class: Any, name: str | os.PathLike, **options: Any) -> PreTrainedModel:
    """Load a model, all of whose weights are in its checkpoint and are finite numbers.

    Args:
        model_class: Its class.
        name: A Hub id or a folder.
        **options: Passed on to `from_pretrained`.

    Raises:
        ValueError: weights are missing, of another shape, not finite or damaged.
        OSError: it cannot be found.
    """
    with _refusals(name):
        model, report = model_class.from_pretrained(name, output_loading_info=True, use_safetensors=True, **options)
    wrong = sorted({str(key) for kind in ("missing_keys", "mismatched_keys") for key in report[kind]})
    if wrong:
        raise ValueError(f"The weights of {name} do not fill the model; first of {len(wrong)} misfits: {wrong[0]}.")
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"The weights of {name} are damaged: {key} holds values that are not finite.")
    return model


def load_model_type(name: str) -> str:
    """The type that config.json names; no class is built and no code looked for.

    Args:
        name: A Hub id or a folder.

    Raises:
        ValueError: the configuration is damaged.
        OSError: it cannot be found.
    """
    with _refusals(name):
        fields, _ = PreTrainedConfig.get_config_dict(name)
        return str(fields.get("model_type"))


@contextmanager
def _refusals(name: str | os.PathLike) -> Iterator[None]:
    """Make one sentence of what the libraries raise on a model that is damaged, or that needs code of its own."""
    try:
        with explained_load_errors(name):
            yield
    except (OSError, HFValidationError) as error:
        if find_cause(error, HFValidationError):
            raise FileNotFoundError(
                f"There is no folder {name!r}, and no repository of the Hub can have this name."
            ) from error
        if "Consistency check failed" in str(error):
            raise ConnectionError(f"The Hub sent a file of {name} of the wrong size; try again.") from error
        raise
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"{name} needs code of its own, which is never run.") from error
        if "File reconstruction error" in str(error):  # of the client of Xet, with addresses
            raise ConnectionError(
                f"The download of {name} broke off. Nothing incomplete is kept: try again later."
            ) from error
        if str(error).startswith("Unrecognized image processor"):  # a list of all there are follows
            raise ValueError(f"{name} does not say which image processor of transformers it needs.") from error
        raise
    except Exception as error:  # there is no end to the types that a damaged file brings forth
        reason = one_line(error).split("ignore_mismatched_sizes")[0][:300]
        raise ValueError(
            f"{name} cannot be loaded: its files are damaged, or not a model's ({type(error).__name__}: {reason})."
        ) from error


def as_classifier(model: ClassifierLike, image_processor: BaseImageProcessor | None = None) -> Classifier:
    """The model and its image processor, loaded where only a name was given.

    The image processor is for a loaded model, or in place of a pipeline's own.

    Raises:
        ValueError: it has no trait maps, or a loaded model comes without image processor.
        OSError: it cannot be found.
    """
    if isinstance(model, str | os.PathLike):
        model = load_pipeline(model)
    if isinstance(model, Pipeline | Classifier):
        image_processor = image_processor or model.image_processor
        model = model.model
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no model; give a folder, a Hub id, a pipeline or a loaded model.")
    check_trait_maps(model.config.model_type, model.name_or_path or "The model")
    if image_processor is None:
        raise ValueError("A loaded model needs its image processor: give image_processor=, a folder, or a pipeline.")
    return Classifier(model, image_processor)


def model_name(name_or_path: str | os.PathLike) -> str:
    """What a model is called in titles and tables: its id on the Hub, or the name of its folder.

    Of a folder that is called "model", as that of the demonstration is, it is the name of the folder around it.
    """
    if not os.path.isdir(name_or_path):
        return os.fspath(name_or_path)
    folder = Path(name_or_path).resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 over all weights of a model as they are, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def has_trait_maps(model_type: str) -> bool:
    """Whether models of a type have trait maps: a Prompt-CAM's, and INTR's."""
    return model_type in _TRAIT_MODELS


def check_trait_maps(model_type: str, name: str | os.PathLike) -> None:
    """Refuse models that have no trait maps.

    Raises:
        ValueError: it is the type of such a model.
    """
    if not has_trait_maps(model_type):
        raise ValueError(f"{name} is a model of type {model_type!r}, not a Prompt-CAM, and has no trait maps.")


def check_prompt_cam(model_type: str, name: str | os.PathLike) -> None:
    """Refuse other models, for what needs prompts and not only trait maps.

    Raises:
        ValueError: it is the type of another model.
    """
    check_trait_maps(model_type, name)
    if model_type != PromptCAMConfig.model_type:
        raise ValueError(f"{name} is a model of type {model_type!r}; this needs a Prompt-CAM.")
