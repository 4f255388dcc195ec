# SPDX-License-Identifier: MIT
"""Localisation: how well maps agree with masks of the right place, and what chance would reach.

Every function takes `maps` (..., rows, cols), one number a patch, higher is stronger, and `mask` (..., height, width),
boolean: either patches, on the grid of the maps, or pixels, which `patch_mask` brings onto that grid. Leading axes are
broadcast against each other. Arrays and tensors (on the CPU) do. The answers are float64 arrays of the leading axes,
NaN where no patch is on the mask; average with `numpy.nanmean`.
"""

import numpy as np
from numpy.typing import ArrayLike

# A patch is on a mask from this share of its pixels: a trait that covers a corner of a patch changes what it shows.
PATCH_SHARE = 0.05


def patch_mask(mask: ArrayLike, grid: tuple[int, int], share: float = PATCH_SHARE) -> np.ndarray:
    """Which patches show what a mask marks.

    Args:
        mask: (..., height, width), boolean; pixels of the image, of any size and shape.
        grid: (rows, cols) of patches that the image was squashed to. Pixels on a border count in part on each side.
        share: A patch is on the mask if at least this part of its area is.

    Returns:
        (..., rows, cols), boolean.

    Raises:
        ValueError: the mask is not boolean or has no two axes, or `share` is not above 0 and at most 1.
    """
    pixels = _boolean(mask)
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be above 0 and at most 1.")
    rows, cols = (_overlap(cells, size) for cells, size in zip(grid, pixels.shape[-2:], strict=True))
    # The tolerance keeps a share that is met exactly from being lost to rounding.
    return rows @ pixels.astype(np.float64) @ cols.T >= share - 1e-9


def pointing_game(maps: ArrayLike, mask: ArrayLike, share: float = PATCH_SHARE) -> np.ndarray:
    """Whether the strongest patch is on the mask, 1 or 0; of equally strong patches the first one counts, row by row.

    The pointing game of Zhang et al. (Top-down neural attention by excitation backprop, ECCV 2016), without its
    tolerance of 15 pixels: the mask is not widened.
    """
    values, on_mask = _patches(maps, mask, share)
    return _known(_take(on_mask, values.argmax(axis=-1)[..., None])[..., 0], on_mask)


def relevance_mass_accuracy(maps: ArrayLike, mask: ArrayLike, share: float = PATCH_SHARE) -> np.ndarray:
    """The part of a map's sum that is on the mask, 0 to 1; NaN also for a map without anything positive.

    Arras et al. (CLEVR-XAI, Information Fusion 81, 2022), equation 1. Negative values count as zero.
    """
    values, on_mask = _patches(maps, mask, share)
    positive = np.maximum(values, 0)
    return _known(_ratio((positive * on_mask).sum(axis=-1), positive.sum(axis=-1)), on_mask)


def mass_at_matched_sharpness(maps: ArrayLike, mask: ArrayLike, share: float = PATCH_SHARE) -> np.ndarray:
    """`relevance_mass_accuracy` of the map raised to the power that makes it as sharp as the mask, 0 to 1.

    Squaring a map raises its mass on the right place and changes no rank, so the masses of maps of different sharpness
    do not compare. Here, all maps get the same sharpness first: with the part p_i of the map's positive sum in patch
    i, a map has exp(-sum of p_i log p_i) effective patches (the perplexity of p; n for a map that is even on n
    patches), and the power is the one with which it has as many as there are patches on the mask. The answer is the
    same for a map and any power of it, and 1 for the mask itself. It is ours.

    A map that is positive on fewer patches than are on the mask is taken as even on these. NaN for one without
    anything positive.
    """
    values, on_mask = _patches(maps, mask, share)
    positive = np.maximum(values, 0).astype(np.float64)
    strongest = positive.max(axis=-1, keepdims=True)
    logs = np.log(
        positive / np.where(strongest > 0, strongest, 1), where=positive > 0, out=np.full(values.shape, -np.inf)
    )
    parts = _sharpen(logs, on_mask.sum(axis=-1, keepdims=True))
    return _known(_ratio((parts * on_mask).sum(axis=-1), parts.sum(axis=-1)), on_mask)


def relevance_rank_accuracy(maps: ArrayLike, mask: ArrayLike, share: float = PATCH_SHARE) -> np.ndarray:
    """Where K patches are on the mask: the part of the K strongest patches that is on it, 0 to 1.

    Arras et al. (CLEVR-XAI, Information Fusion 81, 2022), equation 2.
    """
    values, on_mask = _patches(maps, mask, share)
    count = on_mask.sum(axis=-1)
    hits = _take(on_mask, _strongest_first(values)).cumsum(axis=-1)
    return _known(_take(hits, np.maximum(count - 1, 0)[..., None])[..., 0] / np.maximum(count, 1), on_mask)


def top_k_intersection(maps: ArrayLike, mask: ArrayLike, k: int, share: float = PATCH_SHARE) -> np.ndarray:
    """The part of the k strongest patches that is on the mask, 0 to 1.

    Theiner et al. (Interpretable semantic photo geolocation, WACV 2022). With fewer than k patches on the mask it
    stays below 1.

    Raises:
        ValueError: a map has fewer than k patches, or k is below 1.
    """
    values, on_mask = _patches(maps, mask, share)
    if not 1 <= k <= values.shape[-1]:
        raise ValueError(f"k is {k}, but a map has {values.shape[-1]} patches; choose 1 to {values.shape[-1]}.")
    return _known(_take(on_mask, _strongest_first(values)[..., :k]).mean(axis=-1), on_mask)


