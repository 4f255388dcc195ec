# SPDX-License-Identifier: MIT
"""The report holds the means of the localisation functions, over images and grids of different sizes."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

import prompt_cam_hf.metrics.localization_report as localization_report
from prompt_cam_hf.metrics import localization
from prompt_cam_hf.metrics.localization_report import LocalizationReport


@pytest.fixture(params=["class", "script"])
def metric(request, monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    if request.param == "class":
        return LocalizationReport(keep_in_memory=True)
    return evaluate.load(str(Path(localization_report.__file__)), cache_dir=str(tmp_path))


def test_means_over_images_of_any_size(metric):
    random = np.random.default_rng(0)
    maps = [random.random(grid) for grid in ((4, 4), (4, 4), (3, 5), (2, 2))]
    masks = [random.random(size) < share for size, share in zip(((32, 32), (20, 50), (9, 10), (7, 7)),
                                                                (0.02, 0.01, 0.1, 0.0), strict=True)]  # fmt: skip
    report = metric.compute(predictions=maps, references=masks, k=2, share=0.04)
    assert report.pop("num_images") == 3  # the last mask is empty
    for name, mean in report.items():
        if name == "chance":
            one_by_one = [
                localization.patch_mask(mask, values.shape, 0.04).mean()
                for values, mask in zip(maps[:3], masks[:3], strict=True)
            ]
        else:
            arguments = {"k": 2} if name == "top_k_intersection" else {}
            one_by_one = [
                getattr(localization, name)(values.astype("float32"), mask, share=0.04, **arguments)
                for values, mask in zip(maps[:3], masks[:3], strict=True)
            ]
        assert mean == pytest.approx(np.mean(one_by_one)), name
    assert len(report) == 7 and len(set(report.values())) > 3


def test_masks_of_patches_are_taken_as_they_are(metric):
    maps = np.array([[[0.0, 0.25], [0.0, 3.75]]])
    report = metric.compute(predictions=maps, references=np.array([[[False, False], [False, True]]]), k=1)
    assert report == {
        "pointing_game": 1, "relevance_mass_accuracy": 0.9375, "mass_at_matched_sharpness": pytest.approx(1),
        "relevance_rank_accuracy": 1, "top_k_intersection": 1, "region_iou": 1, "chance": 0.25, "num_images": 1,
    }  # fmt: skip


def test_refuses_empty_masks_alone(metric):
    with pytest.raises(ValueError, match="No mask has a patch"):
        metric.compute(predictions=np.ones((2, 2, 2)), references=np.zeros((2, 8, 8), dtype=bool))
