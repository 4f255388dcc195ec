# SPDX-License-Identifier: MIT
"""`convert_official_checkpoint`: turns a checkpoint of the official implementation into a model of this package.

Those of INTR, the baseline, are recognised too; see `convert_intr`.

Names and shapes are those of the repository Imageomics/Prompt_CAM: timm's vision transformer, `vpt.prompt_embeddings`
of shape (layers, classes, hidden size), and `head`, one linear unit for all classes.
"""

import argparse
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from transformers import BaseImageProcessor, Dinov2Config, PreTrainedConfig, ViTConfig

from prompt_cam_hf.baselines.intr import INTRForImageClassification
from prompt_cam_hf.data.images import build_detr_image_processor, build_image_processor
from prompt_cam_hf.data.splits import display_names
from prompt_cam_hf.hub.convert_intr import convert_official_intr_state_dict
from prompt_cam_hf.modeling import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.checkpoint_prompt_cam import explained_load_errors
from prompt_cam_hf.modeling.formats_prompt_cam import TIMM_NAMES, translate_weights

_SUFFIXES = (".pt", ".pth")
_PROMPTS = "vpt.prompt_embeddings"
# What tells how the network is built, with the number of axes.
_TELLING = {_PROMPTS: 3, "patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2}


def convert_official_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> PromptCAMForImageClassification:
    """Turn an official Prompt-CAM state dict (Deep variant) into a model with the same scores and maps.

    Args:
        state_dict: The value of `model_state_dict` in an official checkpoint. If it has prompts for fewer layers than
            the network has, they belong to the last ones (the official `vpt_layer`).
        image_size: Height and width in pixels of the images that it was trained on. None: what its positions fill,
            which is 224 for the published checkpoints.
        num_attention_heads: The number of heads of a layer, which cannot be read from the weights. None: one for every
            64 channels.
        id2label: The class names in the order of training; the official code sorts the names of folders. None:
            LABEL_0, LABEL_1, ...

    Returns:
        The model, in evaluation mode, with float32 weights of its own.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape, or another argument does not fit the tensors.
    """
    try:
        tensors = _check_tensors(state_dict)
        backbone_config = _backbone_config(tensors, image_size, num_attention_heads)
        weights = _translate(tensors, backbone_config)
    except ValueError as error:
        raise ValueError(f"This cannot be converted as an official Prompt-CAM: {error}") from error
    prompt_layers, num_classes, _ = tensors[_PROMPTS].shape
    if id2label is not None and len(id2label) != num_classes:
        raise ValueError(f"id2label names {len(id2label)} classes, but the checkpoint has prompts for {num_classes}.")
    config = PromptCAMConfig(
        backbone_config=backbone_config,
        id2label=id2label or {index: f"LABEL_{index}" for index in range(num_classes)},
        first_prompt_layer=backbone_config.num_hidden_layers - prompt_layers,
    )
    return PromptCAMForImageClassification.from_pretrained(
        None, config=config, state_dict=weights, dtype=torch.float32
    )


def convert_official_checkpoint(
    path: str | os.PathLike,
    *,
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> tuple[PromptCAMForImageClassification | INTRForImageClassification, BaseImageProcessor]:
    """Read an official checkpoint file of Prompt-CAM or of INTR, without running any code in it.

    Args:
        path: The pickled file, with the key `model_state_dict` (Prompt-CAM) or `model` (INTR).
        image_size: As in `convert_official_state_dict`; an INTR takes images of any size.
        num_attention_heads: As in `convert_official_state_dict`; of an INTR, the file says it, or it is 8.
        id2label: As in `convert_official_state_dict`.

    Returns:
        The model (a Prompt-CAM or an INTR), and an image processor that does the official preprocessing.

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
        # INTR's files also hold the options of the run, which are data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what torch raises depends on where in the bytes it stumbles
        raise ValueError(f"{path} is not a checkpoint of plain tensors, so it was not loaded.") from error
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), Mapping):
        if image_size is not None:
            raise ValueError(f"image_size={image_size} is for a Prompt-CAM; {path} is an INTR and takes any size.")
        told = getattr(checkpoint.get("args"), "nheads", None)
        heads = num_attention_heads or (told if isinstance(told, int) else None)
        intr = convert_official_intr_state_dict(checkpoint["model"], num_attention_heads=heads, id2label=id2label)
        return intr, build_detr_image_processor()
    if not isinstance(checkpoint, dict) or "model_state_dict" not in checkpoint:
        raise ValueError(
            f"{path} is not an official checkpoint: it has no key 'model_state_dict' (Prompt-CAM) or 'model' (INTR)."
        )
    model = convert_official_state_dict(
        checkpoint["model_state_dict"],
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        id2label=id2label,
    )
    return model, build_image_processor(model.config.backbone_config.image_size)


def find_official_checkpoint(source: str | os.PathLike, file: str | None = None) -> Path:
    """The file of an official checkpoint, fetched where it is on the Hub.

    Args:
        source: The file, or a folder or Hub repository of such files.
        file: Which one, by its path in the folder or repository.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ValueError: there is not one such file, and `file` names none of them.
        OSError: the Hub cannot be reached, or refuses.
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(found.relative_to(path).as_posix() for found in path.rglob("*"))
    elif path.is_file() or path.suffix in _SUFFIXES:
        if file or not path.is_file():
            raise FileNotFoundError(f"There is no file {path / (file or '')}.")
        return path
    else:
        with explained_load_errors(name):
            files = sorted(HfApi().list_repo_files(name))
    files = [found for found in files if found.endswith(_SUFFIXES)]
    chosen = file or (files[0] if len(files) == 1 else None)
    if chosen not in files:
        wanted = (
            f"has no {file}" if file else f"has {len(files)} official checkpoints, and one is to be chosen by --file"
        )
        raise ValueError(f"{name} {wanted}; the files in it are {', '.join(files) or 'none'}.")
    if path.is_dir():
        return path / chosen
    with explained_load_errors(name):
        return Path(hf_hub_download(name, chosen))


def read_class_names(path: str | os.PathLike) -> dict[int, str]:
    """The class names of an official checkpoint, by number.

    Args:
        path: A text file with one name a line, in the order of training; or a folder of the class folders that it was
            trained on, which the official code numbers in the order of their names. From these, a number in front
            (`001.`) is cut off.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: it is no text, or a line among the names is empty or repeats one.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return display_names(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file (UTF-8) with one class name a line.") from error
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            fault = f"repeats the class name {name!r}" if name else "has no class name"
            raise ValueError(f"Line {number + 1} of {path} {fault}.")
    return dict(enumerate(names))


def _check_tensors(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, by their names without the `module.` that training on several GPUs puts in front."""
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"its state dict is a {type(state_dict).__name__}, not a mapping from names to tensors.")
    for name, tensor in state_dict.items():
        dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
        if not isinstance(name, str) or not dense or not tensor.is_floating_point() or not tensor.numel():
            raise ValueError(f"{name!r} is not the name of a dense tensor of numbers.")
    tensors = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    for name, axes in _TELLING.items():
        if name not in tensors or tensors[name].ndim != axes:
            raise ValueError(f"it has no tensor {name!r} with {axes} axes.")
    return tensors


def _backbone_config(
    tensors: Mapping[str, torch.Tensor], image_size: int | None, num_attention_heads: int | None
) -> PreTrainedConfig:
    hidden_size, num_channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    blocks = {match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))}
    # Before a network is built for them: a block has eleven tensors or more.
    if blocks != {str(number) for number in range(len(blocks))} or len(tensors) < 8 * len(blocks):
        raise ValueError(f"its {len(blocks)} blocks are not numbered from 0 on, or lack most of their tensors.")
    positions = tensors["pos_embed"].shape[1] - 1
    image_size = image_size or math.isqrt(positions) * patch_size
    grid = image_size // patch_size
    if positions != grid**2 or not positions:
        raise ValueError(
            f"it has {positions} positions, but image_size={image_size} with patches of {patch_size} pixels makes "
            f"{grid**2}; give the image_size that it was trained with."
        )
    heads = num_attention_heads or max(hidden_size / 64, 1)
    if heads < 1 or hidden_size % heads or heads != int(heads):
        raise ValueError(
            f"its {hidden_size} channels cannot be divided among {heads:g} heads; give the number of heads that it "
            "was trained with."
        )
    intermediate_size = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    common: dict[str, Any] = {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": int(heads),
        "num_channels": num_channels,
        "image_size": image_size,
        "patch_size": patch_size,
        "layer_norm_eps": 1e-6,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
    }
    if "blocks.0.ls1.gamma" in tensors:
        mlp_ratio, rest = divmod(intermediate_size, hidden_size)
        if rest:
            raise ValueError(f"its MLP of {intermediate_size} units is not a multiple of its {hidden_size} channels.")
        return Dinov2Config(**common, mlp_ratio=mlp_ratio, use_mask_token=False)
    return ViTConfig(**common, intermediate_size=intermediate_size)


