# SPDX-License-Identifier: MIT
"""Files of arrays that are computed once: complete or not there, checked before they are used, shared by processes."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.constants import HF_HOME
from huggingface_hub.utils import WeakFileLock

from prompt_cam_hf.progress import follow
from prompt_cam_hf.training.data import ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.trainer import on_main_process

_DIGEST_SIZE = hashlib.sha256().digest_size
DEFAULT_CACHE_DIR = Path(HF_HOME) / "prompt_cam_features"


class ArrayFile:
    """An array in a .npy file, mapped where it is used first, so that it stays on disk when it is pickled."""

    def __init__(self, path: str | os.PathLike):
        self.path = path
        self._array: np.ndarray | None = None

    def open(self) -> np.ndarray:
        """The array, to read."""
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file.
        return {**self.__dict__, "_array": None}


def make_array_file(
    path: Path,
    shape: Callable[[], tuple[int, ...]],
    dtype: type,
    fill: Callable[[np.ndarray], None],
    *,
    what: str,
    advice: str,
) -> ArrayFile:
    """Make a .npy file, unless it is there and whole.

    It appears under its name when it is complete. Another run that makes the same file is waited for. With several
    processes, all call this and each fills a part; all must see the folder.

    Args:
        path: Its place; the folder is made.
        shape: Of the array; called only where it is made.
        dtype: Of the array.
        fill: Fills this process's part of the array, a memory map.
        what: What it holds, for messages, in the plural.
        advice: What to do where the disk is too small.

    Raises:
        OSError: the disk is too full.
    """
    process = PartialState()
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{path}.lock") if process.is_main_process else contextlib.nullcontext():
        if not on_main_process(partial(_is_whole, path)):
            dimensions = shape()
            unfinished = path.with_suffix(".partial")
            if process.is_main_process:
                unfinished.unlink(missing_ok=True)
                needed = int(np.prod(dimensions, dtype=np.int64)) * np.dtype(dtype).itemsize
                _check_disk(path.parent, needed, what, advice)
                np.lib.format.open_memmap(unfinished, mode="w+", dtype=dtype, shape=dimensions)
                _reserve(unfinished, what)
            process.wait_for_everyone()
            array = np.load(unfinished, mmap_mode="r+")
            fill(array)
            array.flush()
            process.wait_for_everyone()
            if process.is_main_process:
                with open(unfinished, "r+b") as file:
                    file.write(_digest(file, unfinished.stat().st_size))
                os.replace(unfinished, path)
        process.wait_for_everyone()
    return ArrayFile(path)


def share_of_process(number: int) -> range:
    """The part of `number` things that this process does, where several share them evenly."""
    process = PartialState()
    first, end = (number * (process.process_index + i) // process.num_processes for i in (0, 1))
    return range(first, end)


def _check_disk(folder: Path, needed: int, what: str, advice: str) -> None:
    """Writing to a memory map on a full disk would end the process without a word."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The {what} need {needed / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free; {advice}."
        )


def _reserve(path: Path, what: str) -> None:
    """Take the space of a file that is written through memory, where a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):  # Linux
        with open(path, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
            except OSError as error:
                path.unlink()
                raise OSError(f"The {what} do not fit into {path.parent}: {error.strerror}.") from error


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 over the first bytes of a file, behind which the file then stands."""
    digest = hashlib.sha256()
    while size > 0 and (content := file.read(min(size, 1 << 20))):
        digest.update(content)
        size -= len(content)
    return digest.digest()


def _is_whole(path: Path) -> bool:
    """Whether a file is there and ends with the SHA-256 of all before it, as it was written."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return _digest(file, path.stat().st_size - _DIGEST_SIZE) == file.read()


def fingerprint(dataset: ImageDataset, settings: dict[str, Any], what: str) -> str:
    """SHA-256, in hexadecimal, over images, how they are resized, versions and what else the numbers depend on."""
    transform = dataset.transform
    augmentation = None
    if isinstance(transform, TrainingAugmentation):
        augmentation = {"crop": transform.crop_size, "resize": transform.resize_size}
        transform = transform.image_processor
    settings = {
        **settings,
        "image_processor": transform.to_dict(),
        "augmentation": augmentation,
        "versions": [torch.__version__, transformers.__version__, PIL.__version__],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    rows = dataset.dataset.select_columns("image")
    for row in follow(rows, len(rows), f"Looking for {what}", " images"):
        image = row["image"]
        content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()
