# SPDX-License-Identifier: MIT
"""`prompt-cam reproduce`: does the paper's table, or figure, come out?"""

from pathlib import Path
from typing import Annotated

import typer

from prompt_cam_hf.cli import common

# The keys of a recipe are no options of this command, which would have to import the recipe to know them.
CONTEXT = {"ignore_unknown_options": True}


def reproduce(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME [--KEY VALUE]",
            help="table1 (insertion and deletion beside the rivals), table2 (accuracy beside the probe), variants "
            "(Shallow, Deep, each layer between), heads (blurred one by one), own-and-other (another class), "
            "disagreements (the probe right, Prompt-CAM wrong), manipulation (traits taken out), backbones, taxonomy; "
            "then keys of the recipe, such as --num_train_epochs 30.",
        ),
    ],
    data: Annotated[
        str, typer.Option(help="drawn-birds, or what `prompt-cam train` reads, such as a folder that `prepare` made.")
    ] = "drawn-birds",
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of models and results, for all experiments on the data; reproduction by default."),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Name of a recipe, or a file; by default the published one of the data.")
    ] = None,
    backbone: Annotated[
        list[str] | None, typer.Option(help="For backbones: a folder or Hub id; repeat it for several.")
    ] = None,
    rival: Annotated[
        list[str] | None,
        typer.Option(help="For the tables: a method to compare with, linear_probe by default; repeat it for several."),
    ] = None,
    taxonomy: Annotated[Path | None, typer.Option(help="For taxonomy: CSV file of the tree.")] = None,
    nodes: Annotated[
        bool, typer.Option("--nodes", help="For taxonomy: also train a prompt set for each node with children.")
    ] = False,
    images: Annotated[int, typer.Option(min=1, help="Test images in the figures.")] = 3,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure maps on so many test images; by default 36 drawn birds, or all.")
    ] = None,
    birds_per_class: Annotated[
        tuple[int, int, int],
        typer.Option(min=1, help="Of drawn-birds: to train on, to choose the epoch on, to test on."),
    ] = (20, 10, 10),
) -> None:
    """Repeat a table or a figure of the paper.

    Trains the models that are missing, and writes a table with the published numbers beside ours, or figures. When it
    was interrupted, the same command goes on.
    """
    from prompt_cam_hf.training.recipe import parse_overrides

    name, *keys = arguments
    with common.one_sentence_errors(TypeError):
        settings = parse_overrides(["own_photos", *keys])[1]
    # Training brings a second of imports that wrong arguments need not wait for.
    from prompt_cam_hf.training.reproduce import reproduce as run

    with common.one_sentence_errors(TypeError, FloatingPointError):
        try:
            done = run(
                name,
                data,
                out or Path("reproduction"),
                recipe=recipe,
                backbones=backbone or (),
                rivals=rival or ("linear_probe",),
                taxonomy=taxonomy,
                nodes=nodes,
                images=images,
                limit=limit,
                birds_per_class=birds_per_class,
                **settings,
            )
        except KeyboardInterrupt as error:
            common.say("Interrupted. The same command goes on where it stopped.", style="yellow")
            raise typer.Exit(130) from error
    print()
    common.show(done)
    for path in (done.folder / "table.md", *done.figures):
        common.show(path)
