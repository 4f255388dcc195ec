# SPDX-License-Identifier: MIT
"""The shape of a bird: random poses, and the outline of every part.

Lengths are in units of the body's length, x runs forward and y down, the bird faces right. Body parts live in the
body's frame, which is tilted; the head is held level, whatever the body does, as birds do.
"""

import math
from dataclasses import dataclass

import numpy as np

from .raster import CIRCLE, smooth_closed, smooth_open, stroke


@dataclass(frozen=True)
class Pose:
    """A bird's build and posture: lengths in body lengths, angles in radians, head up positive."""

    tilt: float
    plump: float
    head: float
    neck: float
    pitch: float
    beak_length: float
    beak_depth: float
    beak_curve: float
    tail_length: float
    tail_width: float
    tail_fork: float
    tail_lift: float
    crest: float
    leg_length: float
    wing_length: float
    wing_drop: float
    bar_place: float
    turn: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> "Pose":
        """A random pose."""

        def degrees(low: float, high: float) -> float:
            return math.radians(rng.uniform(low, high))

        return cls(
            tilt=degrees(6, 40),
            plump=rng.uniform(0.46, 0.62),
            head=rng.uniform(0.205, 0.245),
            neck=rng.uniform(0.0, 0.08),
            pitch=degrees(-10, 16),
            beak_length=rng.uniform(0.2, 0.36),
            beak_depth=rng.uniform(0.11, 0.16),
            beak_curve=rng.uniform(-0.01, 0.06),
            tail_length=rng.uniform(0.4, 0.66),
            tail_width=rng.uniform(0.2, 0.3),
            tail_fork=rng.uniform(-0.09, 0.12),
            tail_lift=degrees(-14, 22),
            crest=max(0.0, rng.uniform(-0.2, 0.2)),
            leg_length=rng.uniform(0.2, 0.32),
            wing_length=rng.uniform(0.78, 0.95),
            wing_drop=rng.uniform(-0.02, 0.08),
            bar_place=rng.uniform(0.0, 0.1),
            turn=degrees(-16, 16),
        )


def rotated(points: np.ndarray, angle: float) -> np.ndarray:
    """Points turned by an angle, forward end up where it is positive."""
    c, s = math.cos(angle), math.sin(angle)
    x, y = points[..., 0], points[..., 1]
    return np.stack([c * x + s * y, c * y - s * x], axis=-1)


def _point(x: float, y: float) -> np.ndarray:
    return np.array([x, y])


def _curve(*points: tuple[float, float]) -> np.ndarray:
    return smooth_closed(np.array(points))


def _body_frame(pose: Pose) -> dict[str, np.ndarray]:
    h = pose.plump / 2
    drop, end = pose.wing_drop, 0.32 - pose.wing_length
    upper = [(0.33, -0.28 * h), (0.24, -0.68 * h), (0.02, -0.84 * h), (-0.26, -0.66 * h + drop / 2)]
    tip = [(end + 0.06, -0.24 * h + drop), (end, -0.02 * h + drop), (end + 0.12, 0.14 * h + drop)]
    lower = [(-0.2, 0.4 * h + drop / 2), (0.08, 0.5 * h), (0.27, 0.2 * h)]
    wing = _curve(*upper, *tip, *lower)
    left = pose.bar_place - 0.04
    edges = [(0.0, -1.0), (-0.02, -0.4), (0.0, 0.1), (0.06, 0.6)]
    bar = np.array([(left + x, y * h) for x, y in edges] + [(left + 0.145 + x, y * h) for x, y in reversed(edges)])
    feathers = [
        [(-0.02 - k * 0.04, y * h), (end / 2 - 0.06, (y + 0.02) * h + drop * 0.6), (end + gap, y_end * h + drop)]
        for k, (y, y_end, gap) in enumerate([(-0.42, -0.3, 0.14), (-0.12, -0.12, 0.08), (0.2, 0.06, 0.14)])
    ]
    # The tail has its own direction about the rump.
    width, length = pose.tail_width / 2, pose.tail_length
    half = [(0.12, -0.1), (-0.1, -0.085), (-length, -width), (-length - 0.03, -width * 0.55)]
    fan = np.array([*half, (-length + pose.tail_fork, 0), *((x, -y) for x, y in reversed(half))])
    vanes = [np.array([(-0.06, 0.03 * k), (-length, width * 0.52 * k)]) for k in (-1, 0, 1)]
    rump = np.array([-0.44, -0.06])
    return {
        "wing": wing,
        "wing-bar": bar,
        "wing light": wing + _point(-0.02, 0.04),
        "breast": _curve(
            (0.2, -0.75 * h), (0.6, -0.6 * h), (0.7, 0.2 * h), (0.42, 1.1 * h), (0.08, 1.15 * h), (0.12, 0.3 * h)
        ),
        "belly": _curve(
            (0.3, 0.45 * h), (0.36, 1.2 * h), (-0.1, 1.3 * h), (-0.6, 0.7 * h), (-0.34, 0.4 * h), (-0.02, 0.62 * h)
        ),
        "tail": rotated(fan, -pose.tail_lift) + rump,
        **{f"feather {k}": smooth_open(np.array(line)) for k, line in enumerate(feathers)},
        **{f"vane {k}": rotated(line, -pose.tail_lift) + rump for k, line in enumerate(vanes)},
    }


