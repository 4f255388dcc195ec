# SPDX-License-Identifier: MIT
"""How do class prompts in a frozen vision transformer become scores, and attention that shows traits?

The method is Prompt-CAM (Chowdhury et al., CVPR 2025, arXiv 2501.09333). It is computed exactly, but not the long way:
outputs at the positions of agnostic prompts are thrown away, so they never need to be queries. They enter a layer as
*memory*, keys and values that do not depend on the image, and the last layer runs for the class prompts alone.
"""

import copy
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub import CommitInfo, ModelCard
from torch import nn
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .backbone_prompt_cam import (
    RotaryPositions,
    attend,
    attention_weights,
    backbone_layers,
    build_backbone,
    embed,
    final_norm,
    finish_layer,
    grid_size,
    image_size,
    project,
    rotary_positions,
    run_layer,
    vision_config,
)
from .checkpoint_prompt_cam import (
    PIPELINES,
    adopt_backbone,
    backbone_name,
    check_same_prompts,
    complete_state_dict,
    load_backbone,
    prompts_state_dict,
)
from .configuration_prompt_cam import PromptCAMConfig
from .hub_prompt_cam import (
    card_of,
    explained_load_errors,
    image_processor_of,
    save_repository,
    upload_repository,
)
from .outputs_prompt_cam import (
    LastLayerState,
    PromptCAMOutput,
    find_trait_classes,
    patch_attention,
)
from .prompt_sets_prompt_cam import (
    PromptSetsMixin,
    StoredPrompts,
    add_prompt_parts,
    build_stored_prompts,
    init_prompt_parts,
)

_HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class PromptCAMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about Prompt-CAM models."""

    config_class = PromptCAMConfig
    base_model_prefix = "prompt_cam"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = []  # noqa: RUF012 - the backbone names its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The prompts' own initialisation; transformers' would pass them over."""
        if isinstance(module, (PromptCAMForImageClassification, StoredPrompts)) and module.class_prompts is not None:
            init_prompt_parts(module, self.config)


