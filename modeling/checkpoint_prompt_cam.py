# SPDX-License-Identifier: MIT
"""Finding a backbone, saving a Prompt-CAM without one, and one sentence for what goes wrong on the Hub."""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from .backbone_prompt_cam import backbone_class, fingerprint_backbone, vision_config
from .configuration_prompt_cam import SUPPORTED_BACKBONES, PromptCAMConfig, check_backbone_family
from .formats_prompt_cam import read_backbone
from .pipeline_prompt_cam import PromptCAMImageClassificationPipeline

# For `pipeline("image-classification", model=FOLDER, trust_remote_code=True)`. Importing the class here is also what
# makes transformers copy its file along with the model's.
PIPELINES = {
    "image-classification": {
        "impl": f"pipeline_prompt_cam.{PromptCAMImageClassificationPipeline.__name__}",
        "pt": ["AutoModelForImageClassification"],
    }
}


NOT_ACCEPTED = "The Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN."
_NOTHING_KEPT = "Nothing incomplete is kept: try again"
_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

_PROMPT_WEIGHT = re.compile(r"(other_prompts\.\d+\.)?(class_prompts|agnostic_prompts|classifier\.(weight|bias))")

_Error = TypeVar("_Error", bound=BaseException)


def split_hub_keywords(keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keywords that say where on the Hub something is and how to fetch it, and all others."""
    hub = {key: value for key, value in keywords.items() if key in _HUB_KEYWORDS}
    return hub, {key: value for key, value in keywords.items() if key not in hub}


def load_backbone(backbone: str | os.PathLike | PreTrainedModel, **hub: Any) -> PreTrainedModel:
    """The bare vision model behind a Hub id, a folder or a loaded model.

    Args:
        backbone: Where it is: in transformers' format, timm's or open_clip's. A model with a head or a second tower is
            taken for its vision part.
        **hub: The Hub keywords of `from_pretrained`: revision, subfolder, cache_dir, local_files_only and the like.

    Raises:
        ValueError: the family is not supported, or its weights do not fit.
        OSError: nothing is found there.
    """
    if isinstance(backbone, PreTrainedModel):
        # DINOv3's own base model is only its inner encoder.
        is_bare = backbone.config.model_type in SUPPORTED_BACKBONES and (
            type(backbone).__name__ == backbone_class(backbone.config)[0].__name__
        )
        model = backbone if is_bare else cast(PreTrainedModel, getattr(backbone, "vision_model", backbone.base_model))
        check_backbone_family(model.config.model_type)
        return model
    backbone = str(backbone_name(backbone))
    with explained_load_errors(backbone, hub.get("revision")):
        foreign = read_backbone(backbone, **hub)
        if foreign is not None:
            return foreign
        config = vision_config(_load_config(backbone, **hub))
        model_class, options = backbone_class(config)
        options = {**options, **hub, "output_loading_info": True}
        loaded: Any = model_class.from_pretrained(backbone, config=config, **options)
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
    own = cast(PreTrainedModel, model.backbone)
    missing = own.load_state_dict(source.state_dict(), strict=False).missing_keys
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
    asked_sets, saved_sets = config.all_sets(), saved.all_sets()
    several = max(len(asked_sets), len(saved_sets)) > 1
    # The weights of a set are found by its place; one alone may have any name.
    if several and _tell_sets(config) != _tell_sets(saved):
        raise ValueError(
            f"{path} has {_tell_sets(saved)} and cannot be loaded with {_tell_sets(config)}; load it as it is, and "
            "change its sets with set_prompts, add_prompts and load_prompts."
        )
    for asked_name, saved_name in zip(asked_sets, saved_sets, strict=True):
        asked, trained = config.alone(asked_name), saved.alone(saved_name)
        for field in ("num_labels", "class_layer", "first_prompt_layer", "agnostic_prompts_per_layer"):
            if getattr(asked, field) != getattr(trained, field):
                owner = f"The prompt set {asked_name!r} of {path}" if several else path
                raise ValueError(
                    f"{owner} was trained with {field}={getattr(trained, field)} and cannot be loaded with "
                    f"{field}={getattr(asked, field)}: prompts cannot be resized or moved. Classes can be renamed; "
                    "other classes need new prompts, see from_backbone."
                )


def _tell_sets(config: PromptCAMConfig) -> str:
    told = [f"{name!r}" + (" (in use)" if name == config.prompts_in_use else "") for name in config.all_sets()]
    return f"the prompt sets {', '.join(told)}" if len(told) > 1 else "a single prompt set"


def prompts_state_dict(model: PreTrainedModel, state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """All weights but the backbone's, after making sure that the backbone can be found again.

    Raises:
        ValueError: the backbone is not frozen, is quantised, has no name, or has other weights than were loaded under
            that name.
    """
    config, backbone = model.config, cast(PreTrainedModel, model.backbone)
    keep = "save with include_backbone=True"
    if getattr(model, "hf_quantizer", None):
        raise ValueError(f"The backbone is quantised, so it is not the one that its name stands for; {keep}.")
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
    if model.dtype != torch.float16 and fingerprint_backbone(backbone) != config.backbone_fingerprint:
        raise ValueError(
            f"The backbone's weights are no longer those of {config.backbone_name_or_path}, so leaving them out would "
            f"lose them; {keep}."
        )
    state_dict = model.state_dict() if state_dict is None else state_dict
    return {name: tensor for name, tensor in state_dict.items() if not name.startswith("backbone.")}


@contextmanager
def names_that_torchao_reads(quantizer: Any) -> Iterator[None]:
    """Save a quantised model so that it loads: torchao splits each name that it lists at a dot, and prompts have none.

    Args:
        quantizer: The model's, of any kind; None where there is none.
    """
    list_weights = quantizer and quantizer.get_state_dict_and_metadata

    def list_readable(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        weights, metadata = list_weights(model)
        if "tensor_names" in metadata:
            names = [name for name in json.loads(metadata["tensor_names"]) if "." in name]
            metadata["tensor_names"] = json.dumps(names)
        return weights, metadata

    if quantizer:
        quantizer.get_state_dict_and_metadata = list_readable
    try:
        yield
    finally:
        if quantizer:
            del quantizer.get_state_dict_and_metadata


def find_weights(path: str | os.PathLike, variant: str | None = None, **hub: Any) -> list[str]:
    """The safetensors files of a checkpoint, one or its shards; none where it has no such files.

    Args:
        path: The checkpoint's Hub id or folder.
        variant: As in transformers' from_pretrained.
        **hub: Revision, token and the like.
    """
    suffix, optional = f".{variant}" if variant else "", {"_raise_exceptions_for_missing_entries": False, **hub}
    whole = cached_file(path, f"model{suffix}.safetensors", **optional)
    if whole is not None:
        return [whole]
    index = cached_file(path, f"model.safetensors.index{suffix}.json", **optional)
    return [] if index is None else get_checkpoint_shard_files(path, index, **hub)[0]


def read_shapes(path: str | os.PathLike, files: list[str]) -> dict[str, tuple[int, ...]]:
    """The shape of each weight in these files by its name, without reading the weights.

    Args:
        path: The checkpoint's Hub id or folder, for messages.
        files: From `find_weights`.

    Raises:
        ValueError: weights are whole numbers or truth values, and so not those of a model.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                header = weights.get_slice(name)
                if not header.get_dtype().startswith(("F", "BF")):
                    raise ValueError(f"The weight {name} of {path} is stored as {header.get_dtype()}, not as floats.")
                shapes[name] = tuple(header.get_shape())
    return shapes


def read_prompts(path: str | os.PathLike, files: list[str]) -> dict[str, torch.Tensor]:
    """The weights of a prompts-only checkpoint by their names.

    Args:
        path: The checkpoint's Hub id or folder, for messages.
        files: From `find_weights`.

    Raises:
        OSError: there are no files.
        ValueError: there are other weights than those of prompts and classifiers.
    """
    if not files:
        raise OSError(f"{path} has no model.safetensors.")
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    if strange := [name for name in sorted(weights) if not _PROMPT_WEIGHT.fullmatch(name)]:
        raise ValueError(f"{path} is to hold prompts only, and holds the weight {strange[0]!r} too.")
    return weights


def check_shapes(
    model_class: type[PreTrainedModel],
    config: PromptCAMConfig,
    shapes: Mapping[str, tuple[int, ...]],
    path: str | os.PathLike,
    ignore_mismatched: bool = False,
) -> None:
    """Refuse weights that are not the model's that the configuration describes, before any memory is taken for it.

    Weights of other formats are left to transformers.

    Args:
        model_class: What is loaded.
        config: Its configuration.
        shapes: Of the weights, by their names.
        path: The checkpoint's Hub id or folder, for messages.
        ignore_mismatched: Weights of another shape are to be passed over.

    Raises:
        ValueError: a weight has another shape, or the model is far larger than the weights.
    """
    if not shapes:
        return
    if config.vision.num_hidden_layers > len(shapes):
        raise ValueError(f"{path} has {len(shapes)} weights, too few for {config.vision.num_hidden_layers} layers.")
    with torch.device("meta"), no_init_weights():
        blank = model_class(config)
        own = blank.state_dict()
        published = revert_weight_conversion(blank, dict(own))
    needed, given = sum(weight.numel() for weight in own.values()), sum(map(math.prod, shapes.values()))
    if needed > 2 * given:
        raise ValueError(f"{path} has {given:,} numbers, but its configuration is that of a model of {needed:,}.")
    expected = {name: tuple(weight.shape) for name, weight in {**published, **own}.items()}
    for name in () if ignore_mismatched else sorted(expected.keys() & shapes.keys()):
        if tuple(shapes[name]) != expected[name]:
            raise ValueError(
                f"The weight {name} of {path} has the shape {tuple(shapes[name])}, but its configuration asks for "
                f"{expected[name]}."
            )


def complete_state_dict(
    path: str | os.PathLike,
    files: list[str],
    config: PromptCAMConfig,
    backbone: str | os.PathLike | PreTrainedModel | None,
    **hub: Any,
) -> dict[str, torch.Tensor]:
    """The weights of a prompts-only checkpoint, together with those of the backbone that it names.

    Args:
        path: The checkpoint's Hub id or folder.
        files: Its weights, from `find_weights`.
        config: Its configuration.
        backbone: Where the backbone is, if not where the configuration says.
        **hub: Of the checkpoint: revision, token and the like.

    Raises:
        OSError: the weights or the backbone cannot be found.
        ValueError: there are other weights than prompts, or the backbone has other weights than the prompts were
            trained with.
    """
    weights = read_prompts(path, files)
    if backbone is None:
        backbone = config.backbone_name_or_path or ""
        hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        place = {"revision": config.backbone_revision, "subfolder": config.backbone_subfolder}
        hub |= {key: value for key, value in place.items() if value}
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
            f"{path} holds prompts for a backbone with fingerprint {str(config.backbone_fingerprint)[:12]}, but "
            f"{backbone_name(backbone)} has {fingerprint[:12]}: it is another model or revision. Give the right one "
            "as from_pretrained(..., backbone=...)."
        )
    return {f"backbone.{key}": value for key, value in source.state_dict().items()} | weights


