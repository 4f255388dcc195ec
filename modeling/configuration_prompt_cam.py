# SPDX-License-Identifier: MIT
"""Which settings does a Prompt-CAM have, and which of them make sense together?

The variants (Deep, Shallow, interpolation) are those of Prompt-CAM (Chowdhury et al., CVPR 2025, arXiv 2501.09333).
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger(__name__)


class BackboneFamily(NamedTuple):
    """What the other files have to know about a family of backbones.

    Attributes:
        model: The transformers class of the bare vision model.
        prefix_tokens: Tokens before the patches (CLS, DeiT's distillation token); registers come on top.
        classifier: The transformers class that classifies images, where there is one.
        has_pooler: Its class takes `add_pooling_layer`.
        takes_any_size: It adapts its position encoding to images of any size by itself.
    """

    model: str
    prefix_tokens: int = 1
    classifier: str | None = None
    has_pooler: bool = False
    takes_any_size: bool = False


SUPPORTED_BACKBONES = {
    "vit": BackboneFamily("ViTModel", 1, "ViTForImageClassification", has_pooler=True),
    # MAE's own model hides patches from its encoder, which is ViT's.
    "vit_mae": BackboneFamily("ViTModel", 1, "ViTForImageClassification", has_pooler=True),
    "vit_msn": BackboneFamily("ViTMSNModel", 1, "ViTMSNForImageClassification"),
    "ijepa": BackboneFamily("IJepaModel", 0, "IJepaForImageClassification"),
    "deit": BackboneFamily("DeiTModel", 2, "DeiTForImageClassification", has_pooler=True),
    "dinov2": BackboneFamily("Dinov2Model", 1, "Dinov2ForImageClassification", takes_any_size=True),
    "dinov2_with_registers": BackboneFamily(
        "Dinov2WithRegistersModel", 1, "Dinov2WithRegistersForImageClassification", takes_any_size=True
    ),
    "dinov3_vit": BackboneFamily("DINOv3ViTModel", 1, takes_any_size=True),
    "clip_vision_model": BackboneFamily("CLIPVisionModel", 1, "CLIPForImageClassification"),
    "siglip_vision_model": BackboneFamily("SiglipVisionModel", 0, "SiglipForImageClassification"),
}

# What each prompt set has for itself, where several share a backbone.
PROMPT_FIELDS = (
    "id2label",
    "class_prompt_layer",
    "num_agnostic_prompts",
    "first_prompt_layer",
    "prompt_dropout",
    "drop_path_rate",
)

# The name of the only set of a model, until it is given another one.
DEFAULT_NAME = "default"

SEVERAL_SETS_NEED_A_FROZEN_BACKBONE = (
    "Several prompt sets share a backbone, so it must stay as it is: freeze_backbone=False allows one set."
)

# Keywords that transformers itself hands to every config, or sets on it (Trainer: use_cache), without declaring them.
_TRANSFORMERS_KEYWORDS = {
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
    "use_cache",
}
# Far above what anyone trains, and low enough to be built at once: a damaged file asks for any number.
_MOST_CLASSES = 1_000_000
_MOST_LAYERS = 1_000


@contextmanager
def only_value_errors(what: object) -> Iterator[None]:
    """Turn whatever damaged files make transformers raise into one sentence.

    Args:
        what: What is loaded.

    Raises:
        ValueError: an error other than ValueError and OSError, which pass, was raised.
    """
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{what} cannot be loaded: {reason[:500]} ({type(error).__name__}).") from error


def check_prompt_names(names: Iterable[str], sets: Iterable[str], owner: object = "This model") -> None:
    """Refuse names of prompt sets that are not among those of the owner.

    Raises:
        ValueError: there is no such set.
    """
    for name in names:
        if name not in sets:
            raise ValueError(f"{owner} has no prompt set {name!r}; it has {', '.join(map(repr, sets))}.")


def check_backbone_family(model_type: str) -> None:
    """Refuse a backbone family that Prompt-CAM does not know.

    Raises:
        ValueError: the family is not in `SUPPORTED_BACKBONES`.
    """
    if model_type not in SUPPORTED_BACKBONES:
        raise ValueError(
            f"Prompt-CAM does not support backbones of type {model_type!r}; supported are: "
            f"{', '.join(sorted(SUPPORTED_BACKBONES))}."
        )


@strict
class PromptCAMConfig(PreTrainedConfig):
    """Configuration of a Prompt-CAM: a frozen vision transformer and the prompts injected into it.

    Layers are counted from 0 at the front, here and everywhere. With N layers, class prompts enter layer
    `class_prompt_layer` and travel on to the last layer, whose output at their positions is scored; class-agnostic
    prompts, fresh in every layer and dropped after it, enter the layers from `first_prompt_layer` up to (and without)
    `class_prompt_layer`.

    Args:
        backbone_config: The vision model's own configuration, of a family in `SUPPORTED_BACKBONES`.
        id2label: Class names, numbered from 0 without a gap. This, or `num_labels`, has to be given.
        backbone_name_or_path: Hub id or folder that the backbone was loaded from.
        backbone_revision: Branch, tag or commit of that repository.
        backbone_subfolder: Where it lies in that repository or folder.
        backbone_fingerprint: Digest of the backbone's weights, see `fingerprint_backbone`.
        backbone_in_checkpoint: Whether a saved folder holds the backbone's weights. Set by `save_pretrained`.
        class_prompt_layer: Where class prompts enter: -1 is the last layer (the paper's Deep), 0 the first (Shallow).
        num_agnostic_prompts: Class-agnostic prompts a layer. `None`: as many as classes, as in the paper.
        first_prompt_layer: First layer that agnostic prompts enter (the official `vpt_layer`, counted from the front).
        prompt_dropout: Probability of dropping a prompt's element in training, one mask for the whole batch.
        drop_path_rate: Stochastic depth of the last layer; the first has none and it grows linearly between.
        freeze_backbone: Train prompts and classifier only.
        problem_type: "single_label_classification" (the default), or "multi_label_classification" where an image may
            show several classes, or none.
        prompt_sets: Several prompt sets on one backbone: the `name` of each with its settings, in the order in which
            their weights are saved. `None`: there is one set.
        prompts_in_use: The name of the prompt set in use, whose settings are also this configuration's own.

    Raises:
        ValueError: a field is out of range, unknown, or contradicts another one.
    """

    model_type = "prompt_cam"
    _auto_class = "AutoConfig"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads it off the class
    has_no_defaults_at_init = True

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_subfolder: str | None = None
    backbone_fingerprint: str | None = None
    backbone_in_checkpoint: bool = True
    class_prompt_layer: int = -1
    num_agnostic_prompts: int | None = None
    first_prompt_layer: int = 0
    prompt_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    freeze_backbone: bool = True
    prompt_sets: list[dict] | None = None
    prompts_in_use: str = DEFAULT_NAME

    # Read by Trainer: what evaluation should not gather over the data set.
    keys_to_ignore_at_inference = ["trait_maps", "trait_classes", "hidden_states", "attentions"]  # noqa: RUF012

    def __post_init__(self, **kwargs: Any) -> None:
        unknown = sorted(set(kwargs) - _TRANSFORMERS_KEYWORDS)
        if unknown:
            raise ValueError(
                f"PromptCAMConfig has no field {', '.join(map(repr, unknown))}; its fields are: {', '.join(_FIELDS)}."
            )
        num_labels = kwargs.get("num_labels")
        if self.id2label is None and self.label2id is not None:
            self.id2label = {int(index): name for name, index in self.label2id.items()}
        if self.id2label is None and num_labels is None:
            raise ValueError(
                "PromptCAMConfig needs the class names, one prompt each: give id2label={0: 'first class', ...}."
            )
        if self.id2label is not None and num_labels not in (None, len(self.id2label)):
            raise ValueError(
                f"num_labels={num_labels} contradicts id2label, which names {len(self.id2label)} classes."
            )
        if num_labels is not None and num_labels > _MOST_CLASSES:
            raise ValueError(f"num_labels={num_labels} is more than {_MOST_CLASSES:,}.")
        # With the installed package, `pipeline` is to work without permission to run code from the checkpoint.
        if not __name__.startswith("transformers_modules"):
            kwargs.pop("custom_pipelines", None)
        self.backbone_config = _own_backbone_config(self.backbone_config)
        super().__post_init__(**kwargs)
        self.problem_type = self.problem_type or "single_label_classification"
        if self.problem_type == "regression":
            raise ValueError(
                "Prompt-CAM tells classes apart: problem_type is single_label_classification or "
                "multi_label_classification, not regression."
            )
        self._check_labels()
        self._check_prompts()
        self._check_prompt_sets()

    @classmethod
    @only_value_errors("The configuration")
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "PromptCAMConfig":
        """Load a saved configuration, as transformers' own method does.

        Raises:
            ValueError: see `from_dict`.
            OSError: it cannot be found, or is not JSON.
        """
        return super().from_pretrained(*args, **kwargs)

    @classmethod
    @only_value_errors("The configuration")
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "PromptCAMConfig":
        """Build a configuration from saved fields; keywords override them and are checked just the same.

        Saved fields that are not a configuration's own, as tools add them, are kept with a warning.

        Raises:
            ValueError: a field is wrong, or asks for code from the Hub.
        """
        _check_no_hub_kernels(config_dict)
        own = {field.name for field in dataclasses.fields(cls)}
        # Permission to run code is refused as no field of ours, not kept.
        known = own | _TRANSFORMERS_KEYWORDS | {"trust_remote_code"}
        fields = {key: value for key, value in config_dict.items() if key in known}
        overrides = {key: kwargs.pop(key) for key in (own | {"num_labels"}) - {"dtype"} if key in kwargs}
        # Either way of naming the classes decides over the other one, and over what was saved.
        if overrides.keys() & {"id2label", "label2id"}:
            fields |= {"id2label": None, "label2id": None}
        elif fields.get("id2label") is not None:
            fields["label2id"] = None
        loaded = super().from_dict(fields | overrides, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if unknown := sorted(config_dict.keys() - fields.keys()):
            logger.warning_once(
                f"The saved configuration has fields that PromptCAMConfig does not know: {', '.join(unknown)}."
            )
        for key in unknown:
            if not (key.startswith("_") or hasattr(config, key)):
                setattr(config, key, config_dict[key])
        return loaded

    @property
    def output_attentions(self) -> bool:
        """Whether `forward` returns attention; the weights are computed beside any fused attention."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate_output_attentions(self) -> None:
        """Every attention implementation will do; transformers' own check wants an eager one."""

    @property
    def class_names(self) -> dict[int, str]:
        """The names of the classes by their numbers, `id2label`."""
        return cast(dict[int, str], self.id2label)

    @property
    def vision(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        return cast(PreTrainedConfig, self.backbone_config)

    def _check_labels(self) -> None:
        names = self.class_names
        if len(names) < 2:
            raise ValueError(f"Prompt-CAM tells classes apart and needs two at least; id2label names {len(names)}.")
        if sorted(names) != list(range(len(names))):
            raise ValueError(
                f"id2label must number the classes 0 to {len(names) - 1} without a gap; got {sorted(names)[:10]}."
            )
        self.id2label = {index: str(names[index]) for index in range(len(names))}
        label2id = {name: index for index, name in self.id2label.items()}
        if len(label2id) != len(names):
            twice = sorted({name for i, name in self.id2label.items() if label2id[name] != i})
            raise ValueError(f"id2label gives the name {twice[0]!r} to two classes; every class needs its own name.")
        if self.label2id is not None and {str(k): int(v) for k, v in self.label2id.items()} != label2id:
            raise ValueError("label2id contradicts id2label; leave label2id out, it follows from id2label.")
        self.label2id = label2id

    def _check_prompts(self) -> None:
        layers = self.vision.num_hidden_layers
        if not -1 <= self.class_prompt_layer < layers:
            raise ValueError(
                f"class_prompt_layer={self.class_prompt_layer} is not a layer of this backbone: use -1 for the last "
                f"layer (Deep), 0 for the first (Shallow), or a number up to {layers - 1}."
            )
        if not 0 <= self.first_prompt_layer <= self.class_layer:
            raise ValueError(
                f"first_prompt_layer={self.first_prompt_layer} must lie between 0 and the layer where class prompts "
                f"enter, which is {self.class_layer}."
            )
        if self.num_agnostic_prompts is not None and self.num_agnostic_prompts < 0:
            raise ValueError(f"num_agnostic_prompts={self.num_agnostic_prompts} must be 0 or more, or None.")
        for field in ("prompt_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")

    def _check_prompt_sets(self) -> None:
        if self.prompt_sets is None:
            return
        names = [fields.get("name") for fields in self.prompt_sets]
        for name in names:
            if not isinstance(name, str) or names.count(name) > 1:
                raise ValueError(f"prompt_sets must give every set a name of its own; one has {str(name)[:80]!r}.")
        if self.prompts_in_use not in names:
            raise ValueError(
                f"prompts_in_use={self.prompts_in_use!r} must be one of the prompt_sets, which are "
                f"{', '.join(map(repr, names))}."
            )
        if len(names) > 1 and not self.freeze_backbone:
            raise ValueError(SEVERAL_SETS_NEED_A_FROZEN_BACKBONE)
        self.set_prompt_sets(
            {name: self.of_new_prompts(name, fields).prompt_fields() for name, fields in self.all_sets().items()}
        )

    def all_sets(self) -> dict[str, dict[str, Any]]:
        """The settings (`PROMPT_FIELDS`) of each prompt set by its name."""
        sets = {
            each["name"]: {field: value for field, value in each.items() if field != "name"}
            for each in self.prompt_sets or ()
        }
        return sets | {self.prompts_in_use: self.prompt_fields()}

    def set_prompt_sets(self, sets: dict[str, dict[str, Any]]) -> None:
        """Write down the settings of each prompt set."""
        self.prompt_sets = [{"name": name, **fields} for name, fields in sets.items()]

    def use_prompts(self, name: str) -> None:
        """Make the settings of another prompt set this configuration's own.

        Raises:
            ValueError: there is no such set.
        """
        sets = self.all_sets()
        check_prompt_names([name], sets)
        if self.prompt_sets is not None:
            self.set_prompt_sets(sets)
        for field, value in sets[name].items():
            setattr(self, field, value)
        self.label2id = {label: index for index, label in self.class_names.items()}
        self.prompts_in_use = name

    def alone(self, name: str) -> "PromptCAMConfig":
        """This configuration with one prompt set alone; the backbone's is shared.

        Raises:
            ValueError: there is no such set.
        """
        config = copy.copy(self)
        config.use_prompts(name)
        config.prompt_sets, config.prompts_in_use = None, DEFAULT_NAME
        return config

    def prompt_fields(self) -> dict[str, Any]:
        """The settings of the prompt set in use, `PROMPT_FIELDS`."""
        return {field: getattr(self, field) for field in PROMPT_FIELDS}

    def of_new_prompts(self, name: str, fields: dict[str, Any]) -> "PromptCAMConfig":
        """The configuration of a prompt set alone, on the same backbone.

        Args:
            name: Of the set, for messages.
            fields: Of `PROMPT_FIELDS`.

        Raises:
            ValueError: a field is unknown, or wrong.
        """
        unknown = sorted(set(fields) - set(PROMPT_FIELDS))
        if unknown:
            raise ValueError(
                f"Prompt set {name!r}: a set has no {unknown[0]!r} of its own; it has {', '.join(PROMPT_FIELDS)}."
            )
        shared = {field: getattr(self, field) for field in _SHARED_FIELDS}
        try:
            return type(self)(**shared, **fields)
        except ValueError as error:
            raise ValueError(f"Prompt set {name!r}: {error}") from error

    @property
    def class_layer(self) -> int:
        """The layer that class prompts enter, counted from 0 at the front."""
        return range(self.vision.num_hidden_layers)[self.class_prompt_layer]

    @property
    def agnostic_prompts_per_layer(self) -> int:
        """Class-agnostic prompts in each layer that has any."""
        return len(self.class_names) if self.num_agnostic_prompts is None else self.num_agnostic_prompts

    @property
    def num_agnostic_layers(self) -> int:
        """How many layers class-agnostic prompts enter."""
        return self.class_layer - self.first_prompt_layer if self.agnostic_prompts_per_layer else 0

    @property
    def fixed_prefix_layers(self) -> int:
        """How many of the first layers no prompt enters: what they compute is a fixed function of the image."""
        return self.class_layer - self.num_agnostic_layers

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: CLS, distillation token and registers, as far as the family has them."""
        return num_prefix_tokens(self.vision)


def num_prefix_tokens(config: PreTrainedConfig) -> int:
    """Tokens before the patches, from a backbone's configuration: CLS, distillation token and registers."""
    return SUPPORTED_BACKBONES[config.model_type].prefix_tokens + getattr(config, "num_register_tokens", 0)


_FIELDS = ["id2label", "num_labels", *PromptCAMConfig.__annotations__]
_SHARED_FIELDS = (
    "backbone_config",
    "backbone_name_or_path",
    "backbone_revision",
    "backbone_subfolder",
    "backbone_fingerprint",
)


def _own_backbone_config(backbone_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """A private, checked copy: configs are shared objects, and permission to run remote code never travels in one."""
    if backbone_config is None:
        raise ValueError("PromptCAMConfig needs backbone_config, the configuration of the vision transformer.")
    if isinstance(backbone_config, dict):
        fields = _without_permissions(backbone_config)
        model_type = fields.pop("model_type", None)
        check_backbone_family(model_type)
        layers = fields.get("num_hidden_layers")
        if isinstance(layers, int) and layers > _MOST_LAYERS:
            raise ValueError(f"backbone_config has num_hidden_layers={layers}, more than {_MOST_LAYERS:,}.")
        return AutoConfig.for_model(model_type, **fields)
    check_backbone_family(backbone_config.model_type)
    own = copy.deepcopy(backbone_config)
    own.__dict__ = _without_permissions(own.__dict__)
    return own


def _check_no_hub_kernels(fields: dict[str, Any]) -> None:
    """Refuse saved fields that name a repository's code to compute with; a caller may name one."""
    for key, value in fields.items():
        if str(key).endswith("_implementation") and "/" in str(value):
            raise ValueError(
                f"The saved configuration has {key}={value!r}, code from the Hub, which only the caller may ask for; "
                "give it to from_pretrained."
            )
        if isinstance(value, dict):
            _check_no_hub_kernels(value)


def _without_permissions(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without those that name code or allow to run it, at any depth."""
    return {
        key: _without_permissions(value) if isinstance(value, dict) else value
        for key, value in fields.items()
        if key not in ("auto_map", "trust_remote_code")
    }


__all__ = [
    "PROMPT_FIELDS",
    "SEVERAL_SETS_NEED_A_FROZEN_BACKBONE",
    "SUPPORTED_BACKBONES",
    "BackboneFamily",
    "PromptCAMConfig",
    "check_backbone_family",
    "check_prompt_names",
    "num_prefix_tokens",
    "only_value_errors",
]