class PromptCAMForImageClassification(PromptSetsMixin, PromptCAMPreTrainedModel):
    """A frozen vision transformer with one prompt a class: scores, and maps of the traits that make the class.

    Start from a pre-trained backbone with `from_backbone`, load a trained model with `from_pretrained`.
    """

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: PromptCAMConfig):
        # Configs are shared objects, so the model gets its own, and its backbone the vision part of that one.
        config = copy.deepcopy(config)
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        add_prompt_parts(self, config)
        self.stored_prompts = build_stored_prompts(config)
        self.gradient_checkpointing = False
        if config.freeze_backbone:
            self.backbone.requires_grad_(False)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        *,
        id2label: dict[int, str],
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        **config_fields: Any,
    ) -> "PromptCAMForImageClassification":
        """A Prompt-CAM with new, untrained prompts on a pre-trained vision transformer.

        Args:
            backbone: A Hub id, a folder, or a loaded transformers model, which is copied and left as it is. Models
                with a head or a second tower (ViTForImageClassification, CLIPModel) are taken for their vision part.
            id2label: Class names, numbered from 0.
            revision: Branch, tag or commit of the Hub repository.
            dtype: Precision of all weights; training wants float32.
            **config_fields: Fields of `PromptCAMConfig`.

        Raises:
            ValueError: the backbone's family is not supported, or a field is wrong.
            OSError: the backbone cannot be found.
        """
        source = load_backbone(backbone, revision=revision)
        config = cls.config_class(
            backbone_config=vision_config(source.config),
            id2label=id2label,
            backbone_name_or_path=backbone_name(backbone),
            backbone_revision=revision,
            **config_fields,
        )
        model = cls._from_config(config, dtype=dtype)
        adopt_backbone(model, source)
        return model.eval()

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
            ValueError: the configuration asks for other prompts than the checkpoint has, or the backbone's weights are
                not those that the prompts were trained with.
            OSError: the checkpoint or its backbone cannot be found.
        """
        path = pretrained_model_name_or_path
        if path is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        hub = {key: kwargs[key] for key in _HUB_KEYWORDS if key in kwargs}
        with explained_load_errors(path, kwargs.get("revision")):
            if not isinstance(config, PreTrainedConfig):
                config, kwargs = cls.config_class.from_pretrained(config or path, return_unused_kwargs=True, **kwargs)
                kwargs |= hub
            saved = cls.config_class.from_pretrained(path, **hub)
            check_same_prompts(config, saved, path)
            if saved.backbone_in_checkpoint:
                return super().from_pretrained(path, *model_args, config=config, **kwargs)
        state_dict = complete_state_dict(path, config, backbone, variant=kwargs.pop("variant", None), **hub)
        config.backbone_in_checkpoint = True
        kwargs = {key: value for key, value in kwargs.items() if key not in hub}
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
            with self.only_prompts(prompts):
                return self.save_pretrained(save_directory, *args, include_backbone=include_backbone, **kwargs)
        if not include_backbone:
            kwargs["state_dict"] = prompts_state_dict(self, kwargs.get("state_dict"))
        # These two describe the saved folder, not the model in memory.
        self.config.backbone_in_checkpoint = include_backbone
        self.config.custom_pipelines = PIPELINES
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.config.backbone_in_checkpoint = True
            del self.config.custom_pipelines

    def push_to_hub(
        self,
        repo_id: str,
        *,
        image_processor: BaseImageProcessor | None = None,
        model_card: ModelCard | None = None,
        include_backbone: bool = True,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload Prompt-CAM",
    ) -> CommitInfo:
        """Publish the model with its code, image processor and card, in one commit.

        Args:
            repo_id: The repository, as owner/name; it is made if need be.
            image_processor: None: that of the folder or repository that the model was loaded from.
            model_card: Has a licence. None: that of the folder or repository that the model was loaded from.
            include_backbone: As in `save_pretrained`.
            private: True: make a new repository private, and refuse one that is public.
            token: None: the machine's login.
            revision: The branch; it is made if need be. None: main.
            commit_message: First line of the commit.

        Raises:
            ValueError: image processor, card, licence or class names are missing, or the Hub refuses the files.
            PermissionError: there is no token, or it has not the right to write there.
            OSError: the Hub cannot be reached, or failed; there is no commit then.
        """
        with TemporaryDirectory() as folder:
            image_processor = image_processor or image_processor_of(self)
            save_repository(Path(folder), self, image_processor, model_card or card_of(self), include_backbone)
            return upload_repository(
                Path(folder), repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's patch embedding."""
        return self.backbone.get_input_embeddings()

    def train(self, mode: bool = True) -> "PromptCAMForImageClassification":
        """Set the mode of prompts and classifier; a frozen backbone always stays frozen and in evaluation mode.

        Of several prompt sets, the one in use is trained.
        """
        super().train(mode)
        if self.config.freeze_backbone:
            # Loading a checkpoint puts new, trainable parameters in place of the frozen ones, then calls eval().
            self.backbone.requires_grad_(False).eval()
            self.stored_prompts.requires_grad_(False)
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_trait_maps: bool = False,
        trait_classes: torch.LongTensor | Literal["all"] | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        interpolate_pos_encoding: bool = False,
        prefix_hidden_states: torch.Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
    ) -> PromptCAMOutput:
        """Score images, and show where each class prompt looks.

        Args:
            pixel_values: (batch, channels, height, width), from the image processor.
            labels: (batch,), class numbers; with them the loss is returned.
            output_trait_maps: Return the last layer's attention, of the classes in `trait_classes`.
            trait_classes: None: the predicted class. "all": every class. A tensor: these classes, (batch, k) or, the
                same for every image, (k,).
            output_attentions: Return the attention of every layer, and the trait maps of all classes.
            output_hidden_states: Return the hidden states between the layers.
            interpolate_pos_encoding: Adapt the position encoding to images of another size than the backbone's.
            prefix_hidden_states: (batch, tokens, hidden_size) from `encode_prefix`, in place of pixel_values.
            patch_grid: Rows and columns of patches in prefix_hidden_states, where they are not the backbone's own.

        Raises:
            ValueError: an argument's shape, size or class number is wrong.
        """
        hidden_states: list[torch.Tensor] | None = [] if output_hidden_states else None
        attentions: list[torch.Tensor] | None = [] if output_attentions else None
        if (pixel_values is None) == (prefix_hidden_states is None):
            raise ValueError("Give either pixel_values or prefix_hidden_states.")
        if pixel_values is not None:
            grid = self._grid_of(pixel_values)
            tokens = self._embed(pixel_values, interpolate_pos_encoding)
            first_layer = 0
        else:
            tokens, grid = self._check_prefix(prefix_hidden_states, patch_grid)
            first_layer = self.config.fixed_prefix_layers
        state = self._run_inner_layers(tokens, grid, first_layer, hidden_states, attentions)
        outputs, weights = self._run_last_layer(state, output_attentions)
        logits = self.score(outputs)
        if attentions is not None:
            attentions.append(weights)
        if hidden_states is not None:
            hidden_states.append(outputs)
        trait_maps = None
        if output_attentions:
            trait_classes = find_trait_classes("all", logits)
            trait_maps = patch_attention(weights, grid)
        elif output_trait_maps or trait_classes is not None:
            trait_classes = find_trait_classes(trait_classes, logits)
            trait_maps = self.trait_maps(state, trait_classes)
        return PromptCAMOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device)),
            logits=logits,
            hidden_states=None if hidden_states is None else tuple(hidden_states),
            attentions=None if attentions is None else tuple(attentions),
            trait_maps=trait_maps,
            trait_classes=trait_classes,
        )

    @torch.no_grad()
    def encode_prefix(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """What the layers before the first prompt compute, a fixed function of the image; without gradient.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.

        Returns:
            Hidden states (batch, tokens, hidden_size), for `forward(prefix_hidden_states=...)`.

        Raises:
            ValueError: prompts enter the first layer, or the backbone is trained, so that nothing is fixed.
        """
        if not self.config.fixed_prefix_layers or not self.config.freeze_backbone:
            raise ValueError(
                "There is no fixed prefix: "
                + (
                    "prompts enter the first layer; set first_prompt_layer, or num_agnostic_prompts=0 with a later "
                    "class_prompt_layer."
                    if self.config.freeze_backbone
                    else "the backbone is trained too (freeze_backbone=False)."
                )
            )
        tokens = self._embed(pixel_values, interpolate_pos_encoding)
        return self._run_first_layers(tokens, self._grid_of(pixel_values), self.config.fixed_prefix_layers)

    def last_layer_state(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> LastLayerState:
        """Run the network up to the last layer's attention; what follows is cheap and can be asked many questions.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.
        """
        tokens = self._embed(pixel_values, interpolate_pos_encoding)
        return self._run_inner_layers(tokens, self._grid_of(pixel_values), 0, None, None)

    def last_layer_logits(self, state: LastLayerState) -> torch.Tensor:
        """The class scores (batch, num_labels)."""
        return self.score(self._run_last_layer(state, output_attentions=False)[0])

    def trait_maps(self, state: LastLayerState, classes: torch.LongTensor) -> torch.Tensor:
        """Attention of the prompts of `classes` (batch, k) to the patches, (batch, k, heads, rows, cols), float32."""
        weights = attention_weights(self.class_queries(state, classes), state.projections.keys)
        return patch_attention(weights, state.grid)

    def class_queries(self, state: LastLayerState, classes: torch.LongTensor) -> torch.Tensor:
        """The last layer's queries of the prompts of `classes` (batch, k), (batch, heads, k, head size)."""
        batch, heads, _, head_size = state.projections.keys.shape
        queries = state.projections.queries.expand(batch, -1, -1, -1)
        return queries.gather(2, classes[:, None, :, None].expand(-1, heads, -1, head_size))

    def score(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class scores from the last layer's outputs (paper: s[c] = w . z_N^c), (..., hidden_size) to (...)."""
        return self.classifier(final_norm(self.backbone)(outputs)).squeeze(-1)

    @property
    def _num_layers(self) -> int:
        return self.config.backbone_config.num_hidden_layers

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        return grid_size(self.backbone.config, *pixel_values.shape[-2:])

    def _embed(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
        return embed(self.backbone, pixel_values.to(self.class_prompts.dtype), interpolate_pos_encoding)

    def _rotary(self, tokens: torch.Tensor, grid: tuple[int, int]) -> RotaryPositions | None:
        return rotary_positions(self.backbone, tokens, grid, self.config.num_prefix_tokens)

    def _check_prefix(
        self, tokens: torch.Tensor, grid: tuple[int, int] | None
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        if grid is None:
            grid = grid_size(self.backbone.config, *image_size(self.backbone.config))
        expected = self.config.num_prefix_tokens + grid[0] * grid[1]
        if tokens.shape[1] != expected:
            raise ValueError(
                f"prefix_hidden_states hold {tokens.shape[1]} tokens an image; a grid of {grid[0]}x{grid[1]} patches "
                f"makes {expected}. Give the grid as patch_grid=(rows, columns)."
            )
        return tokens.to(self.class_prompts.dtype), grid

    def _run_first_layers(self, tokens: torch.Tensor, grid: tuple[int, int], count: int) -> torch.Tensor:
        """Hidden states (batch, tokens, hidden_size) after the first layers, none of which class prompts enter."""
        rotary = self._rotary(tokens, grid)
        for index in range(count):
            tokens, _ = self._run_layer(index, tokens, self._agnostic_memory(index, tokens.device), rotary, False)
        return tokens

    def _run_inner_layers(
        self,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        first_layer: int,
        hidden_states: list[torch.Tensor] | None,
        attentions: list[torch.Tensor] | None,
    ) -> LastLayerState:
        """All layers up to the last one's attention, recording into the two lists where they are given."""
        config, num_labels = self.config, self.config.num_labels
        token_rotary = rotary = self._rotary(tokens, grid)
        hidden = tokens
        if hidden_states is not None:
            hidden_states.append(hidden)
        for index in range(first_layer, self._num_layers - 1):
            memory = None
            if index == config.class_layer:  # not Deep: class prompts travel with the tokens from here on
                prompts = self._drop_prompts(self.class_prompts).to(hidden.device, hidden.dtype)
                hidden = torch.cat((prompts.expand(hidden.shape[0], -1, -1), hidden), dim=1)
                rotary = rotary and rotary._replace(first_patch=rotary.first_patch + num_labels)
            else:
                memory = self._agnostic_memory(index, hidden.device)
            hidden, weights = self._run_layer(index, hidden, memory, rotary, attentions is not None)
            if hidden_states is not None:
                hidden_states.append(hidden)
            if attentions is not None:
                # Prompts stand first everywhere; here they were the memory, behind the queries.
                attentions.append(weights if memory is None else weights.roll(memory.shape[1], dims=-1))
        if config.class_layer < self._num_layers - 1:
            class_prompts, tokens = hidden.split((num_labels, hidden.shape[1] - num_labels), dim=1)
        else:
            class_prompts, tokens = self._drop_prompts(self.class_prompts).to(hidden.device).unsqueeze(0), hidden
        last_layer, num_heads = backbone_layers(self.backbone)[-1], self.backbone.config.num_attention_heads
        projections = project(last_layer, num_heads, class_prompts, tokens, memory_rotary=token_rotary)
        return LastLayerState(class_prompts, projections, grid)

    def _run_last_layer(
        self, state: LastLayerState, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Outputs (batch, num_labels, hidden_size) of the class prompts; their attention, or None."""
        layer = backbone_layers(self.backbone)[-1]
        contexts, weights = attend(layer, state.projections, self.backbone.config, output_attentions)
        return finish_layer(layer, state.class_prompts, contexts, self._drop_path_rate(self._num_layers - 1)), weights

    def _run_layer(
        self,
        index: int,
        hidden: torch.Tensor,
        memory: torch.Tensor | None,
        rotary: RotaryPositions | None,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, rate = backbone_layers(self.backbone)[index], self._drop_path_rate(index)
        arguments = (layer, self.backbone.config, hidden, memory, rotary, None, rate, output_attentions)
        if self.gradient_checkpointing and self.training:
            return self._gradient_checkpointing_func(run_layer, *arguments)
        return run_layer(*arguments)

    def _agnostic_prompts_of(self, index: int) -> torch.Tensor | None:
        """The agnostic prompts (prompts, hidden_size) that enter a layer."""
        first = self.config.fixed_prefix_layers
        return self.agnostic_prompts[index - first] if first <= index < self.config.class_layer else None

    def _agnostic_memory(self, index: int, device: torch.device) -> torch.Tensor | None:
        prompts = self._agnostic_prompts_of(index)
        return None if prompts is None else self._drop_prompts(prompts).to(device).unsqueeze(0)

    def _drop_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompt dropout: prompts have no batch axis yet, so one mask serves the whole batch."""
        return nn.functional.dropout(prompts, self.config.prompt_dropout, self.training)

    def _drop_path_rate(self, index: int) -> float:
        """Stochastic depth grows linearly with depth; the prefix that no prompt enters stays a fixed function."""
        if not self.training or index < self.config.fixed_prefix_layers:
            return 0.0
        return self.config.drop_path_rate * index / max(self._num_layers - 1, 1)


__all__ = [
    "LastLayerState",
    "PromptCAMForImageClassification",
    "PromptCAMOutput",
    "PromptCAMPreTrainedModel",
]
