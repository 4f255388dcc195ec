# SPDX-License-Identifier: MIT
"""The command `prompt-cam`: one module for each subcommand."""

import typer

from prompt_cam_hf.cli import predict

app = typer.Typer(help="Prompt-CAM: classify pictures, and see which traits decide.", no_args_is_help=True)


@app.callback()
def _main() -> None:
    """Commands are named even while there is one only."""


app.command()(predict.predict)

__all__ = ["app"]
