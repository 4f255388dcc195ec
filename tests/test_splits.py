# SPDX-License-Identifier: MIT
"""Labelled images are found in every layout, numbered, checked and divided; what is wrong is named."""

import csv
import logging
import pickle
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.data.splits import find_unreadable_images, load_image_data


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def draw(path, value=0):
    """Write an image whose every pixel tells which one it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)
    return path


def make_folder(root, **splits):
    """Draw class folders, of so many images each, in every split; image `i` of a class has the value `i`."""
    for split, classes in splits.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                draw(root / split / name / f"{number:03}.png", number)
    return root


def spoil(path):
    """Cut an image in the middle of its data."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def files(split):
    return [Path(row["image"]["path"]).relative_to(Path(row["image"]["path"]).parents[1]).as_posix() for row in split]


def counts(split, id2label):
    return Counter(id2label[label] for label in split["label"])


# --- Layouts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev", "Val"])
def test_folder_with_splits(tmp_path, validation):
    splits = {"train": {"Robin": 3, "Auk": 2}, validation: {"Auk": 1, "Robin": 1}, "test": {"Auk": 1, "Robin": 2}}
    data = load_image_data(make_folder(tmp_path, **splits))
    assert data.id2label == {0: "Auk", 1: "Robin"}
    assert files(data.train) == ["Auk/000.png", "Auk/001.png", "Robin/000.png", "Robin/001.png", "Robin/002.png"]
    assert data.train["label"][:] == [0, 0, 1, 1, 1]
    assert files(data.validation) == ["Auk/000.png", "Robin/000.png"]
    assert data.test["label"][:] == [0, 1, 1]
    assert data.skipped == []
    assert data.train.features["image"] == datasets.Image(decode=False)
    assert data.train.features["label"] == datasets.ClassLabel(names=["Auk", "Robin"])
    assert np.asarray(open_image(data.train[4]["image"])).max() == 2


def test_folder_of_class_folders_is_all_train(tmp_path):
    make_folder(tmp_path, **{".": {"Robin": 3, "Auk": 2, "train": 4}})
    data = load_image_data(tmp_path, validation_fraction=0)
    assert counts(data.train, data.id2label) == {"Auk": 2, "Robin": 3, "train": 4}
    assert data.validation is None
    assert data.test is None


def test_folder_ignores_what_is_hidden_and_says_what_it_leaves_out(tmp_path, caplog):
    make_folder(tmp_path, train={"Robin": 2, "Auk": 2}, notes={"Field": 1}, __MACOSX={"Robin": 1})
    (tmp_path / "train" / ".thumbnails").mkdir()
    (tmp_path / "train" / "Auk" / "._000.png").write_text("hidden")
    (tmp_path / "train" / "Auk" / "Thumbs.db").write_text("other")
    draw(tmp_path / "train" / "Auk" / "juvenile" / "bird_test.JPG")
    data = load_image_data(tmp_path, validation_fraction=0)
    assert data.id2label == {0: "Auk", 1: "Robin"}
    assert data.train["label"][:] == [0, 0, 0, 1, 1]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: ignored 1 folders that are neither train, validation nor test: notes.",
        f"{tmp_path / 'train'}: ignored 1 files that are not images: Auk/Thumbs.db.",
    ]


def test_linked_folders_are_followed(tmp_path):
    make_folder(tmp_path / "store", **{".": {"juvenile": 2}})
    make_folder(tmp_path / "birds", train={"Robin": 1, "Auk": 1})
    (tmp_path / "birds" / "train" / "Auk" / "linked").symlink_to(tmp_path / "store" / "juvenile")
    (tmp_path / "birds" / "train" / "Wren").symlink_to(tmp_path / "store" / "juvenile")
    data = load_image_data(tmp_path / "birds", validation_fraction=0)
    assert counts(data.train, data.id2label) == {"Auk": 3, "Robin": 1, "Wren": 2}


def test_number_in_front_decides_the_order_and_is_not_shown(tmp_path):
    names = {"010.Auk": 1, "2.Robin_2.5cm": 1, "001.Wren": 1, "4x4": 1}
    data = load_image_data(make_folder(tmp_path, train=names), validation_fraction=0)
    assert data.id2label == {0: "Wren", 1: "Auk", 2: "Robin_2.5cm", 3: "4x4"}


