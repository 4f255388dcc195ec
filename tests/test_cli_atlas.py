# SPDX-License-Identifier: MIT
"""`prompt-cam atlas`, as a user types it."""

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from prompt_cam_hf.cli import app


@pytest.fixture
def photos(tmp_path):
    """Two class folders with two images each."""
    random = np.random.default_rng(0)
    for label in (1, 3):
        folder = tmp_path / "photos" / f"class {label}"
        folder.mkdir(parents=True)
        for name in ("a.png", "b.jpg"):
            Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / name)
    return tmp_path / "photos"


def run(*arguments):
    return CliRunner().invoke(app, ["atlas", *(str(argument) for argument in arguments)])


def test_an_atlas_is_made_once(model_folder, photos, tmp_path):
    out = tmp_path / "out"
    answer = run(model_folder, photos, "--out", out, "--top-heads", 2, "--examples", 1, "--method", "shapley")
    assert answer.exit_code == 0, answer.output
    assert {path.name for path in out.iterdir()} == {"atlas.json", "classes.parquet", "images.parquet", "index.html"}
    assert answer.stdout.startswith("4 images of 5 classes, ") and str(out / "index.html") in answer.stdout
    page = (out / "index.html").read_text(encoding="utf-8")
    assert "are the first 2." in page and "shapley ranking" in page
    assert str(tmp_path) not in page

    again = run(model_folder, photos, "--out", out)
    assert again.exit_code == 2 and "Error: " in again.stderr and "exists already" in again.stderr
    assert (out / "index.html").read_text(encoding="utf-8") == page
    assert run(model_folder, photos, "--out", out, "--overwrite").exit_code == 0
    assert (out / "index.html").read_text(encoding="utf-8") != page


def test_unreadable_images_are_listed_and_left_out(model_folder, photos, tmp_path):
    (photos / "class 1" / "torn.jpg").write_bytes(b"torn")
    answer = run(model_folder, photos, "--out", tmp_path / "out")
    assert answer.exit_code == 1
    assert answer.stdout.startswith("4 images of 5 classes")
    assert "class 1/torn.jpg" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def test_mistakes_get_one_sentence(model_folder, photos, tmp_path):
    out = tmp_path / "out"
    for arguments, sentence in (
        ((model_folder, photos, "--top-heads", 5), "4 heads, so 1 to 4"),
        ((model_folder, tmp_path / "nowhere"), "no folder or file"),
        ((model_folder, photos, "--split", "test"), "no split 'test'; they have train"),
        ((photos, photos), "photos"),
    ):
        answer = run(*arguments, "--out", out)
        assert answer.exit_code == 2 and sentence in answer.stderr, answer.output
        assert "Traceback" not in answer.output
    assert not out.exists()
