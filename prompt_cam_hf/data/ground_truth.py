# SPDX-License-Identifier: MIT
"""Ground truth about the parts of an animal: readers of CUB's annotations, Fish-Vista's and the drawn birds' masks.

Everything becomes boolean masks (height, width) of the original image, which `mask_as_seen` sends the way that the
image goes into the model; `prompt_cam_hf.metrics.localization` takes them from there.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.birds import PARTS, unpack_masks
from prompt_cam_hf.data.images import UnreadableImageError, open_image

# Of the side of a square as large as the bird's box: our choice, since CUB's points have no size.
POINT_RADIUS = 0.1
# The grey level of CUB's segmentations counts, in steps of 51, how many of five people marked a pixel.
_MAJORITY = 3 * 51


@dataclass(frozen=True)
class CubAnnotation:
    """What CUB-200-2011 says of one image, in pixels of the original: x to the right, y down, from the top left.

    Attributes:
        image: The image's path in CUB's folder `images`, such as "017.Cardinal/Cardinal_0001_17057.jpg".
        box: left, top, right, bottom of the bird, with fractions.
        parts: x and y of each visible part, by name, such as "left wing".
        segmentation: The file of the bird's segmentation, where it was unpacked beside the rest.
    """

    image: str
    box: tuple[float, float, float, float]
    parts: Mapping[str, tuple[float, float]]
    segmentation: Path | None


def read_cub(folder: str | os.PathLike) -> dict[str, CubAnnotation]:
    """Read the annotations of CUB-200-2011 (Wah et al., 2011).

    Args:
        folder: The unpacked CUB_200_2011, with `images.txt`, `bounding_boxes.txt`, `parts/parts.txt` and
            `parts/part_locs.txt`. Segmentations are a separate download: they are found in `segmentations/`, in the
            folder or beside it.

    Returns:
        One annotation for each image, by file name without folders, which is unique in CUB: images that were moved to
        other folders find their annotation.

    Raises:
        FileNotFoundError: one of the four files is not there.
        ValueError: a file is not in CUB's form, does not know an image, or two images have one name.
    """
    root = Path(folder)
    images = _read_table(root / "images.txt", {"image": str})
    boxes = _read_table(root / "bounding_boxes.txt", dict.fromkeys(("x", "y", "width", "height"), float))
    points_file = root / "parts" / "part_locs.txt"
    points = _read_table(points_file, {"part": int, "x": float, "y": float, "visible": int})
    part_names = _read_part_names(root / "parts" / "parts.txt")
    if unknown := set(points["part"]) - set(part_names):
        raise ValueError(f"{points_file} has the part {min(unknown)}, which parts.txt does not name.")
    if missing := set(images.index) - set(boxes.index):
        raise ValueError(f"{root / 'bounding_boxes.txt'} has no box for image {min(missing)} of images.txt.")
    seen = points[points["visible"] == 1]
    parts: dict[int, dict[str, tuple[float, float]]] = {number: {} for number in images.index}
    for number, part, x, y in zip(seen.index, seen["part"], seen["x"], seen["y"], strict=True):
        parts.setdefault(number, {})[part_names[part]] = (x, y)
    segmentations = next((path for path in (root, root.parent) if (path / "segmentations").is_dir()), None)
    annotations: dict[str, CubAnnotation] = {}
    for number, image in images["image"].items():
        x, y, width, height = boxes.loc[number]
        file = None if segmentations is None else segmentations / "segmentations" / Path(image).with_suffix(".png")
        name = Path(image).name
        if name in annotations:
            raise ValueError(f"{root / 'images.txt'} has two images of the name {name}.")
        annotations[name] = CubAnnotation(image, (x, y, x + width, y + height), parts[number], file)
    return annotations


def _read_table(path: Path, columns: dict[str, type]) -> pd.DataFrame:
    """Read a file of numbered lines whose words are separated by spaces."""
    _check_file(path)
    names = ["number", *columns]
    try:
        table = pd.read_csv(path, sep=" ", header=None, index_col=False, dtype=str, keep_default_na=False)
        if len(table.columns) != len(names):
            raise ValueError(f"{len(table.columns)} words a line")
        return table.set_axis(names, axis=1).astype({"number": int, **columns}).set_index("number")
    except ValueError as error:
        raise ValueError(
            f"{path} is not in CUB's form, {' '.join(names)} on each line without a heading: {error}."
        ) from error


def _read_part_names(path: Path) -> dict[int, str]:
    """Read part names by number; they have spaces in them, such as "left wing"."""
    _check_file(path)
    lines = (line.split(maxsplit=1) for line in path.read_text().splitlines() if line.strip())
    try:
        return {int(number): name.strip() for number, name in lines}
    except ValueError as error:
        raise ValueError(f"{path} is not in CUB's form, number and name on each line: {error}.") from error


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; the folder must be CUB_200_2011 as it was unpacked.")


def segmentation_mask(annotation: CubAnnotation) -> np.ndarray:
    """Read the pixels that at least three of five people marked as the bird, boolean, (height, width).

    Raises:
        FileNotFoundError: the segmentations were not unpacked.
        UnreadableImageError: the file is broken.
    """
    if annotation.segmentation is None:
        raise FileNotFoundError(
            f"There is no folder segmentations for {annotation.image}; CUB's segmentations are a download of their "
            "own. Unpack them beside CUB_200_2011 or in it."
        )
    return np.asarray(open_image(annotation.segmentation).convert("L")) >= _MAJORITY


def bounding_box_mask(annotation: CubAnnotation, size: tuple[int, int]) -> np.ndarray:
    """Mark the pixels whose centre lies in the bird's box, in an image of the size (height, width)."""
    left, top, right, bottom = annotation.box
    y, x = _pixel_centres(size)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def point_mask(
    annotation: CubAnnotation, size: tuple[int, int], parts: Iterable[str] | None = None, radius: float | None = None
) -> np.ndarray:
    """Mark discs around the points of parts, by default of all that are visible, in an image of (height, width).

    The radius is in pixels of the image, by default `POINT_RADIUS` of the side of a square as large as the box, so
    that a bird has the same share of itself marked in a small and in a large image.
    """
    left, top, right, bottom = annotation.box
    if radius is None:
        radius = POINT_RADIUS * math.sqrt((right - left) * (bottom - top))
    y, x = _pixel_centres(size)
    mask = np.zeros(size, dtype=bool)
    for part in annotation.parts if parts is None else parts:
        if part in annotation.parts:
            centre_x, centre_y = annotation.parts[part]
            mask |= (x - centre_x) ** 2 + (y - centre_y) ** 2 <= radius**2
    return mask


