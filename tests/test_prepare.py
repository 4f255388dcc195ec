# SPDX-License-Identifier: MIT
"""Data sets in their official layouts become image folders: complete, checked, safe, and resumable after any kill."""

import csv
import dataclasses
import io
import itertools
import json
import os
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.io import savemat
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.data import prepare as prepare_module
from prompt_cam_hf.data.prepare import FACTS, DatasetFacts, image_folder, prepare
from prompt_cam_hf.data.prepare.flowers import FLOWER_NAMES
from prompt_cam_hf.data.splits import load_image_data
from prompt_cam_hf.training import recipe as recipe_module
from prompt_cam_hf.training.recipe import load_recipe

RECIPES = Path(recipe_module.__file__).with_name("recipes")
DOCS = Path(__file__).parents[1] / "docs" / "datasets.md"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- Look-alikes: {path: content} of each official layout --------------------------------------------------------

_numbers = itertools.count()


def image() -> bytes:
    """An image that no other one equals."""
    number = next(_numbers)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def mat(**variables) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables)
    return buffer.getvalue()


def cells(texts) -> np.ndarray:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array


def lines(*rows) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def cub():
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross", "003.Zebra_Finch"]
    rows = [(f"{name}/{name[4:]}_{n}.jpg", label, n < 3) for label, name in enumerate(names, 1) for n in range(5)]
    return {
        "CUB_200_2011/images.txt": lines(*(f"{i} {path}" for i, (path, _, _) in enumerate(rows, 1))),
        "CUB_200_2011/image_class_labels.txt": lines(*(f"{i} {label}" for i, (_, label, _) in enumerate(rows, 1))),
        "CUB_200_2011/train_test_split.txt": lines(*(f"{i} {int(train)}" for i, (_, _, train) in enumerate(rows, 1))),
        "CUB_200_2011/classes.txt": lines(*(f"{label} {name}" for label, name in enumerate(names, 1))),
        "CUB_200_2011/attributes/images.txt": b"another list of this name, deeper down",
        **{f"CUB_200_2011/images/{path}": image() for path, _, _ in rows},
    }


def pet():
    breeds = ["Abyssinian", "american_bulldog", "Bengal"]
    trainval = [f"{breed}_{n} {label} 1 1" for label, breed in enumerate(breeds, 1) for n in (1, 2, 30)]
    test = [f"{breed}_{n} {label} 1 1" for label, breed in enumerate(breeds, 1) for n in (4,)]
    return {
        "annotations/trainval.txt": lines("#Image CLASS-ID SPECIES BREED ID", *trainval),
        "annotations/test.txt": lines(*test),
        "annotations/list.txt": b"not needed",
        "annotations/trimaps/._Abyssinian_1.png": b"what macOS adds",
        **{f"images/{row.split()[0]}.jpg": image() for row in trainval + test},
    }


def cars():
    names = ["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012", "Ferrari FF Coupe 2012", "Acura RL 2012"]
    kind = [("fname", object), ("class", object)]

    def annotations(count):
        return np.array([(f"{n + 1:05}.jpg", n % len(names) + 1) for n in range(count)], dtype=kind)

    return {
        "devkit/cars_meta.mat": mat(class_names=cells(names)),
        "devkit/cars_train_annos.mat": mat(annotations=annotations(9)),
        "cars_test_annos_withlabels.mat": mat(annotations=annotations(4)),
        **{f"cars_train/{n + 1:05}.jpg": image() for n in range(9)},
        **{f"cars_test/{n + 1:05}.jpg": image() for n in range(4)},
    }


def dogs():
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel", "n02113712-miniature_poodle"]
    train = [(f"{breed}/{breed[:9]}_{n}.jpg", label) for label, breed in enumerate(breeds, 1) for n in range(2)]
    test = [(f"{breed}/{breed[:9]}_{n}.jpg", label) for label, breed in enumerate(breeds, 1) for n in (7, 8)]
    return {
        **{
            f"{split}_list.mat": mat(
                file_list=cells([path for path, _ in rows]), labels=np.array([[label] for _, label in rows])
            )
            for split, rows in (("train", train), ("test", test))
        },
        **{f"Images/{path}": image() for path, _ in train + test},
    }


def flowers():
    return {
        "imagelabels.mat": mat(labels=np.array([[1, 1, 2, 2, 77, 77, 1, 2, 77]], dtype=np.uint8)),
        "setid.mat": mat(trnid=np.array([[1, 3, 5]]), valid=np.array([[2, 4, 6]]), tstid=np.array([[9, 8, 7]])),
        **{f"jpg/image_{n:05}.jpg": image() for n in range(1, 10)},
    }


def food101():
    names = ["apple_pie", "cheesecake", "cheese_plate"]  # the official order, which is not the sorted one
    train, test = ([f"{name}/{n}" for name in names for n in numbers] for numbers in ((100, 200), (300,)))
    return {
        "food-101/meta/classes.txt": lines(*names),
        "food-101/meta/train.txt": lines(*train),
        "food-101/meta/test.txt": lines(*test),
        **{f"food-101/images/{path}.jpg": image() for path in train + test},
    }


