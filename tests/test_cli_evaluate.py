# SPDX-License-Identifier: MIT
"""`prompt-cam evaluate`, as a user types it."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import tiny_backbone_config, tiny_model
from PIL import Image
from typer.testing import CliRunner

from prompt_cam_hf.baselines import build_linear_probe
from prompt_cam_hf.birds import BIRD_CLASSES
from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.card import read_card_facts, render_card
from prompt_cam_hf.metrics.localization import patch_mask
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone

IMAGE_SIZE = (60, 40)


@pytest.fixture
def photos(tmp_path):
    """Two class folders with two images each."""
    random = np.random.default_rng(0)
    for label in (1, 3):
        folder = tmp_path / "photos" / f"class {label}"
        folder.mkdir(parents=True)
        for name in (f"a_{label}.png", f"b_{label}.jpg"):
            Image.fromarray(random.integers(0, 256, (*IMAGE_SIZE[::-1], 3), dtype=np.uint8)).save(folder / name)
    return tmp_path / "photos"


def run(*arguments):
    return CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])


def metrics_of(out):
    return json.loads((out / "evaluation.json").read_text())["metrics"]


def test_a_report_is_made_once(model_folder, photos, tmp_path):
    out, probe = tmp_path / "out", tmp_path / "probe"
    build_linear_probe(build_backbone(tiny_backbone_config()), id2label=tiny_model().config.id2label).save_pretrained(
        probe
    )
    build_image_processor(32).save_pretrained(probe)
    arguments = (model_folder, "--data", photos, "--baseline", probe, "--baseline-map", "hires_cam", "--out", out)
    arguments += ("--metrics", "faithfulness", "--metrics", "specificity", "--preset", "fast", "--classes", "true")
    answer = run(*arguments)
    assert answer.exit_code == 0, answer.output
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json", "measurements.parquet", "curves.svg", "index.html",
    }  # fmt: skip
    assert answer.stdout.rstrip().endswith(str(out / "index.html"))
    for title in ("Accuracy", "Faithfulness", "Specificity"):
        assert title in answer.stdout
    assert "Localisation" not in answer.stdout and "Sanity" not in answer.stdout
    for metric, facts in metrics_of(out).items():
        shown = f"{facts['value']:.3f} [{facts['low']:.3f}, {facts['high']:.3f}]"
        assert any(
            metric in line and shown in line and f" {facts['num_images']} " in line and facts["protocol"] in line
            for line in answer.stdout.splitlines()
        ), metric
    assert metrics_of(out)["insertion"]["protocol"] == "fast, true class"
    assert "probe: hires_cam" in answer.stdout

    page = (out / "index.html").read_text(encoding="utf-8")
    again = run(*arguments)
    assert again.exit_code == 2 and "exists already" in again.stderr and "--overwrite" in again.stderr
    assert (out / "index.html").read_text(encoding="utf-8") == page
    assert run(*arguments, "--limit", 2, "--overwrite").exit_code == 0
    assert metrics_of(out)["insertion"]["num_images"] == 2 and metrics_of(out)["accuracy"]["num_images"] == 4


def test_a_model_card_shows_the_evaluation(model_folder, photos, tmp_path):
    out = tmp_path / "out"
    answer = run(model_folder, "--data", photos, "--metrics", "faithfulness", "--preset", "fast", "--out", out)
    assert answer.exit_code == 0, answer.output
    data = read_card_facts(
        model_folder, "me/birds", tiny_model(), build_image_processor(32), license="mit", evaluation_folder=out
    )
    card = str(render_card(data))
    for metric, facts in metrics_of(out).items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {metric} |"))
        assert f"{facts['value']:.4g}" in row and f"{facts['low']:.4g} to " in row and facts["protocol"] in row


def test_drawn_birds_are_localised(tmp_path):
    """With the masks of the parts that define them."""
    model = tmp_path / "model"
    tiny_model(id2label={label: bird.name for label, bird in enumerate(BIRD_CLASSES)}).save_pretrained(model)
    build_image_processor(32).save_pretrained(model)
    arguments = (
        "--data",
        "drawn-birds",
        "--birds-per-class",
        1,
        "--metrics",
        "localisation",
        "--map",
        "attention_sum",
    )
    answer = run(model, *arguments, "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    found = metrics_of(tmp_path / "out")
    assert found["pointing game"]["protocol"] == "the drawn birds' parts, true class"
    assert found["pointing game"]["num_images"] == len(BIRD_CLASSES)
    assert 0 < found["chance of pointing"]["value"] < 0.5


@pytest.fixture
def cub(photos, tmp_path):
    """Annotations of two of the four images, in CUB's form."""
    folder = tmp_path / "CUB_200_2011"
    (folder / "parts").mkdir(parents=True)
    (folder / "images.txt").write_text("1 x/a_1.png\n2 x/b_3.jpg\n")
    (folder / "bounding_boxes.txt").write_text("1 0.0 0.0 30.0 40.0\n2 15.0 10.0 30.0 20.0\n")
    (folder / "parts" / "parts.txt").write_text("1 beak\n")
    (folder / "parts" / "part_locs.txt").write_text("1 1 5.0 5.0 1\n2 1 0.0 0.0 0\n")
    return folder