def _translate(tensors: Mapping[str, torch.Tensor], backbone_config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Our names and copies, since the model uses these tensors as its own and the caller keeps the state dict."""
    width = backbone_config.hidden_size
    prompts = tensors[_PROMPTS]
    if len(prompts) > backbone_config.num_hidden_layers:
        raise ValueError(f"it has prompts for {len(prompts)} layers, but {backbone_config.num_hidden_layers} blocks.")
    own = {_PROMPTS: (*prompts.shape[:2], width), "head.weight": (1, width), "head.bias": (1,)}
    for name, shape in own.items():
        if name not in tensors or tensors[name].shape != shape:
            raise ValueError(f"it has no tensor {name!r} of the shape {list(shape)}.")
    others = {name: tensor for name, tensor in tensors.items() if name not in own}
    translated = translate_weights(others, backbone_config, TIMM_NAMES[backbone_config.model_type], {}, r"(?!)")
    weights = {f"backbone.{name}": tensor for name, tensor in translated.items()}
    weights |= {"class_prompts": prompts[-1], "agnostic_prompts": prompts[:-1]}
    weights |= {f"classifier.{name}": tensors[f"head.{name}"] for name in ("weight", "bias")}
    if len(prompts) == 1:
        del weights["agnostic_prompts"]
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
