# SPDX-License-Identifier: MIT
"""Randomisation reaches every parameter of a copy, in order; similarities, noise and flips are as documented."""

import numpy as np
import pytest
import torch
from conftest import COMPUTED, FAMILIES, assert_computed, random_images, tiny_model
from transformers import ViTConfig, ViTForImageClassification

from prompt_cam_hf.explanations.maps import trait_maps
from prompt_cam_hf.explanations.ranking import rank_heads
from prompt_cam_hf.metrics.sanity import (
    head_stability,
    map_stability,
    parameter_randomisation,
    random_class_similarity,
    randomisation_stages,
    rank_correlation,
)
from prompt_cam_hf.metrics.specificity import other_classes

STD = (0.5, 0.25, 0.2)


def explain(model, pixel_values, classes):
    return trait_maps(model, pixel_values, classes)[:, 0].sum(1)


def ranks(values: list[float]) -> np.ndarray:
    """The place of each value, equal ones at their mean place."""
    return np.array([sum(other < one for other in values) + (sum(o == one for o in values) + 1) / 2 for one in values])


def spearman(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    pairs = zip(first.flatten(1).tolist(), second.flatten(1).tolist(), strict=True)
    return [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in pairs]


def test_rank_correlation():
    first, second = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    first[0] = first[0].round(decimals=1)  # equal values
    np.testing.assert_allclose(rank_correlation(first, second), spearman(first, second), atol=1e-12)
    assert rank_correlation(first, first.exp()).tolist() == pytest.approx([1, 1, 1])
    assert rank_correlation(first, -first).tolist() == pytest.approx([-1, -1, -1])
    second[1] = 0.5
    assert rank_correlation(first, second).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{}, {"class_prompt_layer": 0}], ids=["deep", "shallow"])
def test_stages_run_from_the_prompts_to_the_embeddings(family, fields):
    model = tiny_model(family, **fields)
    stages = dict(randomisation_stages(model))
    grouped = [id(parameter) for group in stages.values() for parameter in group]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    names = list(stages)
    assert names[:2] == ["class prompts", "classifier"] and names[-4:] == [
        "layer 2",
        "layer 1",
        "layer 0",
        "embeddings",
    ]
    between = names[2:-4]
    assert between[1:] == ([] if fields else ["agnostic prompts"])
    assert "norm" in between[0] and "pre" not in between[0]
    assert stages["class prompts"][0] is model.class_prompts
    for index in range(3):
        inside = [p for n, p in model.named_parameters() if f".{index}." in n and "backbone" in n]
        assert {id(p) for p in stages[f"layer {index}"]} == {id(p) for p in inside}


