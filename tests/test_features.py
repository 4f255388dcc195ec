# SPDX-License-Identifier: MIT
"""Cached features: the same training as without, less work, and never a stale or half-written file."""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import (  # noqa: F401 - fixtures are found by being here
    assert_same_weights,
    fixture_backbone,
    fixture_photos,
    fixture_recipe,
    log_of,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import Dinov2Config, Dinov2Model

import prompt_cam_hf.training.cache_files as cache_files
from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.data.splits import load_image_data
from prompt_cam_hf.training.data import ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.features import FeatureCollator, cache_features
from prompt_cam_hf.training.train import train

GRID = (4, 4)
LAST_LAYER_ONLY = {"num_agnostic_prompts": 0}


@pytest.fixture
def make_images(photos, tmp_path):
    """Makes a data set of the test images."""

    def make(folder: Path = photos, seed: int | None = None, **preprocessing) -> ImageDataset:
        processor = build_image_processor(**({"image_size": 32} | preprocessing))
        transform = processor if seed is None else TrainingAugmentation(processor, seed)
        return ImageDataset(load_image_data(folder / "test", validation_fraction=0).train, transform)

    return make


@pytest.fixture
def model(backbone) -> PromptCAMForImageClassification:
    labels = {0: "red", 1: "green", 2: "blue"}
    return PromptCAMForImageClassification.from_backbone(str(backbone), id2label=labels, first_prompt_layer=1)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"augmentation": False, **LAST_LAYER_ONLY}, id="one view"),
        pytest.param({"cache_views": 4, **LAST_LAYER_ONLY}, id="a view for each epoch"),
        pytest.param({"cache_views": 9, "first_prompt_layer": 1}, id="agnostic prompts from layer 1"),
        pytest.param({"cache_views": 4, "num_agnostic_prompts": 0, "class_prompt_layer": 1}, id="class prompts at 1"),
    ],
)
def test_same_training_as_without(recipe, tmp_path, settings):
    settings = {"num_train_epochs": 4, **settings}
    plain = train(recipe(**settings))
    cached = train(
        recipe(**settings, cache_features=True, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "cached"))
    )
    for key in ("loss", "eval_loss", "eval_top1"):
        expected = [value for _, value in log_of(plain.output_dir, key)]
        assert [value for _, value in log_of(cached.output_dir, key)] == pytest.approx(expected, rel=1e-6)
    assert cached.metrics == plain.metrics
    assert len(files(tmp_path / "cache")) == 2  # train and validation; test is not worth it


def test_views_are_used_in_turn(model, make_images, tmp_path):
    images = make_images(seed=7)
    cached = cache_features(model, images, tmp_path, num_views=3)
    for epoch in range(7):
        cached.set_epoch(epoch)
        images.set_epoch(epoch % 3)
        for index in (0, 8):
            expected = model.encode_prefix(images[index]["pixel_values"][None])[0]
            torch.testing.assert_close(cached[index]["prefix_hidden_states"], expected, atol=1e-6, rtol=1e-6)
            assert cached[index]["labels"] == images[index]["labels"]
    assert len(cached) == len(images)
    images.set_epoch(1)
    first = images[0]["pixel_values"]
    images.set_epoch(2)
    assert not torch.equal(first, images[0]["pixel_values"])


def test_second_run_reads_what_the_first_wrote(recipe, tmp_path, monkeypatch):
    settings = {**LAST_LAYER_ONLY, "num_train_epochs": 2, "cache_features": True, "cache_dir": str(tmp_path / "cache")}
    train(recipe(**settings))

    def forbidden(*args, **kwargs):
        raise AssertionError("the features are there already")

    monkeypatch.setattr(PromptCAMForImageClassification, "encode_prefix", forbidden)
    train(recipe(**settings, output_dir=str(tmp_path / "again")))
    assert_same_weights(tmp_path / "out", tmp_path / "again")


def test_whatever_changes_the_features_makes_a_new_file(model, make_images, backbone, tmp_path):
    cache, seen = tmp_path / "cache", set()

    def is_new(*arguments, **options) -> bool:
        path = Path(cache_features(*arguments, cache_dir=cache, **options).file.path)
        new = path.name not in seen
        seen.add(path.name)
        return new

    assert is_new(model, make_images())
    assert not is_new(model, make_images())
    assert not is_new(model, make_images(), batch_size=2, num_workers=1)
    assert is_new(model, make_images(image_mean=[0.4, 0.5, 0.5]))
    assert is_new(model, make_images(seed=1))
    assert is_new(model, make_images(seed=2))
    assert is_new(model, make_images(seed=2), num_views=2)
    assert is_new(model, make_images(), autocast_dtype=torch.bfloat16)
    other_prompts = {"num_agnostic_prompts": 0, "class_prompt_layer": 2}
    later = PromptCAMForImageClassification.from_backbone(
        str(backbone), id2label=model.config.id2label, **other_prompts
    )
    assert is_new(later, make_images())
    same = PromptCAMForImageClassification.from_backbone(
        str(backbone), id2label=model.config.id2label, first_prompt_layer=1, prompt_dropout=0.3
    )
    assert not is_new(same, make_images())
    changed = model.backbone
    with torch.no_grad():
        next(changed.parameters()).add_(0.1)
    changed.save_pretrained(tmp_path / "changed")
    other = PromptCAMForImageClassification.from_backbone(
        str(tmp_path / "changed"), id2label=model.config.id2label, first_prompt_layer=1
    )
    assert is_new(other, make_images())


