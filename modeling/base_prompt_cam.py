# SPDX-License-Identifier: MIT
"""What models with prompts in a vision transformer share: how images enter, and how layers run with prompts."""

import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .backbone_prompt_cam import (
    KeysAndValues,
    RotaryPositions,
    backbone_layers,
    build_backbone,
    embed,
    family_class,
    grid_size,
    image_size,
    patch_size,
    rotary_positions,
    run_layer,
    update_queries,
    vision_config,
)
from .checkpoint_prompt_cam import adopt_backbone, backbone_name, load_backbone, split_hub_keywords
from .configuration_prompt_cam import num_prefix_tokens

_Model = TypeVar("_Model", bound="PromptedModel")


@torch.no_grad()
def init_prompts(config: PreTrainedConfig, classifier: nn.Linear, *prompts: torch.Tensor | None) -> None:
    """The official initialisation: prompts uniform in a range set by the patch size, a small classifier.

    Args:
        config: The backbone's configuration.
        classifier: It is set too.
        *prompts: Of any shape.
    """
    bound = math.sqrt(6 / (config.num_channels * math.prod(patch_size(config)) + config.hidden_size))
    for each in prompts:
        if each is not None:
            init.uniform_(each, -bound, bound)
    init.trunc_normal_(classifier.weight, std=0.02)
    init.zeros_(classifier.bias)


class MapLayout(NamedTuple):
    """Rows and columns of a map, and height and width of a patch in pixels; the first patch is at the top left."""

    grid: tuple[int, int]
    patch: tuple[float, float]


