# SPDX-License-Identifier: MIT
"""Filling holes in images: every missing pixel becomes the weighted mean of its neighbours, missing ones included."""

from collections.abc import Mapping

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu


def hole_system(
    pixels: np.ndarray, holes: np.ndarray, weights: Mapping[tuple[int, int], float]
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The linear system whose solution fills the holes.

    For a hole x with the neighbours n, it says: (sum of w_n) x - (sum of w_n n over holes) = (sum of w_n n over the
    others). Neighbours beyond the image's edge are left out.

    Args:
        pixels: (height, width, channels), floating point; values in holes do not matter.
        holes: (height, width), bool, with at least one True and one False.
        weights: Of the neighbours, by their place relative to the pixel, (rows down, columns to the right). Opposite
            places have the same weight, which makes the matrix symmetric.

    Returns:
        The matrix (n, n) and the right side (n, channels), for the n holes in row-major order.
    """
    rows, cols = np.nonzero(holes)
    count = len(rows)
    numbers = np.full(holes.shape, -1)
    numbers[holes] = np.arange(count)
    total, right_side, links = np.zeros(count), np.zeros((count, pixels.shape[2])), []
    for (down, right), weight in weights.items():
        y, x = rows + down, cols + right
        inside = np.flatnonzero((y >= 0) & (y < holes.shape[0]) & (x >= 0) & (x < holes.shape[1]))
        total[inside] += weight
        y, x = y[inside], x[inside]
        known, unknown = ~holes[y, x], holes[y, x]
        right_side[inside[known]] += weight * pixels[y[known], x[known]]
        links.append((inside[unknown], numbers[y, x][unknown], np.full(unknown.sum(), -weight)))
    first, second, values = (np.concatenate(parts) for parts in zip(*links, strict=True))
    matrix = sparse.csr_matrix((values, (first, second)), shape=(count, count)) + sparse.diags(total, format="csr")
    return matrix, right_side


def solve_exactly(matrix: sparse.csr_matrix, right_side: np.ndarray) -> np.ndarray:
    """Solve a system of `hole_system` directly, for (n, channels); time and memory grow faster than n."""
    # The system is symmetric and diagonally dominant: without pivoting it is factorised several times as fast.
    factors = splu(matrix.tocsc(), permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
    return factors.solve(right_side)
