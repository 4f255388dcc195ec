# SPDX-License-Identifier: MIT
"""The Python of README.md runs as it stands, and its commands and links lead somewhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_backbone_config, tiny_model
from PIL import Image
from test_parity import Official
from transformers import ViTModel

from prompt_cam_hf.data.images import build_image_processor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the README takes for granted, under the names that it uses."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my_model")
    build_image_processor(32).save_pretrained("my_model")
    Image.new("RGB", (60, 40), (30, 90, 160)).save("bird.jpg")
    for name in ("House Sparrow", "Tree Sparrow"):
        folder = tmp_path / "photos" / "train" / name
        folder.mkdir(parents=True)
        shutil.copy("bird.jpg", folder / "0001.jpg")
    backbone = ViTModel(tiny_backbone_config(image_size=224, patch_size=16), add_pooling_layer=False)
    backbone.save_pretrained("facebook/dino-vitb16")
    build_image_processor(224).save_pretrained("facebook/dino-vitb16")
    official = Official("vit_c7").state_dict
    # The README's checkpoint has images of 224 pixels and two classes.
    official["pos_embed"] = torch.randn(1, 1 + 14 * 14, 48)
    official["vpt.prompt_embeddings"] = official["vpt.prompt_embeddings"][:, :2]
    torch.save({"model_state_dict": official}, "model.pt")
    return tmp_path


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_python_runs(workplace, number):
    run = subprocess.run([sys.executable, "-c", SNIPPETS[number]], cwd=workplace, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_links_lead_to_files():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_what_the_commands_make_is_not_committed():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    made = set(re.findall(r"(?:--out|--output_dir) (\w\S*)|--data (\w+)", README))
    assert {f"/{name}/" for pair in made for name in pair if name} <= {*ignored}


def test_recipes_and_commands_exist():
    for recipe in re.findall(r"training/recipes/\w+\.yaml", README):
        assert (ROOT / recipe).exists(), recipe
    assert len(SNIPPETS) == 6
