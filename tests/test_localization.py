# SPDX-License-Identifier: MIT
"""Do the localisation metrics count what they say, against cases worked out by hand and against plain loops?"""

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import entropy

from prompt_cam_hf.metrics.localization import (
    chance_level,
    mass_at_matched_sharpness,
    patch_mask,
    pointing_game,
    region_iou,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
    top_k_intersection,
)

# 3 x 4 patches; the mask is the two on the right of the first two rows.
MASK = np.array([[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=bool)
MAP = np.array([[0.0, 0.1, 0.2, 0.0], [0.3, 0.0, 0.05, 0.25], [0.0, 0.1, 0.0, 0.0]])
METRICS = [
    pointing_game,
    relevance_mass_accuracy,
    mass_at_matched_sharpness,
    relevance_rank_accuracy,
    lambda maps, mask: top_k_intersection(maps, mask, 2),
    region_iou,
]


def test_by_hand():
    assert pointing_game(MAP, MASK) == 0  # the strongest patch, 0.3, lies to the left
    assert pointing_game(MAP * (MAP < 0.3), MASK) == 1
    assert relevance_mass_accuracy(MAP, MASK) == pytest.approx(0.5)  # 0.2 + 0.05 + 0.25 of 1.0
    assert relevance_rank_accuracy(MAP, MASK) == pytest.approx(2 / 4)  # of 0.3, 0.25, 0.2, 0.1
    assert top_k_intersection(MAP, MASK, 1) == 0
    assert top_k_intersection(MAP, MASK, 3) == pytest.approx(2 / 3)
    # At least half of 0.3: 0.3, 0.25 and 0.2; two of them are on the mask of four.
    assert region_iou(MAP, MASK, threshold=0.5) == pytest.approx(2 / 5)
    assert region_iou(MAP, MASK, threshold=0.3) == pytest.approx(2 / 7)  # 0.1 twice as well


def test_against_plain_loops():
    rng = np.random.default_rng(0)
    maps, masks = rng.random((40, 5, 7)), rng.random((40, 5, 7)) < 0.2
    masks[:, 0, 0] = True
    for values, mask, *found in zip(
        maps,
        masks,
        pointing_game(maps, masks),
        relevance_mass_accuracy(maps, masks),
        relevance_rank_accuracy(maps, masks),
        top_k_intersection(maps, masks, 4),
        region_iou(maps, masks, 0.7),
        chance_level(masks),
        strict=True,
    ):
        patches = [(row, col) for row in range(5) for col in range(7)]
        on_mask = [patch for patch in patches if mask[patch]]
        ranked = sorted(patches, key=lambda patch: -values[patch])
        region = [patch for patch in patches if values[patch] >= 0.7 * values[ranked[0]]]
        assert found == pytest.approx(
            [
                float(ranked[0] in on_mask),
                sum(values[patch] for patch in on_mask) / values.sum(),
                len(set(ranked[: len(on_mask)]) & set(on_mask)) / len(on_mask),
                len(set(ranked[:4]) & set(on_mask)) / 4,
                len(set(region) & set(on_mask)) / len(set(region) | set(on_mask)),
                len(on_mask) / 35,
            ]
        )


def test_matched_sharpness_does_not_see_powers_of_a_map():
    """Against a search for the power by SciPy; the same for squares and roots, and 1 for the mask itself."""
    rng = np.random.default_rng(0)
    maps, masks = rng.random((30, 5, 7)) ** rng.uniform(0.5, 8, (30, 1, 1)), rng.random((30, 5, 7)) < 0.2
    masks[:, 0, 0] = True
    found = mass_at_matched_sharpness(maps, masks)
    for one_map, mask, mass in zip(maps, masks, found, strict=True):

        def shares(power, one_map=one_map):
            return one_map**power / (one_map**power).sum()

        power = brentq(lambda power: np.exp(entropy(shares(power).ravel())) - mask.sum(), 1e-3, 1e3)  # noqa: B023
        assert mass == pytest.approx(shares(power)[mask].sum(), abs=1e-6)
    for power in (0.5, 2, 5):
        np.testing.assert_allclose(mass_at_matched_sharpness(maps**power, masks), found, atol=1e-6)
    np.testing.assert_allclose(mass_at_matched_sharpness(masks.astype(float), masks), 1)
    # Two patches, of which one is on the mask of four: even on both.
    assert mass_at_matched_sharpness(
        np.where(np.arange(12).reshape(3, 4) < 3, [0, 0.9, 0.2, 0], 0), MASK
    ) == pytest.approx(0.5)


def test_chance_is_what_random_maps_and_an_even_map_reach():
    rng = np.random.default_rng(0)
    mask, within = MASK, np.array([[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]], dtype=bool)
    for inside in (np.ones_like(mask), within):
        level = chance_level(mask, within=inside)
        maps = rng.random((20_000, 3, 4)) * inside
        assert pointing_game(maps, mask).mean() == pytest.approx(level, abs=0.02)
        assert relevance_rank_accuracy(maps, mask).mean() == pytest.approx(level, abs=0.02)
        assert top_k_intersection(maps, mask, 3).mean() == pytest.approx(level, abs=0.02)
        for mass in (relevance_mass_accuracy, mass_at_matched_sharpness):
            assert mass(inside.astype(float), mask) == pytest.approx(level)
    assert chance_level(mask) == pytest.approx(4 / 12)
    assert chance_level(mask, within) == pytest.approx(4 / 8)
    left = np.array([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]], dtype=bool)
    assert chance_level(mask, left) == pytest.approx(2 / 9)  # half of the mask lies outside


@pytest.mark.parametrize("metric", METRICS)
def test_leading_axes_tensors_and_pixel_masks(metric):
    rng = np.random.default_rng(1)
    maps = rng.random((2, 5, 3, 4))
    one_by_one = [[metric(maps[i, j], MASK) for j in range(5)] for i in range(2)]
    np.testing.assert_array_equal(metric(maps, MASK), one_by_one)
    np.testing.assert_array_equal(metric(torch.from_numpy(maps), torch.from_numpy(MASK)), one_by_one)
    masks = rng.random((2, 3, 4)) < 0.5
    by_image = [[metric(maps[i, j], masks[i]) for j in range(5)] for i in range(2)]
    np.testing.assert_array_equal(metric(maps, masks[:, None]), by_image)
    pixels = np.kron(MASK, np.ones((8, 8), dtype=bool))
    np.testing.assert_array_equal(metric(maps, pixels), one_by_one)


@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_find_is_not_a_miss(metric):
    empty = np.zeros_like(MASK)
    assert np.isnan(metric(MAP, empty))
    np.testing.assert_array_equal(np.isnan(metric(MAP, np.stack([MASK, empty]))), [False, True])
    assert np.isnan(chance_level(empty))
    assert np.isnan(chance_level(MASK, within=empty))


def test_maps_without_anything_positive():
    assert np.isnan(relevance_mass_accuracy(np.zeros((3, 4)), MASK))
    assert np.isnan(mass_at_matched_sharpness(np.zeros((3, 4)), MASK))
    assert region_iou(np.zeros((3, 4)), MASK) == 0
    signed = np.where(MASK, 0.5, -1.0)
    assert relevance_mass_accuracy(signed, MASK) == 1


def test_equally_strong_patches_count_in_reading_order():
    assert pointing_game(np.ones((3, 4)), MASK) == 0
    assert top_k_intersection(np.ones((3, 4)), MASK, 3) == pytest.approx(1 / 3)
    first_half = np.arange(400).reshape(20, 20) < 200
    assert top_k_intersection(np.ones((20, 20)), first_half, 200) == 1
    assert relevance_rank_accuracy(np.ones((20, 20)), ~first_half) == 0


def test_a_patch_is_on_the_mask_from_five_per_cent_of_its_pixels():
    pixels = np.zeros((16, 16), dtype=bool)
    pixels[0, :4] = True  # 4 of 64 pixels: 6 %
    pixels[0, 8:11] = True  # 3 of 64: under 5 %
    np.testing.assert_array_equal(patch_mask(pixels, (2, 2)), [[True, False], [False, False]])
    np.testing.assert_array_equal(patch_mask(pixels, (2, 2), share=3 / 64), [[True, True], [False, False]])
    tenths = np.zeros((10, 10), dtype=bool)
    tenths[0, :5] = True  # 5 of 100 pixels: exactly 5 %
    assert patch_mask(tenths, (1, 1)) == [[True]]
    tenths[0] = True  # exactly 10 %, which sums of 0.1 * 0.1 fall short of
    assert patch_mask(tenths, (1, 1), share=0.1) == [[True]]


def test_pixels_on_a_border_count_in_part_on_each_side():
    # 5 x 3 pixels on 2 x 2 patches: the third row and the second column belong to both sides.
    pixels = np.zeros((5, 3), dtype=bool)
    pixels[2, 1] = True  # 0.5 x 0.5 of the 2.5 x 1.5 pixels of every patch: 6.7 %
    assert patch_mask(pixels, (2, 2), share=0.066).all()
    assert not patch_mask(pixels, (2, 2), share=0.067).any()
    # A mask that is coarser than the grid.
    np.testing.assert_array_equal(patch_mask(np.array([[True, False]]), (2, 4)), [[1, 1, 0, 0]] * 2)
    batch = np.stack([pixels, ~pixels])
    np.testing.assert_array_equal(patch_mask(batch, (2, 2), 0.5), [patch_mask(one, (2, 2), 0.5) for one in batch])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pointing_game(MAP, MASK.astype(int)), "A mask is boolean"),
        (lambda: pointing_game(MAP, MASK[0]), "A mask is boolean"),
        (lambda: pointing_game(MAP[0], MASK), r"must be \(\.\.\., rows, cols\)"),
        (lambda: pointing_game(np.where(MASK, np.nan, 1.0), MASK), "not finite"),
        (lambda: patch_mask(MASK, (2, 2), 0), "share is 0"),
        (lambda: top_k_intersection(MAP, MASK, 13), "choose 1 to 12"),
        (lambda: top_k_intersection(MAP, MASK, 0), "choose 1 to 12"),
        (lambda: region_iou(MAP, MASK, threshold=0), "threshold is 0"),
        (lambda: chance_level(MASK, within=MASK[:2]), r"within has the grid \(2, 4\)"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
