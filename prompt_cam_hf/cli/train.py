# SPDX-License-Identifier: MIT
"""`prompt-cam train`: train on a folder of photos, in one process, as a recipe says."""

from typing import Annotated

import typer

from prompt_cam_hf.cli.common import one_sentence_errors, say

# The keys of a recipe are no options of this command, which would have to import the recipe to know them.
CONTEXT = {"ignore_unknown_options": True}


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PHOTOS [--KEY VALUE]",
            help="A folder with one folder for each class, a CSV or Parquet file, or a data set on the Hub; then keys "
            "of the recipe, such as --num_train_epochs 30.",
        ),
    ] = None,
    out: Annotated[str | None, typer.Option(help="New folder for the model; the recipe's by default.")] = None,
    recipe: Annotated[str, typer.Option(help="Name of a recipe, or a file.")] = "own_photos",
    list_recipes: Annotated[bool, typer.Option("--list-recipes", help="Name the recipes and exit.")] = False,
    list_keys: Annotated[bool, typer.Option("--list-keys", help="Explain the keys of recipes and exit.")] = False,
) -> None:
    """Train a model on photos, in one process; docs/training.md has the rest.

    With --resume_from_checkpoint, a run that was stopped goes on.
    """
    if list_recipes:
        from prompt_cam_hf.training import recipe_files

        names = recipe_files.list_recipes()
        print("\n".join(f"{name:{max(map(len, names))}}  {sentence}" for name, sentence in names.items()))
        return
    from prompt_cam_hf.training.recipe import command_line_parser, parse_recipe

    if list_keys:
        command_line_parser().print_help()
        return
    given = arguments or []
    if given and not given[0].startswith("--"):
        given = [f"--data={given[0]}", *given[1:]]
    if out is not None:
        given = [*given, f"--output_dir={out}"]
    with one_sentence_errors(TypeError):
        settings = parse_recipe([recipe, *given])
    # Training brings a second of imports that wrong arguments need not wait for.
    from prompt_cam_hf.training.train import INTERRUPTED
    from prompt_cam_hf.training.train import train as run

    with one_sentence_errors(FloatingPointError):
        try:
            run(settings)
        except KeyboardInterrupt as error:
            say(INTERRUPTED, style="yellow")
            raise typer.Exit(130) from error
