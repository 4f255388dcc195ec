# SPDX-License-Identifier: MIT
"""Does the script that made the embedded backbone compute what it says, and can it go on after an interruption?"""

import configparser
import importlib.util
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, ViTConfig, ViTModel

# Without torchvision, transformers 5.17 has a placeholder at `transformers.AutoImageProcessor`.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf.birds import COLOURS, PARTS, PATTERNS, TRAIT_PARTS, birds_dataset, other_birds_dataset
from prompt_cam_hf.modeling.backbone_prompt_cam import fingerprint_backbone

# The script lies outside of the package.
SCRIPT = Path(__file__).parents[1] / "docs" / "provenance" / "pretrain_birds.py"
spec = importlib.util.spec_from_file_location("pretrain_birds", SCRIPT)
pretrain_birds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pretrain_birds)
AttributeReader, OtherBirds = pretrain_birds.AttributeReader, pretrain_birds.OtherBirds
PretrainArguments, pretrain = pretrain_birds.PretrainArguments, pretrain_birds.pretrain

SIZE = 32


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("birds")


@pytest.fixture(scope="module")
def birds(cache_dir):
    return other_birds_dataset(24, SIZE, num_proc=1, cache_dir=cache_dir)


@pytest.fixture
def small_runs(cache_dir, monkeypatch):
    """Draw in this process, into a folder of the test; train no Prompt-CAM at the end."""
    draw = partial(other_birds_dataset, num_proc=1, cache_dir=cache_dir)
    monkeypatch.setattr(pretrain_birds, "other_birds_dataset", draw)
    monkeypatch.setattr(pretrain_birds, "prompt_cam_accuracy", lambda *_: 0.5)


def small_arguments(output_dir, **changes):
    settings = dict(
        num_birds=24,
        num_steps=6,
        batch_size=4,
        num_layers=2,
        hidden_size=24,
        num_heads=2,
        image_size=SIZE,
        save_steps=3,
        bf16=False,
    )
    return PretrainArguments(str(output_dir), **settings | changes)


def small_reader():
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=SIZE,
        patch_size=8,
    )
    return AttributeReader(ViTModel(config, add_pooling_layer=False)).eval()


def test_the_script_is_left_out_of_the_package():
    config = configparser.ConfigParser()
    config.read(SCRIPT.parents[2] / "setup.cfg")
    assert not [name for name in config["options"]["packages"].split() if "provenance" in name]
    assert not any("provenance" in files for files in config["options.package_data"].values())


def test_a_part_is_in_a_patch_from_five_per_cent_of_its_pixels():
    bits = np.zeros((16, 16), np.uint16)
    bits[0, :4] |= 1 << 3  # 4 of 64 pixels: 6 %
    bits[0, 8:11] |= 1 << 3  # 3 of 64: under 5 %
    bits[8:, 8:] |= 1 << 11
    np.testing.assert_array_equal(pretrain_birds.patch_presence(bits, 8), [[1 << 3, 0], [0, 1 << 11]])


