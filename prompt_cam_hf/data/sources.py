# SPDX-License-Identifier: MIT
"""Readers of labelled images, one for each kind of source: folders, tables, data sets of the datasets library.

Whatever the source, the result maps `train`, `validation` and `test` to a `SourceSplit`. No image is opened here.
"""

import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, cast

import datasets
import pandas as pd
import pyarrow as pa
from datasets.exceptions import DatasetNotFoundError

from prompt_cam_hf.data.images import image_suffixes, visible_files
from prompt_cam_hf.messages import one_line, printable

logger = logging.getLogger(__name__)

# The names under which a split is found: as a folder, as a split of a Hub data set, as a value of a `split` column.
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}

# Names listed in one message before the rest is only counted.
_MAX_NAMED = 5


class SourceSplit(NamedTuple):
    """One split as it was found.

    `images` has the one column `image`, undecoded; `labels` is the class name of each row; `class_names` are all
    classes in the order of their numbers, where the source gives one.
    """

    images: datasets.Dataset
    labels: list[str]
    class_names: list[str] | None


def some_of(names: Iterable[object]) -> str:
    """List the first few names for a message, and count the rest: "a, b, c, d, e and 7 more"."""
    ordered = [printable(str(name)) for name in names]
    rest = len(ordered) - _MAX_NAMED
    return ", ".join(ordered[:_MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _warn_about(what: str, names: Iterable[str], where: object) -> None:
    if ordered := sorted(names):
        logger.warning("%s: ignored %d %s: %s.", where, len(ordered), what, some_of(ordered))


def image_rows(files: Iterable[str | os.PathLike]) -> datasets.Dataset:
    """Make a data set of image files, none of which is opened, with the one column `image`."""
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return datasets.Dataset.from_dict({"image": list(map(str, files))}, features=features)


def _named_splits(names: Iterable[str], origin: str) -> dict[str, str]:
    """Map each split to the name that the source gives it; raises where two mean the same or train is missing."""
    found: dict[str, str] = {}
    for name in sorted(names):
        split = SPLIT_NAMES.get(name.lower())
        if split in found:
            raise ValueError(f"{origin} has both {found[split]} and {name}; keep one {split} split.")
        if split:
            found[split] = name
    if "train" not in found:
        raise ValueError(f"{origin} has no train split; it has {', '.join(sorted(names))}.")
    return {split: found[split] for split in ("train", "validation", "test") if split in found}


def _visible_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _read_folder(folder: Path) -> dict[str, SourceSplit]:
    subfolders = {path.name for path in _visible_folders(folder)}
    split_like = {name for name in subfolders if name.lower() in SPLIT_NAMES}
    # A class may be called "train" too: splits hold class folders, or there is nothing beside them.
    if split_like and (split_like == subfolders or any(_visible_folders(folder / name) for name in split_like)):
        _warn_about("folders that are neither train, validation nor test", subfolders - split_like, folder)
        found = {split: folder / name for split, name in _named_splits(split_like, f"The folder {folder}").items()}
    else:
        found = {"train": folder}
    class_folders = [path for split_folder in found.values() for path in _visible_folders(split_folder)]
    class_names = sorted({path.name for path in class_folders})
    # A link in one class may lead to another, or to another split.
    apart = [folder, *found.values(), *(path for path in class_folders if not path.is_symlink())]
    return {split: _read_class_folders(split_folder, class_names, apart) for split, split_folder in found.items()}


def _read_class_folders(folder: Path, class_names: list[str], apart: list[Path]) -> SourceSplit:
    """Read one split; an image's class is the folder directly below `folder` that it lies in, at whatever depth.

    This is not left to the image folders of the datasets library: they pass over an empty class, take a file called
    `bird_test.jpg` for part of a test split, and name a class after the innermost folder.
    """
    suffixes = image_suffixes()
    files: list[Path] = []
    labels: list[str] = []
    empty: list[str] = []
    other: list[str] = []
    for class_folder in _visible_folders(folder):
        inside = visible_files(class_folder, apart)
        images = [path for path in inside if path.suffix.lower() in suffixes]
        other += [str(path.relative_to(folder)) for path in inside if path.suffix.lower() not in suffixes]
        files += images
        labels += [class_folder.name] * len(images)
        if not images:
            empty.append(class_folder.name)
    _warn_about("files that are not images", other, folder)
    if not files:
        raise ValueError(f"The folder {folder} holds no class folders with images; make one folder for each class.")
    if empty:
        raise ValueError(f"No images of the class {some_of(empty)} in {folder}; add some or remove the empty folder.")
    return SourceSplit(image_rows(files), labels, class_names)


def _read_csv(path: Path) -> datasets.Dataset:
    try:
        # As text, so that a class may be called NA and keep its leading zeros.
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        # A stray space would make a second class.
        return datasets.Dataset.from_pandas(frame.apply(lambda column: column.str.strip()), preserve_index=False)
    except ValueError as error:  # what pandas raises for a malformed file and for a wrong encoding
        raise ValueError(f"{path} cannot be read as CSV in UTF-8: {one_line(error)[:300]}") from error


def _read_parquet(path: Path) -> datasets.Dataset:
    try:
        return cast(datasets.Dataset, datasets.Dataset.from_parquet(str(path)))
    except (datasets.exceptions.DatasetGenerationError, datasets.table.CastError, pa.ArrowException) as error:
        reason = one_line(error.__cause__ or error)[:300]
        raise ValueError(
            f"{path} cannot be read as Parquet: it is damaged, or another kind of file ({reason})."
        ) from error


def _read_table(path: Path, image_column: str, label_column: str) -> dict[str, SourceSplit]:
    table = _read_csv(path) if path.suffix.lower() == ".csv" else _read_parquet(path)
    images, labels, class_names = _read_columns(table, str(path), path.parent, image_column, label_column)
    if "split" not in table.column_names:
        return {"train": SourceSplit(images, labels, class_names)}
    rows_of: dict[str, list[int]] = {}
    for row, value in enumerate(table["split"]):
        rows_of.setdefault(str(value).strip(), []).append(row)
    if unknown := {value for value in rows_of if value.lower() not in SPLIT_NAMES}:
        raise ValueError(
            f"The column 'split' of {path} holds {some_of(map(repr, unknown))}; allowed are {', '.join(SPLIT_NAMES)}."
        )
    return {
        split: SourceSplit(images.select(rows_of[value]), [labels[row] for row in rows_of[value]], class_names)
        for split, value in _named_splits(rows_of, f"The column 'split' of {path}").items()
    }


def _read_columns(
    table: datasets.Dataset, where: str, folder: Path | None, image_column: str, label_column: str
) -> SourceSplit:
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        _check_column(table, where, option, column)
    if not len(table):  # whose columns may have no type
        raise ValueError(f"{where} has no rows.")
    images = read_images(table, where, folder, image_column)
    return SourceSplit(images, *_read_labels(table, where, label_column))


def _check_column(table: datasets.Dataset, where: str, option: str, column: str) -> None:
    if column not in table.column_names:
        raise ValueError(f"{where} has no column {column!r}; set {option} to one of {', '.join(table.column_names)}.")


def read_images(table: datasets.Dataset, where: str, folder: Path | None, column: str) -> datasets.Dataset:
    """Take the images or their paths out of a column of a table, without opening any, as the one column `image`.

    Paths start from `folder`, None for that of the process; `where` is what messages call the table.

    Raises:
        ValueError: the column is missing, holds something else, or has empty rows.
    """
    _check_column(table, where, "image_column", column)
    feature = table.features[column]
    if _is_text(feature):
        paths = list(table[column])
        _check_complete([not path for path in paths], where, column)
        return image_rows(folder / path if folder else path for path in paths)
    if not isinstance(feature, datasets.Image) and not (
        isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    ):
        raise ValueError(f"The column {column!r} of {where} holds {feature}; wanted are images or their paths.")
    images = table.select_columns(column)
    if column != "image":
        images = images.rename_column(column, "image")
    return images.cast_column("image", datasets.Image(decode=False))


def _read_labels(table: datasets.Dataset, where: str, column: str) -> tuple[list[str], list[str] | None]:
    feature = table.features[column]
    if not _is_text(feature) and not re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "")):
        raise ValueError(f"The column {column!r} of {where} holds {feature}; wanted are class names or whole numbers.")
    labels = list(table[column])
    _check_complete([_is_missing(label) for label in labels], where, column)
    if isinstance(feature, datasets.ClassLabel):
        return feature.int2str(labels), feature.names
    return [str(label) for label in labels], None


