# SPDX-License-Identifier: MIT
"""Baselines trained by the same program: what is trained, saved, cached, resumed and refused."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import assert_computed, assert_stored, rarely
from PIL import Image
from small_runs import (  # noqa: F401 - fixtures are found by being here
    COLOURS,
    assert_same_weights,
    fixture_backbone,
    fixture_photos,
    fixture_recipe,
    log_of,
    weights_of,
)
from transformers import (
    AutoModelForImageClassification,
    DetrConfig,
    DetrForObjectDetection,
    ResNetConfig,
    TrainerCallback,
    ViTForImageClassification,
    ViTModel,
)

from prompt_cam_hf.baselines import LinearProbe, VPTForImageClassification, build_linear_probe
from prompt_cam_hf.data.images import build_detr_image_processor
from prompt_cam_hf.training.train import prepare_run, train
from prompt_cam_hf.training.trainer import complete_checkpoints

TRAINED = {
    "linear_probe": {"model.classifier.weight", "model.classifier.bias"},
    "vpt": {"prompts", "classifier.weight", "classifier.bias"},
}
TINY_INTR = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **{"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
}
INTR = {"method": "intr", "intr": TINY_INTR, "optimizer": "adamw", "learning_rate": 0.01}
PLAIN = {"prompt_dropout": 0, "drop_path_rate": 0}


@pytest.mark.parametrize("method", TRAINED)
def test_learns_and_trains_its_own_parameters_alone(recipe, backbone, method):
    result = train(recipe(method=method, num_train_epochs=12))
    assert result.metrics["test"]["top1"] >= 0.8  # chance is a third
    for checkpoint in complete_checkpoints(result.output_dir):
        assert weights_of(checkpoint).keys() == TRAINED[method]
    original = ViTModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    trained = (result.model.backbone if method == "vpt" else result.model.vit).state_dict()
    assert all(torch.equal(trained[name], original[name]) for name in original)
    assert (result.output_dir / "confusion_test.csv").exists()
    again = AutoModelForImageClassification.from_pretrained(result.output_dir)
    pixels = torch.randn(2, 3, 32, 32)
    assert_stored(again, result.model)
    assert_computed(again(pixels).logits, result.model(pixels).logits)
    assert again.config.id2label == {0: "red", 1: "green", 2: "blue"}


@pytest.mark.slow
@pytest.mark.long
def test_linear_probe_needs_nothing_but_transformers(recipe, photos):
    """The stock pipeline, in a process that cannot import this package."""
    result = train(recipe(method="linear_probe", num_train_epochs=2))
    assert type(result.model) is ViTForImageClassification
    assert not list(result.output_dir.glob("*.py"))
    path = photos / "test" / next(iter(COLOURS)) / "0.png"
    code = (
        "import sys; sys.modules['prompt_cam_hf'] = None\n"
        "from transformers import pipeline\n"
        f"print(pipeline('image-classification', model={str(result.output_dir)!r})({str(path)!r})[0]['score'])"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    pixels = result.image_processor(Image.open(path), return_tensors="pt")["pixel_values"]
    assert float(printed) == pytest.approx(result.model(pixels).logits.softmax(-1).max().item(), abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"method": "linear_probe"}, id="linear probe"),
        pytest.param({"method": "vpt", "first_prompt_layer": 1}, id="vpt deep"),
        rarely({"method": "vpt", "first_prompt_layer": 2, "class_prompt_layer": 0}, id="vpt shallow"),
        rarely({"method": "vpt", "num_agnostic_prompts": 0}, id="vpt without prompts"),
        pytest.param(INTR | {"intr": TINY_INTR | {"dropout": 0.0, "attention_dropout": 0.0}}, id="intr"),
    ],
)
def test_same_training_with_cached_features(recipe, tmp_path, settings):
    settings = {**settings, "num_train_epochs": 2, "cache_views": 2}
    plain = train(recipe(**settings))
    cached = train(
        recipe(**settings, cache_features=True, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "cached"))
    )
    for key in ("loss", "eval_loss", "eval_top1"):
        expected = [value for _, value in log_of(plain.output_dir, key)]
        assert [value for _, value in log_of(cached.output_dir, key)] == pytest.approx(expected, rel=1e-5)
    assert cached.metrics == plain.metrics


def test_each_method_has_its_own_cached_features(recipe, tmp_path):
    """Of the same images: a probe's pooled features, and the tokens that a VPT without prompts starts from."""
    settings = {"cache_features": True, "cache_dir": str(tmp_path / "cache"), "num_train_epochs": 2, "cache_views": 1}
    train(recipe(**settings, method="linear_probe"))
    train(recipe(**settings, method="vpt", num_agnostic_prompts=0, output_dir=str(tmp_path / "vpt")))
    sizes = sorted(path.stat().st_size for path in (tmp_path / "cache").glob("*.npy"))
    per_view = 32 * 4  # a vector of 32 numbers
    assert [round(size / per_view) for size in sizes] == [3 + 1, 27 + 1, 3 * 17 + 1, 27 * 17 + 1]  # with a header each


