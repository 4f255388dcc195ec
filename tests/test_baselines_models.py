# SPDX-License-Identifier: MIT
"""VPT against every prompt run as an ordinary token; linear probes against what each family is said to read."""

import json

import pytest
import torch
from conftest import (
    COMPUTED,
    ID2LABEL,
    assert_computed,
    assert_stored,
    random_images,
    tiny_backbone_config,
    tiny_model,
)
from straightforward import _layers
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTForImageClassification

from prompt_cam_hf.baselines import LinearProbe, VPTConfig, VPTForImageClassification, build_linear_probe
from prompt_cam_hf.baselines.backbone import backbone_of
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone, fingerprint_backbone

LABELS = torch.tensor([3, 0])


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """No zero biases, no unit scales, and a classifier whose scores differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make(kind: str, family: str) -> PreTrainedModel:
    name, _, variant = kind.partition(" ")
    if name == "prompt_cam":
        return tiny_model(family, class_prompt_layer={"deep": -1, "between": 1}[variant])
    if name == "vpt":
        config = VPTConfig(
            backbone_config=tiny_backbone_config(family), id2label=ID2LABEL, num_prompts=3, deep=variant == "deep",
            first_prompt_layer=1,
        )  # fmt: skip
        return shaken(VPTForImageClassification(config))
    if family.startswith("dinov3"):
        pytest.skip("transformers has no classification model for DINOv3")
    return shaken(build_linear_probe(build_backbone(tiny_backbone_config(family)), id2label=ID2LABEL))


def run_vpt(model: VPTForImageClassification, images: torch.Tensor, **options) -> torch.Tensor:
    """Prompts as ordinary tokens through the family's own layers; a Deep VPT's outputs are cut away after each."""
    backbone, config = model.backbone, model.config
    hidden = backbone.embeddings(images, **options)
    if hasattr(backbone, "pre_layrnorm"):
        hidden = backbone.pre_layrnorm(hidden)
    arguments = {}
    if hasattr(backbone, "rope_embeddings"):
        arguments["position_embeddings"] = backbone.rope_embeddings(images)
    if config.backbone_config.model_type in ("clip_vision_model", "siglip_vision_model"):
        arguments["attention_mask"] = None
    for index, layer in enumerate(_layers(backbone)):
        number = index - config.first_prompt_layer
        if number == 0 or (config.deep and number > 0):
            hidden = torch.cat((model.prompts[number].expand(len(images), -1, -1), hidden), dim=1)
        hidden = layer(hidden, **arguments)
        if config.deep and number >= 0:
            hidden = hidden[:, config.num_prompts :]
    if not config.deep:
        hidden = hidden[:, config.num_prompts :]
    (norm,) = [getattr(backbone, name) for name in ("layernorm", "norm", "post_layernorm") if hasattr(backbone, name)]
    hidden = norm(hidden)
    read = (
        hidden.mean(dim=1) if config.backbone_config.model_type in ("siglip_vision_model", "ijepa") else hidden[:, 0]
    )
    return model.classifier(read)


# --- VPT ---


@pytest.mark.parametrize("kind", ["vpt deep", "vpt shallow"])
def test_vpt_is_every_prompt_as_a_token(kind, family):
    """Scores, and gradients of what is trained, on a rectangular grid."""
    images = random_images(2, 32, 48)
    model = make(kind, family)
    dinos = family.startswith("dino")
    output = model(images, labels=LABELS, interpolate_pos_encoding=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(output.loss, trained)
    logits = run_vpt(model, images, **({} if dinos else {"interpolate_pos_encoding": True}))
    torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-4)
    loss = -logits.log_softmax(dim=-1)[torch.arange(2), LABELS].mean()
    torch.testing.assert_close(output.loss, loss)
    for found, expected in zip(gradients, torch.autograd.grad(loss, trained), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "prompts", "classifier.weight", "classifier.bias",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["vpt deep", "vpt shallow"])
def test_vpt_from_its_fixed_prefix(kind, family):
    images = random_images(2, 32, 48)
    model = make(kind, family)
    prefix = model.encode_prefix(images, interpolate_pos_encoding=True)
    logits = model(prefix_hidden_states=prefix, patch_grid=(4, 6)).logits
    torch.testing.assert_close(logits, model(images, interpolate_pos_encoding=True).logits, atol=1e-6, rtol=1e-5)


def test_vpt_without_prompts_is_a_linear_probe_on_cls():
    backbone = build_backbone(tiny_backbone_config("vit"))
    model = shaken(VPTForImageClassification.from_backbone(backbone, id2label=ID2LABEL, num_prompts=0))
    probe = ViTForImageClassification(build_linear_probe(backbone, id2label=ID2LABEL).config).eval()
    probe.vit.load_state_dict(model.backbone.state_dict())
    probe.classifier.load_state_dict(model.classifier.state_dict())
    images = random_images()
    torch.testing.assert_close(model(images).logits, probe(images).logits, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vpt deep", "vpt shallow"])
def test_vpt_saved_and_loaded(kind, family, tmp_path):
    model = make(kind, family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "visual_prompt_tuning"
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is VPTForImageClassification and not again.training
    images = random_images()
    assert_stored(again, model)
    assert_computed(again(images).logits, model(images).logits)
    assert again.config.id2label == ID2LABEL
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        "prompts", "classifier.weight", "classifier.bias",
    }  # fmt: skip


def test_vpt_copies_the_backbone_and_remembers_it(tmp_path):
    backbone = build_backbone(tiny_backbone_config("dinov2"))
    backbone.save_pretrained(tmp_path)
    model = VPTForImageClassification.from_backbone(tmp_path, id2label=ID2LABEL, num_prompts=2)
    assert model.prompts.shape == (3, 2, 32)
    assert model.config.backbone_name_or_path == str(tmp_path)
    assert model.config.backbone_fingerprint == fingerprint_backbone(backbone)
    assert 0 < model.prompts.abs().max() <= (6 / (3 * 8 * 8 + 32)) ** 0.5


def test_vpt_dropout_and_stochastic_depth_in_training_only():
    rates = {"prompt_dropout": 0.5, "drop_path_rate": 0.5}
    config = VPTConfig(backbone_config=tiny_backbone_config("vit"), id2label=ID2LABEL, num_prompts=4, **rates)
    model, images = shaken(VPTForImageClassification(config)), random_images()
    assert_computed(model(images).logits, model(images).logits)
    model.train()
    assert not torch.allclose(model(images).logits, model(images).logits, **COMPUTED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_prompts": -1}, "num_prompts=-1 must be 0 or more"),
        ({"first_prompt_layer": 3}, "first_prompt_layer=3 is not a layer of this backbone: use 0 to 2"),
        ({"prompt_dropout": 1.0}, r"prompt_dropout=1\.0 must be at least 0 and below 1"),
        ({"backbone_config": None}, "VPTConfig needs backbone_config"),
        ({"backbone_config": {"model_type": "swin"}}, "does not support backbones of type 'swin'"),
    ],
)
def test_vpt_config_refusals(fields, message):
    with pytest.raises(ValueError, match=message):
        VPTConfig(**{"backbone_config": tiny_backbone_config("vit"), "id2label": ID2LABEL, **fields})


def test_vpt_input_refusals():
    model = make("vpt deep", "vit")
    with pytest.raises(ValueError, match="Give either pixel_values or prefix_hidden_states"):
        model()
    with pytest.raises(ValueError, match="are 40x40 pixels, the backbone expects 32x32"):
        model(random_images(1, 40, 40))


# --- Linear probes ---


def read_by_head(family: str, model: PreTrainedModel, images: torch.Tensor) -> torch.Tensor:
    """The table of docs/baselines.md."""
    backbone = backbone_of(model)
    hidden = backbone(images).last_hidden_state
    if family in ("vit", "vit_mae", "vit_msn", "deit"):
        return hidden[:, 0]
    if family.startswith("dinov2"):
        return torch.cat((hidden[:, 0], hidden[:, -16:].mean(dim=1)), dim=1)
    if family == "clip_vision_model":  # not normed
        return hidden[:, 1:].mean(dim=1)
    return hidden.mean(dim=1)


def test_probe_reads_what_the_table_says(family):
    images = random_images()
    model = make("probe", family)
    probe = LinearProbe(model).train()
    expected = read_by_head(family, model, images)
    torch.testing.assert_close(probe.encode_prefix(images), expected, atol=1e-6, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())
    logits = expected @ model.classifier.weight.T + model.classifier.bias
    for output in (probe(images, labels=LABELS), probe(prefix_hidden_states=expected, labels=LABELS)):
        torch.testing.assert_close(output.logits, logits, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, LABELS))
    torch.testing.assert_close(model(images).logits, logits, atol=1e-5, rtol=1e-4)
    probe(images, labels=LABELS).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_probe_is_transformers_own_and_saves_as_such(family, tmp_path):
    if family.startswith("dinov3"):
        pytest.skip("transformers has no classification model for DINOv3")
    backbone = build_backbone(tiny_backbone_config(family))
    backbone.save_pretrained(tmp_path / "backbone")
    model = build_linear_probe(tmp_path / "backbone", id2label=ID2LABEL)
    assert type(model).__module__.startswith("transformers.models.")
    state = backbone_of(model).state_dict()
    assert all(torch.equal(state[name], value) for name, value in backbone.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    model.save_pretrained(tmp_path / "probe")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "probe")
    images = random_images()
    assert type(again) is type(model)
    assert_stored(again, model)
    assert_computed(again(images).logits, model(images).logits)
    assert (again.config.id2label, again.config.label2id) == (ID2LABEL, {name: i for i, name in ID2LABEL.items()})
    assert backbone.config.id2label != ID2LABEL  # the backbone's own configuration stays


def test_no_probe_where_transformers_has_no_class(tmp_path):
    build_backbone(tiny_backbone_config("dinov3_vit")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no image classification model for backbones of type 'dinov3_vit'.*num_prompts=0"
    ):
        build_linear_probe(tmp_path, id2label=ID2LABEL)
