# SPDX-License-Identifier: MIT
"""What the `evaluate` metrics of this folder have in common: the form of their description and of their batches."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

# The columns of a metric of maps: one map, one class and the pixel values for each image.
MAP_COLUMNS = {"predictions": ("float32", 2), "references": ("int64", 0), "pixel_values": ("float32", 3)}


def metric_info(description: str, inputs: str, **columns: tuple[str, int]) -> evaluate.MetricInfo:
    """Describe a metric; `columns` are the arguments that have one entry an image: the type of its numbers, and its
    axes.
    """
    features = datasets.Features()
    for name, (dtype, axes) in columns.items():
        features[name] = datasets.Value(dtype)
        for _ in range(axes):
            features[name] = datasets.Sequence(features[name])
    return evaluate.MetricInfo(description=description, citation="", inputs_description=inputs, features=features)


def as_batch(model: Any, predictions: Any, references: Any, pixel_values: Any) -> tuple[torch.Tensor, ...]:
    """Images, maps and classes as tensors, from what `evaluate` collected; images and maps on the model's device."""
    images, maps, classes = (torch.as_tensor(np.asarray(values)) for values in (pixel_values, predictions, references))
    device = getattr(model, "device", "cpu")
    return images.to(device), maps.to(device), classes
