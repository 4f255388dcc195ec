# SPDX-License-Identifier: MIT
"""Visual prompt tuning: the same prompts, with a classifier that reads CLS.

VPT (Jia et al., *Visual Prompt Tuning*, ECCV 2022, section 3.2): learned prompts stand beside the tokens of a frozen
vision transformer, and a linear layer with one output a class is trained on CLS after the final norm.

- Deep: fresh prompts in every layer, whose outputs are dropped after it. So they are memory, keys and values only, as
  the class-agnostic prompts of a Prompt-CAM are: exact, the last layer included, since nothing reads their outputs.
- Shallow: prompts enter one layer and their outputs travel to the last one.

Without prompts it is a linear probe on CLS. A family without CLS (SigLIP) is read at the mean of its patches.
"""

import copy
import math
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from prompt_cam_hf.modeling.backbone_prompt_cam import final_norm, vision_config
from prompt_cam_hf.modeling.base_prompt_cam import LayerRecord, PromptedModel, init_prompts
from prompt_cam_hf.modeling.configuration_prompt_cam import check_backbone_family, num_prefix_tokens


@strict
class VPTConfig(PreTrainedConfig):
    """Configuration of a VPT: a frozen vision transformer and the prompts beside its tokens.

    Args:
        backbone_config: The vision model's own configuration, of a family in `SUPPORTED_BACKBONES`.
        backbone_name_or_path: Hub id or folder that the backbone was loaded from.
        backbone_revision: Branch, tag or commit of that repository.
        backbone_subfolder: Where it lies in that repository or folder.
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
    freeze_backbone = True  # always; not a field

    backbone_config: dict | PreTrainedConfig | None = None
    backbone_name_or_path: str | None = None
    backbone_revision: str | None = None
    backbone_subfolder: str | None = None
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
        layers = self.vision.num_hidden_layers
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
    def vision(self) -> PreTrainedConfig:
        """The backbone's configuration."""
        return cast(PreTrainedConfig, self.backbone_config)

    @property
    def fixed_prefix_layers(self) -> int:
        """How many of the first layers no prompt enters (at most all but the last): a fixed function of the image."""
        return self.first_prompt_layer if self.num_prompts else self.vision.num_hidden_layers - 1


class VPTForImageClassification(PromptedModel):
    """A frozen vision transformer with prompts, and a linear classifier on CLS.

    Start from a pre-trained backbone with `from_backbone`, load a trained model with `from_pretrained`.
    """

    config_class = VPTConfig
    base_model_prefix = "backbone"
    config: VPTConfig

    def __init__(self, config: VPTConfig):
        config = copy.deepcopy(config)  # configs are shared objects
        super().__init__(config)
        self._add_backbone(config.vision)
        backbone = self.backbone.config
        self.prompts: nn.Parameter | None = None
        if config.num_prompts:
            layers = backbone.num_hidden_layers - config.first_prompt_layer if config.deep else 1
            self.prompts = nn.Parameter(torch.empty(layers, config.num_prompts, backbone.hidden_size))
        self.classifier = nn.Linear(backbone.hidden_size, len(config.id2label or ()))
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of prompts that VPT and Prompt-CAM share."""
        if isinstance(module, VPTForImageClassification):
            init_prompts(module.backbone.config, module.classifier, module.prompts)

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
        record = LayerRecord(attentions=output_attentions)
        tokens, grid, first_layer = self._enter(
            pixel_values, interpolate_pos_encoding, prefix_hidden_states, patch_grid
        )
        rotary = self._rotary(tokens, grid)
        if self.prompts is not None and not self.config.deep:
            entry = self.config.first_prompt_layer
            tokens = self._run_layers(range(first_layer, entry), tokens, rotary, record)
            tokens, rotary = self._join(self.prompts[0], tokens, rotary)
            first_layer = entry
        tokens = self._run_layers(range(first_layer, self._num_layers), tokens, rotary, record)
        prefix_tokens = num_prefix_tokens(self.backbone.config)
        tokens = final_norm(self.backbone)(tokens[:, -prefix_tokens - math.prod(grid) :])
        logits = self.classifier(tokens[:, 0] if prefix_tokens else tokens.mean(dim=1))
        return ImageClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            attentions=record.attentions,
        )

    def _agnostic_prompts_of(self, index: int) -> torch.Tensor | None:
        first = self.config.first_prompt_layer
        return (
            self.prompts[index - first] if self.prompts is not None and self.config.deep and index >= first else None
        )


__all__ = ["VPTConfig", "VPTForImageClassification"]
