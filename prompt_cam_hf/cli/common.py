# SPDX-License-Identifier: MIT
"""What the commands share: options, messages, opening images, and the files of results.

A command imports what it runs on inside its function, so that --help need not wait for torch.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from prompt_cam_hf.messages import one_line, printable, tell_error

if TYPE_CHECKING:
    from PIL import Image

    from prompt_cam_hf.explanations.results import Result

# Results go to standard output, everything else here.
messages = Console(stderr=True)

# The figure, everything, and a table of heads.
_RESULT_SUFFIXES = (".png", ".json", ".csv")

ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a trained Prompt-CAM.")]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Images, and folders that are searched for them.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the results; it is made.")]
HeadsOption = Annotated[int | None, typer.Option(min=1, help="Heads to draw for each class; 4 by default.")]
KindOption = Annotated[
    Literal["attention", "evidence"],
    typer.Option(help="Where a prompt looks, or how much what it finds moves the score."),
]
MethodOption = Annotated[Literal["greedy", "exact", "shapley"], typer.Option(help="How heads are ranked.")]
ScaleOption = Annotated[
    Literal["figure", "head"], typer.Option(help="One colour scale for the figure, or one for each head.")
]
OutlineOption = Annotated[bool, typer.Option("--outline", help="Outline what reaches half of the scale.")]
SplitOption = Annotated[
    Literal["train", "validation", "test"] | None,
    typer.Option(help="By default the last of train, validation and test that there is."),
]
ImageColumnOption = Annotated[str, typer.Option(help="Column of images or paths, in tables and data sets.")]
LabelColumnOption = Annotated[str, typer.Option(help="Column of class names, in tables and data sets.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best there is by default.")]


def say(message: str, style: str = "") -> None:
    """Print lines to standard error; what would move the cursor is written as an escape."""
    text = "\n".join(map(printable, message.split("\n")))
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def show(result: object) -> None:
    """Print a result to standard output; what would move the cursor is written as an escape."""
    print("\n".join(map(printable, str(result).split("\n"))))


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn an error into one sentence and the exit status 2, and wait for the Hub for a bounded time."""
    from prompt_cam_hf.hub.patience import limit_waiting

    limit_waiting()
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        say(f"Error: {tell_error(error)}", style="red")
        raise typer.Exit(2) from error


def open_readable(files: Iterable[Path]) -> Iterator[tuple[Path, "Image.Image"]]:
    """Open images one after another; name those that cannot be read on standard error, and leave them out."""
    from prompt_cam_hf.data.images import UnreadableImageError, open_image

    for file in files:
        try:
            image = open_image(file)
        except (UnreadableImageError, OSError) as error:
            say(f"Left out: {one_line(error)}", style="yellow")
            continue
        yield file, image


def output_paths(files: Iterable[Path], out: Path, ending: str, overwrite: bool) -> dict[Path, list[Path]]:
    """Where the results of each image go: its figure, JSON and CSV file, such as NAME.`ending`.png.

    Inside `out` they lie as the images do in their common folder, under the images' names without the ending, or
    with it where two would have the same name. An image that was given twice is listed once.

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
        file: [out / f"{names[file]}.{ending}{suffix}" for suffix in _RESULT_SUFFIXES]
        for file in full
        if file in names
    }
    every = [path for paths in outputs.values() for path in paths]
    for path in every:
        if Path(os.path.abspath(path)) in first:
            raise ValueError(f"{path} would replace one of the images; choose another --out.")
    there = [path for path in every if path.exists()]
    if there and not overwrite:
        exist = f"and {len(there) - 1} more exist" if len(there) > 1 else "exists"
        raise FileExistsError(f"{there[0]} {exist} already; choose another --out, or add --overwrite.")
    return outputs


def save_result(result: "Result", paths: Iterable[Path], **figure_options: Any) -> None:
    """Write a result as each of these files, and make their folders."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(path, **figure_options)
