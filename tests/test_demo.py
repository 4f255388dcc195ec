# SPDX-License-Identifier: MIT
"""Does the demonstration learn, find the traits, keep what it made, and stay off the network?"""

import json
import re
import socket
from functools import partial
from itertools import count
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from conftest import tiny_model
from PIL import Image
from typer.testing import CliRunner

from prompt_cam_hf.birds import BIRD_CLASSES, PARTS, TRAIT_PARTS, birds_dataset, draw_bird, row_spec, unpack_masks
from prompt_cam_hf.birds import dataset as bird_drawing
from prompt_cam_hf.birds.evaluation import BirdReading, measure_localisation, measure_removal, read_birds
from prompt_cam_hf.birds.figures import plot_failures
from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.ranking import rank_heads
from prompt_cam_hf.explanations.removal import remove_region
from prompt_cam_hf.messages import own_command
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.training import demo as demo_module
from prompt_cam_hf.training.demo import DemoReport, run_demo

SMALL = {
    "birds_per_class": (10, 2, 3),
    "num_proc": 1,
    "num_train_epochs": 12,
    "warmup_epochs": 1,
    "eval_every_epochs": 6,
    "cache_views": 1,
    "train_batch_size": 16,
}


class Demo:
    """A scaled-down demonstration, run once, without a network."""

    def __init__(self, tmp_path: Path):
        self.folder = tmp_path / "demo"
        self.connections = []
        self.cache = tmp_path / "cache"
        self.draw = partial(birds_dataset, cache_dir=tmp_path / "drawn")
        self.run = partial(run_demo, self.folder, cache_dir=self.cache, **SMALL)

    def refuse(self, *arguments, **keywords):
        self.connections.append(arguments)
        raise OSError("there is no network")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    demo = Demo(tmp_path_factory.mktemp("demo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_module, "birds_dataset", demo.draw)
        # Without the switch that conftest sets, which no user of the demonstration has to know.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        for where, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(where, name, demo.refuse)
        demo.report = demo.run()
        yield demo


@pytest.fixture(scope="module")
def test_birds(demo):
    return demo.draw("test", SMALL["birds_per_class"][2], num_proc=1)


@pytest.fixture(scope="module")
def model(demo):
    return PromptCAMForImageClassification.from_pretrained(demo.folder / "model").eval()


@pytest.fixture(scope="module")
def reading(model, test_birds):
    return read_birds(model, build_image_processor(96), test_birds)


def test_it_reads_birds_and_finds_their_traits(demo):
    numbers = demo.report.numbers
    assert numbers["chance"] == pytest.approx(1 / 18)
    assert numbers["accuracy"] > 0.5
    hits = numbers["localisation"]["pointing_game"]
    assert hits["first_head"] > 0.5
    assert max(hits["other_classes"], hits["bird_patches"]) < 0.4
    assert numbers["predictions_flipped"]["all_traits"] > numbers["predictions_flipped"]["other_part"] + 0.3


def test_it_stays_off_the_network(demo):
    assert demo.connections == []


def test_what_it_leaves(demo):
    folder, report = demo.folder, demo.report
    assert json.loads((folder / "report.json").read_text()) == report.numbers
    assert report.numbers["num_birds"] == {"train": 180, "validation": 36, "test": 54}
    assert report.numbers["same_after_loading"] is True
    assert [path.name for path in report.figures] == ["trait_hits.png", "failures.png", "counterfactuals.png"]
    for path in report.figures:
        with Image.open(path) as image:
            assert image.width > 700
            assert path.stat().st_size < 300_000
    images = {path.stem for path in (folder / "birds").iterdir()}
    assert images == {bird.name for bird in BIRD_CLASSES}
    results = json.loads((folder / "model" / "results.json").read_text())
    assert results["test"]["top1"] == report.numbers["accuracy"]
    assert not list(folder.rglob("*.partial"))


def test_a_second_run_uses_what_is_there(demo, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("this was done already")

    monkeypatch.setattr(bird_drawing, "draw_bits", refuse)
    monkeypatch.setattr(PromptCAMForImageClassification, "encode_prefix", refuse)
    monkeypatch.setattr(torch.optim.AdamW, "step", refuse)
    monkeypatch.setattr(demo_module, "_compact_png", lambda figure: b"drawn, but not painted, which takes long")
    for path in demo.report.figures:
        path.unlink()
    weights = (demo.folder / "model" / "model.safetensors").read_bytes()
    again = demo.run().numbers
    assert {**again, "seconds": 0} == {**demo.report.numbers, "seconds": 0}
    assert (demo.folder / "model" / "model.safetensors").read_bytes() == weights
    assert all(path.is_file() for path in demo.report.figures)


def test_other_settings_and_other_folders_are_refused(demo, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in demo.folder.rglob("*")}
    with pytest.raises(ValueError, match="has seed 0, the recipe says 1"):
        demo.run(seed=1)
    assert {path: path.stat().st_mtime_ns for path in demo.folder.rglob("*")} == before
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="holds something else than a demonstration"):
        run_demo(tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_deep_is_the_papers_variant(monkeypatch, tmp_path):
    class Stop(Exception):
        pass

    def stop(recipe, data):
        raise Stop(recipe)

    monkeypatch.setattr(demo_module, "birds_dataset", partial(birds_dataset, cache_dir=tmp_path))
    monkeypatch.setattr(demo_module, "train", stop)
    recipes = []
    for deep in (False, True):
        with pytest.raises(Stop) as stopped:
            run_demo(tmp_path / "demo", deep=deep, birds_per_class=(1, 1, 1), num_proc=1)
        recipes.append(stopped.value.args[0])
    reduced, deep = recipes
    assert (reduced.num_agnostic_prompts, reduced.cache_features) == (0, True)
    assert (deep.num_agnostic_prompts, deep.cache_features, deep.first_prompt_layer) == (None, False, 0)
    assert reduced.class_prompt_layer == deep.class_prompt_layer == -1


def test_the_reading_is_what_the_model_says(model, test_birds, reading):
    processor = build_image_processor(96)
    for row in (0, 17, 40):
        bird = test_birds[row]
        pixel_values = processor(bird["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(pixel_values, output_attentions=True)
        np.testing.assert_allclose(reading.logits[row], output.logits[0], atol=1e-4)
        np.testing.assert_allclose(reading.trait_maps[row], output.trait_maps[0], atol=1e-5)
        assert reading.head_order[row].tolist() == rank_heads(model, pixel_values).order[0].tolist()
        masks = unpack_masks(bird["masks"])
        traits = np.logical_or.reduce([masks[part] for part in BIRD_CLASSES[bird["label"]].parts])
        seen = np.logical_or.reduce([masks[part] for part in PARTS])
        for patches, pixels in ((reading.trait_patches[row], traits), (reading.bird_patches[row], seen)):
            share = pixels.reshape(12, 8, 12, 8).mean(axis=(1, 3))
            np.testing.assert_array_equal(patches, share >= 0.05)


def test_localisation_by_hand():
    """Three classes, two heads, 1 x 4 patches; the third bird is misread, the fourth shows no trait."""
    maps = np.zeros((4, 3, 2, 1, 4), dtype=np.float32)
    maps[..., 3] = 0.1
    maps[0, 0, 1, 0] = [0.6, 0, 0, 0.2]  # first head of bird 0, asked by the true class: on the trait
    maps[0, 2, 1, 0] = [0.5, 0, 0, 0.1]  # and by another class
    maps[1, 1, 0, 0] = [0, 0.1, 0.4, 0]  # of bird 1: beside the trait
    traits = np.array([[[1, 0, 0, 0]], [[0, 1, 0, 0]], [[1, 1, 1, 1]], [[0, 0, 0, 0]]], dtype=bool)
    bird = np.array([[[1, 1, 0, 0]]] * 4, dtype=bool)
    logits = np.eye(3, dtype=np.float32)[[0, 1, 0, 2]]
    reading = BirdReading(
        np.array([0, 1, 2, 2]), logits, np.array([[1, 0], [0, 1], [0, 1], [0, 1]]), maps, traits, bird
    )
    np.testing.assert_array_equal(reading.hits, [1, 0, 1, np.nan])
    found = measure_localisation(reading)
    assert found["pointing_game"] == pytest.approx(
        {"first_head": 1 / 2, "other_classes": 1 / 4, "bird_patches": 1 / 2, "any_patches": 1 / 4}
    )
    mass = found["relevance_mass_accuracy"]
    assert mass["first_head"] == pytest.approx((0.75 + 0.2) / 2)
    assert mass["other_classes"] == pytest.approx((0 + 5 / 6 + 0 + 0) / 4)
    assert found["region_iou"]["bird_patches"] == pytest.approx(1 / 2)
    assert found["region_iou"]["any_patches"] == pytest.approx(1 / 4)


def test_removal_the_long_way(model, test_birds, reading):
    """One image at a time, each change made here again."""
    processor = build_image_processor(96)

    def predicted(image):
        with torch.no_grad():
            return int(model(processor(image, return_tensors="pt")["pixel_values"]).logits.argmax())

    right = {"strongest": [], "all_traits": [], "one_trait": []}
    correct = [row for row in range(len(test_birds)) if reading.predictions[row] == reading.labels[row]][::4]
    chosen = test_birds.select(correct)
    for row, bird in zip(correct, chosen, strict=True):
        label = bird["label"]
        attention = reading.trait_maps[row, label, reading.head_order[row, 0]]
        mask = np.zeros((96, 96), dtype=bool)
        for patch in sorted(range(144), key=lambda patch: -attention.flat[patch])[:3]:
            top, left = patch // 12 * 8, patch % 12 * 8
            mask[top : top + 8, left : left + 8] = True
        right["strongest"].append(predicted(remove_region(bird["image"], mask, "blur")) == label)
        spec, parts = row_spec(bird), BIRD_CLASSES[label].parts
        for name, groups in (("all_traits", [parts]), ("one_trait", [[part] for part in parts])):
            for group in groups:
                values = {part: None if part in group else spec.values[part] for part in TRAIT_PARTS}
                image, _ = draw_bird(type(spec)(spec.seed, values), 96)
                right[name].append(predicted(image) == label)
    part = BirdReading(
        *(getattr(reading, name)[correct] for name in ("labels", "logits", "head_order", "trait_maps")),
        reading.trait_patches[correct],
        reading.bird_patches[correct],
    )
    found = measure_removal(model, processor, chosen, part)
    assert found["accuracy_left"]["strongest_patches"] == pytest.approx(np.mean(right["strongest"]))
    assert found["predictions_flipped"]["all_traits"] == pytest.approx(1 - np.mean(right["all_traits"]))
    assert found["predictions_flipped"]["one_trait"] == pytest.approx(1 - np.mean(right["one_trait"]))
    assert found["accuracy_left"]["bird_patches"] > found["accuracy_left"]["strongest_patches"]
    assert found == measure_removal(model, processor, chosen, part)


def test_other_classes_perfect_readings_and_hopeless_ones(model, test_birds, reading):
    with pytest.raises(ValueError, match="not the 18 drawn birds"):
        read_birds(tiny_model(), build_image_processor(32), test_birds)
    perfect = BirdReading(
        reading.predictions, reading.logits, reading.head_order, reading.trait_maps,
        np.ones_like(reading.trait_patches), reading.bird_patches,
    )  # fmt: skip
    assert plot_failures(test_birds, perfect) is None
    hopeless = BirdReading(
        (reading.predictions + 1) % 18, reading.logits, reading.head_order, reading.trait_maps,
        reading.trait_patches, reading.bird_patches,
    )  # fmt: skip
    for measure in (measure_localisation, lambda read: measure_removal(model, None, test_birds, read)):
        with pytest.raises(ValueError, match="None of the 54 birds was read correctly"):
            measure(hopeless)


def invoke(*arguments):
    result = CliRunner().invoke(app, ["demo", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "prompt_cam_demo"),
        (["--deep"], "prompt_cam_demo_deep"),
        (["--seed", "3"], "prompt_cam_demo_seed_3"),
        (["--deep", "--seed", "3", "--out", "mine"], "mine"),
    ],
)
def test_the_command_prints_numbers_and_places(demo, monkeypatch, arguments, folder):
    others = count(1)

    def differing(numbers):
        """Another number for each share, so that none can stand in another's place."""
        return {
            name: differing(value) if isinstance(value, dict) else next(others) / 100
            for name, value in numbers.items()
        }

    names = ("localisation", "accuracy_left", "predictions_flipped")
    shares = differing({"accuracy": 0} | {name: demo.report.numbers[name] for name in names})

    def fake(where, *, deep, seed):
        assert (deep, seed) == ("--deep" in arguments, 3 if "--seed" in arguments else 0)
        return DemoReport(where, [where / "trait_hits.png"], demo.report.numbers | shares)

    monkeypatch.setattr(demo_module, "run_demo", fake)
    monkeypatch.setenv("COLUMNS", "200")  # a row a line
    code, output = invoke(*arguments)
    assert code == 0
    hits, mass = (shares["localisation"][name] for name in ("pointing_game", "relevance_mass_accuracy"))
    left, flipped = shares["accuracy_left"], shares["predictions_flipped"]
    expected = [
        ("Birds read correctly", shares["accuracy"]),
        ("by chance", 1 / 18),
        ("strongest patch is on the trait", hits["first_head"]),
        ("the same head, asked by the other classes", hits["other_classes"]),
        ("any patch of the bird", hits["bird_patches"]),
        ("any patch", hits["any_patches"]),
        ("attention that is on the trait", mass["first_head"]),
        ("the same head, asked by the other classes", mass["other_classes"]),
        ("spread evenly over the bird", mass["bird_patches"]),
        ("still right with the first head's 3 strongest patches blurred", left["strongest_patches"]),
        ("with 3 random patches of the bird blurred", left["bird_patches"]),
        ("read as another class once the class's traits are gone", flipped["all_traits"]),
        ("once one of its traits is gone", flipped["one_trait"]),
        ("once another part's colour is gone", flipped["other_part"]),
    ]
    rows = re.findall(r"│ ([^│]+?) +│ +([\d.]+%) │", output)
    assert len(rows) == len(expected)
    for (question, share), (words, value) in zip(rows, expected, strict=True):
        assert question.endswith(words) and share == f"{value:.1%}", question
    assert f"Model: {folder}/model" in output
    assert f"{folder}/trait_hits.png" in output
    assert ("reduced variant" in output) == ("--deep" not in arguments)
    assert f"Next: {own_command()} predict {folder}/model {folder}/birds" in output


def test_a_second_run_says_what_it_uses(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo_module, "run_demo", lambda where, **_: DemoReport(where, [], demo.report.numbers))
    folder = tmp_path / "my demo"
    (folder / "model").mkdir(parents=True)
    assert "my demo holds a run that was interrupted; it goes on where it stopped." in invoke("--out", str(folder))[1]
    (folder / "report.json").write_text("{}")
    output = invoke("--out", str(folder))[1]
    assert "my demo holds a finished run: its model is used again." in output and "interrupted" not in output
    assert f"predict '{folder}/model' '{folder}/birds'" in output
    assert "holds a" not in invoke("--out", str(tmp_path / "new"))[1]


def test_the_command_explains_a_refusal(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    code, output = invoke("--out", str(tmp_path))
    assert code == 2
    assert "holds something else than a demonstration; choose another one." in output
