# SPDX-License-Identifier: MIT
"""The command `prompt-cam`: one module for each subcommand."""

from typing import Annotated

import typer

from prompt_cam_hf.cli import atlas, compare, convert, demo, evaluate, explain, predict, prepare, publish, taxonomy
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
) -> None:
    """Take the options that come before a command."""


app.command()(predict.predict)
app.command()(explain.explain)
app.command()(compare.compare)
app.command()(atlas.atlas)
app.command()(taxonomy.taxonomy)
app.command()(evaluate.evaluate)
app.command()(demo.demo)
app.command()(prepare.prepare)
app.command()(publish.publish)
app.command()(convert.convert)

__all__ = ["app"]
