# SPDX-License-Identifier: MIT
"""Readers of the lists in which each data set says which image is of which class and split: one for each layout.

A reader turns the lists of a data set into `Listed` images; the images themselves need not be there yet.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from scipy.io import loadmat

from prompt_cam_hf.data.images import image_suffixes
from prompt_cam_hf.data.prepare.archives import Source, SourceFile
from prompt_cam_hf.data.prepare.flowers import FLOWER_NAMES
from prompt_cam_hf.data.sources import SPLIT_NAMES


class Listed(NamedTuple):
    """An image as a list names it.

    Attributes:
        split: "train", "validation" or "test".
        number: The class's place in the data set's own order, from 1, or None where it has no order of its own.
        class_name: The class.
        path: The image's path, below whatever other folders, or exactly below `folder` where that is given.
        where: The list and the line, for messages.
    """

    split: str
    number: int | None
    class_name: str
    path: str
    where: str
    folder: str | None = None


@dataclass(frozen=True)
class Layout:
    """How one data set is read: by `read(source, **options)`, from these lists, with these default options."""

    read: Callable[..., Iterable[Listed]]
    list_names: Collection[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


def _text(file: SourceFile) -> str:
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8: {error}.") from error


def _rows(file: SourceFile, pattern: str, form: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (list and line, groups of `pattern`) of every line that is neither empty nor a comment."""
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(pattern, line.strip())
        if match is None:
            raise ValueError(f"{file}, line {number}: wanted is {form}, got {line!r}.")
        yield f"{file.path}, line {number}", match.groups()


def _table(file: SourceFile, pattern: str, form: str) -> dict[int, str]:
    """Read lines of a number and a text, each number once."""
    table: dict[int, str] = {}
    for where, (number, text) in _rows(file, pattern, form):
        if int(number) in table:
            raise ValueError(f"{where}: the number {number} is listed a second time.")
        table[int(number)] = text
    return table


def _class_name(names: Mapping[int, str], number: int, where: str) -> str:
    if number not in names:
        raise ValueError(f"{where}: there is no class {number}; the classes are {min(names)} to {max(names)}.")
    return names[number]


def _mat(file: SourceFile, *keys: str) -> list[np.ndarray]:
    """Read variables of a Matlab file as flat arrays."""
    content = io.BytesIO(file.read())
    try:
        variables = loadmat(content, squeeze_me=True)
    except Exception as error:  # scipy raises nearly every type there is on broken files
        raise ValueError(f"{file} cannot be read as a Matlab file: {error}") from error
    if missing := [key for key in keys if key not in variables]:
        raise ValueError(f"{file} has no variable {missing[0]!r}; it holds {', '.join(sorted(variables))}.")
    return [np.atleast_1d(variables[key]) for key in keys]


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _read_cub(source: Source) -> Iterator[Listed]:
    images = source.require("images.txt")
    path_of = _table(images, r"(\d+)\s+(\S.*)", "an image number and a path")
    beside = {
        name: source.require(name, images.folder)
        for name in ("image_class_labels.txt", "train_test_split.txt", "classes.txt")
    }
    class_of = _table(beside["image_class_labels.txt"], r"(\d+)\s+(\d+)", "an image number and a class number")
    is_train = _table(beside["train_test_split.txt"], r"(\d+)\s+([01])", "an image number and 1 (train) or 0 (test)")
    names = _table(beside["classes.txt"], r"(\d+)\s+(?:\d+\.)?(\S.*)", "a class number and a name")
    for name, numbers in (("image_class_labels.txt", class_of), ("train_test_split.txt", is_train)):
        if unlike := sorted(numbers.keys() ^ path_of.keys()):
            has, lacks = (images.path, name) if unlike[0] in path_of else (name, images.path)
            raise ValueError(f"The image {unlike[0]} stands in {has} and not in {lacks}; download the lists again.")
    for image, path in path_of.items():
        where = f"{images.path}, image {image}"
        yield Listed(
            "train" if is_train[image] == "1" else "test",
            int(class_of[image]),
            _spaced(_class_name(names, int(class_of[image]), where)),
            f"images/{path}",
            where,
            images.folder,
        )


def _read_pet(source: Source) -> Iterator[Listed]:
    names: dict[int, str] = {}
    form = "an image's name, ending in _NUMBER, and three numbers"
    for name, split in (("trainval.txt", "train"), ("test.txt", "test")):
        for where, (breed, image, number) in _rows(
            source.require(f"annotations/{name}"), r"(\S+)(_\d+)\s+(\d+)\s+\d+\s+\d+", form
        ):
            if names.setdefault(int(number), breed) != breed:
                raise ValueError(f"{where}: the class {number} is called {breed}, and {names[int(number)]} before.")
            yield Listed(split, int(number), _spaced(breed), f"images/{breed}{image}.jpg", where)


