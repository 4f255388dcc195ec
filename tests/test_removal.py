# SPDX-License-Identifier: MIT
"""Regions taken out of images."""

import json
import pickle

import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image, ImageFilter

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations import removal
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.explanations.maps import strong_region
from prompt_cam_hf.explanations.removal import box_mask, remove_region, remove_trait
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
    assert [s.logit for s in result.before.scores] == [s.logit for s in before.scores]
    assert [s.logit for s in result.after.scores] == [s.logit for s in after.scores]
    np.testing.assert_array_equal(result.after.classes[0].maps, after.classes[0].maps)

    rows = {row["class"]: row for row in result.to_rows()}
    assert set(rows) == {score.label for score in before.scores}
    for old in before.scores:
        new = next(score for score in after.scores if score.label == old.label)
        row = rows[old.label]
        assert (row["score_before"], row["score_after"]) == (old.logit, new.logit)
        assert (row["rank_before"], row["rank_after"]) == (old.rank, new.rank)
        assert f"{new.logit - old.logit:+.2f}" in str(result)
    exported = json.loads(result.to_json())
    rebuilt = np.zeros(mask.size, bool)
    for start, length in exported["mask_runs"]:
        rebuilt[start : start + length] = True
    assert np.array_equal(rebuilt.reshape(mask.shape), mask)
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
    with pytest.raises(ValueError, match='give a box, a mask or "top head"'):
        remove_trait(classifier, image, "crown")
    with pytest.raises(ValueError, match="did you mean"):
        remove_trait(classifier, image, class_name="clas 1")
