# SPDX-License-Identifier: MIT
"""Parts of birds, the values that a part can take, the classes made of them, and specs of single birds.

A *value* is a short text: a colour ("red"), or a pattern on a ground colour ("spotted white"); None is the part's
natural tint. A class is a set of one or two values at named parts. On the parts that do not define it a bird carries
random values that no class uses at that part, so being coloured does not tell a part of the class from any other part.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

# The order is fixed: it numbers the bits of the mask images.
PARTS = ("tail", "legs", "body", "head", "breast", "throat", "crown", "wing", "wing-bar", "beak", "eye-ring", "eye")
TRAIT_PARTS = ("crown", "throat", "beak", "eye-ring", "breast", "wing", "wing-bar", "tail")
# Bars and spots need room: at 96 pixels these three parts are two to five pixels wide.
PLAIN_PARTS = ("beak", "eye-ring", "wing-bar")

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (204, 34, 38),
        "orange": (242, 134, 22),
        "yellow": (248, 214, 36),
        "green": (62, 158, 58),
        "turquoise": (38, 190, 190),
        "blue": (38, 76, 200),
        "violet": (128, 56, 168),
        "pink": (242, 132, 184),
        "white": (246, 246, 240),
        "black": (30, 28, 32),
    }
)
PATTERNS = ("plain", "spotted", "barred")


@dataclass(frozen=True)
class BirdClass:
    """A class of birds.

    Attributes:
        traits: (part, value) pairs; a bird belongs to the class when it carries all of them.
    """

    traits: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        """The traits in words, such as "red crown, yellow wing-bar"."""
        return ", ".join(f"{value} {part}" for part, value in self.traits)

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that define the class."""
        return tuple(part for part, _ in self.traits)


# Twelve classes in a ring: each shares one value with the class before it and one with the class after it, so neither
# of its parts is enough. Six more have a value of their own.
BIRD_CLASSES = tuple(
    BirdClass(traits)
    for traits in (
        (("crown", "red"), ("wing-bar", "yellow")),
        (("breast", "spotted white"), ("wing-bar", "yellow")),
        (("breast", "spotted white"), ("tail", "barred white")),
        (("throat", "red"), ("tail", "barred white")),
        (("throat", "red"), ("wing", "black")),
        (("beak", "orange"), ("wing", "black")),
        (("beak", "orange"), ("breast", "yellow")),
        (("throat", "white"), ("breast", "yellow")),
        (("crown", "yellow"), ("throat", "white")),
        (("crown", "yellow"), ("tail", "blue")),
        (("wing-bar", "white"), ("tail", "blue")),
        (("crown", "red"), ("wing-bar", "white")),
        (("crown", "turquoise"),),
        (("throat", "blue"),),
        (("breast", "red"),),
        (("wing", "barred white"),),
        (("eye-ring", "yellow"),),
        (("tail", "green"),),
    )
)


@dataclass(frozen=True)
class BirdSpec:
    """All that is needed to draw one bird.

    Attributes:
        seed: Fixes pose, size, place, lighting, background and the natural tints.
        values: From every trait part to its value, or to None for its natural tint.
        label: The index in `BIRD_CLASSES`, or None for a bird of no class.

    Raises:
        ValueError: values lacks a part, or names a part or value that does not exist.
    """

    seed: int
    values: Mapping[str, str | None]
    label: int | None = None

    def __post_init__(self) -> None:
        """Check the values, so that every spec can be drawn."""
        missing = [part for part in TRAIT_PARTS if part not in self.values]
        if missing:
            raise ValueError(f"The bird's values lack {', '.join(missing)}; give every part a value, or None.")
        for part, value in self.values.items():
            _check_value(part, value)


def split_value(value: str) -> tuple[str, str]:
    """Split a value such as "red" or "spotted white" into its pattern ("plain", "spotted") and its colour."""
    pattern, _, colour = value.rpartition(" ")
    pattern = pattern or "plain"
    if colour not in COLOURS or pattern not in PATTERNS or value == f"plain {colour}":
        raise ValueError(
            f"{value!r} is not a value of a bird's part: write a colour ({', '.join(COLOURS)}), "
            "or 'spotted' or 'barred' and a colour."
        )
    return pattern, colour


def part_values(part: str) -> tuple[str, ...]:
    """List all values that a trait part can take, plain colours first, the natural tint left out."""
    _check_trait_part(part)
    patterns = ("",) if part in PLAIN_PARTS else ("", "spotted ", "barred ")
    return tuple(pattern + colour for pattern in patterns for colour in COLOURS)


