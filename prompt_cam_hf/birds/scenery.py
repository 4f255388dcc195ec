# SPDX-License-Identifier: MIT
"""The surroundings of a bird: a painted wash, and clutter in the colours of the traits, so that colour tells nothing.

Shapes are outlines in units of the image's side, (0, 0) top left.
"""

import math
from dataclasses import dataclass

import numpy as np

from .classes import COLOURS
from .raster import CIRCLE, smooth_open, stroke

_PALETTE = np.array(list(COLOURS.values()), dtype=float)
_FOLIAGE = np.array(
    [(86, 122, 66), (120, 140, 80), (64, 98, 74), (132, 104, 72), (98, 80, 60), (164, 160, 110)], dtype=float
)
# Skies, meadows, bark, paper.
_WASHES = np.array(
    [
        (176, 202, 216), (206, 216, 206), (164, 190, 140), (120, 156, 124), (214, 200, 164), (186, 166, 140),
        (232, 226, 208), (150, 160, 176), (206, 182, 178), (108, 128, 116), (188, 178, 206),
    ],
    dtype=float,
)  # fmt: skip
_MOTTLE = 6


@dataclass(frozen=True)
class Shape:
    """A filled outline (n, 2) of one colour (3,), 0 to 255; opacity is a multiple of 1/4."""

    outline: np.ndarray
    colour: np.ndarray
    opacity: float = 1.0


@dataclass(frozen=True)
class Scenery:
    """Everything but the bird.

    `corners` (2, 2, 3) are the colours of the wash, `mottle` (n, n) is added to it, and `perch` is slope, width and
    bend.
    """

    corners: np.ndarray
    mottle: np.ndarray
    behind: tuple[Shape, ...]
    front: tuple[Shape, ...]
    perch: tuple[float, float, float]
    bark: np.ndarray


def _direction(angle: float) -> np.ndarray:
    return np.array([math.cos(angle), math.sin(angle)])


def _disc(place: np.ndarray, radius: float) -> np.ndarray:
    return place + radius * CIRCLE


def _leaf(rng: np.random.Generator, place: np.ndarray, colour: np.ndarray) -> list[Shape]:
    length, width = rng.uniform(0.09, 0.25), rng.uniform(0.26, 0.46)
    along = _direction(rng.uniform(0, 2 * math.pi)) * length
    across = np.array([-along[1], along[0]]) * width
    side = smooth_open(
        np.stack([place, place + 0.35 * along + 0.5 * across, place + 0.7 * along + 0.36 * across, place + along])
    )
    other = smooth_open(
        np.stack([place + along, place + 0.7 * along - 0.36 * across, place + 0.35 * along - 0.5 * across, place])
    )
    rib = stroke(np.stack([place - 0.2 * along, place + 0.9 * along]), 0.012, 0.006)
    return [Shape(np.vstack([side, other]), colour), Shape(rib, colour * 0.66, 0.75)]


def _berries(rng: np.random.Generator, place: np.ndarray, colour: np.ndarray) -> list[Shape]:
    shapes = []
    for _ in range(int(rng.integers(1, 4))):
        centre, radius = place + rng.uniform(-0.06, 0.06, 2), rng.uniform(0.018, 0.04)
        shapes += [
            Shape(_disc(centre, radius), colour),
            Shape(_disc(centre - radius * 0.35, radius * 0.3), np.full(3, 244.0), 0.5),
        ]
    return shapes


def _blossom(rng: np.random.Generator, place: np.ndarray, colour: np.ndarray) -> list[Shape]:
    radius, start = rng.uniform(0.025, 0.05), rng.uniform(0, 2 * math.pi)
    petals = [_disc(place + radius * _direction(start + k * 2 * math.pi / 5), radius * 0.72) for k in range(5)]
    return [
        *(Shape(petal, colour * (0.94 + 0.06 * (k % 2))) for k, petal in enumerate(petals)),
        Shape(_disc(place, radius * 0.5), colour * 0.6),
    ]


