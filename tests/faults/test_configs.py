# SPDX-License-Identifier: MIT
"""300 altered configurations: refused in a sentence, or loaded to a model that answers with finite numbers."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from faults.conftest import SEED
from faults.processes import caught, is_sentence, refused_well, run
from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.loading import load_pipeline

KIND = "config.json"
NUMBER = 300
SECONDS = 15

DROP = object()
# What stands in a field's place; a NaN and an infinity are JSON to Python.
VALUES = [
    DROP, None, True, False, -1, 0, 1, 2.5, 1e308, float("nan"), float("inf"), 10**6, 10**9, 10**30, "", "x", "1",
    "\x1b[31mred\nline", [], [1], [[]], {}, {"a": 1}, {"model_type": "vit"}, ["x"] * 1000,
]  # fmt: skip
HUGE = ("num_hidden_layers", "hidden_size", "image_size", "intermediate_size", "num_channels", "patch_size")
# Whole changes: paths to what is set there.
BY_HAND = [
    *({("backbone_config", field): size} for field in HUGE for size in (10**6, 2**31, 10**12)),
    *({(field,): 10**9} for field in ("num_agnostic_prompts", "num_labels", "class_prompt_layer")),
    *({("model_type",): name} for name in ("vit", "bert", "nothing", "../prompt_cam", "llama")),
    *({("backbone_config", "model_type"): name} for name in ("bert", "swin", "dinov2", "clip", "prompt_cam")),
    *({place: "org/kernels"} for place in (("attn_implementation",), ("_attn_implementation",))),
    *({("backbone_config", name): "org/kernels"} for name in ("attn_implementation", "_attn_implementation")),
    *({("attn_implementation",): name} for name in ("paged|sdpa", "nothing", "flash_attention_2", "org/kernels:f")),
    {("auto_map",): {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}},
    {("auto_map",): {"AutoConfig": "org/evil--evil.Evil"}},
    {("auto_map",): "evil.Evil"},
    {("backbone_config", "auto_map"): {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}},
    {("quantization_config",): {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    {("quantization_config",): {"quant_method": "torchao", "quant_type": "int8"}},
    {("quantization_config",): {"quant_method": "nothing"}},
    {("dtype",): "nothing"},
    {("dtype",): "float8_e4m3fn"},
    {("transformers_weights",): "../../../../etc/passwd"},
    {("id2label",): {str(number): f"{number}" for number in range(100_000)}},
    {("id2label",): {"0": "a", "1": "a", "2": "b"}},
    {("prompt_sets",): [{"name": "a"}] * 1000},
    {("prompt_sets",): [{"name": "a"}, {"name": "b", "id2label": {"0": "x", "1": "y"}}]},
    {("prompt_sets",): [{"name": 3}]},
    {("backbone_in_checkpoint",): False},
    {("backbone_in_checkpoint",): False, ("backbone_name_or_path",): "../../etc"},
]
SHORT = [{("backbone_config", "num_hidden_layers"): 10**6}, {("attn_implementation",): "org/kernels"}]
# As they stand in the file.
TEXTS = ["", "{", "[]", "null", "3", '"x"', "\x00" * 100, "{}", "[" * 20_000, '{"model_type": "prompt_cam"}', "\ufffe"]


def paths_of(fields: dict[str, Any], before: tuple = ()) -> list[tuple]:
    """Every field, at any depth."""
    own = [(*before, name) for name in fields]
    return own + [
        path for name, value in fields.items() if isinstance(value, dict) for path in paths_of(value, (*before, name))
    ]


def alter(config: dict[str, Any], changes: dict[tuple, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for (*before, name), value in changes.items():
        fields = config
        for step in before:
            fields = fields.get(step) or {}
        fields.pop(name, None)
        if value is not DROP:
            fields[name] = value
    return config


def name_of(changes: dict[tuple, Any]) -> str:
    told = (f"{'.'.join(path)}={'dropped' if value is DROP else repr(value)[:30]}" for path, value in changes.items())
    return "; ".join(told).encode("ascii", "replace").decode()


def cases() -> list:
    drawn = random.Random(SEED)
    config = json.loads(tiny_model(first_prompt_layer=1).config.to_json_string(use_diff=False))
    everything = [{path: value} for path in paths_of(config) for value in VALUES]
    altered = [*BY_HAND, *drawn.sample(everything, NUMBER - len(BY_HAND) - len(TEXTS))]
    short = {name_of(changes): [pytest.mark.short] for changes in SHORT}
    made = [pytest.param(changes, id=name_of(changes), marks=short.get(name_of(changes), [])) for changes in altered]
    return made + [pytest.param(text, id=f"text {text[:30]!r}") for text in TEXTS]


def load(folder: str) -> None:
    """As a user does who has no command line; what is right beyond that, `load_as_commands_do` says."""
    PromptCAMForImageClassification.from_pretrained(folder)


def load_as_commands_do(folder: str, weights: str) -> str | None:
    """What is wrong with the model that was loaded, None where nothing is."""
    model = load_pipeline(folder, "cpu").model
    stored = load_file(weights)
    for name, value in model.state_dict().items():
        if name not in stored or not torch.equal(stored[name].to(value.dtype), value):
            return f"{name} is not what the file holds"
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 32, 32)).logits
    return None if logits.isfinite().all() else f"logits are {logits.tolist()}"


def load_both(folder: str, weights: str) -> list[dict[str, Any]]:
    return [caught(load, folder), caught(load_as_commands_do, folder, weights)]


@pytest.fixture(scope="module", name="weights")
def fixture_weights(world, tmp_path_factory) -> Path:
    """The model's own, by the names that they have in memory; those in a checkpoint are older."""
    path = tmp_path_factory.mktemp("weights") / "whole.safetensors"
    save_file(PromptCAMForImageClassification.from_pretrained(world.model).state_dict(), path)
    return path


@pytest.mark.parametrize("changes", cases())
def test_an_altered_config_is_refused_or_harmless(world, weights, tmp_path, refused, changes):
    folder = shutil.copytree(world.model, tmp_path / "model")
    path = folder / "config.json"
    (folder / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('executed').touch()\n")
    if isinstance(changes, str):
        path.write_text(changes)
    else:
        path.write_text(json.dumps(alter(json.loads(path.read_text()), changes)))
    ran = run(load_both, str(folder), str(weights), seconds=SECONDS)
    assert ran.code == 0, ran
    assert not (folder / "executed").exists(), "a repository's code was run"
    assert "[y/N]" not in ran.out, "the user was asked whether to run it"
    by_hand, by_command = ran.told
    assert "returned" in by_hand or refused_well(by_hand), by_hand
    if "returned" in by_command:
        assert by_command["returned"] is None
    else:
        assert refused_well(by_command), by_command
        refused()


def test_the_judge_knows_a_sentence():
    assert is_sentence("config.json of model has 3 layers, the weights have 2.")
    assert not is_sentence("Several\nlines") and not is_sentence("\x1b[31mred") and not is_sentence("")