def test_every_bird_comes_with_its_mirror_image_and_labels(birds):
    data = OtherBirds(birds, 8)
    assert len(data) == 48
    batch, mirrored = data.__getitems__(list(range(24))), data.__getitems__(list(range(24, 48)))
    grid = (24, SIZE // 8, SIZE // 8, len(PARTS))
    for index in range(24):
        image = torch.from_numpy(np.array(birds[index]["image"])).permute(2, 0, 1)
        assert torch.equal(batch["images"][index], image)
        assert torch.equal(mirrored["images"][index], image.flip(2))
        present = torch.from_numpy(data.presence[index].astype(np.int64))
        expected = torch.stack([present >> part & 1 for part in range(len(PARTS))], dim=-1).float()
        assert torch.equal(batch["presence"].view(grid)[index], expected)
        assert torch.equal(mirrored["presence"].view(grid)[index], expected.flip(1))
        for labels in (batch, mirrored):
            for part, name in enumerate(TRAIT_PARTS):
                value = birds[index]["values"][name]
                colour = ["natural", *COLOURS][int(labels["colours"][index, part])]
                assert colour == (value.split()[-1] if value else "natural")
                assert int(labels["patterns"][index, part]) == (
                    PATTERNS.index(value.split()[0]) if value and " " in value else 0
                )


def test_birds_of_a_class_are_refused(cache_dir):
    with pytest.raises(ValueError, match="Bird 0 belongs to a class"):
        OtherBirds(birds_dataset("train", 1, SIZE, num_proc=1, cache_dir=cache_dir), 8)


def test_no_query_asks_for_what_no_bird_has():
    queries = pretrain_birds.attribute_queries()
    eye_ring, wing = TRAIT_PARTS.index("eye-ring"), TRAIT_PARTS.index("wing")
    assert (eye_ring, "yellow") not in queries and (eye_ring, "red") in queries
    assert (wing, "barred") in queries and (eye_ring, "barred") not in queries
    assert len(set(queries)) == len(queries) == 8 * 10 + 5 * 2 - 1


def test_losses_against_loops(birds):
    batch = OtherBirds(birds, 8).__getitems__(list(range(5)))
    reader = small_reader()
    scores = torch.randn(5, len(reader.attributes))
    expected = []
    for bird in range(5):
        for query, (part, name) in enumerate(reader.attributes):
            value = birds[bird]["values"][TRAIT_PARTS[part]]
            answer = value is not None and name in value.split()
            expected.append(torch.log1p(torch.exp(-scores[bird, query] if answer else scores[bird, query])))
    loss = reader._query_loss(scores, batch["colours"], batch["patterns"])
    torch.testing.assert_close(loss, 4 * torch.stack(expected).mean())

    patches = torch.randn(5, 16, 24)
    losses = reader._patch_losses(patches, batch["presence"], batch["colours"], batch["patterns"])
    logits = reader.patch_head(patches).view(5, 16, len(TRAIT_PARTS), -1)
    by_part = []
    for part, name in enumerate(TRAIT_PARTS):
        terms = [
            torch.nn.functional.cross_entropy(logits[bird, patch, part, :11], batch["colours"][bird, part])
            + torch.nn.functional.cross_entropy(logits[bird, patch, part, 11:], batch["patterns"][bird, part])
            for bird in range(5)
            for patch in range(16)
            if batch["presence"][bird, patch, PARTS.index(name)]
        ]
        by_part.append(torch.stack(terms).mean())
    torch.testing.assert_close(losses["what"], torch.stack(by_part).mean())


def test_cls_reads_what_the_plain_backbone_computes_without_queries(birds):
    reader = small_reader()
    images = OtherBirds(birds, 8).__getitems__([0, 1])["images"]
    captured = {}
    reader.cls_head.register_forward_pre_hook(lambda _, inputs: captured.update(cls=inputs[0]))
    reader.queries = torch.nn.Parameter(torch.empty(0, 24))
    reader.query_score = torch.nn.Linear(24, 1)
    reader._query_loss = lambda *_: torch.zeros(())
    labels = {name: torch.zeros(2, 8, dtype=torch.long) for name in ("colours", "patterns")}
    with torch.no_grad():
        reader(images, torch.zeros(2, 16, len(PARTS)), **labels)
        plain = reader.backbone(images.float() / 127.5 - 1).last_hidden_state[:, 0]
    torch.testing.assert_close(captured["cls"], plain, atol=1e-5, rtol=1e-5)


def test_a_run_writes_a_backbone_its_log_and_its_cost(tmp_path, small_runs):
    backbone = pretrain(small_arguments(tmp_path, num_steps=60, save_steps=60, learning_rate=3e-3))
    loaded = ViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert fingerprint_backbone(loaded) == fingerprint_backbone(backbone) == summary["fingerprint"]
    assert summary["arguments"]["num_birds"] == 24 and summary["parameters"] == loaded.num_parameters()
    assert AutoImageProcessor.from_pretrained(tmp_path).size == {"height": SIZE, "width": SIZE}
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["step"] == 50 and {"loss", "where", "what", "cls", "query"} <= set(lines[0])
    # The same 24 birds over and over: the heads must learn them.
    assert lines[0]["query"] < 4 * 0.4


class Interruption(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_backbone(tmp_path, small_runs, monkeypatch):
    whole = pretrain(small_arguments(tmp_path / "whole"))
    trainer_class = pretrain_birds.Trainer
    with monkeypatch.context() as patch:
        interrupted = lambda *args, callbacks, **kwargs: trainer_class(  # noqa: E731
            *args, callbacks=[*callbacks, Interruption()], **kwargs
        )
        patch.setattr(pretrain_birds, "Trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(small_arguments(tmp_path / "twice"))
    twice = pretrain(small_arguments(tmp_path / "twice"))
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(twice.state_dict()[name], weight, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
def test_accuracy_of_an_untrained_backbone_is_near_chance(monkeypatch, cache_dir):
    monkeypatch.setattr(pretrain_birds, "birds_dataset", partial(birds_dataset, num_proc=1, cache_dir=cache_dir))
    accuracy = pretrain_birds.prompt_cam_accuracy(small_reader().backbone, SIZE, per_class=6, epochs=2)
    assert 0 <= accuracy < 0.4
