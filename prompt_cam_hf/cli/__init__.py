# SPDX-License-Identifier: MIT
"""The command `prompt-cam`: one module for each subcommand."""

import os
from typing import Annotated

import typer

from prompt_cam_hf.cli import (
    atlas,
    compare,
    convert,
    demo,
    evaluate,
    explain,
    predict,
    prepare,
    publish,
    remove,
    reproduce,
    space,
    study,
    taxonomy,
    train,
)
from prompt_cam_hf.cli.app import app as app_page
from prompt_cam_hf.cli.common import one_sentence_errors
from prompt_cam_hf.messages import DEBUG_VARIABLE
from prompt_cam_hf.version import __version__

# Plain help: rich's would show a flag as an option that takes a value, `--overwrite <bool>`.
app = typer.Typer(
    help="Prompt-CAM: classify images, and see which traits decide.", no_args_is_help=True, rich_markup_mode=None
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"prompt-cam {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the full traceback of an error.")] = False,
) -> None:
    """Take the options that come before a command."""
    if debug:
        os.environ[DEBUG_VARIABLE] = "1"


app.command(context_settings=train.CONTEXT)(one_sentence_errors()(train.train))
app.command(context_settings=reproduce.CONTEXT)(one_sentence_errors()(reproduce.reproduce))
for _command in (
    predict.predict,
    explain.explain,
    compare.compare,
    remove.remove,
    atlas.atlas,
    taxonomy.taxonomy,
    evaluate.evaluate,
    app_page,
    demo.demo,
    prepare.prepare,
    publish.publish,
    space.space,
    convert.convert,
):
    app.command()(one_sentence_errors()(_command))

app.add_typer(study.study, name="study")

__all__ = ["app"]
