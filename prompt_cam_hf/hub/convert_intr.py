# SPDX-License-Identifier: MIT
"""`convert_official_intr_state_dict`: turns a checkpoint of the official INTR into a model of this package.

Names and shapes are those of the repository Imageomics/INTR, which are DETR's: `transformer.encoder`,
`transformer.decoder`, `backbone.0.body` (torchvision's ResNet), `query_embed` with a row for each class, and
`presence_vector`, one linear unit for all classes.
"""

from collections.abc import Mapping

import torch

from prompt_cam_hf.baselines.detr_weights import fill, read_sizes, rename_all
from prompt_cam_hf.baselines.intr import INTRForImageClassification
from prompt_cam_hf.baselines.intr_config import INTRConfig

# The official default, which cannot be read from the weights.
_HEADS = 8


def convert_official_intr_state_dict(
    state_dict: Mapping[str, torch.Tensor],
    *,
    num_attention_heads: int | None = None,
    id2label: dict[int, str] | None = None,
) -> INTRForImageClassification:
    """Turn an official INTR state dict into a model with the same scores and maps.

    Args:
        state_dict: The value of `model` in an official checkpoint.
        num_attention_heads: The number of heads of a layer. None: the official 8.
        id2label: The class names in the order of training; the official code sorts the names of folders. None:
            LABEL_0, LABEL_1, ...

    Returns:
        The model, in evaluation mode, with float32 weights of its own.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape, or another argument does not fit the tensors.
    """
    try:
        for name, tensor in state_dict.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                raise ValueError(f"{name!r} is not the name of a dense tensor of numbers.")
        tensors = rename_all(state_dict)
        queries = tensors.get("query_position_embeddings.weight")
        if queries is None or queries.ndim != 2 or "classifier.weight" not in tensors:
            raise ValueError("it has no query_embed.weight with a row for each class, or no presence_vector.weight.")
        sizes = read_sizes(tensors)
        names = id2label or {index: f"LABEL_{index}" for index in range(len(queries))}
        heads = num_attention_heads or _HEADS
        if len(names) == len(queries):
            config = INTRConfig(
                **sizes,
                encoder_attention_heads=heads,
                decoder_attention_heads=heads,
                freeze_backbone=False,
                id2label=names,
            )
            model = INTRForImageClassification._from_config(config, dtype=torch.float32)
            fill(model, tensors, r"(?!)", ())
            return model.eval()
    except ValueError as error:
        raise ValueError(f"This cannot be converted as an official INTR: {error}") from error
    raise ValueError(f"id2label names {len(names)} classes, but the checkpoint has queries for {len(queries)}.")
