# SPDX-License-Identifier: MIT
"""Where an INTR finds its weights in a checkpoint of a DETR, or in one of the official INTR.

The same network goes by three sets of names: those of the official code of DETR and INTR, with torchvision's ResNet;
those of transformers, with timm's ResNet or its own. One table turns all of them into ours. It is strict: what is
missing, left over or of another shape is refused.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, ResNetConfig
from transformers.utils import cached_file

from prompt_cam_hf.modeling.checkpoint_prompt_cam import backbone_name, explained_load_errors, find_weights

# Applied in this order to every name.
_RENAMED = (
    (r"^(module\.)?(model\.)?", ""),
    (r"^backbone\.(0\.body|(conv_encoder\.)?model(\._backbone)?)\.", "backbone."),
    (r"^backbone\.conv1\.", "backbone.embedder.embedder.convolution."),
    (r"^backbone\.bn1\.", "backbone.embedder.embedder.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
    (r"^(transformer\.)?(encoder|decoder)\.layers\.", r"\2_layers."),
    (r"^(transformer\.)?decoder\.(layer)?norm\.", "decoder_norm."),
    (r"\.multihead_attn\.", ".encoder_attn."),
    (r"\.out_proj\.", ".o_proj."),
    (r"(layers\.\d+)\.(linear|fc)(\d)\.", r"\1.mlp.fc\3."),
    (r"(layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"^(encoder_layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"^(decoder_layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"^(decoder_layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"^input_proj\.", "input_projection."),
    (r"^query_embed\.", "query_position_embeddings."),
    (r"^presence_vector\.", "classifier."),
)
_IN_A_STAGE = re.compile(r"^backbone\.layer(\d)\.(\d+)\.(conv|bn)(\d)\.")
_SHORTCUT = re.compile(r"^backbone\.layer(\d)\.(\d+)\.shortcut\.")
# Counters of batch norms that are frozen, and a ResNet's own classifier.
_UNUSED = r".*\.num_batches_tracked$|backbone\.fc\."
# A DETR's queries are of no class, and its heads find boxes.
DETR_ONLY = r"query_position_embeddings\.|class_labels_classifier\.|class_embed\.|bbox_(predictor|embed)\."
_PARTS = ("q_proj", "k_proj", "v_proj")


def rename(name: str) -> str:
    """Our name of a weight, from any of the three sets."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    name = _SHORTCUT.sub(lambda m: f"backbone.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.shortcut.", name)

    def in_a_stage(match: re.Match[str]) -> str:
        piece = {"conv": "convolution", "bn": "normalization"}[match[3]]
        stage, layer = int(match[1]) - 1, int(match[4]) - 1
        return f"backbone.encoder.stages.{stage}.layers.{match[2]}.layer.{layer}.{piece}."

    return _IN_A_STAGE.sub(in_a_stage, name)


def rename_all(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All weights under our names; queries, keys and values that are stored as one are taken apart."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        own = rename(name)
        stem, joined, kind = own.partition(".in_proj_")
        if joined:
            renamed |= {f"{stem}.{part}.{kind}": each for part, each in zip(_PARTS, tensor.chunk(3), strict=True)}
        else:
            renamed[own] = tensor
    return renamed


def fill(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], unused: str, fresh: tuple[str, ...]) -> None:
    """Set a model's weights to those under our names.

    Args:
        model: The INTR.
        tensors: From `rename_all`.
        unused: A pattern of names that may be left over.
        fresh: Beginnings of the names of weights that stay as they are.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(fresh)}
    misfits = {}
    for name, tensor in own.items():
        if name not in tensors:
            misfits[name] = "is missing"
        elif tensors[name].shape != tensor.shape:
            misfits[name] = f"has the shape {list(tensors[name].shape)} instead of {list(tensor.shape)}"
    misfits |= {
        name: "is left over" for name in tensors if name not in own and not re.match(f"{_UNUSED}|{unused}", name)
    }
    if misfits:
        first = [f"{name} {fault}" for name, fault in misfits.items()][:5] + ["..."] * (len(misfits) > 5)
        raise ValueError(f"{len(misfits)} of its weights do not fit: {', '.join(first)}.")
    model.load_state_dict({name: tensors[name] for name in own}, strict=False)


def read_sizes(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The fields of `INTRConfig` that the weights, under our names, tell.

    Raises:
        ValueError: they are not those of an encoder and decoder on a ResNet.
    """
    counts = {side: _count(tensors, rf"{side}_layers\.(\d+)\.") for side in ("encoder", "decoder")}
    try:
        sizes: dict[str, Any] = {f"{side}_layers": count for side, count in counts.items()}
        for side, count in counts.items():
            if count:
                sizes[f"{side}_ffn_dim"] = len(tensors[f"{side}_layers.0.mlp.fc1.weight"])
        return sizes | {"d_model": len(tensors["input_projection.weight"]), "backbone_config": _read_resnet(tensors)}
    except (KeyError, IndexError) as error:
        raise ValueError(f"it has no weight {error.args[0]!r}.") from error


