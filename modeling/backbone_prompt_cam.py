# SPDX-License-Identifier: MIT
"""Where does each family of vision transformers keep its pieces, and how is one of its layers run with prompts?

Everything that knows a family's inner names is here. The names moved between transformers versions and will move
again, so each piece is looked up by the names it has had; a missing piece is an error, never a silent default.
"""

import copy
import functools
import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_prompt_cam import SUPPORTED_BACKBONES, check_backbone_family

_LAYERS = ("layers", "encoder.layer", "encoder.layers", "layer", "model.layer")
_FINAL_NORM = ("layernorm", "norm", "post_layernorm")
_NORM_1 = ("layernorm_before", "norm1", "layer_norm1")
_NORM_2 = ("layernorm_after", "norm2", "layer_norm2")
_ATTENTION = ("attention.attention", "attention", "self_attn")
_QUERY = ("q_proj", "query")
_KEY = ("k_proj", "key")
_VALUE = ("v_proj", "value")
_OUTPUT = ("attention.o_proj", "attention.output.dense", "self_attn.out_proj")
# What a branch goes through before it is added to the residual stream, in this order, where a family has it.
_AFTER_ATTENTION = (("dropout", "attention.output.dropout"), ("layer_scale1",), ("drop_path",))
_AFTER_MLP = (("dropout",), ("layer_scale2",), ("drop_path",))
# 256 MB in float32.
_SCORES_AT_ONCE = 2**26
_QUERIES_AT_ONCE = 256
# Rows of queries that go through an MLP together: 10,000 queries of 8 images would take a gigabyte there.
_ROWS_AT_ONCE = 8192
# From as many queries on, what they make of each other is computed once, and not for each image.
_MANY_QUERIES = 512


class RotaryPositions(NamedTuple):
    """Rotary embedding of the patches: `cos` and `sin` of shape (patches, head size), and the first patch's index."""

    cos: torch.Tensor
    sin: torch.Tensor
    first_patch: int


