# SPDX-License-Identifier: MIT
"""Numbers on the images that a model was trained on say that they are: in the log, in atlas.json and on the page."""

import json
import shutil

import pytest
from conftest import ID2LABEL, random_images
from PIL import Image

from prompt_cam_hf.class_atlas import atlas
from prompt_cam_hf.data.labelled_images import LabelledImages, read_labelled_images
from prompt_cam_hf.data.trained_on import count_trained_on


@pytest.fixture
def photos(tmp_path):
    """Four images to train on, two to test on."""
    pixels = random_images(6).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()
    for number in range(6):
        folder = tmp_path / "photos" / ("train" if number < 4 else "test") / ID2LABEL[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    return tmp_path / "photos"


def count(model, data, split=None):
    return count_trained_on(model, data, read_labelled_images(data, ID2LABEL, split=split))


def test_images_are_found_in_the_data_of_the_recipe(photos, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"data: {photos}\n")
    assert count(tmp_path, photos) == 0  # the test split
    assert count(tmp_path, photos, "train") == 4
    assert count(tmp_path, photos / "train") == 4
    assert count(tmp_path, photos / "test") == 0
    assert count(tmp_path, photos / "train" / "class 0" / ".." / ".." / "train") == 4
    assert count(tmp_path, photos / "train" / "class 1") == 2  # images in no class folder
    shutil.copytree(photos, tmp_path / "copy")
    assert count(tmp_path, tmp_path / "copy", "train") == 0
    # A table may hold some of both.
    table = tmp_path / "some.csv"
    table.write_text("image,label\nphotos/train/class 0/0.png,class 0\nphotos/test/class 0/4.png,class 0\n")
    assert count(tmp_path, table) == 1
    (tmp_path / "recipe.yaml").write_text(f"data: {photos / 'test'}\n")
    assert count(tmp_path, photos / "test") == 2  # data that are not divided are all trained on
    assert count(tmp_path, photos, "train") == 0


def test_a_data_set_of_the_hub_is_known_by_its_id(photos, tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: somebody/birds\n")
    rows = read_labelled_images(photos, ID2LABEL).images
    for split, trained_on in (("train", 2), ("validation", 0), ("test", 0)):
        images = LabelledImages(rows, [0, 1], "somebody/birds", split=split)
        assert count_trained_on(tmp_path, "somebody/birds", images) == trained_on
        assert count_trained_on(tmp_path, "somebody/plants", images) is None


@pytest.mark.parametrize(
    "recipe", [None, "method: prompt_cam\n", "- a\n", "data: [", "data: /nowhere/at/all\n", "\x00"]
)
def test_without_a_readable_recipe_nothing_is_known(photos, tmp_path, recipe):
    if recipe is not None:
        (tmp_path / "recipe.yaml").write_text(recipe)
    assert count(tmp_path, photos) is None and count("somebody/model", photos) is None


def test_an_atlas_says_so(model_folder, photos, tmp_path, caplog):
    def warning(split):
        caplog.clear()
        result = atlas(model_folder, photos, tmp_path / "atlas", split=split, overwrite=True)
        facts, page = json.loads(result.facts.read_text()), result.page.read_text()
        assert facts["split"] == split and f"split {split}" in page
        if facts["warning"] is None:
            assert "Weak numbers" not in page and not caplog.text
        else:
            assert facts["warning"] in page and facts["warning"] in caplog.text
        return facts["num_trained_on"], facts["warning"]

    assert warning("test") == (None, None)
    assert warning("train")[0] is None and "if the model was trained on them" in warning("train")[1]
    (model_folder / "recipe.yaml").write_text(f"data: {photos}\n")
    assert warning("test") == (0, None)
    assert warning("train")[0] == 4 and "was trained on all of these images" in warning("train")[1]
    table = photos / "mixed.csv"
    table.write_text("image,label\ntrain/class 0/0.png,class 0\ntest/class 0/4.png,class 0\n")
    facts = json.loads(atlas(model_folder, table, tmp_path / "mixed").facts.read_text())
    assert facts["num_trained_on"] == 1 and "was trained on 1 of 2 of these images" in facts["warning"]
