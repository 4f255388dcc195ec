# SPDX-License-Identifier: MIT
"""`prompt-cam explain` and `prompt-cam compare`, as a user types them."""

import csv
import json

import numpy as np
import pytest
from conftest import tiny_backbone_config
from PIL import Image
from transformers import ViTForImageClassification
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.explanations.explain import explain


@pytest.fixture
def photos(tmp_path):
    """Images of one name in two folders, and two that differ in their ending."""
    random = np.random.default_rng(0)
    photos = tmp_path / "photos"
    for name in ("jay/1.png", "robin/1.png", "robin/2.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photos / name)
    return photos


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_explain_writes_and_prints_what_the_library_says(model_folder, photos, tmp_path):
    out = tmp_path / "new" / "out"
    options = ("--classes", "class_3", "--classes", "Class 0", "--kind", "evidence", "--method", "shapley")
    answer = run("explain", model_folder, photos, "--out", out, "--heads", 2, *options)
    assert answer.exit_code == 0, answer.output
    names = ("jay/1", "robin/1", "robin/2")
    assert files_in(out) == sorted(f"{name}.traits.{kind}" for name in names for kind in ("csv", "json", "png"))
    for name in names:
        image = photos / f"{name}.png"
        expected = explain(model_folder, image, ["class 3", "class 0"], kind="evidence", method="shapley")
        assert str(expected).splitlines()[0] in answer.stdout
        written = json.loads((out / f"{name}.traits.json").read_text())
        for traits, wanted in zip(written.pop("classes"), expected.classes, strict=True):
            assert traits["label"] == wanted.label and tuple(traits["head_order"]) == wanted.head_order
            # The folder's images went through the network in one batch, `expected` alone.
            np.testing.assert_allclose(traits["maps"], wanted.maps, atol=1e-6)
        facts = json.loads(expected.to_json())
        assert [score["label"] for score in written.pop("top")] == [score["label"] for score in facts.pop("top")]
        del facts["classes"]
        assert written == facts
        with open(out / f"{name}.traits.csv", newline="") as file:
            assert len(list(csv.DictReader(file))) == 2 * 4
        assert Image.open(out / f"{name}.traits.png").format == "PNG"


def test_images_of_one_name_keep_apart(model_folder, photos, tmp_path):
    Image.open(photos / "robin/2.png").save(photos / "robin/2.jpg")
    out = tmp_path / "out"
    answer = run("explain", model_folder, photos / "robin", photos / "robin" / "2.jpg", "--out", out)
    assert answer.exit_code == 0, answer.output
    assert {name.rsplit(".", 2)[0] for name in files_in(out)} == {"1.png", "2.jpg", "2.png"}
    assert json.loads((out / "2.jpg.traits.json").read_text())["image"].endswith("2.jpg")
    assert answer.stdout.count("2.jpg:") == 1
    one = tmp_path / "one"
    run("explain", model_folder, photos / "robin" / "2.jpg", "--out", one)
    assert files_in(one) == ["2.traits.csv", "2.traits.json", "2.traits.png"]


def test_unreadable_images_are_named_and_left_out(model_folder, photos, tmp_path):
    (photos / "jay/0.jpg").write_bytes(b"broken")
    answer = run("explain", model_folder, photos / "jay", "--out", tmp_path / "out")
    assert answer.exit_code == 1
    assert "Left out" in answer.stderr and "0.jpg" in answer.stderr
    assert files_in(tmp_path / "out") == ["1.traits.csv", "1.traits.json", "1.traits.png"]


def test_compare(model_folder, photos, tmp_path):
    image, out = photos / "jay/1.png", tmp_path / "out"
    scores = explain(model_folder, image).scores
    answer = run("compare", model_folder, image, "--true", scores[1].label, "--out", out, "--outline")
    assert answer.exit_code == 0, answer.output
    assert f"truly {scores[1].label}" in answer.stdout
    assert files_in(out) == ["1.comparison.csv", "1.comparison.json", "1.comparison.png"]
    text = json.loads((out / "1.comparison.json").read_text())
    assert [traits["label"] for traits in text["classes"]] == [scores[1].label, scores[0].label]
    answer = run("compare", model_folder, image, "--classes", "class 1", "--classes", "class 2", "--out", out / "2")
    assert answer.exit_code == 0 and "truly" not in answer.stdout


def test_nothing_is_overwritten_or_deleted(model_folder, photos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    (out / "2.traits.csv").write_text("old")
    arguments = ("explain", model_folder, photos / "robin", "--out", out)
    answer = run(*arguments)
    assert answer.exit_code == 2 and "2.traits.csv exists already" in answer.stderr
    (out / "2.traits.json").write_text("old")
    assert "2.traits.json and 1 more exist already; choose another" in " ".join(run(*arguments).stderr.split())
    (out / "2.traits.json").unlink()
    assert files_in(out) == ["2.traits.csv", "mine.txt"] and (out / "2.traits.csv").read_text() == "old"
    assert run(*arguments, "--overwrite").exit_code == 0
    assert (out / "mine.txt").read_text() == "keep" and (out / "2.traits.csv").read_text() != "old"

    Image.open(photos / "jay/1.png").save(photos / "robin" / "3.traits.png")
    Image.open(photos / "jay/1.png").save(photos / "robin" / "3.png")
    before = (photos / "robin" / "3.traits.png").read_bytes()
    answer = run("explain", model_folder, photos / "robin", "--out", photos / "robin", "--overwrite")
    assert answer.exit_code == 2 and "would replace one of the images" in answer.stderr
    assert (photos / "robin" / "3.traits.png").read_bytes() == before


def test_mistakes_get_one_sentence_and_write_nothing(model_folder, photos, tmp_path):
    ViTForImageClassification(tiny_backbone_config()).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    image, out = photos / "jay/1.png", ("--out", tmp_path / "out")
    (photos / "notes.txt").write_text("not an image")
    best = explain(model_folder, image).prediction.label
    for arguments, message in [
        (("explain", model_folder, image, "--classes", "clas 3"), "did you mean 'class 3'"),
        (("explain", model_folder, image, "--heads", 5), "the model has 4 heads, so 1 to 4 can be shown"),
        (("explain", model_folder, tmp_path / "empty"), "holds no images"),
        (("explain", model_folder, tmp_path / "nowhere"), "There is no file or folder"),
        (("explain", tmp_path / "other", image), "is a model of type 'vit', not a Prompt-CAM"),
        (("compare", model_folder, image, "--classes", "class 1"), "a comparison needs two"),
        (("compare", model_folder, image, "--true", best), "is classified correctly"),
        (("compare", model_folder, image, "--true", "x", "--classes", "y"), "Give either"),
        (("compare", model_folder, image, "--true", "x", "--heads", 9), "the model has 4 heads"),
        (("compare", model_folder, photos / "notes.txt", "--true", "class 1"), "Cannot read the image"),
        (("compare", model_folder, tmp_path / "nowhere.jpg", "--true", "class 1"), "nowhere.jpg"),
    ]:
        answer = run(*arguments, *out)
        assert answer.exit_code == 2, (arguments, answer.output)
        assert message in " ".join(answer.stderr.split()), answer.stderr
        assert answer.stdout == "" and not out[1].exists()