def insects2():
    splits = {"train": [(0, 0), (1, 0), (2, 1), (3, 2)], "val": [(4, 0), (5, 1), (6, 2)], "test": [(7, 0), (8, 2)]}
    return {
        "classes.txt": lines("1  rice leaf roller \t\t", "2  alfalfa weevil\t", "3  alfalfa weevil\t", ""),
        "Detection/VOC2007/ImageSets/Main/test.txt": lines("not this list"),
        **{
            f"ip102_v1.1/{split}.txt": lines(*(f"{n:05}.jpg {label}" for n, label in rows))
            for split, rows in splits.items()
        },
        **{f"ip102_v1.1/images/{n:05}.jpg": image() for n in range(9)},
    }


def birds525():
    names = ["ABBOTTS BABBLER", "PARAKETT  AUKLET"]
    files = {f"train/{name}/{n:03}.jpg": image() for name in names for n in range(3)}
    for split in ("valid", "test"):
        files |= {f"{split}/{' '.join(name.split())}/1.jpg": image() for name in names}
    return {**files, "birds.csv": b"class id,filepaths\n", "model.h5": b"weights"}


def medicinal_leaf():
    top = "Medicinal Leaf Dataset/Segmented Medicinal Leaf Images"
    return {f"{top}/{name}/L-{n:03}.jpg": image() for name in ("Azadirachta Indica (Neem)", "Mint") for n in range(10)}


CATEGORIES = [
    ("Amanita muscaria", "Fungi", "Agaricales", "Amanitaceae"),
    ("Actias luna", "Insects", "Lepidoptera", "Saturniidae"),
    ("Boletus edulis", "Fungi", "Boletales", "Boletaceae"),
    ("Vanessa atalanta", "Insects", "Lepidoptera", "Nymphalidae"),
    ("Hyles lineata", "Insects", "Lepidoptera", "Sphingidae"),
]


def inaturalist():
    files = {}
    for split, count in (("train", 3), ("val", 1)):
        images = [
            (number, f"{split}/{label:05}_{CATEGORIES[label][0].replace(' ', '_')}/{number}.jpg", label)
            for number, label in enumerate(label for label in range(len(CATEGORIES)) for _ in range(count))
        ]
        ranks = ("name", "supercategory", "order", "family")
        content = {
            "categories": [
                {"id": label, **dict(zip(ranks, row, strict=True))} for label, row in enumerate(CATEGORIES)
            ],
            "images": [{"id": number, "file_name": path} for number, path, _ in images],
            "annotations": [{"id": number, "image_id": number, "category_id": label} for number, _, label in images],
        }
        files |= {f"{split}.json": json.dumps(content).encode(), **{path: image() for _, path, _ in images}}
    return files


def fish_vista():
    files = {}
    for split, names in (("train", "abc"), ("val", "de"), ("test", "fg")):
        rows = [(f"Images/chunk_1/{name}.jpg", f"{name}.jpg", f"noturus {n % 2}") for n, name in enumerate(names)]
        files[f"classification_{split}.csv"] = lines("file_name,filename,standardized_species", *map(",".join, rows))
        files |= {path: image() for path, _, _ in rows}
    files["Images/g.jpg"] = files.pop("Images/chunk_1/g.jpg")  # moved, as the data set's own instructions say
    return files


def tiny(dataset, num_classes, **num_images) -> DatasetFacts:
    numbers = {split: (number,) for split, number in num_images.items()}
    return dataclasses.replace(FACTS[dataset], num_classes=num_classes, num_images=numbers)


# For each data set: the files, the tiny numbers, and {split: {class folder: images}} as they must come out.
LOOK_ALIKES = {
    "cub": (
        cub,
        tiny("cub", 3, train=9, test=6),
        {
            "train": {"001.Black footed Albatross": 3, "002.Laysan Albatross": 3, "003.Zebra Finch": 3},
            "test": {"001.Black footed Albatross": 2, "002.Laysan Albatross": 2, "003.Zebra Finch": 2},
        },
    ),
    "pet": (
        pet,
        tiny("pet", 3, train=9, test=3),
        {
            "train": {"001.Abyssinian": 3, "002.american bulldog": 3, "003.Bengal": 3},
            "test": {"001.Abyssinian": 1, "002.american bulldog": 1, "003.Bengal": 1},
        },
    ),
    "cars": (
        cars,
        tiny("cars", 4, train=9, test=4),
        {
            "train": {
                "001.AM General Hummer SUV 2000": 3,
                "002.Ram C-V Cargo Van Minivan 2012": 2,
                "003.Ferrari FF Coupe 2012": 2,
                "004.Acura RL 2012": 2,
            },
            "test": {
                "001.AM General Hummer SUV 2000": 1,
                "002.Ram C-V Cargo Van Minivan 2012": 1,
                "003.Ferrari FF Coupe 2012": 1,
                "004.Acura RL 2012": 1,
            },
        },
    ),
    "dogs": (
        dogs,
        tiny("dogs", 3, train=6, test=6),
        {
            split: {"001.Chihuahua": 2, "002.Japanese spaniel": 2, "003.miniature poodle": 2}
            for split in ("train", "test")
        },
    ),
    "flowers": (
        flowers,
        tiny("flowers", 3, train=3, validation=3, test=3),
        {
            split: {"001.pink primrose": 1, "002.hard-leaved pocket orchid": 1, "077.passion flower": 1}
            for split in ("train", "validation", "test")
        },
    ),
    "food101": (
        food101,
        tiny("food101", 3, train=6, test=3),
        {
            "train": {"001.apple pie": 2, "002.cheesecake": 2, "003.cheese plate": 2},
            "test": {"001.apple pie": 1, "002.cheesecake": 1, "003.cheese plate": 1},
        },
    ),
    "insects2": (
        insects2,
        tiny("insects2", 3, train=4, validation=3, test=2),
        {
            "train": {"001.rice leaf roller": 2, "002.alfalfa weevil (2)": 1, "003.alfalfa weevil (3)": 1},
            "validation": {"001.rice leaf roller": 1, "002.alfalfa weevil (2)": 1, "003.alfalfa weevil (3)": 1},
            "test": {"001.rice leaf roller": 1, "003.alfalfa weevil (3)": 1},
        },
    ),
    "birds525": (
        birds525,
        tiny("birds525", 2, train=6, validation=2, test=2),
        {
            "train": {"ABBOTTS BABBLER": 3, "PARAKETT AUKLET": 3},
            "validation": {"ABBOTTS BABBLER": 1, "PARAKETT AUKLET": 1},
            "test": {"ABBOTTS BABBLER": 1, "PARAKETT AUKLET": 1},
        },
    ),
    "medicinal_leaf": (
        medicinal_leaf,
        tiny("medicinal_leaf", 2),
        {"train": {"Azadirachta Indica (Neem)": 8, "Mint": 8}, "test": {"Azadirachta Indica (Neem)": 2, "Mint": 2}},
    ),
    "fungi": (
        inaturalist,
        tiny("fungi", 2, train=6, test=2),
        {
            "train": {"001.Amanita muscaria": 3, "002.Boletus edulis": 3},
            "test": {"001.Amanita muscaria": 1, "002.Boletus edulis": 1},
        },
    ),
    "moths": (
        inaturalist,
        tiny("moths", 2),
        {
            "train": {"001.Actias luna": 3, "002.Hyles lineata": 3},
            "test": {"001.Actias luna": 1, "002.Hyles lineata": 1},
        },
    ),
    "fish_vista": (
        fish_vista,
        tiny("fish_vista", 2),
        {
            "train": {"noturus 0": 2, "noturus 1": 1},
            "validation": {"noturus 0": 1, "noturus 1": 1},
            "test": {"noturus 0": 1, "noturus 1": 1},
        },
    ),
}


