# SPDX-License-Identifier: MIT
"""Backbones in timm's and open_clip's formats, and those of transformers whose encoder is another family's.

`tests/backbones` was made by timm 1.0.31 and open_clip 3.3.0: tiny random models, each with images and what the
library computes for all tokens after the final norm.
"""

import importlib.util
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ID2LABEL, rarely
from hub_server import connect, serve
from PIL import Image
from safetensors.torch import load_file, save_file
from test_hub_loading import other_process
from transformers import (
    IJepaConfig,
    IJepaModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTMSNConfig,
    ViTMSNModel,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.baselines.linear_probe import build_linear_probe
from prompt_cam_hf.baselines.vpt import VPTForImageClassification
from prompt_cam_hf.data.image_processors import backbone_image_processor
from prompt_cam_hf.modeling.backbone_prompt_cam import (
    backbone_layers,
    embed,
    final_norm,
    grid_size,
    rotary_positions,
    run_layer,
)
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import num_prefix_tokens

BACKBONES = sorted((Path(__file__).parent / "backbones").iterdir())
TOLERANCE = 1e-5  # of the largest expected number
FAMILIES = {
    "open_clip_b": "CLIPVisionModel",
    "open_clip_l14": "CLIPVisionModel",
    "open_clip_quickgelu": "CLIPVisionModel",
    "timm_clip": "CLIPVisionModel",
    "timm_clip_quickgelu": "CLIPVisionModel",
    "timm_deit_distilled": "DeiTModel",
    "timm_dinov2": "Dinov2Model",
    "timm_dinov2_giant_swiglu": "Dinov2Model",
    "timm_dinov2_reg4": "Dinov2WithRegistersModel",
    "timm_dinov3": "DINOv3ViTModel",
    "timm_dinov3_qkvb": "DINOv3ViTModel",
    "timm_siglip": "SiglipVisionModel",
    "timm_vit_dino": "ViTModel",
}


@pytest.fixture(params=BACKBONES, ids=lambda folder: folder.name)
def source(request) -> Path:
    return request.param


@pytest.fixture
def folder(tmp_path):
    """A private copy of a backbone's folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(BACKBONES[0].parent / name, tmp_path / name))

    return copy


@torch.no_grad()
def run_tokens(backbone, pixel_values):
    """All tokens after the final norm, without prompts."""
    hidden_states = embed(backbone, pixel_values, False)
    grid = grid_size(backbone.config, *pixel_values.shape[-2:])
    rotary = rotary_positions(backbone, hidden_states, grid, num_prefix_tokens(backbone.config))
    for layer in backbone_layers(backbone):
        hidden_states = run_layer(layer, hidden_states, backbone.config, query_rotary=rotary).hidden_states
    return final_norm(backbone)(hidden_states)


def assert_gives_expected_tokens(backbone, source, tolerance=TOLERANCE):
    expected = load_file(source / "expected.safetensors")
    tokens = run_tokens(backbone, expected["pixel_values"])
    assert tokens.shape == expected["tokens"].shape
    assert (tokens - expected["tokens"]).abs().max() <= tolerance * expected["tokens"].abs().max()


def weights_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.endswith(("model.safetensors", ".bin")))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    path = weights_file(folder)
    return torch.load(path, weights_only=True) if path.suffix == ".bin" else load_file(path)


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    path = weights_file(folder)
    torch.save(weights, path) if path.suffix == ".bin" else save_file(weights, path)


def edit_config(folder: Path, **arguments) -> None:
    """Set `model_args` of timm's configuration, or with another name a field of it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    fields = {name: arguments.pop(name) for name in ("architecture", "pretrained_cfg") if name in arguments}
    config["model_args"] |= arguments
    path.write_text(json.dumps(config | fields))


def answers(model, source):
    with torch.no_grad():
        return model(load_file(source / "expected.safetensors")["pixel_values"]).logits


def test_neither_library_is_installed():
    assert importlib.util.find_spec("timm") is None and importlib.util.find_spec("open_clip") is None


def test_all_tokens_are_those_of_the_library(source):
    backbone = load_backbone(source)
    assert type(backbone).__name__ == FAMILIES[source.name]
    assert backbone.dtype == torch.float32 and not backbone.training
    assert_gives_expected_tokens(backbone, source)


def test_whole_and_prompts_only_round_trips(source, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(source, id2label=ID2LABEL)
    expected = answers(model, source)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    assert not any(name.startswith("backbone.") for name in load_file(tmp_path / "prompts" / "model.safetensors"))
    for name in ("whole", "prompts"):
        loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / name)
        assert loaded.config.backbone_name_or_path == str(source)
        assert loaded.config.backbone_fingerprint == model.config.backbone_fingerprint
        torch.testing.assert_close(answers(loaded, source), expected, atol=1e-6, rtol=1e-6)
        assert_gives_expected_tokens(loaded.backbone, source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage(source, folder, dtype):
    copy = folder(source.name)
    rounded = {name: tensor.to(dtype) for name, tensor in read_weights(copy).items()}
    write_weights(copy, rounded)
    backbone = load_backbone(copy)
    assert backbone.dtype == torch.float32
    write_weights(copy, {name: tensor.float() for name, tensor in rounded.items()})
    for name, tensor in load_backbone(copy).state_dict().items():
        assert torch.equal(backbone.state_dict()[name], tensor)
    assert_gives_expected_tokens(backbone, source, tolerance=0.05)


@pytest.mark.parametrize("name", ["timm_dinov2_reg4", "open_clip_l14"])
def test_sharded_weights(name, folder):
    copy = folder(name)
    path, weights = weights_file(copy), read_weights(copy)
    path.unlink()
    shards = {key: f"part-{index % 2}.safetensors" for index, key in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        save_file({key: weights[key] for key in weights if shards[key] == shard}, copy / shard)
    (copy / f"{path.name}.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_gives_expected_tokens(load_backbone(copy), copy)


@pytest.mark.parametrize("name", ["open_clip_quickgelu", rarely("timm_dinov2_reg4"), rarely("timm_siglip")])
def test_prompts_only_through_the_hub_where_only_transformers_is(name, tmp_path):
    source = BACKBONES[0].parent / name
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with serve() as hub:
        commit = hub.add("museum/backbone", files)
        with connect(hub, tmp_path / "home"):
            model = PromptCAMForImageClassification.from_backbone(
                "hf-hub:museum/backbone", id2label=ID2LABEL, revision=commit.oid
            )
            assert model.config.backbone_name_or_path == "museum/backbone"
            model.save_pretrained(tmp_path / "prompts", include_backbone=False)
        hub.add("org/prompts", {path.name: path.read_bytes() for path in (tmp_path / "prompts").iterdir()})
        code = (
            "import importlib.util, sys; from safetensors.torch import load_file;"
            "assert not any(map(importlib.util.find_spec, ('prompt_cam_hf', 'timm', 'open_clip')));"
            "from transformers import AutoModelForImageClassification as Auto;"
            "model = Auto.from_pretrained('org/prompts', trust_remote_code=True);"
            "print(model(load_file(sys.argv[2])['pixel_values']).logits.tolist())"
        )
        expected = str(source / "expected.safetensors")
        for settings in ({}, {"HF_HUB_OFFLINE": "1"}):
            run = other_process(code, hub.url, tmp_path / "elsewhere", expected, package=False, **settings)
            assert run.returncode == 0, run.stderr
            logits = torch.tensor(json.loads(run.stdout.splitlines()[-1]))
            torch.testing.assert_close(logits, answers(model, source), atol=1e-5, rtol=1e-5)


def test_hub_keywords_reach_every_file(tmp_path):
    files = {f"inner/{path.name}": path.read_bytes() for path in BACKBONES[0].iterdir()}
    with serve() as hub:
        first = hub.add("museum/backbone", files)
        hub.add("museum/backbone", {"inner/open_clip_config.json": b"{}"})
        with connect(hub, tmp_path / "home"):
            where = {"revision": first.oid, "subfolder": "inner", "cache_dir": tmp_path / "cache"}
            assert_gives_expected_tokens(load_backbone("museum/backbone", **where), BACKBONES[0])
            asked = len(hub.requests)
            assert_gives_expected_tokens(
                load_backbone("museum/backbone", local_files_only=True, **where), BACKBONES[0]
            )
            assert len(hub.requests) == asked
            with pytest.raises(FileNotFoundError, match="has no revision other"):
                load_backbone("museum/backbone", revision="other")
            with pytest.raises(FileNotFoundError, match="neither a folder museum/nothing nor a repository"):
                load_backbone("museum/nothing")


def test_weights_that_do_not_fit_are_named(source, folder):
    copy = folder(source.name)
    weights = read_weights(copy)
    is_timm = source.name.startswith("timm")
    layer = "blocks.1." if is_timm else "visual.transformer.resblocks.1."
    norm, out = ("norm1.bias", "attn.proj.weight") if is_timm else ("ln_1.bias", "attn.out_proj.weight")
    without = {name: tensor for name, tensor in weights.items() if name != layer + norm}
    faults = {
        f"{layer}{norm} is missing": without,
        f"{layer}extra is left over": weights | {f"{layer}extra": torch.zeros(1)},
        rf"{layer}{out} has the shape \[3, 4\] instead of ": weights | {layer + out: torch.zeros(3, 4)},
        "is missing.*is missing": {name: weights[name] for name in weights if ".1." not in name},
        r"blocks\.7\.\S+ is left over": weights | {(layer + norm).replace(".1.", ".7."): weights[layer + norm]},
    }
    for message, wrong in faults.items():
        write_weights(copy, {name: tensor.clone() for name, tensor in wrong.items()})
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(copy)
        assert str(copy) in str(error.value)


def test_heads_and_text_towers_may_be_left_over(folder):
    for name, extra in {"timm_vit_dino": "head.weight", "open_clip_b": "text.transformer.weight"}.items():
        copy = folder(name)
        write_weights(copy, read_weights(copy) | {extra: torch.zeros(2, 2)})
        assert_gives_expected_tokens(load_backbone(copy), copy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "resnet50"}, "architecture 'resnet50' is not among those that docs/backbones.md lists"),
        ({"architecture": "vit_base_patch16_rope_224"}, "'vit_base_patch16_rope_224' is not among"),
        ({"qk_norm": True}, "'vit_base_patch16_224' with qk_norm is not among"),
        ({"act_layer": "relu"}, "transformers has no relu transformer"),
        ({"class_token": False, "init_values": 0.1}, "transformers has no gelu transformer with init_values"),
        ({"num_heads": 7}, "its width 48 cannot be divided among 7 heads"),
        ({"depth": 2}, r"blocks\.2\.\S+ is left over"),
        ({"patch_size": [8, 4]}, r"patches of \[8, 4\] pixels are not the squares"),
        ({"img_size": None}, r"its images of \[\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_timm_has_and_transformers_has_not_is_refused(folder, fields, message):
    copy = folder("timm_vit_dino")
    if fields == {"img_size": None}:
        config = json.loads((copy / "config.json").read_text())
        config["pretrained_cfg"], config["model_args"] = {}, {"embed_dim": 48, "depth": 3, "num_heads": 4}
        (copy / "config.json").write_text(json.dumps(config))
    else:
        edit_config(copy, **fields)
    with pytest.raises(ValueError, match=message):
        load_backbone(copy)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"timm_model_name": "convnext_base"}, "its image tower has convnext_base"),
        ({"layers": [3, 4, 6, 3]}, "its image tower has the layers of a ResNet"),
        ({"ls_init_value": 0.1}, "its image tower has ls_init_value"),
        ({"norm_kwargs": {"elementwise_affine": False}}, "its image tower has elementwise_affine"),
        ({"head_width": 13}, "its width 48 cannot be divided"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_towers_of_open_clip_are_refused_by_name(folder, vision, message):
    copy = folder("open_clip_b")
    path = copy / "open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["vision_cfg"] |= vision
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_backbone(copy)


class Payload:
    def __reduce__(self):
        return (open, ("ran", "w"))


def test_a_pickled_file_with_code_in_it_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = folder("open_clip_quickgelu")
    path = weights_file(copy)
    torch.save({"weight": Payload()}, path)
    with pytest.raises(ValueError, match=r"open_clip_pytorch_model\.bin is damaged or holds more than tensors"):
        load_backbone(copy)
    path.write_bytes(pickle.dumps({"weight": Payload()}))
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_backbone(copy)
    assert not (tmp_path / "ran").exists()
    torch.save({"epoch": 3}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_backbone(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no weights; they would be in open_clip_model\.safetensors"):
        load_backbone(copy)


def test_a_transformers_configuration_comes_first(folder):
    """Many repositories have both."""
    copy = folder("open_clip_b")
    backbone = load_backbone(copy)
    backbone.save_pretrained(copy)
    (copy / "open_clip_config.json").write_text('{"model_cfg": {}}')
    assert_gives_expected_tokens(load_backbone(copy), copy)


def test_baselines_stand_on_the_same_backbones(source):
    pixel_values = load_file(source / "expected.safetensors")["pixel_values"]
    vpt = VPTForImageClassification.from_backbone(source, id2label=ID2LABEL)
    assert vpt(pixel_values).logits.shape == (2, len(ID2LABEL))
    assert_gives_expected_tokens(vpt.backbone, source)
    if not source.name.startswith("timm_dinov3"):  # transformers has no classification model of that family
        probe = build_linear_probe(source, id2label=ID2LABEL)
        assert probe(pixel_values=pixel_values).logits.shape == (2, len(ID2LABEL))
        assert_gives_expected_tokens(load_backbone(probe), source)


_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    **{"image_size": 32, "patch_size": 8},
}
_DECODER = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_num_hidden_layers": 1}
SAME_ENCODERS = {
    "vit_mae": lambda: ViTMAEForPreTraining(ViTMAEConfig(**_SIZES, **_DECODER, mask_ratio=0.75)),
    "vit_msn": lambda: ViTMSNModel(ViTMSNConfig(**_SIZES)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**_SIZES)),
}


@pytest.mark.parametrize("family", SAME_ENCODERS)
def test_mae_msn_and_ijepa(family, tmp_path):
    model = SAME_ENCODERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    pixel_values = torch.randn(2, 3, 32, 32)
    own = model.base_model
    with torch.no_grad():
        if family == "vit_mae":  # nothing hidden, in order
            assert isinstance(own, ViTMAEModel)
            own.config.mask_ratio = 0.0
            expected = own(pixel_values, noise=torch.arange(16.0).expand(2, -1)).last_hidden_state
            own.config.mask_ratio = 0.75
        else:
            expected = own(pixel_values).last_hidden_state
    model.save_pretrained(tmp_path / "backbone")
    torch.testing.assert_close(run_tokens(load_backbone(tmp_path / "backbone"), pixel_values), expected)

    made = PromptCAMForImageClassification.from_backbone(tmp_path / "backbone", id2label=ID2LABEL)
    of_loaded = PromptCAMForImageClassification.from_backbone(model, id2label=ID2LABEL)
    assert made.config.backbone_fingerprint == of_loaded.config.backbone_fingerprint
    torch.testing.assert_close(run_tokens(of_loaded.backbone, pixel_values), expected)
    with torch.no_grad():
        logits = made(pixel_values).logits
    for include_backbone in (True, False):
        made.save_pretrained(tmp_path / "saved", include_backbone=include_backbone)
        loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "saved")
        with torch.no_grad():
            torch.testing.assert_close(loaded(pixel_values).logits, logits)
    probe = build_linear_probe(tmp_path / "backbone", id2label=ID2LABEL)
    probe.save_pretrained(tmp_path / "probe")
    torch.testing.assert_close(run_tokens(load_backbone(tmp_path / "probe"), pixel_values), expected)


def test_a_transformers_backbone_without_some_weights_is_refused(tmp_path):
    load_backbone(BACKBONES[-1]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("fc1.bias") or name.endswith("intermediate.dense.bias"))
    save_file({key: weights[key] for key in weights if key != name}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of ViTModel: \S*fc1\.bias\.$"):
        load_backbone(tmp_path)


def normalised(image: Image.Image, mean, std) -> torch.Tensor:
    pixels = np.asarray(image, dtype=np.float64) / 255
    return torch.from_numpy((pixels - mean) / std).permute(2, 0, 1).float()


def centre(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def random_image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((91, 60), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("name", "changes", "resized", "resample"),
    [
        ("timm_vit_dino", {}, (53, 35), Image.Resampling.BICUBIC),  # 32 / 0.9 on the shortest edge
        ("timm_clip", {"crop_pct": 1.0, "interpolation": "bilinear"}, (48, 32), Image.Resampling.BILINEAR),
        ("timm_dinov2", {"crop_mode": "squash"}, (42, 42), Image.Resampling.BICUBIC),
        ("timm_siglip", {"crop_mode": "squash"}, (35, 35), Image.Resampling.BICUBIC),
        ("open_clip_b", {}, (32, 32), Image.Resampling.BICUBIC),
        ("open_clip_quickgelu", {"interpolation": "bilinear"}, (48, 32), Image.Resampling.BILINEAR),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_images_as_the_backbone_expects_them(folder, tmp_path, name, changes, resized, resample):
    copy = folder(name)
    key = "pretrained_cfg" if name.startswith("timm") else "preprocess_cfg"
    path = copy / ("config.json" if name.startswith("timm") else "open_clip_config.json")
    config = json.loads(path.read_text())
    config[key] |= changes
    path.write_text(json.dumps(config))
    image, told = random_image(), config[key]
    side = load_file(copy / "expected.safetensors")["pixel_values"].shape[-1]
    expected = normalised(centre(image.resize(resized, resample), side), told["mean"], told["std"])

    processor = backbone_image_processor(copy)
    processor.save_pretrained(tmp_path / "saved")
    for used in (processor, AutoImageProcessor.from_pretrained(tmp_path / "saved")):
        got = used(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_what_a_format_leaves_out_of_its_preprocessing(folder):
    copy = folder("open_clip_b")
    config = json.loads((copy / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {}
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    assert backbone_image_processor(copy).size["shortest_edge"] == 32
    copy = folder("timm_clip")
    edit_config(copy, pretrained_cfg={"input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.9})
    with pytest.raises(ValueError, match="does not say 'mean' of its images"):
        backbone_image_processor(copy)
    edit_config(copy, pretrained_cfg={"input_size": [3, 32, 32], "crop_mode": "border", "crop_pct": 0.9})
    with pytest.raises(ValueError, match="crop_mode 'border' for images of 32x32 pixels is not supported"):
        backbone_image_processor(copy)


def test_the_processor_of_transformers_is_its_own(tmp_path):
    load_backbone(BACKBONES[-1]).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 24, "width": 20}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    processor = backbone_image_processor(tmp_path)
    assert (processor.size["height"], processor.size["width"]) == (24, 20)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3]
