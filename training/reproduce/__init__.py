# SPDX-License-Identifier: MIT
"""The paper's tables and figures, each by one call: models that are missing are trained, and what is found is written.

`workshop` has the data and the models, `tables`, `maps` and `trees` the experiments, `published` the paper's numbers.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prompt_cam_hf.explanations.results import format_table
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.training.report import as_png
from prompt_cam_hf.training.reproduce import maps, tables, trees
from prompt_cam_hf.training.reproduce.tables import Finding
from prompt_cam_hf.training.reproduce.workshop import DRAWN_BIRDS, open_workshop

EXPERIMENTS = (
    "table1", "table2", "variants", "heads", "own-and-other", "disagreements", "manipulation", "backbones", "taxonomy",
)  # fmt: skip
TABLE_FILE, JSON_FILE = "table.md", "result.json"


@dataclass(frozen=True)
class Reproduction:
    """A finished experiment.

    Attributes:
        name: One of `EXPERIMENTS`.
        folder: Holds table.md, result.json and the figures.
        finding: What was found.
        figures: The files of the figures.
    """

    name: str
    folder: Path
    finding: Finding
    figures: list[Path]

    def __str__(self) -> str:
        """The table with its notes."""
        lines = [self.finding.title, format_table(self.finding.columns, self.finding.rows), *self.finding.notes]
        return "\n".join(lines)


def reproduce(
    name: str,
    data: str | os.PathLike = DRAWN_BIRDS,
    out: str | os.PathLike = "reproduction",
    *,
    recipe: str | None = None,
    backbones: Sequence[str] = (),
    rivals: Sequence[str] = ("linear_probe",),
    taxonomy: str | os.PathLike | None = None,
    nodes: bool = False,
    images: int = 3,
    limit: int | None = None,
    birds_per_class: tuple[int, int, int] = (20, 10, 10),
    **settings: Any,
) -> Reproduction:
    """Repeat a table or a figure of the paper on any data, and set the published numbers beside what is found.

    Models that an earlier call left in `out` are used again, and a call that was interrupted can be repeated and goes
    on where it stopped. docs/reproduction.md says what each experiment does and where it differs from the paper.

    Args:
        name: One of `EXPERIMENTS`.
        data: "drawn-birds", or what `train` reads: such as a folder that `prompt-cam prepare` made.
        out: The folder for models and results of all experiments on these data; it is made.
        recipe: The name or file of a recipe. None: for drawn birds "birds", the
            reduced variant that trains in seconds; for a public data set, which is
            told by its numbers of classes and test images, the one with DINO.
        backbones: For "backbones": folders or Hub ids. None given: those with a recipe for the data.
        rivals: For the tables: methods of recipes to compare with.
        taxonomy: For "taxonomy": the tree, a CSV file; None is for drawn birds only.
        nodes: For "taxonomy": also train a prompt set for each node with children.
        images: Test images in the figures.
        limit: Test images on which maps are measured; None: 36 drawn birds, or all images of other data.
        birds_per_class: Of drawn birds: to train on, to choose the best epoch on, and to test on.
        **settings: Keys of the recipe that win over it, for all models.

    Raises:
        ValueError: there is no such experiment, no recipe is known for the data, or a setting is wrong.
        FileExistsError: `out` holds something else.
        OSError: the data, a backbone or a recipe cannot be found.
        FloatingPointError: training diverged.

    Example:
        >>> from prompt_cam_hf import reproduce
        >>> print(reproduce("table2", out="reproduction", birds_per_class=(6, 2, 2)))  # fewer birds, less time
        >>> reproduce("heads", out="reproduction", birds_per_class=(6, 2, 2)).figures  # on the model that is there
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"There is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}.")
    shop = open_workshop(
        os.fspath(data),
        Path(out),
        recipe=recipe,
        birds_per_class=birds_per_class,
        num_images=images,
        limit=limit,
        settings=settings,
    )
    for rival in rivals:
        replace(shop.recipe, method=rival)  # refuses a wrong one before anything is trained
    folder = Path(out) / name
    folder.mkdir(exist_ok=True)
    tree = None if taxonomy is None else Path(taxonomy)
    found = {
        "table1": lambda: tables.table1(shop, folder, rivals),
        "table2": lambda: tables.table2(shop, rivals),
        "variants": lambda: tables.variants(shop, folder),
        "backbones": lambda: tables.backbones(shop, backbones),
        "heads": lambda: maps.heads(shop),
        "own-and-other": lambda: maps.own_and_other(shop),
        "disagreements": lambda: maps.disagreements(shop),
        "manipulation": lambda: maps.manipulation(shop),
        "taxonomy": lambda: trees.taxonomy(shop, tree, nodes),
    }[name]()
    return _write(name, folder, found._replace(notes=(shop.about, *found.notes)))


def _write(name: str, folder: Path, found: Finding) -> Reproduction:
    figures = []
    for file, figure in found.figures.items():
        figures.append(folder / file)
        write_atomically(figures[-1], as_png(figure))
    lines = [f"# {found.title}", "", *_markdown(found), "", *(f"- {note}" for note in found.notes), ""]
    lines += [f"![{file}]({file})" for file in found.figures]
    write_atomically(folder / TABLE_FILE, ("\n".join(lines).rstrip() + "\n").encode())
    rows = [dict(zip(found.columns, row, strict=True)) for row in found.rows]
    content = {"experiment": name, "title": found.title, "rows": rows, "notes": list(found.notes)}
    write_atomically(folder / JSON_FILE, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
    return Reproduction(name, folder, found, figures)


def _markdown(found: Finding) -> list[str]:
    cells = [list(found.columns), ["---"] * len(found.columns), *map(list, found.rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]


__all__ = ["EXPERIMENTS", "Reproduction", "reproduce"]
