# SPDX-License-Identifier: MIT
"""Images with the classes of a model that they are labelled with, if any: what an atlas or an evaluation looks at."""

import hashlib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

from prompt_cam_hf.data.images import find_images, image_name, image_suffixes
from prompt_cam_hf.data.sources import SourceSplit, image_rows, read_images, read_source, some_of
from prompt_cam_hf.explanations.class_names import find_class

logger = logging.getLogger(__name__)

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class LabelledImages:
    """Images in their order.

    Attributes:
        images: The column `image`, undecoded, for `open_image`.
        labels: The number of each image's class in the model, or None.
        origin: Where they come from, in words.
        folder: The folder that they lie in, where there is one; names are shown from there on.
        split: Which split of the data they are, where the data are divided.
    """

    images: datasets.Dataset
    labels: list[int | None]
    origin: str
    folder: Path | None = None
    split: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def source(self, index: int) -> Any:
        """Give what `open_image` opens, a mapping with `path` and `bytes`, empty where the row has no image."""
        return self.images[index]["image"] or {}

    def name(self, index: int) -> str:
        """Name an image for a reader: by its path within the folder, or by its row, where it has no path."""
        name = image_name(self.source(index))
        if self.folder is not None and name.startswith(f"{self.folder}{os.sep}"):
            name = name[len(f"{self.folder}{os.sep}") :]
        return name or f"row {index}"

    def digest(self) -> str:
        """Compute a fingerprint of the images, in hexadecimal, without reading the files.

        It is SHA-256 over labels and files (path, size, time of the last change) or encoded images.
        """
        digest = hashlib.sha256()
        for index, label in enumerate(self.labels):
            source = self.source(index)
            content = source.get("bytes")
            if content is None and source.get("path") and os.path.exists(source["path"]):
                status = os.stat(source["path"])
                content = f"{status.st_size} {status.st_mtime_ns}".encode()
            digest.update(f"{self.name(index)}\0{label}\0".encode())
            digest.update(hashlib.sha256(content or b"").digest())
        return digest.hexdigest()


def read_labelled_images(
    data: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    id2label: Mapping[int, str],
    *,
    split: Split | None = None,
    name: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> LabelledImages:
    """List images with the model's classes that they are labelled with, in the order of the data.

    Args:
        data: What `load_image_data` (`prompt_cam_hf.data.splits`) reads; also a folder with images and no class
            folders, and a `datasets.Dataset` without labels.
        id2label: The model's classes. Names are compared as `find_class` does, with or without an `NNN.` prefix; an
            image of a class that the model does not know counts as unlabelled.
        split: "train", "validation" or "test"; None: the last of these that the data have.
        name, revision, image_column, label_column: As in `load_image_data`.

    Raises:
        FileNotFoundError: there are no such data.
        ValueError: there is no such split or column, or there are no images.
    """
    folder = None
    if isinstance(data, str | os.PathLike) and Path(data).expanduser().is_dir():
        folder = Path(data).expanduser()
        if _is_unlabelled(folder):
            unlabelled = image_rows(find_images([folder]))
            return LabelledImages(unlabelled, [None] * len(unlabelled), folder.name, folder)
    if isinstance(data, datasets.Dataset) and label_column not in data.column_names:
        images = read_images(data, "The data set", None, image_column)
        return LabelledImages(images, [None] * len(images), "a data set without labels")
    found = read_source(data, name=name, revision=revision, image_column=image_column, label_column=label_column)
    chosen = split or list(found)[-1]
    if chosen not in found:
        raise ValueError(f"The data have no split {chosen!r}; they have {', '.join(found)}.")
    origin = "a data set"
    if isinstance(data, str | os.PathLike):
        # A page is passed on; where its images lay on this machine is nobody's business.
        origin = Path(data).name if Path(data).expanduser().exists() else str(data)
    divided = chosen if len(found) > 1 else None
    origin += f", split {chosen}" if divided else ""
    labels = _number_labels(found[chosen], id2label, origin)
    return LabelledImages(found[chosen].images, labels, origin, folder, divided)


def _is_unlabelled(folder: Path) -> bool:
    """Whether images lie in the folder itself and in no folder below it."""
    suffixes = image_suffixes()
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    loose = [path for path in visible if path.is_file() and path.suffix.lower() in suffixes]
    if not loose:
        return False
    if len(find_images([folder])) == len(loose):
        return True
    logger.warning("%s: left out %s, in no class folder.", folder, some_of(sorted(path.name for path in loose)))
    return False


def _number_labels(found: SourceSplit, id2label: Mapping[int, str], origin: str) -> list[int | None]:
    numbers = {label: _find(id2label, label) for label in sorted(set(found.labels))}
    if unknown := [label for label, number in numbers.items() if number is None]:
        logger.warning(
            "%s: the model knows %d of %d classes; images of the others count as unlabelled: %s.",
            origin,
            len(numbers) - len(unknown),
            len(numbers),
            some_of(unknown),
        )
    return [numbers[label] for label in found.labels]


def _find(id2label: Mapping[int, str], label: str) -> int | None:
    for name in (label, re.sub(r"^[0-9]+\.(?=.)", "", label)):
        try:
            return find_class(id2label, name)
        except ValueError:
            continue
    return None
