# SPDX-License-Identifier: MIT
"""80 folders, tables, archives and recipes: read as they are, or refused in a sentence that says what is wrong."""

import io
import os
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import datasets
import pandas as pd
import pytest

from faults.conftest import COLOURS, draw, draw_classes
from faults.processes import caught, prompt_cam, refused_well, run, train
from prompt_cam_hf.data.images import find_images
from prompt_cam_hf.data.splits import load_image_data

KIND = "folders, tables, archives, recipes"
SECONDS = 30
NUMBER = 4  # images a class, where nothing else is said


def count(data: str, skip_unreadable: bool = False) -> dict[str, dict[str, int]]:
    """Images of each class in each split."""
    found = load_image_data(data, validation_fraction=0, skip_unreadable=skip_unreadable)
    splits = {"train": found.train, "validation": found.validation, "test": found.test}
    return {
        split: dict(Counter(found.id2label[label] for label in images["label"]))
        for split, images in splits.items()
        if images is not None
    }


def count_files(folder: str) -> int:
    return len(find_images([folder]))


# --- Folders ---


def plain(folder: Path) -> None:
    draw_classes(folder, NUMBER)


def changed(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        draw_classes(folder, NUMBER)
        change(folder)

    return make


def links(**targets: str) -> Callable[[Path], None]:
    """Links in the class folder `red`."""

    def change(folder: Path) -> None:
        for name, target in targets.items():
            (folder / "red" / name).symlink_to(target)

    return changed(change)


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return changed(lambda folder: (folder / name).write_bytes(content))


def linked_class(folder: Path) -> None:
    draw_classes(folder.parent / "elsewhere", NUMBER)
    folder.mkdir()
    for name in COLOURS:
        (folder / name).symlink_to(folder.parent / "elsewhere" / name)


def linked_images(folder: Path) -> None:
    draw_classes(folder.parent / "elsewhere", NUMBER)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for index in range(NUMBER):
            (folder / name / f"{index}.png").symlink_to(folder.parent / "elsewhere" / name / f"{index}.png")


def links_in_a_ring(folder: Path) -> None:
    draw_classes(folder, NUMBER)
    (folder / "red" / "a").mkdir()
    (folder / "red" / "b").mkdir()
    (folder / "red" / "a" / "to-b").symlink_to("../b")
    (folder / "red" / "b" / "to-a").symlink_to("../a")


def folder_named_in_bytes(folder: Path) -> None:
    draw_classes(folder, NUMBER)
    (folder / "red").rename(folder / os.fsdecode(b"r\xe9d"))


def deep(folder: Path) -> None:
    draw_classes(folder, NUMBER)
    inside = folder / "red" / "/".join(["d"] * 400)
    inside.mkdir(parents=True)
    (folder / "red" / "0.png").rename(inside / "0.png")


def twice_called(folder: Path) -> None:
    draw_classes(folder, NUMBER)
    draw(folder / "1.red" / "0.png", COLOURS["red"], 1)


def in_splits(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for name in names:
            draw_classes(folder / name, NUMBER)

    return make


EQUAL = {"train": dict.fromkeys(COLOURS, NUMBER)}
FOLDERS: list[tuple[str, Callable[[Path], object], dict | None]] = [
    ("plain", plain, EQUAL),
    ("a loop", links(loop="."), EQUAL),
    ("two loops", links(loop=".", loop2="."), EQUAL),
    ("a loop to the folder above", links(loop=".."), EQUAL),
    ("links in a ring", links_in_a_ring, EQUAL),
    ("classes that are links", linked_class, EQUAL),
    ("images that are links", linked_images, EQUAL),
    ("a link to itself", links(**{"x.png": "x.png"}), None),
    ("a broken link", links(**{"x.png": "nowhere.png"}), None),
    ("a link to zeros", links(**{"x.png": "/dev/zero"}), None),
    ("a pipe", changed(lambda folder: os.mkfifo(folder / "red" / "x.png")), None),
    ("an empty class", changed(lambda folder: (folder / "yellow").mkdir()), None),
    ("a hidden class", changed(lambda folder: draw(folder / ".x" / "0.png", (0, 0, 0), 0)), EQUAL),
    ("a class that is a file", written("yellow", b"not a folder"), EQUAL),
    ("a text among the images", written("red/notes.txt", b"mine"), EQUAL),
    ("an empty image", written("red/x.png", b""), None),
    ("a text called an image", written("red/x.png", b"not an image"), None),
    ("a class whose name is no UTF-8", folder_named_in_bytes, None),
    ("an image 400 folders deep", deep, EQUAL),
    ("two classes of one name", twice_called, None),
    ("one class", lambda folder: draw(folder / "red" / "0.png", COLOURS["red"], 0), None),
    ("nothing", Path.mkdir, None),
    ("images without classes", lambda folder: draw(folder / "0.png", COLOURS["red"], 0), None),
    ("two names for one split", in_splits("train", "val", "valid"), None),
    ("no train split", in_splits("validation", "test"), None),
    ("train and test", in_splits("train", "test"), EQUAL | {"test": EQUAL["train"]}),
]


def _answer(make: Callable[[Path], object], folder: Path, call: Callable = count, *arguments, **options):
    make(folder)
    ran = run(caught, call, str(folder), *arguments, seconds=SECONDS, **options)
    assert ran.code == 0, ran
    return ran.told


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        pytest.param(*row, id=row[0], marks=[pytest.mark.short] if row[0] in ("plain", "a loop") else [])
        for row in FOLDERS
    ],
)
def test_a_folder_is_read_as_it_is(tmp_path, refused, name, make, expected):
    told = _answer(make, tmp_path / "photos")
    if expected is not None:
        assert told == {"returned": expected}
        return
    assert refused_well(told), told
    refused()


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(*row[:2], id=row[0]) for row in FOLDERS if re.search("loop|link", row[0])]
)
def test_images_are_found_once(tmp_path, refused, name, make):
    """As `predict FOLDER` looks for them; a broken link is an image that cannot be read, or none."""
    told = _answer(make, tmp_path / "photos", count_files)
    assert told.get("returned") in (
        len(COLOURS) * NUMBER,
        len(COLOURS) * NUMBER + ("x.png" in os.listdir(tmp_path / "photos/red")),
    )


