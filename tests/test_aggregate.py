# SPDX-License-Identifier: MIT
"""Maps of heads become one: each way against sums over heads that are written out."""

import pytest
import torch
from conftest import random_images, tiny_model

from prompt_cam_hf.explanations.aggregate import AGGREGATIONS, DEFAULT_AGGREGATION, aggregate_maps
from prompt_cam_hf.explanations.maps import trait_maps
from prompt_cam_hf.explanations.ranking import rank_heads

SOME_FAMILIES = ("vit", "dinov2_with_registers", "siglip_vision_model")
CLASSES = torch.tensor([[3, 0], [1, 4]])


def the_long_way(model, image, label, how):
    """One image, one class, head by head."""
    kind, way = how.split("_", 1)
    classes = torch.tensor([label])
    maps = trait_maps(model, image[None], classes, kind)[0, 0].detach()
    evidence = trait_maps(model, image[None], classes, "evidence")[0, 0]
    ranking = rank_heads(model, image[None], classes)
    order, sufficient = ranking.order[0].tolist(), int(ranking.sufficient[0])
    values = rank_heads(model, image[None], classes, "shapley").scores[0].tolist()
    total = torch.zeros(maps.shape[1:])
    for head, one in enumerate(maps):
        place = order.index(head)
        if way == "sum":
            total += one
        elif way == "positive":
            total += torch.where(one > 0, one, 0.0)
        elif way == "evidence":
            total += one * torch.where(evidence[head] > 0, evidence[head], 0.0)
        elif way.startswith("shapley"):
            positive = torch.where(evidence[head] > 0, evidence[head], 0.0) if way == "shapley_evidence" else 1
            total += one * values[head] * positive if values[head] > 0 else 0
        elif place < {"first": 1, "top3": 3, "sufficient": sufficient}[way]:
            total += one
    return total


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("family", SOME_FAMILIES)
def test_each_way_is_a_sum_over_heads(family, how):
    model, images = tiny_model(family), random_images(2)
    # The predicted class too: others have no heads that suffice.
    classes = torch.cat((CLASSES, model(images).logits.argmax(-1)[:, None]), dim=1)
    found = aggregate_maps(model, images, classes, how)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 4, 4)
    for index in range(2):
        for place in range(3):
            expected = the_long_way(model, images[index], int(classes[index, place]), how)
            torch.testing.assert_close(found[index, place], expected, rtol=1e-3, atol=1e-5)


def test_the_ways_differ():
    """Else the test above could not tell them apart."""
    model, images = tiny_model(), random_images(2)
    classes = torch.cat((CLASSES, model(images).logits.argmax(-1)[:, None]), dim=1)
    maps = [aggregate_maps(model, images, classes, how) for how in AGGREGATIONS]
    for index, first in enumerate(maps):
        for second in maps[index + 1 :]:
            assert not torch.allclose(first, second, rtol=1e-2)


def test_classes_have_the_shape_that_was_asked_for():
    model, images = tiny_model(), random_images(3, 32, 48)
    options = {"interpolate_pos_encoding": True}
    predicted = model(images, **options).logits.argmax(-1)
    found = aggregate_maps(model, images, **options)
    assert found.shape == (3, 4, 6) and not found.requires_grad
    torch.testing.assert_close(found, aggregate_maps(model, images, predicted, DEFAULT_AGGREGATION, **options))
    with torch.inference_mode():
        torch.testing.assert_close(found, aggregate_maps(model, images, predicted[:, None], **options)[:, 0])


def test_mistakes_are_refused():
    model, images = tiny_model(), random_images(2)
    with pytest.raises(ValueError, match=r"how='mean' is not known; use one of attention_sum, "):
        aggregate_maps(model, images, how="mean")
    with pytest.raises(ValueError, match=r"classes has the shape \(3,\)"):
        aggregate_maps(model, images, torch.tensor([0, 1, 2]))
