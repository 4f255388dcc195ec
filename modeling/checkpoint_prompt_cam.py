# SPDX-License-Identifier: MIT
"""How does a Prompt-CAM find its backbone, and how is it saved without one?"""

import os
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from .backbone_prompt_cam import backbone_class, fingerprint_backbone, vision_config
from .configuration_prompt_cam import SUPPORTED_BACKBONES, PromptCAMConfig, check_backbone_family
from .formats_prompt_cam import read_backbone
from .hub_prompt_cam import explained_load_errors
from .pipeline_prompt_cam import PromptCAMImageClassificationPipeline

# For `pipeline("image-classification", model=FOLDER, trust_remote_code=True)`. Importing the class here is also what
# makes transformers copy its file along with the model's.
PIPELINES = {
    "image-classification": {
        "impl": f"pipeline_prompt_cam.{PromptCAMImageClassificationPipeline.__name__}",
        "pt": ["AutoModelForImageClassification"],
    }
}


def load_backbone(backbone: str | os.PathLike | PreTrainedModel, **hub: Any) -> PreTrainedModel:
    """The bare vision model behind a Hub id, a folder or a loaded model.

    Args:
        backbone: Where it is: in transformers' format, timm's or open_clip's. A model with a head or a second tower is
            taken for its vision part.
        **hub: revision, token and the like.

    Raises:
        ValueError: the family is not supported, or its weights do not fit.
        OSError: nothing is found there.
    """
    if isinstance(backbone, PreTrainedModel):
        # DINOv3's own base model is only its inner encoder.
        is_bare = backbone.config.model_type in SUPPORTED_BACKBONES and (
            type(backbone).__name__ == backbone_class(backbone.config)[0].__name__
        )
        model = backbone if is_bare else getattr(backbone, "vision_model", backbone.base_model)
        check_backbone_family(model.config.model_type)
        return model
    backbone = backbone_name(backbone)
    with explained_load_errors(backbone, hub.get("revision")):
        foreign = read_backbone(backbone, **hub)
        if foreign is not None:
            return foreign
        config = vision_config(_load_config(backbone, **hub))
        model_class, options = backbone_class(config)
        loaded: Any = model_class.from_pretrained(backbone, config=config, output_loading_info=True, **options, **hub)
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(
            f"{backbone} lacks weights of {model_class.__name__}: {', '.join(sorted(report['missing_keys']))}."
        )
    return model


def _load_config(backbone: str | os.PathLike, **hub: Any) -> PreTrainedConfig:
    """The backbone's configuration. Permission to run a checkpoint's code is none to run its backbone's."""
    try:
        return AutoConfig.from_pretrained(backbone, trust_remote_code=False, **hub)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{backbone} needs code of its own, which is never run for a backbone; Prompt-CAM supports "
            f"{', '.join(sorted(SUPPORTED_BACKBONES))}."
        ) from error


def backbone_name(backbone: str | os.PathLike | PreTrainedModel) -> str | None:
    """The Hub id (without open_clip's prefix) or folder of a backbone, None where it was made in memory."""
    if isinstance(backbone, PreTrainedModel):
        return backbone.name_or_path or None
    return os.fspath(backbone).removeprefix("hf-hub:")


