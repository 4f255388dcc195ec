# SPDX-License-Identifier: MIT
"""How is a vision transformer in timm's or open_clip's format made into one of transformers, with neither installed?

What a configuration leaves open is refused, and so are weights that are missing, left over or of another shape.
"""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from .backbone_prompt_cam import backbone_class, build_backbone

Weights = dict[str, torch.Tensor]

# The first file that there is holds the weights.
_TIMM_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_OPEN_CLIP_FILES = tuple(f"open_clip_{file}" for file in _TIMM_FILES)
# What may be left over, as Prompt-CAM never uses it: classifiers, poolers, projections, text towers.
_TIMM_UNUSED = r"head\.|head_dist\.|pre_logits\.|attn_pool\."
_OPEN_CLIP_UNUSED = r"visual\.proj$|logit_|text|transformer\.|token_embedding\.|positional_embedding$|ln_final\."


def _columns(names: str) -> list[str]:
    layer, names = names.split(maxsplit=1)
    return names.replace("E:", "embeddings.").replace("L:", layer).split()


# Names of weights, by column: in timm's format and open_clip's, then in the checkpoints of transformers' families. `#`
# is a layer's number, `/0` the first third of a tensor; .weight and .bias follow (after an underscore without point).
_TIMM = _columns(
    "blocks.#. cls_token dist_token reg_token pos_embed patch_embed.proj norm_pre norm L:norm1 L:attn.qkv/0 "
    "L:attn.qkv/1 L:attn.qkv/2 L:attn.proj L:norm2 L:mlp.fc1 L:mlp.fc2 L:mlp.fc1 L:mlp.fc2 L:ls1.gamma L:ls2.gamma"
)
_EVA = [*_TIMM[:-4], *_columns("blocks.#. L:attn.q_bias L:attn.v_bias L:gamma_1 L:gamma_2")]
_OPEN_CLIP = _columns(
    "visual.transformer.resblocks.#. visual.class_embedding - - visual.positional_embedding visual.conv1 "
    "visual.ln_pre visual.ln_post L:ln_1 L:attn.in_proj_/0 L:attn.in_proj_/1 L:attn.in_proj_/2 L:attn.out_proj L:ln_2 "
    "L:mlp.c_fc L:mlp.c_proj"
)
_VIT = _columns(
    "encoder.layer.#. E:cls_token E:distillation_token - E:position_embeddings E:patch_embeddings.projection - "
    "layernorm L:layernorm_before L:attention.attention.query L:attention.attention.key L:attention.attention.value "
    "L:attention.output.dense L:layernorm_after L:intermediate.dense L:output.dense"
)
_DINOV2 = _columns(
    "encoder.layer.#. E:cls_token - E:register_tokens E:position_embeddings E:patch_embeddings.projection - layernorm "
    "L:norm1 L:attention.attention.query L:attention.attention.key L:attention.attention.value "
    "L:attention.output.dense L:norm2 L:mlp.fc1 L:mlp.fc2 L:mlp.weights_in L:mlp.weights_out L:layer_scale1.lambda1 "
    "L:layer_scale2.lambda1"
)
_DINOV3 = _columns(
    "layer.#. E:cls_token - E:register_tokens - E:patch_embeddings - norm L:norm1 L:attention.q_proj "
    "L:attention.k_proj L:attention.v_proj L:attention.o_proj L:norm2 L:mlp.up_proj L:mlp.down_proj "
    "L:attention.q_proj.bias L:attention.v_proj.bias L:layer_scale1.lambda1 L:layer_scale2.lambda1"
)
_CLIP = _columns(
    "encoder.layers.#. E:class_embedding - - E:position_embedding.weight E:patch_embedding pre_layrnorm "
    "post_layernorm L:layer_norm1 L:self_attn.q_proj L:self_attn.k_proj L:self_attn.v_proj L:self_attn.out_proj "
    "L:layer_norm2 L:mlp.fc1 L:mlp.fc2"
)
# By the names of transformers' families, those of timm.
TIMM_NAMES = {"vit": dict(zip(_VIT, _TIMM, strict=False)), "dinov2": dict(zip(_DINOV2, _TIMM, strict=False))}

