# SPDX-License-Identifier: MIT
"""The experiment on a tree of classes: one prompt set for each level, or one for each node that has children."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from prompt_cam_hf.birds.backbone import TAXONOMY
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.taxonomy_path import explain_path
from prompt_cam_hf.training.reproduce.tables import Finding, stack
from prompt_cam_hf.training.reproduce.workshop import MODELS_FOLDER, Workshop
from prompt_cam_hf.training.train_taxonomy import train_taxonomy


def taxonomy(shop: Workshop, tree_file: Path | None, nodes: bool) -> Finding:
    """Read the path of each test image from the root to its class (Fig. 9), in one way or in two.

    Args:
        shop: The data and the recipe.
        tree_file: The tree, as for `train_taxonomy`; None: that of the drawn birds.
        nodes: Whether to train a prompt set for each node with children too, and to walk down the tree with them.

    Raises:
        ValueError: there is no tree for the data.
    """
    if tree_file is None and not shop.birds:
        raise ValueError("A tree is needed for these data: give it as --taxonomy TREE.csv.")
    tree = read_taxonomy(tree_file or TAXONOMY)
    tree.check_classes(shop.images.id2label.values())
    folder = shop.out / MODELS_FOLDER / "taxonomy"
    result = train_taxonomy(
        replace(shop.recipe, output_dir=str(folder), resume_from_checkpoint=True), tree, shop.images
    )
    assert result.paths is not None  # there is a test split
    leaf = result.results[tree.leaf_level]["test"]["top1"]
    rows = [
        _row(
            "a prompt set for each level",
            len(result.results),
            leaf,
            result.paths["all_levels_right"],
            result.paths["consistent"],
        )
    ]
    notes = [
        f"{len(shop.test)} test images; {' > '.join(reversed(tree.levels))}. The paper shows paths of single images; "
        "no accuracy of them is published.",
    ]
    if nodes:
        walk = _NodeWalk(shop, tree)
        right = walk.read() == shop.labels
        rows.append(_row("a prompt set for each node", walk.num_sets, right.mean(), right.mean(), 1.0))
        notes.append(
            "With a set for each node, the first one chooses among the children of the root, the next among those of "
            "the chosen node, and so on: what comes out is always a path, and a mistake cannot be made good below it."
        )
    figures = {}
    for number, row in enumerate(shop.examples(np.arange(len(shop.test))), 1):
        path = explain_path(result.model, shop.image(row), tree, image_processor=result.image_processor)
        figures[f"taxonomy_{number}.png"] = stack([("", path.sheet(3, False, "map"))])
    columns = ("prompts", "sets", "class right", "whole path right", "a path of the tree")
    return Finding("The path from the root of the tree to the class", columns, rows, notes, figures)


def _row(name: str, num_sets: int, *shares: float) -> Sequence[str]:
    return (name, str(num_sets), *(f"{share:.1%}" for share in shares))


@dataclass
class _NodeWalk:
    """Reading test images from the root down, with a model for each node that has children to choose among."""

    shop: Workshop
    tree: Taxonomy
    num_sets: int = 0

    def read(self) -> np.ndarray:
        """The class that each test image comes out at, (images,)."""
        numbers = {name: number for number, name in self.shop.images.id2label.items()}
        found = np.full(len(self.shop.test), -1)
        self._descend(list(self.tree.paths), len(self.tree.levels) - 1, np.arange(len(found)), found, numbers)
        return found

    def _descend(
        self, leaves: list[str], depth: int, rows: np.ndarray, found: np.ndarray, numbers: dict[str, int]
    ) -> None:
        """Sort images `rows`, all of which have come to the node with these leaves, among its children at a level."""
        level = self.tree.levels[depth]
        children: dict[str, list[str]] = {}
        for name in leaves:
            children.setdefault(self.tree.node_of(name, level), []).append(name)
        names = sorted(children)
        chosen = np.zeros(len(rows), dtype=int)
        if len(names) > 1:
            # Trained though no image comes here, so that the number of sets does not depend on what was read.
            chosen = self._choose(children, names, rows)
        for number, name in enumerate(names):
            own = rows[chosen == number]
            if depth == 0:
                found[own] = numbers[name]
            else:
                self._descend(children[name], depth - 1, own, found, numbers)

    def _choose(self, children: dict[str, list[str]], names: list[str], rows: np.ndarray) -> np.ndarray:
        shop = self.shop
        images = _of_children(shop.images, children, names)
        model = shop.train(f"node_{self.num_sets}", images=images, include_backbone=False)
        self.num_sets += 1
        return shop.read(model, rows).argmax(axis=1) if len(rows) else np.zeros(0, dtype=int)


def _of_children(data: ImageData, children: dict[str, list[str]], names: list[str]) -> ImageData:
    """The images of a node's leaves, with its children for classes."""
    child_of = {leaf: number for number, name in enumerate(names) for leaf in children[name]}
    feature = datasets.ClassLabel(names=names)

    def change(split: datasets.Dataset | None) -> datasets.Dataset | None:
        if split is None:
            return None
        leaves = [data.id2label[label] for label in split["label"]]
        own = split.select([row for row, leaf in enumerate(leaves) if leaf in child_of])
        labels = [child_of[leaf] for leaf in leaves if leaf in child_of]
        return own.remove_columns("label").add_column("label", labels, feature=feature)

    splits: dict[str, Any] = {name: change(getattr(data, name)) for name in ("train", "validation", "test")}
    return ImageData(**splits, id2label=dict(enumerate(names)))