def _head_frame(pose: Pose) -> dict[str, np.ndarray]:
    """Parts about the head's centre, facing right, level."""
    r = pose.head
    tip = np.array([r * 0.86 + pose.beak_length, 0.1 * r + pose.beak_curve])
    depth = pose.beak_depth / 2
    upper = np.array([(0.8 * r, -0.02 * r - depth), (0.86 * r + pose.beak_length * 0.5, -depth * 0.72), tip])
    lower = np.array([tip, (0.86 * r + pose.beak_length * 0.42, depth * 1.0), (0.78 * r, 0.16 * r + depth)])
    head = [(1.0, 0.06), (0.8, -0.62), (0.12, -1), (-0.66, -0.76), (-1, 0), (-0.72, 0.72), (0.06, 0.98), (0.8, 0.62)]
    cap = r * np.array(
        [(1.05, -0.42), (0.4, -0.5), (-0.35, -0.46), (-1.15, 0.12), (-1.4, -0.6), (-0.4, -1.5), (1.0, -1.2)]
    )
    crest = np.array(
        [
            (0.35 * r, -0.9 * r),
            (-0.5 * r, -0.98 * r - 0.7 * pose.crest),
            (-1.0 * r - pose.crest, -0.9 * r - pose.crest),
            (-0.95 * r, -0.2 * r),
        ]
    )
    return {
        "head": r * _curve(*head),
        "crown": cap,
        "crest": crest,
        "throat": r
        * _curve((0.98, 0.22), (0.3, 0.42), (-0.1, 0.85), (-0.02, 1.6), (0.5, 1.9), (1.0, 1.4), (1.2, 0.7)),
        "beak": np.vstack([smooth_open(upper), smooth_open(lower)]),
        "gape": np.array([(0.82 * r, 0.08 * r), tip]),
        "eye-ring": np.array([0.36, -0.14]) * r + 0.44 * r * CIRCLE,
        "eye": np.array([0.36, -0.14]) * r + 0.23 * r * CIRCLE,
        "glint": np.array([0.42, -0.22]) * r + 0.07 * r * CIRCLE,
    }


def _legs(hip: np.ndarray, length: float) -> dict[str, np.ndarray]:
    """Two legs straight down from the hip, each with toes along the perch."""
    shapes = {}
    for k, (side, lag) in enumerate(((-0.06, 0.0), (0.07, 0.01))):
        foot = hip + _point(side, length - lag)
        knee = hip + _point(side - 0.02, 0.0)
        shapes[f"leg {k}"] = stroke(np.stack([knee, foot]), 0.05, 0.036)
        shapes[f"toes {k}"] = stroke(foot + np.array([(-0.05, 0.012), (0.0, -0.004), (0.1, 0.014)]), 0.034, 0.026)
    return shapes


def outlines(pose: Pose) -> dict[str, np.ndarray]:
    """Build every shape of the bird, upright and facing right.

    By name (n, 2) outlines, open for the lines of feathers; the extra entry "foot" is the point (2,) between the feet,
    where the perch is.
    """
    h = pose.plump / 2
    body = {name: rotated(shape, pose.tilt) for name, shape in _body_frame(pose).items()}
    centre = rotated(np.array([0.4 + 0.7 * pose.neck, -0.94 * h - 0.55 * pose.head - pose.neck]), pose.tilt)
    head = {name: rotated(shape, pose.pitch) + centre for name, shape in _head_frame(pose).items()}
    spine = rotated(np.array([(-0.56, -0.06), (-0.46, -0.15), (-0.2, -0.82 * h), (0.1, -1.0 * h)]), pose.tilt)
    front = rotated(
        np.array([(0.53, -0.12 * h), (0.42, 0.62 * h), (0.1, 1.0 * h), (-0.24, 0.8 * h), (-0.5, 0.1)]), pose.tilt
    )
    r = pose.head
    neck = centre + r * np.array([(-0.93, 0.2), (-0.2, -0.5), (0.6, 0.1), (0.62, 0.86)])
    body["body"] = smooth_closed(np.vstack([spine, neck, front]))
    body["body light"] = body["body"] + _point(-0.02, -0.055)
    hip = rotated(np.array([-0.02, 0.78 * h]), pose.tilt)
    return {**body, **head, **_legs(hip, pose.leg_length), "foot": hip + _point(0.0, pose.leg_length)}
