# SPDX-License-Identifier: MIT
"""What does a backbone's own preprocessing make of an image: its size, crop, mean and standard deviation?"""

import math
import os
from typing import Any

from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.utils import is_torchvision_available

from prompt_cam_hf.modeling.checkpoint_prompt_cam import backbone_name
from prompt_cam_hf.modeling.formats_prompt_cam import foreign_config

_INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# What open_clip itself takes for what a preprocess_cfg leaves out.
_OPEN_CLIP_DEFAULTS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of the images that the image processor makes."""
    height, width = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    return height, width


def backbone_image_processor(backbone: str | os.PathLike, **hub: Any) -> BaseImageProcessor:
    """The image processor that a backbone was trained with.

    It comes from `preprocessor_config.json` (transformers), `pretrained_cfg` (timm) or `preprocess_cfg` (open_clip),
    and runs on torchvision where that can be imported and on PIL elsewhere.

    Args:
        backbone: A Hub id or a folder.
        **hub: revision, token and the like.

    Raises:
        ValueError: a setting is missing, or is one that transformers' image processors do not have.
        OSError: nothing is found there.
    """
    name = backbone_name(backbone)
    found = foreign_config(name, **hub)
    if found is None:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    try:
        settings = _timm_settings(found) if "architecture" in found else _open_clip_settings(found)
    except KeyError as error:
        raise ValueError(f"{name} does not say {error.args[0]!r} of its images; build an image processor.") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    processor_class: type[BaseImageProcessor]
    if is_torchvision_available():
        from transformers import CLIPImageProcessor as processor_class
    else:
        from transformers import CLIPImageProcessorPil as processor_class
    return processor_class(**settings)


def output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """The rows and columns of the images that an image processor gives.

    Raises:
        ValueError: it gives images of different sizes.
    """
    settings = image_processor.to_dict()
    size, both = settings["size"], {"height", "width"}
    cropped = settings["crop_size"] if settings.get("do_center_crop") else size
    if not both <= set(cropped) or not (both <= set(size) or "shortest_edge" in size):
        raise ValueError(
            f"The image processor resizes to {size} and so gives images of different sizes; training needs one that "
            "resizes or crops to a fixed height and width."
        )
    return cropped["height"], cropped["width"]


def _timm_settings(found: dict[str, Any]) -> dict[str, Any]:
    told = found["pretrained_cfg"]
    height, width = _sides((found.get("model_args") or {}).get("img_size") or told["input_size"][1:])
    mode, share = told.get("crop_mode", "center"), told["crop_pct"]
    resized = {"height": math.floor(height / share), "width": math.floor(width / share)}
    if mode == "center" and height == width:
        resized = {"shortest_edge": resized["height"]}
    elif mode != "squash":
        raise ValueError(f"crop_mode {mode!r} for images of {height}x{width} pixels is not supported.")
    return _settings(told, resized, {"height": height, "width": width})


def _open_clip_settings(found: dict[str, Any]) -> dict[str, Any]:
    told = _OPEN_CLIP_DEFAULTS | (found.get("preprocess_cfg") or {})
    height, width = _sides(told.get("size") or found["model_cfg"]["vision_cfg"].get("image_size", 224))
    mode, size = told["resize_mode"], {"height": height, "width": width}
    if mode == "squash":
        return _settings(told, size, size)
    if mode != "shortest" or height != width:
        raise ValueError(f"resize_mode {mode!r} for images of {height}x{width} pixels is not supported.")
    return _settings(told, {"shortest_edge": height}, size)


def _sides(size: int | list[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _settings(told: dict[str, Any], resized: dict[str, int], cropped: dict[str, int]) -> dict[str, Any]:
    if told["interpolation"] not in _INTERPOLATIONS:
        raise ValueError(
            f"interpolation {told['interpolation']!r} is not supported, {', '.join(_INTERPOLATIONS)} are."
        )
    return {
        "size": resized,
        "resample": _INTERPOLATIONS[told["interpolation"]],
        "do_center_crop": resized != cropped,
        "crop_size": cropped,
        "image_mean": list(told["mean"]),
        "image_std": list(told["std"]),
    }


__all__ = ["backbone_image_processor", "output_size"]
