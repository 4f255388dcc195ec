# SPDX-License-Identifier: MIT
"""`prompt-cam predict`: which class is in an image?"""

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from prompt_cam_hf.cli import common
from prompt_cam_hf.messages import printable

if TYPE_CHECKING:
    from PIL import Image

OutputFormat = Literal["table", "csv", "json"]


def predict(
    model: common.ModelArgument,
    images: common.ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image, best first.")] = 1,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="What to print.")] = "table",
    batch_size: common.BatchSizeOption = 8,
    device: common.DeviceOption = None,
) -> None:
    """Name the class of images.

    Of images that lie in folders called like the model's classes, it is said on standard error how many were read
    correctly. Images that cannot be read are named there and left out, and the exit status is then 1.
    """
    from prompt_cam_hf.data.images import find_images
    from prompt_cam_hf.loading import load_pipeline
    from prompt_cam_hf.progress import follow

    files = find_images(images)
    classifier = load_pipeline(model, device)
    readable: list[Path] = []

    def opened() -> "Iterator[Image.Image]":
        for file, image in common.open_readable(files):
            readable.append(file)
            yield image

    predictions = classifier(opened(), batch_size=batch_size, top_k=min(top_k, classifier.model.config.num_labels))
    answers = list(follow(predictions, len(files), "Classifying", " images"))
    _print_predictions(readable, answers, output_format)
    _say_how_many_are_right(readable, answers, set(classifier.model.config.id2label.values()))
    if len(readable) < len(files):
        raise typer.Exit(1)


def _print_predictions(files: list[Path], answers: list[list[dict[str, Any]]], output_format: OutputFormat) -> None:
    """Print one row for each image and class, or one JSON object for each image."""
    if output_format == "json":
        rows = [{"image": str(file), "predictions": answer} for file, answer in zip(files, answers, strict=True)]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    columns = ("image", "rank", "label", "score")
    names = _short_names(files) if output_format == "table" else [str(file) for file in files]
    cells = [
        (name, str(rank), prediction["label"], f"{prediction['score']:.4f}")
        for name, answer in zip(names, answers, strict=True)
        for rank, prediction in enumerate(answer, 1)
    ]
    if output_format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *cells])
        return
    if not cells:
        return
    table = Table(*columns)
    table.columns[0].overflow = "fold"
    for row in cells:
        table.add_row(*map(printable, row))
    Console().print(table, markup=False)


def _short_names(files: list[Path]) -> list[str]:
    """Files without their folders, or, where two then have one name, without the folder that all lie in."""
    names = [file.name for file in files]
    if len({*names}) == len({*files}):
        return names
    common_folder = os.path.commonpath([file.absolute().parent for file in files])
    return [str(file.absolute().relative_to(common_folder)) for file in files]


def _say_how_many_are_right(files: list[Path], answers: list[list[dict[str, Any]]], classes: set[str]) -> None:
    """Count the best answers that are also the name of the innermost folder called like a class."""
    from prompt_cam_hf.data.splits import display_name

    true = [next((name for name in map(display_name, file.parts[-2::-1]) if name in classes), None) for file in files]
    right = [answer[0]["label"] == name for answer, name in zip(answers, true, strict=True) if name is not None]
    if right:
        which = "" if len(right) == len(files) else " that lie in folders called like a class"
        common.say(f"Read correctly: {sum(right)} of {len(right)} images{which} ({sum(right) / len(right):.1%}).")