def region_iou(maps: ArrayLike, mask: ArrayLike, threshold: float = 0.2, share: float = PATCH_SHARE) -> np.ndarray:
    """Intersection over union of the mask and the map's strongest region, 0 to 1.

    The region is all patches with at least `threshold` times the map's maximum, as in Zhou et al. (Learning deep
    features for discriminative localization, CVPR 2016), who then compare boxes; here it is compared as it is. A map
    without anything positive has no region, and scores 0.

    Raises:
        ValueError: `threshold` is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be above 0 and at most 1.")
    values, on_mask = _patches(maps, mask, share)
    strongest = values.max(axis=-1, keepdims=True)
    region = (values >= threshold * strongest) & (strongest > 0)
    return _known((region & on_mask).sum(axis=-1) / np.maximum((region | on_mask).sum(axis=-1), 1), on_mask)


def chance_level(mask: ArrayLike, within: ArrayLike | None = None) -> np.ndarray:
    """The score that uninformative maps reach by chance: the part of all patches that is on the mask, 0 to 1.

    It is what `pointing_game`, `top_k_intersection` and `relevance_rank_accuracy` expect of patches in random order,
    and `relevance_mass_accuracy` of an even map. For `region_iou`, measure an even map.

    Args:
        mask: (..., rows, cols), boolean, of patches; `patch_mask` makes one of pixels.
        within: (..., rows, cols), boolean. Chance then chooses among these patches only, such as those of the animal:
            a harder comparison. `relevance_rank_accuracy` needs as many of them as there are on the mask.

    Returns:
        Of the leading axes, NaN where the mask or `within` has no patch.

    Raises:
        ValueError: an argument is not boolean, or their grids differ.
    """
    on_mask = _boolean(mask)
    inside = np.ones(on_mask.shape[-2:], dtype=bool) if within is None else _boolean(within)
    if inside.shape[-2:] != on_mask.shape[-2:]:
        raise ValueError(f"within has the grid {inside.shape[-2:]}, but mask the grid {on_mask.shape[-2:]}.")
    on_mask, inside = (array.reshape(*array.shape[:-2], -1) for array in np.broadcast_arrays(on_mask, inside))
    return _known(_ratio((on_mask & inside).sum(axis=-1), inside.sum(axis=-1)), on_mask)


def _boolean(mask: ArrayLike) -> np.ndarray:
    array = np.asarray(mask)
    if array.dtype != bool or array.ndim < 2:
        raise ValueError(
            f"A mask is boolean, of (..., height, width), but this one is {array.dtype} of shape {array.shape}; "
            "compare it with a number, such as mask > 0."
        )
    return array


def _overlap(cells: int, pixels: int) -> np.ndarray:
    """(cells, pixels): which part of each cell is covered by each pixel, where both divide the same length evenly."""
    edges = np.arange(cells + 1) * pixels / cells
    left, right = np.arange(pixels), np.arange(pixels) + 1
    shared = np.minimum(edges[1:, None], right) - np.maximum(edges[:-1, None], left)
    return np.maximum(shared, 0) * cells / pixels


def _patches(maps: ArrayLike, mask: ArrayLike, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Values and mask of the patches, both (..., patches), of the same shape."""
    values, on_mask = np.asarray(maps), _boolean(mask)
    if values.ndim < 2:
        raise ValueError(f"maps have the shape {values.shape}; they must be (..., rows, cols).")
    if not np.isfinite(values).all():
        raise ValueError("maps hold numbers that are not finite; nothing is strongest among them.")
    if on_mask.shape[-2:] != values.shape[-2:]:
        on_mask = patch_mask(on_mask, values.shape[-2:], share)
    values, on_mask = np.broadcast_arrays(values, on_mask)
    return values.reshape(*values.shape[:-2], -1), on_mask.reshape(*on_mask.shape[:-2], -1)


def _strongest_first(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, axis=-1, kind="stable")


def _sharpen(logs: np.ndarray, effective: np.ndarray) -> np.ndarray:
    """Powers of maps that have so many `effective` patches; `logs` (..., patches) are 0 at the strongest one."""
    # The logarithm of the power is halved in; the number of effective patches falls with it.
    low, high = np.full(effective.shape, -20.0), np.full(effective.shape, 20.0)
    for _ in range(60):
        middle = (low + high) / 2
        powers = np.exp(np.exp(middle) * logs)
        parts = powers / np.maximum(powers.sum(axis=-1, keepdims=True), 1)
        surprise = -np.log(parts, where=parts > 0, out=np.zeros_like(parts))
        too_even = np.exp((parts * surprise).sum(axis=-1, keepdims=True)) > effective
        low, high = np.where(too_even, middle, low), np.where(too_even, high, middle)
    return np.exp(np.exp(middle) * logs)


def _take(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.take_along_axis(array, indices, axis=-1)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, NaN where the whole is 0."""
    return np.divide(part, whole, where=whole > 0, out=np.full(np.shape(whole), np.nan))


def _known(scores: np.ndarray, on_mask: np.ndarray) -> np.ndarray:
    """The scores, NaN where no patch is on the mask."""
    return np.where(on_mask.any(axis=-1), scores, np.nan)