class Projections(NamedTuple):
    """Queries (batch or 1, heads, queries, head size), keys and values (batch, heads, tokens, head size)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


class KeysAndValues(NamedTuple):
    """Keys and values (batch or 1, heads, tokens, head size)."""

    keys: torch.Tensor
    values: torch.Tensor


class KnownQueries(NamedTuple):
    """Queries that are the same for all images, and what they make of each other.

    Attributes:
        projections: With a batch of 1.
        contexts: (1, heads, queries, head size), what each query gets from them all.
        logsumexp: (1, heads, queries, 1) in float32, of its scores on them all: how much it attends to them.
    """

    projections: Projections
    contexts: torch.Tensor
    logsumexp: torch.Tensor


class LayerOutput(NamedTuple):
    """What a layer makes of its queries.

    Attributes:
        hidden_states: (batch, queries, hidden size), the updated queries.
        attentions: (batch, heads, queries, tokens) in float32, or None where they were not asked for.
        projections: What the attention was made from.
    """

    hidden_states: torch.Tensor
    attentions: torch.Tensor | None
    projections: Projections


class _OpenLayer(nn.Module):
    """A family's own layer that can also run another function in place of its `forward`."""

    def forward(self, *args: Any, run: Callable | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs) if run is None else run(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class has no name in any module by which pickle could find it.
        return _blank_layer, (family_class(self),), self.__dict__


def family_class(module: nn.Module) -> type[nn.Module]:
    """The class that transformers gave a module of the backbone."""
    mro = type(module).__mro__
    return mro[mro.index(_OpenLayer) + 1] if isinstance(module, _OpenLayer) else mro[0]


@functools.cache
def _opened(layer_class: Any) -> type[nn.Module]:
    # Device maps and wrappers know the layers by the name of their class.
    return type(layer_class.__name__, (_OpenLayer, layer_class), {"__module__": layer_class.__module__})


def _blank_layer(layer_class: Any) -> nn.Module:
    opened = _opened(layer_class)
    return opened.__new__(opened)


def _find(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The first of these (dotted) submodules that the module has."""
    for name in names:
        found: nn.Module | None = module
        for part in name.split("."):
            found = getattr(found, part, None)
            if found is None:
                break
        if found is not None:
            return found
    return None


def _get(module: nn.Module, names: tuple[str, ...]) -> nn.Module:
    found = _find(module, names)
    if found is None:
        raise AttributeError(
            f"{type(module).__name__} of transformers {transformers.__version__} has none of {', '.join(names)}; "
            "this version of the backbone is not supported."
        )
    return found


def backbone_layers(backbone: PreTrainedModel) -> nn.ModuleList:
    """The backbone's transformer layers, first one first."""
    return cast(nn.ModuleList, _get(backbone, _LAYERS))


def final_norm(backbone: PreTrainedModel) -> nn.Module:
    """The norm after the last layer (CLIP's own model applies it to CLS only)."""
    return _get(backbone, _FINAL_NORM)


def patch_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    size = config.patch_size
    return (size, size) if isinstance(size, int) else tuple(size)


def grid_size(config: PreTrainedConfig, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of so many pixels."""
    rows, columns = patch_size(config)
    return height // rows, width // columns


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the images that the backbone was trained on."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def backbone_class(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], dict[str, Any]]:
    """The transformers class of a backbone, and the options that leave its pooler out.

    Raises:
        ValueError: the family is not supported.
    """
    check_backbone_family(config.model_type)
    family = SUPPORTED_BACKBONES[config.model_type]
    return getattr(transformers, family.model), {"add_pooling_layer": False} if family.has_pooler else {}


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights, without the parts that Prompt-CAM never uses (poolers).

    Its layers are the family's own. They also take `run=function`, to run `function(layer, ...)` in place of their
    `forward`: whatever is done with a layer goes through calls of it, so that hooks on it and wrappers see it.

    Raises:
        ValueError: the family is not supported.
    """
    model_class, options = backbone_class(config)
    backbone = model_class._from_config(config, **options)
    for layer in backbone_layers(backbone):
        own_class: Any = type(layer)
        layer.__class__ = _opened(own_class)
    return backbone


def vision_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of the vision part of a configuration (CLIP and SigLIP have two towers), without a pooling head."""
    config = copy.deepcopy(getattr(config, "vision_config", config))
    check_backbone_family(config.model_type)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def fingerprint_backbone(backbone: PreTrainedModel) -> str:
    """SHA-256 over the backbone's weights, in hexadecimal.

    Weights are taken under the names of the family's published checkpoints and rounded to bfloat16, so that neither a
    new transformers version nor loading in another precision (float16 excepted) changes the digest.
    """
    # A model remembers how it was loaded and would revert just that, so the names are asked of a blank one.
    with torch.device("meta"):
        blank = build_backbone(vision_config(backbone.config))
    state_dict = backbone.state_dict()
    weights = {name: state_dict[name] for name in blank.state_dict()}
    digest = hashlib.sha256()
    for name, tensor in sorted(revert_weight_conversion(blank, weights).items()):
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(rounded.shape)}".encode())
        digest.update(rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def embed(backbone: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> torch.Tensor:
    """Images (batch, channels, height, width) to the hidden states (batch, tokens, hidden size) of the first layer.

    Raises:
        ValueError: the images have another size than the backbone's and its position encoding is not interpolated.
    """
    options = {}
    if not SUPPORTED_BACKBONES[backbone.config.model_type].takes_any_size:
        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        expected, got = image_size(backbone.config), tuple(pixel_values.shape[-2:])
        if got != expected and not interpolate_pos_encoding:
            raise ValueError(
                f"pixel_values are {got[0]}x{got[1]} pixels, the backbone expects {expected[0]}x{expected[1]}; resize "
                "them with the image processor, or pass interpolate_pos_encoding=True."
            )
    hidden_states = _get(backbone, ("embeddings",))(pixel_values, **options)
    norm = _find(backbone, ("pre_layrnorm",))
    return hidden_states if norm is None else norm(hidden_states)


def rotary_positions(
    backbone: PreTrainedModel, hidden_states: torch.Tensor, grid: tuple[int, int], num_prefix_tokens: int
) -> RotaryPositions | None:
    """Rotary embedding of a (rows, columns) grid of patches, for the families that use one (DINOv3)."""
    rope = _find(backbone, ("rope_embeddings",))
    if rope is None:
        return None
    rows, columns = patch_size(backbone.config)
    # The module reads nothing but the image's size, type and device.
    image = hidden_states.new_empty((1, 1, 1, 1)).expand(1, 1, grid[0] * rows, grid[1] * columns)
    cos, sin = rope(image)
    return RotaryPositions(cos, sin, num_prefix_tokens)


def _rotate(states: torch.Tensor, rotary: RotaryPositions | None) -> torch.Tensor:
    """Rotate the patches among states of shape (batch, heads, tokens, head size); other tokens stay."""
    if rotary is None:
        return states
    cos, sin, start = rotary
    end = start + cos.shape[-2]
    patches = states[..., start:end, :]
    first, second = patches.chunk(2, dim=-1)
    rotated = patches * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((states[..., :start, :], rotated, states[..., end:, :]), dim=-2)


def first_norm(layer: nn.Module) -> nn.Module:
    """The norm before a layer's attention."""
    return _get(layer, _NORM_1)


def attention_pieces(layer: nn.Module) -> list[nn.Module]:
    """What queries, keys and values of a layer are computed by: norm and projections."""
    attention = _get(layer, _ATTENTION)
    return [first_norm(layer), *(_get(attention, names) for names in (_QUERY, _KEY, _VALUE))]


def _heads(projection: nn.Module, normed: torch.Tensor, num_heads: int) -> torch.Tensor:
    return projection(normed).unflatten(-1, (num_heads, -1)).transpose(1, 2)


def keys_and_values(
    layer: nn.Module, num_heads: int, hidden_states: torch.Tensor, rotary: RotaryPositions | None = None
) -> KeysAndValues:
    """Keys and values of hidden states (batch or 1, tokens, hidden size) in a layer's attention.

    Args:
        layer: One of `backbone_layers`.
        num_heads: Attention heads of the layer.
        hidden_states: The layer's input.
        rotary: Rotary positions, where patches are among the tokens.
    """
    norm, _, key, value = attention_pieces(layer)
    normed = norm(hidden_states)
    return KeysAndValues(_rotate(_heads(key, normed, num_heads), rotary), _heads(value, normed, num_heads))


def project(
    layer: nn.Module,
    num_heads: int,
    queries: torch.Tensor,
    memory: torch.Tensor | KeysAndValues | None = None,
    query_rotary: RotaryPositions | None = None,
    memory_rotary: RotaryPositions | None = None,
    known: KnownQueries | None = None,
    memory_first: bool = False,
) -> Projections:
    """Queries, keys and values of a layer's attention.

    Args:
        layer: One of `backbone_layers`.
        num_heads: Attention heads of the layer.
        queries: Hidden states (batch or 1, queries, hidden size) that the layer updates; they attend to themselves.
        memory: Hidden states (batch or 1, tokens, hidden size) that they attend to as well, or their keys and values.
            A batch of 1 stands for states that all images share: their keys and values are computed once.
        query_rotary: Rotary positions, where the patches are among the queries.
        memory_rotary: Rotary positions, where the patches are among the memory.
        known: What is known of the queries.
        memory_first: Put the keys and values of the memory before those of the queries, not behind.
    """
    if known is None:
        norm, query, key, value = attention_pieces(layer)
        normed = norm(queries)
        query_states, keys, values = (_heads(piece, normed, num_heads) for piece in (query, key, value))
        query_states, keys = _rotate(query_states, query_rotary), _rotate(keys, query_rotary)
    else:
        query_states, keys, values = known.projections
    if memory is not None:
        if isinstance(memory, torch.Tensor):
            memory = keys_and_values(layer, num_heads, memory, memory_rotary)
        batch = max(queries.shape[0], memory.keys.shape[0])
        order = -1 if memory_first else 1
        keys, values = (
            torch.cat([_expand(each, batch) for each in (own, other)[::order]], dim=-2)
            for own, other in ((keys, memory.keys), (values, memory.values))
        )
    return Projections(query_states, keys, values)


def know_queries(layer: nn.Module, num_heads: int, queries: torch.Tensor) -> KnownQueries:
    """What queries (1, queries, hidden size) make of each other in a layer; without rotary positions."""
    projections = project(layer, num_heads, queries)
    # In parts, since thousands of queries would fill the memory with scores.
    parts = projections.queries.split(_QUERIES_AT_ONCE, dim=-2)
    known = [_without_scores(_know_part, part, *projections[1:]) for part in parts]
    contexts, sums = (torch.cat(each, dim=-2) for each in zip(*known, strict=True))
    return KnownQueries(projections, contexts, sums)


def _know_part(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scores = _attention_scores(queries, keys).float()
    return scores.softmax(dim=-1).to(values.dtype) @ values, scores.logsumexp(dim=-1, keepdim=True)


def _without_scores(run: Callable, *args: torch.Tensor) -> Any:
    """Call a function, whose results alone are kept for the backward pass: it is run again there."""
    return (
        checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else run(*args)
    )


def _expand(states: torch.Tensor, batch: int) -> torch.Tensor:
    return states.expand(batch, -1, -1, -1)


def attention_weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float32: (batch, heads, queries, tokens), each row summing to 1.

    Args:
        queries: (batch or 1, heads, queries, head size).
        keys: (batch, heads, tokens, head size).
    """
    return _attention_scores(queries, keys).softmax(dim=-1, dtype=torch.float32)


def _attention_scores(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)


def _eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers calls `eager`: (batch, queries, heads, head size) and the weights."""
    weights = attention_weights(query, key)
    kept = nn.functional.dropout(weights.to(value.dtype), p=dropout, training=module.training)
    return (kept @ value).transpose(1, 2), weights


def _attend_to_memory(projections: Projections, known: KnownQueries) -> torch.Tensor:
    """Contexts (batch, queries, heads, head size), where what the queries make of each other is known.

    Softmax attention over the queries' own keys and those of the memory is the mean of the attention over each, with
    the sums of their exponentials as weights. So the own keys take part as one more token, which holds their context
    and the logarithm of their sum as its score.
    """
    num_own = known.contexts.shape[-2]
    # The token's place among the scores and, without effect, among the values.
    keys, values = (nn.functional.pad(each[..., num_own:, :], (0, 0, 0, 1)) for each in projections[1:])
    at_once = max(_SCORES_AT_ONCE // math.prod(keys.shape[:3]), 1)
    each_part = (each.split(at_once, dim=-2) for each in (projections.queries, known.contexts, known.logsumexp))
    parts = [_without_scores(_attend_part, *part, keys, values) for part in zip(*each_part, strict=True)]
    return torch.cat(parts, dim=-2).transpose(1, 2)


def _attend_part(
    queries: torch.Tensor, contexts: torch.Tensor, logsumexp: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    scores = _attention_scores(queries, keys).float()
    scores[..., -1:] = logsumexp
    weights = scores.softmax(dim=-1).to(values.dtype)
    return weights @ values + weights[..., -1:] * contexts


def attend(
    layer: nn.Module,
    projections: Projections,
    config: PreTrainedConfig,
    output_attentions: bool = False,
    known: KnownQueries | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the attention itself, with the implementation that the backbone is set to.

    Args:
        layer: One of `backbone_layers`.
        projections: From `project`.
        config: The backbone's configuration.
        output_attentions: Compute the weights too; fused implementations cannot, so this runs without them.
        known: What is known of the queries.

    Returns:
        The contexts (batch, queries, heads, head size), before the output projection; and the weights (batch, heads,
        queries, tokens) in float32, or None.
    """
    if known is not None and not output_attentions:
        return _attend_to_memory(projections, known), None
    attention = _get(layer, _ATTENTION)
    implementation: Callable = _eager_attention
    if not output_attentions:
        implementation = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, _eager_attention)
    queries, keys, values = projections
    contexts, weights = implementation(
        attention,
        _expand(queries, keys.shape[0]),
        keys,
        values,
        None,
        dropout=_attention_dropout(layer, config),
        scaling=queries.shape[-1] ** -0.5,
        is_causal=False,
    )
    return contexts, weights if output_attentions else None


def _attention_dropout(layer: nn.Module, config: PreTrainedConfig) -> float:
    rate = getattr(config, "attention_probs_dropout_prob", None) or getattr(config, "attention_dropout", None)
    return rate if rate and _get(layer, _ATTENTION).training else 0.0


def drop_path(branch: torch.Tensor, rate: float) -> torch.Tensor:
    """Stochastic depth: zero the whole branch of a random share `rate` of the images, scale the others up."""
    if rate == 0:
        return branch
    keep = torch.rand((branch.shape[0], 1, 1), dtype=branch.dtype, device=branch.device) >= rate
    return branch * keep / (1 - rate)


def _run_branch(layer: nn.Module, branch: torch.Tensor, pieces: tuple[tuple[str, ...], ...]) -> torch.Tensor:
    for names in pieces:
        piece = _find(layer, names)
        if piece is not None:
            branch = piece(branch)
    return branch


def finish_layer(
    layer: nn.Module, queries: torch.Tensor, contexts: torch.Tensor, drop_path_rate: float = 0.0
) -> torch.Tensor:
    """The rest of a layer after its attention: output projection, residual connections and MLP.

    Args:
        layer: One of `backbone_layers`.
        queries: The layer's input (batch or 1, queries, hidden size).
        contexts: (batch, queries, heads, head size), from `attend`.
        drop_path_rate: Stochastic depth on both branches.

    Returns:
        The updated hidden states (batch, queries, hidden size).
    """
    at_once = max(_ROWS_AT_ONCE // contexts.shape[0], 1)
    if drop_path_rate or torch.is_grad_enabled() or contexts.shape[1] <= at_once:
        return _finish_rows(layer, queries, contexts, drop_path_rate)
    rows = zip(queries.split(at_once, dim=1), contexts.split(at_once, dim=1), strict=True)
    return torch.cat([_finish_rows(layer, *each) for each in rows], dim=1)


def _finish_rows(
    layer: nn.Module, queries: torch.Tensor, contexts: torch.Tensor, drop_path_rate: float = 0.0
) -> torch.Tensor:
    branch = _run_branch(layer, _get(layer, _OUTPUT)(contexts.flatten(-2)), _AFTER_ATTENTION)
    # The residual stream follows the layer's device where a device map spreads the backbone.
    hidden_states = queries.to(branch.device) + drop_path(branch, drop_path_rate)
    branch = _run_branch(layer, _get(layer, ("mlp",))(_get(layer, _NORM_2)(hidden_states)), _AFTER_MLP)
    return hidden_states + drop_path(branch, drop_path_rate)


def run_layer(
    layer: nn.Module,
    queries: torch.Tensor,
    config: PreTrainedConfig,
    memory: torch.Tensor | KeysAndValues | None = None,
    query_rotary: RotaryPositions | None = None,
    memory_rotary: RotaryPositions | None = None,
    drop_path_rate: float = 0.0,
    output_attentions: bool = False,
    known: KnownQueries | None = None,
    memory_first: bool = False,
) -> LayerOutput:
    """One layer of the backbone, from its own pieces, with extra tokens to attend to.

    Without memory this is the family's own layer, up to rounding. Arguments as in `project`, `attend` and
    `finish_layer`.
    """
    if known is None and not output_attentions and _are_worth_knowing(layer, config, queries, memory):
        known = know_queries(layer, config.num_attention_heads, queries)
    projections = project(
        layer, config.num_attention_heads, queries, memory, query_rotary, memory_rotary, known, memory_first
    )
    contexts, weights = attend(layer, projections, config, output_attentions, known)
    return LayerOutput(finish_layer(layer, queries, contexts, drop_path_rate), weights, projections)


def _are_worth_knowing(
    layer: nn.Module, config: PreTrainedConfig, queries: torch.Tensor, memory: torch.Tensor | KeysAndValues | None
) -> bool:
    """Whether there are many queries, the same for several images, so that they need to see each other only once."""
    if torch.compiler.is_compiling() or not isinstance(memory, torch.Tensor) or queries.shape[1] < _MANY_QUERIES:
        return False
    return queries.shape[0] == 1 < memory.shape[0] and not _attention_dropout(layer, config)


def update_queries(layer: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The hidden states of `run_layer` alone: what the family's own layer returns, as hooks expect it."""
    return run_layer(layer, *args, **kwargs).hidden_states


__all__ = [
    "KeysAndValues",
    "KnownQueries",
    "LayerOutput",
    "Projections",
    "RotaryPositions",
    "attend",
    "attention_pieces",
    "attention_weights",
    "backbone_class",
    "backbone_layers",
    "build_backbone",
    "drop_path",
    "embed",
    "family_class",
    "final_norm",
    "fingerprint_backbone",
    "finish_layer",
    "first_norm",
    "grid_size",
    "image_size",
    "keys_and_values",
    "know_queries",
    "patch_size",
    "project",
    "rotary_positions",
    "run_layer",
    "update_queries",
    "vision_config",
]
