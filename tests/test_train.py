# SPDX-License-Identifier: MIT
"""A training run from folders of photos to a saved model: what it computes, reports, saves and refuses."""

import csv
import doctest
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_computed, assert_stored
from hub_server import connect, serve
from PIL import Image
from small_runs import (  # noqa: F401 - fixtures are found by being here
    COLOURS,
    NUM_TEST,
    as_arguments,
    fixture_backbone,
    fixture_finished,
    fixture_photos,
    fixture_recipe,
    log_of,
    weights_of,
)
from transformers import AutoModelForImageClassification, CLIPImageProcessorPil, ViTConfig, ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.trainer_utils import set_seed

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.training.recipe import load_recipe, training_arguments
from prompt_cam_hf.training.train import main, prepare_run, train
from prompt_cam_hf.training.trainer import EpochSampler, PromptCAMTrainer, complete_checkpoints

ROOT = Path(__file__).parents[1]


# --- A whole run ---


def test_learns(finished):
    _, result = finished
    chance = result.metrics["chance"]
    assert chance == {"top1": pytest.approx(1 / 3), "top5": 1.0, "macro_accuracy": pytest.approx(1 / 3)}
    assert result.metrics["test"]["top1"] >= 0.9
    assert not result.model.training


def test_saved_model_and_processor_do_what_evaluation_did(finished, photos):
    """Accuracy counted anew, one image at a time, from the saved folder alone."""
    recipe, result = finished
    model = AutoModelForImageClassification.from_pretrained(recipe.output_dir)
    processor = type(result.image_processor).from_pretrained(recipe.output_dir)
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    counts = np.zeros((3, 3), int)
    for true, name in enumerate(COLOURS):
        for path in (photos / "test" / name).iterdir():
            with torch.no_grad():
                logits = model(**processor(Image.open(path), return_tensors="pt")).logits
            counts[true, logits.argmax()] += 1
    with open(Path(recipe.output_dir) / "confusion_test.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == [row[0] for row in rows[1:]] == ["red", "green", "blue"]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], int), counts)
    assert result.metrics["test"]["top1"] == pytest.approx(counts.trace() / counts.sum())
    assert (processor.size["height"], list(processor.image_mean)) == (32, [0.5, 0.5, 0.5])


def test_best_epoch_is_the_first_best_on_validation(finished):
    recipe, result = finished
    history = log_of(recipe.output_dir, "eval_top1")
    steps_per_epoch = math.ceil(27 / 8)
    assert [step for step, _ in history] == [steps_per_epoch * epoch for epoch in range(1, 9)]
    best_step, best = max(history, key=lambda entry: entry[1])
    assert result.best_epoch == best_step / steps_per_epoch
    assert result.metrics["validation"]["top1"] == pytest.approx(best)
    saved, chosen = weights_of(recipe.output_dir), weights_of(Path(recipe.output_dir) / f"checkpoint-{best_step}")
    assert all(torch.equal(saved[name], value) for name, value in chosen.items())


def test_results_file(finished):
    recipe, result = finished
    facts = json.loads((Path(recipe.output_dir) / "results.json").read_text())
    assert facts["num_images"] == {"train": 27, "validation": 3, "test": 15}
    assert facts["dataset"] is None  # files: where they lie is not for a card
    assert (facts["best_epoch"], facts["best_epoch_chosen_on"]) == (result.best_epoch, "validation")
    assert {name: facts[name] for name in result.metrics} == result.metrics


def test_recipe_is_saved_with_the_model(finished):
    recipe, _ = finished
    assert load_recipe(Path(recipe.output_dir) / "recipe.yaml") == recipe


def test_backbone_is_saved_unchanged(finished, backbone):
    recipe, _ = finished
    saved = PromptCAMForImageClassification.from_pretrained(recipe.output_dir).backbone.state_dict()
    original = ViTModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)


def test_checkpoints_hold_what_is_trained_and_nothing_else(finished):
    recipe, _ = finished
    best = max(log_of(recipe.output_dir, "eval_top1"), key=lambda entry: entry[1])[0]
    checkpoints = complete_checkpoints(recipe.output_dir)
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in sorted({best, 32})]
    for path in checkpoints:
        assert weights_of(path).keys() == {"class_prompts", "agnostic_prompts", "classifier.weight", "classifier.bias"}
        assert {file.name for file in path.iterdir()} == {
            "complete", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json",
        }  # fmt: skip


