# SPDX-License-Identifier: MIT
"""The recipes that come with the package, by name; this imports nothing that takes time."""

import difflib
import os
import re
from pathlib import Path

RECIPES = Path(__file__).with_name("recipes")


def list_recipes() -> dict[str, str]:
    """Name every recipe that comes with the package, with the sentence that it begins with."""
    return {path.stem: _first_sentence(path.read_text(encoding="utf-8")) for path in sorted(RECIPES.glob("*.yaml"))}


def _first_sentence(text: str) -> str:
    comment = " ".join(line.removeprefix("#").strip() for line in re.findall("^#.*", text, re.MULTILINE))
    return re.split(r"(?<=\.)\s", comment, maxsplit=1)[0]


def find_recipe(recipe: str | os.PathLike) -> Path:
    """Find a recipe: a file, or the name of one that comes with the package.

    Raises:
        FileNotFoundError: it is neither.
    """
    path, named = Path(recipe).expanduser(), RECIPES / f"{os.fspath(recipe)}.yaml"
    if path.is_file():
        return path
    if named.parent == RECIPES and named.is_file():
        return named
    nearest = difflib.get_close_matches(path.stem, [name.stem for name in RECIPES.glob("*.yaml")], n=1, cutoff=0)[0]
    raise FileNotFoundError(
        f"There is no recipe file {os.fspath(recipe)!r}, nor a recipe of that name; the nearest name is {nearest!r}, "
        "and `prompt-cam train --list-recipes` lists all."
    )
