# SPDX-License-Identifier: MIT
"""Cached features, which save the work that every epoch would repeat.

Where no prompt enters before layer k, what the first k layers make of an image never changes. It is computed once,
kept on disk, and training starts from there: the same losses, at the cost of the remaining layers.
"""

import contextlib
import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

import numpy as np
import PIL
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedConfig, default_data_collator

from prompt_cam_hf.baselines import INTRConfig, INTRForImageClassification, LinearProbe, VPTForImageClassification
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.progress import follow, progress
from prompt_cam_hf.training.data import EpochDataset, ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.trainer import on_main_process

# What has an `encode_prefix`, and a config that says what that depends on.
PrefixModel: TypeAlias = (
    PromptCAMForImageClassification | VPTForImageClassification | INTRForImageClassification | LinearProbe
)

_DIGEST_SIZE = hashlib.sha256().digest_size
DEFAULT_CACHE_DIR = Path(HF_HOME) / "prompt_cam_features"


class FeatureDataset(EpochDataset):
    """Labelled images as the model knows them after its fixed first layers, one view of each in turn.

    It reads a file of `cache_features`, an array (views, images, ...). Item `i` is `{"prefix_hidden_states": float32
    of (tokens, hidden_size), "labels": int}`, of a linear probe float32 of (features,).
    """

    def __init__(self, path: str | os.PathLike, labels: list[int]):
        super().__init__()
        self.path = path
        self.labels = labels
        self._features: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._features is None:
            self._features = np.load(self.path, mmap_mode="r")
        view = int(self._epoch) % len(self._features)
        return {
            "prefix_hidden_states": torch.from_numpy(self._features[view, index].copy()),
            "labels": self.labels[index],
        }

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file.
        return {**self.__dict__, "_features": None}


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
    process = PartialState()
    key = on_main_process(lambda: _fingerprint(model, dataset, num_views, autocast_dtype))
    path = Path(cache_dir).expanduser() / f"{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another run that computes the same file is waited for.
    with WeakFileLock(f"{path}.lock") if process.is_main_process else contextlib.nullcontext():
        if not on_main_process(partial(_is_whole, path)):
            example = model.encode_prefix(dataset[0]["pixel_values"][None].to(model.device))
            shape = (num_views, len(dataset), *example.shape[1:])
            unfinished = path.with_suffix(".partial")
            if process.is_main_process:
                unfinished.unlink(missing_ok=True)
                _check_disk(path.parent, shape)
                np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
                _reserve(unfinished)
            process.wait_for_everyone()
            features = np.load(unfinished, mmap_mode="r+")
            _compute(model, dataset, features, autocast_dtype, batch_size, num_workers)
            features.flush()
            process.wait_for_everyone()
            if process.is_main_process:
                with open(unfinished, "r+b") as file:
                    file.write(_digest(file, unfinished.stat().st_size))
                os.replace(unfinished, path)
        process.wait_for_everyone()
    return FeatureDataset(path, list(dataset.dataset["label"]))


def _compute(
    model: PrefixModel,
    dataset: ImageDataset,
    features: np.ndarray,
    autocast_dtype: torch.dtype | None,
    batch_size: int,
    num_workers: int,
) -> None:
    """Fill this process's part of `features`, (views, images, ...)."""
    process = PartialState()
    num_views, num_images = features.shape[:2]
    first, end = (num_images * (process.process_index + i) // process.num_processes for i in (0, 1))
    device = model.device
    total = num_views * (end - first)
    with progress(total, "Caching features", " images", show=process.is_main_process) as shown:
        for view in range(num_views):
            dataset.set_epoch(view)
            row = first
            for batch in DataLoader(
                Subset(dataset, range(first, end)), batch_size=batch_size, num_workers=num_workers
            ):
                with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
                    hidden_states = model.encode_prefix(batch["pixel_values"].to(device))
                features[view, row : row + len(hidden_states)] = hidden_states.float().cpu().numpy()
                row += len(hidden_states)
                shown.update(len(hidden_states))


def _check_disk(folder: Path, shape: tuple[int, ...]) -> None:
    """Writing to a memory map on a full disk would end the process without a word."""
    needed = int(np.prod(shape, dtype=np.int64)) * np.dtype(np.float32).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The cached features need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; lower "
            f"cache_views (now {shape[0]}), or set cache_dir to a folder on another disk."
        )


def _reserve(path: Path) -> None:
    """Take the space of a file that is written through memory, where a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):  # Linux
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                raise OSError(f"The cached features do not fit into {path.parent}: {error.strerror}.") from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 over the first bytes of a file, behind which the file then stands."""
    digest = hashlib.sha256()
    while size > 0 and (content := file.read(min(size, 1 << 20))):
        digest.update(content)
        size -= len(content)
    return digest.digest()


def _is_whole(path: Path) -> bool:
    """Whether a file of features is there and ends with the SHA-256 of all before it, as it was written."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return _digest(file, path.stat().st_size - _DIGEST_SIZE) == file.read()


def _fingerprint(model: PrefixModel, dataset: ImageDataset, num_views: int, autocast_dtype: torch.dtype | None) -> str:
    """SHA-256, in hexadecimal, over all that the features depend on."""
    transform = dataset.transform
    augmentation = None
    if isinstance(transform, TrainingAugmentation):
        augmentation = {"seed": transform.seed, "crop": transform.crop_size, "resize": transform.resize_size}
        transform = transform.image_processor
    settings = {
        "backbone": model.config.backbone_fingerprint,
        "backbone_config": cast(PreTrainedConfig, model.config.backbone_config).to_dict(),
        "attention": model.config._attn_implementation,
        "layers": model.config.fixed_prefix_layers,
        "image_processor": transform.to_dict(),
        "augmentation": augmentation,
        "views": num_views,
        "precision": str(autocast_dtype),
        "device": model.device.type,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    rows = dataset.dataset.select_columns("image")
    for row in follow(rows, len(rows), "Looking for cached features", " images"):
        image = row["image"]
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
