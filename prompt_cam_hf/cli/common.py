# SPDX-License-Identifier: MIT
"""What do the commands share? Messages, models, images and output folders."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console

from prompt_cam_hf.data.images import UnreadableImageError, open_image
from prompt_cam_hf.loading import load_pipeline

# Results go to standard output, everything else here.
messages = Console(stderr=True)

ModelArgument = Annotated[str, typer.Argument(help="Folder or Hub id of a trained Prompt-CAM.")]
ImagesArgument = Annotated[list[Path], typer.Argument(help="Images, and folders that are searched for them.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps ...; the best there is by default.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace files of an earlier run.")]


def say(message: str, style: str = "") -> None:
    """Print a line to standard error, as it is."""
    messages.print(message, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def one_sentence_errors() -> Iterator[None]:
    """Turn the errors that a user can mend into one sentence and the exit status 2."""
    try:
        yield
    except (OSError, ValueError) as error:
        say(f"Error: {error}", style="red")
        raise typer.Exit(2) from error


def open_readable(files: list[Path], readable: list[Path]) -> Iterator[Image.Image]:
    """Open images one after another; add to `readable` which could be opened, and name the others."""
    for file in files:
        try:
            image = open_image(file)
        except (UnreadableImageError, OSError) as error:
            say(f"Left out: {error}", style="yellow")
            continue
        readable.append(file)
        yield image


def check_absent(paths: list[Path], overwrite: bool) -> None:
    """Refuse to write over files that are there.

    Raises:
        FileExistsError: there is one, and `overwrite` is not set.
    """
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        others = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise FileExistsError(f"{there[0]}{others} exists already; choose another --out, or add --overwrite.")


__all__ = [
    "DeviceOption",
    "ImagesArgument",
    "ModelArgument",
    "OverwriteOption",
    "check_absent",
    "load_pipeline",
    "messages",
    "one_sentence_errors",
    "open_readable",
    "say",
]