def write_folder(files, folder) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def write_tar(files, path, mode="w:gz") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_zip(files, path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def is_image(path) -> bool:
    return Path(path).suffix in (".jpg", ".png") and not Path(path).name.startswith(".")


def found(folder) -> dict[str, dict[str, int]]:
    """Count the images of an image folder: split -> class -> images."""
    counted = Counter(path.parts[-3:-1] for path in folder.rglob("*") if path.is_file() and len(path.parts) >= 3)
    counted = {key: number for key, number in counted.items() if key[0] in ("train", "validation", "test")}
    splits = {split for split, _ in counted}
    return {split: {name: number for (s, name), number in counted.items() if s == split} for split in splits}


def snapshot(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def birds(tmp_path):
    """CUB's look-alike as a folder, and the call that prepares it."""
    source = write_folder(cub(), tmp_path / "source")

    def call(**options):
        return prepare("cub", source, tmp_path / "out", **{"facts": LOOK_ALIKES["cub"][1], **options})

    return source, tmp_path / "out", call


# --- What comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["folder", "tgz", "tar", "zip", "folder of archives"])
@pytest.mark.parametrize("dataset", LOOK_ALIKES)
def test_every_data_set_in_every_form(dataset, form, tmp_path):
    make, facts, expected = LOOK_ALIKES[dataset]
    files = make()
    if form == "folder":
        source = write_folder(files, tmp_path / "source")
    elif form == "tgz":
        source = write_tar(files, tmp_path / "source.tgz")
    elif form == "tar":
        source = write_tar({f"./{path}": content for path, content in files.items()}, tmp_path / "source.tar", "w")
    elif form == "zip":
        source = write_zip(files, tmp_path / "source.zip")
    else:  # images and lists apart, as many are downloaded, with a resource fork of macOS
        source = tmp_path / "source"
        write_tar(
            {path: c for path, c in files.items() if is_image(path)}, source / "Classification" / "images.tar.gz"
        )
        write_zip({path: c for path, c in files.items() if not is_image(path)}, source / "lists.zip")
        write_folder({f"__MACOSX/{path}": b"fork" for path in files}, source)

    plan = prepare(dataset, source, tmp_path / "out", facts=facts)

    assert found(tmp_path / "out") == expected
    assert plan.count() == expected
    # Every image, with its content, exactly once, and nothing else but the list of them.
    written = snapshot(tmp_path / "out")
    with open(tmp_path / "out" / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == written.keys() - {"manifest.csv"}
    assert len(rows) == sum(sum(classes.values()) for classes in expected.values())
    for row in rows:
        assert written[row["file"]] == files[row["source"]]
        assert row["file"] == f"{row['split']}/{row['class']}/{Path(row['file']).name}"
        assert int(row["bytes"]) == len(files[row["source"]])


def spaced(name: str) -> str:
    return name.replace("_", " ")


FLOWER_LABELS = [1, 1, 2, 2, 77, 77, 1, 2, 77]
CAR_NAMES = ["AM General Hummer SUV 2000", "Ram C-V Cargo Van Minivan 2012", "Ferrari FF Coupe 2012", "Acura RL 2012"]
PESTS = ["rice leaf roller", "alfalfa weevil (2)", "alfalfa weevil (3)"]
# What an image's path in the look-alike says of its split and class, without any list.
TRUTH = {
    "cub": lambda path: ("train" if path.stem[-1] in "012" else "test", spaced(path.parent.name[4:])),
    "pet": lambda path: ("test" if path.stem.endswith("_4") else "train", spaced(path.stem.rsplit("_", 1)[0])),
    "cars": lambda path: (path.parent.name.removeprefix("cars_"), CAR_NAMES[(int(path.stem) - 1) % 4]),
    "dogs": lambda path: ("test" if path.stem[-1] in "78" else "train", spaced(path.parent.name.split("-")[1])),
    "flowers": lambda path: (
        "test" if path.stem[-1] in "789" else "train" if path.stem[-1] in "135" else "validation",
        FLOWER_NAMES[FLOWER_LABELS[int(path.stem[-1]) - 1] - 1],
    ),
    "food101": lambda path: ("test" if path.stem == "300" else "train", spaced(path.parent.name)),
    "insects2": lambda path: (
        "train" if path.stem < "00004" else "validation" if path.stem < "00007" else "test",
        PESTS[[0, 0, 1, 2, 0, 1, 2, 0, 2][int(path.stem)]],
    ),
    "birds525": lambda path: (
        path.parts[0].replace("valid", "validation"),
        path.parent.name.replace("PARAKETT  AUKLET", "PARAKETT AUKLET"),
    ),
    "moths": lambda path: ("test" if path.parts[0] == "val" else "train", spaced(path.parent.name[6:])),
    "fungi": lambda path: ("test" if path.parts[0] == "val" else "train", spaced(path.parent.name[6:])),
    "fish_vista": lambda path: (
        "train" if path.stem in "abc" else "validation" if path.stem in "de" else "test",
        "noturus 0" if path.stem in "acdf" else "noturus 1",
    ),
}


@pytest.mark.parametrize("dataset", TRUTH)
def test_images_are_of_the_class_and_split_of_the_lists(dataset, tmp_path):
    make, facts, expected = LOOK_ALIKES[dataset]
    files = make()
    prepare(dataset, write_folder(files, tmp_path / "source"), tmp_path / "out", facts=facts)
    path_of = {content: Path(path) for path, content in files.items()}
    data = load_image_data(tmp_path / "out", validation_fraction=0)
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    checked = 0
    for split, rows in splits.items():
        for row in rows or []:
            original = path_of[Path(row["image"]["path"]).read_bytes()]
            assert (split, data.id2label[row["label"]]) == TRUTH[dataset](original)
            checked += 1
    assert checked == sum(sum(classes.values()) for classes in expected.values())


def test_classes_keep_their_official_numbers(tmp_path):
    """Oxford Pet's order ignores capitals, Food-101's underscores: sorted names would number the classes otherwise."""
    for dataset, names in (
        ("pet", ["Abyssinian", "american bulldog", "Bengal"]),
        ("food101", ["apple pie", "cheesecake", "cheese plate"]),
        ("cub", ["Black footed Albatross", "Laysan Albatross", "Zebra Finch"]),
    ):
        make, facts, _ = LOOK_ALIKES[dataset]
        prepare(dataset, write_folder(make(), tmp_path / dataset), tmp_path / f"{dataset}_out", facts=facts)
        assert list(load_image_data(tmp_path / f"{dataset}_out").id2label.values()) == names


def test_images_are_linked_and_never_links_to_elsewhere(birds):
    source, out, call = birds
    call()
    linked = out / "train" / "001.Black footed Albatross" / "Black_footed_Albatross_0.jpg"
    original = source / "CUB_200_2011" / "images" / "001.Black_footed_Albatross" / "Black_footed_Albatross_0.jpg"
    assert linked.samefile(original) and not linked.is_symlink()
    shutil.rmtree(source)
    assert load_image_data(out).id2label[2] == "Zebra Finch"


def test_images_are_copied_where_they_cannot_be_linked(birds, monkeypatch):
    _, out, call = birds

    def refuse(*_, **__):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    call()
    assert found(out) == LOOK_ALIKES["cub"][2]
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*.jpg"))


def test_links_of_a_download_cache_are_followed(tmp_path):
    files = cub()
    blobs = write_folder({str(n): content for n, content in enumerate(files.values())}, tmp_path / "blobs")
    for number, path in enumerate(files):
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).symlink_to(blobs / str(number))
    prepare("cub", tmp_path / "source", tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
    shutil.rmtree(tmp_path / "source")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert found(tmp_path / "out") == LOOK_ALIKES["cub"][2]


def test_an_archive_beside_its_extracted_files_is_left_alone(birds):
    source, out, call = birds
    (source / "CUB_200_2011.tgz").write_bytes(b"never opened, or this would be an error")
    call()
    assert found(out) == LOOK_ALIKES["cub"][2]


def test_half_extracted_archives_are_completed_from_the_archive(birds):
    source, out, call = birds
    write_tar(snapshot(source), source / "CUB_200_2011.tgz")
    shutil.rmtree(source / "CUB_200_2011" / "images" / "003.Zebra_Finch")
    call()
    assert found(out) == LOOK_ALIKES["cub"][2]


def test_medicinal_leaf_is_divided_by_seed_and_fraction(tmp_path):
    source = write_folder(medicinal_leaf(), tmp_path / "source")
    facts = LOOK_ALIKES["medicinal_leaf"][1]

    def test_part(name, **options):
        prepare("medicinal_leaf", source, tmp_path / name, facts=facts, **options)
        return {path.relative_to(tmp_path / name / "test") for path in (tmp_path / name / "test").rglob("*.jpg")}

    assert test_part("a") == test_part("b", seed=0, test_fraction=0.2)
    assert len(test_part("c", seed=1)) == 4 and test_part("d", seed=2) != test_part("e")
    assert len(test_part("f", test_fraction=0.5)) == 10
    assert len(test_part("g", test_fraction=0.01)) == 2
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match=r"test_fraction is .*; it has to be between 0 and 1"):
            prepare("medicinal_leaf", source, tmp_path / "h", facts=facts, test_fraction=fraction)


def test_taxa_are_chosen_by_rank(tmp_path):
    source = write_folder(inaturalist(), tmp_path / "source")
    prepare("moths", source, tmp_path / "family", taxa={"family": ["Sphingidae", "Boletaceae"]}, without={})
    assert found(tmp_path / "family")["train"] == {"001.Boletus edulis": 3, "002.Hyles lineata": 3}
    # Other classes than the published ones have no published numbers.
    prepare("fungi", source, tmp_path / "all", taxa={"supercategory": ["Fungi", "Insects"]})
    assert len(found(tmp_path / "all")["test"]) == 5
    with pytest.raises(
        ValueError, match=r"train\.json does not give the tribe of each category; it gives family, id,"
    ):
        prepare("moths", source, tmp_path / "none", taxa={"tribe": ["x"]})
    with pytest.raises(ValueError, match="holds no images of iNaturalist-2021 Moths"):
        prepare("moths", source, tmp_path / "none", taxa={"order": ["Coleoptera"]})


def test_inaturalist_mini(tmp_path):
    files = inaturalist()
    mini = {path.replace("train", "train_mini", 1): content for path, content in files.items() if "val" not in path}
    mini["train_mini.json"] = files["train.json"].replace(b'"train/', b'"train_mini/')
    rest = {path: content for path, content in files.items() if "val" in path}
    source = write_folder({**mini, **rest}, tmp_path / "source")
    prepare("fungi", source, tmp_path / "out", facts=LOOK_ALIKES["fungi"][1])
    assert found(tmp_path / "out") == LOOK_ALIKES["fungi"][2]
    write_folder(files, source)
    with pytest.raises(ValueError, match=r"holds both train.json and train_mini.json"):
        prepare("fungi", source, tmp_path / "other", facts=LOOK_ALIKES["fungi"][1])


# --- Interruptions -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As a signal would end the process: nothing but `finally` runs."""


@pytest.mark.parametrize("form", ["links", "archive"])
@pytest.mark.parametrize("after", [0, 1, 7, 14, 15])
def test_a_killed_run_goes_on(form, after, tmp_path, monkeypatch):
    """Killed while the image number `after` is written; 15 is the list at the end."""
    files = cub()
    source = write_folder(files, tmp_path / "source") if form == "links" else write_tar(files, tmp_path / "source.tgz")
    facts = LOOK_ALIKES["cub"][1]
    prepare("cub", source, tmp_path / "expected", facts=facts)

    done = itertools.count()
    with monkeypatch.context() as patch:
        for module, name in ((os, "link"), (os, "replace")):
            original = getattr(module, name)

            def interrupted(a, b, original=original, **kwargs):
                if not Path(b).name.startswith(".link") and next(done) == after:
                    raise Killed
                return original(a, b, **kwargs)

            patch.setattr(module, name, interrupted)
        with pytest.raises(Killed):
            prepare("cub", source, tmp_path / "out", facts=facts)
    assert not (tmp_path / "out" / "manifest.csv").exists()
    before = snapshot(tmp_path / "out")
    assert len([path for path in before if is_image(path)]) == after

    prepare("cub", source, tmp_path / "out", facts=facts)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


def test_unfinished_copies_of_a_kill_without_warning_are_replaced(tmp_path):
    """A process that is killed outright removes nothing."""
    source = write_zip(cub(), tmp_path / "source.zip")
    folder = tmp_path / "out" / "train" / "001.Black footed Albatross"
    folder.mkdir(parents=True)
    (folder / ".Black_footed_Albatross_0.jpg.part").write_bytes(b"half a pict")
    (tmp_path / "out" / ".manifest.csv.part").write_bytes(b"split,cla")
    (tmp_path / "out" / ".link.part").write_bytes(b"")
    prepare("cub", source, tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
    assert [path.name for path in (tmp_path / "out").rglob(".*")] in ([], [".link.part"])
    assert found(tmp_path / "out") == LOOK_ALIKES["cub"][2]


def test_running_again_verifies_and_writes_nothing(birds, monkeypatch):
    _, out, call = birds
    call()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    monkeypatch.setattr(image_folder, "_place", None)  # any image that was written would be an error
    call()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == times


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    source = write_zip(cub(), tmp_path / "source.zip")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(OSError, match=r"has 0\.00 GB free, and the images take 0\.00 GB"):
        prepare("cub", source, tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
    assert not snapshot(tmp_path / "out")


# --- Nothing of the user's is lost -------------------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(birds):
    _, out, call = birds
    mine = {"train/my birds/1.jpg": b"mine", "manifest.csv": b"my list"}
    write_folder(mine, out)
    with pytest.raises(
        FileExistsError, match=r"not part of CUB-200-2011 .*: manifest\.csv, train/my birds/1\.jpg; choose"
    ):
        call()
    assert snapshot(out) == mine


def test_another_file_in_a_images_place_is_refused(birds):
    _, out, call = birds
    place = "train/001.Black footed Albatross/Black_footed_Albatross_0.jpg"
    write_folder({place: b"mine"}, out)
    with pytest.raises(
        FileExistsError, match=r"Albatross_0\.jpg is another file than .*: it has 4 bytes, and not \d+"
    ):
        call()
    assert snapshot(out) == {place: b"mine"}


def test_a_folder_in_a_images_place_is_refused(birds):
    _, out, call = birds
    (out / "train/001.Black footed Albatross/Black_footed_Albatross_0.jpg").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="it is not a file"):
        call()


def test_a_file_as_destination_is_refused(birds):
    _, out, call = birds
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="out is a file; choose a new folder"):
        call()
    assert out.read_text() == "mine"


@pytest.mark.parametrize("place", ["source", "source/out", "."])
def test_source_and_destination_stay_apart(place, tmp_path):
    source = write_folder(cub(), tmp_path / "source")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="lie in one another"):
        prepare("cub", source, tmp_path / place, facts=LOOK_ALIKES["cub"][1])
    assert snapshot(tmp_path) == before


# --- What is wrong is named --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (tiny("cub", 200, train=9, test=6), "CUB-200-2011 has 200 classes, and the lists in .* name 3;"),
        (tiny("cub", 3, train=5_994, test=6), "CUB-200-2011 has 5,994 train images, and the lists in .* name 9;"),
        (tiny("cub", 3, train=9, test=7), "CUB-200-2011 has 7 test images, and the lists in .* name 6;"),
        (tiny("cub", 3, train=9, validation=1), "CUB-200-2011 has 1 validation images, and the lists in .* name 0;"),
        (None, "CUB-200-2011 has 200 classes, and the lists in .* name 3;"),
    ],
)
def test_other_numbers_than_the_published_ones(birds, facts, message):
    _, out, call = birds
    with pytest.raises(ValueError, match=message):
        call(facts=facts)
    assert not out.exists()


