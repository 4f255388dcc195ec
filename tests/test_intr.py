# SPDX-License-Identifier: MIT
"""INTR: against its official code, against the long way round, and through all that explains a Prompt-CAM."""

import argparse
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ID2LABEL, assert_computed, assert_stored, random_images, tiny_backbone_config, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_cli import run
from test_parity import Official
from torch.nn import functional
from transformers import AutoModelForImageClassification, DetrConfig, DetrForObjectDetection, ResNetConfig

from prompt_cam_hf import atlas, compare, convert_official_checkpoint, evaluate, explain, rank_heads, trait_maps
from prompt_cam_hf.baselines import INTRConfig, INTRForImageClassification, attention_rollout, cam_maps
from prompt_cam_hf.data.images import build_detr_image_processor, build_image_processor
from prompt_cam_hf.evaluation.measure import Protocol
from prompt_cam_hf.explanations.aggregate import DEFAULT_AGGREGATION
from prompt_cam_hf.explanations.explain import Explanation
from prompt_cam_hf.explanations.maps import map_box
from prompt_cam_hf.hub.convert_intr import convert_official_intr_state_dict
from prompt_cam_hf.loading import load_pipeline
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone

SIZES = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 24], "depths": [1, 2], "layer_type": "basic"}
LAYER = {"self_attn": "self_attn", "encoder_attn": "multihead_attn", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}


def shaken(model: INTRForImageClassification) -> INTRForImageClassification:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tiny_intr(family: str = "vit", **fields) -> INTRForImageClassification:
    backbone = ResNetConfig(**RESNET) if family == "resnet" else tiny_backbone_config(family)
    torch.manual_seed(0)
    config = INTRConfig(backbone_config=backbone, **{"id2label": ID2LABEL, **SIZES, **fields})
    return shaken(INTRForImageClassification(config))


@pytest.fixture
def folder(tmp_path):
    tiny_intr().save_pretrained(tmp_path / "intr")
    build_image_processor(32).save_pretrained(tmp_path / "intr")
    return tmp_path / "intr"


# --- The long way: PyTorch's own MultiheadAttention on tensors by their official names ---


