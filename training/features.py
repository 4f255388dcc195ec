# SPDX-License-Identifier: MIT
"""Cached features, which save the work that every epoch would repeat.

Where no prompt enters before layer k, what the first k layers make of an image never changes. It is computed once,
kept on disk, and training starts from there: the same losses, at the cost of the remaining layers.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedConfig, default_data_collator

from prompt_cam_hf.baselines import INTRConfig, INTRForImageClassification, LinearProbe, VPTForImageClassification
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.progress import progress
from prompt_cam_hf.training.cache_files import (
    DEFAULT_CACHE_DIR,
    ArrayFile,
    fingerprint,
    make_array_file,
    share_of_process,
)
from prompt_cam_hf.training.data import EpochDataset, ImageDataset
from prompt_cam_hf.training.trainer import on_main_process

# What has an `encode_prefix`, and a config that says what that depends on.
PrefixModel: TypeAlias = (
    PromptCAMForImageClassification | VPTForImageClassification | INTRForImageClassification | LinearProbe
)


class FeatureDataset(EpochDataset):
    """Labelled images as the model knows them after its fixed first layers, one view of each in turn.

    It reads a file of `cache_features`, an array (views, images, ...). Item `i` is `{"prefix_hidden_states": float32
    of (tokens, hidden_size), "labels": int}`, of a linear probe float32 of (features,).
    """

    def __init__(self, file: ArrayFile, labels: list[int]):
        super().__init__()
        self.labels = labels
        self.file = file

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self.file.open()
        view = int(self._epoch) % len(features)
        return {
            "prefix_hidden_states": torch.from_numpy(features[view, index].copy()),
            "labels": self.labels[index],
        }


class FeatureCollator:
    """Makes a batch of images, filled up to one size, or of features, with the grid of patches that pixels would tell.

    `patch_grid` is that grid, (rows, columns); None where there are no features.
    """

    def __init__(self, patch_grid: tuple[int, int] | None):
        self.patch_grid = patch_grid

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack the tensors of items of a `FeatureDataset` or an `ImageDataset`.

        Images of several sizes are filled up at the right and bottom, and a pixel_mask says with 1 what is theirs.
        """
        sizes = [item["pixel_values"].shape[-2:] for item in items if "pixel_values" in item]
        if len(set(sizes)) > 1:
            height, width = (max(sides) for sides in zip(*sizes, strict=True))
            room = [(0, width - cols, 0, height - rows) for rows, cols in sizes]
            items = [
                {
                    **item,
                    "pixel_values": pad(item["pixel_values"], more),
                    "pixel_mask": pad(torch.ones(size, dtype=torch.long), more),
                }
                for item, size, more in zip(items, sizes, room, strict=True)
            ]
        batch = default_data_collator(items)
        if "prefix_hidden_states" in batch:
            batch["patch_grid"] = self.patch_grid
        return batch


def cache_features(
    model: PrefixModel,
    dataset: ImageDataset,
    cache_dir: str | os.PathLike = DEFAULT_CACHE_DIR,
    *,
    num_views: int = 1,
    autocast_dtype: torch.dtype | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
) -> FeatureDataset:
    """Run the model's fixed first layers over all images, unless a file for just this case exists already.

    The file's name is a digest of the images' bytes, the preprocessing and augmentation, the backbone and the
    precision, so that a change of any of them makes a new file. It appears under this name when it is complete, and a
    damaged one is made again. With several processes, each computes a part; all must see `cache_dir`.

    Args:
        model: On the device to compute on.
        dataset: The images; an augmented view `v` is what the data set gives in epoch `v`.
        cache_dir: The folder for the files; it is made.
        num_views: Views of each image, 1 where nothing is drawn at random.
        autocast_dtype: Mixed precision to compute in, as in training.
        batch_size: Images a step and process.
        num_workers: Processes that read images, for each process that computes.

    Raises:
        ValueError: a prompt enters the first layer, so that nothing is fixed.
        OSError: the disk is too full.
    """
    if not model.config.fixed_prefix_layers:
        raise ValueError(
            "cache_features: there is nothing to cache, because prompts enter the first layer. Set first_prompt_layer "
            "to a later layer, or num_agnostic_prompts to 0 with class prompts at a later layer."
            if model.config.model_type != INTRConfig.model_type
            else "cache_features: there is nothing to cache on a ResNet, for images keep their sizes."
        )
    key = on_main_process(lambda: _fingerprint(model, dataset, num_views, autocast_dtype))

    def shape() -> tuple[int, ...]:
        example = model.encode_prefix(dataset[0]["pixel_values"][None].to(model.device))
        return (num_views, len(dataset), *example.shape[1:])

    compute = partial(
        _compute, model, dataset, autocast_dtype=autocast_dtype, batch_size=batch_size, num_workers=num_workers
    )
    file = make_array_file(
        Path(cache_dir) / f"{key}.npy",
        shape,
        np.float32,
        compute,
        what="cached features",
        advice=f"lower cache_views (now {num_views}), or set cache_dir to a folder on another disk",
    )
    return FeatureDataset(file, list(dataset.dataset["label"]))


def _compute(
    model: PrefixModel,
    dataset: ImageDataset,
    features: np.ndarray,
    autocast_dtype: torch.dtype | None,
    batch_size: int,
    num_workers: int,
) -> None:
    """Fill this process's part of `features`, (views, images, ...)."""
    num_views, num_images = features.shape[:2]
    images = share_of_process(num_images)
    device = model.device
    total = num_views * len(images)
    with progress(total, "Caching features", " images", show=PartialState().is_main_process) as shown:
        for view in range(num_views):
            dataset.set_epoch(view)
            row = images.start
            for batch in DataLoader(Subset(dataset, images), batch_size=batch_size, num_workers=num_workers):
                with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                    hidden_states = model.encode_prefix(batch["pixel_values"].to(device))
                features[view, row : row + len(hidden_states)] = hidden_states.float().cpu().numpy()
                row += len(hidden_states)
                shown.update(len(hidden_states))


def _fingerprint(model: PrefixModel, dataset: ImageDataset, num_views: int, autocast_dtype: torch.dtype | None) -> str:
    """Name all that the features depend on."""
    settings = {
        "backbone": model.config.backbone_fingerprint,
        "backbone_config": cast(PreTrainedConfig, model.config.backbone_config).to_dict(),
        "attention": model.config._attn_implementation,
        "layers": model.config.fixed_prefix_layers,
        "views": num_views,
        "seed": getattr(dataset.transform, "seed", None),
        "precision": str(autocast_dtype),
        "device": model.device.type,
    }
    return fingerprint(dataset, settings, "cached features")
