# SPDX-License-Identifier: MIT
"""A tree of life over the classes of a data set, read from a CSV file.

The first column of the file is the class, the next ones the levels above it, and the header names them.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path


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
        """List the nodes of a level, sorted."""
        return sorted({path[self.levels.index(level)] for path in self.paths.values()})

    def node_of(self, name: str, level: str) -> str:
        """Find the node that a class belongs to at a level."""
        return self.paths[name][self.levels.index(level)]

    def ancestor(self, level: str, node: str, at: str) -> str:
        """Find the node at the level `at` that a node of a level below it belongs to."""
        return next(self.node_of(name, at) for name in self.paths if self.node_of(name, level) == node)

    def check_classes(self, names: Iterable[str]) -> None:
        """Refuse, with a ValueError, a tree whose leaves are not the classes of the data."""
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
        """Find where nodes, one for each level from the root down, do not form a path of the tree.

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
        """Write the tree as the text of a CSV file that `read_taxonomy` reads."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.levels, *self.paths.values()])
        return text.getvalue()


def read_taxonomy(path: str | os.PathLike) -> Taxonomy:
    """Read a tree from a CSV file in UTF-8.

    The first row names the levels, from the classes up: `species,genus,family,order`. Every other row is a class with
    the nodes that it belongs to.

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
            raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
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
