# SPDX-License-Identifier: MIT
"""Which path through a tree of life does a picture take, and which traits decide at each level?

A tree is a CSV file: its first column is the class, the next ones the levels above it, and the header names them. One
prompt set for each level, all on the same frozen backbone, reads the path from the root to the leaf (Prompt-CAM,
Chowdhury et al., CVPR 2025, figure 9).
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from prompt_cam_hf import figures
from prompt_cam_hf.explain import ClassTraits, Explanation, RankingMethod, read_state
from prompt_cam_hf.images import ImageSource, image_name, open_image
from prompt_cam_hf.loading import ClassifierLike, as_classifier
from prompt_cam_hf.maps import MapKind, check_kind, map_box
from prompt_cam_hf.modeling.hub_prompt_cam import explained_load_errors
from prompt_cam_hf.results import Result

# Beside the model, in a folder or a Hub repository.
TAXONOMY_FILE = "taxonomy.csv"


@dataclass(frozen=True)
class Taxonomy:
    """A tree whose leaves are the classes of a data set.

    Attributes:
        levels: Names of the levels, the classes' own first, as in the file.
        paths: For each class its node at every level, in the order of `levels`; the first one is the class itself.
    """

    levels: tuple[str, ...]
    paths: dict[str, tuple[str, ...]]

    @property
    def leaf_level(self) -> str:
        """The level of the classes."""
        return self.levels[0]

    def nodes(self, level: str) -> list[str]:
        """The nodes of a level, sorted."""
        return sorted({path[self.levels.index(level)] for path in self.paths.values()})

    def node_of(self, name: str, level: str) -> str:
        """The node that a class belongs to at a level."""
        return self.paths[name][self.levels.index(level)]

    def ancestor(self, level: str, node: str, at: str) -> str:
        """The node that a node of `level` belongs to at the level `at`, which is higher up."""
        return next(self.node_of(name, at) for name in self.paths if self.node_of(name, level) == node)

    def check_classes(self, names: Iterable[str]) -> None:
        """Refuse a tree whose leaves are not the classes of the data.

        Raises:
            ValueError: a class has no row, or a row has no class.
        """
        classes = set(names)
        for name in sorted(classes - set(self.paths)):
            nearest = get_close_matches(name, self.paths, n=1)
            raise ValueError(
                f"The taxonomy has no row for the class {name!r}"
                + (f"; the nearest is {nearest[0]!r}." if nearest else f" in its column {self.leaf_level!r}.")
            )
        for name in sorted(set(self.paths) - classes):
            raise ValueError(f"The data has no class {name!r}, which the taxonomy has a row for; remove the row.")

    def conflicts(self, nodes: Mapping[str, str]) -> dict[str, str]:
        """Where nodes, given by their level from the root down, are no path of the tree.

        Returns:
            For each level whose node does not belong to the one above it: what it belongs to instead, in words.
        """
        found = {}
        for above, level in zip(nodes, list(nodes)[1:], strict=False):
            parent = self.ancestor(level, nodes[level], at=above)
            if parent != nodes[above]:
                found[level] = f"belongs to the {above} {parent}"
        return found

    def to_csv(self) -> str:
        """The tree as the text of a CSV file."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.levels, *self.paths.values()])
        return text.getvalue()


