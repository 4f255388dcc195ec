# SPDX-License-Identifier: MIT
"""Against tensors that the official implementation put out (see tests/parity/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.convert import convert_official_checkpoint, convert_official_state_dict
from prompt_cam_hf.modeling.ranking_prompt_cam import BlurredScores, rank_heads_greedily

FIXTURES = Path(__file__).parent / "parity"


class Official:
    def __init__(self, name: str):
        with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state_dict = {k.removeprefix("ckpt."): v for k, v in self.tensors.items() if k.startswith("ckpt.")}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def convert(self):
        return convert_official_state_dict(
            self.state_dict, image_size=self.meta["image_size"], num_attention_heads=self.meta["num_heads"]
        )


@pytest.fixture(params=["vit_c7", "dinov2_c5"])
def official(request) -> Official:
    return Official(request.param)


@torch.no_grad()
def test_same_scores_and_maps(official):
    model = official.convert()
    output = model(official["pixel_values"], trait_classes="all")
    expected = official["class_to_patch_attention"]
    torch.testing.assert_close(output.logits, official["logits"], atol=1e-5, rtol=0)
    # Fused attention and other processors' kernels round differently: by up to 1.3e-6 was seen.
    torch.testing.assert_close(output.trait_maps.transpose(1, 2).flatten(-2), expected, atol=5e-6, rtol=0)
    model.set_attn_implementation("eager")
    output = model(official["pixel_values"], trait_classes="all")
    torch.testing.assert_close(output.trait_maps.transpose(1, 2).flatten(-2), expected, atol=5e-6, rtol=0)


def test_same_five_training_steps(official):
    model = official.convert().train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.001)
    losses = []
    for _ in range(5):
        loss = model(official["pixel_values"], labels=official["train_labels"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(losses, dtype=torch.float64), official["train_losses"], atol=1e-5, rtol=0)
    prompts = torch.cat((model.agnostic_prompts, model.class_prompts[None]))
    torch.testing.assert_close(prompts, official["trained_prompts"], atol=1e-5, rtol=0)
    torch.testing.assert_close(model.classifier.weight, official["trained_head_weight"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_same_ranking_of_heads(official):
    model = official.convert()
    state = model.last_layer_state(official["pixel_values"])
    classes = official["ranking_targets"][:, None]
    ranking = rank_heads_greedily(model, state, classes)
    blur_order = official["ranking_blur_order"]
    assert torch.equal(ranking.order[:, 0].flip(-1), blur_order)
    # The class's probability after each blur: its own score changes, the others' stay.
    scores = model.last_layer_logits(state)[:, None].repeat(1, blur_order.shape[1], 1)
    left = ranking.scores[:, 0].gather(-1, blur_order)
    scores.scatter_(-1, classes[:, None].expand(-1, left.shape[1], -1), left[..., None])
    probabilities = scores.softmax(-1).gather(-1, classes[:, None].expand(-1, left.shape[1], -1))[..., 0]
    torch.testing.assert_close(probabilities, official["ranking_probabilities"].to(probabilities), atol=1e-5, rtol=0)


def test_checkpoint_file_becomes_model_and_processor(official, tmp_path):
    torch.save({"model_state_dict": official.state_dict, "epoch": 3}, tmp_path / "model.pt")
    names = {index: f"bird {index}" for index in range(official.meta["num_classes"])}
    model, processor = convert_official_checkpoint(
        tmp_path / "model.pt",
        image_size=official.meta["image_size"],
        num_attention_heads=official.meta["num_heads"],
        id2label=names,
    )
    assert model.config.id2label == names
    assert processor.to_dict() == build_image_processor(official.meta["image_size"]).to_dict()
    logits = model(official["pixel_values"]).logits
    torch.testing.assert_close(logits, official["logits"], atol=1e-5, rtol=0)


def test_the_model_does_not_share_memory_with_the_state_dict(official, tmp_path):
    before = {name: tensor.clone() for name, tensor in official.state_dict.items()}
    model = official.convert()
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        parameter.data.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in official.state_dict.items())


def test_prompts_of_the_last_layers_only(official):
    """The official vpt_layer: prompts for the last two of three layers."""
    prompts = official.state_dict["vpt.prompt_embeddings"]
    official.state_dict["vpt.prompt_embeddings"] = prompts[1:]
    model = official.convert()
    assert model.config.first_prompt_layer == 1
    assert torch.equal(model.agnostic_prompts, prompts[1:2])


def test_bad_state_dicts_are_refused():
    def convert(drop=(), add=None, **options):
        official = Official("vit_c7")
        for name in drop:
            del official.state_dict[name]
        official.state_dict.update(add or {})
        return convert_official_state_dict(
            official.state_dict, **{"image_size": 64, "num_attention_heads": 4} | options
        )

    with pytest.raises(ValueError, match=r"no tensor 'vpt.prompt_embeddings'"):
        convert(drop=["vpt.prompt_embeddings"])
    with pytest.raises(ValueError, match=r"blocks.1.adapter.weight is left over"):
        convert(add={"blocks.1.adapter.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"2 of its weights do not fit: .*blocks.1.norm1.weight is missing"):
        convert(drop=["blocks.1.norm1.weight", "blocks.1.norm1.bias"])
    with pytest.raises(ValueError, match="16 positions, but image_size=224"):
        convert(image_size=224)
    with pytest.raises(ValueError, match="id2label names 2 classes, but the checkpoint has prompts for 7"):
        convert(id2label={0: "a", 1: "b"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("blocks.1.mlp.fc2.bias", torch.ones(47), r"blocks.1.mlp.fc2.bias has the shape \[47\] instead of \[48\]"),
        ("blocks.2.attn.qkv.weight", torch.ones(9, 48), r"qkv.weight has the shape \[9, 48\] instead of \[144, 48\]"),
        ("head.bias", torch.ones(7), r"no tensor 'head.bias' of the shape \[1\]"),
        ("head.weight", torch.ones(7, 48), r"no tensor 'head.weight' of the shape \[1, 48\]"),
        ("vpt.prompt_embeddings", torch.ones(3, 7, 40), r"of the shape \[3, 7, 48\]"),
        ("vpt.prompt_embeddings", torch.ones(9, 7, 48), "prompts for 9 layers, but 3 blocks"),
        ("vpt.prompt_embeddings", torch.ones(7, 48), "no tensor 'vpt.prompt_embeddings' with 3 axes"),
        ("pos_embed", torch.ones(1, 18, 48), "17 positions, but image_size=64"),
        ("blocks.999998.attn.qkv.weight", torch.ones(144, 48), "its 4 blocks are not numbered from 0 on"),
        ("norm.weight", [1.0] * 48, "'norm.weight' is not the name of a dense tensor of numbers"),
        ("norm.weight", torch.ones(48).to_sparse(), "'norm.weight' is not the name of a dense tensor of numbers"),
        ("norm.weight", torch.ones(48, dtype=torch.int64), "'norm.weight' is not the name of a dense tensor"),
        ("norm.weight", torch.ones(0), "'norm.weight' is not the name of a dense tensor"),
        (7, torch.ones(48), "7 is not the name of a dense tensor"),
    ],
)
def test_damaged_tensors_are_refused_in_a_sentence(name, value, message, tmp_path):
    torch.save({"model_state_dict": Official("vit_c7").state_dict | {name: value}}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as error:
        convert_official_checkpoint(tmp_path / "model.pt", num_attention_heads=4)
    assert "\n" not in str(error.value)


def test_blocks_that_are_hardly_there_are_refused_at_once():
    tensor = torch.ones(1)
    many = {f"blocks.{number}.attn.qkv.weight": tensor for number in range(99_999)}
    with pytest.raises(ValueError, match="its 99999 blocks are not numbered from 0 on, or lack most of their tensors"):
        convert_official_state_dict(Official("vit_c7").state_dict | many, num_attention_heads=4)


def test_a_list_in_place_of_a_state_dict_is_refused():
    with pytest.raises(ValueError, match="its state dict is a list"):
        convert_official_state_dict(list(Official("vit_c7").state_dict.values()))


@pytest.mark.parametrize("heads", [5, 100, -1])
def test_a_number_of_heads_that_cannot_be_is_refused(heads):
    with pytest.raises(ValueError, match=rf"its 48 channels cannot be divided among {heads} heads"):
        convert_official_state_dict(Official("vit_c7").state_dict, num_attention_heads=heads)


def test_a_number_of_heads_that_cannot_be_known_is_refused():
    wide = Official("vit_c7").state_dict | {"patch_embed.proj.weight": torch.ones(100, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"its 100 channels cannot be divided among 1\.5625 heads; give the number"):
        convert_official_state_dict(wide)


class _Payload:
    def __reduce__(self):
        return print, ("code was run",)


def test_files_that_are_not_checkpoints_are_refused_unexecuted(tmp_path, capsys):
    torch.save({"model_state_dict": _Payload()}, tmp_path / "attack.pt")
    with pytest.raises(ValueError, match=r"attack.pt is not a checkpoint of plain tensors"):
        convert_official_checkpoint(tmp_path / "attack.pt")
    assert "code was run" not in capsys.readouterr().out
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no key 'model_state_dict'"):
        convert_official_checkpoint(tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pt is not a checkpoint"):
        convert_official_checkpoint(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        convert_official_checkpoint(tmp_path / "nowhere.pt")


@torch.no_grad()
def test_blurring_equals_replacing_the_attention_by_hand():
    """Independent of the official code: uniform attention means the mean of the values."""
    official = Official("vit_c7")
    model = official.convert()
    state = model.last_layer_state(official["pixel_values"])
    classes = official["ranking_targets"][:, None]
    q, k, v = state.projections
    layer = model.backbone.layers[-1]
    for blur, first_token in (("tokens", 0), ("patches", -16)):
        weights = torch.softmax(q @ k.transpose(2, 3) / 12**0.5, dim=-1)
        weights[:, 2] = 0
        weights[:, 2, :, first_token:] = 1 / weights[0, 0, 0, first_token:].numel()
        hidden = state.class_prompts + layer.attention.o_proj((weights @ v).transpose(1, 2).flatten(-2))
        expected = model.score(hidden + layer.mlp(layer.layernorm_after(hidden)))
        blurred = torch.zeros(4, 1, 1, 4, dtype=torch.bool)
        blurred[..., 2] = True
        got = BlurredScores(model, state, classes, blur)(blurred)
        torch.testing.assert_close(got[:, 0, 0], expected.gather(1, classes)[:, 0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='use "tokens" or "patches"'):
        BlurredScores(model, state, classes, "gaussian")
