# SPDX-License-Identifier: MIT
"""What prompts bring to the layers, the same for every image, computed once and used while no weight changes."""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from .backbone_prompt_cam import (
    KeysAndValues,
    KnownQueries,
    attention_pieces,
    backbone_layers,
    keys_and_values,
    know_queries,
)


class PreparedSet(NamedTuple):
    """What one prompt set brings.

    Attributes:
        memories: The keys and values of each layer's agnostic prompts; None in layers without.
        class_prompts: The class prompts in the last layer, where they enter there (Deep); else None.
    """

    memories: list[KeysAndValues | None]
    class_prompts: KnownQueries | None


class _Weight(NamedTuple):
    """A frozen weight as it was. Holding its storage keeps the address from being used again."""

    storage: torch.Tensor
    version: int

    def is_still(self, weight: torch.Tensor) -> bool:
        return self.version == weight._version and self.storage.data_ptr() == weight.data_ptr()


class _Entry(NamedTuple):
    weights: list[_Weight]
    prompts: list[torch.Tensor]
    prepared: PreparedSet


class PreparedPrompts:
    """Prepared prompt sets of one backbone, each computed when it is first asked for.

    This thread's forward passes find them inside a `with` block, and another block with the same object finds them
    again.

    Before each use, prompts are compared with a copy of what they were, and the backbone's weights by address and
    version counter; after a change all is computed anew. Only weights that these can tell are relied on: frozen, held
    in memory by plain modules, without hooks. With others there is nothing to find.
    """

    def __init__(self, backbone: PreTrainedModel):
        self.backbone = backbone
        self._entries = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple:
        return PreparedPrompts, (self.backbone,)

    def __enter__(self) -> None:
        _IN_USE.set((self, *_IN_USE.get()))

    def __exit__(self, *_: object) -> None:
        others = list(_IN_USE.get())
        others.remove(self)
        _IN_USE.set(tuple(others))

    def find(
        self, class_prompts: nn.Parameter, agnostic_prompts: nn.Parameter | None, agnostic_layers: range, deep: bool
    ) -> PreparedSet | None:
        """A prompt set, computed if it is new or anything has changed.

        Args:
            class_prompts: (num_labels, hidden_size).
            agnostic_prompts: (layers, prompts, hidden_size), or None.
            agnostic_layers: The layers that these enter.
            deep: The class prompts enter the last layer.

        Returns:
            The set, or None where changes could not be told, and under autocast.
        """
        layers = backbone_layers(self.backbone)
        pieces = [piece for index in agnostic_layers for piece in attention_pieces(layers[index])]
        pieces += attention_pieces(layers[-1]) if deep else []
        weights = _tell_weights(pieces)
        device = class_prompts.device.type
        if weights is None or device == "meta" or torch.is_autocast_enabled(device):
            return None
        prompts = [each.detach() for each in (class_prompts, agnostic_prompts) if each is not None]
        entry = self._entries.get(class_prompts)
        if entry is None or not (_are_still(entry.weights, weights) and all(map(_equal, entry.prompts, prompts))):
            # Taken before anything is computed: what another thread changes meanwhile is seen the next time.
            stamps = [_Weight(weight.detach(), weight._version) for weight in weights]
            with torch.inference_mode(False), torch.no_grad():
                prompts = [each.clone() for each in prompts]
                memories: list[KeysAndValues | None] = [None] * len(layers)
                heads = self.backbone.config.num_attention_heads
                for index, states in zip(agnostic_layers, prompts[-1], strict=False):
                    memories[index] = keys_and_values(layers[index], heads, states.unsqueeze(0))
                known = know_queries(layers[-1], heads, prompts[0].unsqueeze(0)) if deep else None
            entry = _Entry(stamps, prompts, PreparedSet(memories, known))
            self._entries[class_prompts] = entry
        return entry.prepared


# Of this thread: a thread that is not inside the `with` block computes as ever.
_IN_USE: ContextVar[tuple[PreparedPrompts, ...]] = ContextVar("prepared_prompts_in_use", default=())


def prepared_prompts_of(backbone: PreTrainedModel) -> PreparedPrompts | None:
    """The prepared prompts in use for a backbone, where they may be used: not in training, nor while compiling."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    return next((each for each in _IN_USE.get() if each.backbone is backbone), None)


def _tell_weights(pieces: Iterable[nn.Module]) -> list[torch.Tensor] | None:
    """The weights that make what these modules compute; None where they do not, or may change untold."""
    weights: list[torch.Tensor] = []
    for piece in pieces:
        if type(piece) not in (nn.Linear, nn.LayerNorm) or piece._forward_hooks or piece._forward_pre_hooks:
            return None
        if piece.training or "forward" in piece.__dict__:
            return None
        for weight in piece._parameters.values():
            if weight is None:
                continue
            # Optimizers of the fused kind change weights without counting.
            if type(weight) is not nn.Parameter or weight.requires_grad or weight.is_meta or weight.is_inference():
                return None
            weights.append(weight)
    return weights


def _are_still(known: list[_Weight], weights: list[torch.Tensor]) -> bool:
    return len(known) == len(weights) and all(map(_Weight.is_still, known, weights))


def _equal(known: torch.Tensor, prompts: torch.Tensor) -> bool:
    return (known.dtype, known.device) == (prompts.dtype, prompts.device) and torch.equal(known, prompts)


__all__ = ["PreparedPrompts", "PreparedSet", "prepared_prompts_of"]