def read_taxonomy(path: str | os.PathLike) -> Taxonomy:
    """Read a tree from a CSV file.

    Args:
        path: The file, in UTF-8. The first row names the levels, from the classes up: `species,genus,family,order`.
            Every other row is a class with the nodes that it belongs to.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the header is wrong, a cell is missing, a class is there twice, or a node has two parents.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no taxonomy file {os.fspath(path)!r}.")
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        try:
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no CSV file in UTF-8: {error}.") from error
    if not rows:
        raise ValueError(f"{path} is empty; its first row names the levels, such as species,genus,family.")
    levels = _check_header(rows[0][1], path)
    paths: dict[str, tuple[str, ...]] = {}
    # Where each node was first seen: its row, and its parent.
    parents: dict[tuple[str, str], tuple[int, str]] = {}
    for number, cells in rows[1:]:
        where = f"{path}, row {number}"
        if len(cells) != len(levels) or "" in cells:
            lacks = levels[cells.index("")] if "" in cells[: len(levels)] else levels[min(len(cells), len(levels) - 1)]
            raise ValueError(
                f"{where} ({cells[0]}): "
                + (f"there are {len(cells)} cells for" if len(cells) > len(levels) else f"the {lacks} is missing;")
                + f" the {len(levels)} levels {', '.join(levels)}."
            )
        if cells[0] in paths:
            raise ValueError(f"{where}: the {levels[0]} {cells[0]!r} has a row already; every class has one row.")
        for level, node, above, parent in zip(levels, cells, levels[1:], cells[1:], strict=False):
            row_before, parent_before = parents.setdefault((level, node), (number, parent))
            if parent != parent_before:
                raise ValueError(
                    f"{where}: the {level} {node!r} belongs to the {above} {parent!r} here, but to {parent_before!r} "
                    f"in row {row_before}; a node has one parent."
                )
        paths[cells[0]] = tuple(cells)
    if len(paths) < 2:
        raise ValueError(f"{path} names {len(paths)} classes; there have to be two at least.")
    return Taxonomy(levels, paths)


def _check_header(names: list[str], path: str | os.PathLike) -> tuple[str, ...]:
    if len(names) < 2:
        raise ValueError(f"{path}: the first row names {len(names)} level; there have to be two at least.")
    for name in names:
        # Each level gets a folder.
        if not name or name.startswith(".") or set(name) & set('/\\:*?"<>|'):
            raise ValueError(f"{path}: {name!r} in the first row cannot be the name of a level, or of its folder.")
        if [other.casefold() for other in names].count(name.casefold()) > 1:
            raise ValueError(f"{path}: the first row names the level {name!r} twice.")
    return tuple(names)


@dataclass(frozen=True, repr=False)
class TaxonomyPath(Result):
    """What a model says about an image at every level, and where it looked.

    Attributes:
        source: The picture's path; empty where it has none.
        taxonomy: The tree.
        explanations: For each level, from the root to the leaf, the `Explanation` of the node predicted there.
    """

    source: str
    taxonomy: Taxonomy
    explanations: dict[str, Explanation]

    @property
    def nodes(self) -> dict[str, str]:
        """The predicted node of each level, from the root to the leaf."""
        return {level: explanation.prediction.label for level, explanation in self.explanations.items()}

    @property
    def conflicts(self) -> dict[str, str]:
        """For each level whose node does not belong to the one predicted above it: what it belongs to instead."""
        return self.taxonomy.conflicts(self.nodes)

    @property
    def consistent(self) -> bool:
        """Whether the predictions are a path of the tree."""
        return not self.conflicts

    def __str__(self) -> str:
        """A line for each level."""
        lines = [f"{self.source or 'picture'}: {'a path of the tree' if self.consistent else 'no path of the tree'}"]
        for level, explanation in self.explanations.items():
            conflict = f", which {self.conflicts[level]}" if level in self.conflicts else ""
            best = explanation.prediction
            lines.append(f"  {level}: {best.label} ({best.probability:.1%}){conflict}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """All but the picture, as JSON knows it; `path` has an entry for each level, from the root to the leaf."""
        path = []
        for level, explanation in self.explanations.items():
            told = explanation.to_dict()
            path.append({"level": level, "conflict": self.conflicts.get(level), **told["classes"][0]})
            common = {key: value for key, value in told.items() if key not in ("classes", "top")}
        return {**common, "image": self.source, "consistent": self.consistent, "path": path}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each level and head, the most important head first."""
        return [
            {**row, "image": self.source, "level": level, "consistent": self.consistent}
            for level, explanation in self.explanations.items()
            for row in explanation.to_rows()
        ]

    def figure(
        self, heads: int | None = None, outline: bool = False, scale: Literal["figure", "head"] = "figure"
    ) -> Figure:
        """Draw the picture beside the most important heads' maps, one row a level; arguments as in `Explanation`."""
        first = next(iter(self.explanations.values()))
        rows = tuple(self._row(level, explanation.classes[0]) for level, explanation in self.explanations.items())
        return figures.plot_explanation(replace(first, classes=rows), heads=heads, outline=outline, scale=scale)

    def _row(self, level: str, traits: ClassTraits) -> ClassTraits:
        conflict = f" [{self.conflicts[level]}]" if level in self.conflicts else ""
        return replace(traits, label=f"{level}: {traits.label}{conflict}")


