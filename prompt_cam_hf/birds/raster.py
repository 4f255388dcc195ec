# SPDX-License-Identifier: MIT
"""An anti-aliasing polygon filler and compositor in numpy, which also tells which pixels show which part.

Images must be the same on every machine and with
every version of an imaging library, so only additions, multiplications, divisions and square roots touch pixels (no
BLAS, no transcendental functions), and vertices are rounded to 1/64 pixel before anything depends on them.
"""

from dataclasses import dataclass

import numpy as np

# Sub-scanlines for each row; along a row coverage is exact.
_LINES = 4
# Once less than this share of a pixel is still open, the layer at hand takes the rest. So a part that is seen in a
# pixel at all has a share of at least 1/4 * 1/16, enough to change the 8-bit value when the part is repainted.
_OPEN = 1 / 16


@dataclass(frozen=True)
class Patch:
    """A rectangle of opacities (rows, cols) in multiples of 1/4, with its top left corner."""

    top: int
    left: int
    alpha: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        """Where the rectangle lies in the image."""
        rows, cols = self.alpha.shape
        return slice(self.top, self.top + rows), slice(self.left, self.left + cols)


@dataclass(frozen=True)
class Layer:
    """A painted patch: colour, (3, 1, 1) or (3, rows, cols) in 0 to 255, and the bit it sets in the mask image."""

    patch: Patch
    colour: np.ndarray
    part: int | None = None


def _spline_basis(samples: int) -> np.ndarray:
    t = np.arange(samples)[:, None] / samples
    return np.hstack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2]) / 2


_BASIS = _spline_basis(6)


def _spline(padded: np.ndarray) -> np.ndarray:
    """The Catmull-Rom curve through all points but the first and the last two, six vertices for each."""
    count = len(padded) - 3
    pieces = [_BASIS[None, :, k, None] * padded[k : k + count, None] for k in range(4)]
    return (pieces[0] + pieces[1] + pieces[2] + pieces[3]).reshape(-1, 2)


def smooth_closed(points: np.ndarray) -> np.ndarray:
    """A closed curve through (n, 2) points, six vertices for each."""
    return _spline(np.concatenate([points[-1:], points, points[:2]]))


def smooth_open(points: np.ndarray) -> np.ndarray:
    """A curve through (n, 2) points from the first to the last."""
    before, after = 2 * points[:1] - points[1:2], 2 * points[-1:] - points[-2:-1]
    return np.concatenate([_spline(np.concatenate([before, points, after])), points[-1:]])


_OCTAGON = [(1, 0), (0.7, 0.7), (0, 1), (-0.7, 0.7), (-1, 0), (-0.7, -0.7), (0, -1), (0.7, -0.7)]
CIRCLE = smooth_closed(np.array(_OCTAGON))


def _normals(points: np.ndarray, tangents: np.ndarray) -> np.ndarray:
    length = np.sqrt(tangents[:, 0] ** 2 + tangents[:, 1] ** 2)
    return np.stack([-tangents[:, 1], tangents[:, 0]], axis=1) / np.maximum(length, 1e-9)[:, None]


def outset(points: np.ndarray, width: float) -> np.ndarray:
    """A closed outline moved outwards by width, whichever way round it runs."""
    ahead, behind = np.concatenate([points[1:], points[:1]]), np.concatenate([points[-1:], points[:-1]])
    area = float((points[:, 0] * ahead[:, 1] - points[:, 1] * ahead[:, 0]).sum())
    normals = _normals(points, ahead - behind)
    return points - normals * (width if area > 0 else -width)