@contextmanager
def explained_load_errors(name: str | os.PathLike, revision: str | None = None) -> Iterator[None]:
    """Turn what transformers and its Hub client raise while they load a model into one sentence.

    Args:
        name: The Hub id; errors of folders are left as they are.
        revision: The revision asked for.

    Raises:
        FileNotFoundError: there is no such repository or revision, or one may not see it.
        PermissionError: the Hub does not know who asks, or does not let them read there.
        ConnectionError: the Hub cannot be reached or failed, or a download broke off.
    """
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        explanation = _explain(error, name, revision) if isinstance(name, str) and not os.path.isdir(name) else None
        if explanation is None:
            raise
        raise explanation from error


def _explain(error: BaseException, name: str, revision: str | None) -> Exception | None:
    if find_cause(error, RevisionNotFoundError):
        return FileNotFoundError(f"The repository {name} has no revision {revision}.")
    if find_cause(error, RepositoryNotFoundError) and not find_cause(error, GatedRepoError):
        return FileNotFoundError(
            f"There is neither a folder {name} nor a repository of that name on the Hub; if it is a private one, log "
            "in with `hf auth login`, or set HF_TOKEN."
        )
    if find_cause(error, RemoteEntryNotFoundError):
        return None
    answer = find_cause(error, HfHubHTTPError)
    if answer is not None:
        status = answer.response.status_code
        if status == 401:
            return PermissionError(NOT_ACCEPTED)
        if status in (403, 451):
            return PermissionError(f"The token may not read {name}; ask for access at {constants.ENDPOINT}/{name}.")
        return ConnectionError(f"The Hub failed while {name} was loaded (status {status}). {_NOTHING_KEPT}.")
    broken = find_cause(error, HTTPError) or find_cause(error, LocalEntryNotFoundError)
    if constants.is_offline_mode() and (broken or find_cause(error, OfflineModeIsEnabled)):
        return FileNotFoundError(f"Offline mode is on, and {name} is not in the cache; unset HF_HUB_OFFLINE.")
    if broken is None:
        return None
    if find_cause(error, OfflineModeIsEnabled):
        return ConnectionError(
            f"The Hub at {constants.ENDPOINT} cannot be reached ({tell_reason(broken)}), and {name} is neither a "
            "folder here nor in the cache; check the network and try again."
        )
    return ConnectionError(
        f"The Hub at {constants.ENDPOINT} cannot be reached, or the download of {name} broke off "
        f"({tell_reason(broken)}). {_NOTHING_KEPT}."
    )


def find_cause(error: BaseException | None, kind: type[_Error]) -> _Error | None:
    """The first error of a kind among those that led to this one."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error


def tell_reason(error: BaseException) -> str:
    """What an error says, on one line, without addresses, which may hold signatures."""
    return " ".join(re.sub(r"https?://\S*", "", str(error)).split()) or type(error).__name__


__all__ = [
    "NOT_ACCEPTED",
    "PIPELINES",
    "adopt_backbone",
    "backbone_name",
    "check_same_prompts",
    "check_shapes",
    "complete_state_dict",
    "explained_load_errors",
    "find_cause",
    "find_weights",
    "load_backbone",
    "names_that_torchao_reads",
    "prompts_state_dict",
    "read_prompts",
    "read_shapes",
    "split_hub_keywords",
    "tell_reason",
]
