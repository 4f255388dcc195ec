# SPDX-License-Identifier: MIT
"""What do the same prompts do when the classifier reads CLS, as in visual prompt tuning?

VPT (Jia et al., *Visual Prompt Tuning*, ECCV 2022, section 3.2): learned prompts stand beside the tokens of a frozen
vision transformer, and a linear layer with one output a class is trained on CLS after the final norm.

- Deep: fresh prompts in every layer, whose outputs are dropped after it. So they are memory, keys and values only, as
  the class-agnostic prompts of a Prompt-CAM are: exact, the last layer included, since nothing reads their outputs.
- Shallow: prompts enter one layer and their outputs travel to the last one.

Without prompts it is a linear probe on CLS. A family without CLS (SigLIP) is read at the mean of its patches.
"""

import copy
import math
import os
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from prompt_cam_hf.modeling.backbone_prompt_cam import (
    backbone_layers,
    build_backbone,
    embed,
    final_norm,
    grid_size,
    image_size,
    patch_size,
    rotary_positions,
    run_layer,
    vision_config,
)
from prompt_cam_hf.modeling.checkpoint_prompt_cam import adopt_backbone, backbone_name, load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import check_backbone_family

from .backbone import num_prefix_tokens


@strict
class VPTConfig(PreTrainedConfig):
    """Configuration of a VPT: a frozen vision transformer and the prompts beside its tokens.

    Layers are numbered from 0 at the front.

    Args:
        backbone_config: The vision model's own configuration, of a family in `SUPPORTED_BACKBONES`.
        backbone_name_or_path: Hub id or folder that the backbone was loaded from.
        backbone_revision: Branch, tag or commit of that repository.
        backbone_fingerprint: Digest of the backbone's weights, see `fingerprint_backbone`.
        num_prompts: Prompts a layer (Deep) or in all (Shallow); 0 is a linear probe on CLS.
        deep: Fresh prompts in every layer from `first_prompt_layer`, instead of prompts that enter there and travel.
        first_prompt_layer: First layer that prompts enter.
        prompt_dropout: Probability of dropping a prompt's element in training, one mask for the whole batch.
        drop_path_rate: Stochastic depth of the last layer; the first has none and it grows linearly between.

    Raises:
        ValueError: a field is out of range, or there is no `backbone_config`.
    """

    model_type = "visual_prompt_tuning"
    sub_configs = {"backbone_config": AutoConfig}  # noqa: RUF012 - transformers reads it off the class
    has_no_defaults_at_init = True

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_fingerprint: str | None = None
    num_prompts: int = 10
    deep: bool = True
    first_prompt_layer: int = 0
    prompt_dropout: float = 0.0
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.backbone_config is None:
            raise ValueError("VPTConfig needs backbone_config, the configuration of the vision transformer.")
        if isinstance(self.backbone_config, dict):
            check_backbone_family(self.backbone_config.get("model_type", ""))
            self.backbone_config = AutoConfig.for_model(**self.backbone_config)
        self.backbone_config = vision_config(self.backbone_config)
        super().__post_init__(**kwargs)
        layers = self.backbone_config.num_hidden_layers
        if not 0 <= self.first_prompt_layer < layers:
            raise ValueError(
                f"first_prompt_layer={self.first_prompt_layer} is not a layer of this backbone: use 0 to {layers - 1}."
            )
        if self.num_prompts < 0:
            raise ValueError(f"num_prompts={self.num_prompts} must be 0 or more.")
        for field in ("prompt_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 0 and below 1.")

    @property
    def fixed_prefix_layers(self) -> int:
        """How many of the first layers no prompt enters (at most all but the last): a fixed function of the image."""
        return self.first_prompt_layer if self.num_prompts else self.backbone_config.num_hidden_layers - 1