@pytest.mark.parametrize(
    ("dataset", "name", "old", "new", "message"),
    [
        ("cub", "images.txt", b"2 001.", b"two 001.", r"images\.txt, line 2: wanted is an image number and a path"),
        ("cub", "images.txt", b"\n2 0", b"\n1 0", r"images\.txt, line 2: the number 1 is listed a second time"),
        ("cub", "images.txt", b"ross_1.jpg", b"ross_0.jpg", r"listed twice: .*images\.txt, image 1, and .*, image 2"),
        ("cub", "images.txt", b" 001.", b" ../x/001.", r"1 listed image is not in .*: images/\.\./x/001\."),
        ("cub", "class_labels.txt", b"1 1\n", b"1 9\n", r"image 1: there is no class 9; the classes are 1 to 3"),
        (
            "cub",
            "class_labels.txt",
            b"1 1\n",
            b"",
            r"image 1 stands in .*images\.txt and not in image_class_labels\.txt",
        ),
        (
            "cub",
            "split.txt",
            b"1 1\n",
            b"1 2\n",
            r"split\.txt, line 1: wanted is .* 1 \(train\) or 0 \(test\), got '1 2'",
        ),
        ("cub", "classes.txt", b"1 0", b"\xff 0", r"classes\.txt is not text in UTF-8"),
        (
            "pet",
            "/test.txt",
            b"4 1 1 1",
            b"4 1",
            r"annotations/test\.txt, line 1: wanted is an image's name, ending in",
        ),
        ("pet", "/test.txt", b"4 1 1 1", b"4 2 1 1", r"class 2 is called Abyssinian, and american_bulldog before"),
        ("pet", "/test.txt", b"nian_4", b"nian_30", r"listed twice: .*trainval\.txt, line 4, and .*test\.txt, line 1"),
        ("cars", "cars_meta.mat", b"", mat(a=[1]), r"cars_meta\.mat has no variable 'class_names'"),
        ("cars", "cars_meta.mat", b"", mat(class_names=cells("ab")), r"row 3: there is no class 3; .* are 1 to 2"),
        ("cars", "train_annos.mat", b"", mat(annotations=[1]), r"does not give the fields fname and class"),
        ("cars", "train_annos.mat", b"", b"no Matlab", r"cars_train_annos\.mat cannot be read as a Matlab file"),
        ("cars", "train_annos.mat", b"", None, r"cars_train_annos\.mat cannot be read as a Matlab file"),
        (
            "dogs",
            "test_list.mat",
            b"",
            mat(file_list=cells("x"), labels=[1]),
            r"row 1: wanted is nNUMBER-BREED/IMAGE",
        ),
        ("dogs", "test_list.mat", b"", mat(file_list=cells("x"), labels=[1, 2]), r"lists 1 images and 2 labels"),
        ("flowers", "setid.mat", b"", mat(trnid=[1], valid=[2], tstid=[10]), r"no image 10; imagelabels\.mat has 9"),
        ("flowers", "labels.mat", b"", mat(labels=[103] * 9), r"there is no class 103; the classes are 1 to 102"),
        (
            "food101",
            "test.txt",
            b"apple_pie",
            b"pizza",
            r"test\.txt, line 1: the class pizza is not in .*classes\.txt",
        ),
        (
            "insects2",
            "val.txt",
            b".jpg 0",
            b".jpg 3",
            r"val\.txt, line 1: there is no class 4; the classes are 1 to 3",
        ),
        ("fish_vista", "val.csv", b"noturus 1", b"", r"val\.csv, line 3: nothing in the column standardized_species"),
        (
            "fungi",
            "val.json",
            b'"images"',
            b'"image"',
            r"val\.json is not a list of categories, .*KeyError\('images'\)",
        ),
        ("fungi", "train.json", b"{", b"", r"train\.json is not a list of categories, images and annotations in JSON"),
    ],
)
def test_wrong_lists(dataset, name, old, new, message, tmp_path):
    """`old` becomes `new` in the list; where it is empty, `new` is the whole list (None: nothing at all)."""
    make, facts, _ = LOOK_ALIKES[dataset]
    files = make()
    path = next(path for path in files if path.endswith(name))
    assert old in files[path]
    files[path] = files[path].replace(old, new, 1) if old else new or b""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(dataset, write_folder(files, tmp_path / "source"), tmp_path / "out", facts=facts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dataset", "path", "message"),
    [
        ("cub", "CUB_200_2011/classes.txt", r"holds no classes\.txt beside the other lists in CUB_200_2011"),
        ("cars", "cars_test_annos_withlabels.mat", "the labels of the test images are a download of their own"),
        (
            "insects2",
            "classes.txt",
            r"holds no classes\.txt; its authors keep it in the repository https://github\.com/xpwu95",
        ),
        ("food101", "food-101/meta/train.txt", r"holds no train\.txt beside"),
        ("moths", "train.json", r"holds no train\.json"),
    ],
)
def test_missing_lists(dataset, path, message, tmp_path):
    make, facts, _ = LOOK_ALIKES[dataset]
    files = make()
    del files[path]
    with pytest.raises(FileNotFoundError, match=message):
        prepare(dataset, write_folder(files, tmp_path / "source"), tmp_path / "out", facts=facts)


