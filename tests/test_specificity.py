# SPDX-License-Identifier: MIT
"""Whether maps of different classes differ, and what a changed trait does, on maps and scores known by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, random_images, tiny_model

from prompt_cam_hf.birds import bird_spec, counterfactual, draw_bird
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.maps import trait_maps
from prompt_cam_hf.metrics.specificity import class_specificity, counterfactual_change, other_classes


def explain(model, pixel_values, classes):
    return trait_maps(model, pixel_values, classes)[:, 0].sum(1)


def corner_maps(model, pixel_values, classes):
    """Class c has all of its map in patch c of 2 x 2, but class 3 half in patch 3 and half in patch 0."""
    maps = torch.nn.functional.one_hot(classes, 4).float()
    maps[classes == 3] = torch.tensor([0.5, 0.0, 0.0, 0.5])
    return maps.unflatten(1, (2, 2))


def fixed_scores(pixel_values):
    """The image's first pixels are its logits."""
    return pixel_values[:, 0, 0, :4]


def test_maps_known_by_hand():
    images = torch.zeros(2, 3, 2, 4)
    images[0, 0, 0] = torch.tensor([5.0, 0.0, 1.0, 4.0])
    images[1, 0, 0] = torch.tensor([5.0, 0.0, 1.0, 4.0])
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 0] = True
    result = class_specificity(fixed_scores, images, corner_maps, torch.tensor([0, 2]), mask, top=0.5)
    # Asked are the true class, the best other one, and one of the two that are left.
    assert result.classes[:, :2].tolist() == [[0, 3], [2, 0]]
    assert result.classes[0, 2] in (1, 2) and result.classes[1, 2] in (1, 3)
    # Class 0 and class 3 share a patch: the cosine of (1, 0) and (1/2, 1/2).
    assert result.distance[0].tolist() == pytest.approx([1 - math.sqrt(0.5), 1])
    assert result.distance[1].tolist() == pytest.approx([1, 1])
    assert result.mass[0].tolist() == [1, 0.5, 0]
    assert result.mass[1].tolist() == [1, 0, 0]
    assert result.maps[0, 1].tolist() == [[0.5, 0], [0, 0.5]]
    # The two strongest of four patches, of equal ones the first: {0, 1} and {0, 3} have one of three in common.
    assert result.overlap[0, 0].item() == pytest.approx(1 / 3)
    strongest = {1: {1, 0}, 2: {2, 0}, 3: {0, 3}}[result.classes[0, 2].item()]
    assert result.overlap[0, 1].item() == pytest.approx(len(strongest & {0, 1}) / len(strongest | {0, 1}))


def test_one_map_for_all_classes_is_not_specific():
    model, images, classes = tiny_model(), random_images(3), torch.tensor([0, 4, 2])
    saliency = class_specificity(model, images, lambda m, x, c: explain(m, x, torch.zeros_like(c)), classes)
    assert saliency.distance.abs().max() < 1e-6 and saliency.overlap.eq(1).all() and saliency.mass is None
    traits = class_specificity(model, images, explain, classes)
    assert traits.distance.min() > 0.001
    expected = explain(model, images, traits.classes[:, 2])
    torch.testing.assert_close(traits.maps[:, 2], expected)


def test_maps_without_anything_have_no_distance():
    nothing = class_specificity(
        tiny_model(), random_images(), lambda m, x, c: torch.zeros(2, 4, 4), torch.tensor([0, 1])
    )
    assert nothing.distance.isnan().all()


def test_batches_and_seeds():
    model, images, classes = tiny_model(), random_images(4), torch.tensor([0, 1, 2, 3])
    whole = class_specificity(model, images, explain, classes, np.ones((4, 4, 4), dtype=bool))
    for i in range(4):
        one = class_specificity(model, images[i : i + 1], explain, classes[i : i + 1], np.ones((1, 4, 4), dtype=bool))
        for name, value in one._asdict().items():
            torch.testing.assert_close(value, getattr(whole, name)[i : i + 1], atol=1e-6, rtol=1e-5)


def test_other_classes_are_others():
    logits = torch.randn(200, NUM_CLASSES)
    classes = torch.arange(200) % NUM_CLASSES
    drawn = []
    for seed in (0, 1):
        runner_up, random = other_classes(logits, classes, seed)
        for row in range(200):
            ranked = logits[row].argsort(descending=True).tolist()
            ranked.remove(classes[row].item())
            assert runner_up[row] == ranked[0]
            assert random[row].item() in ranked[1:]
        drawn.append(random)
    assert not torch.equal(*drawn)
    assert set(drawn[0].tolist()) == set(range(NUM_CLASSES))


def test_changes_known_by_hand():
    before, after = torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 4)
    before[0, 0, 0] = torch.tensor([3.0, 1.0, 0.0, 0.0])
    after[0, 0, 0] = torch.tensor([0.0, 2.0, 0.0, 0.0])

    def follows_the_first_pixel(model, images, classes):
        maps = torch.zeros(2, 2, 2)
        maps[:, 0, 0], maps[:, 1, 1] = images[:, 0, 0, 0], 1
        return maps

    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[:, 0, 0] = True
    change = counterfactual_change(fixed_scores, before, after, None, follows_the_first_pixel, mask)
    assert change.classes.tolist() == [0, 0]
    assert change.scores.tolist() == [[3, 0], [0, 0]]
    e = math.e
    assert change.probabilities[0].tolist() == pytest.approx([e**3 / (e**3 + e + 2), 1 / (e**2 + 3)])
    assert change.probabilities[1].tolist() == pytest.approx([0.25, 0.25])
    assert change.predictions.tolist() == [[0, 1], [0, 0]]
    assert change.mass.tolist() == [[0.75, 0], [0, 0]]
    asked = counterfactual_change(fixed_scores, before, after, torch.tensor([1, 3]))
    assert asked.scores.tolist() == [[1, 2], [0, 0]] and asked.mass is None


def test_a_drawn_pair_of_birds():
    spec = bird_spec("test", 0)
    part = "crown"
    (before, masks), (after, _) = (draw_bird(each, 32) for each in (spec, counterfactual(spec, part)))
    pixels = build_image_processor(32)([before, after], return_tensors="pt")["pixel_values"]
    model = tiny_model()
    change = counterfactual_change(model, pixels[:1], pixels[1:], None, explain, masks[part][None])
    with torch.no_grad():
        logits = model(pixels).logits
    label = logits[0].argmax()
    torch.testing.assert_close(change.scores[0], logits[:, label])
    torch.testing.assert_close(change.probabilities[0], logits.softmax(-1)[:, label])
    assert change.predictions[0].tolist() == logits.argmax(-1).tolist()
    assert change.scores[0, 0] != change.scores[0, 1]
    assert change.mass.min() > 0 and change.mass.max() < 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model, x: class_specificity(model, x, explain, torch.tensor([0, 1]), top=0), "top is 0"),
        (lambda model, x: class_specificity(model, x, explain, torch.tensor([0])), "each of the 2 images"),
        (lambda model, x: other_classes(torch.zeros(1, 2), torch.tensor([0])), "2 classes; .* at least three"),
        (lambda model, x: counterfactual_change(model, x, x[:1]), "pairs need one"),
        (lambda model, x: counterfactual_change(model, x, x, explain=explain), "Give both explain and masks"),
    ],
)
def test_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_model(), random_images())