def _pixel_centres(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    height, width = size
    return np.arange(height)[:, None] + 0.5, np.arange(width)[None, :] + 0.5


@dataclass(frozen=True)
class FishVista:
    """The trait masks of Fish-Vista's segmentation part (Mehrab et al., CVPR 2025, arXiv 2407.08027).

    Attributes:
        traits: The value that the pixels of a trait have in the masks, by the trait's name, such as "Dorsal fin".
        files: The mask of each image, by the image's file name without folders and ending, which is unique.
    """

    traits: Mapping[str, int]
    files: Mapping[str, Path]


def read_fish_vista(folder: str | os.PathLike) -> FishVista:
    """List the trait masks of Fish-Vista.

    Args:
        folder: A clone of the data set's repository on the Hub, with `segmentation_masks/seg_id_trait_map.json`, which
            names the traits by number, and for each image a mask `segmentation_masks/images/IMAGE.png`. 0 is the
            background.

    Raises:
        FileNotFoundError: the names or the masks are not there.
        ValueError: the file of names is not in that form.
    """
    masks = Path(folder) / "segmentation_masks"
    names = masks / "seg_id_trait_map.json"
    files = {path.stem: path for path in sorted((masks / "images").glob("*.png"))}
    if not names.is_file() or not files:
        missing = "masks in segmentation_masks/images" if names.is_file() else "file segmentation_masks/" + names.name
        raise FileNotFoundError(f"There is no {missing} in {folder}; the folder must be a clone of Fish-Vista.")
    try:
        traits = {str(name): int(number) for number, name in json.loads(names.read_text(encoding="utf-8")).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{names} is not in Fish-Vista\'s form, {{"1": "Head", ...}}: {error}.') from error
    return FishVista({name: number for name, number in traits.items() if number != 0}, files)


def trait_mask(fish: FishVista, image: str, traits: Iterable[str] | None = None) -> np.ndarray | None:
    """Mark the pixels, (height, width), that show traits of a fish.

    Args:
        fish: From `read_fish_vista`.
        image: The name of the image's file, with or without folders.
        traits: Which of its traits; by default all. Case does not matter.

    Returns:
        A boolean mask; None where Fish-Vista has none of the image.

    Raises:
        ValueError: there is no such trait, or the mask is no grey or palette image of numbers.
        UnreadableImageError: the file is broken.
    """
    numbers = {name.casefold(): number for name, number in fish.traits.items()}
    asked = list(fish.traits if traits is None else traits)
    if unknown := [name for name in asked if name.casefold() not in numbers]:
        raise ValueError(f"Fish-Vista has no trait {unknown[0]!r}; its traits are {', '.join(fish.traits)}.")
    file = fish.files.get(Path(image).stem)
    if file is None:
        return None
    try:
        with Image.open(file, formats=["PNG"]) as opened:
            if opened.mode not in ("L", "P"):
                raise ValueError(
                    f"{file} has pixels of the kind {opened.mode}; Fish-Vista's masks have one number each."
                )
            values = np.asarray(opened)  # of a palette, the numbers and not the colours
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{file} cannot be read: {error}") from error
    return np.isin(values, [numbers[name.casefold()] for name in asked])


def bird_mask(row: Mapping[str, Any], parts: Iterable[str] | None = None) -> np.ndarray:
    """Mark the pixels, (height, width), that show parts of a drawn bird.

    Args:
        row: Of `prompt_cam_hf.birds.birds_dataset`.
        parts: Which of `prompt_cam_hf.birds.PARTS`; by default those that define the bird's class.

    Raises:
        ValueError: there is no such part, or the bird is of no class and no parts are given.
    """
    if parts is None:
        if "discriminative_mask" not in row:
            raise ValueError("This bird is of no class, so no parts define it; name the parts.")
        return np.asarray(row["discriminative_mask"]) > 0
    masks = unpack_masks(row["masks"])
    asked = list(parts)
    if unknown := [part for part in asked if part not in masks]:
        raise ValueError(f"There is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}.")
    return np.any([masks[part] for part in asked], axis=0)


def mask_as_seen(mask: np.ndarray, image_processor: BaseImageProcessor) -> np.ndarray:
    """Send a mask (height, width) through an image processor, so that it is resized and cropped as the image is.

    A pixel is on the mask if at least half of what it shows is. What a processor crops away is lost, as it is to the
    model; and the maps of any processor lie on the whole of what comes out.
    """
    image = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).convert("RGB")
    inputs = image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    return np.asarray(inputs["pixel_values"])[0, 0] >= 127.5
