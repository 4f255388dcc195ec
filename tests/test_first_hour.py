# SPDX-License-Identifier: MIT
"""docs/first_hour.md: every command of the program runs as it stands, in this order, on photos that are drawn here."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_backbone_config
from PIL import Image
from transformers import ViTModel
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor

PAGE = Path(__file__).parents[1] / "docs" / "first_hour.md"
TEXT = PAGE.read_text()
COMMANDS = re.findall(r"^prompt-cam (.*)$", TEXT, flags=re.MULTILINE)
# By the command, what the page says is there afterwards.
MADE = {
    "train": ("my_model/model.safetensors", "my_model/learning_curve.png", "my_model/confusion_test.png"),
    "predict": (),
    "explain": ("traits/bird.traits.png", "traits/bird.traits.json", "traits/bird.traits.csv"),
    "compare": ("both/bird.comparison.png",),
    "remove": ("without/bird.removal.png",),
    "atlas": ("atlas/index.html",),
    "evaluate": ("report/index.html",),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with photos of two classes, and a tiny backbone in place of the one that would be fetched."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    backbone = "facebook/dino-vitb16"
    model = ViTModel(tiny_backbone_config(), add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "query" in name:
            parameter.data *= 100  # sharper attention than that of random weights, which covers the whole image
    model.save_pretrained(backbone)
    build_image_processor(32).save_pretrained(backbone)
    random = np.random.default_rng(0)
    for name, colour in (("House Sparrow", (200, 60, 40)), ("Tree Sparrow", (40, 60, 200))):
        for split, count in (("train", 20), ("test", 5)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.normal(colour, 40, (48, 60, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpg")
    shutil.copy(tmp_path / "photos" / "test" / "House Sparrow" / "0.jpg", "bird.jpg")
    return tmp_path


def test_every_command_runs_and_makes_what_the_page_says(workplace):
    assert [command.split()[0] for command in COMMANDS] == list(MADE)
    for command in COMMANDS:
        answer = CliRunner().invoke(app, shlex.split(command))
        assert answer.exit_code == 0, f"{command}\n{answer.output}"
        name = command.split()[0]
        for path in MADE[name]:
            assert (workplace / path).is_file(), path
        if name == "predict":
            assert "10 of 10" in answer.output, answer.output


def test_links_lead_to_files_and_headings():
    headings = {
        re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in re.findall("^#+ (.*)", TEXT, re.M)
    }
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        path, _, heading = target.partition("#")
        assert (PAGE.parent / path).exists(), target
        assert path or heading in headings, target
