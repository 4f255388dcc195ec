# SPDX-License-Identifier: MIT
"""`prompt-cam prepare`: make an image folder of a public data set as it is downloaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from prompt_cam_hf.cli.common import say

if TYPE_CHECKING:
    from prompt_cam_hf.data.prepare import Plan


def prepare(
    dataset: Annotated[
        str,
        typer.Argument(
            help="One of cub, birds525, dogs, pet, cars, moths, fungi, fish_vista, rare_species, insects2, flowers, "
            "medicinal_leaf, food101."
        ),
    ],
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of the download, extracted or not.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="New folder, or that of an interrupted run.")],
    taxa: Annotated[
        list[str] | None,
        typer.Option(help="iNaturalist: keep these only, as RANK=NAME[,NAME ...]; may be given several times."),
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="iNaturalist: leave these out, as RANK=NAME.")] = None,
    test_fraction: Annotated[
        float | None, typer.Option(help="Medicinal Leaf: part of each class to test on; 0.2 by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Medicinal Leaf: draws the test part; 0 by default.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out listed images that are not there.")
    ] = False,
) -> None:
    """Make an image folder of a public data set.

    Images are hard-linked where they lie extracted on the same disk, else copied. The same command goes on after an
    interruption. docs/datasets.md has the sources, the licences, and what is unknown.
    """
    from prompt_cam_hf.data.prepare import prepare as prepare_dataset

    plan = prepare_dataset(
        dataset,
        source,
        destination,
        taxa=_parse_ranks(taxa),
        without=_parse_ranks(without),
        test_fraction=test_fraction,
        seed=seed,
        skip_missing=skip_missing,
        announce=lambda summary: say(f"{summary}\nFrom {source} into {destination}."),
    )
    _print_counts(plan)


def _parse_ranks(chosen: list[str] | None) -> dict[str, list[str]] | None:
    """Read `RANK=NAME,NAME` options; None where there are none."""
    ranks: dict[str, list[str]] = {}
    for text in chosen or []:
        rank, _, names = text.partition("=")
        if not rank or not names:
            raise ValueError(f"{text!r} is not of the form RANK=NAME[,NAME ...], as in order=Lepidoptera.")
        ranks.setdefault(rank, []).extend(name.strip() for name in names.split(","))
    return ranks or None


def _print_counts(plan: "Plan") -> None:
    table = Table("split", "classes", "images", "fewest in a class", "most in a class")
    for split, folders in plan.count().items():
        numbers = list(folders.values())
        table.add_row(split, *(f"{n:,}" for n in (len(numbers), sum(numbers), min(numbers), max(numbers))))
    Console().print(table)