def _read_cars(source: Source) -> Iterator[Listed]:
    meta = source.require("cars_meta.mat", hint="it is in the devkit")
    (names,) = _mat(meta, "class_names")
    class_names = dict(enumerate(map(str, names), 1))
    hint = "the labels of the test images are a download of their own, beside the devkit"
    for name, split in (("cars_train_annos.mat", "train"), ("cars_test_annos_withlabels.mat", "test")):
        annotations = source.require(name, hint=hint if split == "test" else "it is in the devkit")
        (rows,) = _mat(annotations, "annotations")
        if not {"fname", "class"} <= set(rows.dtype.names or ()):
            raise ValueError(f"{annotations} does not give the fields fname and class of each image.")
        for number, row in enumerate(rows, 1):
            where = f"{annotations.path}, row {number}"
            label = int(row["class"])
            image = f"cars_{split}/{row['fname']}"
            yield Listed(split, label, _class_name(class_names, label, where), image, where)


def _read_dogs(source: Source) -> Iterator[Listed]:
    for split in ("train", "test"):
        file = source.require(f"{split}_list.mat")
        paths, labels = _mat(file, "file_list", "labels")
        if len(paths) != len(labels):
            raise ValueError(f"{file} lists {len(paths)} images and {len(labels)} labels.")
        for row, (path, label) in enumerate(zip(map(str, paths), labels, strict=True), 1):
            where = f"{file.path}, row {row}"
            match = re.fullmatch(r"n\d+-(.+)/[^/]+", path)
            if match is None:
                raise ValueError(f"{where}: wanted is nNUMBER-BREED/IMAGE, got {path!r}.")
            yield Listed(split, int(label), _spaced(match[1]), f"Images/{path}", where)


def _read_flowers(source: Source) -> Iterator[Listed]:
    label_file, split_file = source.require("imagelabels.mat"), source.require("setid.mat")
    (labels,) = _mat(label_file, "labels")
    names = dict(enumerate(FLOWER_NAMES, 1))
    for key, split in (("trnid", "train"), ("valid", "validation"), ("tstid", "test")):
        for image in map(int, _mat(split_file, key)[0]):
            where = f"{split_file.path}, {key}"
            if not 1 <= image <= len(labels):
                raise ValueError(f"{where}: there is no image {image}; {label_file.path} has {len(labels)} labels.")
            label = int(labels[image - 1])
            path = f"jpg/image_{image:05}.jpg"
            yield Listed(split, label, _class_name(names, label, label_file.path), path, where)


def _read_food101(source: Source) -> Iterator[Listed]:
    class_list = source.require("meta/classes.txt")
    numbers = {name: number for number, (_, (name,)) in enumerate(_rows(class_list, r"(\S+)", "a class name"), 1)}
    for split in ("train", "test"):
        file = source.require(f"{split}.txt", class_list.folder)
        for where, (path, name) in _rows(file, r"(([^/\s]+)/\S+)", "CLASS/IMAGE without .jpg"):
            if name not in numbers:
                raise ValueError(f"{where}: the class {name} is not in {class_list.path}.")
            yield Listed(split, numbers[name], _spaced(name), f"images/{path}.jpg", where)


def _read_insects2(source: Source) -> Iterator[Listed]:
    hint = "its authors keep it in the repository https://github.com/xpwu95/IP102"
    names = _table(source.require("classes.txt", hint=hint), r"(\d+)\s+(\S.*)", "a class number and a name")
    train = source.require("train.txt")
    for name, split in (("train.txt", "train"), ("val.txt", "validation"), ("test.txt", "test")):
        rows = _rows(source.require(name, train.folder), r"(\S+)\s+(\d+)", "an image and a class number from 0")
        for where, (image, label) in rows:
            number = int(label) + 1  # the lists count from 0, classes.txt from 1
            yield Listed(split, number, _class_name(names, number, where), f"images/{image}", where)


def _read_fish_vista(source: Source) -> Iterator[Listed]:
    train = source.require("classification_train.csv")
    for name, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        file = source.require(f"classification_{name}.csv", train.folder)
        for number, row in enumerate(csv.DictReader(io.StringIO(_text(file))), 2):
            where = f"{file.path}, line {number}"
            species, path = row.get("standardized_species"), row.get("file_name")
            if not species or not path:
                raise ValueError(f"{where}: nothing in the column standardized_species or file_name.")
            # `file_name` has the folder on the Hub; the data set's own instructions move all images into one.
            found = path if source.find(path) else f"Images/{PurePosixPath(path).name}"
            yield Listed(split, None, species, found, where)


