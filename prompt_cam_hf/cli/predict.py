# SPDX-License-Identifier: MIT
"""`prompt-cam predict`: which class is in an image?"""

import csv
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from prompt_cam_hf.cli.common import (
    DeviceOption,
    ImagesArgument,
    ModelArgument,
    load_pipeline,
    messages,
    one_sentence_errors,
    open_readable,
)
from prompt_cam_hf.data.images import find_images


class OutputFormat(str, Enum):
    """How results are printed."""

    table = "table"
    csv = "csv"
    json = "json"


def predict(
    model: ModelArgument,
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each image, best first.")] = 1,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="What to print.")] = OutputFormat.table,
    batch_size: Annotated[int, typer.Option(min=1, help="Images to classify at a time.")] = 8,
    device: DeviceOption = None,
) -> None:
    """Name the class of images.

    Images that cannot be read are named on standard error and left out, and the exit status is then 1.
    """
    with one_sentence_errors():
        files = find_images(images)
        classifier = load_pipeline(model, device)
    readable: list[Path] = []
    predictions = classifier(
        open_readable(files, readable), batch_size=batch_size, top_k=min(top_k, classifier.model.config.num_labels)
    )
    progress = track(predictions, "Classifying", total=len(files), console=messages, disable=not messages.is_terminal)
    answers = list(progress)
    _print_predictions(readable, answers, output_format)
    if len(readable) < len(files):
        raise typer.Exit(1)


def _print_predictions(files: list[Path], answers: list[list[dict[str, Any]]], output_format: OutputFormat) -> None:
    """Print one row for each image and class, or one JSON object for each image."""
    if output_format is OutputFormat.json:
        rows = [{"image": str(file), "predictions": answer} for file, answer in zip(files, answers, strict=True)]
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    columns = ("image", "rank", "label", "score")
    cells = [
        (str(file), str(rank), prediction["label"], f"{prediction['score']:.4f}")
        for file, answer in zip(files, answers, strict=True)
        for rank, prediction in enumerate(answer, 1)
    ]
    if output_format is OutputFormat.csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([columns, *cells])
        return
    table = Table(*columns)
    table.columns[0].overflow = "fold"
    for row in cells:
        table.add_row(*row)
    Console().print(table, markup=False)


__all__ = ["OutputFormat", "predict"]
