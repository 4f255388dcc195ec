# SPDX-License-Identifier: MIT
"""Figures of the demonstration: maps, scales, outlines and colour bars, on readings made by hand."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from test_figures import all_text, axes_with_images, bar_texts, check_layout

from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset, draw_bird
from prompt_cam_hf.birds.dataset import row_spec
from prompt_cam_hf.birds.evaluation import BirdReading
from prompt_cam_hf.birds.figures import plot_counterfactuals, plot_failures, plot_trait_hits
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.figures import overlay

CLASSES, HEADS = len(BIRD_CLASSES), 4


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    return birds_dataset("test", per_class=1, size=32, num_proc=1, cache_dir=tmp_path_factory.mktemp("birds"))


def make_reading(birds, right):
    """A bird of each class, all read rightly or each as the class after its own; no map has a peak on a trait."""
    random = np.random.default_rng(0)
    labels = np.array(birds["label"])
    logits = random.random((CLASSES, CLASSES))
    logits[np.arange(CLASSES), labels if right else (labels + 1) % CLASSES] = 2
    maps = random.random((CLASSES, CLASSES, HEADS, 8, 8), dtype=np.float32) * random.random((HEADS, 1, 1))
    order = np.stack([random.permutation(HEADS) for _ in range(CLASSES)])
    return BirdReading(
        labels, logits, order, maps / 9, np.zeros((CLASSES, 8, 8), bool), np.ones((CLASSES, 8, 8), bool)
    )


def assert_nearly_drawn(axis, image, trait_map, vmax):
    """To a step of 256 in every colour, for the scale may be rounded."""
    drawn = np.asarray(axis.images[0].get_array(), dtype=int)
    assert np.abs(drawn - overlay(image, trait_map, float(vmax))).max() <= 1


def check_map(axis, bird, label, trait_map, vmax):
    """The map lies on the bird as it is drawn again, and the traits are outlined."""
    image, masks = draw_bird(row_spec(bird), axis.images[0].get_array().shape[0])
    traits = np.logical_or.reduce([masks[part] for part in BIRD_CLASSES[label].parts])
    assert_nearly_drawn(axis, image, trait_map, vmax)
    assert f"peak {trait_map.max():.{0 if trait_map.max() >= 0.1 else 1}%}" in axis.get_title()
    ((outline,),) = [collection.get_paths() for collection in axis.collections]
    left, top = outline.vertices.min(axis=0)
    rows, columns = np.nonzero(traits)
    assert (left, top) == pytest.approx((columns.min(), rows.min()), abs=1)


def test_a_heads_maps_of_a_row_are_on_one_scale(birds):
    reading = make_reading(birds, right=True)
    figure = plot_trait_hits(birds, reading)
    check_layout(figure)
    axes = axes_with_images(figure)
    assert len(axes) == 5 * 5 and bar_texts(figure) == ["0", "half", "highest peak"]
    assert "each head on a scale of its own, up to its highest peak in the row; outlined" in all_text(figure)
    for row, label in enumerate(range(0, CLASSES, 4)):
        bird, first = birds[label], reading.head_order[label, 0]
        parts = set(BIRD_CLASSES[label].parts)
        others = [other for other in range(CLASSES) if not parts & set(BIRD_CLASSES[other].parts)]
        other = max(others, key=lambda rival: reading.logits[label, rival])
        own, asked = reading.trait_maps[label, label, first], reading.trait_maps[label, other, first]
        for axis, drawn in ((axes[5 * row + 1], own), (axes[5 * row + 4], asked)):
            check_map(axis, bird, label, drawn, max(own.max(), asked.max()))
        second = reading.trait_maps[label, label, reading.head_order[label, 1]]
        check_map(axes[5 * row + 2], bird, label, second, second.max())
        assert BIRD_CLASSES[other].name in axes[5 * row + 4].get_title().replace("\n", " ")


def test_failures_say_who_asked(birds):
    reading = make_reading(birds, right=False)
    figure = plot_failures(birds, reading, count=2)
    check_layout(figure)
    axes = axes_with_images(figure)
    assert len(axes) == 2 * 5
    for row in range(2):
        head = reading.head_order[row, 0]
        predicted, true = (reading.trait_maps[row, asked, head] for asked in (row + 1, row))
        for axis, drawn in ((axes[5 * row + 1], predicted), (axes[5 * row + 3], true)):
            check_map(axis, birds[row], row, drawn, max(predicted.max(), true.max()))
        assert f"{BIRD_CLASSES[row].name}, misread as {BIRD_CLASSES[row + 1].name}" in all_text(figure)
        assert "asked by true class" in axes[5 * row + 3].get_title()


def test_counterfactuals_have_a_scale_for_each_map(birds):
    model, processor = (
        tiny_model(id2label=dict(enumerate(bird.name for bird in BIRD_CLASSES))),
        build_image_processor(32),
    )
    reading = make_reading(birds, right=True)
    figure = plot_counterfactuals(model, processor, birds, reading)
    check_layout(figure)
    axes = axes_with_images(figure)
    assert len(axes) == 5 * 4 and bar_texts(figure) == ["0", "half", "peak"]
    image = draw_bird(row_spec(birds[0]), 32)[0]
    with torch.no_grad():
        maps = model(**processor(image, return_tensors="pt"), trait_classes=torch.tensor([0])).trait_maps
    trait_map = maps[0, 0, reading.head_order[0, 0]].numpy()
    assert_nearly_drawn(axes[1], draw_bird(row_spec(birds[0]), 240)[0], trait_map, trait_map.max())