def _is_text(feature: object) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _is_missing(label: str | int | None) -> bool:
    """On the Hub, -1 stands for a label that is kept back."""
    return label is None or label in ("", -1)


def _check_complete(missing: list[bool], where: str, column: str) -> None:
    if any(missing):
        raise ValueError(
            f"{where}: {sum(missing)} of {len(missing)} rows have nothing in the column {column!r}; the first is row "
            f"{missing.index(True) + 1}, counted from 1 without a header."
        )


def _load_dataset(source: str, name: str | None, revision: str | None) -> datasets.DatasetDict:
    missing = f"There is no folder or file {source}"
    if not Path(source).exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source):
        raise FileNotFoundError(f"{missing}.")
    try:
        return datasets.load_dataset(source, name=name, revision=revision)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{missing}, and no data set could be had from the Hub: {one_line(error)}") from error
    except ConnectionError as error:
        raise FileNotFoundError(
            f"{missing}, and the Hub cannot be asked for a data set of that name ({one_line(error)}); check the "
            "spelling, or the network."
        ) from error
    except (datasets.exceptions.DatasetGenerationError, datasets.table.CastError, pa.ArrowException) as error:
        reason = one_line(error.__cause__ or error)[:300]
        raise ValueError(f"The files of {source} are damaged, or of another kind ({reason}).") from error