class LayerRecord:
    """Hidden states and attention of the layers that run, as far as they are asked for."""

    def __init__(self, hidden_states: bool = False, attentions: bool = False):
        """Start with nothing; what is not asked for stays None."""
        self.hidden_states: tuple[torch.Tensor, ...] | None = () if hidden_states else None
        self.attentions: tuple[torch.Tensor, ...] | None = () if attentions else None

    def add(self, hidden: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Note a layer's output and its attention."""
        if self.hidden_states is not None:
            self.hidden_states += (hidden,)
        if self.attentions is not None and weights is not None:
            self.attentions += (weights,)


class PromptedModel(PreTrainedModel):
    """A vision transformer, usually frozen, with prompts beside its tokens and a linear classifier.

    Its configuration has `backbone_config`, `freeze_backbone`, `fixed_prefix_layers`, `prompt_dropout` and
    `drop_path_rate`.
    """

    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = []  # noqa: RUF012 - the backbone names its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    config: Any
    backbone: PreTrainedModel
    classifier: nn.Linear
    gradient_checkpointing: bool = False

    @classmethod
    def from_backbone(
        cls: type[_Model],
        backbone: str | os.PathLike | PreTrainedModel,
        *,
        id2label: dict[int, str],
        dtype: torch.dtype | str = torch.float32,
        **kwargs: Any,
    ) -> _Model:
        """A model with new, untrained prompts on a pre-trained vision transformer.

        Args:
            backbone: A Hub id, a folder, or a loaded transformers model, which is copied and left as it is. Models
                with a head or a second tower (ViTForImageClassification, CLIPModel) are taken for their vision part.
            id2label: Class names, numbered from 0.
            dtype: Precision of all weights, by name too; "auto" is the backbone's own. Training wants float32.
            **kwargs: The Hub keywords of `from_pretrained` (revision, subfolder, cache_dir, local_files_only ...), and
                fields of the configuration.

        Raises:
            ValueError: the backbone's family is not supported, or a field is wrong.
            OSError: the backbone cannot be found.
        """
        hub, config_fields = split_hub_keywords(kwargs)
        source = load_backbone(backbone, **hub)
        config_class: Any = cls.config_class
        config = config_class(
            backbone_config=vision_config(source.config),
            id2label=id2label,
            backbone_name_or_path=backbone_name(backbone),
            backbone_revision=hub.get("revision"),
            backbone_subfolder=hub.get("subfolder") or None,
            **config_fields,
        )
        model = cls._from_config(config, dtype=source.dtype if dtype == "auto" else dtype)
        adopt_backbone(model, source)
        return model.eval()

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Look at every module: transformers passes by those of custom code whose own parameters were all loaded.

        The model itself sets its classifier's too, which may be missing or of another shape; loaded ones stay.
        """
        super()._initialize_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's patch embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's patch embedding."""
        name = next(name for name, module in self.backbone.named_modules() if module is self.get_input_embeddings())
        self.backbone.set_submodule(name, value)

    def train(self: _Model, mode: bool = True) -> _Model:
        """Set the mode of prompts and classifier; a frozen backbone always stays frozen and in evaluation mode.

        Modules that were put into the backbone later, such as PEFT's adapters, are not the backbone's own.
        """
        super().train(mode)
        if self.config.freeze_backbone:
            # Loading a checkpoint puts new, trainable parameters in place of the frozen ones, then calls eval().
            for name, module in self.backbone.named_modules():
                if name in self._backbone_modules and isinstance(module, self._backbone_modules[name]):
                    module.training = False
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
        return self

    @torch.no_grad()
    def encode_prefix(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """What the layers before the first prompt compute, a fixed function of the image; without gradient.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.

        Returns:
            Hidden states (batch, tokens, hidden_size), for `forward(prefix_hidden_states=...)`.
        """
        tokens = self._embed(pixel_values, interpolate_pos_encoding)
        rotary = self._rotary(tokens, self._grid_of(pixel_values))
        return self._run_layers(range(self.config.fixed_prefix_layers), tokens, rotary, LayerRecord())

    @property
    def num_trait_heads(self) -> int:
        """The heads of the last layer, each of which has a map of its own."""
        return int(self.config.backbone_config.num_attention_heads)

    def map_layout(self, height: int, width: int) -> MapLayout:
        """How the maps lie on images of so many pixels."""
        config = self.config.backbone_config
        return MapLayout(grid_size(config, height, width), patch_size(config))

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss that `config.problem_type` names; cross-entropy takes probabilities (mixup) too."""
        several = self.config.problem_type == "multi_label_classification"
        labels, logits = labels.to(logits.device), logits.float()
        labels = labels.float() if several or labels.is_floating_point() else labels.long()
        if labels.is_floating_point() and not several:
            return nn.functional.cross_entropy(logits, labels)
        return self.loss_function(labels, logits, self.config)

    def _build_backbone(self, config: PreTrainedConfig) -> PreTrainedModel:
        return build_backbone(config)

    def _add_backbone(self, config: PreTrainedConfig) -> None:
        """Make the backbone, frozen if it is to be, and note what its own modules are."""
        self.backbone = self._build_backbone(config)
        self._backbone_modules = {name: family_class(module) for name, module in self.backbone.named_modules()}
        self.backbone.requires_grad_(not self.config.freeze_backbone)

    @property
    def _num_layers(self) -> int:
        return self.config.backbone_config.num_hidden_layers

    def _agnostic_prompts_of(self, index: int) -> torch.Tensor | None:
        """The prompts (prompts, hidden_size) that are there for layer `index` alone."""
        raise NotImplementedError

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        height, width = pixel_values.shape[-2:]
        return self.map_layout(height, width).grid

    def _embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        return embed(self.backbone, pixel_values.to(self.dtype), interpolate_pos_encoding)

    def _rotary(self, tokens: torch.Tensor, grid: tuple[int, int]) -> RotaryPositions | None:
        return rotary_positions(self.backbone, tokens, grid, num_prefix_tokens(self.backbone.config))

    def _enter(
        self,
        pixel_values: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        prefix_hidden_states: torch.Tensor | None,
        patch_grid: tuple[int, int] | None,
    ) -> tuple[torch.Tensor, tuple[int, int], int]:
        """Hidden states (batch, tokens, hidden_size), their grid of patches, and the first layer that they enter."""
        if pixel_values is not None and prefix_hidden_states is None:
            return self._embed(pixel_values, interpolate_pos_encoding), self._grid_of(pixel_values), 0
        if prefix_hidden_states is None or pixel_values is not None:
            raise ValueError("Give either pixel_values or prefix_hidden_states.")
        config, num_tokens = self.backbone.config, prefix_hidden_states.shape[1]
        grid = patch_grid or grid_size(config, *image_size(config))
        expected = num_prefix_tokens(config) + grid[0] * grid[1]
        if num_tokens != expected:
            raise ValueError(
                f"prefix_hidden_states hold {num_tokens} tokens an image; a grid of {grid[0]}x{grid[1]} patches makes "
                f"{expected}. Give the grid as patch_grid=(rows, columns)."
            )
        return prefix_hidden_states.to(self.dtype), grid, self.config.fixed_prefix_layers

    def _run_layers(
        self,
        indices: range,
        hidden: torch.Tensor,
        rotary: RotaryPositions | None,
        record: LayerRecord,
        memories: Sequence[KeysAndValues | None] | None = None,
    ) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden_size) after these layers, each with its own prompts as memory.

        `memories` are the keys and values of the prompts of every layer, where they are known.
        """
        for index in indices:
            memory: torch.Tensor | KeysAndValues | None = None
            if memories is not None:
                memory = memories[index]
            elif (prompts := self._agnostic_prompts_of(index)) is not None:
                memory = self._drop_prompts(prompts).to(hidden.device).unsqueeze(0)
            arguments = (hidden, self.backbone.config, memory, rotary, None, self._drop_path_rate(index))
            if record.attentions is None:
                hidden, weights = self._call_layer(index, update_queries, *arguments, False, None, True), None
            else:
                hidden, weights, _ = self._call_layer(index, run_layer, *arguments, True, None, True)
            record.add(hidden, weights)
        return hidden

    def _call_layer(self, index: int, run: Callable, *args: Any) -> Any:
        """Have a layer run a function, by calling the layer: hooks and wrappers act on calls."""
        layer = cast(Any, backbone_layers(self.backbone)[index])
        # In training mode, layers do it themselves.
        if layer.gradient_checkpointing and self.training and not layer.training:
            checkpoint, inner = self._gradient_checkpointing_func, functools.partial(run, layer)
            return layer(*args, run=lambda _, *args: checkpoint(inner, *args))
        return layer(*args, run=run)

    def _join(
        self, prompts: torch.Tensor, tokens: torch.Tensor, rotary: RotaryPositions | None
    ) -> tuple[torch.Tensor, RotaryPositions | None]:
        """Prompts (prompts, hidden_size) in front of the tokens of each image, to travel with them from here on."""
        prompts = self._drop_prompts(prompts).to(tokens.device, tokens.dtype)
        joined = torch.cat((prompts.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        return joined, rotary and rotary._replace(first_patch=rotary.first_patch + prompts.shape[0])

    def _drop_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompt dropout: prompts have no batch axis yet, so one mask serves the whole batch."""
        return nn.functional.dropout(prompts, self.config.prompt_dropout, self.training)

    def _drop_path_rate(self, index: int) -> float:
        """Stochastic depth grows linearly with depth; the prefix that no prompt enters stays a fixed function."""
        if not self.training or index < self.config.fixed_prefix_layers:
            return 0.0
        return self.config.drop_path_rate * index / max(self._num_layers - 1, 1)


__all__ = ["LayerRecord", "MapLayout", "PromptedModel", "init_prompts"]