def test_missing_images(birds):
    source, out, call = birds
    missing = source / "CUB_200_2011" / "images" / "003.Zebra_Finch" / "Zebra_Finch_0.jpg"
    missing.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 listed image is not in .*: images/003\.Zebra_Finch/Zebra_Finch_0\.jpg"
    ):
        call()
    assert not out.exists()
    plan = call(skip_missing=True)
    assert plan.num_missing == 1 and "Not there, and left out: 1." in plan.summary()
    assert found(out)["train"]["003.Zebra Finch"] == 2
    shutil.rmtree(source / "CUB_200_2011" / "images")
    with pytest.raises(FileNotFoundError, match="15 listed images are not in"):
        call(skip_missing=True)


@pytest.mark.parametrize("name", ["../evil.jpg", "/evil.jpg", "images/../../evil.jpg", "..\\evil.jpg", "C:\\evil.jpg"])
@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_archives_that_lead_elsewhere_are_refused(write, name, tmp_path):
    source = write({**cub(), name: image()}, tmp_path / f"source{'.zip' if write is write_zip else '.tgz'}")
    with pytest.raises(ValueError, match=r"holds a file named .*, which leads out of the folder"):
        prepare("cub", source, tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_links_in_an_archive_are_no_images(tmp_path):
    files = cub()
    victim = "CUB_200_2011/images/003.Zebra_Finch/Zebra_Finch_0.jpg"
    del files[victim]
    source = write_tar(files, tmp_path / "source.tar", "w")
    with tarfile.open(source, "a") as archive:
        entry = tarfile.TarInfo(victim)
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(entry)
    with pytest.raises(FileNotFoundError, match=r"Zebra_Finch_0\.jpg"):
        prepare("cub", source, tmp_path / "out", facts=LOOK_ALIKES["cub"][1])


@pytest.mark.parametrize("ending", [".tgz", ".tar", ".zip"])
def test_damaged_archives_are_named(ending, tmp_path):
    writers = {".tgz": write_tar, ".tar": lambda files, path: write_tar(files, path, "w"), ".zip": write_zip}
    whole = writers[ending](cub(), tmp_path / f"whole{ending}").read_bytes()
    source = tmp_path / f"source{ending}"
    for content in (whole[: len(whole) // 2], b"no archive at all"):
        source.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^Cannot read [^\n]*source\{ending} \([^\n]*\): the archive is damaged, .*\.$"
        ):
            prepare("cub", source, tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
        assert not (tmp_path / "out").exists()


def test_altered_images_in_a_zip_are_noticed(tmp_path):
    content = write_zip(files := cub(), tmp_path / "whole.zip").read_bytes()
    altered = next(image for path, image in files.items() if path.endswith("Zebra_Finch_4.jpg"))
    (tmp_path / "source.zip").write_bytes(content.replace(altered, altered[:-1] + b"?"))
    with pytest.raises(
        ValueError, match=r"Cannot read .*Zebra_Finch_4\.jpg in .*source\.zip \(.*\): the archive is damaged"
    ):
        prepare("cub", tmp_path / "source.zip", tmp_path / "out", facts=LOOK_ALIKES["cub"][1])
    assert not list((tmp_path / "out").rglob("*Zebra_Finch_4*"))


def test_two_copies_in_one_source(birds):
    source, _, call = birds
    shutil.copytree(source / "CUB_200_2011", source / "copy")
    with pytest.raises(ValueError, match=r"holds images\.txt twice: .*; keep one copy"):
        call()


def test_two_images_of_one_name(tmp_path):
    files = {**medicinal_leaf(), "more/Mint/l-000.JPG": image()}
    with pytest.raises(ValueError, match=r"would both be kept as .*Mint") as caught:
        for seed in range(20):  # until both fall into one split
            prepare("medicinal_leaf", write_folder(files, tmp_path / "source"), tmp_path / f"{seed}", seed=seed,
                    facts=tiny("medicinal_leaf", 2))  # fmt: skip
    assert "L-000.jpg" in str(caught.value) and "l-000.JPG" in str(caught.value)


def test_other_mistakes(birds, tmp_path):
    source, _, call = birds
    with pytest.raises(ValueError, match="There is no data set 'imagenet'; there are cub, birds525"):
        prepare("imagenet", source, tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"Rare Species needs no preparing: .* as imageomics/rare-species, .*dino_rare_species"
    ):
        prepare("rare_species", source, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"There is no folder or archive .*nowhere"):
        prepare("cub", tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "list.txt").write_text("")
    with pytest.raises(ValueError, match=r"list\.txt is neither a folder nor an archive \(\.tar, \.tar\.gz"):
        prepare("cub", tmp_path / "list.txt", tmp_path / "out")
    with pytest.raises(ValueError, match="CUB-200-2011 takes no option seed"):
        call(seed=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images of Birds-525"):
        prepare("birds525", tmp_path / "empty", tmp_path / "out")


def test_class_names_are_safe_everywhere(tmp_path):
    names = ["con", "a:b|c/d", 'what? "this" <is*>', "ends. ", "CON.x"]
    files = {f"train/{name.replace('/', '-')}/{n}.png": image() for name in names for n in range(2)}
    facts = tiny("birds525", 5, train=10)
    prepare("birds525", write_folder(files, tmp_path / "source"), tmp_path / "out", facts=facts)
    folders = {path.name for path in (tmp_path / "out" / "train").iterdir()}
    assert folders == {"_con", "a-b-c-d", "what this is", "ends", "_CON.x"}


# --- The command -------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def test_command(tmp_path, monkeypatch):
    monkeypatch.setitem(prepare_module.FACTS, "cub", LOOK_ALIKES["cub"][1])
    answer = run("cub", write_folder(cub(), tmp_path / "source"), tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    said = " ".join(answer.stderr.split())
    assert "CUB-200-2011: 3 classes; train 9, test 6 images, 0.00 GB." in said
    assert FACTS["cub"].page in said and FACTS["cub"].licence in said
    rows = [line.split("│")[1:-1] for line in answer.stdout.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["train", "3", "9", "3", "3"],
        ["test", "3", "6", "2", "2"],
    ]
    assert found(tmp_path / "out") == LOOK_ALIKES["cub"][2]


def test_command_options(tmp_path):
    source = write_folder(inaturalist(), tmp_path / "source")
    answer = run(
        "moths", source, tmp_path / "out", "--taxa", "order=Lepidoptera,Boletales", "--without", "family=Boletaceae"
    )
    assert answer.exit_code == 0, answer.output
    assert set(found(tmp_path / "out")["train"]) == {"001.Actias luna", "002.Vanessa atalanta", "003.Hyles lineata"}
    answer = run("medicinal_leaf", source, tmp_path / "leaf", "--taxa", "order=x")
    assert answer.exit_code == 2 and "Medicinal Leaf takes no option taxa" in " ".join(answer.stderr.split())
    answer = run("moths", source, tmp_path / "moths", "--taxa", "Lepidoptera")
    assert answer.exit_code == 2 and "'Lepidoptera' is not of the form RANK=NAME" in " ".join(answer.stderr.split())
    assert answer.stdout == ""


# --- Recipes and documentation -----------------------------------------------------------------------------------

# Data sets for which no official settings are published: ours follow the nearest published recipe.
OUR_RECIPES = ("flowers", "food101", "insects2", "moths", "fungi", "fish_vista", "rare_species", "medicinal_leaf")


def test_every_data_set_has_a_recipe():
    assert all((RECIPES / f"dino_{dataset}.yaml").is_file() for dataset in FACTS)


@pytest.mark.parametrize("dataset", OUR_RECIPES)
def test_our_recipes(dataset):
    text = (RECIPES / f"dino_{dataset}.yaml").read_text(encoding="utf-8")
    recipe = load_recipe(RECIPES / f"dino_{dataset}.yaml", data="photos")
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    facts = FACTS[dataset]
    assert facts.title in comments and facts.page in comments and facts.licence in comments
    assert "not published" in comments and "ours" in comments
    # The same as the official CUB and Pet settings, but for the rate and the epochs.
    official = yaml.safe_load((RECIPES / "dino_pet.yaml").read_text())
    ours = yaml.safe_load(text)
    kept = {"data", "image_column", "label_column"}
    assert {key: value for key, value in ours.items() if key not in kept} == {
        **official,
        "output_dir": f"results/dino_{dataset}",
    }
    assert recipe.augmentation


def test_rare_species_is_read_from_the_hub():
    recipe = load_recipe(RECIPES / "dino_rare_species.yaml")
    assert (recipe.data, recipe.label_column) == (FACTS["rare_species"].hub_id, "sciName")


def test_documentation_agrees_with_the_facts():
    text = DOCS.read_text(encoding="utf-8")
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    for dataset, facts in FACTS.items():
        row = rows[f"[{facts.title}]({facts.page})"]
        assert f"`dino_{dataset}`" in row and (facts.hub_id or f"`prepare {dataset} SRC DST`") in row
        assert facts.num_classes is None or f"| {facts.num_classes} |" in row
        for numbers in facts.num_images.values():
            assert all(f"{number:,}" in row for number in numbers)
        assert facts.licence in text
