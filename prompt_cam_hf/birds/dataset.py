# SPDX-License-Identifier: MIT
"""Birds as a `datasets.Dataset`: numbered specs, drawn in several processes, kept in the datasets cache."""

import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .classes import BIRD_CLASSES, PARTS, TRAIT_PARTS, BirdSpec, sample_other_spec, sample_spec
from .drawing import check_size, draw_bits

# Part of the cache's key: raise it whenever the same spec gives other pixels, or the same number another spec.
_VERSION = 1
# The first word after the seed; no two splits share a random stream.
_STREAMS = {"train": 0, "validation": 1, "test": 2, "other": 3}


def bird_spec(split: str, index: int, seed: int = 0) -> BirdSpec:
    """Give the spec of a row, from 0, of `birds_dataset`; classes take turns."""
    return sample_spec(_stream(split, index, seed), index % len(BIRD_CLASSES))


def other_bird_spec(index: int, seed: int = 0) -> BirdSpec:
    """Give the spec of a row, from 0, of `other_birds_dataset`."""
    return sample_other_spec(_stream("other", index, seed))


def _stream(split: str, index: int, seed: int) -> np.random.Generator:
    if split not in _STREAMS:
        raise ValueError(f"There is no split {split!r}; choose train, validation or test.")
    return np.random.Generator(np.random.PCG64([seed, _STREAMS[split], index]))


def row_spec(row: Mapping[str, Any]) -> BirdSpec:
    """Give the spec of a data set's row, to draw it again, or a counterfactual of it, at any size."""
    return BirdSpec(row["seed"], {part: row["values"][part] for part in TRAIT_PARTS}, row.get("label"))


def _png(array: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=1)
    return {"bytes": buffer.getvalue(), "path": None}


def _rows(indices: list[int], split: str, size: int, seed: int, version: int) -> Iterator[dict[str, Any]]:
    del version  # only there to be part of the cache's key
    for index in indices:
        spec = other_bird_spec(index, seed) if split == "other" else bird_spec(split, index, seed)
        image, bits = draw_bits(spec, size)
        row = {"image": _png(image), "masks": _png(bits), "seed": spec.seed, "values": dict(spec.values)}
        if spec.label is not None:
            traits = sum(1 << PARTS.index(part) for part in BIRD_CLASSES[spec.label].parts)
            row |= {"label": spec.label, "discriminative_mask": _png((bits & traits) > 0)}
        yield row


def _features(with_label: bool) -> datasets.Features:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "masks": datasets.Image(),
            "seed": datasets.Value("int64"),
            "values": {part: datasets.Value("string") for part in TRAIT_PARTS},
        }
    )
    if with_label:
        features["label"] = datasets.ClassLabel(names=[bird.name for bird in BIRD_CLASSES])
        features["discriminative_mask"] = datasets.Image()
    return features


def _generate(
    split: str, count: int, size: int, seed: int, num_proc: int | None, cache_dir: str | os.PathLike | None
) -> datasets.Dataset:
    if count < 1:
        raise ValueError(f"{count} birds were asked for; a data set has at least one.")
    check_size(size)
    processes = min(num_proc or os.cpu_count() or 1, count)
    return datasets.Dataset.from_generator(
        _rows,
        features=_features(with_label=split != "other"),
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        gen_kwargs={"indices": list(range(count)), "split": split, "size": size, "seed": seed, "version": _VERSION},
        num_proc=processes if processes > 1 else None,
        split=datasets.NamedSplit("train" if split == "other" else split),
    )


def birds_dataset(
    split: str,
    per_class: int = 60,
    size: int = 96,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """Draw labelled birds of all of `BIRD_CLASSES`, the same on every machine.

    They are drawn once, and read from a cache after that. Splits share no image; a larger `per_class` begins with the
    same images.

    Args:
        split: "train", "validation" or "test".
        per_class: Images of each class, 1 or more.
        size: Side of the images in pixels, 32 or more.
        seed: Another seed gives other birds.
        num_proc: Processes that draw; None for one on each processor.
        cache_dir: Where the birds are kept; None for the cache of the datasets library.

    Returns:
        The columns `image` (RGB, size x size), `label`, `masks` (for `unpack_masks`), `discriminative_mask` (the
        pixels of the parts that define the class), `seed` and `values` (for `row_spec`).

    Raises:
        ValueError: there is no such split, no image is asked for, or the size is below 32.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"There is no split {split!r}; choose train, validation or test.")
    return _generate(split, per_class * len(BIRD_CLASSES), size, seed, num_proc, cache_dir)


def other_birds_dataset(
    count: int, size: int = 96, seed: int = 0, num_proc: int | None = None, cache_dir: str | os.PathLike | None = None
) -> datasets.Dataset:
    """Draw birds for pre-training: any value at every part, none of them of any class (see `sample_other_spec`).

    Arguments and columns are those of `birds_dataset`, without `label` and `discriminative_mask`; `count` is of
    images.
    """
    return _generate("other", count, size, seed, num_proc, cache_dir)