def test_folder_names_that_are_numbers_sort_as_text(tmp_path):
    data = load_image_data(make_folder(tmp_path, train={"2": 1, "10": 1, "1": 1}), validation_fraction=0)
    assert data.id2label == {0: "1", 1: "10", 2: "2"}


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_of_paths(tmp_path, suffix, monkeypatch):
    absolute = draw(tmp_path / "elsewhere" / "b.png", 1)
    rows = {
        "image": ["photos/a.png", str(absolute), "photos/c.png"],
        "label": ["NA", "Robin", "NA"],
        "other": [1, 2, 3],
    }
    draw(tmp_path / "table" / "photos" / "a.png", 0)
    draw(tmp_path / "table" / "photos" / "c.png", 2)
    path = write_table(tmp_path / "table" / f"birds{suffix}", rows)
    monkeypatch.chdir(tmp_path)
    data = load_image_data(path.relative_to(tmp_path), validation_fraction=0)
    assert data.id2label == {0: "NA", 1: "Robin"}
    assert data.train.column_names == ["image", "label"]
    assert data.train["label"][:] == [0, 1, 0]
    assert [np.asarray(open_image(row["image"])).max() for row in data.train] == [0, 1, 2]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table_with_split_column_other_names_and_number_labels(tmp_path, suffix):
    for number in range(6):
        draw(tmp_path / f"{number}.png", number)
    rows = {
        "file": [f"{number}.png" for number in range(6)],
        "species": [10, 9, 10, 9, 10, 9],
        "split": ["train", "train", "Val", "Val", "test", "train"],
    }
    path = write_table(tmp_path / f"birds{suffix}", rows)
    data = load_image_data(path, image_column="file", label_column="species")
    assert data.id2label == {0: "9", 1: "10"}
    assert data.train["label"][:] == [1, 0, 0]
    assert data.validation["label"][:] == [1, 0]
    assert [np.asarray(open_image(row["image"])).max() for row in data.test] == [4]


def test_csv_takes_stray_spaces_away(tmp_path):
    for name in "abc":
        draw(tmp_path / f"{name}.png")
    (tmp_path / "birds.csv").write_text("image,label\na.png, Robin\nb.png,Robin \nc.png,Auk\n")
    data = load_image_data(tmp_path / "birds.csv", validation_fraction=0)
    assert data.train["label"][:] == [1, 1, 0]


def hub_dataset(values, labels, names=("Wren", "Auk")):
    """Images inside the data set itself, with classes declared out of alphabetical order."""
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(names))})
    images = [Image.new("RGB", (8, 8), (value, value, value)) for value in values]
    return datasets.Dataset.from_dict({"img": images, "fine": labels}, features=features)