def _read_inaturalist(
    source: Source, taxa: Mapping[str, Collection[str]], without: Mapping[str, Collection[str]]
) -> Iterator[Listed]:
    full, mini = source.find("train.json"), source.find("train_mini.json")
    if full and mini:
        raise ValueError(f"{source.path} holds both train.json and train_mini.json; keep the one to train on.")
    train = full or mini or source.require("train.json")
    # The test images of the competition have no public labels: its validation images are the ones to test on.
    for file, split in ((train, "train"), (source.require("val.json"), "test")):
        try:
            content = json.loads(_text(file))
            categories = {entry["id"]: entry for entry in content["categories"]}
            path_of = {entry["id"]: entry["file_name"] for entry in content["images"]}
            labels = [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not a list of categories, images and annotations in JSON: {error!r}."
            ) from error
        for wanted in (taxa, without):
            if unknown := [rank for rank in wanted if any(rank not in entry for entry in categories.values())]:
                ranks = ", ".join(sorted(next(iter(categories.values()))))
                raise ValueError(f"{file} does not give the {unknown[0]} of each category; it gives {ranks}.")
        chosen = sorted(
            number
            for number, entry in categories.items()
            if all(entry[rank] in names for rank, names in taxa.items())
            and not any(entry[rank] in names for rank, names in without.items())
        )
        order = {category: number for number, category in enumerate(chosen, 1)}
        for image, category in labels:
            if category in order:
                name = categories[category]["name"]
                yield Listed(split, order[category], name, path_of[image], f"{file.path}, image {image}")


def _read_birds525(source: Source) -> Iterator[Listed]:
    for file in source.with_suffixes(image_suffixes()):
        *_, split, name, _ = ("", "", *PurePosixPath(file.path).parts)
        if split in SPLIT_NAMES:
            # One species has two spaces in its name in some splits and one in others.
            name = " ".join(name.split())
            yield Listed(SPLIT_NAMES[split], None, name, file.path, file.path, "")


def _read_medicinal_leaf(source: Source, test_fraction: float, seed: int) -> Iterator[Listed]:
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction is {test_fraction}; it has to be between 0 and 1.")
    of_class: dict[str, list[str]] = {}
    for file in source.with_suffixes(image_suffixes()):
        of_class.setdefault(PurePosixPath(file.path).parent.name, []).append(file.path)
    random = np.random.default_rng(seed)
    for name, paths in sorted(of_class.items()):
        if len(paths) < 2:
            raise ValueError(f"The class {name!r} has one image only, {paths[0]}; train and test need one each.")
        num_test = min(len(paths) - 1, max(1, round(test_fraction * len(paths))))
        test = set(random.permutation(len(paths))[:num_test].tolist())
        for place, path in enumerate(paths):
            yield Listed("test" if place in test else "train", None, name, path, path, "")


_BUTTERFLIES = ("Hedylidae", "Hesperiidae", "Lycaenidae", "Nymphalidae", "Papilionidae", "Pieridae", "Riodinidae")
_INATURALIST_LISTS = ("train.json", "train_mini.json", "val.json")

# What the paper took of iNaturalist-2021 is unknown: these are all Fungi, and all Lepidoptera but the butterflies.
LAYOUTS: Mapping[str, Layout] = {
    "cub": Layout(_read_cub, ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")),
    "birds525": Layout(_read_birds525),
    "dogs": Layout(_read_dogs, ("train_list.mat", "test_list.mat")),
    "pet": Layout(_read_pet, ("trainval.txt", "test.txt")),
    "cars": Layout(_read_cars, ("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat")),
    "moths": Layout(
        _read_inaturalist,
        _INATURALIST_LISTS,
        {"taxa": {"order": ("Lepidoptera",)}, "without": {"family": _BUTTERFLIES}},
    ),
    "fungi": Layout(_read_inaturalist, _INATURALIST_LISTS, {"taxa": {"supercategory": ("Fungi",)}, "without": {}}),
    "fish_vista": Layout(
        _read_fish_vista, ("classification_train.csv", "classification_val.csv", "classification_test.csv")
    ),
    "insects2": Layout(_read_insects2, ("classes.txt", "train.txt", "val.txt", "test.txt")),
    "flowers": Layout(_read_flowers, ("imagelabels.mat", "setid.mat")),
    "medicinal_leaf": Layout(_read_medicinal_leaf, options={"test_fraction": 0.2, "seed": 0}),
    "food101": Layout(_read_food101, ("classes.txt", "train.txt", "test.txt")),
}