class VPTForImageClassification(PreTrainedModel):
    """A frozen vision transformer with prompts, and a linear classifier on CLS.

    Start from a pre-trained backbone with `from_backbone`, load a trained model with `from_pretrained`.
    """

    config_class = VPTConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = []  # noqa: RUF012 - the backbone names its own
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: VPTConfig):
        config = copy.deepcopy(config)  # configs are shared objects
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        hidden_size = config.backbone_config.hidden_size
        self.prompts = None
        if config.num_prompts:
            layers = config.backbone_config.num_hidden_layers - config.first_prompt_layer if config.deep else 1
            self.prompts = nn.Parameter(torch.empty(layers, config.num_prompts, hidden_size))
        self.classifier = nn.Linear(hidden_size, config.num_labels)
        self.gradient_checkpointing = False
        self.backbone.requires_grad_(False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """VPT's own initialisation of prompts, uniform in a range set by the patch size; a small classifier."""
        if isinstance(module, VPTForImageClassification):
            backbone = module.config.backbone_config
            if module.prompts is not None:
                fan_in = backbone.num_channels * math.prod(patch_size(backbone))
                bound = math.sqrt(6 / (fan_in + backbone.hidden_size))
                init.uniform_(module.prompts, -bound, bound)
            init.trunc_normal_(module.classifier.weight, std=0.02)
            init.zeros_(module.classifier.bias)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        *,
        id2label: dict[int, str],
        revision: str | None = None,
        **config_fields: Any,
    ) -> "VPTForImageClassification":
        """A VPT with new, untrained prompts on a pre-trained vision transformer, in float32.

        Args:
            backbone: A Hub id, a folder, or a loaded transformers model, which is copied and left as it is.
            id2label: Class names, numbered from 0.
            revision: Branch, tag or commit of the Hub repository.
            **config_fields: Fields of `VPTConfig`.

        Raises:
            ValueError: the backbone's family is not supported, or a field is wrong.
            OSError: the backbone cannot be found.
        """
        source = load_backbone(backbone, revision=revision)
        config = VPTConfig(
            backbone_config=source.config,
            id2label=id2label,
            backbone_name_or_path=backbone_name(backbone),
            backbone_revision=revision,
            **config_fields,
        )
        model = cls._from_config(config, dtype=torch.float32)
        adopt_backbone(model, source)
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's patch embedding."""
        return self.backbone.get_input_embeddings()

    def train(self, mode: bool = True) -> "VPTForImageClassification":
        """Set the mode of prompts and classifier; the backbone always stays frozen and in evaluation mode."""
        super().train(mode)
        # Loading a checkpoint puts new, trainable parameters in place of the frozen ones, then calls eval().
        self.backbone.requires_grad_(False).eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_attentions: bool = False,
        interpolate_pos_encoding: bool = False,
        prefix_hidden_states: torch.Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
    ) -> ImageClassifierOutput:
        """Score images.

        Args:
            pixel_values: (batch, channels, height, width), from the image processor.
            labels: (batch,), class numbers; with them the loss (cross-entropy) is returned.
            output_attentions: Return the attention of every layer that runs, (batch, heads, queries, tokens), float32.
                Tokens stand in the order prompts, CLS and other prefix tokens, patches; queries are the same without
                the prompts of a Deep VPT.
            interpolate_pos_encoding: Adapt the position encoding to images of another size than the backbone's.
            prefix_hidden_states: (batch, tokens, hidden_size) from `encode_prefix`, in place of pixel_values.
            patch_grid: Rows and columns of patches in prefix_hidden_states, where they are not the backbone's own.

        Raises:
            ValueError: the images have the wrong size, or there are not exactly one of the two inputs.
        """
        if (pixel_values is None) == (prefix_hidden_states is None):
            raise ValueError("Give either pixel_values or prefix_hidden_states.")
        if pixel_values is not None:
            grid = grid_size(self.backbone.config, *pixel_values.shape[-2:])
            tokens, first_layer = embed(self.backbone, pixel_values.to(self.dtype), interpolate_pos_encoding), 0
        else:
            grid = patch_grid or grid_size(self.backbone.config, *image_size(self.backbone.config))
            tokens, first_layer = prefix_hidden_states.to(self.dtype), self.config.fixed_prefix_layers
        tokens, attentions = self._run_layers(tokens, grid, first_layer, self._num_layers, output_attentions)
        tokens = final_norm(self.backbone)(tokens[:, -self._num_prefix_tokens - math.prod(grid) :])
        logits = self.classifier(tokens[:, 0] if self._num_prefix_tokens else tokens.mean(dim=1))
        return ImageClassifierOutput(
            loss=None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device)),
            logits=logits,
            attentions=attentions if output_attentions else None,
        )

    @torch.no_grad()
    def encode_prefix(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """What the layers before the first prompt compute, a fixed function of the image; without gradient.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.

        Returns:
            Hidden states (batch, tokens, hidden_size), for `forward(prefix_hidden_states=...)`.
        """
        grid = grid_size(self.backbone.config, *pixel_values.shape[-2:])
        tokens = embed(self.backbone, pixel_values.to(self.dtype), interpolate_pos_encoding)
        return self._run_layers(tokens, grid, 0, self.config.fixed_prefix_layers, False)[0]

    @property
    def _num_layers(self) -> int:
        return self.config.backbone_config.num_hidden_layers

    @property
    def _num_prefix_tokens(self) -> int:
        return num_prefix_tokens(self.backbone.config)

    def _run_layers(
        self, tokens: torch.Tensor, grid: tuple[int, int], first: int, end: int, output_attentions: bool
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Layers `first` to `end` (without it); prompts that travel come out in front of the tokens."""
        config, layers = self.config, backbone_layers(self.backbone)
        rotary = rotary_positions(self.backbone, tokens, grid, self._num_prefix_tokens)
        hidden, attentions = tokens, []
        for index in range(first, end):
            memory = None
            if self.prompts is not None and config.deep and index >= config.first_prompt_layer:
                memory = self._drop_prompts(self.prompts[index - config.first_prompt_layer]).to(hidden.device)[None]
            elif self.prompts is not None and not config.deep and index == config.first_prompt_layer:
                prompts = self._drop_prompts(self.prompts[0]).to(hidden.device)
                hidden = torch.cat((prompts.expand(len(hidden), -1, -1), hidden), dim=1)
                rotary = rotary and rotary._replace(first_patch=rotary.first_patch + config.num_prompts)
            rate = self._drop_path_rate(index)
            arguments = (layers[index], self.backbone.config, hidden, memory, rotary, None, rate, output_attentions)
            if self.gradient_checkpointing and self.training:
                hidden, weights = self._gradient_checkpointing_func(run_layer, *arguments)
            else:
                hidden, weights = run_layer(*arguments)
            if output_attentions:
                # Prompts stand first everywhere; in a Deep VPT they were the memory, behind the queries.
                attentions.append(weights if memory is None else weights.roll(memory.shape[1], dims=-1))
        return hidden, tuple(attentions)

    def _drop_prompts(self, prompts: torch.Tensor) -> torch.Tensor:
        """Prompt dropout: prompts have no batch axis yet, so one mask serves the whole batch."""
        return nn.functional.dropout(prompts, self.config.prompt_dropout, self.training)

    def _drop_path_rate(self, index: int) -> float:
        """Stochastic depth grows linearly with depth; the prefix that no prompt enters stays a fixed function."""
        if not self.training or index < self.config.fixed_prefix_layers:
            return 0.0
        return self.config.drop_path_rate * index / max(self._num_layers - 1, 1)


__all__ = ["VPTConfig", "VPTForImageClassification"]
