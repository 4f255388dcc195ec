# SPDX-License-Identifier: MIT
"""Holes are filled as a dense linear system, set up by hand, says; curves are the model's answers to the result."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from conftest import random_images, tiny_model

from prompt_cam_hf.metrics import road_report
from prompt_cam_hf.metrics.road import PERCENTILES, impute, road
from prompt_cam_hf.metrics.road_report import RoadReport


def random_maps(batch: int) -> torch.Tensor:
    return torch.rand((batch, 4, 4), generator=torch.Generator().manual_seed(3))


def filled_by_hand(image: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Each hole is the mean of its neighbours in the image, weighted 2 beside it and 1 across the corner."""
    channels, height, width = image.shape
    size = height * width
    system, right_side = np.eye(size), image.reshape(channels, size).T.copy()
    for y in range(height):
        for x in range(width):
            if not removed[y, x]:
                continue
            here = y * width + x
            neighbours = {
                (y + down) * width + x + right: 2 if 0 in (down, right) else 1
                for down in (-1, 0, 1)
                for right in (-1, 0, 1)
                if (down or right) and 0 <= y + down < height and 0 <= x + right < width
            }
            right_side[here] = 0
            for there, weight in neighbours.items():
                system[here, there] = -weight / sum(neighbours.values())
    return np.linalg.solve(system, right_side).T.reshape(image.shape)


@pytest.mark.parametrize(("height", "width"), [(5, 6), (7, 4), (1, 9)])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_imputation_solves_the_dense_system(height, width, part):
    random = np.random.default_rng((height, width))
    image = random.normal(size=(3, height, width))
    removed = np.zeros(height * width, dtype=bool)
    removed[random.permutation(removed.size)[: max(int(part * removed.size), 1)]] = True
    removed = removed.reshape(height, width)
    filled = impute(torch.from_numpy(image), removed, torch.zeros(3, height, width))
    np.testing.assert_allclose(filled, filled_by_hand(image, removed), atol=1e-10)
    noise = torch.from_numpy(random.normal(size=image.shape))
    noisy = impute(torch.from_numpy(image), removed, noise)
    np.testing.assert_allclose(noisy - filled, np.where(removed, noise, 0), atol=1e-12)


def test_one_hole_known_by_hand():
    image = torch.tensor([[[0.0, 3.0, 0.0], [6.0, 99.0, 0.0], [0.0, 0.0, 1.2]]])
    removed = np.zeros((3, 3), dtype=bool)
    removed[1, 1] = True
    # A sixth of 3 + 6 and a twelfth of 1.2.
    assert impute(image, removed, torch.zeros(1, 3, 3))[0, 1, 1].item() == pytest.approx(1.6)


def test_curves_are_the_answers_to_filled_images():
    model, images, maps, classes = tiny_model(), random_images(2), random_maps(2), torch.tensor([3, 0])
    result = road(model, images, maps, classes, percentiles=(25, 70), noise=0)
    # The order in which pixels are removed is tested with insertion and deletion; here cells are told apart by far.
    values = torch.nn.functional.interpolate(maps[:, None].double(), size=(32, 32), mode="bilinear")[:, 0].float()
    for image in range(2):
        order = np.argsort(-values[image].flatten().numpy(), kind="stable")
        for column, count in enumerate((256, 717)):  # of 1024 pixels
            for curve, pixels in ((result.morf, order[:count]), (result.lerf, order[1024 - count :])):
                removed = np.zeros(1024, dtype=bool)
                removed[pixels] = True
                filled = filled_by_hand(images[image].double().numpy(), removed.reshape(32, 32))
                with torch.no_grad():
                    logits = model(torch.from_numpy(filled).float()[None]).logits[0]
                expected = logits.softmax(-1)[classes[image]].item()
                assert curve[image, column].item() == pytest.approx(expected, abs=1e-6)
    expected = ((result.lerf[:, 0] - result.morf[:, 0]) / 2 + (result.lerf[:, 1] - result.morf[:, 1]) / 2) / 2
    torch.testing.assert_close(result.combined, expected)


def test_noise_is_that_of_the_paper_and_of_the_seed():
    seen = []

    def model(images):
        seen.append(images)
        return images.mean((2, 3))

    images, maps = torch.zeros(1, 3, 64, 64), random_maps(1)
    for seed in (0, 0, 1):
        road(model, images, maps, torch.tensor([0]), percentiles=(50,), seed=seed)
    first, again, other = seen
    assert torch.equal(first, again) and not torch.equal(first, other)
    # Half of the pixels of an image without contrast are noise now, the others are as they were.
    for image in first:
        assert (image == 0).sum() == 3 * 64 * 32
        assert image[image != 0].std().item() == pytest.approx(0.01, rel=0.05)
    assert not ((first[0] != 0) & (first[1] != 0)).any()


def test_batches_change_nothing():
    model, images, maps = tiny_model(), random_images(3), random_maps(3)
    images_before = images.clone()
    whole = road(model, images, maps)
    assert torch.equal(images, images_before)
    assert whole.percentiles == PERCENTILES and whole.morf.shape == whole.lerf.shape == (3, 9)
    assert whole.classes.tolist() == model(images).logits.argmax(-1).tolist()
    single = [road(model, images[i : i + 1], maps[i : i + 1], batch_size=5) for i in range(3)]
    for name in ("morf", "lerf", "combined"):
        torch.testing.assert_close(torch.cat([getattr(one, name) for one in single]), getattr(whole, name))


@pytest.mark.parametrize("percentiles", [(), (0,), (50, 100), (1e-6,)])
def test_refuses_to_remove_all_or_nothing(percentiles):
    with pytest.raises(ValueError, match="at least one and leave at least one, so be above 0 and below 100"):
        road(tiny_model(), random_images(), random_maps(2), percentiles=percentiles)


def test_refuses_maps_that_do_not_fit():
    with pytest.raises(ValueError, match="There are 3 maps for 2 images"):
        road(tiny_model(), random_images(), random_maps(3))


def test_as_a_metric_of_evaluate(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    model, images, maps, classes = tiny_model(), random_images(3), random_maps(3), torch.tensor([0, 4, 2])
    loaded = evaluate.load(str(Path(road_report.__file__)), cache_dir=str(tmp_path))
    alone = [road(model, images[[i]], maps[[i]], classes[[i]], (20, 70), seed=5) for i in range(3)]
    for metric in (RoadReport(keep_in_memory=True), loaded):
        report = metric.compute(
            predictions=maps, references=classes, pixel_values=images, model=model, percentiles=(20, 70), seed=5
        )
        assert report["num_images"] == 3
        np.testing.assert_allclose(report["road_per_image"], [one.combined.item() for one in alone], atol=1e-6)
        assert report["road"] == pytest.approx(np.mean([one.combined.item() for one in alone]), abs=1e-6)
        for name in ("morf", "lerf"):
            curves = [getattr(one, name)[0].numpy() for one in alone]
            np.testing.assert_allclose(report[f"{name}_curve"], np.mean(curves, axis=0), atol=1e-6)
