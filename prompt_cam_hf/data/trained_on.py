# SPDX-License-Identifier: MIT
"""Are these the images that the model was trained on? Then its accuracy on them says little about new ones."""

import os
from pathlib import Path

import datasets
import yaml

from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.data.sources import SPLIT_NAMES


def count_trained_on(
    model: str | os.PathLike,
    data: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    images: LabelledImages,
) -> int | None:
    """Count the images that are in the training data which the recipe beside a model names.

    Files are compared by where they lie, and no image is opened. What training held out to choose its best epoch on
    counts, too.

    Args:
        model: The folder of the model, or its Hub id.
        data: Where the images were read from.
        images: The images.

    Returns:
        Their number, or None where it is not known: there is no recipe, or its data are not to be found here.
    """
    try:
        trained = yaml.safe_load(Path(model, "recipe.yaml").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    if not isinstance(data, str | os.PathLike) or not isinstance(trained, str):
        return None
    if _place(data) == _place(trained):
        return len(images) if images.split in (None, "train") else 0
    folder = _place(trained)
    if not folder.is_dir():
        return None
    subfolders = [path for path in folder.iterdir() if path.is_dir() and path.name.lower() in SPLIT_NAMES]
    train = next((path for path in subfolders if SPLIT_NAMES[path.name.lower()] == "train"), folder)
    paths = (images.source(index).get("path") for index in range(len(images)))
    return sum(bool(path) and _place(path).is_relative_to(train) for path in paths)


def _place(path: str | os.PathLike) -> Path:
    """An absolute path; that of a Hub id is nowhere, but always the same."""
    return Path(os.path.abspath(Path(path).expanduser()))


def warn_of_training_images(images: LabelledImages, trained_on: int | None) -> str | None:
    """Say in a sentence why numbers on these images are weak, if they are; `trained_on` is from `count_trained_on`."""
    if trained_on:
        which = "all" if trained_on == len(images) else f"{trained_on:,} of {len(images):,}"
        return (
            f"The model was trained on {which} of these images, so what it recognises here says little about new ones."
        )
    if trained_on is None and images.split == "train":
        return (
            "These are the images of the split train; if the model was trained on them, what it recognises here says "
            "little about new ones."
        )
    return None
