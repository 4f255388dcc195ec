# SPDX-License-Identifier: MIT
"""What the commands share: options, messages, opening images, and the files of results.

A command imports what it runs on inside its function, so that --help need not wait for torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
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


def _named_path(text: str) -> Path:
    if not text:
        raise typer.BadParameter("an empty name; the current folder is called .")
    return Path(text)


ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a trained Prompt-CAM.")]
ImagesArgument = Annotated[
    list[Path], typer.Argument(parser=_named_path, help="Images, and folders that are searched for them.")
]
OutOption = Annotated[Path, typer.Option(help="Folder for the results; it is made.")]
ImageArgument = Annotated[Path, typer.Argument(help="The image.")]
HeadsOption = Annotated[int | None, typer.Option(min=1, help="Heads to draw for each class; 4 by default.")]
KindOption = Annotated[
    Literal["attention", "evidence"],
    typer.Option(help="Where a prompt looks, or how much what it finds moves the score."),
]
MethodOption = Annotated[Literal["greedy", "exact", "shapley"], typer.Option(help="How heads are ranked.")]
ScaleOption = Annotated[
    Literal["map", "head", "figure"] | None,
    typer.Option(
        help="One colour scale for each map, each head or the figure; by default for each map, and in comparisons for "
        "each head."
    ),
]
OutlineOption = Annotated[bool, typer.Option("--outline", help="Outline what reaches half of the scale.")]
FormatOption = Annotated[
    Literal["png", "pdf", "svg"], typer.Option("--format", help="Of the figure; pdf and svg suit papers.")
]
ColumnsOption = Annotated[
    int | None, typer.Option(min=2, max=50, help="Panels in a line, the image included; 5 by default.")
]
WidthOption = Annotated[
    float | None,
    typer.Option(min=30, max=1000, help="Width of the figure in mm; a paper's column has about 85."),
]
FontSizeOption = Annotated[
    float | None, typer.Option(min=4, max=40, help="In points; by default 10, or less in a narrow figure.")
]
SplitOption = Annotated[
    Literal["train", "validation", "test"] | None,
    typer.Option(help="By default the last of train, validation and test that there is."),
]
ImageColumnOption = Annotated[str, typer.Option(help="Column of images or paths, in tables and data sets.")]
LabelColumnOption = Annotated[str, typer.Option(help="Column of class names, in tables and data sets.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best there is by default.")]


@dataclass(frozen=True)
class FigureOptions:
    """How a figure is drawn, for the commands that write one; see `takes_figure_options`."""

    scale: ScaleOption = None
    outline: OutlineOption = False
    figure_format: FormatOption = "png"
    columns: ColumnsOption = None
    width: WidthOption = None
    font_size: FontSizeOption = None


def takes_figure_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take each field of `FigureOptions` as an option, in the place of its parameter `figure`."""
    options = signature(FigureOptions).parameters

    @wraps(command)
    def run(**arguments: Any) -> None:
        figure = FigureOptions(**{name: arguments.pop(name) for name in options})
        command(figure=figure, **arguments)

    own = signature(command)
    parameters: list[Parameter] = []
    for parameter in own.parameters.values():
        in_place = options.values() if parameter.name == "figure" else (parameter,)
        parameters += [each.replace(kind=Parameter.KEYWORD_ONLY) for each in in_place]
    # What typer reads.
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def say(message: str, style: str = "") -> None:
    """Print lines to standard error; what would move the cursor is written as an escape."""
    text = "\n".join(map(printable, message.split("\n")))
    messages.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def show(result: object) -> None:
    """Print a result to standard output; what would move the cursor is written as an escape."""
    print("\n".join(map(printable, str(result).split("\n"))))


@contextmanager
def one_sentence_errors(*documented: type[Exception]) -> Iterator[None]:
    """Turn an error into one sentence and the exit status 2, and wait for the Hub for a bounded time.

    `documented` are kinds of errors that tell a user what to do, beside OSError and ValueError.
    """
    from prompt_cam_hf.hub.patience import limit_waiting

    limit_waiting()
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        documented = (OSError, ValueError, ModuleNotFoundError, *documented)
        say(f"Error: {tell_error(error, documented)}", style="red")
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


def output_paths(
    files: Iterable[Path], out: Path, ending: str, figure_format: str, overwrite: bool
) -> dict[Path, list[Path]]:
    """Where the results of each image go: its figure, JSON and CSV file, such as NAME.`ending`.png.

    Inside `out` they lie as the images do in their common folder, under the images' names without the ending, or
    with it where two would have the same name. An image that was given twice is listed once.

    Raises:
        FileExistsError: a result is there already, and `overwrite` is not set.
        NotADirectoryError: `out` is a file.
        ValueError: a result would replace one of the images.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is not a folder; choose another --out.")
    full = {file: Path(os.path.abspath(file)) for file in files}
    first = {path: file for file, path in reversed(full.items())}
    common = os.path.commonpath([path.parent for path in first])
    names = {file: path.relative_to(common) for path, file in first.items()}
    if len({str(name.with_suffix("")).casefold() for name in names.values()}) == len(names):
        names = {file: name.with_suffix("") for file, name in names.items()}
    outputs = {
        file: [out / f"{names[file]}.{ending}{suffix}" for suffix in (f".{figure_format}", ".json", ".csv")]
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


def save_result(result: "Result", paths: Iterable[Path], heads: int | None, figure: FigureOptions) -> None:
    """Write a result as each of these files, and make their folders."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        result.save(
            path,
            heads=heads,
            scale=figure.scale,
            outline=figure.outline,
            columns=figure.columns,
            width=figure.width,
            font_size=figure.font_size,
        )