def test_parquet_folder_laid_out_like_a_hub_data_set(tmp_path, monkeypatch):
    tables = {"train": hub_dataset([1, 2, 3], [0, 1, 0]), "test": hub_dataset([4, 5], [1, 0])}
    for split, table in tables.items():
        (tmp_path / "org" / "birds" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(tmp_path / "org" / "birds" / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(tmp_path)
    data = load_image_data("org/birds", image_column="img", label_column="fine", validation_fraction=0)
    # The data set's own numbers are kept.
    assert data.id2label == {0: "Wren", 1: "Auk"}
    assert data.train["label"][:] == [0, 1, 0]
    assert [np.asarray(open_image(row["image"])).max() for row in data.train] == [1, 2, 3]
    assert [np.asarray(open_image(row["image"])).max() for row in data.test] == [4, 5]
    assert pickle.loads(pickle.dumps(data.train))["label"][:] == [0, 1, 0]


def test_parquet_file_with_images_inside(tmp_path):
    hub_dataset([1, 2, 3], [0, 1, 0]).to_parquet(tmp_path / "birds.parquet")
    data = load_image_data(tmp_path / "birds.parquet", image_column="img", label_column="fine", validation_fraction=0)
    assert [np.asarray(open_image(row["image"])).max() for row in data.train] == [1, 2, 3]


def test_data_set_in_memory(caplog):
    train, test = hub_dataset([1, 2, 3], [0, 1, 0]), hub_dataset([4], [-1])
    columns = {"image_column": "img", "label_column": "fine"}
    assert len(load_image_data(train, **columns, validation_fraction=0).train) == 3
    both = datasets.DatasetDict(train=train, test=test, unlabelled=test)
    data = load_image_data(both, **columns, validation_fraction=0)
    assert data.test is None
    assert [record.getMessage() for record in caplog.records] == [
        "DatasetDict: ignored 1 splits that are neither train, validation nor test: unlabelled.",
        "DatasetDict: ignored the split test, whose labels are kept back.",
    ]


# --- The held-out part -------------------------------------------------------------------------------------------


def test_held_out_part_is_stratified_seeded_and_never_takes_the_last_image(tmp_path):
    folder = make_folder(tmp_path, train={"many": 40, "some": 15, "few": 3, "two": 2, "one": 1})
    data = load_image_data(folder, validation_fraction=0.2, seed=1)
    held_out = counts(data.validation, data.id2label)
    assert held_out == {"many": 8, "some": 3, "few": 1, "two": 1}
    whole = load_image_data(folder, validation_fraction=0)
    assert sorted(files(data.train) + files(data.validation)) == sorted(files(whole.train))
    assert counts(data.train, data.id2label) + held_out == counts(whole.train, whole.id2label)
    again = load_image_data(folder, validation_fraction=0.2, seed=1)
    assert files(again.validation) == files(data.validation)
    assert files(load_image_data(folder, validation_fraction=0.2, seed=2).validation) != files(data.validation)


def test_held_out_part_keeps_a_image_for_training_whatever_the_fraction(tmp_path):
    data = load_image_data(make_folder(tmp_path, train={"a": 5, "b": 2}), validation_fraction=0.99)
    assert counts(data.train, data.id2label) == {"a": 1, "b": 1}


def test_given_validation_split_is_kept_as_it_is(tmp_path):
    data = load_image_data(
        make_folder(tmp_path, train={"a": 9, "b": 9}, val={"a": 1, "b": 1}), validation_fraction=0.5
    )
    assert (len(data.train), len(data.validation)) == (18, 2)


def test_nothing_to_hold_out(tmp_path):
    folder = make_folder(tmp_path, train={"a": 1, "b": 1})
    with pytest.raises(ValueError, match="none can be held out for validation"):
        load_image_data(folder)
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        load_image_data(folder, validation_fraction=1)


# --- What is wrong with the data ---------------------------------------------------------------------------------


def test_unreadable_images_are_one_error(tmp_path):
    make_folder(tmp_path, train={"a": 9, "b": 9}, test={"a": 1, "b": 1})
    broken = [spoil(tmp_path / "train" / "a" / f"{number:03}.png") for number in range(6)]
    with pytest.raises(ValueError, match="Cannot read 6 images") as raised:
        load_image_data(tmp_path)
    message = str(raised.value)
    assert f"{broken[0]} (image file is truncated)" in message
    assert str(broken[4]) in message
    assert str(broken[5]) not in message
    assert "and 1 more" in message
    assert "\n" not in message


def test_unreadable_images_are_left_out_and_listed_on_request(tmp_path, caplog):
    make_folder(tmp_path, train={"a": 3, "b": 3}, test={"a": 1, "b": 1})
    cut = spoil(tmp_path / "train" / "b" / "001.png")
    page = tmp_path / "test" / "a" / "page.jpg"
    page.write_text("<html>")
    data = load_image_data(tmp_path, validation_fraction=0, skip_unreadable=True)
    assert files(data.train) == ["a/000.png", "a/001.png", "a/002.png", "b/000.png", "b/002.png"]
    assert data.train["label"][:] == [0, 0, 0, 1, 1]
    assert files(data.test) == ["a/000.png", "b/000.png"]
    data.write_skipped(tmp_path / "skipped.csv")
    with open(tmp_path / "skipped.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"split": "train", "file": str(cut), "reason": "image file is truncated"},
        {"split": "test", "file": str(page), "reason": "it is empty or in no image format that Pillow can read"},
    ]
    assert "Left out 2 images" in caplog.text


def test_images_inside_a_data_set_are_named_by_row():
    content = [{"bytes": b"no image", "path": None}, None, {"bytes": None, "path": "nowhere.jpg"}]
    images = datasets.Dataset.from_dict(
        {"image": content * 20}, features=datasets.Features({"image": datasets.Image(decode=False)})
    )
    found = find_unreadable_images(images, "test")
    assert list(found) == list(range(60))
    assert [found[row].file for row in (0, 1, 2, 57)] == ["row 0", "row 1", "nowhere.jpg", "row 57"]
    assert found[1].reason == "there is neither a path nor bytes"
    assert found[2].reason == "No such file or directory"
    assert found[2].split == "test"


def test_a_class_of_unreadable_images_is_an_empty_class(tmp_path):
    make_folder(tmp_path, train={"a": 3, "b": 1})
    spoil(tmp_path / "train" / "b" / "000.png")
    with pytest.raises(ValueError, match=r"No images of the class b;"):
        load_image_data(tmp_path, skip_unreadable=True)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": {"a": 2, "b": 0, "c": 2}}, r"No images of the class b in .*train;"),
        ({"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 0}}, r"No images of the class b in .*test;"),
        ({"train": {"a": 2, "b": 2}, "test": {"c": 1, "a": 1}}, "Only the test split has images of the class c;"),
        ({"train": {"a": 2, "b": 2}, "val": {"c": 1, "a": 1}}, "Only the validation split has .* class c;"),
        ({"train": {"a": 2}}, "only one class, a;"),
        ({"train": {"a": 0, "b": 0}}, r"The folder .*train holds no class folders with images"),
        ({"test": {"a": 1, "b": 1}}, r"The folder .* has no train split; it has test\."),
        ({"train": {"a": 1, "b": 1}, "val": {"a": 1}, "dev": {"a": 1}}, r"has both (val and dev|dev and val)"),
        ({"train": {"01.a": 1, "02.a": 1}}, r"The classes 01\.a and 02\.a would both be called a "),
        ({"train": {f"class{number}": 0 for number in range(8)} | {"x": 1}}, "class0, .*class4 and 3 more in"),
    ],
)
def test_folder_errors_name_the_class(tmp_path, splits, message):
    with pytest.raises(ValueError, match=message):
        load_image_data(make_folder(tmp_path, **splits))


def test_class_that_a_split_lacks_is_only_a_warning(tmp_path, caplog):
    data = load_image_data(make_folder(tmp_path, train={"a": 2, "b": 2}, test={"b": 1}))
    assert data.test["label"][:] == [1]
    assert [record.getMessage() for record in caplog.records] == ["The test split has no images of the class a."]
    assert caplog.records[0].levelno == logging.WARNING


def test_folder_errors_without_class_folders(tmp_path):
    with pytest.raises(ValueError, match="holds no class folders with images"):
        load_image_data(tmp_path)
    draw(tmp_path / "train" / "a.png")
    draw(tmp_path / "test" / "a.png")
    with pytest.raises(ValueError, match=r"The folder .*train holds no class folders with images"):
        load_image_data(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.png,x\n", r"birds\.csv has no column 'image'; set image_column to one of path, label"),
        ("image,species\na.png,x\n", r"has no column 'label'; set label_column to one of image, species"),
        (
            "image,label\na.png,x\na.png,\na.png,\n",
            r"2 of 3 rows have nothing in the column 'label'; the first is row 2,",
        ),
        ("image,label\na.png,x\n,y\n", r"1 of 2 rows have nothing in the column 'image'; the first is row 2,"),
        (
            "image,label,split\na.png,x,train\na.png,y,holdout\n",
            r"The column 'split' of .* holds 'holdout'; allowed are",
        ),
        ("image,label,split\na.png,x,test\n", r"The column 'split' of .* has no train split; it has test"),
        ("image,label\n", r"birds\.csv has no rows"),
        ("", r"birds\.csv cannot be read as CSV in UTF-8: No columns"),
        ("image,label\na.png,x\nb.png,y\n", r"Cannot read 1 image: .*b\.png \(No such file or directory\)"),
    ],
)
def test_csv_errors_name_the_column(tmp_path, text, message):
    draw(tmp_path / "a.png")
    (tmp_path / "birds.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_image_data(tmp_path / "birds.csv")


def test_columns_of_the_wrong_kind(tmp_path):
    rows = datasets.Dataset.from_dict({"image": ["a.png"], "weight": [1.5], "label": ["x"]})
    with pytest.raises(ValueError, match=r"The column 'weight' of DatasetDict, split train holds Value\('float64'\)"):
        load_image_data(rows, label_column="weight")
    with pytest.raises(ValueError, match=r"holds Value\('float64'\); wanted are images or their paths"):
        load_image_data(rows, image_column="weight")


def test_declared_classes_have_to_be_used_and_equal():
    columns = {"image_column": "img", "label_column": "fine"}
    train = hub_dataset([1, 2], [0, 1], names=("a", "b", "c"))
    with pytest.raises(ValueError, match="No images of the class c;"):
        load_image_data(train, **columns)
    with pytest.raises(ValueError, match="The test split declares other class names than train"):
        load_image_data(datasets.DatasetDict(train=train, test=hub_dataset([1], [0])), **columns)


@pytest.mark.parametrize("source", ["no/such/folder", "./birds", "birds.csv", "/birds", "no_such/data_set"])
def test_source_that_does_not_exist(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"There is no folder or file {source}")):
        load_image_data(source)


def test_source_of_another_kind(tmp_path):
    (tmp_path / "birds.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"birds\.xlsx is neither a folder nor a CSV or Parquet file"):
        load_image_data(tmp_path / "birds.xlsx")
