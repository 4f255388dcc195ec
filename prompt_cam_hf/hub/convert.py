# SPDX-License-Identifier: MIT
"""`convert_official_checkpoint`: turns a checkpoint of the official implementation into a model of this package.

Names and shapes are those of the repository Imageomics/Prompt_CAM: timm's vision transformer, `vpt.prompt_embeddings`
of shape (layers, classes, hidden size), and `head`, one linear unit for all classes.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import BaseImageProcessor, Dinov2Config, PreTrainedConfig, ViTConfig

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.modeling import PromptCAMConfig, PromptCAMForImageClassification

_PROMPTS = "vpt.prompt_embeddings"
# timm's names, and those of the published ViT and DINOv2 checkpoints, which every transformers version reads.
_COMMON_NAMES = {
    r"head\.": "classifier.",
    r"cls_token": "backbone.embeddings.cls_token",
    r"pos_embed": "backbone.embeddings.position_embeddings",
    r"patch_embed\.proj\.": "backbone.embeddings.patch_embeddings.projection.",
    r"blocks\.(\d+)\.attn\.proj\.": r"backbone.encoder.layer.\1.attention.output.dense.",
    r"norm\.": "backbone.layernorm.",
}
_VIT_NAMES = _COMMON_NAMES | {
    r"blocks\.(\d+)\.norm1\.": r"backbone.encoder.layer.\1.layernorm_before.",
    r"blocks\.(\d+)\.norm2\.": r"backbone.encoder.layer.\1.layernorm_after.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"backbone.encoder.layer.\1.intermediate.dense.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"backbone.encoder.layer.\1.output.dense.",
}
_DINOV2_NAMES = _COMMON_NAMES | {
    r"blocks\.(\d+)\.(norm[12]|mlp\.fc[12])\.": r"backbone.encoder.layer.\1.\2.",
    r"blocks\.(\d+)\.ls([12])\.gamma": r"backbone.encoder.layer.\1.layer_scale\2.lambda1",
}
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def convert_official_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    image_size: int = 224,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> PromptCAMForImageClassification:
    """Turn an official Prompt-CAM state dict (Deep variant) into a model with the same scores and maps.

    Args:
        state_dict: The value of `model_state_dict` in an official checkpoint. If it has prompts for fewer layers than
            the network has, they belong to the last ones (the official `vpt_layer`).
        image_size: Height and width in pixels of the images that it was trained on.
        num_attention_heads: The number of heads of a layer, which cannot be read from the weights. None: one for every
            64 channels.
        id2label: The class names in the order of training; the official code sorts the names of folders. None:
            LABEL_0, LABEL_1, ...

    Returns:
        The model, in evaluation mode, with float32 weights of its own.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape, or `id2label` has another number of classes.
    """
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    for name in (_PROMPTS, "head.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"):
        if name not in tensors:
            raise ValueError(f"This is not an official Prompt-CAM state dict: it has no tensor {name!r}.")
    backbone_config = _backbone_config(tensors, image_size, num_attention_heads)
    prompts = tensors.pop(_PROMPTS)
    prompt_layers, num_classes, _ = prompts.shape
    if id2label is not None and len(id2label) != num_classes:
        raise ValueError(f"id2label names {len(id2label)} classes, but the checkpoint has prompts for {num_classes}.")
    config = PromptCAMConfig(
        backbone_config=backbone_config,
        id2label=id2label or {index: f"LABEL_{index}" for index in range(num_classes)},
        first_prompt_layer=backbone_config.num_hidden_layers - prompt_layers,
    )
    names = _DINOV2_NAMES if backbone_config.model_type == "dinov2" else _VIT_NAMES
    converted = {"class_prompts": prompts[-1]}
    if prompt_layers > 1:
        converted["agnostic_prompts"] = prompts[:-1]
    for name, tensor in tensors.items():
        converted |= _convert_tensor(name, tensor, names)
    # Copies, since the model uses these tensors as its own and the caller keeps the state dict.
    converted = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in converted.items()}
    model, report = PromptCAMForImageClassification.from_pretrained(
        None, config=config, state_dict=converted, dtype=torch.float32, output_loading_info=True
    )
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise ValueError(
            f"The official state dict does not fill the model; first of {len(wrong)} misfits: {wrong[0]}."
        )
    return model


def convert_official_checkpoint(
    path: str | os.PathLike,
    *,
    image_size: int = 224,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> tuple[PromptCAMForImageClassification, BaseImageProcessor]:
    """Read an official checkpoint file, without running any code in it.

    Args:
        path: The pickled file, with the key `model_state_dict`.
        image_size, num_attention_heads, id2label: As in `convert_official_state_dict`.

    Returns:
        The model, and an image processor that does the official preprocessing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an official checkpoint.

    Example:
        >>> from prompt_cam_hf import convert_official_checkpoint
        >>> model, image_processor = convert_official_checkpoint("model.pt", id2label={0: "robin", 1: "wren"})
        >>> model.save_pretrained("converted")
        >>> image_processor.save_pretrained("converted")
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises depends on where in the bytes it stumbles
        raise ValueError(f"{path} is not a checkpoint of plain tensors, so it was not loaded.") from error
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise ValueError(f"{path} is not an official checkpoint: it has no key 'model_state_dict'.")
    model = convert_official_state_dict(
        checkpoint["model_state_dict"],
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        id2label=id2label,
    )
    return model, build_image_processor(image_size)


def _backbone_config(
    tensors: Mapping[str, torch.Tensor], image_size: int, num_attention_heads: int | None
) -> PreTrainedConfig:
    hidden_size, num_channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    grid = image_size // patch_size
    positions = tensors["pos_embed"].shape[1] - 1
    if positions != grid**2:
        raise ValueError(
            f"The checkpoint has {positions} positions, but image_size={image_size} with patches of {patch_size} "
            f"pixels makes {grid**2}; give the image_size that it was trained with."
        )
    intermediate_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    common: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(match[1]) for name in tensors if (match := _QKV.fullmatch(name))),
        "num_attention_heads": num_attention_heads or max(hidden_size // 64, 1),
        "num_channels": num_channels,
        "image_size": image_size,
        "patch_size": patch_size,
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }
    if "blocks.0.ls1.gamma" in tensors:
        mlp_ratio, rest = divmod(intermediate_size, hidden_size)
        if rest:
            raise ValueError(
                f"The MLP has {intermediate_size} units, which is not a multiple of the {hidden_size} channels."
            )
        return Dinov2Config(**common, mlp_ratio=mlp_ratio, use_mask_token=False)
    return ViTConfig(**common, intermediate_size=intermediate_size)


def _convert_tensor(name: str, tensor: torch.Tensor, names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    if match := _QKV.fullmatch(name):
        layer, kind = match.groups()
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"backbone.encoder.layer.{layer}.attention.attention.{part}.{kind}": value for part, value in parts}
    for pattern, replacement in names.items():
        converted, found = re.subn(rf"^{pattern}", replacement, name)
        if found:
            return {converted: tensor}
    raise ValueError(f"The official state dict holds a tensor that Prompt-CAM does not have: {name!r}.")
