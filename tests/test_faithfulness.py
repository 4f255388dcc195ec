# SPDX-License-Identifier: MIT
"""Insertion and deletion agree with curves known by hand, and with their definition written pixel by pixel."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, NUM_CLASSES, random_images, tiny_model
from scipy.ndimage import gaussian_filter
from transformers import ViTConfig, ViTForImageClassification

import prompt_cam_hf.metrics.faithfulness_report as faithfulness_report
from prompt_cam_hf.metrics.faithfulness import PRESETS, black, blur, deletion, follow_maps, insertion
from prompt_cam_hf.metrics.faithfulness_report import FaithfulnessReport
from prompt_cam_hf.metrics.scoring import pixel_ranks

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
BLACK = (-2.0, -2.0, -1.2)


def random_maps(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(3))


def half_on_one_pixel(pixel_values: torch.Tensor) -> torch.Tensor:
    """Logits of two classes; the first has probability 1/2 if pixel (1, 2) is one, and 1/30 more for each other."""
    weights = torch.full((4, 4), 1 / 30, dtype=torch.float64)
    weights[1, 2] = 1 / 2
    probability = ((pixel_values[:, 0] == 1) * weights).sum((1, 2)).clamp(0, 1)
    return torch.stack((probability, 1 - probability), dim=1).log()


@pytest.mark.parametrize(
    ("value", "deleted", "inserted"),
    [
        # Four pixels a step. The pixel comes first: 1/2 + 3/30 change in the first step, 4/30 in each other one.
        (1.0, [1, 12 / 30, 8 / 30, 4 / 30, 0], [0, 18 / 30, 22 / 30, 26 / 30, 1]),
        # It comes last: 1/2 + 3/30 change in the last step.
        (-1.0, [1, 26 / 30, 22 / 30, 18 / 30, 0], [0, 4 / 30, 8 / 30, 12 / 30, 1]),
    ],
)
def test_curves_known_by_hand(value, deleted, inserted):
    images, maps = torch.ones(1, 3, 4, 4), torch.zeros(1, 4, 4)
    maps[0, 1, 2] = value
    out = deletion(half_on_one_pixel, images, maps, torch.tensor([0]))
    into = insertion(half_on_one_pixel, images, maps, torch.tensor([0]))
    assert (out.metric, into.metric, out.preset, out.num_steps) == ("deletion", "insertion", "rise", 4)
    np.testing.assert_allclose(out.curve[0], deleted, atol=1e-6)
    np.testing.assert_allclose(into.curve[0], inserted, atol=1e-6)
    # The mean height of four trapezoids.
    for curve, result in ((deleted, out), (inserted, into)):
        area = sum((curve[step] + curve[step + 1]) / 2 for step in range(4)) / 4
        assert result.auc.item() == pytest.approx(area, abs=1e-6)


def resized(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between the centres of cells, one pixel at a time."""
    rows, cols = cells.shape
    pixels = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            down = min(max((y + 0.5) * rows / height - 0.5, 0), rows - 1)
            right = min(max((x + 0.5) * cols / width - 0.5, 0), cols - 1)
            top, left = int(down), int(right)
            bottom, far = min(top + 1, rows - 1), min(left + 1, cols - 1)
            a, b = down - top, right - left
            upper = cells[top, left] * (1 - b) + cells[top, far] * b
            lower = cells[bottom, left] * (1 - b) + cells[bottom, far] * b
            pixels[y, x] = upper * (1 - a) + lower * a
    return pixels


def blurred_the_long_way(image: np.ndarray) -> np.ndarray:
    """As RISE's code has it: an impulse in a box of 11 x 11 is blurred, and the box slides over a border of zeros."""
    box = np.zeros((11, 11))
    box[5, 5] = 1
    box = gaussian_filter(box, 5)
    padded = np.pad(image, ((0, 0), (5, 5), (5, 5)))
    _, height, width = image.shape
    result = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            result[:, y, x] = (padded[:, y : y + 11, x : x + 11] * box).sum((1, 2))
    return result


