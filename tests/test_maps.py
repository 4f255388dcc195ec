# SPDX-License-Identifier: MIT
"""Maps: attention and evidence against the network run the long way, and their place on the image."""

import numpy as np
import pytest
import torch
from conftest import NUM_CLASSES, assert_computed, random_images, tiny_model
from PIL import Image
from straightforward import run_straightforwardly
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.maps import map_box, resize_map, strong_region, token_evidence, trait_maps

VARIANTS = {"deep": {}, "shallow": {"class_prompt_layer": 0}, "between": {"class_prompt_layer": 1}}
PATCHES = 16


def last_layer(model):
    return max((m for m in model.backbone.modules() if isinstance(m, torch.nn.ModuleList)), key=len)[-1]


def scores_between(model, image, target, sharpness, scale):
    """The class's score by the family's own layers, as many times as there are points between blurred and sharp heads.

    In the last layer its row's attention is u + x (a - u) times `scale` (points, heads, tokens), with the points x of
    `sharpness` and the uniform weight u; nothing is renormalised.
    """
    attention = next(m for m in last_layer(model).modules() if hasattr(m, "q_proj") or hasattr(m, "query"))

    def blended(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
        if module is attention:
            uniform = 1 / weights.shape[-1]
            row = uniform + sharpness[:, None, None] * (weights[:, :, target] - uniform) * scale
            before, _, after = weights.tensor_split([target, target + 1], dim=2)
            weights = torch.cat((before, row[:, :, None], after), dim=2)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    ALL_ATTENTION_FUNCTIONS.register("blended", blended)
    for module in model.backbone.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "blended"
    return run_straightforwardly(model, image.expand(len(sharpness), -1, -1, -1)).logits[:, target]


def evidence_the_long_way(model, image, target, points):
    """(heads, tokens): the mean over midpoints of the way of what a change of each weight does, by autograd."""
    heads = model.config.backbone_config.num_attention_heads
    tokens = NUM_CLASSES + model.config.num_prefix_tokens + PATCHES
    sharpness = (torch.arange(points, dtype=image.dtype) + 0.5) / points
    scale = torch.ones((points, heads, tokens), dtype=image.dtype, requires_grad=True)
    scores_between(model, image, target, sharpness, scale).sum().backward()
    return (scale.grad / sharpness[:, None, None]).mean(dim=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_evidence_is_the_mean_over_the_way_and_adds_up(family, variant):
    """Against many midpoints through the whole network; and its sum against the score with and without blur."""
    images, classes = random_images(2), torch.tensor([[3, 0], [1, 3]])
    model = tiny_model(family, **VARIANTS[variant])
    maps = trait_maps(model, images, classes, kind="evidence")
    assert maps.shape == (2, 2, 4, 4, 4) and maps.dtype == torch.float32
    with torch.no_grad():
        every_token = token_evidence(model, model.last_layer_state(images), classes)
    long_way = tiny_model(family, **VARIANTS[variant]).double()
    for image, row in ((0, 0), (1, 1)):
        one_image, target = images[image : image + 1].double(), int(classes[image, row])
        expected = evidence_the_long_way(long_way, one_image, target, points=40)
        found = every_token[image, row].double()
        # Prompts, prefix tokens and patches, each on its own; so every sum of them is right too.
        torch.testing.assert_close(found, expected, atol=2e-4 * expected.abs().max().item(), rtol=1e-3)
        assert_computed(maps[image, row].flatten(1), every_token[image, row][:, -PATCHES:])
        with torch.no_grad():
            ends = torch.tensor([0.0, 1.0]).double()
            blurred, sharp = scores_between(long_way, one_image, target, ends, torch.ones(())).tolist()
        assert found.sum().item() == pytest.approx(sharp - blurred, abs=1e-3 * abs(sharp))


def test_more_steps_come_closer():
    model, images, classes = tiny_model("dinov2_swiglu"), random_images(2), torch.tensor([[3], [1]])
    with torch.no_grad():
        state = model.last_layer_state(images)
        few, usual, many = (token_evidence(model, state, classes, steps) for steps in (1, 16, 60))
    assert 0 < (usual - many).abs().max() < (few - many).abs().max() / 10
    torch.testing.assert_close(
        trait_maps(model, images, classes, "evidence", steps=1)[:, 0].flatten(2), few[:, 0, :, -16:]
    )
    with pytest.raises(ValueError, match="steps=0; evidence looks at 1 point or more"):
        trait_maps(model, images, kind="evidence", steps=0)


def test_attention_is_the_models_own(family):
    model, images = tiny_model(family), random_images(3)
    output = model(images, output_trait_maps=True)
    torch.testing.assert_close(trait_maps(model, images), output.trait_maps)
    classes = torch.tensor([[4, 1], [0, 2], [3, 3]])
    torch.testing.assert_close(trait_maps(model, images, classes), model(images, trait_classes=classes).trait_maps)
    one = trait_maps(model, images, classes[:, 0], kind="evidence")
    torch.testing.assert_close(one, trait_maps(model, images, classes, kind="evidence")[:, :1])


def test_gradients_of_the_model_and_the_callers_mode_do_not_matter():
    model, images = tiny_model(), random_images()
    expected = trait_maps(model, images, kind="evidence")
    model.class_prompts.grad = torch.ones_like(model.class_prompts)
    with torch.inference_mode():
        again = trait_maps(model, images.clone(), kind="evidence")
    assert_computed(again, expected)
    assert not again.requires_grad
    assert (model.class_prompts.grad == 1).all()
    assert model.classifier.weight.grad is None


def test_mistakes_get_one_sentence():
    model, images = tiny_model(), random_images(2)
    with pytest.raises(ValueError, match='use "attention" or "evidence"'):
        trait_maps(model, images, kind="gradient")
    with pytest.raises(ValueError, match=r"must be \(batch,\) or \(batch, k\), with batch=2"):
        trait_maps(model, images, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="whole numbers from 0 to 4"):
        trait_maps(model, images, torch.tensor([1, 5]))


def position_image(width, height):
    """Red is x and green is y, in pixels."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


@pytest.mark.parametrize("size", [(200, 120), (60, 180), (100, 100)])
def test_the_box_is_what_the_image_processor_shows(size):
    """Of an image whose colours tell the place, the model's input holds the colours of the box's corners."""
    model, image = tiny_model(), position_image(*size)
    squashing = build_image_processor(32)
    cropping = CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    assert map_box(model, squashing, image) == (0, 0, *size)
    for processor in (squashing, cropping):
        pixels = processor(image, do_normalize=False, return_tensors="pt")["pixel_values"][0] * 255
        left, top, right, bottom = map_box(model, processor, image)
        # A pixel's middle lies half a pixel inside the box.
        across, down = (right - left) / pixels.shape[2], (bottom - top) / pixels.shape[1]
        middle = pixels.shape[1] // 2
        assert pixels[0, middle, 2].item() == pytest.approx(left + 2.5 * across - 0.5, abs=across)
        assert pixels[0, middle, -3].item() == pytest.approx(right - 2.5 * across - 0.5, abs=across)
        assert pixels[1, 2, middle].item() == pytest.approx(top + 2.5 * down - 0.5, abs=down)
        assert pixels[1, -3, middle].item() == pytest.approx(bottom - 2.5 * down - 0.5, abs=down)


def test_pixels_that_fill_no_patch_are_outside_the_box():
    """38 pixels hold four patches of 8; the model drops the other six."""
    processor = build_image_processor(38)
    assert map_box(tiny_model(), processor, Image.new("RGB", (380, 190))) == pytest.approx((0, 0, 320, 160))


def test_an_image_processor_that_is_not_known_is_refused():
    processor = build_image_processor(32)
    processor.size = {"longest_edge": 32}
    with pytest.raises(ValueError, match=r"longest_edge.*can be laid back"):
        map_box(tiny_model(), processor, Image.new("RGB", (40, 30)))


def test_a_map_lies_in_its_box():
    trait_map = np.zeros((4, 8), np.float32)
    trait_map[3, 0] = 1
    laid = resize_map(trait_map, (80, 40))
    assert laid.shape == (40, 80) and laid.dtype == np.float32
    # The strongest pixels are the patch's own, none is above it, and half-way to the next patch is half as much.
    assert laid.max() == 1 and np.argwhere(laid > 0.99).min(axis=0).tolist() >= [30, 0]
    assert laid[37, 9:11].mean() == pytest.approx(0.5, abs=0.05) and laid[:, 20:].max() < 0.01
    boxed = resize_map(trait_map, (160, 100), (40, 30, 120, 70))
    assert np.array_equal(boxed[30:70, 40:120], laid)
    assert boxed.sum() == pytest.approx(laid.sum(), rel=1e-5)
    over_the_edge = resize_map(trait_map, (60, 30), (-10, -5, 70, 35))
    assert np.array_equal(over_the_edge, laid[5:35, 10:70])


def test_strong_regions():
    trait_map = np.full((4, 4), -1.0)
    with pytest.raises(ValueError, match="no value above 0"):
        strong_region(trait_map, (40, 40))
    trait_map[0, 3] = 0.4
    region = strong_region(trait_map, (40, 40))
    assert region[2, 37] and not region[:, :28].any() and not region[12:].any()
    assert strong_region(trait_map, (40, 40), level=0.9).sum() < region.sum()
    with pytest.raises(ValueError, match="above 0 and below 1"):
        strong_region(trait_map, (40, 40), level=1)