def test_cubs_annotations(model_folder, photos, cub, tmp_path):
    common = (model_folder, "--data", photos, "--metrics", "localisation", "--cub", cub)
    answer = run(*common, "--cub-mask", "box", "--out", tmp_path / "box")
    assert answer.exit_code == 0, answer.output
    rows = pq.read_table(tmp_path / "box" / "measurements.parquet").to_pylist()
    chances = {row["image"]: row["value"] for row in rows if row["metric"] == "chance of pointing"}
    whole = np.zeros(IMAGE_SIZE[::-1], bool)
    whole[:, :30] = True
    inner = np.zeros(IMAGE_SIZE[::-1], bool)
    inner[10:30, 15:45] = True
    expected = {"class 1/a_1.png": whole, "class 3/b_3.jpg": inner}
    assert chances == pytest.approx({name: patch_mask(mask, (4, 4)).mean() for name, mask in expected.items()})
    # The second image's part is not visible.
    assert run(*common, "--cub-mask", "parts", "--out", tmp_path / "parts").exit_code == 0
    found = metrics_of(tmp_path / "parts")["pointing game"]
    assert found["num_images"] == 1 and found["protocol"] == "CUB's part points, true class"
    answer = run(*common, "--out", tmp_path / "segmentation")
    assert answer.exit_code == 2 and "no folder segmentations" in answer.stderr


def test_fish_vistas_traits(model_folder, photos, tmp_path):
    masks = tmp_path / "fish" / "segmentation_masks"
    (masks / "images").mkdir(parents=True)
    (masks / "seg_id_trait_map.json").write_text('{"0": "Background", "1": "Head", "2": "Eye"}')
    numbers = np.zeros(IMAGE_SIZE[::-1], np.uint8)
    numbers[:, :30], numbers[10:30, 30:45] = 1, 2
    Image.fromarray(numbers).save(masks / "images" / "a_1.png")
    common = (model_folder, "--data", photos, "--metrics", "localisation", "--fish-vista", tmp_path / "fish")
    for name, traits, marked in (("all", (), numbers > 0), ("eye", ("Eye",), numbers == 2)):
        asked = [word for trait in traits for word in ("--fish-vista-trait", trait)]
        answer = run(*common, *asked, "--out", tmp_path / name)
        assert answer.exit_code == 0, answer.output
        rows = pq.read_table(tmp_path / name / "measurements.parquet").to_pylist()
        chances = {row["image"]: row["value"] for row in rows if row["metric"] == "chance of pointing"}
        assert chances == pytest.approx({"class 1/a_1.png": patch_mask(marked, (4, 4)).mean()})
    answer = run(*common, "--fish-vista-trait", "Wing", "--out", tmp_path / "wing")
    assert answer.exit_code == 2 and "no trait 'Wing'" in answer.stderr
    answer = run(*common, "--cub", tmp_path, "--out", tmp_path / "both")
    assert answer.exit_code == 2 and "not both" in answer.stderr


def test_unreadable_images_are_left_out(model_folder, photos, tmp_path):
    (photos / "class 1" / "torn.jpg").write_bytes(b"torn")
    answer = run(model_folder, "--data", photos, "--metrics", "specificity", "--out", tmp_path / "out")
    assert answer.exit_code == 1
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["num_unreadable"] == 1


def test_an_interruption_says_how_to_go_on(model_folder, photos, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    arguments = (model_folder, "--data", photos, "--metrics", "specificity", "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr("prompt_cam_hf.evaluation.build._measure_part", stop)
        answer = run(*arguments)
    assert answer.exit_code == 130 and "The same command goes on" in answer.stderr
    assert run(*arguments).exit_code == 0


def test_mistakes_get_one_sentence(model_folder, photos, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    for arguments, sentence in (
        ((model_folder, "--data", empty), "empty"),
        ((model_folder, "--data", tmp_path / "nowhere"), "nowhere"),
        ((tmp_path / "nowhere", "--data", photos), "nowhere"),
        ((model_folder, "--data", photos, "--map", "saliency"), "no map 'saliency'; choose among attention_sum"),
        ((model_folder, "--data", photos, "--metrics", "beauty"), "no metrics 'beauty'; choose among faithfulness"),
        ((model_folder, "--data", photos, "--preset", "slow"), "no preset 'slow'"),
        ((model_folder, "--data", photos, "--cub", empty), "no file"),
    ):
        answer = run(*arguments, "--out", out)
        assert answer.exit_code == 2 and sentence in answer.stderr, answer.output
        assert "Traceback" not in answer.output and answer.stderr.count("Error: ") == 1
    assert not out.exists()