def class_values(part: str) -> tuple[str, ...]:
    """List the values with which some class is defined at a trait part, each once."""
    _check_trait_part(part)
    return tuple(dict.fromkeys(value for bird in BIRD_CLASSES for p, value in bird.traits if p == part))


def filler_values(part: str) -> tuple[str, ...]:
    """List the values for a trait part that does not define the class: no class has their colour or pattern there."""
    used = [split_value(value) for value in class_values(part)]
    colours = {colour for _, colour in used}
    patterns = {pattern for pattern, _ in used} - {"plain"}
    free = ((value, *split_value(value)) for value in part_values(part))
    return tuple(value for value, pattern, colour in free if colour not in colours and pattern not in patterns)


def matching_classes(values: Mapping[str, str | None]) -> tuple[int, ...]:
    """Find the classes, as indices in `BIRD_CLASSES`, whose traits a bird with these values carries."""
    return tuple(
        index for index, bird in enumerate(BIRD_CLASSES) if all(values[part] == value for part, value in bird.traits)
    )


def sample_spec(rng: np.random.Generator, label: int) -> BirdSpec:
    """Draw a bird of a class: its traits, and on all other parts natural tints or values that no class has there."""
    if not 0 <= label < len(BIRD_CLASSES):
        raise ValueError(f"label is {label}, but there are {len(BIRD_CLASSES)} classes: 0 to {len(BIRD_CLASSES) - 1}.")
    traits = dict(BIRD_CLASSES[label].traits)
    values: dict[str, str | None] = {}
    for part in _WING_BAR_FIRST:
        values[part] = traits.get(part) or _sample_value(
            rng, part, filler_values(part), 0.3, _hidden_colour(part, values, traits)
        )
    return BirdSpec(_sample_seed(rng), {part: values[part] for part in TRAIT_PARTS}, label)


def sample_other_spec(rng: np.random.Generator) -> BirdSpec:
    """Draw a bird for pre-training, with no label: any value at every part, but never all the traits of any class.

    So no pre-training bird could be given a class label: a value that is a class by itself never appears at that part,
    and the two values of a class never appear together.
    """
    while True:
        values: dict[str, str | None] = {}
        for part in _WING_BAR_FIRST:
            values[part] = _sample_value(rng, part, part_values(part), 0.2, _hidden_colour(part, values, {}))
        if not matching_classes(values):
            return BirdSpec(_sample_seed(rng), {part: values[part] for part in TRAIT_PARTS})


def counterfactual(spec: BirdSpec, part: str, value: str | None = None) -> BirdSpec:
    """Give one trait part of a bird another value, or with None its natural tint.

    Drawn at the same size, the two images differ in pixels of that part's mask only. The new label is that of the
    class that the bird belongs to now, None where it carries the traits of no class, or of several.

    Raises:
        ValueError: the part carries no traits, or cannot take the value.
    """
    _check_value(part, value)
    values = {**spec.values, part: value}
    matching = matching_classes(values)
    return replace(spec, values=values, label=matching[0] if len(matching) == 1 else None)


# A wing-bar in its wing's colour would be invisible, so the bar is chosen first and the wing after it.
_WING_BAR_FIRST = ("wing-bar", *(part for part in TRAIT_PARTS if part != "wing-bar"))


def _hidden_colour(part: str, values: Mapping[str, str | None], traits: Mapping[str, str]) -> str | None:
    """The colour that would hide a wing-bar on its wing, which the part must not take; None where there is none."""
    other = {"wing": values.get("wing-bar"), "wing-bar": traits.get("wing")}.get(part)
    return split_value(other)[1] if other else None


def _sample_value(
    rng: np.random.Generator, part: str, values: tuple[str, ...], natural: float, hidden: str | None
) -> str | None:
    """A value with plain colours as likely as all patterns together; the natural tint with the given probability."""
    if rng.random() < natural:
        return None
    visible = [value for value in values if split_value(value)[1] != hidden]
    plain = [value for value in visible if value in COLOURS]
    patterned = [value for value in visible if value not in COLOURS]
    choices = patterned if patterned and rng.random() < 0.4 else plain
    return choices[int(rng.integers(len(choices)))]


def _sample_seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**62))


def _check_value(part: str, value: str | None) -> None:
    _check_trait_part(part)
    if value is None:
        return
    pattern, _ = split_value(value)
    if pattern != "plain" and part in PLAIN_PARTS:
        raise ValueError(f"The {part} cannot be {value!r}: it is too small for patterns. Choose a plain colour.")


def _check_trait_part(part: str) -> None:
    if part not in TRAIT_PARTS:
        raise ValueError(f"{part!r} is not a part with traits; those are: {', '.join(TRAIT_PARTS)}.")