def _twig(rng: np.random.Generator, place: np.ndarray, colour: np.ndarray) -> list[Shape]:
    along = _direction(rng.uniform(0, 2 * math.pi)) * rng.uniform(0.2, 0.6)
    bend = np.array([-along[1], along[0]]) * rng.uniform(-0.25, 0.25)
    line = smooth_open(np.stack([place, place + 0.5 * along + bend, place + along]))
    return [Shape(stroke(line, rng.uniform(0.012, 0.034), 0.01), colour)]


def _bokeh(rng: np.random.Generator, place: np.ndarray, colour: np.ndarray) -> list[Shape]:
    return [Shape(_disc(place, rng.uniform(0.05, 0.16)), 0.6 * colour + 90, 0.5)]


_KINDS = (_leaf, _leaf, _berries, _blossom, _twig, _bokeh)


def _blade(rng: np.random.Generator) -> Shape:
    foot = np.array([rng.uniform(-0.05, 1.05), 1.02])
    tip = foot + np.array([rng.uniform(-0.2, 0.2), -rng.uniform(0.14, 0.36)])
    middle = 0.5 * (foot + tip) + np.array([rng.uniform(-0.03, 0.03), 0.0])
    line = smooth_open(np.stack([foot, middle, tip]))
    return Shape(
        stroke(line, rng.uniform(0.02, 0.034), 0.006),
        _FOLIAGE[int(rng.integers(len(_FOLIAGE)))] * rng.uniform(0.8, 1.15),
    )


def scenery(rng: np.random.Generator) -> Scenery:
    """Random surroundings."""
    wash = _WASHES[rng.integers(len(_WASHES), size=2)] * rng.uniform(0.8, 1.05)
    corners = wash[rng.integers(2, size=(2, 2))] + rng.uniform(-26, 26, (2, 2, 3))
    behind: list[Shape] = []
    for _ in range(int(rng.integers(4, 15))):
        vivid = rng.random() < 0.65
        table = _PALETTE if vivid else _FOLIAGE
        colour = table[int(rng.integers(len(table)))] * rng.uniform(0.86, 1.04) + rng.uniform(-14, 14, 3)
        kind = _KINDS[int(rng.integers(len(_KINDS)))]
        behind += kind(rng, rng.uniform(-0.02, 1.02, 2), np.clip(colour, 8, 250))
    front = tuple(_blade(rng) for _ in range(int(rng.integers(1, 4)))) if rng.random() < 0.3 else ()
    return Scenery(
        corners=corners,
        mottle=rng.uniform(-1, 1, (_MOTTLE, _MOTTLE)) * rng.uniform(2, 12),
        behind=tuple(behind),
        front=front,
        perch=(rng.uniform(-0.25, 0.25), rng.uniform(0.02, 0.05), rng.uniform(-0.04, 0.04)),
        bark=_FOLIAGE[int(rng.integers(3, 6))] * rng.uniform(0.75, 1.1),
    )


def _stretched(grid: np.ndarray, size: int) -> np.ndarray:
    """A grid (rows, cols, ...) interpolated linearly to (size, size, ...), without BLAS."""
    for axis in (0, 1):
        place = (np.arange(size) + 0.5) / size * (grid.shape[axis] - 1)
        cell = np.minimum(place.astype(int), grid.shape[axis] - 2)
        share = (place - cell).reshape([-1 if k == axis else 1 for k in range(grid.ndim)])
        near, far = np.take(grid, cell, axis), np.take(grid, cell + 1, axis)
        grid = near + (far - near) * share
    return grid


def paint_wash(scene: Scenery, size: int) -> np.ndarray:
    """The empty background, (3, size, size) in 0 to 255."""
    ground = _stretched(scene.corners, size) + _stretched(scene.mottle, size)[..., None]
    return np.ascontiguousarray(ground.transpose(2, 0, 1))
