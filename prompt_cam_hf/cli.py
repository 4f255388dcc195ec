# SPDX-License-Identifier: MIT
"""The command `prompt-cam`. Results go to standard output, everything else to standard error."""

import csv
import json
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoConfig, pipeline

from prompt_cam_hf.images import UnreadableImageError, find_images, open_image
from prompt_cam_hf.modeling import PromptCAMImageClassificationPipeline

app = typer.Typer(help="Prompt-CAM: classify pictures, and see which traits decide.", no_args_is_help=True)
_errors = Console(stderr=True)


class OutputFormat(str, Enum):
    """How results are printed."""

    table = "table"
    csv = "csv"
    json = "json"


@app.callback()
def _main() -> None:
    """Make `predict` a subcommand though it is the only one."""


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a trained Prompt-CAM.")],
    images: Annotated[list[Path], typer.Argument(help="Pictures, and folders that are searched for them.")],
    top_k: Annotated[int, typer.Option(min=1, help="Classes to name for each picture, best first.")] = 1,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="What to print.")] = OutputFormat.table,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures to classify at a time.")] = 8,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best there is by default.")
    ] = None,
) -> None:
    """Name the class of pictures.

    Pictures that cannot be read are named on standard error and left out, and the exit status is then 1.
    """
    try:
        files = find_images(images)
        classifier = _load_pipeline(model, device)
    except (OSError, ValueError) as error:
        _errors.print(f"Error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    readable: list[Path] = []
    predictions = classifier(
        _open_readable(files, readable), batch_size=batch_size, top_k=min(top_k, classifier.model.config.num_labels)
    )
    progress = track(predictions, "Classifying", total=len(files), console=_errors, disable=not _errors.is_terminal)
    answers = list(progress)
    _print_predictions(readable, answers, output_format)
    if len(readable) < len(files):
        raise typer.Exit(1)


def _load_pipeline(model: str, device: str | None) -> PromptCAMImageClassificationPipeline:
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "prompt_cam":
        raise ValueError(f"{model} is a model of type {config.model_type!r}, not a Prompt-CAM.")
    return pipeline(
        "image-classification", model=model, device=device, pipeline_class=PromptCAMImageClassificationPipeline
    )


def _open_readable(files: list[Path], readable: list[Path]) -> Iterator[Image.Image]:
    """Open pictures one after another, noting which could be opened."""
    for file in files:
        try:
            image = open_image(file)
        except (UnreadableImageError, OSError) as error:
            _errors.print(f"Left out: {error}", style="yellow", markup=False, highlight=False, soft_wrap=True)
            continue
        readable.append(file)
        yield image


def _print_predictions(files: list[Path], answers: list[list[dict[str, Any]]], output_format: OutputFormat) -> None:
    """Print one row for each picture and class, or one JSON object for each picture."""
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


__all__ = ["app"]