def stroke(points: np.ndarray, start: float, end: float | None = None) -> np.ndarray:
    """The outline of a line through (n, 2) points whose width goes from start to end."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    normals = _normals(points, padded[2:] - padded[:-2])
    widths = np.linspace(start, start if end is None else end, len(points)) / 2
    return np.concatenate([points + normals * widths[:, None], (points - normals * widths[:, None])[::-1]])


def fill(points: np.ndarray, size: int) -> Patch | None:
    """Fill a closed outline (n, 2), in pixels; None where nothing of it lies in the image, whose side is `size`.

    Edges are steeper than area coverage: below 5/16 of a pixel counts as nothing and above 11/16 as all of it, so
    a mask of all pixels that a part touches is hardly wider than the part.
    """
    points = np.floor(points * 64 + 0.5) / 64
    low = np.maximum(np.floor(points.min(axis=0)), 0).astype(int)
    high = np.minimum(np.ceil(points.max(axis=0)), size).astype(int)
    (left, top), (cols, rows) = low.tolist(), (high - low).tolist()
    if rows <= 0 or cols <= 0:
        return None
    x0, y0 = points.T
    x1, y1 = np.concatenate([points[1:], points[:1]]).T
    slope = (x1 - x0) / np.where(y1 == y0, 1, y1 - y0)
    lines = top + (np.arange(rows * _LINES) + 0.5) / _LINES
    line, edge = np.nonzero((y0 <= lines[:, None]) != (y1 <= lines[:, None]))
    x = np.minimum(np.maximum(x0[edge] + (lines[line] - y0[edge]) * slope[edge] - left, 0), cols)
    cell = np.floor(x)
    sign = np.where(y1 > y0, 1.0, -1.0)[edge]
    share = (x - cell) * sign
    index = (line // _LINES) * (cols + 2) + cell.astype(int)
    length = rows * (cols + 2)
    change = np.bincount(index, sign - share, length) + np.bincount(index + 1, share, length)
    coverage = np.abs(np.cumsum(change.reshape(rows, -1), axis=1)[:, :cols]) / _LINES
    return Patch(top, left, np.floor(np.minimum(np.maximum(8 * coverage - 2, 0), 4) + 0.5) / 4)


def clip_to(patch: Patch | None, *others: Patch | None) -> Patch | None:
    """The patch where any of the others is, at most as opaque as they are."""
    if patch is None:
        return None
    limit = np.zeros_like(patch.alpha)
    for other in others:
        limit = np.maximum(limit, _shifted(other, patch))
    return Patch(patch.top, patch.left, np.minimum(patch.alpha, limit))


def cut_out(patch: Patch | None, other: Patch | None) -> Patch | None:
    """The patch where the other is not."""
    if patch is None:
        return None
    return Patch(patch.top, patch.left, np.maximum(patch.alpha - _shifted(other, patch), 0))


def join(first: Patch | None, second: Patch | None) -> Patch | None:
    """Both patches as one."""
    if first is None or second is None:
        return first or second
    top, left = min(first.top, second.top), min(first.left, second.left)
    bottom = max(first.top + first.alpha.shape[0], second.top + second.alpha.shape[0])
    right = max(first.left + first.alpha.shape[1], second.left + second.alpha.shape[1])
    frame = Patch(top, left, np.zeros((bottom - top, right - left)))
    return Patch(top, left, np.maximum(_shifted(first, frame), _shifted(second, frame)))


def _shifted(patch: Patch | None, frame: Patch) -> np.ndarray:
    """The opacities of a patch in the rectangle of another, 0 outside of it."""
    out = np.zeros_like(frame.alpha)
    if patch is None:
        return out
    rows, cols = frame.alpha.shape
    top, left = max(patch.top, frame.top), max(patch.left, frame.left)
    bottom = min(patch.top + patch.alpha.shape[0], frame.top + rows)
    right = min(patch.left + patch.alpha.shape[1], frame.left + cols)
    if bottom > top and right > left:
        out[top - frame.top : bottom - frame.top, left - frame.left : right - frame.left] = patch.alpha[
            top - patch.top : bottom - patch.top, left - patch.left : right - patch.left
        ]
    return out


def composite(layers: list[Layer], ground: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lay layers, the hindmost first, on a ground (3, rows, cols) of values from 0 to 255.

    Returns:
        The image (3, rows, cols), and for every pixel (rows, cols; uint16) the bits of the parts seen in it.
    """
    image = np.zeros_like(ground)
    parts = np.zeros(ground.shape[1:], dtype=np.uint16)
    still_open = np.ones(ground.shape[1:])
    for layer in reversed(layers):
        window = layer.patch.window
        left = still_open[window]
        share = layer.patch.alpha * left
        left = left - share
        nearly_closed = (left < _OPEN) & (share > 0)
        share = np.where(nearly_closed, share + left, share)
        image[:, window[0], window[1]] += share * layer.colour
        still_open[window] = np.where(nearly_closed, 0, left)
        if layer.part is not None:
            parts[window] |= (share > 0).astype(np.uint16) << layer.part
    return image + still_open * ground, parts
