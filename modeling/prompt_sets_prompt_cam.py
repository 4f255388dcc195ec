# SPDX-License-Identifier: MIT
"""Several prompt sets, each for its own classes, on one frozen backbone.

The model itself has the parts of its first set, `other_prompts` those of the others, in the order of
`config.prompt_sets`. `config.prompts_in_use` is the name of the set that the model scores with.
"""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from .backbone_prompt_cam import fingerprint_backbone
from .base_prompt_cam import PromptedModel, init_prompts
from .checkpoint_prompt_cam import find_weights, read_prompts
from .configuration_prompt_cam import SEVERAL_SETS_NEED_A_FROZEN_BACKBONE, PromptCAMConfig, check_prompt_names

_PARTS = ("class_prompts", "agnostic_prompts", "classifier")

_Model = TypeVar("_Model", bound="PromptSetsModel")


class PromptParts(nn.Module):
    """The trained parts of a prompt set.

    Attributes:
        class_prompts: (num_labels, hidden_size).
        agnostic_prompts: (layers, prompts, hidden_size), or None.
        classifier: One vector for all classes (paper, section 3): evidence can only come from where a prompt looks.
    """

    class_prompts: nn.Parameter
    agnostic_prompts: nn.Parameter | None
    classifier: nn.Linear

    def add_parts(self, config: PromptCAMConfig) -> None:
        """Make the parts of the set that is in use in `config`, without values."""
        hidden_size = config.vision.hidden_size
        self.class_prompts = nn.Parameter(torch.empty(len(config.class_names), hidden_size))
        self.register_parameter("agnostic_prompts", None)
        if config.num_agnostic_layers:
            shape = (config.num_agnostic_layers, config.agnostic_prompts_per_layer, hidden_size)
            self.agnostic_prompts = nn.Parameter(torch.empty(shape))
        self.classifier = nn.Linear(hidden_size, 1)

    def train_parts(self, trained: bool) -> None:
        """Let the parts be trained, or freeze them."""
        for part in (self.class_prompts, self.agnostic_prompts, self.classifier):
            if part is not None:
                part.requires_grad_(trained)


def build_parts(config: PromptCAMConfig) -> PromptParts:
    """The parts of the set that is in use in `config`, without values."""
    parts = PromptParts()
    parts.add_parts(config)
    return parts