def transcription(model, image, cells, label, metric, preset) -> list[float]:
    """The definition: sort pixels, change so many, ask the model, and again until none is left."""
    _, height, width = image.shape
    values = resized(cells.double().numpy(), height, width).astype(np.float32)
    pixels = sorted(
        ((y, x) for y in range(height) for x in range(width)), key=lambda yx: (-values[yx], yx[0] * width + yx[1])
    )
    clean = image.double().numpy()
    if metric == "insertion":
        start, finish = blurred_the_long_way(clean), clean
    else:
        blank = np.zeros((3, 1, 1)) if preset != "rise-black" else np.array(BLACK)[:, None, None]
        start, finish = clean.copy(), np.broadcast_to(blank, clean.shape)
    step = width if preset.startswith("rise") else -(-height * width // cells.numel())
    num_steps = -(-height // 8) if preset == "rise-eighth" else -(-height * width // step)
    curve, total = [], height * width
    while True:
        logits = model(torch.from_numpy(start).float()[None])
        logits = getattr(logits, "logits", logits)[0]
        curve.append((logits[label].exp() / logits.exp().sum()).item())
        if not pixels:
            return curve
        if preset == "rise-eighth":
            step = round((len(curve) / num_steps) ** 2 * total) - (total - len(pixels))
        for y, x in pixels[:step]:
            start[:, y, x] = finish[:, y, x]
        pixels = pixels[step:]


def linear_classifier() -> ViTForImageClassification:
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=32, patch_size=8
    )
    config.num_labels = NUM_CLASSES
    model = ViTForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("metric", ["insertion", "deletion"])
@pytest.mark.parametrize("kind", ["prompt_cam", "linear", "function"])
def test_equals_a_direct_transcription(metric, preset, kind):
    size, grid = (IMAGE_SIZE, IMAGE_SIZE), (4, 4)
    if kind == "linear":
        model = linear_classifier()
    else:
        prompt_cam = tiny_model("dinov2_with_registers")
        model = prompt_cam
        if kind == "function":  # any shape of image, and a map that has nothing to do with its patches
            size, grid = (16, 40), (3, 7)
            model = lambda images: prompt_cam(images, interpolate_pos_encoding=True).logits  # noqa: E731
    images, maps = random_images(2, *size), random_maps(2, *grid)
    maps[1] = maps[1].round(decimals=1)  # equal cells
    classes = torch.tensor([1, 3])
    if metric == "insertion":
        result = insertion(model, images, maps, classes, preset, batch_size=7)
    else:
        result = deletion(model, images, maps, classes, preset, batch_size=7, image_mean=MEAN, image_std=STD)
    with torch.no_grad():
        expected = [
            transcription(model, image, cells, label, metric, preset)
            for image, cells, label in zip(images, maps, classes.tolist(), strict=True)
        ]
    assert result.preset == preset
    assert result.curve.shape == (2, result.num_steps + 1)
    np.testing.assert_allclose(result.curve, expected, atol=2e-6)
    places = np.arange(result.num_steps + 1) / result.num_steps
    if preset == "rise-eighth":
        places = places**2
    np.testing.assert_allclose(result.auc, np.trapezoid(expected, places), atol=2e-6)


def test_number_of_steps():
    image = torch.zeros(1, 3, 224, 224)
    steps = {preset: deletion(lambda x: x[:, :2, 0, 0], image, torch.ones(1, 16, 16), None, preset,
                              image_mean=MEAN, image_std=STD).num_steps for preset in PRESETS}  # fmt: skip
    assert steps == {"rise": 224, "rise-black": 224, "rise-eighth": 28, "fast": 256}


def test_the_cheaper_preset_lies_on_the_curve_of_the_whole_one():
    """docs/metrics.md says how far its areas are off."""
    model, images, maps = linear_classifier(), random_images(2, 32, 32), random_maps(2, 4, 4)
    for metric in (insertion, deletion):
        whole, cheap = (metric(model, images, maps, preset=preset) for preset in ("rise", "rise-eighth"))
        assert 8 * cheap.num_steps == whole.num_steps
        # A quarter and all of the pixels: after steps 2 and 4 of 4, and 8 and 32 of 32.
        np.testing.assert_allclose(cheap.curve[:, [0, 2, 4]], whole.curve[:, [0, 8, 32]], atol=2e-6)


def test_several_maps_at_once_are_each_alone():
    model, images = linear_classifier(), random_images(3, 32, 32)
    maps = [random_maps(3, 4, 4), random_maps(3, 4, 4).flip(-1), torch.ones(3, 1, 1)]
    for preset in ("rise-eighth", "fast"):
        found = follow_maps(model, images, maps, preset=preset, batch_size=5)
        alone = [metric(model, images, one, preset=preset) for one in maps for metric in (insertion, deletion)]
        assert [curve.metric for curve in found] == ["insertion", "deletion"] * 3
        for together, expected in zip(found, alone, strict=True):
            assert (together.metric, together.num_steps) == (expected.metric, expected.num_steps)
            np.testing.assert_allclose(together.curve, expected.curve, atol=2e-6)


def test_equal_pixels_keep_the_order_of_reading():
    assert pixel_ranks(torch.zeros(1, 3, 5), (6, 7))[0].flatten().tolist() == list(range(42))
    # The lower row is stronger. Interpolation blends the two between their centres; columns stay equal.
    ranks = pixel_ranks(torch.tensor([[[0.1, 0.1, 0.1], [0.7, 0.7, 0.7]]]), (8, 9))[0]
    assert ranks.tolist() == [list(range(9 * place, 9 * place + 9)) for place in (6, 7, 5, 4, 3, 2, 0, 1)]


@pytest.mark.parametrize("metric", [insertion, deletion])
def test_batches_change_nothing(metric):
    model, images, maps = tiny_model(), random_images(3), random_maps(3, 4, 4)
    images_before, maps_before = images.clone(), maps.clone()
    whole = metric(model, images, maps)
    assert whole.classes.tolist() == model(images).logits.argmax(-1).tolist()
    for batch_size in (1, 5, 1000):
        one_by_one = [metric(model, images[i : i + 1], maps[i : i + 1], batch_size=batch_size).curve for i in range(3)]
        torch.testing.assert_close(torch.cat(one_by_one), whole.curve, atol=1e-6, rtol=0)
    assert torch.equal(images, images_before) and torch.equal(maps, maps_before)
    assert torch.equal(pixel_ranks(maps, (32, 32))[1:2], pixel_ranks(maps[1:2], (32, 32)))


def test_ends_of_the_curves():
    model, images, maps = tiny_model(), random_images(2), random_maps(2, 4, 4)
    classes = torch.tensor([4, 0])
    with torch.no_grad():
        ends = {
            name: model(batch).logits.softmax(-1)[range(2), classes]
            for name, batch in {
                "clean": images, "blurred": blur(images), "zeros": 0 * images, "black": black(images, MEAN, STD)
            }.items()
        }  # fmt: skip
    into = insertion(model, images, maps, classes).curve
    out = {
        preset: deletion(model, images, maps, classes, preset, image_mean=MEAN, image_std=STD).curve
        for preset in PRESETS
    }
    torch.testing.assert_close(into[:, [0, -1]], torch.stack((ends["blurred"], ends["clean"]), dim=1))
    for preset, blank in {"rise": "zeros", "fast": "zeros", "rise-black": "black"}.items():
        torch.testing.assert_close(out[preset][:, [0, -1]], torch.stack((ends["clean"], ends[blank]), dim=1))
    assert black(images, MEAN, STD)[1, :, 5, 6].tolist() == pytest.approx(BLACK)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "RISE"}, "no preset 'RISE'; choose one of rise, rise-eighth, rise-black, fast"),
        ({"preset": "rise-black"}, "image_mean is None .* black in pixel_values needs both"),
        ({"preset": "rise-black", "image_mean": (0.5,), "image_std": (0.5,)}, "3 numbers, one a channel"),
        ({"maps": torch.zeros(3, 4, 4)}, "There are 3 maps for 2 images"),
        ({"maps": torch.zeros(2, 1, 4, 4)}, r"shape \(2, 1, 4, 4\); they must be \(batch, rows, cols\)"),
        ({"maps": torch.full((2, 4, 4), torch.nan)}, "not finite"),
        ({"classes": torch.tensor([1])}, r"shape \(1,\) .* each of the 2 images"),
        ({"classes": torch.tensor([1.0, 2.0])}, "torch.float32; it must be one whole number"),
        ({"classes": torch.tensor([1, 5])}, "classes must be whole numbers from 0 to 4"),
        ({"classes": torch.tensor([-1, 0])}, "classes must be whole numbers from 0 to 4"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        deletion(tiny_model(), random_images(), **{"maps": torch.zeros(2, 4, 4), **arguments})


def test_as_a_metric_of_evaluate(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    model, images, maps, classes = tiny_model(), random_images(3), random_maps(3, 4, 4), torch.tensor([0, 4, 2])
    loaded = evaluate.load(str(Path(faithfulness_report.__file__)), cache_dir=str(tmp_path))
    for metric in (FaithfulnessReport(keep_in_memory=True), loaded):
        report = metric.compute(
            predictions=maps, references=classes, pixel_values=images, model=model, preset="rise-black",
            image_mean=MEAN, image_std=STD,
        )  # fmt: skip
        into = insertion(model, images, maps, classes, "rise-black")
        out = deletion(model, images, maps, classes, "rise-black", image_mean=MEAN, image_std=STD)
        assert (report["preset"], report["num_images"]) == ("rise-black", 3)
        for name, result in (("insertion", into), ("deletion", out)):
            np.testing.assert_allclose(report[f"{name}_per_image"], result.auc, atol=1e-6)
            np.testing.assert_allclose(report[f"{name}_curve"], result.curve.mean(0), atol=1e-6)
            assert report[name] == pytest.approx(result.auc.mean().item(), abs=1e-6)
