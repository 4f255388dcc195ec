# SPDX-License-Identifier: MIT
"""Labelled images in splits, read from where they lie: classes numbered, images checked, a validation part held out.

Classes are numbered as in the official implementation: in the sorted order of their names, over all splits together.
"""

import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
from datasets.utils import tqdm

from prompt_cam_hf.data.images import image_name, unreadable_reason
from prompt_cam_hf.data.sources import SourceSplit, read_source, some_of

logger = logging.getLogger(__name__)

# Images that one task of the check takes at a time: enough to cost little, few enough to hold in memory.
_CHECK_CHUNK = 32


class SkippedImage(NamedTuple):
    """An image that cannot be read: its file, or its row where it has none, and the reason in words."""

    split: str
    file: str
    reason: str


@dataclass
class ImageData:
    """Labelled images in up to three splits.

    Every split has the columns `image`, a `datasets.Image(decode=False)` for `open_image`, and `label`, a `ClassLabel`
    of the display names.

    Attributes:
        train: To train on.
        validation: To choose the best epoch on, or None.
        test: To test on, or None.
        id2label: From class numbers to display names.
        skipped: The images that were left out.
    """

    train: datasets.Dataset
    validation: datasets.Dataset | None
    test: datasets.Dataset | None
    id2label: dict[int, str]
    skipped: list[SkippedImage] = field(default_factory=list)

    def write_skipped(self, path: str | os.PathLike) -> None:
        """Write the skipped images to a CSV file with the columns `split`, `file` and `reason`."""
        pd.DataFrame(self.skipped, columns=SkippedImage._fields).to_csv(path, index=False)