def _read_dataset_dict(
    tables: datasets.DatasetDict, origin: str, image_column: str, label_column: str
) -> dict[str, SourceSplit]:
    found = _named_splits(tables, origin)
    _warn_about("splits that are neither train, validation nor test", set(tables) - set(found.values()), origin)
    read = {}
    for split, name in found.items():
        table = tables[name]
        if split != "train" and label_column in table.column_names and all(map(_is_missing, table[label_column])):
            logger.warning("%s: ignored the split %s, whose labels are kept back.", origin, name)
        else:
            read[split] = _read_columns(table, f"{origin}, split {name}", None, image_column, label_column)
    return read


def read_source(
    source: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    *,
    name: str | None,
    revision: str | None,
    image_column: str,
    label_column: str,
) -> dict[str, SourceSplit]:
    """Read the splits of a source: `train`, and `validation` and `test` where they are found, in this order.

    Arguments and errors are those of `load_image_data` in `splits.py`, as far as no image has to be opened.
    """
    if isinstance(source, datasets.Dataset):
        source = datasets.DatasetDict(train=source)
    if isinstance(source, datasets.DatasetDict):
        return _read_dataset_dict(source, "DatasetDict", image_column, label_column)
    path = Path(source).expanduser()
    holds_parquet = any(next(path.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet"))
    if path.is_dir() and not holds_parquet:
        return _read_folder(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".parquet"):
        return _read_table(path, image_column, label_column)
    if path.is_file():
        raise ValueError(f"{path} is neither a folder nor a CSV or Parquet file.")
    location = str(path) if holds_parquet else os.fspath(source)
    return _read_dataset_dict(_load_dataset(location, name, revision), location, image_column, label_column)
