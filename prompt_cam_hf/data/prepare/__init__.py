# SPDX-License-Identifier: MIT
"""Public data sets as their authors hand them out, made into image folders that training reads.

`docs/datasets.md` has the layout that each data set comes in, its source, its licence, and what is unknown.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from .archives import Source
from .facts import FACTS, DatasetFacts
from .image_folder import write_image_folder
from .layouts import LAYOUTS
from .plan import Plan, make_plan


def open_source(dataset: str, source: str | os.PathLike) -> Source:
    """Open the downloaded folder or archive of a data set of `FACTS`, to be used in a `with` statement.

    Raises:
        FileNotFoundError: there is no such folder or archive.
        ValueError: there is no such data set, or it is read from the Hub as it is.
    """
    if dataset not in FACTS:
        raise ValueError(f"There is no data set {dataset!r}; there are {', '.join(FACTS)}.")
    if hub_id := FACTS[dataset].hub_id:
        raise ValueError(
            f"{FACTS[dataset].title} needs no preparing: training reads it from the Hub as {hub_id}, with the recipe "
            f"dino_{dataset}.yaml."
        )
    return Source(source, LAYOUTS[dataset].list_names)


def prepare(
    dataset: str,
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    taxa: Mapping[str, Collection[str]] | None = None,
    without: Mapping[str, Collection[str]] | None = None,
    test_fraction: float | None = None,
    seed: int | None = None,
    skip_missing: bool = False,
    facts: DatasetFacts | None = None,
) -> Plan:
    """Make an image folder (`train/`, `test/`, `validation/` where there is one) of a downloaded data set.

    Class folders are called `NNN.name` in the data set's own order, so that classes keep their official numbers, or by
    their name where it has no order.

    Args:
        dataset: A key of `FACTS`.
        source: The folder that the data set was downloaded to, extracted or not, or its one archive.
        destination: A new folder, or one that an interrupted run of the same call left.
        taxa: Categories to take, by rank, as in `{"order": ["Lepidoptera"]}` (iNaturalist only).
        without: Categories to leave out, by rank (iNaturalist only).
        test_fraction: Share of each class to test on, 0.2 by default (Medicinal Leaf only, which has no split).
        seed: Draws the images to test on, 0 by default (Medicinal Leaf only).
        skip_missing: Leave out listed images that are not there.
        facts: The numbers of classes and images to check; the published ones by default.

    Returns:
        What was done.

    Raises:
        FileNotFoundError, ValueError: as in `open_source` and `make_plan`.
        FileExistsError, OSError: as in `write_image_folder`.
    """
    options = {"taxa": taxa, "without": without, "test_fraction": test_fraction, "seed": seed}
    with open_source(dataset, source) as opened:
        plan = make_plan(dataset, opened, options=options, skip_missing=skip_missing, facts=facts)
        write_image_folder(plan, opened, Path(destination).expanduser())
    return plan


__all__ = ["FACTS", "DatasetFacts", "Plan", "make_plan", "open_source", "prepare", "write_image_folder"]