def _count(tensors: Mapping[str, torch.Tensor], pattern: str) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    if numbers != set(range(len(numbers))):
        raise ValueError(f"its layers {pattern!r} are not numbered from 0 on.")
    return len(numbers)


def _read_resnet(tensors: Mapping[str, torch.Tensor]) -> ResNetConfig:
    stages = "backbone.encoder.stages."
    stem = tensors["backbone.embedder.embedder.convolution.weight"]
    depths = [
        _count(tensors, rf"{re.escape(stages)}{stage}\.layers\.(\d+)\.")
        for stage in range(_count(tensors, rf"{re.escape(stages)}(\d+)\."))
    ]
    first = f"{stages}0.layers.0.layer."
    last = max(int(name.removeprefix(first)[0]) for name in tensors if name.startswith(first))
    widths = [
        len(tensors[f"{stages}{stage}.layers.0.layer.{last}.convolution.weight"]) for stage in range(len(depths))
    ]
    return ResNetConfig(
        num_channels=stem.shape[1],
        embedding_size=stem.shape[0],
        hidden_sizes=widths,
        depths=depths,
        layer_type="bottleneck" if last == 2 else "basic",
    )


def read_detr(name: str | os.PathLike, **hub: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A DETR in transformers' format, with timm's ResNet or transformers' own, with neither library's help.

    Args:
        name: A Hub id or a folder.
        **hub: revision, token and the like.

    Returns:
        The fields of `INTRConfig` that it tells, and its weights under our names.

    Raises:
        ValueError: its weights are not those of a DETR.
        OSError: it has no weights.
    """
    place = str(backbone_name(name))
    with explained_load_errors(place, hub.get("revision")):
        fields, _ = PreTrainedConfig.get_config_dict(place, **hub)
        files = find_weights(place, **hub) or [_find_pickle(place, **hub)]
    tensors = rename_all({key: value for file in files for key, value in _load(file).items()})
    try:
        sizes = read_sizes(tensors)
    except ValueError as error:
        raise ValueError(f"{place} has not the weights of a DETR on a ResNet: {error}") from error
    same = ("encoder_attention_heads", "decoder_attention_heads", "activation_function")
    return sizes | {key: fields[key] for key in same if key in fields}, tensors


def _find_pickle(place: str, **hub: Any) -> str:
    path = cached_file(place, "pytorch_model.bin", _raise_exceptions_for_missing_entries=False, **hub)
    if path is None:
        raise FileNotFoundError(f"{place} has no weights; they would be in model.safetensors.")
    return path


def _load(file: str) -> dict[str, torch.Tensor]:
    return load_file(file) if file.endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)


def is_detr(name: str | os.PathLike, **hub: Any) -> bool:
    """Whether a Hub id or folder is a DETR in transformers' format."""
    place = str(backbone_name(name))
    with explained_load_errors(place, hub.get("revision")):
        path = cached_file(place, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
    return path is not None and json.loads(Path(path).read_text(encoding="utf-8")).get("model_type") == "detr"


__all__ = ["DETR_ONLY", "fill", "is_detr", "read_detr", "read_sizes", "rename_all"]
