# SPDX-License-Identifier: MIT
"""The plan of an image folder: the images of a data set, found and counted, each with its place in the folder.

Making a plan reads lists and writes nothing.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from prompt_cam_hf.data.prepare.archives import Source, SourceFile
from prompt_cam_hf.data.prepare.facts import FACTS, DatasetFacts
from prompt_cam_hf.data.prepare.layouts import LAYOUTS, Listed
from prompt_cam_hf.data.sources import some_of

# In the order in which they are read and shown.
SPLITS = ("train", "validation", "test")

# Names that Windows keeps for devices, whatever ending follows.
_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


class PlannedImage(NamedTuple):
    """An image, and its place: `split`/`class_folder`/`file_name`."""

    split: str
    class_folder: str
    file_name: str
    source: SourceFile

    @property
    def path(self) -> PurePosixPath:
        """The place, relative to the image folder."""
        return PurePosixPath(self.split, self.class_folder, self.file_name)


@dataclass(frozen=True)
class Plan:
    """What is to be written, in the order of the lists, and how many listed images are left out."""

    facts: DatasetFacts
    images: list[PlannedImage]
    num_missing: int = 0

    def count(self) -> dict[str, dict[str, int]]:
        """Count the images by split and, within it, by class folder; both in order."""
        counted = Counter((image.split, image.class_folder) for image in self.images)
        return {
            split: {folder: number for (of_split, folder), number in sorted(counted.items()) if of_split == split}
            for split in SPLITS
            if any(of_split == split for of_split, _ in counted)
        }

    def summary(self) -> str:
        """Say what will be done, in one paragraph."""
        counts = self.count()
        num_classes = len({folder for folders in counts.values() for folder in folders})
        splits = ", ".join(f"{split} {sum(folders.values()):,}" for split, folders in counts.items())
        size = sum(image.source.size for image in self.images) / 1e9
        left_out = f" Not there, and left out: {self.num_missing:,}." if self.num_missing else ""
        return (
            f"{self.facts.title}: {num_classes} classes; {splits} images, {size:.2f} GB.{left_out}\n"
            f"Source: {self.facts.page}\nLicence: {self.facts.licence}"
        )


def make_plan(
    dataset: str,
    source: Source,
    *,
    options: Mapping[str, Any],
    skip_missing: bool = False,
    facts: DatasetFacts | None = None,
) -> Plan:
    """Read the lists of a data set, find every listed image and check the numbers, of the published `facts` by
    default.

    The options are for the reader of the data set; None stands for the default. Where they choose other classes than
    the published ones, numbers are not checked.

    Raises:
        FileNotFoundError: a list or, without `skip_missing`, a listed image is not there.
        ValueError: the data set takes no such option, a line is wrong, an image is listed twice, or a number differs.
    """
    facts = facts or FACTS[dataset]
    layout = LAYOUTS[dataset]
    chosen = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in chosen if name not in layout.options]:
        raise ValueError(f"{facts.title} takes no option {unknown[0]}.")
    listed = list(layout.read(source, **{**layout.options, **chosen}))
    if not listed:
        raise ValueError(f"{source.path} holds no images of {facts.title}.")
    class_folders = _class_folders(listed)
    if not {"taxa", "without"} & chosen.keys():
        _check_numbers(listed, len(set(class_folders.values())), facts, source)
    found = _find_images(listed, source, skip_missing)
    images = [
        PlannedImage(
            entry.split, class_folders[entry.number, entry.class_name], _safe_name(PurePosixPath(file.path).name), file
        )
        for entry, file in found
    ]
    _check_places(images)
    return Plan(facts, images, len(listed) - len(found))


def _class_folders(listed: Iterable[Listed]) -> dict[tuple[int | None, str], str]:
    """Name the folder of each class: its number, where it has one, as `NNN.`, and its name.

    `load_image_data` numbers classes in the sorted order of these folders and cuts the number off for display.
    """
    classes = sorted({(entry.number, entry.class_name) for entry in listed}, key=lambda key: (key[0] or 0, key[1]))
    numbers = Counter(number for number, _ in classes if number is not None)
    if doubled := [number for number, times in numbers.items() if times > 1]:
        names = ", ".join(name for number, name in classes if number == doubled[0])
        raise ValueError(f"The class {doubled[0]} has more than one name in the lists: {names}.")
    width = max(3, len(str(max(numbers, default=0))))
    times = Counter(_safe_name(name).lower() for _, name in classes)
    folders = {}
    for number, name in classes:
        safe = _safe_name(name)
        if number is not None:
            # Two species of IP102 share one common name.
            safe = f"{number:0{width}}.{safe}" + (f" ({number})" if times[safe.lower()] > 1 else "")
        elif times[safe.lower()] > 1:
            raise ValueError(f"Two classes would both be kept in the folder {safe!r}; one of them is {name!r}.")
        folders[number, name] = safe
    return folders


def _safe_name(name: str) -> str:
    """Make a name that every file system takes, Windows's included, and that stays readable."""
    safe = re.sub(r"[/\\:|]", "-", unicodedata.normalize("NFC", name))
    safe = " ".join(re.sub(r'[<>"?*\x00-\x1f\x7f]', "", safe).split()).rstrip(". ")
    return f"_{safe}" if not safe or safe.startswith(".") or _DEVICE.fullmatch(safe) else safe


def _check_numbers(listed: Iterable[Listed], num_classes: int, facts: DatasetFacts, source: Source) -> None:
    if facts.num_classes not in (None, num_classes):
        raise ValueError(
            f"{facts.title} has {facts.num_classes} classes, and the lists in {source.path} name {num_classes}; "
            "download the data set again."
        )
    counts = Counter(entry.split for entry in listed)
    for split, numbers in facts.num_images.items():
        if counts[split] not in numbers:
            wanted = " or ".join(f"{number:,}" for number in numbers)
            raise ValueError(
                f"{facts.title} has {wanted} {split} images, and the lists in {source.path} name {counts[split]:,}; "
                "download the data set again."
            )


def _find_images(listed: Iterable[Listed], source: Source, skip_missing: bool) -> list[tuple[Listed, SourceFile]]:
    found: list[tuple[Listed, SourceFile]] = []
    missing: list[Listed] = []
    first: dict[tuple[int, int], str] = {}
    for entry in listed:
        if (file := source.find(entry.path, entry.folder)) is None:
            missing.append(entry)
            continue
        if file.position in first:
            raise ValueError(f"The image {entry.path} is listed twice: {first[file.position]}, and {entry.where}.")
        first[file.position] = entry.where
        found.append((entry, file))
    if missing and (not skip_missing or not found):
        count = "1 listed image is" if len(missing) == 1 else f"{len(missing):,} listed images are"
        named = some_of(f"{entry.path} ({entry.where})" for entry in missing)
        raise FileNotFoundError(f"{count} not in {source.path}: {named}.")
    return found


def _check_places(images: Iterable[PlannedImage]) -> None:
    """Raise where two images would get one name, on file systems that do not tell capitals apart too."""
    taken: dict[str, PlannedImage] = {}
    for image in images:
        other = taken.setdefault(str(image.path).lower(), image)
        if other is not image:
            raise ValueError(f"{other.source} and {image.source} would both be kept as {image.path}.")