def test_each_stage_is_randomised_beside_those_before_it():
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    stages = [
        {name for name, one in model.named_parameters() if any(one is parameter for parameter in group)}
        for _, group in randomisation_stages(model)
    ]
    asked = []

    def watch(randomised, images, classes):
        changed = {
            name for name, parameter in randomised.named_parameters() if not torch.equal(parameter, before[name])
        }
        asked.append((changed, {name: value.clone() for name, value in randomised.state_dict().items()}, classes))
        return explain(randomised, images, classes)

    images = random_images(3)
    result = parameter_randomisation(model, images, watch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.stages == tuple(name for name, _ in randomisation_stages(model))
    shuffled: set[str] = set()
    for (changed, values, classes), stage in zip(asked, [set(), *stages], strict=True):
        shuffled |= stage
        # A single number, such as the classifier's bias, has no other order.
        assert changed == {name for name in shuffled if before[name].numel() > 1}
        for name in changed:
            assert torch.equal(values[name].flatten().sort().values, before[name].flatten().sort().values)
        assert torch.equal(classes, model(images).logits.argmax(-1))


def test_similarities_are_those_of_the_maps():
    model, images, classes = tiny_model("dinov2_with_registers"), random_images(2), torch.tensor([3, 1])
    maps = []

    def keep(*arguments):
        maps.append(explain(*arguments))
        return maps[-1]

    result = parameter_randomisation(model, images, keep, classes, seed=5)
    expected = np.stack([spearman(maps[0], later) for later in maps[1:]], axis=1)
    np.testing.assert_allclose(result.similarity, expected, atol=1e-6)
    again = parameter_randomisation(model, images, explain, classes, seed=5)
    assert_computed(again.similarity, result.similarity)
    other = parameter_randomisation(model, images, explain, classes)
    assert not torch.allclose(other.similarity, result.similarity, **COMPUTED)
    # Attention does not depend on the classifier, on the class prompts it does.
    of_stage = dict(zip(result.stages, result.similarity.T, strict=True))
    assert_computed(of_stage["classifier"], of_stage["class prompts"])
    assert of_stage["class prompts"].max() < 0.99


def test_a_map_that_ignores_the_model_is_found_out():
    edges = lambda model, images, classes: images.abs().mean(1)  # noqa: E731
    result = parameter_randomisation(tiny_model(), random_images(), edges)
    assert result.similarity.tolist() == [pytest.approx([1.0] * len(result.stages))] * 2
    assert random_class_similarity(tiny_model(), random_images(), edges).tolist() == pytest.approx([1, 1])


def test_other_classifiers_have_stages_too():
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config.num_labels = 3
    model = ViTForImageClassification(config)
    assert [name for name, _ in randomisation_stages(model)][:1] == ["classifier"]
    assert [name for name, _ in randomisation_stages(model)][-3:] == ["layer 1", "layer 0", "embeddings"]
    with pytest.raises(ValueError, match="Linear has no list of layers"):
        list(randomisation_stages(torch.nn.Linear(3, 3)))


def test_the_model_stays_when_the_explanation_fails():
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == 3:
            raise RuntimeError("no map today")
        return torch.rand(2, 4, 4)

    with pytest.raises(RuntimeError, match="no map today"):
        parameter_randomisation(model, random_images(), fail)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and not any(module._forward_hooks for module in model.modules())


def test_random_class():
    model, images, classes = tiny_model(), random_images(3), torch.tensor([0, 4, 2])
    similarity = random_class_similarity(model, images, explain, classes, seed=2)
    _, random = other_classes(model(images).logits, classes, seed=2)
    expected = spearman(explain(model, images, classes), explain(model, images, random))
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    predicted = random_class_similarity(model, images, explain)
    asked = model(images).logits.argmax(-1)
    assert_computed(predicted, random_class_similarity(model, images, explain, asked))


def test_noise_is_in_grey_levels_and_flips_are_undone():
    model, images = tiny_model(), random_images(2, 32, 32)
    seen = []

    def brightness(model, pixel_values, classes):
        seen.append((pixel_values, classes))
        return pixel_values.mean(1)

    result = map_stability(model, images, brightness, STD, noise_std=5)
    (clean, first), (noisy, second), (mirrored, third) = seen
    assert torch.equal(clean, images) and torch.equal(mirrored, images.flip(3))
    assert torch.equal(first, second) and torch.equal(first, third)
    # In the image, value * STD * 255 are the grey levels; all images get the same noise.
    levels = (noisy - images) * torch.tensor(STD).view(1, 3, 1, 1) * 255
    assert levels.std(dim=(0, 2, 3)).tolist() == pytest.approx([5, 5, 5], rel=0.1)
    torch.testing.assert_close(levels[0], levels[1], atol=1e-3, rtol=0)
    np.testing.assert_allclose(result.noise, spearman(images.mean(1), noisy.mean(1)), atol=1e-6)
    assert result.flip.tolist() == pytest.approx([1, 1])
    predictions = [model(batch).logits.argmax(-1) for batch in (images, noisy, images.flip(3))]
    assert torch.equal(result.classes, predictions[0])
    assert torch.equal(result.noise_kept, predictions[1] == predictions[0])
    assert torch.equal(result.flip_kept, predictions[2] == predictions[0])
    # A map that stays where it is when the image is mirrored loses by it.
    ramp = torch.arange(4.0).expand(2, 4, 4)
    stays = map_stability(model, images, lambda *_: ramp, STD)
    assert stays.noise.tolist() == pytest.approx([1, 1]) and stays.flip.tolist() == pytest.approx([-1, -1])


def test_predictions_lost_to_noise_are_told():
    first_pixel = lambda images: images[:, :, 0, 0]  # noqa: E731
    images = torch.zeros(2, 3, 4, 4)
    images[0, 2, 0, 0], images[1, 2, 0, 0], images[1, 1, 0, 3] = 50, 1e-4, 9
    result = map_stability(first_pixel, images, lambda m, x, c: x.sum(1), (1, 1, 1), noise_std=30, seed=3)
    assert result.classes.tolist() == [2, 2]
    assert result.noise_kept.tolist() == [True, False] and result.flip_kept.tolist() == [False, False]


def test_ranking_of_heads():
    model, images, classes = tiny_model(), random_images(3), torch.tensor([1, 0, 3])
    result = head_stability(model, images, STD, classes, noise_std=60, seed=4)
    mirrored = []
    for batch in (images, images.flip(3)):
        order = rank_heads(model, batch, classes).order
        mirrored.append(torch.tensor([[row.index(head) for head in range(4)] for row in order.tolist()]))
    np.testing.assert_allclose(result.flip, spearman(*mirrored), atol=1e-6)
    assert head_stability(model, images, STD, classes, noise_std=0).noise.tolist() == pytest.approx([1, 1, 1])
    assert torch.equal(result.classes, classes)


def test_refuses_statistics_that_do_not_fit():
    with pytest.raises(ValueError, match=r"image_std is \(0.5,\); it must be 3 numbers"):
        map_stability(tiny_model(), random_images(), explain, (0.5,))
