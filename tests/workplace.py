# SPDX-License-Identifier: MIT
"""A folder with what the documentation takes for granted, under the names that it uses."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone_config, tiny_model
from PIL import Image
from test_parity import Official
from transformers import ViTForImageClassification

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.explain import explain

COLOURS = {
    "House Sparrow": (200, 60, 40),
    "Tree Sparrow": (40, 60, 200),
    "Cardinal": (220, 30, 140),
    "Blue Jay": (60, 200, 60),
    "Steller Jay": (200, 200, 60),
}
# As many patches as the tiny models of other tests have, though larger ones.
SIZES = {"image_size": 64, "patch_size": 16}
TREE = """species,genus,family
Blue Jay,Cyanocitta,Corvidae
Steller's Jay,Cyanocitta,Corvidae
Common Raven,Corvus,Corvidae

House Sparrow,Passer,Passeridae
"""


def sharpen(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    """Sharpen the attention, which covers the whole image with random weights."""
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "query" in name:
            parameter.data *= factor
    return model


def save_photos(folder: Path) -> None:
    """Noise of one colour for each class."""
    random = np.random.default_rng(0)
    for split, numbers in (("train", range(10)), ("test", (3, 4))):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for number in numbers:
                pixels = random.normal(colour, 40, (48, 60, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number:04}.jpg")


def save_taxonomy(folder: Path, tree: Taxonomy) -> None:
    """A random model with a prompt set for each level, the leaves' in use."""
    model = None
    for level in reversed(tree.levels):
        alone = tiny_model(id2label=dict(enumerate(tree.nodes(level))), num_agnostic_prompts=0)
        if model is None:
            model = copy.deepcopy(alone)
            model.config.prompts_in_use = level
            model = PromptCAMForImageClassification(model.config).eval()
            model.load_state_dict(alone.state_dict())
        else:
            generator = torch.Generator().manual_seed(len(level))
            parts = {key: value for key, value in alone.state_dict().items() if not key.startswith("backbone.")}
            parts["class_prompts"] = 3 * torch.randn(parts["class_prompts"].shape, generator=generator)
            model.add_prompts(level, id2label=alone.config.id2label, num_agnostic_prompts=0, state_dict=parts)
    model.set_prompts(tree.leaf_level)
    model.save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    (folder / "taxonomy.csv").write_text(tree.to_csv())


def save_cub(folder: Path) -> None:
    """One image of CUB-200-2011 with its annotations."""
    image = "017.Cardinal/Cardinal_0001_17057.jpg"
    (folder / "images" / image).parent.mkdir(parents=True)
    (folder / "parts").mkdir()
    Image.new("RGB", (50, 40)).save(folder / "images" / image)
    for name, text in {
        "images.txt": f"1 {image}\n",
        "bounding_boxes.txt": "1 5.0 5.0 40.0 30.0\n",
        "parts/parts.txt": "2 beak\n5 crown\n",
        "parts/part_locs.txt": "1 2 10.0 10.0 1\n1 5 30.0 20.0 1\n",
    }.items():
        (folder / name).write_text(text)


def make(folder: Path) -> None:
    """Fill a folder, which is the working directory."""
    save_photos(folder / "photos")
    shutil.copytree(folder / "photos" / "test", folder / "my_examples")
    random = np.random.default_rng(0)
    images = (Image.fromarray(random.integers(0, 256, (150, 200, 3), dtype=np.uint8)) for _ in range(99))
    bird = next(images)
    for name in ("bird.jpg", "blue_jay.jpg"):
        bird.save(folder / name)

    # The bird is a Steller Jay to the model, and the misread image is not.
    tiny = sharpen(tiny_model(backbone_fields=SIZES), 30)
    image_processor = build_image_processor(SIZES["image_size"])
    predicted = explain(tiny, "bird.jpg", image_processor=image_processor).prediction.number
    others = iter(sorted(COLOURS.keys() - {"Steller Jay"}))
    id2label = {number: "Steller Jay" if number == predicted else next(others) for number in range(len(COLOURS))}
    tiny.backbone.save_pretrained("facebook/dino-vitb16")
    model = PromptCAMForImageClassification.from_backbone("facebook/dino-vitb16", id2label=id2label)
    model.load_state_dict(tiny.state_dict())
    for name in ("my_model", "me/garden-birds"):
        model.save_pretrained(name)
    ViTForImageClassification(tiny_backbone_config(**SIZES, id2label=id2label)).save_pretrained("my_probe")
    for name in ("my_model", "me/garden-birds", "my_probe", "facebook/dino-vitb16"):
        image_processor.save_pretrained(name)
    misread = ""
    while misread in ("", "Steller Jay"):
        next(images).save("misread.jpg")
        misread = explain("my_model", "misread.jpg").prediction.label

    model.add_prompts("fish", id2label={0: "Cod", 1: "Perch"})
    model.save_pretrained("fish", prompts="fish")
    Path("tree.csv").write_text(TREE)
    save_taxonomy(Path("birds"), read_taxonomy("tree.csv"))
    (folder / "recipe.yaml").write_text("backbone: facebook/dino-vitb16\nlearning_rate: 0.01\n")
    official = Official("vit_c7").state_dict
    # The official checkpoint has images of 224 pixels, and two classes.
    official["pos_embed"] = torch.randn(1, 1 + 14 * 14, 48)
    official["vpt.prompt_embeddings"] = official["vpt.prompt_embeddings"][:, :2]
    torch.save({"model_state_dict": official}, folder / "model.pt")
    for name in ("001.Black_footed_Albatross", "002.Laysan_Albatross"):
        for split in ("train", "test"):
            (folder / "CUB" / split / name).mkdir(parents=True)
            Image.new("RGB", (60, 40), (30, 90, 160)).save(folder / "CUB" / split / name / "1.jpg")
    save_cub(folder / "CUB_200_2011")


@pytest.fixture(scope="module", name="made")
def fixture_made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make(folder)
    return folder


@pytest.fixture(name="workplace")
def fixture_workplace(made, tmp_path, monkeypatch) -> Path:
    """A copy of its own for a test, which is the working directory."""
    folder = tmp_path / "workplace"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    return folder
