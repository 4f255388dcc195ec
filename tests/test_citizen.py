# SPDX-License-Identifier: MIT
"""What tools and users do to any transformers model, done to a Prompt-CAM: it works, or is refused in a sentence."""

import pytest
import torch
from conftest import ID2LABEL, assert_computed, random_images, tiny_backbone_config, tiny_model
from transformers import AutoModelForImageClassification

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone

VARIANTS = {
    "deep": ("vit", {}),
    "shallow": ("vit", {"class_prompt_layer": 0}),
    "dinov2": ("dinov2", {}),
    "unfrozen": ("vit", {"freeze_backbone": False}),
}


@pytest.fixture(params=VARIANTS)
def model(request) -> PromptCAMForImageClassification:
    family, fields = VARIANTS[request.param]
    return tiny_model(family, **fields)


@pytest.fixture
def backbone_folder(tmp_path):
    torch.manual_seed(7)
    build_backbone(tiny_backbone_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


@pytest.mark.parametrize("auto", [PromptCAMForImageClassification, AutoModelForImageClassification])
@pytest.mark.parametrize("dtype", ["auto", "float32", torch.float16])
def test_precision_when_a_model_is_loaded(model, auto, dtype, tmp_path):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    expected = {"auto": torch.bfloat16, "float32": torch.float32}.get(dtype, dtype)
    loaded = auto.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    assert_computed(loaded.float()(random_images()).logits, model.float()(random_images()).logits)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", torch.bfloat16])
def test_precision_when_a_model_is_made_or_has_its_backbone_elsewhere(backbone_folder, dtype, tmp_path):
    build_backbone(tiny_backbone_config()).to(torch.bfloat16).save_pretrained(backbone_folder)
    made = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL, dtype=dtype)
    made.save_pretrained(tmp_path / "prompts", include_backbone=False)
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", dtype=dtype)
    for model in (made, loaded):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
