# SPDX-License-Identifier: MIT
"""`prompt-cam explain`: which traits decide?"""

import os
from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from prompt_cam_hf.cli.common import (
    DeviceOption,
    ImagesArgument,
    ModelArgument,
    OverwriteOption,
    check_absent,
    load_pipeline,
    one_sentence_errors,
    open_readable,
)
from prompt_cam_hf.data.images import find_images
from prompt_cam_hf.explanations.class_names import find_classes
from prompt_cam_hf.explanations.explain import explain_each
from prompt_cam_hf.explanations.figures import check_head_count
from prompt_cam_hf.explanations.results import Result
from prompt_cam_hf.loading import as_classifier

# The figure, everything, and a table of heads.
_SUFFIXES = (".png", ".json", ".csv")


class Kind(str, Enum):
    """What a map shows."""

    attention = "attention"
    evidence = "evidence"


class Method(str, Enum):
    """How heads are ranked."""

    greedy = "greedy"
    exact = "exact"
    shapley = "shapley"


class Scale(str, Enum):
    """Which maps share a scale."""

    figure = "figure"
    head = "head"


OutOption = Annotated[Path, typer.Option(help="Folder for the results; it is made.")]
HeadsOption = Annotated[int | None, typer.Option(min=1, help="Heads to draw for each class; 4 by default.")]
KindOption = Annotated[Kind, typer.Option(help="Where a prompt looks, or how much what it finds moves the score.")]
MethodOption = Annotated[Method, typer.Option(help="How heads are ranked.")]
ScaleOption = Annotated[Scale, typer.Option(help="One colour scale for the figure, or one for each head.")]
OutlineOption = Annotated[bool, typer.Option("--outline", help="Outline what reaches half of the scale.")]


def explain(
    model: ModelArgument,
    images: ImagesArgument,
    out: OutOption,
    classes: Annotated[
        list[str] | None,
        typer.Option(help="A class by its name; repeat it for several. By default, the predicted one."),
    ] = None,
    heads: HeadsOption = None,
    kind: KindOption = Kind.attention,
    method: MethodOption = Method.greedy,
    scale: ScaleOption = Scale.figure,
    outline: OutlineOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
) -> None:
    """Explain what a model says about images: scores, and where the most important heads look.

    For each image, NAME.traits.png, .json and .csv are written to --out, in folders like those of the images.
    Images that cannot be read are named on standard error and left out, and the exit status is then 1.
    """
    with one_sentence_errors():
        outputs = output_paths(find_images(images), out, "traits", overwrite)
        classifier = load_pipeline(model, device)
        numbers = find_classes(classifier.model.config.id2label, classes) if classes else None
        check_head_count(heads, classifier.model.config.backbone_config.num_attention_heads)
        readable: list[Path] = []
        opened = open_readable(list(outputs), readable)
        # One at a time, so that the last readable file is the one explained.
        for explanation in explain_each(
            as_classifier(classifier), opened, numbers, kind=kind.value, method=method.value, batch_size=1
        ):
            explanation = replace(explanation, source=str(readable[-1]))
            save_result(explanation, outputs[readable[-1]], heads=heads, scale=scale.value, outline=outline)
            print(explanation, end="\n\n")
    if len(readable) < len(outputs):
        raise typer.Exit(1)


def output_paths(files: Iterable[Path], out: Path, ending: str, overwrite: bool) -> dict[Path, list[Path]]:
    """Where the results of each image go; an image that was given twice stands there once.

    Inside `out` they lie as the images do in their common folder, under the images' names without the ending, or
    with it where two would have the same name.

    Raises:
        FileExistsError: a result is there already, and `overwrite` is not set.
        ValueError: a result would replace one of the images.
    """
    full = {file: Path(os.path.abspath(file)) for file in files}
    first = {path: file for file, path in reversed(full.items())}
    common = os.path.commonpath([path.parent for path in first])
    names = {file: path.relative_to(common) for path, file in first.items()}
    if len({str(name.with_suffix("")).casefold() for name in names.values()}) == len(names):
        names = {file: name.with_suffix("") for file, name in names.items()}
    outputs = {
        file: [out / f"{names[file]}.{ending}{suffix}" for suffix in _SUFFIXES] for file in full if file in names
    }
    every = [path for paths in outputs.values() for path in paths]
    for path in every:
        if Path(os.path.abspath(path)) in first:
            raise ValueError(f"{path} would replace one of the images; choose another --out.")
    check_absent(every, overwrite)
    return outputs


def save_result(result: Result, paths: Iterable[Path], **figure_options: Any) -> None:
    """Write a result as each of these files, and make their folders."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path, **figure_options)


__all__ = [
    "HeadsOption",
    "Kind",
    "KindOption",
    "Method",
    "MethodOption",
    "OutOption",
    "OutlineOption",
    "Scale",
    "ScaleOption",
    "explain",
    "output_paths",
    "save_result",
]
