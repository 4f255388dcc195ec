# SPDX-License-Identifier: MIT
"""Fonts for names in any script: which of the installed ones have the characters that a figure's text needs."""

import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.font_manager import FontProperties, fontManager

logger = logging.getLogger(__name__)

# Stands for a character that no font has.
_BOX = "□"
# Comes with matplotlib, and has a box with a number for every character.
_LAST_RESORT = "Last Resort"
_MAX_CHARACTERS_NAMED = 5
_warned = False
# Words of scripts that are written from right to left: Hebrew, Arabic and their neighbours.
_FROM_RIGHT = "\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefc"
_WORDS_FROM_RIGHT = re.compile(rf"[{_FROM_RIGHT}](?:[{_FROM_RIGHT}\s]*[{_FROM_RIGHT}])?")
_LEFT_TO_RIGHT_MARK = "\u200e"


def find_fonts(text: str) -> tuple[tuple[str, ...], dict[int, str]]:
    """Find fonts that have all characters of a text.

    Returns:
        Families for matplotlib's `font.family`, those that the user has set first; and a table for `str.translate`
        that replaces by a box what no font has. The first time that it is not empty, a warning says so.
    """
    usual = tuple(mpl.rcParams["font.family"])
    lacking = _lacking(FontProperties(family=usual), frozenset(text))
    more, missing = _more_families(lacking) if lacking else ((), frozenset())
    if missing:
        _warn_once(" ".join(sorted(missing)[:_MAX_CHARACTERS_NAMED]))
    return (*usual, *more), {ord(character): _BOX for character in missing}


def keep_order(line: str) -> str:
    """Keep names that are written from right to left from turning the line around, with invisible marks."""
    return _WORDS_FROM_RIGHT.sub(rf"{_LEFT_TO_RIGHT_MARK}\g<0>{_LEFT_TO_RIGHT_MARK}", line)


@cache
def _more_families(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have these characters between them, and the characters that none has."""
    _add_new_fonts()
    families = {
        entry.name
        for entry in fontManager.ttflist
        if (entry.weight, entry.style) == (400, "normal") and not entry.name.startswith(_LAST_RESORT)
    }
    # Sans serif before serif; where Chinese, Japanese and Korean fonts differ in nothing else, Chinese.
    order = sorted(families, key=lambda name: ("Sans" not in name, "Mono" in name, not name.endswith("SC"), name))
    found: list[str] = []
    while characters:
        left = {name: _lacking(FontProperties(family=name), characters) for name in order}
        best = min(order, key=lambda name: len(left[name]))
        if left[best] == characters:
            break
        found.append(best)
        characters = left[best]
    return tuple(found), characters


def _lacking(font: FontProperties, characters: Iterable[str]) -> frozenset[str]:
    """The visible characters that the font lacks."""
    face = font_manager.get_font(font_manager.findfont(font))
    return frozenset(char for char in characters if char.isprintable() and not face.get_char_index(ord(char)))


@cache
def _add_new_fonts() -> None:
    """Add fonts that were installed after matplotlib made its list, which it keeps for good."""
    known = {entry.fname for entry in fontManager.ttflist}
    for path in font_manager.findSystemFonts():
        if path not in known:
            with suppress(OSError, RuntimeError):  # no font that matplotlib can use
                fontManager.addfont(path)


def _warn_once(characters: str) -> None:
    """Warn for the first time only: a folder of images may have hundreds of such names."""
    global _warned
    if not _warned:
        logger.warning(
            "No installed font has some characters of the names, such as %s; figures show %s in their place until a "
            "font that has them is installed, for example Noto's for the script.",
            characters,
            _BOX,
        )
    _warned = True