@pytest.mark.parametrize("method", TRAINED)
def test_resumed_ends_with_the_same_weights(recipe, tmp_path, method):
    settings = {"method": method, "num_train_epochs": 4}
    whole = train(recipe(**settings))
    half = shutil.copytree(whole.output_dir, tmp_path / "half")
    first, *_ = complete_checkpoints(half)
    for path in half.iterdir():
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    (complete_checkpoints(half)[-1] / "complete").unlink()
    train(recipe(**settings, output_dir=str(half), resume_from_checkpoint=True))
    assert_same_weights(whole.output_dir, half)
    assert first.exists()


@pytest.fixture
def detr(tmp_path):
    """A tiny DETR as transformers saves it."""
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    DetrForObjectDetection(DetrConfig(backbone_config=resnet, num_queries=3, **TINY_INTR)).save_pretrained(
        tmp_path / "detr"
    )
    return str(tmp_path / "detr")


@pytest.mark.slow
def test_intr_learns_on_a_frozen_backbone_and_is_resumed(recipe, backbone, tmp_path):
    plain = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)
    settings = {**INTR, "intr": TINY_INTR | plain, "num_train_epochs": 16}
    result = train(recipe(**settings))
    assert result.metrics["test"]["top1"] >= 0.8  # chance is a third
    original = ViTModel.from_pretrained(backbone, add_pooling_layer=False).state_dict()
    assert all(torch.equal(result.model.backbone.state_dict()[name], original[name]) for name in original)
    assert not any(name.startswith("backbone.") for name in weights_of(complete_checkpoints(result.output_dir)[-1]))
    half = shutil.copytree(result.output_dir, tmp_path / "half")
    for path in half.iterdir():
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    (complete_checkpoints(half)[-1] / "complete").unlink()
    train(recipe(**settings, output_dir=str(half), resume_from_checkpoint=True))
    assert_same_weights(result.output_dir, half)


