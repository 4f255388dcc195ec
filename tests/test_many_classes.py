# SPDX-License-Identifier: MIT
"""Thousands of classes: the same numbers, in bounded memory."""

import subprocess
import sys

import pytest
import torch
from conftest import NUM_CLASSES, assert_computed, random_images, tiny_model
from straightforward import run_straightforwardly

from prompt_cam_hf.modeling import backbone_prompt_cam

IN_LITTLE_MEMORY = """
import resource
import torch
from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification

torch.set_num_threads(1)
size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
backbone = {"model_type": "vit", "intermediate_size": 64, **size}
config = PromptCAMConfig(backbone_config=backbone, num_labels=10_000, num_agnostic_prompts=0)
model, images = PromptCAMForImageClassification(config), torch.randn(2, 3, 32, 32)
labels = torch.tensor([1, 9_999])
model.encode_prefix(images)
in_use = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (in_use + 700 * 2**20, resource.RLIM_INFINITY))
with torch.no_grad():
    assert model.eval()(images).logits.isfinite().all()
model.train()(images, labels=labels).loss.backward()
assert model.class_prompts.grad.isfinite().all()
"""


@pytest.fixture
def few_at_once(monkeypatch):
    """Blocks of two queries or less, and two classes are many."""
    for name, value in {"_MANY_QUERIES": 2, "_QUERIES_AT_ONCE": 2, "_SCORES_AT_ONCE": 2 * 4 * 17 * 2}.items():
        monkeypatch.setattr(backbone_prompt_cam, name, value)
    monkeypatch.setattr(backbone_prompt_cam, "_ROWS_AT_ONCE", 2)


@pytest.mark.parametrize("agnostic", [0, 3])
def test_scores_maps_and_gradients_are_those_of_the_long_way(family, agnostic, few_at_once, monkeypatch):
    known = []
    compute = backbone_prompt_cam.know_queries
    monkeypatch.setattr(backbone_prompt_cam, "know_queries", lambda *args: known.append(1) or compute(*args))
    model, images = tiny_model(family, num_agnostic_prompts=agnostic), random_images(3)
    labels = torch.arange(3) % NUM_CLASSES
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = run_straightforwardly(model, images)
    loss = torch.nn.functional.cross_entropy(expected.logits, labels)
    gradients = torch.autograd.grad(loss, trained)
    output = model(images, labels=labels, trait_classes="all")
    assert_computed(output.logits, expected.logits)
    assert_computed(output.trait_maps, expected.trait_maps)
    assert_computed(torch.autograd.grad(output.loss, trained), gradients)
    with torch.no_grad():
        assert_computed(model(images).logits, expected.logits)
    assert len(known) == 2


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_ten_thousand_classes_are_run_and_trained_in_little_memory():
    """The attention of the class prompts to each other alone would take 1.6 GB an image."""
    run = subprocess.run([sys.executable, "-c", IN_LITTLE_MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