@pytest.mark.parametrize("place", ["red", "red/0.png", "."])
def test_what_may_not_be_read_is_named(tmp_path, refused, place):
    folder = draw_classes(tmp_path / "photos", NUMBER)
    (folder / place).chmod(0)
    if os.access(folder / place, os.R_OK):
        pytest.skip("root may read everything")
    told = run(caught, count, str(folder), seconds=SECONDS).told
    (folder / place).chmod(0o755)
    assert refused_well(told) and Path(place).name in told["message"], told
    refused()


def test_an_unreadable_image_is_left_out_where_that_is_asked(tmp_path):
    told = _answer(written("red/x.png", b""), tmp_path / "photos", count, True)
    assert told == {"returned": EQUAL}


def test_a_file_whose_name_is_no_utf8_is_read_or_named(world, tmp_path, refused):
    """A file system knows bytes only, and Arrow's tables UTF-8 only."""
    folder = draw_classes(tmp_path / "photos", NUMBER)
    (folder / "red" / "0.png").rename(folder / "red" / os.fsdecode(b"caf\xe9.png"))
    told = _answer(lambda folder: None, folder)
    if told != {"returned": EQUAL}:
        assert refused_well(told), told
        refused()
    ran = run(prompt_cam, "atlas", world.model, folder, "--out", tmp_path / "atlas", "--device", "cpu")
    assert ran.code == 0 or ran.refused_well(), ran


# --- Tables ---


def rows(number: int = NUMBER) -> pd.DataFrame:
    named = [(f"photos/{name}/{index}.png", name) for name in COLOURS for index in range(number)]
    return pd.DataFrame(named, columns=["image", "label"])