def explain_path(
    model: ClassifierLike,
    image: ImageSource,
    taxonomy: Taxonomy | str | os.PathLike | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    kind: MapKind = "attention",
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
) -> TaxonomyPath:
    """Explain what a model with a prompt set for each level says about an image, from the root to the leaf.

    The layers that the levels share run once; see `forward_sets` of the model.

        print(explain_path("birds", "bird.jpg"))
        explain_path("birds", "bird.jpg").save("path.png")

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model (in evaluation mode) with `image_processor`.
        image: A picture: a path, bytes or a PIL image, of any size and shape.
        taxonomy: The tree, or its file; None: the one that was saved with the model.
        image_processor: For a loaded model.
        kind: As in `prompt_cam_hf.explain.explain`.
        method: As there.
        blur: As there.
        interpolate_pos_encoding: As there.

    Raises:
        ValueError: the model's prompt sets are not levels of the tree, or `explain` refuses an argument.
        OSError: the picture, the model or the tree cannot be found.
    """
    classifier = as_classifier(model, image_processor)
    network = classifier.model
    if not isinstance(taxonomy, Taxonomy):
        taxonomy = read_taxonomy(taxonomy or find_taxonomy(network.name_or_path))
    check_kind(kind)
    levels = _levels_of(network.prompt_sets, taxonomy)
    for level in levels:
        with network.using_prompts(level):
            _check_nodes(taxonomy, level, network.config.id2label)
    picture, source = open_image(image), image_name(image)
    box = map_box(network, classifier.image_processor, picture)
    pixel_values = classifier.image_processor(picture, return_tensors="pt")["pixel_values"].to(network.device)
    with torch.no_grad():
        states = network.last_layer_states(pixel_values, levels, interpolate_pos_encoding)
    explanations = {}
    for level, state in states.items():
        with network.using_prompts(level):
            ((scores, traits),) = read_state(network, state, None, kind, method, blur)
        explanations[level] = Explanation(picture, source, box, kind, method, scores, traits)
    return TaxonomyPath(source, taxonomy, explanations)


def find_taxonomy(model: str) -> str:
    """The file of the tree that was saved with a model, in its folder or Hub repository.

    Raises:
        FileNotFoundError: there is none.
        OSError: the Hub cannot be reached.
    """
    file = None
    if model:
        with explained_load_errors(model):
            file = cached_file(model, TAXONOMY_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise FileNotFoundError(f"{model or 'The model'} has no {TAXONOMY_FILE}; give the tree.")
    return file


def _levels_of(prompt_sets: Iterable[str], taxonomy: Taxonomy) -> list[str]:
    """The levels that have a prompt set, from the root to the leaf."""
    levels = [level for level in reversed(taxonomy.levels) if level in prompt_sets]
    if not levels:
        raise ValueError(
            f"The model has the prompt sets {', '.join(map(repr, prompt_sets))}, and none of them is a level of the "
            f"taxonomy: {', '.join(map(repr, taxonomy.levels))}."
        )
    return levels


def _check_nodes(taxonomy: Taxonomy, level: str, id2label: Mapping[int, str]) -> None:
    for label in id2label.values():
        if label not in taxonomy.nodes(level):
            raise ValueError(f"The prompt set {level!r} has a class {label!r}, and the taxonomy has no such {level}.")


__all__ = ["TAXONOMY_FILE", "Taxonomy", "TaxonomyPath", "explain_path", "find_taxonomy", "read_taxonomy"]
