# SPDX-License-Identifier: MIT
"""Public data sets as their authors hand them out, made into image folders that training reads.

`docs/datasets.md` has the layout that each data set comes in, its source, its licence, and what is unknown.
"""

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from .archives import Source
from .facts import FACTS, DatasetFacts
from .image_folder import write_image_folder
from .layouts import LAYOUTS
from .plan import Plan, make_plan


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
    announce: Callable[[str], None] | None = None,
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
        announce: Is told what will be done, before anything is written.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, archive or data set; or as in `make_plan`.
        FileExistsError, OSError: as in `write_image_folder`.
    """
    if dataset not in FACTS:
        raise ValueError(f"There is no data set {dataset!r}; there are {', '.join(FACTS)}.")
    if hub_id := FACTS[dataset].hub_id:
        raise ValueError(
            f"{FACTS[dataset].title} needs no preparing: training reads it from the Hub as {hub_id}, with the recipe "
            f"dino_{dataset}.yaml."
        )
    options = {"taxa": taxa, "without": without, "test_fraction": test_fraction, "seed": seed}
    with Source(source, LAYOUTS[dataset].list_names) as opened:
        plan = make_plan(dataset, opened, options=options, skip_missing=skip_missing, facts=facts)
        if announce:
            announce(plan.summary())
        write_image_folder(plan, opened, Path(destination).expanduser())
    return plan


__all__ = ["FACTS", "DatasetFacts", "Plan", "prepare"]
