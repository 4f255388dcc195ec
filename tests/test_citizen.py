# SPDX-License-Identifier: MIT
"""What tools and users do to any transformers model, done to a Prompt-CAM: it works, or is refused in a sentence."""

import logging

import pytest
import torch
from conftest import ID2LABEL, assert_computed, random_images, tiny_backbone_config, tiny_model
from transformers import AutoConfig, AutoModelForImageClassification

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone
from prompt_cam_hf.modeling.configuration_prompt_cam import logger

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


def test_what_a_tool_saved_in_a_configuration_is_kept_and_what_a_user_misspells_is_refused(
    tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "some", "bits": 8}
    model.config.some_tool_s_field = {"a": 1}
    model.config.save_pretrained(tmp_path)
    for config_class in (PromptCAMConfig, AutoConfig):
        caplog.clear()
        logger.warning_once.cache_clear()
        config = config_class.from_pretrained(tmp_path)
        assert config.quantization_config == {"quant_method": "some", "bits": 8}
        assert config.some_tool_s_field == {"a": 1}
        assert [record.getMessage() for record in caplog.records] == [
            "The saved configuration has fields that PromptCAMConfig does not know: some_tool_s_field."
        ]
        assert "some_tool_s_field" in config.to_dict()
    with pytest.raises(ValueError, match="no field 'clas_prompt_layer'"):
        PromptCAMConfig(backbone_config=tiny_backbone_config(), id2label=ID2LABEL, clas_prompt_layer=0)
    with pytest.raises(ValueError, match="no field 'clas_prompt_layer'"):
        PromptCAMForImageClassification.from_backbone(
            build_backbone(tiny_backbone_config()), id2label=ID2LABEL, clas_prompt_layer=0
        )
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match="unexpected keyword argument 'clas_prompt_layer'"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "model", clas_prompt_layer=0)


def test_saved_fields_never_replace_methods_or_name_code_of_the_hub():
    saved = tiny_model().config.to_dict()
    config = PromptCAMConfig.from_dict({**saved, "to_dict": "x", "_attn_implementation": "eager", "use_prompts": 1})
    assert config.to_dict()["model_type"] == "prompt_cam" and config._attn_implementation is None
    code = {"attn_implementation": "someone/kernel"}
    for fields in (code, {"backbone_config": saved["backbone_config"] | code}):
        with pytest.raises(ValueError, match="attn_implementation='someone/kernel', code from the Hub"):
            PromptCAMConfig.from_dict({**saved, **fields})


def test_classes_are_renamed_on_a_configuration_or_named_by_label2id_alone(tmp_path):
    model = tiny_model()
    names = {index: f"Vogel {index}" for index in range(5)}
    numbers = {name: index for index, name in names.items()}
    model.config.id2label = names
    model.save_pretrained(tmp_path)
    for config in (
        PromptCAMForImageClassification.from_pretrained(tmp_path).config,
        PromptCAMConfig(backbone_config=tiny_backbone_config(), label2id=numbers),
        PromptCAMConfig.from_dict(tiny_model().config.to_dict(), label2id=numbers),
        PromptCAMConfig.from_dict(tiny_model().config.to_dict(), id2label=names, label2id=numbers),
    ):
        assert (config.id2label, config.label2id) == (names, numbers)
    with pytest.raises(ValueError, match="label2id contradicts id2label"):
        PromptCAMForImageClassification.from_pretrained(tmp_path, id2label=ID2LABEL, label2id=numbers)


@pytest.mark.parametrize(
    "fields",
    [
        {"class_prompt_layer": "last"},
        {"id2label": [1, 2]},
        {"id2label": None, "label2id": None, "num_labels": 10**12},
        {"dtype": "float3"},
        {"prompt_sets": [{}]},
        {"prompt_sets": 3},
        {"backbone_config": []},
        {"backbone_config": {"model_type": []}},
        {"backbone_config": {"model_type": "dinov2", "num_hidden_layers": 10**12}},
        {"backbone_config": {"model_type": "vit", "num_hidden_layers": None}},
        {"backbone_config": {"model_type": "vit", "hidden_size": "x"}},
    ],
    ids=str,
)
def test_a_damaged_configuration_is_refused_in_a_sentence(fields):
    saved = {**tiny_model().config.to_dict(), **fields}
    with pytest.raises(ValueError, match=r"^[^\n]+[.]$"):
        PromptCAMConfig.from_dict(saved)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000, "{"])
def test_a_file_that_is_no_configuration_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    for loaded in (PromptCAMConfig, PromptCAMForImageClassification):
        with pytest.raises((ValueError, OSError)):
            loaded.from_pretrained(tmp_path)