def test_test_split_is_looked_at_once_at_the_end(recipe, monkeypatch):
    looks = []
    for name in ("evaluate", "predict"):
        original = getattr(PromptCAMTrainer, name)

        def spy(self, dataset=None, *args, _name=name, _original=original, **kwargs):
            given = kwargs.get("eval_dataset", dataset)
            looks.append((_name, len(self.eval_dataset if given is None else given)))
            return _original(self, *([] if dataset is None else [dataset]), *args, **kwargs)

        monkeypatch.setattr(PromptCAMTrainer, name, spy)
    train(recipe(num_train_epochs=2))
    num_validation, num_test = 3, 3 * NUM_TEST
    assert looks == [("evaluate", num_validation)] * 2 + [("predict", num_validation), ("predict", num_test)]


def test_one_line_an_epoch_and_a_table(recipe, capsys):
    train(recipe(num_train_epochs=3))
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if "epoch" in line and "loss" in line]
    assert len(lines) == 3
    pattern = r"epoch {}/3   loss \d\.\d{{4}}   validation top-1 +\d+\.\d%( \(best so far\))?"
    for number, line in enumerate(lines, 1):
        assert re.search(pattern.format(number), line)
    assert "best so far" in lines[0]
    assert "grad_norm" not in printed and "{" not in printed
    for text in ("top-1", "top-5", "macro accuracy", "chance", "test (15 images)", "33.3%"):
        assert text in printed


# --- Optimisation ---


def test_rate_rises_evenly_and_falls_as_a_cosine(recipe):
    train(recipe(num_train_epochs=5, warmup_epochs=2, warmup_learning_rate=0.02, min_learning_rate=0.004))
    steps_per_epoch = 4
    warmup, total = 2 * steps_per_epoch, 5 * steps_per_epoch

    def rate(step: int) -> float:
        if step < warmup:
            return 0.02 + (0.1 - 0.02) * step / (warmup - 1)
        progress = (step - warmup + 1) / (total - warmup)
        return 0.004 + (0.1 - 0.004) * (1 + math.cos(math.pi * progress)) / 2

    expected = [(step, pytest.approx(rate(step - 1))) for step in range(steps_per_epoch, total + 1, steps_per_epoch)]
    assert log_of(recipe().output_dir, "learning_rate") == expected


class Images(torch.utils.data.Dataset):
    """Random pixels."""

    def __init__(self, number: int, num_classes: int):
        self.pixels = torch.randn((number, 3, 32, 32), generator=torch.Generator().manual_seed(3))
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": index % self.num_classes}


def new_model(backbone, **fields) -> PromptCAMForImageClassification:
    set_seed(1)
    return PromptCAMForImageClassification.from_backbone(str(backbone), id2label={0: "a", 1: "b", 2: "c"}, **fields)


def test_steps_are_those_of_plain_sgd_with_decay_on_everything(recipe, backbone):
    """Three steps against torch's own loop: no clipping, no parameter without decay, the sampler's order."""
    dataset = Images(24, 3)
    recipe = recipe(num_train_epochs=1, warmup_epochs=0, learning_rate=0.5, min_learning_rate=0.5, weight_decay=0.1)
    arguments = training_arguments(recipe)
    arguments.eval_strategy = type(arguments.eval_strategy)("no")
    model = new_model(backbone)
    PromptCAMTrainer(model, arguments, train_dataset=dataset).train()

    expected = new_model(backbone).train()
    trained = [parameter for parameter in expected.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5, momentum=0.9, weight_decay=0.1)
    order = np.random.default_rng((recipe.seed, 0)).permutation(24)
    for batch in order.reshape(3, 8):
        optimizer.zero_grad()
        expected(dataset.pixels[batch], labels=torch.tensor(batch % 3)).loss.backward()
        optimizer.step()
    before = new_model(backbone)
    for name, value in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value, atol=1e-6, rtol=1e-5)
        assert torch.equal(value, before.get_parameter(name)) != value.requires_grad


def test_gradient_accumulation_and_checkpointing_do_not_change_the_run(recipe, tmp_path):
    plain = {"prompt_dropout": 0, "drop_path_rate": 0, "num_train_epochs": 2}
    train(recipe(**plain))
    train(
        recipe(
            **plain,
            output_dir=str(tmp_path / "other"),
            gradient_checkpointing=True,
            trainer={"gradient_accumulation_steps": 2},
        )
    )
    first, second = weights_of(tmp_path / "out"), weights_of(tmp_path / "other")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-4)


def test_bf16_trains_and_leaves_a_plain_model(recipe):
    result = train(recipe(bf16=True, num_train_epochs=2))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert result.model(torch.zeros(1, 3, 32, 32)).logits.dtype == torch.float32


def test_divergence_is_said(recipe):
    with pytest.raises(FloatingPointError, match=r"The loss is (nan|inf) after epoch 1: .* Lower the learning_rate"):
        train(recipe(learning_rate=1e30, warmup_epochs=0, prompt_dropout=0, weight_decay=0))


