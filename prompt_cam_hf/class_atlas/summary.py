# SPDX-License-Identifier: MIT
"""`summarize`: what the rows of all images say about each class, and about classes that are taken for one another."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from prompt_cam_hf.class_atlas.collect import MapSums

# Reads the given columns of all rows, in order; it is called twice.
ReadRows = Callable[[list[str]], Iterator[dict[str, Any]]]

# How many unreadable images are named.
_MAX_UNREADABLE = 100

_SHARES = pa.list_(pa.float32())
# The columns of classes.parquet; docs/traits/atlas.md says what each holds.
CLASS_SCHEMA = pa.schema(
    [
        ("number", pa.int32()),
        ("class", pa.string()),
        ("num_labelled", pa.int64()),
        ("num_predicted", pa.int64()),
        ("num_correct", pa.int64()),
        ("accuracy", pa.float64()),
        ("num_used", pa.int64()),
        ("head_in_top", _SHARES),
        ("head_in_sufficient", _SHARES),
        ("mean_sufficient", pa.float64()),
        ("mean_attention_on_patches", _SHARES),
        ("mean_concentration", _SHARES),
        ("mean_maps", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("examples", pa.list_(pa.string())),
        ("most_confused_with", pa.string()),
        ("num_confused", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Example:
    """An image that is shown.

    `index` is its place in the data, from 0; `number` its predicted class, of which `clearness` (in `collect`) says
    how good an example it is; `head_order` has the most important head first.
    """

    index: int
    name: str
    number: int
    clearness: float
    head_order: tuple[int, ...]


@dataclass
class ClassSummary:
    """A class over all images.

    The numbers about heads, and the examples, come from the `used` images: those that were taken for the class and are
    labelled with it or have no label. Sums over these images become means by `share`.

    Attributes:
        labelled: The number of images labelled with it.
        predicted: The number of images taken for it.
        correct: The number of images both labelled with it and taken for it.
        in_top: (heads,), the number of images in which each head is one of the top heads.
        in_sufficient: (heads,), the number of images in which each head is in the sufficient set.
        sufficient: The sum of the sizes of the sufficient sets.
        on_patches: (heads,), the sum of the attention on patches.
        concentrated: (heads,), the sum of the concentration of the maps.
        examples: The clearest images, the clearest first.
        mistaken: How often its images were taken for each other class, by class number.
    """

    number: int
    name: str
    in_top: np.ndarray
    in_sufficient: np.ndarray
    on_patches: np.ndarray
    concentrated: np.ndarray
    labelled: int = 0
    predicted: int = 0
    correct: int = 0
    used: int = 0
    sufficient: int = 0
    examples: list[Example] = field(default_factory=list)
    mistaken: Counter[int] = field(default_factory=Counter)

    @property
    def accuracy(self) -> float | None:
        """The share of its images that were recognised; None if it has no images."""
        return self.correct / self.labelled if self.labelled else None

    @property
    def heads(self) -> list[int]:
        """The heads by how often they are top heads, the most frequent first."""
        return np.argsort(-self.in_top, kind="stable").tolist()

    def share(self, total: np.ndarray) -> np.ndarray:
        """A sum over the used images as a mean; 0 where there are none."""
        return total / max(self.used, 1)


@dataclass(frozen=True)
class Confusion:
    """How often the class number `label` is taken for `prediction`, with the clearest images first."""

    label: int
    prediction: int
    count: int
    examples: list[Example]


@dataclass
class Summary:
    """The numbers of an atlas, with classes in the order of their numbers, and the most frequent confusions first.

    Images are counted, readable or not; of those that could not be read, the first ones have name and reason.
    """

    classes: list[ClassSummary]
    confusions: list[Confusion]
    total: int
    unreadable: list[tuple[str, str]]
    num_unreadable: int

    @property
    def labelled(self) -> int:
        """Readable images with a label."""
        return sum(found.labelled for found in self.classes)

    @property
    def correct(self) -> int:
        """Images that were taken for the class that they are labelled with."""
        return sum(found.correct for found in self.classes)

    @property
    def accuracy(self) -> float | None:
        """The share of labelled images that were recognised; None if there are no labelled images."""
        return self.correct / self.labelled if self.labelled else None

    @property
    def mean_class_accuracy(self) -> float | None:
        """The mean over the classes that have images, in which rare classes count as much as common ones."""
        rates = [found.accuracy for found in self.classes if found.accuracy is not None]
        return sum(rates) / len(rates) if rates else None


def summarize(
    read_rows: ReadRows,
    names: Mapping[int, str],
    heads: int,
    top_heads: int,
    num_examples: int,
    num_confusions: int,
    num_confusion_examples: int,
) -> Summary:
    """Read the rows once for the classes, and once more for examples of the most frequent confusions.

    The numbers say how many of an image's heads count as its top heads, and how many examples of each class,
    confusions, and examples of each confusion are kept.
    """
    numbers = {name: number for number, name in names.items()}
    classes = [ClassSummary(number, name, *np.zeros((4, heads))) for number, name in sorted(names.items())]
    best: list[list[tuple[float, int, Example]]] = [[] for _ in classes]
    unreadable: list[tuple[str, str]] = []
    total = num_unreadable = 0
    columns = ["index", "image", "label", "prediction", "head_order", "sufficient", "attention_on_patches"]
    for row in read_rows([*columns, "concentration", "clearness", "unreadable"]):
        total += 1
        if row["unreadable"] is not None:
            num_unreadable += 1
            if len(unreadable) < _MAX_UNREADABLE:
                unreadable.append((row["image"], row["unreadable"]))
            continue
        predicted = classes[numbers[row["prediction"]]]
        predicted.predicted += 1
        if row["label"] is not None:
            label = classes[numbers[row["label"]]]
            label.labelled += 1
            if label is not predicted:
                label.mistaken[predicted.number] += 1
                continue
            label.correct += 1
        _add(predicted, row, top_heads)
        _keep_best(best[predicted.number], _example(row, predicted.number), num_examples)
    for found, kept in zip(classes, best, strict=True):
        found.examples = [example for *_, example in sorted(kept, reverse=True)]
    pairs = _most_confused(classes, num_confusions)
    confusions = _find_confusion_examples(read_rows, numbers, pairs, num_confusion_examples)
    return Summary(classes, confusions, total, unreadable, num_unreadable)


def _add(found: ClassSummary, row: dict[str, Any], top_heads: int) -> None:
    found.used += 1
    found.in_top[row["head_order"][:top_heads]] += 1
    found.in_sufficient[row["head_order"][: row["sufficient"]]] += 1
    found.sufficient += row["sufficient"]
    found.on_patches += row["attention_on_patches"]
    found.concentrated += row["concentration"]


def _example(row: dict[str, Any], number: int) -> Example:
    return Example(row["index"], row["image"], number, row["clearness"], tuple(row["head_order"]))


def _keep_best(kept: list[tuple[float, int, Example]], example: Example, limit: int) -> None:
    """Keep the clearest examples in a heap; of equally clear ones, the first in the data."""
    heapq.heappush(kept, (example.clearness, -example.index, example))
    if len(kept) > limit:
        heapq.heappop(kept)


def _most_confused(classes: list[ClassSummary], limit: int) -> list[tuple[int, int, int]]:
    """(label, prediction, count) of the most frequent confusions; if equally frequent, of smaller classes."""
    pairs = (
        (count, -found.labelled, -found.number, -prediction)
        for found in classes
        for prediction, count in found.mistaken.items()
    )
    return [(-number, -prediction, count) for count, _, number, prediction in heapq.nlargest(limit, pairs)]


def _find_confusion_examples(
    read_rows: ReadRows, numbers: Mapping[str, int], pairs: list[tuple[int, int, int]], limit: int
) -> list[Confusion]:
    best: dict[tuple[int, int], list[tuple[float, int, Example]]] = {(a, b): [] for a, b, _ in pairs}
    for row in read_rows(["index", "image", "label", "prediction", "head_order", "clearness"]) if pairs else ():
        if row["label"] is None or row["prediction"] is None:
            continue
        pair = (numbers[row["label"]], numbers[row["prediction"]])
        if pair in best:
            _keep_best(best[pair], _example(row, pair[1]), limit)
    return [
        Confusion(label, prediction, count, [example for *_, example in sorted(best[label, prediction], reverse=True)])
        for label, prediction, count in pairs
    ]


def class_table(summary: Summary, sums: MapSums) -> pa.Table:
    """The rows of classes.parquet."""
    names = {found.number: found.name for found in summary.classes}
    batches = [pa.RecordBatch.from_pylist([_class_row(f, sums, names)], CLASS_SCHEMA) for f in summary.classes]
    return pa.Table.from_batches(batches, CLASS_SCHEMA).combine_chunks()


def _class_row(found: ClassSummary, sums: MapSums, names: Mapping[int, str]) -> dict[str, Any]:
    # Of equally frequent ones, the class with the lower number.
    other, count = min(found.mistaken.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
    row: dict[str, Any] = {
        "number": found.number,
        "class": found.name,
        "num_labelled": found.labelled,
        "num_predicted": found.predicted,
        "num_correct": found.correct,
        "accuracy": found.accuracy,
        "num_used": found.used,
        "examples": [example.name for example in found.examples],
        "most_confused_with": None if other is None else names[other],
        "num_confused": count,
    }
    if found.used:
        row |= {
            "head_in_top": found.share(found.in_top),
            "head_in_sufficient": found.share(found.in_sufficient),
            "mean_sufficient": found.sufficient / found.used,
            "mean_attention_on_patches": found.share(found.on_patches),
            "mean_concentration": found.share(found.concentrated),
            "mean_maps": sums.mean(found.number).tolist(),
        }
    return row
