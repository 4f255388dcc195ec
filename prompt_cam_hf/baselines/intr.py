# SPDX-License-Identifier: MIT
"""INTR: a DETR whose decoder queries are classes, and whose cross-attention shows why.

INTR (Paul et al., *A Simple Interpretable Transformer for Fine-Grained Image Classification and Analysis*, ICLR 2024,
arXiv 2311.04157), as its official code computes it. An encoder works on the places of a feature map. A decoder has one
learned query for each class; its targets start at zero. After the final norm, one vector shared by all classes scores
each query's output, as in a Prompt-CAM. The heads' cross-attention in the last decoder layer are the maps.

The layers are transformers' own of DETR. Two things differ from transformers' DETR: sine positions enter the encoder
only, so that keys and values of the decoder are the encoder's output as it is; and nothing is dropped from the
features before the encoder.

The feature map is that of DETR's ResNet, or the patches of a vision transformer of any supported family.
"""

import copy
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ResNetBackbone
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.detr.modeling_detr import (
    DetrCrossAttention,
    DetrDecoderLayer,
    DetrEncoderLayer,
    DetrSelfAttention,
    DetrSinePositionEmbedding,
    replace_batch_norm,
)
from transformers.utils.generic import can_return_tuple

from prompt_cam_hf.modeling.backbone_prompt_cam import Projections, attention_weights, build_backbone, final_norm
from prompt_cam_hf.modeling.base_prompt_cam import LayerRecord, MapLayout, PromptedModel
from prompt_cam_hf.modeling.checkpoint_prompt_cam import backbone_name, split_hub_keywords
from prompt_cam_hf.modeling.configuration_prompt_cam import num_prefix_tokens
from prompt_cam_hf.modeling.outputs_prompt_cam import (
    LastLayerReader,
    LastLayerState,
    PromptCAMOutput,
    find_trait_classes,
)

from .detr_weights import DETR_ONLY, fill, is_detr, read_detr
from .intr_config import RESNET, INTRConfig

# Of DETR's ResNet, what is never trained.
_FROZEN_STAGES = ("embedder.", "encoder.stages.0.")
# Halvings of height and width before the first stage, of which each later one makes one more.
_STEM_HALVINGS = 2


