# SPDX-License-Identifier: MIT
"""Regions taken out of images."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_computed, tiny_model
from PIL import Image, ImageFilter

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations import removal
from prompt_cam_hf.explanations.explain import ClassScore, explain
from prompt_cam_hf.explanations.maps import strong_region
from prompt_cam_hf.explanations.removal import (
    box_mask,
    control_region,
    head_region,
    remove_region,
    remove_trait,
)
from prompt_cam_hf.loading import Classifier


def noise(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blob(width=60, height=40):
    """A region of two parts, one of them at the edge."""
    y, x = np.mgrid[:height, :width]
    return ((x - 20) ** 2 + (y - 18) ** 2 < 80) | ((x > width - 8) & (y < 9))


@pytest.fixture(scope="module")
def classifier():
    """Its attention is sharper than that of random weights."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "query" in name:
                parameter *= 30
    return Classifier(model, build_image_processor(32))


@pytest.mark.parametrize("method", ["blur", "mean", "inpaint"])
def test_only_the_region_changes(method):
    image, mask = noise(), blob()
    before, after = np.asarray(image), np.asarray(remove_region(image, mask, method))
    assert np.array_equal(before[~mask], after[~mask])
    assert (before[mask] != after[mask]).any(axis=-1).mean() > 0.9
    assert np.array_equal(np.asarray(image), before)


def test_mean_and_blur_are_what_they_say():
    image, mask = noise(), blob()
    pixels = np.asarray(image)
    filled = np.asarray(remove_region(image, mask, "mean"))
    assert np.abs(filled[mask] - pixels[~mask].mean(axis=0)).max() <= 0.5
    blurred = image.filter(ImageFilter.GaussianBlur(float(mask.sum() ** 0.5 / 2)))
    assert np.array_equal(np.asarray(remove_region(image, mask, "blur"))[mask], np.asarray(blurred)[mask])


def relax(pixels, mask, rounds=4000):
    """Laplace's equation by Jacobi's method: each unknown pixel becomes its neighbours' mean, again and again."""
    filled = np.where(mask[..., None], 128.0, pixels)
    count = sum(np.pad(np.ones(mask.shape), 1)[r : r + mask.shape[0], c : c + mask.shape[1]] for r, c in STEPS)
    for _ in range(rounds):
        padded = np.pad(filled, ((1, 1), (1, 1), (0, 0)))
        neighbours = sum(padded[r : r + mask.shape[0], c : c + mask.shape[1]] for r, c in STEPS)
        filled[mask] = (neighbours / count[..., None])[mask]
    return filled


STEPS = ((0, 1), (2, 1), (1, 0), (1, 2))


def test_inpainting_solves_laplaces_equation():
    image, mask = noise(), blob()
    expected = relax(np.asarray(image, dtype=float), mask)
    assert np.abs(np.asarray(remove_region(image, mask)) - expected)[mask].max() <= 0.51


def test_a_ramp_goes_on_through_the_region():
    x = np.linspace(10, 240, 60)
    image = Image.fromarray(np.rint(np.broadcast_to(x[None, :, None], (40, 60, 3))).astype(np.uint8))
    mask = box_mask(image.size, (15, 0, 45, 40))
    assert np.abs(np.asarray(remove_region(image, mask)).astype(int) - np.asarray(image)).max() <= 1


def test_large_regions_start_from_a_coarse_solution(monkeypatch):
    """Too large for a hundred iterations from nothing, so the coarse solution has to be right."""
    image = noise(12, 12).resize((200, 180), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:180, :200]
    mask = (x - 90) ** 2 + (y - 80) ** 2 < 75**2
    exact = np.asarray(remove_region(image, mask)).astype(int)
    monkeypatch.setattr(removal, "_MAX_DIRECT_PIXELS", 500)
    assert np.abs(np.asarray(remove_region(image, mask)).astype(int) - exact).max() <= 3


