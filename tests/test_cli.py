# SPDX-License-Identifier: MIT
"""The command line, as a user types it."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
from conftest import ID2LABEL, tiny_backbone_config
from PIL import Image
from transformers import ViTForImageClassification, pipeline
from typer.testing import CliRunner

from prompt_cam_hf.cli import app


@pytest.fixture
def photos(tmp_path):
    """Three images at two depths, a hidden one, and a file that is none."""
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for name in ("b.png", "a.jpg", "more/c.png", ".hidden.png"):
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photos / name)
    (photos / "notes.txt").write_text("not an image")
    return photos


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_formats_agree_with_the_pipeline(model_folder, photos):
    files = [photos / "a.jpg", photos / "b.png", photos / "more" / "c.png"]
    expected = pipeline("image-classification", model=str(model_folder))([str(f) for f in files], top_k=2)

    answer = run("predict", model_folder, photos, "--top-k", 2, "--format", "json", "--batch-size", 2)
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)
    assert [row["image"] for row in rows] == [str(file) for file in files]
    for row, wanted in zip(rows, expected, strict=True):
        assert [p["label"] for p in row["predictions"]] == [w["label"] for w in wanted]
        assert [p["score"] for p in row["predictions"]] == pytest.approx([w["score"] for w in wanted], abs=1e-6)

    table = list(csv.DictReader(io.StringIO(run("predict", model_folder, photos, "--format", "csv").stdout)))
    assert [row["image"] for row in table] == [str(file) for file in files]
    assert [row["label"] for row in table] == [wanted[0]["label"] for wanted in expected]
    assert {row["rank"] for row in table} == {"1"}

    shown = run("predict", model_folder, files[0], "--top-k", 99).stdout
    assert all(name in shown for name in ID2LABEL.values())


def test_the_table_shows_the_shortest_names_that_tell_images_apart(model_folder, photos):
    def first_column() -> list[str]:
        printed = run("predict", model_folder, photos).stdout.splitlines()
        return [line.split()[1] for line in printed if line.startswith("│")]

    assert first_column() == ["a.jpg", "b.png", "c.png"]
    (photos / "more" / "a.jpg").write_bytes((photos / "a.jpg").read_bytes())
    assert first_column() == ["a.jpg", "b.png", "more/a.jpg", "more/c.png"]


def test_images_in_class_folders_are_counted(model_folder, photos):
    """Class folders lie at any depth, with a number in front or without."""
    assert "Read correctly" not in run("predict", model_folder, photos).stderr
    rows = json.loads(run("predict", model_folder, photos, "--format", "json").stdout)
    predicted = [row["predictions"][0]["label"] for row in rows]
    wrong = next(name for name in ID2LABEL.values() if name != predicted[0])
    folders = [f"test/007.{predicted[0]}", f"test/{wrong}/deep", "test/unknown"]
    for row, folder in zip(rows, folders, strict=True):
        (photos / folder).mkdir(parents=True)
        shutil.copy(row["image"], photos / folder)
    right = 1 + (predicted[1] == wrong)
    answer = run("predict", model_folder, photos / "test")
    sentence = f"Read correctly: {right} of 2 images that lie in folders called like a class ({right / 2:.1%})."
    assert answer.stderr.splitlines()[-1] == sentence
    shutil.rmtree(photos / "test" / "unknown")
    answer = run("predict", model_folder, photos / "test", "--format", "json")
    assert answer.stderr.splitlines()[-1] == f"Read correctly: {right} of 2 images ({right / 2:.1%})."
    assert len(json.loads(answer.stdout)) == 2


def test_unreadable_images_are_named_and_left_out(model_folder, photos):
    (photos / "aa.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    answer = run("predict", model_folder, photos, "--format", "json")
    assert answer.exit_code == 1
    assert "aa.jpg" in answer.stderr
    assert [row["image"].rsplit("/")[-1] for row in json.loads(answer.stdout)] == ["a.jpg", "b.png", "c.png"]


def test_mistakes_get_one_sentence(model_folder, photos, tmp_path):
    ViTForImageClassification(tiny_backbone_config()).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    for arguments, message in [
        ((model_folder, tmp_path / "nowhere"), "There is no file or folder"),
        ((model_folder, ""), "an empty name; the current folder is called ."),
        ((model_folder, tmp_path / "empty"), "holds no images"),
        ((tmp_path / "other", photos), "is a model of type 'vit', not a Prompt-CAM"),
    ]:
        answer = run("predict", *arguments)
        assert answer.exit_code == 2
        assert message in " ".join(answer.stderr.split())
        assert answer.stdout == ""