def _number_classes(splits: dict[str, SourceSplit]) -> list[str]:
    """List the class names, as the source has them, in the order of their numbers."""
    class_names = splits["train"].class_names
    for split, found in splits.items():
        if found.class_names != class_names:
            raise ValueError(f"The {split} split declares other class names than train; they have to be the same.")
    if class_names is not None:
        return class_names
    names = {label for found in splits.values() for label in found.labels}
    if all(re.fullmatch(r"-?[0-9]+", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def display_name(class_name: str) -> str:
    """Cut an `NNN.` prefix off the name of a class."""
    return re.sub(r"^[0-9]+\.(?=.)", "", class_name)


def display_names(class_names: list[str]) -> dict[int, str]:
    """Class names by number, with an `NNN.` prefix cut off.

    Raises:
        ValueError: two classes would then have one name.
    """
    id2label = {number: display_name(name) for number, name in enumerate(class_names)}
    taken: dict[str, int] = {}
    for number, name in id2label.items():
        if name in taken:
            raise ValueError(
                f"The classes {class_names[taken[name]]} and {class_names[number]} would both be called {name} "
                "without the number in front; rename one of them."
            )
        taken[name] = number
    return id2label


def _check_classes(splits: dict[str, datasets.Dataset], class_names: list[str]) -> None:
    if len(class_names) == 1:
        raise ValueError(f"There is only one class, {class_names[0]}; a classifier needs two or more.")
    present = {split: set(dataset["label"]) for split, dataset in splits.items()}
    everywhere = set().union(*present.values())
    if empty := [name for number, name in enumerate(class_names) if number not in everywhere]:
        raise ValueError(f"No images of the class {some_of(empty)}; add some or remove the class.")
    for split, numbers in present.items():
        if unknown := [class_names[number] for number in sorted(numbers - present["train"])]:
            raise ValueError(f"Only the {split} split has images of the class {some_of(unknown)}; train has none.")
        if absent := [class_names[number] for number in sorted(everywhere - numbers)]:
            logger.warning("The %s split has no images of the class %s.", split, some_of(absent))


def find_unreadable_images(dataset: datasets.Dataset, split: str = "train") -> dict[int, SkippedImage]:
    """Decode every image of the undecoded column `image`, and say what is wrong with which row.

    This runs in threads (Pillow decodes without Python's lock), with a progress bar unless those of the datasets
    library are switched off.
    """

    def check(start: int) -> list[tuple[str, str | None]]:
        rows = dataset[start : start + _CHECK_CHUNK]["image"]
        return [(image_name(image or {}), unreadable_reason(image or {})) for image in rows]

    unreadable = {}
    starts = range(0, len(dataset), _CHECK_CHUNK)
    with ThreadPoolExecutor() as pool, tqdm(total=len(dataset), desc=f"Checking {split}", unit=" images") as progress:
        for start, chunk in zip(starts, pool.map(check, starts), strict=True):
            for row, (name, reason) in enumerate(chunk, start):
                if reason is not None:
                    unreadable[row] = SkippedImage(split, name or f"row {row}", reason)
            progress.update(len(chunk))
    return unreadable


def _leave_out_unreadable(
    splits: dict[str, datasets.Dataset], skip_unreadable: bool
) -> tuple[dict[str, datasets.Dataset], list[SkippedImage]]:
    readable: dict[str, datasets.Dataset] = {}
    skipped: list[SkippedImage] = []
    for split, dataset in splits.items():
        unreadable = find_unreadable_images(dataset, split)
        skipped += unreadable.values()
        rows = [row for row in range(len(dataset)) if row not in unreadable]
        readable[split] = dataset.select(rows) if unreadable else dataset
    if skipped:
        count = "1 image" if len(skipped) == 1 else f"{len(skipped)} images"
        named = some_of(f"{image.file} ({image.reason})" for image in skipped)
        if not skip_unreadable:
            raise ValueError(f"Cannot read {count}: {named}. Repair or remove, or leave out with skip_unreadable.")
        logger.warning("Left out %s that cannot be read: %s.", count, named)
    return readable, skipped


def _hold_out(train: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split `fraction` of each class off, at least one image and never the last.

    The splitters of datasets and scikit-learn cannot do this: they refuse classes of one image.
    """
    labels = np.asarray(train["label"])
    random = np.random.default_rng(seed)
    held_out: list[int] = []
    for rows in np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1]):
        count = min(len(rows) - 1, max(1, round(fraction * len(rows))))
        held_out += random.permutation(rows)[:count].tolist()
    if not held_out:
        raise ValueError(
            "No class of train has two images, so none can be held out for validation; add a validation split, or "
            "set validation_fraction to 0."
        )
    return train.select(np.setdiff1d(np.arange(len(train)), held_out)), train.select(sorted(held_out))


def load_image_data(
    source: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    validation_fraction: float = 0.1,
    seed: int = 0,
    skip_unreadable: bool = False,
) -> ImageData:
    """Load labelled images, number their classes, decode every image once, and hold out a validation part.

    Classes are numbered in the sorted order of their names (whole numbers in a table by value); a data set with a
    `ClassLabel` keeps its own numbers. An `NNN.` prefix is cut off for display.

    Args:
        source: One of:

            - a folder with `train/` and, if there are any, `validation/` (or `val/`, `valid/`, `dev/`) and `test/`,
              each with one folder for each class; or a folder of class folders, all of it train. Images may lie
              deeper within a class folder.
            - a CSV or Parquet file with a column of paths, relative to the file's folder, and a column of labels; a
              column `split` divides it. A Parquet file may hold the images themselves.
            - the id of a data set on the Hub, or a folder of Parquet files laid out like one.
            - a `datasets.Dataset` (all of it train) or `DatasetDict`.
        name, revision: Configuration, and branch, tag or commit, of a data set on the Hub.
        image_column, label_column: Columns of images or paths, and of class names or numbers.
        validation_fraction: Share of each class (0 or more, below 1) that is held out of train where there is no
            validation split, at least one image and never the last; 0 holds nothing out.
        seed: Draws the images that are held out.
        skip_unreadable: Leave out images that cannot be read, and list them in `skipped`.

    Returns:
        The splits, with their classes numbered.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: naming the file, class or column: a missing column or label, no images, an empty class, a single
            class, a class that train lacks, two classes with one display name, or, without `skip_unreadable`, images
            that cannot be read.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; it has to be at least 0 and below 1.")
    found = read_source(source, name=name, revision=revision, image_column=image_column, label_column=label_column)
    class_names = _number_classes(found)
    id2label = display_names(class_names)
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    class_label = datasets.ClassLabel(names=list(id2label.values()))
    splits = {
        split: images.add_column("label", [numbers[label] for label in labels], feature=class_label)
        for split, (images, labels, _) in found.items()
    }
    _check_classes(splits, class_names)
    splits, skipped = _leave_out_unreadable(splits, skip_unreadable)
    if skipped:
        _check_classes(splits, class_names)
    if "validation" not in splits and validation_fraction > 0:
        splits["train"], splits["validation"] = _hold_out(splits["train"], validation_fraction, seed)
    return ImageData(splits["train"], splits.get("validation"), splits.get("test"), id2label, skipped)