class INTRForImageClassification(LastLayerReader, PromptedModel):
    """A feature map, an encoder on it, and a decoder with a query for each class: scores, and maps that explain them.

    Start with `from_backbone`, load a trained model with `from_pretrained`. Explained by the same functions as a
    Prompt-CAM: what is called a prompt there is a class's query here.
    """

    config_class = INTRConfig
    base_model_prefix = "intr"
    config: INTRConfig

    def __init__(self, config: INTRConfig):
        config = copy.deepcopy(config)  # configs are shared objects
        super().__init__(config)
        self._add_backbone(config.vision)
        channels = config.vision.hidden_sizes[-1] if config.is_on_resnet else config.vision.hidden_size
        self.input_projection = nn.Conv2d(channels, config.d_model, kernel_size=1)
        self.position_embedding = DetrSinePositionEmbedding(config.d_model // 2, normalize=True)
        layer_config: Any = self.config  # whose fields have the names that DETR's layers read
        self.encoder_layers = nn.ModuleList(DetrEncoderLayer(layer_config) for _ in range(config.encoder_layers))
        self.query_position_embeddings = nn.Embedding(len(config.id2label or ()), config.d_model)
        self.decoder_layers = nn.ModuleList(DetrDecoderLayer(layer_config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.d_model)
        self.classifier = nn.Linear(config.d_model, 1)
        self.gradient_checkpointing = False
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """DETR's initialisation: Xavier in encoder and decoder, and PyTorch's own elsewhere."""
        if isinstance(module, DetrSelfAttention | DetrCrossAttention):
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.o_proj):
                # The official code holds the first three as one matrix, of three times the height.
                init.xavier_uniform_(projection.weight, gain=1.0 if projection is module.o_proj else 0.5**0.5)
                init.zeros_(projection.bias)
        elif isinstance(module, DetrEncoderLayer | DetrDecoderLayer):
            for linear in (module.mlp.fc1, module.mlp.fc2):
                init.xavier_uniform_(linear.weight)
        elif isinstance(module, INTRForImageClassification):
            init.normal_(module.query_position_embeddings.weight)
            for fresh in (module.input_projection, module.classifier):
                init.kaiming_uniform_(fresh.weight, a=5**0.5)
        else:
            super()._init_weights(module)

    def _build_backbone(self, config: PreTrainedConfig) -> PreTrainedModel:
        if config.model_type != RESNET:
            return build_backbone(config)
        # It has no attention, so it goes with any implementation of it.
        backbone = ResNetBackbone._from_config(config, attn_implementation="eager")
        backbone._supports_sdpa = True
        with torch.no_grad():
            replace_batch_norm(backbone)
        return backbone

    @classmethod
    def from_backbone(
        cls,
        backbone: str | os.PathLike | PreTrainedModel,
        *,
        id2label: dict[int, str],
        dtype: torch.dtype | str = torch.float32,
        **kwargs: Any,
    ) -> "INTRForImageClassification":
        """An INTR with new queries, on a DETR or on a vision transformer.

        Args:
            backbone: A vision transformer as in `PromptedModel.from_backbone`, whose encoder and decoder are new; or
                the Hub id or folder of a DETR with a ResNet (facebook/detr-resnet-50), whose weights are all taken
                but for its queries and heads. timm is not needed.
            id2label: Class names, numbered from 0.
            dtype: As in `PromptedModel.from_backbone`.
            **kwargs: The Hub keywords of `from_pretrained`, and fields of the configuration. A DETR's ResNet is
                trained too, unless freeze_backbone=True is given.

        Raises:
            ValueError: the backbone is of another kind, its weights do not fit, or a field is wrong.
            OSError: it cannot be found.
        """
        hub, fields = split_hub_keywords(kwargs)
        if isinstance(backbone, PreTrainedModel) or not is_detr(backbone, **hub):
            return super().from_backbone(backbone, id2label=id2label, dtype=dtype, **kwargs)
        sizes, tensors = read_detr(backbone, **hub)
        if strange := sorted(field for field in fields.keys() & sizes if fields[field] != sizes[field]):
            raise ValueError(f"{strange[0]}={fields[strange[0]]} is not {sizes[strange[0]]}, as {backbone} has it.")
        place = {"name_or_path": backbone_name(backbone), "revision": hub.get("revision")}
        place["subfolder"] = hub.get("subfolder") or None
        config = INTRConfig(
            **{"freeze_backbone": False, **sizes, **fields},
            **{f"backbone_{key}": value for key, value in place.items()},
            id2label=id2label,
        )
        model = cls._from_config(config, dtype=torch.float32 if dtype == "auto" else dtype)
        try:
            fill(model, tensors, DETR_ONLY, ("query_position_embeddings.", "classifier."))
        except ValueError as error:
            raise ValueError(f"{backbone} cannot be used as a DETR: {error}") from error
        return model.eval()

    def train(self, mode: bool = True) -> "INTRForImageClassification":
        """Set the mode, as in `PromptedModel`; of a ResNet that is trained, the first stages stay as they are."""
        super().train(mode)
        if self.config.is_on_resnet:
            for name, parameter in self.backbone.named_parameters():
                if name.startswith(_FROZEN_STAGES):
                    parameter.requires_grad_(False)
        return self

    @property
    def num_trait_heads(self) -> int:
        """The heads of the last decoder layer, each of which has a map of its own."""
        return self.config.decoder_attention_heads

    def map_layout(self, height: int, width: int) -> MapLayout:
        """How the maps lie on images of so many pixels; on a ResNet they fill the image, as officially."""
        if not self.config.is_on_resnet:
            return super().map_layout(height, width)
        vision = self.config.vision
        stride = 2 ** (_STEM_HALVINGS + len(vision.depths) - (not vision.downsample_in_first_stage))
        rows, cols = -(-height // stride), -(-width // stride)
        return MapLayout((rows, cols), (height / rows, width / cols))

    def prepared(self) -> AbstractContextManager:
        """A `with` block for evaluation, as a Prompt-CAM has it; here nothing can be computed beforehand."""
        return nullcontext()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_trait_maps: bool = False,
        trait_classes: torch.Tensor | Literal["all"] | None = None,
        interpolate_pos_encoding: bool = False,
        prefix_hidden_states: torch.Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
        pixel_mask: torch.Tensor | None = None,
    ) -> PromptCAMOutput:
        """Score images, and show where each class's query looks.

        Args:
            pixel_values: (batch, channels, height, width), from the image processor.
            labels: (batch,), class numbers; with them the loss (cross-entropy) is returned.
            output_trait_maps: Return the last decoder layer's cross-attention, of the classes in `trait_classes`; in
                evaluation mode.
            trait_classes: As in a Prompt-CAM's `forward`.
            interpolate_pos_encoding: Adapt a vision transformer to images of another size than it was trained on.
            prefix_hidden_states: (batch, tokens, hidden_size) from `encode_prefix`, in place of pixel_values.
            patch_grid: Rows and columns of patches in prefix_hidden_states, where they are not the backbone's own.
            pixel_mask: (batch, height, width), 1 where pixels are an image's and 0 where they fill up the batch; for a
                ResNet.

        Raises:
            ValueError: an argument's shape, size or class number is wrong.
        """
        if output_trait_maps or trait_classes is not None:
            if prefix_hidden_states is not None or pixel_values is None:
                raise ValueError("Trait maps are made from pixel_values.")
            state = self.last_layer_state(pixel_values, interpolate_pos_encoding, pixel_mask)
            logits = self.last_layer_logits(state)
            classes = find_trait_classes(trait_classes, logits)
            maps = self.trait_maps(state, classes)
        else:
            features = self._find_features(pixel_values, interpolate_pos_encoding, prefix_hidden_states, patch_grid)
            encoded, mask = self._encode(features, pixel_mask)
            logits = self.score(self._decode(encoded, mask, len(self.decoder_layers)))
            classes = maps = None
        return PromptCAMOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            trait_maps=maps,
            trait_classes=classes,
        )

    def encode_prefix(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """What a frozen vision transformer makes of images, as in `PromptedModel.encode_prefix`.

        Raises:
            ValueError: the backbone is trained, or a ResNet, so that nothing is kept.
        """
        if not self.config.fixed_prefix_layers:
            raise ValueError("There is no fixed prefix: the backbone is a ResNet, or it is trained too.")
        return super().encode_prefix(pixel_values, interpolate_pos_encoding)

    def last_layer_state(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        pixel_mask: torch.Tensor | None = None,
    ) -> LastLayerState:
        """Run the network, in evaluation mode, and keep what scores, maps and rankings are made from.

        Args:
            pixel_values: (batch, channels, height, width).
            interpolate_pos_encoding: As in `forward`.
            pixel_mask: As in `forward`.

        Raises:
            ValueError: images are filled up to a common size, so that their maps would be of different sizes.
        """
        if pixel_mask is not None and not pixel_mask.all():
            raise ValueError("Images of one size are needed for maps, and these are filled up; give them one by one.")
        features = self._find_features(pixel_values, interpolate_pos_encoding)
        encoded, _ = self._encode(features)
        layer, positions = cast(Any, self.decoder_layers[-1]), self._query_positions(len(encoded))
        hidden = self._decode(encoded, None, len(self.decoder_layers) - 1)
        attended, _ = layer.self_attn(hidden, position_embeddings=positions)
        hidden = layer.self_attn_layer_norm(hidden + attended)
        projections = Projections(
            *(
                projection(states).unflatten(-1, (self.num_trait_heads, -1)).transpose(1, 2)
                for projection, states in (
                    (layer.encoder_attn.q_proj, hidden + positions),
                    (layer.encoder_attn.k_proj, encoded),
                    (layer.encoder_attn.v_proj, encoded),
                )
            )
        )
        weights = attention_weights(projections.queries, projections.keys).to(encoded.dtype)
        outputs = self.finish_last_layer(hidden, (weights @ projections.values).transpose(1, 2))
        rows, cols = features.shape[-2:]
        return LastLayerState(hidden, projections, outputs, (rows, cols))

    def finish_last_layer(self, prompts: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
        """The last decoder layer after its cross-attention, in evaluation mode.

        Args:
            prompts: (batch, rows, hidden_size), classes after the layer's self-attention and its norm.
            contexts: (batch, rows, heads, head size), what each head of the cross-attention hands on.

        Returns:
            (batch, rows, hidden_size), the layer's output, for `score`.
        """
        layer = cast(Any, self.decoder_layers[-1])
        hidden = layer.encoder_attn_layer_norm(prompts + layer.encoder_attn.o_proj(contexts.flatten(-2)))
        return cast(torch.Tensor, layer.final_layer_norm(hidden + layer.mlp(hidden)))

    def score(self, outputs: torch.Tensor) -> torch.Tensor:
        """Class scores from the last layer's outputs, (..., hidden_size) to (...)."""
        return self.classifier(self.decoder_norm(outputs)).squeeze(-1)

    def _agnostic_prompts_of(self, index: int) -> None:
        """None: there are no prompts in the backbone."""

    def _find_features(
        self,
        pixel_values: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        prefix_hidden_states: torch.Tensor | None = None,
        patch_grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The feature map (batch, channels, rows, cols)."""
        if self.config.is_on_resnet:
            if pixel_values is None:
                raise ValueError("An INTR on a ResNet takes pixel_values.")
            return cast(Any, self.backbone)(pixel_values.to(self.dtype)).feature_maps[-1]
        tokens, grid, first_layer = self._enter(
            pixel_values, interpolate_pos_encoding, prefix_hidden_states, patch_grid
        )
        rotary = self._rotary(tokens, grid)
        tokens = self._run_layers(range(first_layer, self._num_layers), tokens, rotary, LayerRecord())
        patches = final_norm(self.backbone)(tokens)[:, num_prefix_tokens(self.backbone.config) :]
        return patches.transpose(1, 2).unflatten(-1, grid)

    def _encode(
        self, features: torch.Tensor, pixel_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the encoder makes of a feature map, (batch, places, hidden_size), and which places are an image's."""
        places = None
        if pixel_mask is not None and not pixel_mask.all():
            places = nn.functional.interpolate(pixel_mask[None].float(), size=features.shape[-2:])[0].bool()
        positions = self.position_embedding(features.shape, features.device, features.dtype, places)
        positions = positions.flatten(2).transpose(1, 2)
        hidden = self.input_projection(features).flatten(2).transpose(1, 2)
        mask = None if places is None else places.flatten(1)
        # For a fused attention too; None where there is nothing to mask.
        attention_mask = mask if mask is None else create_bidirectional_mask(self.config, hidden, mask)
        for layer in self.encoder_layers:
            hidden = layer(hidden, attention_mask, spatial_position_embeddings=positions)
        return hidden, mask

    def _query_positions(self, batch: int) -> torch.Tensor:
        return self.query_position_embeddings.weight.expand(batch, -1, -1)

    def _decode(self, encoded: torch.Tensor, mask: torch.Tensor | None, num_layers: int) -> torch.Tensor:
        """The classes after the first layers of the decoder, (batch, num_labels, hidden_size)."""
        positions = self._query_positions(len(encoded))
        hidden = torch.zeros_like(positions)
        attention_mask: Any = mask
        if mask is not None:
            attention_mask = create_bidirectional_mask(self.config, hidden, mask, encoder_hidden_states=encoded)
        for layer in self.decoder_layers[:num_layers]:
            # Positions of the keys are none: the official decoder's have none.
            hidden = layer(hidden, None, None, positions, encoded, encoder_attention_mask=attention_mask)
        return hidden


__all__ = ["INTRForImageClassification"]