def parquet(frame: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.to_parquet(file)
    return file.getvalue()


def csv(frame: pd.DataFrame) -> bytes:
    return frame.to_csv(index=False).encode()


def damaged(content: bytes, at: int, length: int = 40) -> bytes:
    return content[:at] + bytes(length) + content[at + length :]


WHOLE = parquet(rows())
TABLES: list[tuple[str, str, bytes, dict | None]] = [
    ("CSV", "csv", csv(rows()), EQUAL),
    ("Parquet", "parquet", WHOLE, EQUAL),
    ("empty", "csv", b"", None),
    ("empty", "parquet", b"", None),
    ("head only", "csv", b"image,label\n", None),
    ("head only", "parquet", parquet(rows(0)), None),
    ("zeros", "csv", bytes(1000), None),
    ("zeros", "parquet", bytes(1000), None),
    ("cut to 10%", "parquet", WHOLE[: len(WHOLE) // 10], None),
    ("cut to 90%", "parquet", WHOLE[: len(WHOLE) * 9 // 10], None),
    ("damaged data", "parquet", damaged(WHOLE, 4), None),
    ("damaged foot", "parquet", damaged(WHOLE, len(WHOLE) - 200), None),
    ("a CSV by another name", "parquet", csv(rows()), None),
    ("a Parquet by another name", "csv", WHOLE, None),
    ("a row too long", "csv", csv(rows()) + b"photos/red/0.png,red,more,more\n", None),
    ("a row too short", "csv", csv(rows()) + b"photos/red/0.png\n", None),
    ("an open quote", "csv", csv(rows()) + b'"photos/red/0.png,red\n', None),
    ("no label", "csv", csv(rows()) + b"photos/red/0.png,\n", None),
    ("no image", "csv", csv(rows()) + b",red\n", None),
    ("another column", "csv", csv(rows()).replace(b"label", b"species"), None),
    ("a column twice", "csv", csv(rows()).replace(b"image,label", b"image,image"), None),
    ("Latin-1", "csv", csv(rows()).replace(b"green", b"gr\xfcn"), None),
    ("UTF-16", "csv", csv(rows()).decode().encode("utf-16"), None),
    ("no such file", "csv", csv(rows()) + b"photos/red/nowhere.png,red\n", None),
    ("a path outside", "csv", csv(rows()) + b"../../../../etc/passwd,red\n", None),
    ("a path with a zero", "csv", csv(rows()) + b"photos/red/\x00.png,red\n", None),
    ("an address", "csv", csv(rows()) + b"http://127.0.0.1:9/x.png,red\n", None),
    ("a split that is none", "csv", csv(rows().assign(split="holiday")), None),
    ("labels that are numbers in part", "parquet", parquet(rows().assign(label=1.5)), None),
    ("images that are numbers", "parquet", parquet(rows().assign(image=7)), None),
    ("labels that are missing", "parquet", parquet(rows().assign(label=None)), None),
    ("lists of labels", "parquet", parquet(rows().assign(label=[["red"]] * len(rows()))), None),
]


@pytest.mark.parametrize(
    ("name", "suffix", "content", "expected"),
    [pytest.param(*row, id=f"{row[1]}: {row[0]}", marks=[pytest.mark.short] if row[:2] == ("empty", "parquet") else [])
     for row in TABLES],
)  # fmt: skip
def test_a_table_is_read_as_it_is(tmp_path, refused, name, suffix, content, expected):
    draw_classes(tmp_path / "photos", NUMBER)
    told = _answer(lambda path: path.write_bytes(content), tmp_path / f"table.{suffix}")
    if expected is not None:
        assert told == {"returned": expected}
        return
    assert refused_well(told), told
    refused()


def test_a_damaged_parquet_folder_is_refused(tmp_path, refused):
    folder = tmp_path / "photos"
    folder.mkdir()
    datasets.Dataset.from_dict({"image": ["a"], "label": ["b"]}).to_parquet(folder / "train.parquet")
    content = (folder / "train.parquet").read_bytes()
    told = _answer(lambda folder: (folder / "train.parquet").write_bytes(content[:-100]), folder)
    assert refused_well(told), told
    refused()


# --- Archives ---

LISTS = {
    "images.txt": "1 001.A/a_1.jpg\n2 002.B/b_1.jpg\n",
    "image_class_labels.txt": "1 1\n2 2\n",
    "train_test_split.txt": "1 1\n2 0\n",
    "classes.txt": "1 001.A\n2 002.B\n",
}


def archive(kind: str, **changes: bytes | None) -> bytes:
    """CUB as it is downloaded, in as far as it is read before its images."""
    content = {f"CUB_200_2011/{name}": text.encode() for name, text in LISTS.items()}
    content |= {f"CUB_200_2011/{name.replace('_txt', '.txt')}": text for name, text in changes.items()}
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
            for name, text in content.items():
                made.writestr(name, text)
    else:
        with tarfile.open(fileobj=file, mode="w") as made:
            for name, text in content.items():
                entry = tarfile.TarInfo(name)
                if text is None:  # a hole of 8 GB, which takes no space
                    text = b"0\n".ljust(512, b"\0")
                    entry.pax_headers = {
                        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
                        "GNU.sparse.realsize": str(8 << 30),
                    }  # fmt: skip
                entry.size = len(text)
                made.addfile(entry, io.BytesIO(text))
    return file.getvalue()


def outside(name: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        made.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def linking() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        entry = tarfile.TarInfo("CUB_200_2011/classes.txt")
        entry.type, entry.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(entry)
    return file.getvalue()


ARCHIVES: list[tuple[str, str, Callable[[], bytes]]] = [
    ("a list of 8 GB", "tar", lambda: archive("tar", classes_txt=None)),
    ("a list that unfolds a thousandfold", "zip", lambda: archive("zip", classes_txt=bytes(2 << 30))),
    ("nothing", "tar", lambda: b""),
    ("nothing", "zip", lambda: b""),
    ("half of it", "tar", lambda: archive("tar")[:3000]),
    ("half of it", "zip", lambda: archive("zip")[:300]),
    ("noise", "tar.gz", lambda: bytes(range(256)) * 20),
    ("a path that leads outside", "tar", lambda: outside("../../evil.txt")),
    ("a path from the root", "tar", lambda: outside("/evil.txt")),
    ("a link that leads outside", "tar", linking),
]


@pytest.mark.parametrize(
    ("name", "suffix", "make"), [pytest.param(*row, id=f"{row[1]}: {row[0]}") for row in ARCHIVES]
)
def test_an_archive_is_refused(tmp_path, refused, name, suffix, make):
    (tmp_path / f"CUB.{suffix}").write_bytes(make())
    before = set(tmp_path.rglob("*"))
    ran = run(prompt_cam, "prepare", "cub", tmp_path / f"CUB.{suffix}", tmp_path / "out", memory=1 << 30, seconds=30)
    assert ran.refused_well(), ran
    assert set(tmp_path.rglob("*")) == before
    refused()


# --- Recipes ---


def train_without_workers(*arguments: str) -> None:
    """So that ten thousand processes, were they started, would not take the machine with them."""

    def refuse(self) -> None:
        raise RuntimeError("a worker was started")

    BaseProcess.start = refuse
    train(*arguments)


RECIPES: list[tuple[str, list[str]]] = [
    ("no data", ["--data="]),
    ("no output", ["--output_dir="]),
    ("no backbone", ["--backbone="]),
    ("half a list", ["--seed=[1"]),
    ("a tag", ["--seed=!!python/object/apply:os.system [echo]"]),
    ("no accumulation", ["--trainer.gradient_accumulation_steps=0"]),
    ("a norm in words", ["--trainer.max_grad_norm=x"]),
    ("10,000 workers", ["--dataloader_num_workers=10000"]),
    ("a batch larger than the data", ["--train_batch_size=1000000"]),
    ("an image of a million pixels a side", ["--image_size=1000000"]),
    ("a thousand million prompts", ["--num_agnostic_prompts=1000000000", "--first_prompt_layer=0"]),
    ("a seed of 30 digits", ["--seed=" + "9" * 30]),
    ("a rate that is no number", ["--learning_rate=.nan"]),
    ("a rate without end", ["--learning_rate=.inf"]),
    ("a mean that is no number", ["--image_mean=[.nan, 0.5, 0.5]"]),
    ("no epochs", ["--num_train_epochs=0"]),
    ("an option twice", ["--seed=1", "--seed=2", "--nothing=3"]),
    ("an unknown setting", ["--trainer.nothing=1"]),
    ("a setting of another type", ["--trainer.gradient_accumulation_steps=[1]"]),
    ("an output that is a file", ["--output_dir=/dev/null"]),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(*row, id=row[0], marks=[pytest.mark.short] if row[0] == "no data" else []) for row in RECIPES],
)
def test_a_recipe_is_refused(world, tmp_path, refused, name, options):
    given = {option.split("=")[0].removeprefix("--") for option in options}
    arguments = [one for one in world.recipe(tmp_path / "out") if one.split("=")[0].removeprefix("--") not in given]
    ran = run(train_without_workers, *arguments, *options, seconds=SECONDS)
    assert ran.refused_well(), ran
    assert not (tmp_path / "out").exists()
    refused()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 20_000,
        "a: " * 20_000,
        "\x00",
        "- a",
        "backbone: &a [*a]",
        "backbone: {a: " * 2000,
        "\ufffe",
        "&a " * 99,
    ],
)
def test_a_recipe_file_is_refused(tmp_path, refused, text):
    (tmp_path / "recipe.yaml").write_text(text)
    ran = run(train, tmp_path / "recipe.yaml", "--data=x", "--output_dir=out", seconds=SECONDS)
    assert ran.refused_well(), ran
    refused()


def test_a_tree_is_refused(world, tmp_path, refused):
    for content in (b"", bytes(100), b"\xff\xfe", b"a,b\n" * 3, b'"a,b\n', b"a" * (1 << 20)):
        (tmp_path / "tree.csv").write_bytes(content)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ran = run(
            prompt_cam,
            "taxonomy",
            world.model,
            world.photos,
            "--out",
            tmp_path / "out",
            "--tree",
            tmp_path / "tree.csv",
        )
        assert ran.refused_well(), (content[:20], ran)
    refused()
