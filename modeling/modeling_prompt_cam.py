# SPDX-License-Identifier: MIT
"""Prompt-CAM: class prompts in a frozen vision transformer become scores, and attention that shows traits.

The method is Prompt-CAM (Chowdhury et al., CVPR 2025, arXiv 2501.09333). It is computed exactly, but not the long way:
outputs at the positions of agnostic prompts are thrown away, so they never need to be queries. They enter a layer as
*memory*, keys and values that do not depend on the image, and the last layer runs for the class prompts alone.
"""

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .backbone_prompt_cam import (
    KnownQueries,
    RotaryPositions,
    backbone_layers,
    final_norm,
    finish_layer,
    run_layer,
    update_queries,
)
from .base_prompt_cam import LayerRecord, init_prompts
from .checkpoint_prompt_cam import (
    PIPELINES,
    check_same_prompts,
    check_shapes,
    complete_state_dict,
    explained_load_errors,
    find_weights,
    names_that_torchao_reads,
    prompts_state_dict,
    read_shapes,
    split_hub_keywords,
)
from .configuration_prompt_cam import PromptCAMConfig, only_value_errors
from .outputs_prompt_cam import (
    LastLayerReader,
    LastLayerState,
    PromptCAMOutput,
    find_trait_classes,
    patch_attention,
)
from .prepared_prompt_cam import PreparedPrompts, PreparedSet, prepared_prompts_of
from .prompt_sets_prompt_cam import PromptParts, PromptSetsModel


class _Entering(NamedTuple):
    """What enters the last layer: class prompts (batch or 1, num_labels, hidden_size), and an image's tokens."""

    class_states: torch.Tensor
    tokens: torch.Tensor
    rotary: RotaryPositions | None
    grid: tuple[int, int]
    known: KnownQueries | None


