# SPDX-License-Identifier: MIT
"""How do several prompt sets, each for its own classes, share one frozen backbone?

The set in use has its parts where a model with a single set has them: `class_prompts`, `agnostic_prompts` and
`classifier`. The others wait in `stored_prompts`, and changing the set exchanges the parts: no weight is copied, and
the model runs as if it had that set alone.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import initialization as init
from transformers.utils import cached_file

from .backbone_prompt_cam import fingerprint_backbone, patch_size
from .configuration_prompt_cam import SEVERAL_SETS_NEED_A_FROZEN_BACKBONE, PromptCAMConfig
from .outputs_prompt_cam import LastLayerState, PromptCAMOutput, find_trait_classes

if TYPE_CHECKING:
    from .modeling_prompt_cam import PromptCAMForImageClassification

# The name of the only set of a model, until it is given another one.
DEFAULT_NAME = "default"
_PARTS = ("class_prompts", "agnostic_prompts", "classifier")


def add_prompt_parts(module: nn.Module, config: PromptCAMConfig) -> None:
    """Give a module the trained parts of a prompt set, without values."""
    hidden_size = config.backbone_config.hidden_size
    module.class_prompts = nn.Parameter(torch.empty(config.num_labels, hidden_size))
    module.register_parameter("agnostic_prompts", None)
    if config.num_agnostic_layers:
        shape = (config.num_agnostic_layers, config.agnostic_prompts_per_layer, hidden_size)
        module.agnostic_prompts = nn.Parameter(torch.empty(shape))
    # One vector for all classes (paper, section 3): evidence can only come from where a class prompt looks.
    module.classifier = nn.Linear(hidden_size, 1)


@torch.no_grad()
def init_prompt_parts(module: nn.Module, config: PromptCAMConfig) -> None:
    """The official initialisation: prompts uniform in a range set by the patch size, a small classifier."""
    backbone = config.backbone_config
    fan_in = backbone.num_channels * math.prod(patch_size(backbone))
    bound = math.sqrt(6 / (fan_in + backbone.hidden_size))
    init.uniform_(module.class_prompts, -bound, bound)
    if module.agnostic_prompts is not None:
        init.uniform_(module.agnostic_prompts, -bound, bound)
    init.trunc_normal_(module.classifier.weight, std=0.02)
    init.zeros_(module.classifier.bias)


class StoredPrompts(nn.Module):
    """The place of one prompt set: its trained parts, or nothing while the model itself has them."""

    def __init__(self, config: PromptCAMConfig | None = None):
        """Make room for the set that `config` describes; None: for the set in use."""
        super().__init__()
        if config is None:
            self.register_parameter("class_prompts", None)
            self.register_parameter("agnostic_prompts", None)
            self.register_module("classifier", None)
        else:
            add_prompt_parts(self, config)


def build_stored_prompts(config: PromptCAMConfig) -> nn.ModuleList:
    """A place for each prompt set, in the order of `config.prompt_sets`; none where there is a single, unnamed set."""
    sets = _read_sets(config) if config.prompt_sets else {}
    return nn.ModuleList(
        StoredPrompts(config.of_new_prompts(name, fields) if fields else None) for name, fields in sets.items()
    )


def _read_sets(config: PromptCAMConfig) -> dict[str, dict[str, Any]]:
    """The settings of each prompt set by its name; of the one in use, none."""
    sets = config.prompt_sets or [{"name": DEFAULT_NAME}]
    return {each["name"]: {field: value for field, value in each.items() if field != "name"} for each in sets}


def _write_sets(config: PromptCAMConfig, sets: dict[str, dict[str, Any]]) -> None:
    config.prompt_sets = [{"name": name, **fields} for name, fields in sets.items()]


class PromptSetsMixin:
    """Several prompt sets on the frozen backbone of one model."""

    stored_prompts: nn.ModuleList

    @property
    def prompt_sets(self) -> dict[str, str]:
        """The names of all prompt sets, with a short description of each."""
        return {name: self._describe_prompts(name, fields) for name, fields in _read_sets(self.config).items()}

    @property
    def prompts_in_use(self) -> str:
        """The name of the prompt set in use."""
        return next(name for name, fields in _read_sets(self.config).items() if not fields)

    def add_prompts(
        self,
        name: str,
        *,
        id2label: dict[int, str],
        state_dict: dict[str, torch.Tensor] | None = None,
        **config_fields: Any,
    ) -> None:
        """Add a prompt set for other classes; the set in use stays in use.

        Args:
            name: Any name that no other set has.
            id2label: Its class names, numbered from 0.
            state_dict: Its weights, named as in a model that has this set alone. None: new, untrained ones.
            **config_fields: class_prompt_layer, num_agnostic_prompts, first_prompt_layer, prompt_dropout and
                drop_path_rate, with the defaults of `PromptCAMConfig`.

        Raises:
            ValueError: the name is taken, a field or a weight is wrong, or the backbone is trained.
        """
        self._check_new_name(name)
        config = self.config.of_new_prompts(name, {"id2label": id2label, **config_fields})
        parts = StoredPrompts(config)
        if state_dict is None:
            init_prompt_parts(parts, config)
        else:
            _load_parts(parts, state_dict, name)
        parts.to(self.class_prompts.device, self.class_prompts.dtype).train(self.training).requires_grad_(False)
        if self.config.prompt_sets is None:
            self.stored_prompts.append(StoredPrompts())
        _write_sets(self.config, {**_read_sets(self.config), name: config.prompt_fields()})
        self.stored_prompts.append(parts)

    def load_prompts(self, path: str | os.PathLike, name: str, **hub: Any) -> None:
        """Add the prompt set of a saved Prompt-CAM with the same backbone; the set in use stays in use.

        Args:
            path: Its Hub id or folder, with or without the backbone.
            name: What the set is to be called here. Of a checkpoint with several sets, the one of this name is taken.
            **hub: revision, token and the like.

        Raises:
            ValueError: the name is taken, there is no Prompt-CAM or no such set, or it is made for another backbone.
            OSError: nothing is found there.
        """
        self._check_new_name(name)
        fields, _ = type(self.config).get_config_dict(path, **hub)
        if fields.get("model_type") != self.config.model_type:
            raise ValueError(f"{path} is a model of type {fields.get('model_type')!r}, not a Prompt-CAM.")
        saved = type(self.config).from_pretrained(path, **hub)
        if saved.backbone_in_checkpoint:
            other = type(self).from_pretrained(path, **hub)
            fingerprint, state_dict = _fingerprint(other), other.state_dict()
        else:
            fingerprint = saved.backbone_fingerprint
            state_dict = load_file(cached_file(path, "model.safetensors", **hub))
        own = _fingerprint(self)
        if fingerprint is None or fingerprint != own:
            raise ValueError(
                f"{path} holds prompts for a backbone with fingerprint {str(fingerprint)[:12]}, but this model's has "
                f"{str(own)[:12]}: prompts work on the backbone that they were trained with, and on no other."
            )
        sets = _read_sets(saved)
        if len(sets) == 1:
            sets = {name: {}}
        _check_names([name], sets, os.fspath(path))
        prefix = f"stored_prompts.{list(sets).index(name)}." if sets[name] else ""
        self.add_prompts(
            name,
            state_dict={
                key.removeprefix(prefix): value
                for key, value in state_dict.items()
                if key.startswith(tuple(prefix + part for part in _PARTS))
            },
            **(sets[name] or saved.prompt_fields()),
        )

    def set_prompts(self, name: str) -> None:
        """Use another prompt set: scores, maps, class names and training are its own from now on.

        Nothing is copied. What is trained passes from one set to the other; a frozen set stays frozen.

        Raises:
            ValueError: there is no such set.
        """
        sets, before = _read_sets(self.config), self.prompts_in_use
        _check_names([name], sets)
        if name == before:
            return
        names, trained = list(sets), self.class_prompts.requires_grad
        mine, theirs = (self.stored_prompts[names.index(each)] for each in (before, name))
        for part in _PARTS:
            setattr(mine, part, getattr(self, part))
            setattr(self, part, getattr(theirs, part))
            setattr(theirs, part, None)
            for module, trains in ((mine, False), (self, trained)):
                if getattr(module, part) is not None:
                    getattr(module, part).requires_grad_(trains)
        _write_sets(self.config, {**sets, before: self.config.prompt_fields(), name: {}})
        for field, value in sets[name].items():
            setattr(self.config, field, value)
        self.config.label2id = {label: index for index, label in self.config.id2label.items()}

    @contextmanager
    def using_prompts(self, name: str) -> Iterator[None]:
        """Use another prompt set inside a `with` block.

        Raises:
            ValueError: there is no such set.
        """
        before = self.prompts_in_use
        self.set_prompts(name)
        try:
            yield
        finally:
            self.set_prompts(before)

    @contextmanager
    def only_prompts(self, name: str) -> Iterator[None]:
        """Be an ordinary model with one prompt set alone inside a `with` block: `save_pretrained`, `push_to_hub`.

        Raises:
            ValueError: there is no such set.
        """
        with self.using_prompts(name):
            sets, stored = self.config.prompt_sets, self.stored_prompts
            self.config.prompt_sets, self.stored_prompts = None, nn.ModuleList()
            try:
                yield
            finally:
                self.config.prompt_sets, self.stored_prompts = sets, stored

    def forward_sets(
        self,
        pixel_values: torch.Tensor,
        names: Sequence[str] | None = None,
        output_trait_maps: bool = False,
        trait_classes: Literal["all"] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> dict[str, PromptCAMOutput]:
        """Score images with several prompt sets; what comes out is what each set alone gives.

        The first layers run once for all sets, up to the first that class prompts enter or where agnostic prompts
        differ between the sets.

        Args:
            pixel_values: (batch, channels, height, width), from the image processor.
            names: The prompt sets; None: all.
            output_trait_maps: Return trait maps too, of the classes in `trait_classes`.
            trait_classes: None: the class that each set predicts. "all": every class.
            interpolate_pos_encoding: As in `forward`.

        Raises:
            ValueError: there is no such set, or an argument is wrong.
        """
        outputs = {}
        for name, state in self.last_layer_states(pixel_values, names, interpolate_pos_encoding).items():
            with self.using_prompts(name):
                logits = self.last_layer_logits(state)
                classes = maps = None
                if output_trait_maps or trait_classes is not None:
                    classes = find_trait_classes(trait_classes, logits)
                    maps = self.trait_maps(state, classes)
            outputs[name] = PromptCAMOutput(logits=logits, trait_maps=maps, trait_classes=classes)
        return outputs

    def last_layer_states(
        self,
        pixel_values: torch.Tensor,
        names: Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> dict[str, LastLayerState]:
        """`last_layer_state` of several prompt sets, with the layers that they share run once.

        To ask a state for scores, maps or a ranking, use its set: `with model.using_prompts(name): ...`. Arguments and
        errors as in `forward_sets`.
        """
        sets = _read_sets(self.config)
        names = list(sets) if names is None else list(names)
        _check_names(names, sets)
        if not names:
            return {}
        tokens, grid = self._embed(pixel_values, interpolate_pos_encoding), self._grid_of(pixel_values)
        shared_layers = self._count_shared_layers(names)
        with self.using_prompts(names[0]):
            tokens = self._run_first_layers(tokens, grid, shared_layers)
        states = {}
        for name in names:
            with self.using_prompts(name):
                states[name] = self._run_inner_layers(tokens, grid, shared_layers, None, None)
        return states

    def _count_shared_layers(self, names: list[str]) -> int:
        """How many of the first layers see the same agnostic prompts, or none, in all these sets."""
        entering = []
        for name in names:
            with self.using_prompts(name):
                entering.append([self._agnostic_prompts_of(index) for index in range(self.config.class_layer)])
        for index, prompts in enumerate(zip(*entering, strict=False)):
            if not all(_same_prompts(prompts[0], other) for other in prompts[1:]):
                return index
        return min(map(len, entering))

    def _describe_prompts(self, name: str, fields: dict[str, Any]) -> str:
        config = self.config.of_new_prompts(name, fields) if fields else self.config
        last = config.backbone_config.num_hidden_layers - 1
        variant = {last: "Deep", 0: "Shallow"}.get(
            config.class_layer, f"class prompts from layer {config.class_layer}"
        )
        agnostic = "no agnostic prompts"
        if config.num_agnostic_layers:
            agnostic = f"{config.agnostic_prompts_per_layer} agnostic prompts in {config.num_agnostic_layers} layers"
        return f"{config.num_labels} classes, {variant}, {agnostic}" + ("" if fields else ", in use")

    def _check_new_name(self, name: str) -> None:
        if name in _read_sets(self.config):
            raise ValueError(f"There is a prompt set {name!r} already; choose another name.")
        if not self.config.freeze_backbone:
            raise ValueError(SEVERAL_SETS_NEED_A_FROZEN_BACKBONE)


def _check_names(names: list[str], sets: dict[str, dict[str, Any]], owner: str = "This model") -> None:
    for name in names:
        if name not in sets:
            raise ValueError(f"{owner} has no prompt set {name!r}; it has {', '.join(map(repr, sets))}.")


def _same_prompts(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    if first is None or second is None:
        return first is second
    return torch.equal(first, second)


def _fingerprint(model: "PromptCAMForImageClassification") -> str | None:
    # float16 rounds differently, so its digest says nothing.
    return model.config.backbone_fingerprint if model.dtype == torch.float16 else fingerprint_backbone(model.backbone)


def _load_parts(parts: StoredPrompts, state_dict: dict[str, torch.Tensor], name: str) -> None:
    expected, given = ({k: tuple(v.shape) for k, v in d.items()} for d in (parts.state_dict(), state_dict))
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise ValueError(
                f"Prompt set {name!r}: the weight {key} has to be {expected.get(key, 'absent')}, and the given one is "
                f"{given.get(key, 'absent')}."
            )
    parts.load_state_dict(state_dict)


__all__ = [
    "DEFAULT_NAME",
    "PromptSetsMixin",
    "StoredPrompts",
    "add_prompt_parts",
    "build_stored_prompts",
    "init_prompt_parts",
]
