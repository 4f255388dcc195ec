# SPDX-License-Identifier: MIT
"""Figures: the maps lie where they belong, on one scale."""

import numpy as np
import pytest
from PIL import Image

from prompt_cam_hf.figures import overlay, plot_trait_maps

GREY = Image.new("RGB", (80, 40), (120, 120, 120))


def test_overlay_is_brightest_where_the_map_is():
    trait_map = np.zeros((4, 8))
    trait_map[1, 6] = 0.5
    picture = overlay(GREY, trait_map, vmax=0.5).astype(int)
    assert picture.shape == (40, 80, 3)
    row, column = np.unravel_index(picture.sum(-1).argmax(), (40, 80))
    assert row // 10 == 1 and column // 10 == 6


def test_one_scale_for_all_heads():
    maps = np.stack([np.full((2, 2), 0.2), np.full((2, 2), 0.05)])
    figure = plot_trait_maps(GREY, maps, heads=[1, 0], title="Blue Jay")
    pictures = [axis.images[0].get_array() for axis in figure.axes]
    assert np.array_equal(pictures[0], np.asarray(GREY))
    assert np.array_equal(pictures[1], overlay(GREY, maps[1], vmax=0.2))
    assert np.array_equal(pictures[2], overlay(GREY, maps[0], vmax=0.2))
    assert [axis.get_title() for axis in figure.axes] == [
        "picture",
        "head 1: 20% on patches",
        "head 0: 80% on patches",
    ]
    assert figure.get_suptitle() == "Blue Jay"


def test_an_empty_map_is_drawn_and_wrong_input_refused():
    assert np.isfinite(overlay(GREY, np.zeros((2, 2)), vmax=0)).all()
    with pytest.raises(ValueError, match=r"must be \(heads, rows, cols\)"):
        plot_trait_maps(GREY, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="heads 0 to 1 only"):
        plot_trait_maps(GREY, np.zeros((2, 2, 2)), heads=[2])
