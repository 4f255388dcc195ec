# SPDX-License-Identifier: MIT
"""The command `prompt-cam`: one module for each subcommand."""

import typer

from prompt_cam_hf.cli import atlas, compare, demo, evaluate, explain, predict, prepare, publish, taxonomy

app = typer.Typer(help="Prompt-CAM: classify images, and see which traits decide.", no_args_is_help=True)


@app.callback()
def _main() -> None:
    """Commands are named even while there is one only."""


app.command()(predict.predict)
app.command()(explain.explain)
app.command()(compare.compare)
app.command()(atlas.atlas)
app.command()(taxonomy.taxonomy)
app.command()(evaluate.evaluate)
app.command()(demo.demo)
app.command()(prepare.prepare)
app.command()(publish.publish)

__all__ = ["app"]