def attend(weights, name, heads, query, key, value, blurred=None):
    """(batch, queries, width), and softmax weights (batch, heads, queries, keys)."""
    width = query.shape[-1]
    parts = [
        functional.linear(states, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
        for states, weight, bias in zip(
            (query, key, value),
            weights[f"{name}.in_proj_weight"].chunk(3),
            weights[f"{name}.in_proj_bias"].chunk(3),
            strict=True,
        )
    ]
    found = (parts[0] @ parts[1].transpose(-1, -2) / (width // heads) ** 0.5).softmax(dim=-1)
    if blurred is not None:
        found = torch.where(blurred[:, :, :, None], 1 / found.shape[-1], found)
    joined = (found @ parts[2]).transpose(1, 2).flatten(-2)
    return functional.linear(joined, weights[f"{name}.out_proj.weight"], weights[f"{name}.out_proj.bias"]), found


def official_run(weights, features, positions, heads, layers=2, blurred=None):
    """Scores (batch, classes), and the last cross-attention, uniform where `blurred` (batch, heads, classes) is."""

    def norm(name, states):
        return functional.layer_norm(states, states.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def feed(name, states):
        inner = functional.linear(states, weights[f"{name}.linear1.weight"], weights[f"{name}.linear1.bias"]).relu()
        return functional.linear(inner, weights[f"{name}.linear2.weight"], weights[f"{name}.linear2.bias"])

    hidden = functional.conv2d(features, weights["input_proj.weight"], weights["input_proj.bias"])
    hidden, positions = hidden.flatten(2).mT, positions.flatten(2).mT
    for index in range(layers):
        name = f"transformer.encoder.layers.{index}"
        attended, _ = attend(weights, f"{name}.self_attn", heads, hidden + positions, hidden + positions, hidden)
        hidden = norm(f"{name}.norm1", hidden + attended)
        hidden = norm(f"{name}.norm2", hidden + feed(name, hidden))
    queries = weights["query_embed.weight"].expand(len(hidden), -1, -1)
    classes, found = torch.zeros_like(queries), None
    for index in range(layers):
        name = f"transformer.decoder.layers.{index}"
        attended, _ = attend(weights, f"{name}.self_attn", heads, classes + queries, classes + queries, classes)
        classes = norm(f"{name}.norm1", classes + attended)
        uniform = blurred if index == layers - 1 else None
        attended, found = attend(weights, f"{name}.multihead_attn", heads, classes + queries, hidden, hidden, uniform)
        classes = norm(f"{name}.norm2", classes + attended)
        classes = norm(f"{name}.norm3", classes + feed(name, classes))
    classes = norm("transformer.decoder.norm", classes)
    head = weights["presence_vector.weight"], weights["presence_vector.bias"]
    return functional.linear(classes, *head).squeeze(-1), found


def official_names(model: INTRForImageClassification) -> dict[str, torch.Tensor]:
    """The model's weights as the official code would have saved them, with torchvision's ResNet."""
    state, named = model.state_dict(), {}
    for name, tensor in state.items():
        if name.startswith(("encoder_layers", "decoder_layers")):
            side, index, rest = name.replace("_layers", "").split(".", 2)
            norms = ["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"]
            norms.remove("encoder_attn_layer_norm") if side == "encoder" else None
            for ours, theirs in LAYER.items() | {(norm, f"norm{n}") for n, norm in enumerate(norms, 1)}:
                if rest.startswith(f"{ours}."):
                    rest = rest.replace(ours, theirs, 1)
                    break
            stem = f"transformer.{side}.layers.{index}.{rest}"
            if ".q_proj." in name:
                parts = [state[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                named[stem.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
            elif ".k_proj." not in name and ".v_proj." not in name:
                named[stem.replace("o_proj", "out_proj")] = tensor
        else:
            for ours, theirs in {
                "backbone.embedder.embedder.convolution": "backbone.0.body.conv1",
                "backbone.embedder.embedder.normalization": "backbone.0.body.bn1",
                "input_projection": "input_proj", "query_position_embeddings": "query_embed",
                "decoder_norm": "transformer.decoder.norm", "classifier": "presence_vector",
            }.items():  # fmt: skip
                name = name.replace(ours, theirs) if name.startswith(ours) else name
            if name.startswith("backbone.encoder.stages."):
                _, _, _, stage, _, layer, *rest = name.split(".")
                piece = {"convolution": "conv", "normalization": "bn"}[rest[-2]]
                kind = f"downsample.{int(piece == 'bn')}" if rest[0] == "shortcut" else f"{piece}{int(rest[1]) + 1}"
                name = f"backbone.0.body.layer{int(stage) + 1}.{layer}.{kind}.{rest[-1]}"
            named[name] = tensor
    return named


# --- The official code ---


@pytest.fixture
def official():
    """The stored tensors, and a model of them, whose ResNet stands still: it answers with the stored features."""
    stored = Official("intr_c6")
    torch.manual_seed(0)
    resnet = official_names(INTRForImageClassification(INTRConfig(backbone_config=ResNetConfig(**RESNET), **SIZES)))
    resnet = {name: tensor for name, tensor in resnet.items() if name.startswith("backbone")}
    model = convert_official_intr_state_dict(stored.state_dict | resnet, num_attention_heads=4)
    model.config.dropout = 0.0
    for module in model.modules():
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.backbone.forward = lambda pixel_values: SimpleNamespace(
        feature_maps=[stored["features"].to(pixel_values.dtype)]
    )
    return stored, model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_same_scores_and_maps_as_the_official_code(official, attention):
    stored, model = official
    model.set_attn_implementation(attention)
    pixels = torch.zeros(3, 3, 32, 40)
    torch.testing.assert_close(model(pixels).logits, stored["logits"], atol=1e-5, rtol=0)
    output = model(pixels, trait_classes="all")
    torch.testing.assert_close(output.logits, stored["logits"], atol=1e-5, rtol=0)
    maps = output.trait_maps.transpose(1, 2).flatten(-2)
    torch.testing.assert_close(maps, stored["cross_attention_last"], atol=1e-6, rtol=0)
    positions = model.position_embedding(stored["features"].shape, "cpu", torch.float32)
    torch.testing.assert_close(positions, stored["position_embedding"], atol=1e-6, rtol=0)


def losses_of(step, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=1e-6)
    losses = []
    for _ in range(4):
        loss = step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def test_same_training_steps_as_the_official_code(official):
    """Adam divides each gradient by its size, so what rounding leaves of a gradient near 0 becomes a whole step.

    The official code's own steps in float32 and float64 differ by 1e-4 for that; only the first loss is free of it. In
    float64 ours are those of the official network, to 1e-9.
    """
    stored, model = official
    model = model.double().train()
    pixels = torch.zeros(3, 3, 32, 40, dtype=torch.float64)
    own = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone")]

    def step():
        return functional.cross_entropy(model(pixels).logits, stored["labels"])

    found = losses_of(step, own)
    torch.testing.assert_close(found[:1], stored["train_losses"][:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(found, stored["train_losses"], atol=2e-4, rtol=0)
    weights = {name: tensor.double().requires_grad_() for name, tensor in stored.state_dict.items()}
    features, positions = stored["features"].double(), stored["position_embedding"].double()

    def official_step():
        return functional.cross_entropy(official_run(weights, features, positions, 4)[0], stored["labels"])

    torch.testing.assert_close(found, losses_of(official_step, list(weights.values())), atol=1e-6, rtol=0)


def test_checkpoint_file_is_converted(tmp_path, capsys):
    model = tiny_intr("resnet", freeze_backbone=False)
    names = official_names(model) | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    torch.save({"model": names, "args": argparse.Namespace(nheads=4)}, tmp_path / "checkpoint.pth")
    (tmp_path / "names.txt").write_text("\n".join("abcde"))
    found, processor = convert_official_checkpoint(tmp_path / "checkpoint.pth")
    assert_stored(found, model)
    pixels = random_images(2, 48, 40)
    assert_computed(found(pixels).logits, model(pixels).logits)
    assert processor.to_dict()["size"] == {"shortest_edge": 800, "longest_edge": 1333}
    out = tmp_path / "out"
    answer = run("convert", tmp_path / "checkpoint.pth", "--out", out, "--classes", tmp_path / "names.txt")
    assert answer.exit_code == 0, answer.output
    pipe = load_pipeline(out)
    assert_stored(pipe.model, model)
    assert list(pipe.model.config.id2label.values()) == list("abcde")
    explanation = explain(pipe, Image.new("RGB", (60, 50)), "a")
    assert explanation.classes[0].maps.shape == (4, 100, 120)  # 800 x 960 pixels, of which a place covers 8 x 8


def test_bad_checkpoints_are_refused(tmp_path):
    names = official_names(tiny_intr("resnet"))
    for change, message in [
        ({"query_embed.weight": None}, "no query_embed.weight with a row for each class"),
        ({"transformer.decoder.layers.1.linear2.bias": None}, "decoder_layers.1.mlp.fc2.bias is missing"),
        ({"transformer.encoder.norm.weight": torch.ones(32)}, "encoder.norm.weight is left over"),
        ({"presence_vector.bias": torch.ones(5)}, r"classifier.bias has the shape \[5\] instead of \[1\]"),
        ({"input_proj.weight": None}, "no weight 'input_projection.weight'"),
        ({"query_embed.weight": [1.0]}, "'query_embed.weight' is not the name of a dense tensor"),
    ]:
        changed = {name: tensor for name, tensor in (names | change).items() if tensor is not None}
        with pytest.raises(ValueError, match=message) as error:
            convert_official_intr_state_dict(changed, num_attention_heads=4)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="id2label names 2 classes, but the checkpoint has queries for 5"):
        convert_official_intr_state_dict(names, id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match=r"d_model=32 must be .* of encoder_attention_heads=5"):
        convert_official_intr_state_dict(names, num_attention_heads=5)
    torch.save({"model": names}, tmp_path / "intr.pth")
    with pytest.raises(ValueError, match="image_size=224 is for a Prompt-CAM"):
        convert_official_checkpoint(tmp_path / "intr.pth", image_size=224)


# --- The model ---


@torch.no_grad()
def test_scores_and_maps_are_those_of_the_long_way_on_every_family(family):
    """The patches are what the family's own layers make of them, on a rectangular grid."""
    images = random_images(2, 32, 48)
    model = tiny_intr(family)
    output = model(images, trait_classes="all", interpolate_pos_encoding=True)
    assert output.trait_maps.shape == (2, 5, 4, 4, 6)
    features = model._find_features(images, True)
    options = {} if family.startswith("dino") else {"interpolate_pos_encoding": True}
    hidden = model.backbone(images, **options).last_hidden_state
    if family == "clip_vision_model":  # whose own model does not norm the patches
        hidden = model.backbone.post_layernorm(hidden)
    torch.testing.assert_close(features.flatten(2).mT, hidden[:, -24:], atol=1e-5, rtol=1e-4)
    positions = model.position_embedding(features.shape, "cpu", torch.float32)
    logits, attention = official_run(official_names(model), features, positions, 4)
    assert_computed(output.logits, logits)
    assert_computed(model(images, interpolate_pos_encoding=True).logits, logits)
    assert_computed(output.trait_maps.transpose(1, 2).flatten(-2), attention)
    prefix = model.encode_prefix(images, interpolate_pos_encoding=True)
    assert_computed(model(prefix_hidden_states=prefix, patch_grid=(4, 6)).logits, logits)


@torch.no_grad()
def test_heads_are_ranked_as_by_blurring_them_one_after_another():
    images, model = random_images(2), tiny_intr()
    features = model._find_features(images, False)
    positions, weights = model.position_embedding(features.shape, "cpu", torch.float32), official_names(model)
    asked = torch.tensor([3, 1])
    for blur in ("tokens", "patches"):  # the decoder sees nothing but patches
        ranking = rank_heads(model, images, asked, blur=blur)
        for image, number in enumerate(asked.tolist()):
            blurred = torch.zeros(2, 4, 5, dtype=torch.bool)
            for head in ranking.order[image].flip(0).tolist():
                scores = {}
                for candidate in (~blurred[image, :, number]).nonzero()[:, 0].tolist():
                    trial = blurred.clone()
                    trial[image, candidate, number] = True
                    scores[candidate] = official_run(weights, features, positions, 4, blurred=trial)[0][image, number]
                assert max(scores, key=scores.get) == head
                assert_computed(ranking.scores[image, head], scores[head])
                blurred[image, head, number] = True
    shapley = rank_heads(model, images, asked, method="shapley")
    everything = torch.ones(2, 4, 5, dtype=torch.bool)
    none, whole = (official_run(weights, features, positions, 4, blurred=b)[0] for b in (everything, None))
    gained = (whole - none).gather(1, asked[:, None])[:, 0]
    assert_computed(shapley.scores.sum(dim=-1), gained)
    # All tokens are patches. A network with ReLU, which has corners, needs many points.
    evidence = trait_maps(model, images, asked, kind="evidence", steps=128)
    assert evidence.shape == (2, 1, 4, 4, 4)
    torch.testing.assert_close(evidence.sum(dim=(1, 2, 3, 4)), gained, atol=1e-3 * whole.abs().max().item(), rtol=1e-3)


@torch.no_grad()
def test_images_that_fill_up_a_batch_are_scored_as_if_alone():
    model = tiny_intr("resnet")
    small, large = random_images(1, 40, 32), random_images(1, 64, 48)
    pixels, mask = torch.zeros(2, 3, 64, 48), torch.zeros(2, 64, 48, dtype=torch.long)
    pixels[0, :, :40, :32], pixels[1] = small[0], large[0]
    mask[0, :40, :32], mask[1] = 1, 1
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        together = model(pixels, pixel_mask=mask).logits
        # Convolutions see the empty pixels beside a small image.
        features = model.backbone(pixels[:1]).feature_maps[-1][..., :5, :4]
        positions = model.position_embedding(features.shape, "cpu", torch.float32)
        assert_computed(together[:1], official_run(official_names(model), features, positions, 4)[0])
        assert_computed(together[1:], model(large).logits)
        assert not torch.allclose(together, model(pixels).logits, atol=1e-3)
    with pytest.raises(ValueError, match="these are filled up; give them one by one"):
        model(pixels, pixel_mask=mask, trait_classes="all")


def test_only_what_is_to_be_trained_is_trained():
    trained = {name for name, each in tiny_intr().train().named_parameters() if each.requires_grad}
    assert trained and not any(name.startswith("backbone.") for name in trained)
    model = tiny_intr("resnet", freeze_backbone=False).train()
    resnet = {name for name, each in model.backbone.named_parameters() if each.requires_grad}
    assert resnet and all(name.startswith("encoder.stages.1.") and "normalization" not in name for name in resnet)
    free = tiny_intr(freeze_backbone=False).train()
    loss = free(random_images(), labels=torch.tensor([1, 2])).loss
    loss.backward()
    assert free.backbone.layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no fixed prefix"):
        free.encode_prefix(random_images())


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_saved_and_loaded(family, tmp_path):
    model = tiny_intr(family, freeze_backbone=False)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "intr"
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is INTRForImageClassification and not again.training
    assert_stored(again, model)
    assert_computed(again(random_images()).logits, model(random_images()).logits)
    trained = {name for name, each in model.train().named_parameters() if each.requires_grad}
    assert {name for name, each in again.train().named_parameters() if each.requires_grad} == trained


def test_a_new_model_begins_as_detr_does():
    torch.manual_seed(0)
    backbone = build_backbone(tiny_backbone_config("vit"))
    model = INTRForImageClassification.from_backbone(backbone, id2label=ID2LABEL, **{**SIZES, "d_model": 256})
    layer = model.decoder_layers[0]
    # Xavier's bounds: of queries, keys and values as one matrix (3 x 256, 256), and of the others.
    for weight, bound in [
        (layer.self_attn.q_proj.weight, (6 / 1024) ** 0.5),
        (layer.encoder_attn.o_proj.weight, (6 / 512) ** 0.5),
        (layer.mlp.fc1.weight, (6 / (256 + 40)) ** 0.5),
    ]:
        assert 0.97 * bound < weight.abs().max() <= bound
    assert 0.8 < model.query_position_embeddings.weight.std() < 1.2
    assert_stored(model.backbone, backbone)
    assert not model.training and model.config.backbone_fingerprint


# --- DETR ---


@pytest.fixture
def detr(tmp_path):
    sizes = {name: size for name, size in SIZES.items()}
    resnet = ResNetConfig(**RESNET, out_features=["stage2"])
    torch.manual_seed(0)
    model = DetrForObjectDetection(DetrConfig(backbone_config=resnet, num_queries=7, **sizes)).eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 0.1 * torch.rand_like(tensor)
    model.save_pretrained(tmp_path / "detr")
    return model, tmp_path / "detr"


@torch.no_grad()
def test_a_detr_is_taken_over(detr, tmp_path):
    """Encoder, ResNet and decoder as transformers runs them; with the DETR's queries, but for its keys' positions."""
    theirs, folder = detr
    model = INTRForImageClassification.from_backbone(folder, id2label=ID2LABEL)
    assert not model.config.freeze_backbone and model.config.backbone_name_or_path == str(folder)
    images = random_images(2, 48, 40)
    encoded, _ = model._encode(model._find_features(images, False))
    assert_computed(encoded, theirs.model(images).encoder_last_hidden_state)
    queries = model.query_position_embeddings.weight.expand(2, -1, -1)
    expected = theirs.model.decoder(
        torch.zeros_like(queries), encoder_hidden_states=encoded, object_queries_position_embeddings=queries
    ).last_hidden_state
    assert_computed(model(images).logits, model.classifier(expected).squeeze(-1))
    # The same DETR as the Hub has it, with timm's ResNet: torchvision's names.
    stored = load_file(folder / "model.safetensors")
    others = {name: tensor for name, tensor in stored.items() if ".embedder." not in name and ".stages." not in name}
    prefix = next(name for name in stored if ".stages." in name).partition("encoder.stages.")[0]
    timm = {
        name.replace("backbone.0.body.", prefix): tensor
        for name, tensor in official_names(model).items()
        if name.startswith("backbone.0.body.")
    }
    save_file(others | timm, folder / "model.safetensors", metadata={"format": "pt"})
    again = INTRForImageClassification.from_backbone(folder, id2label=ID2LABEL)
    assert_stored(again.backbone, model.backbone)
    assert_stored(again.decoder_layers, model.decoder_layers)


def test_a_damaged_detr_is_refused(detr):
    _, folder = detr
    stored = load_file(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"encoder_layers=3 is not 2, as .*detr has it"):
        INTRForImageClassification.from_backbone(folder, id2label=ID2LABEL, encoder_layers=3)
    short = {name: tensor for name, tensor in stored.items() if "decoder.layers.1.final_layer_norm" not in name}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"cannot be used as a DETR: 2 of its weights do not fit: decoder_layers.1"):
        INTRForImageClassification.from_backbone(folder, id2label=ID2LABEL)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        INTRForImageClassification.from_backbone(folder, id2label=ID2LABEL)
    with pytest.raises(FileNotFoundError, match="facebook/detr-resnet-50 is not in the cache"):
        INTRForImageClassification.from_backbone("facebook/detr-resnet-50", id2label=ID2LABEL)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone_config": None}, "needs backbone_config"),
        ({"backbone_config": {"model_type": "swin"}}, "INTR does not support backbones of type 'swin'"),
        ({"d_model": 30}, "d_model=30 must be a multiple of 4"),
        ({"decoder_layers": 0}, "decoder_layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        INTRConfig(**{"backbone_config": tiny_backbone_config("vit"), **SIZES, **fields})


# --- What explains a Prompt-CAM ---


def test_explained_as_a_prompt_cam_is(folder, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8))
    explanation = explain(str(folder), image, ["class 1", "class 3"], method="exact")
    assert isinstance(explanation, Explanation) and "class 1" in str(explanation)
    model = tiny_intr()
    pixels = build_image_processor(32)(image, return_tensors="pt")["pixel_values"]
    output = model(pixels, trait_classes=torch.tensor([1, 3]))
    for row in (0, 1):
        assert_computed(torch.tensor(explanation.classes[row].maps), output.trait_maps[0, row])
        # All of the attention is on patches.
        assert explanation.classes[row].attention_on_patches == pytest.approx([1.0] * 4)
    explanation.save(tmp_path / "maps.png", heads=2)
    assert compare(str(folder), image, ["class 1", "class 3"]).overlap.shape == (4,)
    answers = load_pipeline(folder)(image, trait_maps=True, top_k=2)
    assert answers[0]["trait_maps"].shape == (4, 4, 4) and sorted(answers[0]["head_order"]) == [0, 1, 2, 3]


def test_evaluated_and_collected_beside_a_prompt_cam(folder, tmp_path):
    images = tmp_path / "images"
    rng = np.random.default_rng(0)
    for name in ID2LABEL.values():
        (images / name).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(images / name / "0.png")
    other = tmp_path / "prompt_cam"
    tiny_model().save_pretrained(other)
    build_image_processor(32).save_pretrained(other)
    found = evaluate(
        other,
        images,
        tmp_path / "report",
        baselines=[folder],
        baseline_maps=["attention_shapley", "evidence_sum", "hires_cam"],
        protocol=Protocol(metrics=("faithfulness", "specificity"), preset="fast"),
    )
    measured = {(mean.model, mean.map, mean.metric) for mean in found.means}
    for name in ("attention_shapley", "evidence_sum", "hires_cam"):
        assert {("intr", name, metric) for metric in ("insertion", "deletion")} <= measured
    assert ("intr", "", "accuracy") in measured
    default = evaluate(folder, images, tmp_path / "alone", protocol=Protocol(metrics=("sanity",)))
    assert {mean.map for mean in default.means} == {"", DEFAULT_AGGREGATION}
    assert atlas(str(folder), images, tmp_path / "atlas").page.exists()


def test_images_of_several_shapes_are_evaluated_as_if_alone(tmp_path):
    tiny_intr("resnet").save_pretrained(tmp_path / "intr")
    build_detr_image_processor(40, 64).save_pretrained(tmp_path / "intr")
    rng, shapes = np.random.default_rng(0), ((50, 90), (50, 90), (90, 50))
    for number, shape in enumerate(shapes):
        (tmp_path / "images" / f"class {number}").mkdir(parents=True)
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(
            tmp_path / "images" / f"class {number}" / "0.png"
        )
    rows = []
    for batch_size in (1, 3):
        protocol = Protocol(metrics=("faithfulness", "specificity"), preset="fast", batch_size=batch_size)
        out = tmp_path / f"report_{batch_size}"
        evaluate(tmp_path / "intr", tmp_path / "images", out, protocol=protocol)
        found = pd.read_parquet(out / "measurements.parquet")
        rows.append(found.sort_values(["index", "map", "metric"])["value"].to_numpy())
    assert len(rows[0]) > 9
    np.testing.assert_allclose(*rows, atol=1e-4)


def test_what_cannot_be_is_refused_in_a_sentence(folder, tmp_path):
    model, resnet, images = tiny_intr(), tiny_intr("resnet"), random_images()
    assert cam_maps(model, images, "hires_cam").shape == (2, 4, 4)
    with pytest.raises(ValueError, match="INTR reads no token of its backbone"):
        attention_rollout(model, images)
    with pytest.raises(ValueError, match="INTR reads no token of its backbone"):
        cam_maps(model, images, "legrad")
    with pytest.raises(ValueError, match="type 'resnet'"):
        cam_maps(resnet, images, "hires_cam")
    with pytest.raises(ValueError, match="takes pixel_values"):
        resnet(prefix_hidden_states=torch.zeros(2, 16, 32))
    with pytest.raises(ValueError, match="Give either pixel_values or prefix_hidden_states"):
        model()
    with pytest.raises(ValueError, match="pixel_values are 48x40 pixels, the backbone expects 32x32"):
        model(random_images(2, 48, 40))
    (tmp_path / "bird.png").write_bytes(b"")
    for command in (("taxonomy", folder, tmp_path / "bird.png"), ("space", folder, "--out", tmp_path / "space")):
        answer = run(*command)
        assert answer.exit_code == 2 and answer.stderr.count("Error: ") == 1, answer.output


def test_maps_lie_on_the_whole_image_where_detr_resizes():
    model, image = tiny_intr("resnet"), Image.new("RGB", (1000, 300))
    processor = build_detr_image_processor(80, 200)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    state = model.last_layer_state(pixels)
    assert pixels.shape[-2:] == (60, 200)
    assert state.grid == model.map_layout(60, 200).grid == (8, 25)  # 60 / 8 rows, the last one cut
    assert map_box(model, processor, image) == pytest.approx((0, 0, 1000, 300))