@pytest.mark.parametrize(("number", "batch_size"), [(20, 8), (16, 8), (3, 8)])
def test_every_image_once_an_epoch(number, batch_size):
    sampler = EpochSampler(number, batch_size, seed=5)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler) == math.ceil(number / batch_size) * batch_size
        assert sorted(order[:number]) == list(range(number))
        assert order[number:] == (order * batch_size)[number : len(order)]  # filled up from the epoch's front
        assert order == list(sampler)
        orders.append(order)
    assert number == 3 or orders[0] != orders[1] != orders[2]
    other = EpochSampler(number, batch_size, seed=6)
    assert number == 3 or list(other) != orders[0]


@pytest.mark.parametrize(("optimizer", "tensors"), [("sgd", 2), ("adamw", 3)])
def test_checkpoint_of_vit_b_with_200_classes_is_small(tmp_path, recipe, optimizer, tensors):
    """ViT-B in everything that prompts see: 12 layers of width 768."""
    set_seed(0)
    config = ViTConfig(intermediate_size=8, image_size=32, patch_size=16)
    vit = ViTModel(config, add_pooling_layer=False)
    model = PromptCAMForImageClassification.from_backbone(vit, id2label={i: f"bird {i}" for i in range(200)})
    recipe = recipe(optimizer=optimizer, num_train_epochs=1, warmup_epochs=0, train_batch_size=2)
    arguments = training_arguments(recipe)
    arguments.eval_strategy = type(arguments.eval_strategy)("no")
    PromptCAMTrainer(model, arguments, train_dataset=Images(2, 200)).train()
    (checkpoint,) = complete_checkpoints(recipe.output_dir)
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    num_trained = 1_843_969  # the official checkpoint's own count
    assert num_trained * 4 * tensors < size < 25e6


# --- Settings ---


def test_evaluates_every_nth_epoch_and_the_last(recipe):
    train(recipe(num_train_epochs=5, eval_every_epochs=2))
    assert [step for step, _ in log_of(recipe().output_dir, "eval_top1")] == [8, 16, 20]
    assert [step for step, _ in log_of(recipe().output_dir, "loss")] == [4, 8, 12, 16, 20]


def test_without_validation_the_last_epoch_is_kept(recipe, capsys):
    result = train(recipe(validation_fraction=0, num_train_epochs=2))
    assert result.best_epoch == 2
    assert result.metrics.keys() == {"test", "chance", "largest_class"}
    facts = json.loads((result.output_dir / "results.json").read_text())
    assert facts["best_epoch_chosen_on"] is None
    assert "epoch 2/2   loss" in capsys.readouterr().out


def test_without_test_split(recipe, photos):
    result = train(recipe(data=str(photos / "train"), num_train_epochs=2))
    assert result.metrics.keys() == {"validation", "chance", "largest_class"}
    assert (result.output_dir / "confusion_validation.csv").exists()


def test_prompts_only(recipe):
    result = train(recipe(include_backbone=False, num_train_epochs=2))
    assert not any(name.startswith("backbone") for name in weights_of(result.output_dir))
    again = PromptCAMForImageClassification.from_pretrained(result.output_dir)
    pixels = torch.randn(2, 3, 32, 32)
    assert_stored(again, result.model)
    assert_computed(again(pixels).logits, result.model(pixels).logits)


def test_variants_reach_the_model(recipe):
    config = train(
        recipe(num_train_epochs=2, class_prompt_layer=1, num_agnostic_prompts=4, prompt_dropout=0.2)
    ).model.config
    assert (config.class_layer, config.agnostic_prompts_per_layer) == (1, 4)
    assert (config.prompt_dropout, config.drop_path_rate) == (0.2, 0.1)


def test_skipped_images_are_listed(recipe, photos, tmp_path):
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "train" / "001.red" / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png"):
        train(recipe(data=str(folder)))
    assert not (tmp_path / "out").exists()
    result = train(recipe(data=str(folder), skip_unreadable=True, num_train_epochs=2))
    assert "broken.png" in (result.output_dir / "skipped_images.csv").read_text()