def test_thin_and_tiny_regions(monkeypatch):
    monkeypatch.setattr(removal, "_MAX_DIRECT_PIXELS", 20)
    ramp = Image.fromarray(np.repeat(np.arange(60, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(40, axis=0))
    for box in ((30, 0, 31, 40), (7, 7, 8, 8)):
        filled = remove_region(ramp, box_mask(ramp.size, box))
        assert np.abs(np.asarray(filled).astype(int) - np.asarray(ramp)).max() <= 1


def test_masks_and_boxes_that_do_not_fit():
    image = noise()
    for mask, message in [
        (np.zeros((60, 40), bool), r"bool of shape \(60, 40\); it must be bool of .* \(40, 60\)"),
        (np.zeros((40, 60)), "float64"),
        (np.zeros((40, 60), bool), "holds no pixels"),
        (np.ones((40, 60), bool), "holds all pixels"),
    ]:
        with pytest.raises(ValueError, match=message):
            remove_region(image, mask)
    with pytest.raises(ValueError, match='use "blur", "mean" or "inpaint"'):
        remove_region(image, blob(), "erase")
    for box in [(0, 0, 61, 10), (1, 2, 3), (5, 5, 5, 10), (-1, 0, 3, 3), (0, 12, 4, 9)]:
        with pytest.raises(ValueError, match="does not lie in the image of 60x40 pixels"):
            box_mask(image.size, box)
    assert box_mask((60, 40), (3, 4, 7, 9)).sum() == 4 * 5 and box_mask((60, 40), (3, 4, 7, 9))[8, 3]


@pytest.mark.parametrize("kind", ["attention", "evidence"])
def test_the_top_heads_region(classifier, kind, tmp_path):
    image = noise(90, 50)
    image.save(tmp_path / "bird.png")
    result = remove_trait(classifier, tmp_path / "bird.png", class_name="Class_2", kind=kind, method="mean")
    before = explain(classifier, image, 2, kind=kind)
    traits = before.classes[0]
    mask = strong_region(traits.maps[traits.head_order[0]], image.size)
    assert np.array_equal(result.mask, mask) and 0 < mask.mean() < 1
    changed = remove_region(image, mask, "mean")
    assert result.after.image.tobytes() == changed.tobytes()
    after = explain(classifier, changed, 2, kind=kind)
    moved = control_region(mask)
    control = explain(classifier, remove_region(image, moved, "mean"), 2, kind=kind)
    for told, expected in ((result.before, before), (result.after, after), (result.control, control)):
        assert_computed([s.logit for s in told.scores], [s.logit for s in expected.scores])
        assert_computed(torch.from_numpy(told.classes[0].maps), torch.from_numpy(expected.classes[0].maps))

    rows = {row["class"]: row for row in result.to_rows()}
    assert set(rows) == {score.label for score in before.scores}
    for when, told in (("before", result.before), ("after", result.after), ("control", result.control)):
        for score in told.scores:
            row = rows[score.label]
            answers = (row[f"rank_{when}"], row[f"score_{when}"], row[f"probability_{when}"])
            assert answers == (score.rank, score.logit, score.probability)
            assert f"{score.logit:.2f}" in str(result)
    exported = json.loads(result.to_json())
    assert exported["share_of_image"] == mask.mean()
    for key, expected in (("mask_runs", mask), ("control_mask_runs", moved)):
        rebuilt = np.zeros(mask.size, bool)
        for start, length in exported[key]:
            rebuilt[start : start + length] = True
        assert np.array_equal(rebuilt.reshape(mask.shape), expected)
    assert exported["before"]["image"] == str(tmp_path / "bird.png")
    assert pickle.loads(pickle.dumps(result)).to_json() == result.to_json()
    result.save(tmp_path / "removal.png")
    assert "bird.png" in repr(result)


def test_boxes_and_masks_of_ones_own(classifier):
    image, mask = noise(), blob()
    assert np.array_equal(remove_trait(classifier, image, mask).mask, mask)
    boxed = remove_trait(classifier, image, (3, 4, 20, 30), method="blur")
    assert np.array_equal(boxed.mask, box_mask(image.size, (3, 4, 20, 30)))
    assert boxed.before.classes[0].label == explain(classifier, image).prediction.label
    with pytest.raises(ValueError, match="covers the whole image; give a box or a mask"):
        remove_trait(tiny_model(), image, image_processor=classifier.image_processor)
    with pytest.raises(ValueError, match='give a box, a mask, a head or "top head"'):
        remove_trait(classifier, image, "crown")
    with pytest.raises(ValueError, match="did you mean"):
        remove_trait(classifier, image, class_name="clas 1")
    with pytest.raises(ValueError, match="no head 4; the model has heads 0 to 3"):
        remove_trait(classifier, image, 4)


def test_any_heads_region(classifier):
    image = noise()
    explanation = explain(classifier, image, 3)
    for head in range(4):
        expected = strong_region(explanation.classes[0].maps[head], image.size)
        assert np.array_equal(head_region(explanation, head), expected)
        assert np.array_equal(remove_trait(classifier, image, head, 3).mask, expected)
    assert np.array_equal(head_region(explanation), head_region(explanation, explanation.classes[0].head_order[0]))


def control_by_trying(mask):
    """Every place by itself: least overlap, then uncut, then nearest the middle."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    best = None
    for down in range(height):
        for right in range(width):
            moved = np.zeros_like(mask)
            moved[(rows + down) % height, (columns + right) % width] = True
            top, left = (rows.min() + down) % height, (columns.min() + right) % width
            tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
            cut = top + tall > height or left + wide > width
            away = (2 * top + tall - height) ** 2 + (2 * left + wide - width) ** 2
            cost = ((moved & mask).sum(), cut, away)
            if best is None or cost < best[0]:
                best = (cost, moved)
    return best[1]


@pytest.mark.parametrize(
    "mask",
    [
        box_mask((20, 15), (2, 3, 6, 8)),  # fits beside itself
        box_mask((20, 15), (5, 5, 15, 10)),  # and so does one in the middle
        box_mask((20, 15), (0, 2, 20, 12)),  # does not, and is cut in no direction but one
        box_mask((20, 15), (1, 1, 19, 14)),  # most of the image
        blob(20, 15),  # two parts, far from each other
        np.random.default_rng(1).random((15, 20)) < 0.3,
    ],
)
def test_a_control_region_has_the_same_shape_elsewhere(mask):
    control = control_region(mask)
    assert control.sum() == mask.sum()
    assert np.array_equal(control, control_by_trying(mask))


def test_a_control_region_is_where_the_model_looks():
    mask = box_mask((60, 40), (8, 10, 20, 20))
    control = control_region(mask, (9.6, 0.3, 50.2, 39.7))
    assert not (mask & control)[:, 10:50].any() and not control[:, 50:].any() and control[:, 10:50].sum() == 100
    assert np.array_equal(control[:, :10], mask[:, :10])  # what the model did not see stays
    unseen = box_mask((60, 40), (0, 0, 5, 5))
    assert np.array_equal(control_region(unseen, (10, 0, 50, 40)), unseen)


def test_a_large_region_is_warned_of(classifier):
    image = noise()
    small = remove_trait(classifier, image, (0, 0, 12, 40))
    assert small.share == 0.2 and small.control_overlap == 0 and small.warnings == () and "Warning" not in str(small)
    large = remove_trait(classifier, image, (0, 0, 60, 30))
    assert large.share == 0.75 and large.control_overlap == pytest.approx(2 / 3)
    for text in (str(large), " ".join(large.to_dict()["warnings"])):
        assert "75% of the image" in text and "67% of the control region" in text


@pytest.mark.parametrize(
    ("after", "control", "words"),
    [
        (
            0.5,
            0.85,
            "class 2: 90.0% becomes 50.0% without the region and 85.0% without the control region, so the region",
        ),
        (0.5, 0.85, "control region, so the region counts."),
        (0.5, 0.6, "so the region counts, but taking any region of its size costs more than half as much."),
        (0.7, 0.6, "so the region counts no more than another of its size."),
        (0.895, 0.5, "so the class does not rest on the region."),
        (0.95, 0.5, "so the class does not rest on the region."),
    ],
)
def test_the_verdict_in_words(classifier, after, control, words):
    """By hand, with the odds 9 : 1 before; 1 : 1 for 0.5, 3 : 2 for 0.6, 7 : 3 for 0.7, and 17 : 3 for 0.85."""
    removal = remove_trait(classifier, noise(), (1, 1, 9, 9), "class 2")

    def scored(explanation, probability):
        own = replace(explanation.classes[0], probability=probability)
        logit = math.log(probability / (1 - probability)) + 3
        scores = (ClassScore("class 2", 2, 1, logit, probability), ClassScore("class 0", 0, 2, 3.0, 1 - probability))
        return replace(explanation, classes=(own,), scores=scores)

    changed = replace(
        removal,
        before=scored(removal.before, 0.9),
        after=scored(removal.after, after),
        control=scored(removal.control, control),
    )
    assert words in changed.verdict and changed.verdict in str(changed)
