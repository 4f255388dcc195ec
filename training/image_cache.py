# SPDX-License-Identifier: MIT
"""Cached images: opened, turned upright and resized once, and read as bytes in every epoch after.

Crop and flip, which are drawn anew in each epoch, come after, so that training is the same to the bit.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from prompt_cam_hf.progress import progress
from prompt_cam_hf.training.cache_files import (
    DEFAULT_CACHE_DIR,
    ArrayFile,
    fingerprint,
    make_array_file,
    share_of_process,
)
from prompt_cam_hf.training.data import ImageDataset
from prompt_cam_hf.training.trainer import on_main_process


class CachedImageDataset(ImageDataset):
    """An `ImageDataset` whose images lie resized in a file of `cache_images`, one behind the other."""

    def __init__(self, images: ImageDataset, file: ArrayFile, shapes: list[tuple[int, ...]]):
        super().__init__(images.dataset, images.transform)
        self.labels = list(images.dataset["label"])
        self.file = file
        self._shapes = shapes
        self._ends = _ends(shapes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        shape, end = self._shapes[index], self._ends[index]
        resized = self.file.open()[end - np.prod(shape) : end].reshape(shape)
        return {"pixel_values": self.view(resized, index), "labels": self.labels[index]}


class _Resized(Dataset):
    """The images that a file holds, for workers that make them."""

    def __init__(self, images: ImageDataset, rows: range):
        self._images, self._rows = images, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._images.preprocessing.read(self._images.dataset[self._rows[index]]["image"])


def cache_images(
    dataset: ImageDataset, cache_dir: str | os.PathLike = DEFAULT_CACHE_DIR, *, num_workers: int = 0
) -> CachedImageDataset:
    """Open and resize all images, unless a file for just this case exists already.

    The file's name is a digest of the images' bytes and how they are resized. It appears under this name when it is
    complete, and a damaged one is made again. With several processes, each makes a part; all must see `cache_dir`.

    Args:
        dataset: The images with their preprocessing.
        cache_dir: The folder for the files; it is made.
        num_workers: Processes that read images, for each process of the run.

    Raises:
        UnreadableImageError: an image cannot be read.
        OSError: the disk is too full.
    """
    key = on_main_process(lambda: fingerprint(dataset, {"images": "resized"}, "cached images"))
    shapes = on_main_process(lambda: _shapes(dataset))
    file = make_array_file(
        Path(cache_dir) / f"{key}.npy",
        lambda: (int(_ends(shapes)[-1]),),
        dataset.preprocessing.dtype,
        partial(_fill, dataset, shapes, num_workers),
        what="cached images",
        advice="set cache_dir to a folder on another disk, or cache_images to false",
    )
    return CachedImageDataset(dataset, file, shapes)


def _shapes(dataset: ImageDataset) -> list[tuple[int, ...]]:
    """The shape of each image once it is resized; photos of one camera have the same, so few are tried."""
    sizes = [dataset.preprocessing.read_size(row["image"]) for row in dataset.dataset.select_columns("image")]
    found = {size: dataset.preprocessing.resize(Image.new("RGB", size)).shape for size in set(sizes)}
    return [found[size] for size in sizes]


def _ends(shapes: list[tuple[int, ...]]) -> np.ndarray:
    """Where each image ends in the file."""
    return np.cumsum([np.prod(shape) for shape in shapes])


def _fill(dataset: ImageDataset, shapes: list[tuple[int, ...]], num_workers: int, pixels: np.ndarray) -> None:
    """Fill this process's part of `pixels`."""
    rows, ends = share_of_process(len(dataset)), _ends(shapes)
    resized = DataLoader(_Resized(dataset, rows), batch_size=None, num_workers=num_workers, collate_fn=np.asarray)
    with progress(len(rows), "Caching images", " images", show=PartialState().is_main_process) as shown:
        for index, image in zip(rows, resized, strict=True):
            pixels[ends[index] - image.size : ends[index]] = image.ravel()
            shown.update(1)
