# SPDX-License-Identifier: MIT
"""Saving and loading: self-contained, prompts only, through the Auto classes, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ID2LABEL, assert_computed, assert_stored, random_images, tiny_backbone_config, tiny_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTModel,
)

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone, fingerprint_backbone

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def assert_same(model, other):
    with torch.no_grad():
        got, expected = (m(random_images(), trait_classes="all") for m in (other, model))
    assert_stored(other, model)
    assert_computed((got.logits, got.trait_maps), (expected.logits, expected.trait_maps))


@pytest.fixture
def backbone_folder(tmp_path):
    torch.manual_seed(7)
    folder = tmp_path / "backbone"
    build_backbone(tiny_backbone_config()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(backbone_folder):
    return PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)


def test_self_contained_round_trip(family, tmp_path):
    model = tiny_model(family, class_prompt_layer=1, prompt_dropout=0.1)
    model.save_pretrained(tmp_path)
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path)
    assert_same(model, loaded)
    for field in PromptCAMConfig.__annotations__:
        if field != "backbone_config":
            assert getattr(loaded.config, field) == getattr(model.config, field)
    assert loaded.config.backbone_config.model_type == model.config.backbone_config.model_type
    assert loaded.config.id2label == ID2LABEL
    assert not loaded.training
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        "class_prompts",
        "agnostic_prompts",
        "classifier.weight",
        "classifier.bias",
    }
    # Saving what was loaded changes nothing.
    loaded.save_pretrained(tmp_path / "again")
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_auto_classes_load_it(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is PromptCAMConfig
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is PromptCAMForImageClassification
    assert_same(model, loaded)


def test_dtype_and_device_map(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    half = PromptCAMForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert_same(model, PromptCAMForImageClassification.from_pretrained(tmp_path, device_map="auto"))


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")
def test_layers_offloaded_to_disk_give_the_same_numbers(family, tmp_path):
    """A device map with hooks: the nearest to several devices that one processor can show."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    places = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters() if "." in name}
    device_map = {
        name: "disk" if ".2." in f"{name}." else "cpu" for name in places | {"class_prompts", "agnostic_prompts"}
    }
    loaded = PromptCAMForImageClassification.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert_same(model, loaded)