# The timm architectures that are read; width, depth, number of heads and `mlp_ratio` of each size.
_TIMM_ARCHITECTURE = (
    r"vit_(tiny|small|base|large|huge|giant|gigantic)_patch\d+_\d+|vit_(huge|giant)_patch\d+_gap_\d+"
    r"|deit_(tiny|small|base)(_distilled)?_patch\d+_\d+|deit3_(small|medium|base|large|huge)_patch\d+_\d+"
    r"|vit_(small|base|large|giant)_patch\d+(_reg4)?_dinov2"
    r"|vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch\d+_dinov3(_qkvb)?"
    r"|vit_(base|large|so400m|giantopt)_patch\d+_siglip(_gap)?_\d+"
    r"|vit_(xsmall|medium|betwixt|base|large|huge|giant|gigantic)_patch\d+_clip(_quickgelu)?_\d+"
)
_TIMM_SIZES = {
    **{"xsmall": (256, 10, 4, 4), "tiny": (192, 12, 3, 4), "small": (384, 12, 6, 4), "medium": (512, 12, 8, 4)},
    **{"betwixt": (640, 12, 10, 4), "base": (768, 12, 12, 4), "large": (1024, 24, 16, 4)},
    **{"so400m": (1152, 27, 16, 3.7362), "huge": (1280, 32, 16, 4), "giant": (1408, 40, 16, 48 / 11)},
    **{"giantopt": (1536, 40, 16, 4), "gigantic": (1664, 48, 16, 64 / 13), "7b": (4096, 40, 32, 2)},
}
# What else an architecture's name says, later rows over earlier ones; `model_args` have the last word.
_TIMM_SAYS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {"class_token": True, "distilled": False, "reg_tokens": 0, "no_embed_class": False, "pre_norm": False}),
    ("", {"qkv_bias": True, "init_values": None, "act_layer": "gelu", "gated": 0, "eps": 1e-6}),
    ("_gap_|_siglip_", {"class_token": False}),
    ("_distilled_", {"distilled": True}),
    ("_dinov2|^deit3_", {"init_values": 1e-5}),
    ("_reg4_", {"reg_tokens": 4}),
    ("_reg4_|^deit3_", {"no_embed_class": True}),
    ("_giant_.*_dinov2", {"embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "gated": 1}),
    ("_dinov3", {"init_values": 1e-5, "reg_tokens": 4, "qkv_bias": False, "eps": 1e-5}),
    ("_qkvb$", {"qkv_bias": True}),
    ("_plus_.*_dinov3", {"gated": 8}),  # the MLP's width is a multiple of it
    ("_huge_plus_", {"num_heads": 20}),
    ("_7b_", {"gated": 64}),
    ("_clip_", {"pre_norm": True, "eps": 1e-5}),
    ("_quickgelu_", {"act_layer": "quick_gelu"}),
    ("_(base_patch32|so400m_patch16|giantopt_patch16)_siglip_|_large_.*_siglip_.*512", {"act_layer": "gelu_tanh"}),
)
# The last row says nothing about the tokens of an image that the weights do not.
_TIMM_ARGUMENTS = (
    "(class|reg|num_reg)_tokens?|no_embed_class|pre_norm|qkv_bias|init_values|act_layer|mlp_ratio"
    "|embed_dim|depth|num_heads|(img|patch)_size"
    "|num_classes|global_pool|(use_)?fc_norm|((pos|patch|proj|attn)_)?drop_rate|drop_path_rate|(dynamic|strict)_img_size"
)
# Architectures, the family of transformers, what it has, and what it may have; the first that fits is taken.
_SCALED = {"init_values", "gated"}
_TIMM_FAMILIES: tuple[tuple[str, str, list[str], set[str], set[str]], ...] = (
    ("_dinov3", "dinov3_vit", _DINOV3, {"class_token"}, {"reg_tokens", *_SCALED}),
    ("_siglip_", "siglip_vision_model", _CLIP, set(), set()),
    ("", "vit", _VIT, {"class_token"}, set()),
    ("", "ijepa", _VIT, set(), set()),
    ("", "deit", _VIT, {"class_token", "distilled"}, set()),
    ("", "clip_vision_model", _CLIP, {"class_token", "pre_norm"}, set()),
    ("", "dinov2", _DINOV2, {"class_token"}, _SCALED),
    ("", "dinov2_with_registers", _DINOV2, {"class_token", "reg_tokens"}, _SCALED),
)
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_OPEN_CLIP_SAYS = {
    **{"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224},
    **{"norm_kwargs": None, "patch_dropout": 0.0, "output_tokens": False},
}
# A configuration; what its weights are called at the source (`=1`: they are all 1); and, by name at the source, by how
# much they grow at the ends of their axes (see `pad`), in how many parts.
_Tower = tuple[PreTrainedConfig, dict[str, str], dict[str, tuple[tuple[int, ...], int]]]


def foreign_config(name: str | os.PathLike, **hub: Any) -> dict[str, Any] | None:
    """The configuration in timm's format (has `architecture`) or open_clip's (`model_cfg`), None in another format."""
    for file, key in (("config.json", "architecture"), ("open_clip_config.json", "model_cfg")):
        path = cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)
        config = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
        if key in config or "model_type" in config:
            return config if key in config else None
    return None


def read_backbone(name: str | os.PathLike, **hub: Any) -> PreTrainedModel | None:
    """The vision transformer in timm's or open_clip's format as a model of transformers, None in another format.

    Args:
        name: A Hub id or a folder.
        **hub: revision, token and the like.

    Raises:
        ValueError: no supported family can run it, or its weights do not fit.
        OSError: there are no weights.
    """
    if (found := foreign_config(name, **hub)) is None:
        return None
    is_timm = "architecture" in found
    try:
        tower = _read_timm(found) if is_timm else _read_open_clip(found["model_cfg"])
        weights = _read_weights(name, _TIMM_FILES if is_timm else _OPEN_CLIP_FILES, **hub)
        weights = translate_weights(weights, *tower, _TIMM_UNUSED if is_timm else _OPEN_CLIP_UNUSED)
    except ValueError as error:
        raise ValueError(f"{os.fspath(name)} cannot be used as a backbone: {error}") from error
    model_class, options = backbone_class(tower[0])
    model = model_class.from_pretrained(None, config=tower[0], state_dict=weights, dtype=torch.float32, **options)
    model.name_or_path = model.config.name_or_path = os.fspath(name)
    return model


def _read_weights(name: str | os.PathLike, files: tuple[str, ...], **hub: Any) -> Weights:
    paths = (cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub) for file in files)
    path = next((path for path in paths if path is not None), None)
    if path is None:
        raise FileNotFoundError(f"{os.fspath(name)} has no weights; they would be in {' or '.join(files)}.")
    try:
        if path.endswith(".json"):
            parts = set(json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"].values())
            return {k: v for part in parts for k, v in load_file(str(cached_file(name, part, **hub))).items()}
        weights = torch.load(path, map_location="cpu", weights_only=True) if path.endswith(".bin") else load_file(path)
        if not all(isinstance(tensor, torch.Tensor) for tensor in weights.values()):
            raise ValueError
    except (AttributeError, EOFError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError, ValueError):
        raise ValueError(f"{Path(path).name} is damaged or holds more than tensors, which is not run.") from None
    return weights


def _read_timm(found: dict[str, Any]) -> _Tower:
    name, own = found["architecture"], found.get("model_args") or {}
    unknown = "".join(f" with {key}" for key in sorted(own) if not re.fullmatch(_TIMM_ARGUMENTS, key))
    if not re.fullmatch(_TIMM_ARCHITECTURE, name) or unknown:
        raise ValueError(f"timm's architecture {name!r}{unknown} is not among those that docs/backbones.md lists.")
    size = zip(("embed_dim", "depth", "num_heads", "mlp_ratio"), _TIMM_SIZES[name.split("_")[1]], strict=True)
    told: dict[str, Any] = dict(size) | {"patch_size": int(re.findall(r"_patch(\d+)", name)[0])}
    told["img_size"] = (found.get("pretrained_cfg") or {}).get("input_size", ())[1:]
    for pattern, says in _TIMM_SAYS:
        told |= says if re.search(pattern, name) else {}
    told |= own
    told["reg_tokens"] = told.get("num_reg_tokens", told["reg_tokens"])
    has = {key for key in ("class_token", "distilled", "pre_norm", "reg_tokens", *_SCALED) if told[key]}
    fitting = (row for row in _TIMM_FAMILIES if re.search(row[0], name) and row[3] <= has <= row[3] | row[4])
    row = next(fitting, None)
    if row is None or told["act_layer"] not in _ACTIVATIONS:
        raise ValueError(f"transformers has no {told['act_layer']} transformer with {', '.join(sorted(has))}.")
    _, family, names, *_ = row
    gated, bias, hidden = told["gated"], told["qkv_bias"], int(told["embed_dim"] * told["mlp_ratio"])
    fields = {"layer_norm_eps": told["eps"], "hidden_act": _ACTIVATIONS[told["act_layer"]]}
    fields |= {"num_register_tokens": told["reg_tokens"]} if told["reg_tokens"] else {}
    table = dict(zip(names, _EVA if names is _DINOV3 else _TIMM, strict=False)) | {"embeddings.mask_token": "=0"}
    table |= {} if told["init_values"] else {key: "=1" for key in names if "layer_scale" in key}
    before = told["class_token"] + told["distilled"] if told["no_embed_class"] else 0
    growth: dict[str, tuple[tuple[int, ...], int]] = {"pos_embed": ((0, 0, before, 0), 1)}
    if names is _DINOV2:  # it has whole ratios only: units that are always 0 fill the MLP
        parts, ratio, extra = 2 if gated else 1, 0, -1
        while extra < 0:
            ratio, wide = ratio + 1, told["embed_dim"] * (ratio + 1)
            extra = ((int(wide * 2 / 3) + 7) // 8 * 8 if gated else wide) - hidden // parts
        fields |= {"mlp_ratio": ratio, "use_swiglu_ffn": bool(gated)}
        growth |= {"blocks.#.mlp.fc1.weight": ((0, 0, 0, extra), parts), "blocks.#.mlp.fc1.bias": ((0, extra), parts)}
        growth["blocks.#.mlp.fc2.weight"] = (0, extra), 1
    else:
        fields["intermediate_size"] = hidden + -hidden % (gated or 1)
    if names is _DINOV3:
        fields |= {"query_bias": bias, "value_bias": bias, "use_gated_mlp": bool(gated)}
        if gated:
            fields["hidden_act"] = "silu"
            table |= {"layer.#.mlp.gate_proj": "blocks.#.mlp.fc1_g", "layer.#.mlp.up_proj": "blocks.#.mlp.fc1_x"}
    fields |= {"qkv_bias": bias} if names in (_VIT, _DINOV2) else {}
    fields |= {"vision_use_head": False} if family == "siglip_vision_model" else {}
    return _config(family, told, fields), table, growth


def _read_open_clip(model: dict[str, Any]) -> _Tower:
    told = _OPEN_CLIP_SAYS | (model.get("vision_cfg") or {})
    norm = {"eps": 1e-5} | (told["norm_kwargs"] or {})
    other = [key for key in told if key not in _OPEN_CLIP_SAYS and told[key]] + [key for key in norm if key != "eps"]
    if other or isinstance(told["layers"], list):
        other_tower = told.get("timm_model_name") or ", ".join(other) or "the layers of a ResNet"
        raise ValueError(f"only open_clip's own ViT is read, but its image tower has {other_tower}.")
    told |= {"embed_dim": told["width"], "depth": told["layers"], "img_size": told["image_size"]}
    told["num_heads"] = told["width"] / told["head_width"]
    fields = {"layer_norm_eps": norm["eps"], "intermediate_size": int(told["width"] * told["mlp_ratio"])}
    fields["hidden_act"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    return _config("clip_vision_model", told, fields), dict(zip(_CLIP, _OPEN_CLIP, strict=True)), {}


def _config(family: str, told: dict[str, Any], fields: dict[str, Any]) -> PreTrainedConfig:
    width, heads = told["embed_dim"], told["num_heads"]
    sizes = (told["img_size"], told["patch_size"])
    image, patch = ([size, size] if isinstance(size, int) else list(size) for size in sizes)
    if len(image) != 2 or len(set(patch)) != 1 or (image[0] != image[1] and family not in ("vit", "deit")):
        raise ValueError(f"its images of {image} or patches of {patch} pixels are not the squares {family} has.")
    if heads != int(heads) or width % heads:
        raise ValueError(f"its width {width} cannot be divided among {heads:g} heads.")
    fields |= {"hidden_size": width, "num_hidden_layers": told["depth"], "num_attention_heads": int(heads)}
    image_size = image if image[0] != image[1] else image[0]
    return AutoConfig.for_model(family, **fields, image_size=image_size, patch_size=patch[0])


def _grow(tensor: torch.Tensor, ends: tuple[int, ...], parts: int) -> torch.Tensor:
    return torch.cat([pad(part, ends) for part in tensor.chunk(parts)])


def translate_weights(weights: Weights, config: PreTrainedConfig, table: dict, growth: dict, unused: str) -> Weights:
    """The weights in float32, by the names of transformers' published checkpoints; refuses those that do not fit."""
    with torch.device("meta"):
        blank = build_backbone(config)
    translated, used, misfits = {}, set(), {}
    for target, like in revert_weight_conversion(blank, blank.state_dict()).items():
        pattern = re.sub(r"\.\d+\.", ".#.", target)
        stem = pattern if pattern in table else pattern.rpartition(".")[0]
        end = pattern[len(stem) :]
        source, _, part = table[stem].partition("/")
        if source.startswith("="):
            translated[target] = torch.full(like.shape, float(source[1:]))
            continue
        source += end[1:] if source.endswith("_") else end
        ends, parts = growth.get(source, ((), 1))
        source = source.replace("#", "".join(re.findall(r"\.(\d+)\.", target)))
        used.add(source)
        expected = list(_grow(like, tuple(-length for length in ends), parts).shape)
        expected[0] *= 3 if part else 1
        tensor = weights.get(source)
        if tensor is None:
            misfits[source] = "is missing"
        elif [side for side in tensor.shape if side > 1] != [side for side in expected if side > 1]:
            misfits[source] = f"has the shape {list(tensor.shape)} instead of {expected}"
        else:
            tensor = tensor.reshape(expected).to(torch.float32).chunk(3 if part else 1)[int(part or 0)]
            translated[target] = _grow(tensor, ends, parts).reshape(like.shape)
    misfits |= {name: "is left over" for name in weights if name not in used and not re.match(unused, name)}
    if misfits:
        first = [f"{name} {fault}" for name, fault in misfits.items()][:10] + ["..."] * (len(misfits) > 10)
        raise ValueError(f"{len(misfits)} of its weights do not fit: {', '.join(first)}.")
    return translated


__all__ = ["TIMM_NAMES", "foreign_config", "read_backbone", "translate_weights"]