def test_intr_trains_detr_with_two_rates_that_fall_once(recipe, detr, monkeypatch):
    """Images of several sizes in a batch, as DETR resizes them, here to 32 pixels instead of 800."""
    monkeypatch.setattr(
        "prompt_cam_hf.training.train.build_detr_image_processor", lambda: build_detr_image_processor(32)
    )
    monkeypatch.setattr("prompt_cam_hf.training.data._DETR_SIDES", (24, 32, 40))
    monkeypatch.setattr("prompt_cam_hf.training.data._DETR_SIDES_BEFORE_CROP", (24, 40))
    monkeypatch.setattr("prompt_cam_hf.training.data._DETR_CROP", (16, 40))
    settings = {**INTR, "intr": {}, "backbone": detr, "image_size": None, "resizing": "detr", "warmup_epochs": 0}
    settings |= {"backbone_learning_rate": 0.0006, "drop_rate_at_epoch": 2, "num_train_epochs": 3}
    run = prepare_run(recipe(**settings))
    sizes = {run.trainer.train_dataset[index]["pixel_values"].shape for index in range(6)}
    assert len(sizes) > 1
    before = {name: tensor.clone() for name, tensor in run.trainer.model.state_dict().items()}
    rates = []

    class Note(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append([group["lr"] for group in optimizer.param_groups if group["params"]])

    run.trainer.add_callback(Note())
    result = run.train()
    per_epoch = len(rates) // 3
    assert rates[0] == pytest.approx([0.01, 0.0006]) and rates[2 * per_epoch - 1] == rates[0]
    assert rates[2 * per_epoch] == pytest.approx([0.001, 0.00006]) and rates[-1] == rates[2 * per_epoch]
    moved = {name for name, tensor in result.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(name.startswith("backbone.encoder.stages.1.") for name in moved)
    assert not any(name.startswith(("backbone.embedder", "backbone.encoder.stages.0")) for name in moved)
    assert not any("normalization" in name for name in moved)
    assert result.image_processor.to_dict()["size"]["shortest_edge"] == 32


def test_vpt_settings_reach_the_model(recipe, tmp_path):
    config = train(
        recipe(method="vpt", num_train_epochs=2, class_prompt_layer=0, num_agnostic_prompts=4, first_prompt_layer=1)
    ).model.config
    assert (config.deep, config.num_prompts, config.first_prompt_layer) == (False, 4, 1)
    assert (config.prompt_dropout, config.drop_path_rate) == (0.1, 0.1)
    config = train(recipe(method="vpt", num_train_epochs=2, output_dir=str(tmp_path / "deep"))).model.config
    assert (config.deep, config.num_prompts) == (True, 3)  # as many as classes, as in a Prompt-CAM


def test_gradient_checkpointing_does_not_change_a_vpt(recipe, tmp_path):
    settings = {**PLAIN, "method": "vpt", "num_train_epochs": 2}
    train(recipe(**settings))
    train(recipe(**settings, gradient_checkpointing=True, output_dir=str(tmp_path / "other")))
    first, second = weights_of(tmp_path / "out"), weights_of(tmp_path / "other")
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-4)


def test_probe_trains_in_bf16(recipe):
    result = train(recipe(method="linear_probe", bf16=True, num_train_epochs=2))
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "probe"}, "method must be prompt_cam or linear_probe or vpt or intr, got 'probe'"),
        ({"method": "vpt", "class_prompt_layer": 1}, r"class_prompt_layer must be -1 \(Deep\) or 0 \(Shallow\)"),
        ({"method": "vpt", "include_backbone": False}, "method vpt saves whole models only"),
        ({"method": "linear_probe", "include_backbone": False}, "method linear_probe saves whole models only"),
        ({"method": "linear_probe", "gradient_checkpointing": True}, "gradient_checkpointing saves nothing"),
        ({"method": "linear_probe", "image_size": 64}, "image_size is 64, but the backbone .* takes images of 32"),
        ({"method": "vpt", "cache_features": True}, r"cache_features: .* prompts enter the first layer"),
        (INTR | {"resizing": "detr", "image_size": None}, "resizing: detr is for a DETR's ResNet, and .* is a vision"),
        (INTR | {"intr": {"d_model": 30}}, "d_model=30 must be a multiple of 4"),
    ],
)
def test_refusals(recipe, settings, message):
    with pytest.raises((TypeError, ValueError), match=message):
        train(recipe(**settings))


def test_a_probe_runs_its_backbone_in_evaluation_mode(recipe, backbone):
    probe = LinearProbe(build_linear_probe(str(backbone), id2label={0: "a", 1: "b"})).train()
    assert probe.training and not any(module.training for module in probe.model.modules())
    vpt = VPTForImageClassification.from_backbone(str(backbone), id2label={0: "a", 1: "b"}).train()
    assert vpt.training and not any(module.training for module in vpt.backbone.modules())