class PromptCAMForImageClassification(LastLayerReader, PromptSetsModel):
    """A frozen vision transformer with one prompt a class: scores, and maps of the traits that make the class.

    Start from a pre-trained backbone with `from_backbone`, load a trained model with `from_pretrained`.
    """

    config_class = PromptCAMConfig
    base_model_prefix = "prompt_cam"
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: PromptCAMConfig):
        # Configs are shared objects, so the model gets its own, and its backbone the vision part of that one.
        config = copy.deepcopy(config)
        super().__init__(config)
        self._add_backbone(config.vision)
        self._add_prompt_sets()
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The prompts' own initialisation; modules that a subclass adds get transformers' own."""
        if isinstance(module, PromptParts):
            init_prompts(self.backbone.config, module.classifier, module.class_prompts, module.agnostic_prompts)
        elif all(module is not parts.classifier for parts in (self, *self.other_prompts)):
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        backbone: str | os.PathLike | PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> "PromptCAMForImageClassification":
        """Load a trained Prompt-CAM, as transformers' own method does, and its backbone where the folder has none.

        Args:
            pretrained_model_name_or_path: A Hub id or a folder written by `save_pretrained`.
            *model_args: Passed on.
            config: A configuration in place of the saved one; it must describe the same prompts.
            backbone: For a prompts-only checkpoint: where its backbone is, if not where the configuration says. It
                must have the recorded weights.
            **kwargs: Passed on.

        Raises:
            ValueError: the configuration or the weights are damaged or do not fit each other, the configuration asks
                for other prompts than the checkpoint has, or the backbone's weights are not those that the prompts
                were trained with.
            OSError: the checkpoint or its backbone cannot be found.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub, _ = split_hub_keywords(kwargs)
        # The configuration would take the precision, "auto" included, for a field of its own.
        dtype: dict[str, Any] = {key: kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in kwargs}
        with only_value_errors(path):
            with explained_load_errors(path, kwargs.get("revision")):
                if not isinstance(config, PreTrainedConfig):
                    config, kwargs = PromptCAMConfig.from_pretrained(
                        config or path, return_unused_kwargs=True, **kwargs
                    )
                    kwargs |= hub
                kwargs |= dtype
                saved = PromptCAMConfig.from_pretrained(path, **hub)
                config = cast(PromptCAMConfig, config)
                check_same_prompts(config, saved, path)
                files, ignore = find_weights(path, kwargs.get("variant"), **hub), kwargs.get("ignore_mismatched_sizes")
                if saved.backbone_in_checkpoint:
                    if not hasattr(config, "quantization_config"):
                        check_shapes(cls, config, read_shapes(path, files), path, bool(ignore))
                    return super().from_pretrained(path, *model_args, config=config, **kwargs)
            state_dict = complete_state_dict(path, files, config, backbone, **hub)
            check_shapes(cls, config, {name: each.shape for name, each in state_dict.items()}, path, bool(ignore))
            config.backbone_in_checkpoint = True
            kwargs = {key: value for key, value in kwargs.items() if key not in {*hub, "variant"}}
            loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info adds a report
        model.name_or_path = model.config.name_or_path = str(path)
        return loaded

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        *args: Any,
        include_backbone: bool = True,
        prompts: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as transformers does, with the model's code, so that the folder loads where only transformers is.

        Args:
            save_directory: The folder; it is made.
            *args: Passed on.
            include_backbone: False leaves the frozen backbone out. The folder then names it, with a fingerprint of its
                weights, and `from_pretrained` fetches it.
            prompts: Save one prompt set apart, as an ordinary model with that set alone. None: save all sets.
            **kwargs: Passed on.

        Raises:
            ValueError: the backbone is left out, but it has no name or is not the one that has that name; or there is
                no such prompt set.
        """
        if prompts is not None:
            model = self.only_prompts(prompts)
            return model.save_pretrained(save_directory, *args, include_backbone=include_backbone, **kwargs)
        if not include_backbone:
            kwargs["state_dict"] = prompts_state_dict(self, kwargs.get("state_dict"))
        # These two describe the saved folder, not the model in memory.
        self.config.backbone_in_checkpoint = include_backbone
        self.config.custom_pipelines = PIPELINES
        try:
            with names_that_torchao_reads(getattr(self, "hf_quantizer", None)):
                super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True
            del self.config.custom_pipelines

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_trait_maps: bool = False,
        trait_classes: torch.Tensor | Literal["all"] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        prefix_hidden_states: torch.Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
    ) -> PromptCAMOutput:
        """Score images, and show where each class prompt looks.

        Args:
            pixel_values: (batch, channels, height, width), from the image processor.
            labels: (batch,) or (batch, 1), class numbers; (batch, num_labels), probabilities, or 0 and 1 where
                `config.problem_type` is "multi_label_classification". With them the loss is returned.
            output_trait_maps: Return the last layer's attention, of the classes in `trait_classes`.
            trait_classes: None: the predicted class. "all": every class. A tensor: these classes, (batch, k) or, the
                same for every image, (k,).
            output_attentions: Return the attention of every layer, and the trait maps of all classes. None: as
                `config.output_attentions` says.
            output_hidden_states: Return the hidden states between the layers. None: as the configuration says.
            interpolate_pos_encoding: Adapt the position encoding to images of another size than the backbone's.
            prefix_hidden_states: (batch, tokens, hidden_size) from `encode_prefix`, in place of pixel_values.
            patch_grid: Rows and columns of patches in prefix_hidden_states, where they are not the backbone's own.

        Raises:
            ValueError: an argument's shape, size or class number is wrong.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        record = LayerRecord(output_hidden_states, output_attentions)
        tokens, grid, first_layer = self._enter(
            pixel_values, interpolate_pos_encoding, prefix_hidden_states, patch_grid
        )
        entering = self._run_inner_layers(tokens, grid, first_layer, record)
        if output_attentions or output_trait_maps or trait_classes is not None:
            state, weights = self._run_last_layer(entering, output_attentions)
            outputs = state.outputs
        else:
            outputs, weights, state = self._call_last_layer(entering, update_queries), None, None
        record.add(outputs, weights)
        logits = self.score(outputs)
        classes = trait_maps = None
        if weights is not None:
            classes = find_trait_classes("all", logits)
            trait_maps = patch_attention(weights, grid)
        elif state is not None:
            classes = find_trait_classes(trait_classes, logits)
            trait_maps = self.trait_maps(state, classes)
        return PromptCAMOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=record.hidden_states,
            attentions=record.attentions,
            trait_maps=trait_maps,
            trait_classes=classes,
        )

    def encode_prefix(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """What the layers before the first prompt compute, as in `PromptedModel.encode_prefix`, where that is fixed.

        Raises:
            ValueError: prompts enter the first layer, or the backbone is trained, so that nothing is fixed.
        """
        if not self.config.freeze_backbone:
            raise ValueError("There is no fixed prefix: the backbone is trained too (freeze_backbone=False).")
        if not self.config.fixed_prefix_layers:
            raise ValueError(
                "There is no fixed prefix: prompts enter the first layer; set first_prompt_layer, or "
                "num_agnostic_prompts=0 with a later class_prompt_layer."
            )
        return super().encode_prefix(pixel_values, interpolate_pos_encoding)

    def prepared(self) -> PreparedPrompts:
        """Compute what the prompts bring to the layers once, not for each image, inside a `with` block.

        Scores and maps stay the same, up to rounding. It is for evaluation mode without gradient, and a frozen
        backbone; any other forward pass, and those of other threads, are computed as ever. When weights or prompts
        change, so does what is computed; only a change of the backbone's weights behind PyTorch's back (through
        `.data` or NumPy) is not seen.

        Example:
            >>> with model.prepared(), torch.no_grad():
            ...     scores = [model(pixel_values).logits for pixel_values in batches]
        """
        return PreparedPrompts(self.backbone)

    def last_layer_state(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> LastLayerState:
        """Run the network; scores, maps and rankings are cheap to make from what the last layer leaves behind.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.
        """
        tokens = self._embed(pixel_values, interpolate_pos_encoding)
        return self._run_last_layer(self._run_inner_layers(tokens, self._grid_of(pixel_values), 0, LayerRecord()))[0]

    def last_layer_states(
        self,
        pixel_values: torch.Tensor,
        names: Sequence[str] | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> dict[str, LastLayerState]:
        """`last_layer_state` of several prompt sets, with the layers that they share run once.

        To ask a state for scores, maps or a ranking, ask `model.only_prompts(name)`. Arguments and errors as in
        `forward_sets`.
        """
        names = list(self.config.all_sets()) if names is None else list(names)
        models = [self.only_prompts(name) for name in names]
        if not models:
            return {}
        tokens, grid = self._embed(pixel_values, interpolate_pos_encoding), self._grid_of(pixel_values)
        shared_layers, rotary = _count_shared_layers(models), self._rotary(tokens, grid)
        memories, _ = models[0]._find_prepared() or (None, None)
        tokens = models[0]._run_layers(range(shared_layers), tokens, rotary, LayerRecord(), memories)
        return {
            name: model._run_last_layer(model._run_inner_layers(tokens, grid, shared_layers, LayerRecord()))[0]
            for name, model in zip(names, models, strict=True)
        }

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
        differ between the sets. Nothing of the model changes, so several threads may call it at once.

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
            model = self.only_prompts(name)
            logits = model.last_layer_logits(state)
            classes = maps = None
            if output_trait_maps or trait_classes is not None:
                classes = find_trait_classes(trait_classes, logits)
                maps = model.trait_maps(state, classes)
            outputs[name] = PromptCAMOutput(logits=logits, trait_maps=maps, trait_classes=classes)
        return outputs

    def finish_last_layer(self, prompts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """The last layer after its attention, for any class prompts.

        Args:
            prompts: (batch, rows, hidden_size), the layer's input at class prompts.
            contexts: (batch, rows, heads, head size), what each head hands on.

        Returns:
            (batch, rows, hidden_size), the layer's output, for `score`.
        """
        return cast(torch.Tensor, backbone_layers(self.backbone)[-1](prompts, contexts, run=finish_layer))

    def score(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class scores from the last layer's outputs (paper: s[c] = w . z_N^c), (..., hidden_size) to (...)."""
        return self._parts_in_use.classifier(final_norm(self.backbone)(outputs)).squeeze(-1)

    def _agnostic_prompts_of(self, index: int) -> torch.Tensor | None:
        first, prompts = self.config.fixed_prefix_layers, self._parts_in_use.agnostic_prompts
        return prompts[index - first] if prompts is not None and first <= index < self.config.class_layer else None

    def _run_inner_layers(
        self, tokens: torch.Tensor, grid: tuple[int, int], first_layer: int, record: LayerRecord
    ) -> _Entering:
        """All layers but the last one."""
        entry, last = self.config.class_layer, self._num_layers - 1
        class_prompts, rotary = self._parts_in_use.class_prompts, self._rotary(tokens, grid)
        record.add(tokens)
        memories, known = self._find_prepared() or (None, None)
        tokens = self._run_layers(range(first_layer, entry), tokens, rotary, record, memories)
        if entry == last:  # Deep
            class_states = self._drop_prompts(class_prompts).to(tokens.device).unsqueeze(0)
        else:
            joined, joined_rotary = self._join(class_prompts, tokens, rotary)
            joined = self._run_layers(range(entry, last), joined, joined_rotary, record)
            class_states, tokens = joined.tensor_split([len(class_prompts)], dim=1)
        return _Entering(class_states, tokens, rotary, grid, known)

    def _find_prepared(self) -> PreparedSet | None:
        prepared = prepared_prompts_of(self.backbone)
        if prepared is None or self.training:
            return None
        parts, config = self._parts_in_use, self.config
        agnostic_layers = range(config.fixed_prefix_layers, config.class_layer)
        deep = config.class_layer == self._num_layers - 1
        return prepared.find(parts.class_prompts, parts.agnostic_prompts, agnostic_layers, deep)

    def _call_last_layer(self, entering: _Entering, run: Callable, output_attentions: bool = False) -> Any:
        last = self._num_layers - 1
        class_states, tokens, rotary, _, known = entering
        arguments = (class_states, self.backbone.config, tokens, None, rotary, self._drop_path_rate(last))
        return self._call_layer(last, run, *arguments, output_attentions, known)

    def _run_last_layer(
        self, entering: _Entering, output_attentions: bool = False
    ) -> tuple[LastLayerState, torch.Tensor | None]:
        """What the last layer leaves behind; the attention of the class prompts, or None."""
        outputs, weights, projections = self._call_last_layer(entering, run_layer, output_attentions)
        return LastLayerState(entering.class_states, projections, outputs, entering.grid), weights


def _count_shared_layers(models: list[PromptCAMForImageClassification]) -> int:
    """How many of the first layers see the same agnostic prompts, or none, in all these models."""
    count = min(model.config.class_layer for model in models)
    for index in range(count):
        first, *others = (model._agnostic_prompts_of(index) for model in models)
        for other in others:
            if first is not other and (first is None or other is None or not torch.equal(first, other)):
                return index
    return count


__all__ = ["LastLayerState", "PromptCAMForImageClassification", "PromptCAMOutput"]
