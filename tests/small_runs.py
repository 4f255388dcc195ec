# SPDX-License-Identifier: MIT
"""Runs of a second: coloured squares, a tiny backbone, and a recipe for them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel
from transformers.trainer_utils import set_seed

from prompt_cam_hf.training.recipe import Recipe
from prompt_cam_hf.training.train import train

COLOURS = {"001.red": (220, 40, 40), "002.green": (40, 200, 40), "003.blue": (40, 40, 220)}
NUM_TRAIN, NUM_TEST = 10, 5  # a class; one of ten is held out for validation


@pytest.fixture(scope="module", name="photos")
def fixture_photos(tmp_path_factory) -> Path:
    """Noise with one coloured square somewhere: its colour is the class."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, number in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = random.integers(0, 90, (40, 40, 3)).astype(np.uint8)
                top, left = random.integers(0, 24, 2)
                pixels[top : top + 16, left : left + 16] = colour
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module", name="backbone")
def fixture_backbone(tmp_path_factory) -> Path:
    """A random tiny ViT whose attention and colours are not negligible, as they would be after Trainer's own init."""
    folder = tmp_path_factory.mktemp("backbone")
    set_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
    )
    model = ViTModel(config, add_pooling_layer=False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(name="recipe")
def fixture_recipe(photos, backbone, tmp_path):
    """A recipe that learns the colours in a second; keywords change it."""

    def make(**changes) -> Recipe:
        settings = {
            "backbone": str(backbone),
            "data": str(photos),
            "output_dir": str(tmp_path / "out"),
            "image_size": 32,
            "learning_rate": 0.1,
            "train_batch_size": 8,
            "num_train_epochs": 6,
            "warmup_epochs": 1,
            "dataloader_num_workers": 0,
        }
        return Recipe(**(settings | changes))

    return make


def log_of(folder: str | Path, key: str) -> list[tuple[int, float]]:
    """(step, value) of every log line that has `key`."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return [(line["step"], line[key]) for line in history if key in line]


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first: str | Path, second: str | Path) -> None:
    """Bit for bit."""
    first, second = weights_of(first), weights_of(second)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def as_arguments(recipe: Recipe) -> list[str]:
    """The recipe as a command line, behind a recipe file that has nothing but the backbone."""
    path = Path(recipe.output_dir).with_suffix(".yaml")
    path.write_text(f"backbone: {recipe.backbone}\n")
    defaults = {key.name: key.default for key in dataclasses.fields(Recipe)}
    changed = {name: value for name, value in vars(recipe).items() if value != defaults[name]}
    lists = ("image_mean", "image_std", "trainer", "backbone")
    return [str(path), *(f"--{name}={value}" for name, value in changed.items() if name not in lists)]


@pytest.fixture(scope="module", name="finished")
def fixture_finished(photos, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    recipe = Recipe(
        backbone=str(backbone), data=str(photos), output_dir=str(folder), image_size=32, learning_rate=0.1,
        train_batch_size=8, num_train_epochs=8, warmup_epochs=1, dataloader_num_workers=0,
    )  # fmt: skip
    return recipe, train(recipe)