class PromptSetsModel(PromptedModel, PromptParts):
    """A model with one prompt set or several."""

    config: PromptCAMConfig
    other_prompts: nn.ModuleList

    def _add_prompt_sets(self) -> None:
        first, *others = (self.config.alone(name) for name in self.config.all_sets())
        self.add_parts(first)
        self.other_prompts = nn.ModuleList(map(build_parts, others))

    @property
    def prompt_sets(self) -> dict[str, str]:
        """The names of all prompt sets, with a short description of each."""
        return {name: self._describe_prompts(name) for name in self.config.all_sets()}

    @property
    def prompts_in_use(self) -> str:
        """The name of the prompt set in use."""
        return self.config.prompts_in_use

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
        parts = build_parts(config)
        if state_dict is None:
            init_prompts(self.backbone.config, parts.classifier, parts.class_prompts, parts.agnostic_prompts)
        else:
            _load_parts(parts, state_dict, name)
        parts.to(self.class_prompts.device, self.class_prompts.dtype).train(self.training).requires_grad_(False)
        self.config.set_prompt_sets(self.config.all_sets() | {name: config.prompt_fields()})
        self.other_prompts.append(parts)

    def load_prompts(self, path: str | os.PathLike, name: str, **hub: Any) -> None:
        """Add the prompt set of a saved Prompt-CAM with the same backbone; the set in use stays in use.

        Args:
            path: Its Hub id or folder, with or without the backbone.
            name: What the set is to be called here. Of a checkpoint with several sets, the one of this name is taken.
            **hub: The Hub keywords of `from_pretrained`.

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
            state_dict = read_prompts(path, find_weights(path, **hub))
        own = _fingerprint(self)
        if fingerprint is None or fingerprint != own:
            raise ValueError(
                f"{path} holds prompts for a backbone with fingerprint {str(fingerprint)[:12]}, but this model's has "
                f"{str(own)[:12]}: prompts work on the backbone that they were trained with, and on no other."
            )
        sets = saved.all_sets()
        asked = name if len(sets) > 1 else saved.prompts_in_use
        check_prompt_names([asked], sets, os.fspath(path))
        place = list(sets).index(asked)
        prefix = f"other_prompts.{place - 1}." if place else ""
        starts = tuple(prefix + part for part in _PARTS)
        weights = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(starts)}
        self.add_prompts(name, state_dict=weights, **sets[asked])

    def set_prompts(self, name: str) -> None:
        """Use another prompt set: scores, maps, class names and training are its own from now on.

        No weight is copied or moved. What is trained passes from one set to the other; a frozen set stays frozen.

        Raises:
            ValueError: there is no such set.
        """
        before = self._parts_in_use
        trained = before.class_prompts.requires_grad
        self.config.use_prompts(name)
        before.train_parts(False)
        self._parts_in_use.train_parts(trained)

    @contextmanager
    def using_prompts(self, name: str) -> Iterator[None]:
        """Use another prompt set inside a `with` block.

        This changes the model for all threads; `only_prompts` leaves it as it is.

        Raises:
            ValueError: there is no such set.
        """
        before = self.prompts_in_use
        self.set_prompts(name)
        try:
            yield
        finally:
            self.set_prompts(before)

    def only_prompts(self: _Model, name: str) -> _Model:
        """An ordinary model with one prompt set alone. It shares its weights with this one, which stays as it is.

        Raises:
            ValueError: there is no such set.
        """
        parts, model = self._parts_of(name), copy.copy(self)
        model.config = self.config.alone(name)
        model._parameters = dict(parts._parameters)
        model._modules = {**self._modules, "classifier": parts.classifier, "other_prompts": nn.ModuleList()}
        model.__dict__.pop("forward", None)  # accelerate's hook, which would run this model
        return model

    def train(self: _Model, mode: bool = True) -> _Model:
        """Set the mode of prompts and classifier; a frozen backbone always stays frozen and in evaluation mode.

        Of several prompt sets, the one in use is trained. Modules that were put into the backbone later, such as
        PEFT's adapters, are not the backbone's own.

        Raises:
            ValueError: PEFT is to save the prompts as modules, which they are not.
        """
        for adapter in getattr(self, "peft_config", {}).values():
            if prompts := {"class_prompts", "agnostic_prompts"}.intersection(adapter.modules_to_save or ()):
                raise ValueError(
                    f"PEFT saves modules, and {min(prompts)} is a parameter: leave it out of modules_to_save, let "
                    "it be trained with requires_grad_(True), and save the merged model."
                )
        super().train(mode)
        for parts in (self, *self.other_prompts) if len(self.other_prompts) else ():
            if parts is not self._parts_in_use:
                parts.train_parts(False)
        return self

    def _parts_of(self, name: str) -> PromptParts:
        """The parts of a prompt set; those of the first one are this model's own."""
        sets = list(self.config.all_sets())
        check_prompt_names([name], sets)
        return (self, *self.other_prompts)[sets.index(name)]

    @property
    def _parts_in_use(self) -> PromptParts:
        return self._parts_of(self.config.prompts_in_use) if len(self.other_prompts) else self

    def _describe_prompts(self, name: str) -> str:
        config = self.config.alone(name)
        last = config.vision.num_hidden_layers - 1
        variant = {last: "Deep", 0: "Shallow"}.get(
            config.class_layer, f"class prompts from layer {config.class_layer}"
        )
        agnostic = "no agnostic prompts"
        if config.num_agnostic_layers:
            agnostic = f"{config.agnostic_prompts_per_layer} agnostic prompts in {config.num_agnostic_layers} layers"
        in_use = ", in use" if name == self.prompts_in_use else ""
        return f"{config.num_labels} classes, {variant}, {agnostic}{in_use}"

    def _check_new_name(self, name: str) -> None:
        if name in self.config.all_sets():
            raise ValueError(f"There is a prompt set {name!r} already; choose another name.")
        if not self.config.freeze_backbone:
            raise ValueError(SEVERAL_SETS_NEED_A_FROZEN_BACKBONE)


def _fingerprint(model: PromptSetsModel) -> str | None:
    # float16 rounds differently, so its digest says nothing.
    return model.config.backbone_fingerprint if model.dtype == torch.float16 else fingerprint_backbone(model.backbone)


def _load_parts(parts: PromptParts, state_dict: dict[str, torch.Tensor], name: str) -> None:
    expected, given = ({k: tuple(v.shape) for k, v in d.items()} for d in (parts.state_dict(), state_dict))
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise ValueError(
                f"Prompt set {name!r}: the weight {key} has to be {expected.get(key, 'absent')}, and the given one is "
                f"{given.get(key, 'absent')}."
            )
    parts.load_state_dict(state_dict)


__all__ = ["PromptParts", "PromptSetsModel"]