def test_upload(recipe, tmp_path):
    upload = {"num_train_epochs": 2, "hub_model_id": "org/sparrows", "hub_license": "mit"}
    with serve() as hub, connect(hub, tmp_path / "home") as patch:
        result = train(recipe(**upload))
        (commit,) = hub.commits("org/sparrows")
        assert hub.repositories["org/sparrows"].private
        assert {name for name in commit.changed if not name.endswith(".py")} == {
            "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
        }  # fmt: skip
        assert {"modeling_prompt_cam.py", "pipeline_prompt_cam.py"} < commit.changed
        assert f"| {result.metrics['test']['top1']:.1%} |" in commit.files["README.md"].decode()
        hub.fail("PUT /lfs-storage", 500, times=100)
        with pytest.raises(OSError, match=r"saved in .*again, but not uploaded: .*broke off.*prompt-cam publish"):
            train(recipe(**upload, output_dir=str(tmp_path / "again"), seed=1))
        assert (tmp_path / "again" / "results.json").is_file() and len(hub.commits("org/sparrows")) == 1
        # Refused before the first step:
        for changes, message in [
            ({"hub_license": "My own"}, "not the identifier"),
            ({"hub_model_id": "x"}, "owner/x"),
        ]:
            with pytest.raises(ValueError, match=message):
                train(recipe(**upload | changes, output_dir=str(tmp_path / "new")))
        patch.delenv("HF_TOKEN")
        with pytest.raises(PermissionError, match="There is no Hub token"):
            train(recipe(**upload, output_dir=str(tmp_path / "new")))
        assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="hub_license must say under which licence"):
        recipe(hub_model_id="org/sparrows")
    with pytest.raises(ValueError, match="hub_model_id is for Prompt-CAMs"):
        recipe(**upload, method="vpt")


def test_image_size_must_suit_the_backbone(recipe):
    with pytest.raises(ValueError, match=r"image_size is 64, but the backbone .* takes images of 32x32 pixels"):
        train(recipe(image_size=64))


def test_images_are_prepared_as_the_backbone_expects_unless_the_recipe_says_otherwise(
    recipe, backbone, photos, tmp_path
):
    """In training, in evaluation, in the saved folder, and where the maps are laid on the image."""
    own = shutil.copytree(backbone, tmp_path / "own")
    settings = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 3}
    CLIPImageProcessorPil(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, **settings
    ).save_pretrained(own)
    brief = {"backbone": str(own), "num_train_epochs": 2}
    run = prepare_run(recipe(image_size=None, **brief))
    assert run.trainer.train_dataset.transform.resize_size == {"shortest_edge": 36}
    result = run.train()
    image = Image.open(next((photos / "test" / "001.red").iterdir())).resize((80, 40), Image.Resampling.BICUBIC)
    pixels = np.asarray(image.resize((72, 36), Image.Resampling.BICUBIC).crop((20, 2, 52, 34)), np.float64) / 255
    expected = torch.from_numpy((pixels - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]).permute(2, 0, 1).float()
    saved = AutoImageProcessor.from_pretrained(result.output_dir)
    for processor in (result.image_processor, saved):
        got = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    explanation = explain(result.output_dir, image)
    scale = 40 / 36
    assert explanation.box == pytest.approx((20 * scale, 2 * scale, 52 * scale, 34 * scale))

    for name, value in {"image_size": 32, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.6]}.items():
        changes = {"image_size": None, name: value, "output_dir": str(tmp_path / name)}
        if name == "image_size":
            assert (
                prepare_run(recipe(**brief | changes)).image_processor.to_dict() == build_image_processor(32).to_dict()
            )
        else:
            with pytest.raises(ValueError, match="image_size is 224"):
                prepare_run(recipe(**brief | changes))


def test_a_backbone_that_says_nothing_of_its_images_needs_the_recipe_to(recipe):
    with pytest.raises(ValueError, match="does not say which images it expects; give image_size, image_mean") as error:
        train(recipe(image_size=None))
    assert "\n" not in str(error.value)


# --- The command ---


def test_command(recipe, capsys):
    main(as_arguments(recipe(num_train_epochs=2)))
    assert "macro accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "extra", "message"),
    [
        ({}, ["--epochs=3"], "error: unknown key 'epochs'; the nearest one is"),
        ({}, ["--seed=x"], "error: seed must be a whole number, got 'x'."),
        ({"data": "nowhere/at/all"}, [], "error: .*nowhere/at/all"),
        ({"backbone": "nowhere/at/all"}, [], "error: .*nowhere/at/all"),
        ({"cache_features": True}, [], "error: cache_features: .*prompts enter the first layer"),
        (
            {"train_batch_size": 9, "trainer": {}},
            ["--trainer.gradient_accumulation_steps=2"],
            "error: .*9 cannot be sha",
        ),
    ],
)
def test_command_refuses_in_a_sentence(recipe, tmp_path, changes, extra, message):
    with pytest.raises(SystemExit) as refusal:
        main([*as_arguments(recipe(**changes)), *extra])
    assert re.match(message, refusal.value.code)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


# --- Documentation ---


def test_the_example_of_train_runs(photos, tmp_path, monkeypatch):
    # On images that the example's reader would have: no validation part, and nothing to test on.
    shutil.copytree(photos / "train", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    names = {}
    examples = doctest.DocTestParser().get_examples(train.__doc__)
    for example in examples[:-1]:
        exec(example.source, names)
    assert repr(eval(examples[-1].source, names)) == examples[-1].want.strip()
    assert AutoModelForImageClassification.from_pretrained("first_try").config.id2label[0] == "red"