@pytest.mark.parametrize("folder", sorted(CHECKPOINTS.glob("5.*")), ids=lambda folder: folder.name)
def test_checkpoints_of_other_transformers_versions_still_load(folder):
    """Made by tests/checkpoints/make.py; inner modules of the backbone have other names in each."""
    model = PromptCAMForImageClassification.from_pretrained(folder)
    answers = json.loads((folder / "answers.json").read_text())
    with torch.no_grad():
        output = model(torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16), trait_classes="all")
    torch.testing.assert_close(output.logits, torch.tensor(answers["logits"]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.trait_maps, torch.tensor(answers["trait_maps"]), atol=1e-5, rtol=1e-5)
    assert fingerprint_backbone(model.backbone) == answers["fingerprint"]


def test_prompts_only_round_trip(model, tmp_path):
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    saved = load_file(tmp_path / "prompts" / "model.safetensors")
    assert set(saved) == {"class_prompts", "agnostic_prompts", "classifier.weight", "classifier.bias"}
    assert_same(model, PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts"))
    assert_same(model, AutoModelForImageClassification.from_pretrained(tmp_path / "prompts"))
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts")
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(saved)
    # What was loaded can be saved whole.
    loaded.save_pretrained(tmp_path / "whole")
    shutil.rmtree(tmp_path / "backbone")
    assert_same(model, PromptCAMForImageClassification.from_pretrained(tmp_path / "whole"))


def test_prompts_only_of_every_family(family, tmp_path):
    torch.manual_seed(7)
    build_backbone(tiny_backbone_config(family)).save_pretrained(tmp_path / "backbone")
    model = PromptCAMForImageClassification.from_backbone(tmp_path / "backbone", id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    assert_same(model, PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts"))


def test_prompts_only_in_half_precision_names_the_same_backbone(model, tmp_path):
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    half = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path / "half", include_backbone=False)
    assert PromptCAMForImageClassification.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prompts_on_a_rounded_backbone_go_with_the_backbone_as_it_was(family, tmp_path, dtype):
    torch.manual_seed(7)
    build_backbone(tiny_backbone_config(family)).save_pretrained(tmp_path / "backbone")
    half = PromptCAMForImageClassification.from_backbone(tmp_path / "backbone", id2label=ID2LABEL, dtype=dtype)
    whole = PromptCAMForImageClassification.from_backbone(tmp_path / "backbone", id2label=ID2LABEL)
    assert half.dtype == dtype and half.config.backbone_fingerprint == fingerprint_backbone(whole.backbone)
    half.save_pretrained(tmp_path / "prompts", include_backbone=False)
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", dtype=torch.float32)
    assert torch.equal(loaded.class_prompts, half.class_prompts.float())
    for name, tensor in loaded.backbone.state_dict().items():
        assert torch.equal(tensor, whole.backbone.state_dict()[name])


def test_another_backbone_is_refused(model, backbone_folder, tmp_path):
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    shutil.move(backbone_folder, tmp_path / "moved")
    with pytest.raises(OSError, match=r"holds prompts only, and its backbone .*backbone=\.\.\."):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts")
    moved = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", backbone=tmp_path / "moved")
    assert_same(model, moved)
    loaded = ViTModel.from_pretrained(tmp_path / "moved", add_pooling_layer=False)
    assert_same(model, PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", backbone=loaded))

    other = ViTModel.from_pretrained(tmp_path / "moved", add_pooling_layer=False)
    other.layers[1].mlp.fc1.weight.data[0, 0] += 1
    other.save_pretrained(backbone_folder)
    with pytest.raises(ValueError, match=r"prompts for a backbone with fingerprint \w{12}, but .*another model"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts")


def test_leaving_out_a_backbone_that_would_be_lost_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="no name to fetch it by; save with include_backbone=True"):
        tiny_model().save_pretrained(tmp_path / "a", include_backbone=False)
    with pytest.raises(ValueError, match="trained too"):
        tiny_model(freeze_backbone=False).save_pretrained(tmp_path / "b", include_backbone=False)
    model.backbone.layers[0].mlp.fc1.weight.data *= 1.5
    with pytest.raises(ValueError, match="no longer those of"):
        model.save_pretrained(tmp_path / "c", include_backbone=False)
    assert not list(tmp_path.glob("[abc]/*"))


def test_fingerprint_says_which_weights_and_nothing_else(family):
    backbone = tiny_model(family).backbone
    digest = fingerprint_backbone(backbone)
    assert len(digest) == 64
    assert fingerprint_backbone(backbone.bfloat16()) == digest
    next(backbone.parameters()).data.view(-1)[0] += 1
    assert fingerprint_backbone(backbone) != digest


def test_fingerprint_is_that_of_the_published_names():
    """Pinned: prompts saved with one transformers version must find their backbone with every other."""
    backbone = build_backbone(tiny_backbone_config("dinov2"))
    for index, parameter in enumerate(backbone.parameters()):
        parameter.data.fill_(index)
    assert fingerprint_backbone(backbone).startswith("7ed97207802d")


@pytest.mark.parametrize("source", ["classifier", "clip", "siglip", "with pooler"])
def test_backbones_inside_other_models(source, tmp_path):
    """The vision part of a classifier or of a two-tower model, from a folder and from memory."""
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    if source == "classifier":
        outer = ViTForImageClassification(tiny_backbone_config())
        inner = outer.vit
    elif source == "with pooler":
        inner = outer = ViTModel(tiny_backbone_config())
    elif source == "clip":
        vision = tiny_backbone_config("clip_vision_model")
        outer = CLIPModel(CLIPConfig(vision_config=vision, text_config=CLIPTextConfig(vocab_size=50, **text)))
        inner = outer.vision_model
    else:
        vision = tiny_backbone_config("siglip_vision_model", vision_use_head=True)
        outer = SiglipModel(SiglipConfig(vision_config=vision, text_config=SiglipTextConfig(vocab_size=50, **text)))
        inner = outer.vision_model
    outer.save_pretrained(tmp_path)
    images = random_images()
    hidden = inner(images, output_hidden_states=True).hidden_states[1]
    for backbone in (tmp_path, str(tmp_path), outer):
        model = PromptCAMForImageClassification.from_backbone(backbone, id2label=ID2LABEL, num_agnostic_prompts=0)
        torch.testing.assert_close(model(images, output_hidden_states=True).hidden_states[1], hidden)
        assert not any("pooler" in name or "head." in name for name in model.backbone.state_dict())
    reloaded = PromptCAMForImageClassification.from_backbone(tmp_path, id2label=ID2LABEL)
    reloaded.save_pretrained(tmp_path / "prompts", include_backbone=False)
    assert_same(reloaded, PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts"))


def test_other_prompts_than_the_checkpoint_has_are_refused(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for fields, message in [
        ({"num_labels": 3}, "num_labels=3 contradicts id2label, which names 5 classes"),
        ({"id2label": {0: "a", 1: "b"}}, "num_labels=5 and cannot be loaded with num_labels=2"),
        ({"class_prompt_layer": 0}, "class_layer=2 and cannot be loaded with class_layer=0"),
        ({"num_agnostic_prompts": 9}, "agnostic_prompts_per_layer=5"),
        ({"first_prompt_layer": 1}, "first_prompt_layer=0"),
    ]:
        for auto in (PromptCAMForImageClassification, AutoModelForImageClassification):
            with pytest.raises(ValueError, match=message):
                auto.from_pretrained(tmp_path, **fields)
    names = {index: f"Vogel {index}" for index in range(5)}
    renamed = PromptCAMForImageClassification.from_pretrained(tmp_path, id2label=names)
    assert renamed.config.id2label == names and renamed.config.label2id["Vogel 3"] == 3
    assert_same(model, renamed)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"clas_prompt_layer": 0},
            "no field 'clas_prompt_layer'; its fields are: id2label, num_labels, backbone_conf",
        ),
        ({"id2label": None}, "needs the class names"),
        ({"id2label": {0: "a"}}, "needs two at least; id2label names 1"),
        ({"id2label": {1: "a", 2: "b"}}, "0 to 1 without a gap"),
        ({"id2label": {0: "a", 1: "a"}}, "'a' to two classes"),
        ({"num_labels": 4}, "num_labels=4 contradicts id2label, which names 5"),
        ({"label2id": {"x": 0}}, "label2id contradicts id2label"),
        ({"class_prompt_layer": 3}, "class_prompt_layer=3 is not a layer"),
        ({"class_prompt_layer": -2}, "class_prompt_layer=-2 is not a layer"),
        ({"class_prompt_layer": "last"}, "class_prompt_layer"),
        ({"first_prompt_layer": 3}, "first_prompt_layer=3 must lie between 0 and"),
        ({"first_prompt_layer": 1, "class_prompt_layer": 0}, "which is 0"),
        ({"num_agnostic_prompts": -1}, "num_agnostic_prompts=-1"),
        ({"prompt_dropout": 1.0}, "prompt_dropout=1.0"),
        ({"drop_path_rate": -0.1}, "drop_path_rate=-0.1"),
        ({"backbone_config": None}, "needs backbone_config"),
        ({"backbone_config": {"model_type": "swin"}}, "type 'swin'; supported are"),
    ],
)
def test_wrong_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message) as caught:
        PromptCAMConfig(**{"backbone_config": tiny_backbone_config(), "id2label": ID2LABEL, **fields})
    # transformers' own type check has an error of its own, which is not a ValueError.
    assert isinstance(caught.value, ValueError) or fields == {"class_prompt_layer": "last"}


def test_a_plain_trainer_trains_and_saves_it(model, tmp_path):
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(random_images(8))]
    arguments = TrainingArguments(
        tmp_path / "out",
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.1,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        eval_strategy="steps",
        eval_steps=3,
    )
    before = model.class_prompts.clone()
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert not torch.equal(model.class_prompts, before)
    prediction = trainer.predict(data)
    assert prediction.predictions.shape == (8, 5)
    trainer.save_model(tmp_path / "saved")
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded(random_images(8)).logits, torch.tensor(prediction.predictions))


def test_permission_to_run_code_never_comes_from_a_config(tmp_path):
    permission = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True}
    nested = tiny_backbone_config().to_dict() | permission | {"more": {"deeper": dict(permission)}}
    for backbone_config in (nested, tiny_backbone_config(**permission, more={"deeper": dict(permission)})):
        config = PromptCAMConfig(backbone_config=backbone_config, id2label=ID2LABEL)
        for key in permission:
            assert key not in json.dumps(config.to_dict())


def test_a_saved_folder_names_its_code_and_a_model_in_memory_does_not(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_prompt_cam.PromptCAMConfig",
        "AutoModelForImageClassification": "modeling_prompt_cam.PromptCAMForImageClassification",
    }
    implementation = saved["custom_pipelines"]["image-classification"]["impl"]
    assert implementation == "pipeline_prompt_cam.PromptCAMImageClassificationPipeline"
    assert not hasattr(model.config, "custom_pipelines")
    assert not hasattr(PromptCAMConfig.from_pretrained(tmp_path), "custom_pipelines")
