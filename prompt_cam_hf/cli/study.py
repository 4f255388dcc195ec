# SPDX-License-Identifier: MIT
"""`prompt-cam study`: which traits do people recognise in the maps?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prompt_cam_hf.cli import common
from prompt_cam_hf.cli.evaluate import DRAWN_BIRDS

if TYPE_CHECKING:
    import datasets

study = typer.Typer(
    help="Ask people which traits they recognise in the maps of several models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@study.command()
def make(
    models: Annotated[list[str], typer.Argument(help="Folders or Hub ids of models of the same classes.")],
    data: Annotated[
        str, typer.Option(help="Labelled images, as for `prompt-cam evaluate`; drawn-birds for the embedded ones.")
    ],
    out: common.OutOption,
    traits: Annotated[
        Path | None,
        typer.Option(help="CSV file with the columns class and trait, a trait a line; drawn birds need none."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Drawn at random; each gives a picture a model.")] = 20,
    heads: Annotated[
        int, typer.Option(min=0, help="Maps of a Prompt-CAM: its most important heads, or 0 for one map of all heads.")
    ] = 4,
    split: common.SplitOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws images, order and codes.")] = 0,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Make the form: pictures in a random order, and nobody sees whose maps they are.

    Writes study.html, one file that works offline and saves the answers as CSV, and key.csv, which is not for raters.
    """
    from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
    from prompt_cam_hf.study import make_study
    from prompt_cam_hf.study.make import KEY, read_traits

    with common.one_sentence_errors():
        shown: str | datasets.Dataset = data
        named = None if traits is None else read_traits(traits)
        if data == DRAWN_BIRDS and not Path(data).exists():
            shown, split = birds_dataset(split or "test", -(-images // len(BIRD_CLASSES))), None
            named = named or {bird.name: [f"{value} {part}" for part, value in bird.traits] for bird in BIRD_CLASSES}
        if named is None:
            raise ValueError("The traits of the classes are needed: give them as --traits TRAITS.csv.")
        form = make_study(
            models, shown, named, out, images=images, heads=heads, split=split, seed=seed, overwrite=overwrite,
            device=device,
        )  # fmt: skip
        common.show(f"For the raters: {form}\nNot for the raters: {form.with_name(KEY)}")


@study.command()
def score(
    folder: Annotated[Path, typer.Argument(help="The folder that `prompt-cam study make` made.")],
    answers: Annotated[list[Path], typer.Argument(help="CSV files that the raters saved.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
) -> None:
    """Show what share of the traits was recognised in each model's maps, and how far the raters agree."""
    from prompt_cam_hf.study import score_study

    with common.one_sentence_errors():
        common.show(score_study(folder, answers, seed))