def adopt_backbone(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Copy a backbone's weights into the model, and note their fingerprint.

    Raises:
        ValueError: the source lacks weights that the backbone needs.
    """
    missing = model.backbone.load_state_dict(source.state_dict(), strict=False).missing_keys
    if missing:
        raise ValueError(
            f"{type(source).__name__} lacks {len(missing)} weights of the backbone, such as {missing[0]}."
        )
    # The model's own copy may be rounded already, and float16 rounds differently.
    model.config.backbone_fingerprint = fingerprint_backbone(source)


def check_same_prompts(config: PromptCAMConfig, saved: PromptCAMConfig, path: str | os.PathLike) -> None:
    """Refuse a configuration that asks for other prompts than a checkpoint was trained with.

    Raises:
        ValueError: the number of classes, the place of the prompts, or the names of several prompt sets differ.
    """
    asked_sets, saved_sets = config.prompt_sets or [{}], saved.prompt_sets or [{}]
    # The weights of a set are found by its place in the list, those of the one in use apart; one alone has any name.
    if max(len(asked_sets), len(saved_sets)) > 1:
        asked_names, saved_names = _tell_sets(asked_sets), _tell_sets(saved_sets)
        if asked_names != saved_names:
            raise ValueError(
                f"{path} has {saved_names} and cannot be loaded with {asked_names}; load it as it is, "
                "and change its sets with set_prompts, add_prompts and load_prompts."
            )
        for asked_set, saved_set in zip(asked_sets, saved_sets, strict=True):
            name, fields = _split_set(asked_set)
            if fields:
                one, other = config.of_new_prompts(name, fields), saved.of_new_prompts(name, _split_set(saved_set)[1])
                check_same_prompts(one, other, f"The prompt set {name!r} of {path}")
    for field in ("num_labels", "class_layer", "first_prompt_layer", "agnostic_prompts_per_layer"):
        asked, trained = getattr(config, field), getattr(saved, field)
        if asked != trained:
            raise ValueError(
                f"{path} was trained with {field}={trained} and cannot be loaded with {field}={asked}: prompts cannot "
                "be resized or moved. Classes can be renamed; other classes need new prompts, see from_backbone."
            )


def _split_set(prompt_set: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a prompt set and its settings; the one in use has them in the configuration itself."""
    return prompt_set.get("name", ""), {field: value for field, value in prompt_set.items() if field != "name"}


def _tell_sets(sets: list[dict[str, Any]]) -> str:
    told = [f"{name!r}" + ("" if fields else " (in use)") for name, fields in map(_split_set, sets)]
    return f"the prompt sets {', '.join(told)}" if len(sets) > 1 else "a single prompt set"


def prompts_state_dict(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """All weights but the backbone's, after making sure that the backbone can be found again.

    Raises:
        ValueError: the backbone is not frozen, has no name, or has other weights than were loaded under that name.
    """
    config = model.config
    keep = "save with include_backbone=True"
    if not config.freeze_backbone:
        raise ValueError(
            f"The backbone was trained too (freeze_backbone=False), so leaving it out would lose it; {keep}."
        )
    if not config.backbone_name_or_path or not config.backbone_fingerprint:
        raise ValueError(
            f"The backbone has no name to fetch it by; {keep}, or set config.backbone_name_or_path and "
            "config.backbone_fingerprint to a Hub repository or folder and its fingerprint."
        )
    # float16 rounds differently, so its digest says nothing.
    if model.dtype != torch.float16 and fingerprint_backbone(model.backbone) != config.backbone_fingerprint:
        raise ValueError(
            f"The backbone's weights are no longer those of {config.backbone_name_or_path}, so leaving them out would "
            f"lose them; {keep}."
        )
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("backbone.")}


def complete_state_dict(
    path: str | os.PathLike,
    config: PromptCAMConfig,
    backbone: str | os.PathLike | PreTrainedModel | None,
    variant: str | None = None,
    **hub: Any,
) -> dict[str, torch.Tensor]:
    """The weights of a prompts-only checkpoint, together with those of the backbone that it names.

    Args:
        path: The checkpoint's Hub id or folder.
        config: Its configuration.
        backbone: Where the backbone is, if not where the configuration says.
        variant: As in transformers' from_pretrained.
        **hub: Of the checkpoint: revision, token and the like.

    Raises:
        OSError: the weights or the backbone cannot be found.
        ValueError: the backbone has other weights than the prompts were trained with.
    """
    with explained_load_errors(path, hub.get("revision")):
        weights = cached_file(path, f"model.{variant}.safetensors" if variant else "model.safetensors", **hub)
    if backbone is None:
        backbone = config.backbone_name_or_path
        common = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        hub = {**common, "revision": config.backbone_revision} if config.backbone_revision else common
    else:
        hub = {}
    try:
        source = load_backbone(backbone, **hub)
    except OSError as error:
        raise OSError(
            f"{path} holds prompts only, and its backbone {backbone!r} could not be loaded; give the place of a copy "
            f"as from_pretrained(..., backbone=...). The reason was: {error}"
        ) from error
    fingerprint = fingerprint_backbone(source)
    if fingerprint != config.backbone_fingerprint:
        raise ValueError(
            f"{path} holds prompts for a backbone with fingerprint {config.backbone_fingerprint[:12]}, but "
            f"{backbone_name(backbone)} has {fingerprint[:12]}: it is another model or revision. Give the right one "
            "as from_pretrained(..., backbone=...)."
        )
    return {f"backbone.{key}": value for key, value in source.state_dict().items()} | load_file(weights)


__all__ = [
    "PIPELINES",
    "adopt_backbone",
    "backbone_name",
    "check_same_prompts",
    "complete_state_dict",
    "load_backbone",
    "prompts_state_dict",
]