def test_an_edited_image_makes_a_new_file(model, photos, make_images, tmp_path):
    """Even where name, size and time of the file stay."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    path = folder / "test" / "001.red" / "0.png"
    Image.new("RGB", (40, 40), "red").save(path, format="bmp")
    before = path.stat()
    first = cache_features(model, make_images(folder), tmp_path / "cache")
    Image.new("RGB", (40, 40), "blue").save(path, format="bmp")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    second = cache_features(model, make_images(folder), tmp_path / "cache")
    assert first.file.path != second.file.path
    assert not torch.equal(first[0]["prefix_hidden_states"], second[0]["prefix_hidden_states"])


def test_an_interrupted_file_is_not_used(model, make_images, tmp_path, monkeypatch):
    original = PromptCAMForImageClassification.encode_prefix
    calls = []

    def interrupted(self, pixel_values):
        calls.append(pixel_values)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, pixel_values)

    monkeypatch.setattr(PromptCAMForImageClassification, "encode_prefix", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, make_images(), tmp_path, batch_size=4)
    assert [Path(name).suffix for name in files(tmp_path)] == [".partial"]
    monkeypatch.setattr(PromptCAMForImageClassification, "encode_prefix", original)
    cached = cache_features(model, make_images(), tmp_path, batch_size=4)
    assert [Path(name).suffix for name in files(tmp_path)] == [".npy"]
    for index, item in enumerate(make_images()):
        expected = model.encode_prefix(item["pixel_values"][None])[0]
        torch.testing.assert_close(cached[index]["prefix_hidden_states"], expected, atol=1e-6, rtol=1e-6)


def test_features_stay_on_disk(model, make_images, tmp_path):
    cached = cache_features(model, make_images(), tmp_path)
    cached[0]
    assert isinstance(cached.file._array, np.memmap)
    assert len(pickle.dumps(cached)) < Path(cached.file.path).stat().st_size / 10
    copy = pickle.loads(pickle.dumps(cached))
    assert copy.file._array is None
    assert torch.equal(copy[3]["prefix_hidden_states"], cached[3]["prefix_hidden_states"])


def test_workers_see_the_epoch(model, make_images, tmp_path):
    cached = cache_features(model, make_images(seed=7), tmp_path, num_views=2)
    loader = torch.utils.data.DataLoader(cached, batch_size=15, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        cached.set_epoch(epoch)
        (batch,) = loader
        expected = torch.stack([cached[index]["prefix_hidden_states"] for index in range(15)])
        assert torch.equal(batch["prefix_hidden_states"], expected)


def test_a_full_disk_is_noticed_before(model, make_images, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(cache_files.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"need 0\.0 GB in .*, where 0\.0 GB are free; lower cache_views \(now 1\)"):
        cache_features(model, make_images(), tmp_path)


def test_refused_where_prompts_enter_the_first_layer(recipe, tmp_path):
    with pytest.raises(ValueError, match=r"cache_features: .* prompts enter the first layer\. Set first_prompt_layer"):
        train(recipe(cache_features=True, cache_dir=str(tmp_path / "cache")))
    with pytest.raises(ValueError, match="prompts enter the first layer"):
        train(recipe(cache_features=True, class_prompt_layer=0, cache_dir=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


def test_a_step_costs_the_remaining_layers(model, make_images):
    """Two of three layers are left; counted in multiplications, embedding left aside."""
    pixels, labels = torch.zeros(8, 3, 32, 32), torch.zeros(8, dtype=torch.long)
    prefix = model.encode_prefix(pixels)

    def cost(function) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    whole = cost(lambda: model(pixels, labels=labels).loss.backward())
    rest = cost(lambda: model(prefix_hidden_states=prefix, labels=labels).loss.backward())
    assert whole - rest == cost(lambda: model.encode_prefix(pixels))
    assert rest < whole


def test_grid_of_a_backbone_made_for_another_size(make_images, tmp_path):
    """DINOv2 is published at 518 pixels and used at 224: the grid is not the one in its configuration."""
    backbone = Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=8)
    ).eval()
    model = PromptCAMForImageClassification.from_backbone(
        backbone, id2label={0: "red", 1: "green", 2: "blue"}, num_agnostic_prompts=0
    )
    images = make_images()
    cached = cache_features(model, images, tmp_path)
    batch = FeatureCollator(GRID)([cached[index] for index in range(3)])
    expected = model(torch.stack([images[index]["pixel_values"] for index in range(3)]), labels=batch["labels"])
    torch.testing.assert_close(model(**batch).loss, expected.loss)
