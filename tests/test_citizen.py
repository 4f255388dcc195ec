# SPDX-License-Identifier: MIT
"""What tools and users do to any transformers model, done to a Prompt-CAM: it works, or is refused in a sentence."""

import copy
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from conftest import ID2LABEL, assert_computed, assert_stored, random_images, rarely, tiny_backbone_config, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

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
    with pytest.raises(ValueError, match="unexpected keyword argument 'clas_prompt_layer'"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "model", clas_prompt_layer=0)


def test_saved_fields_never_replace_methods_or_name_code_of_the_hub():
    saved = tiny_model().config.to_dict()
    config = PromptCAMConfig.from_dict({**saved, "to_dict": "x", "_attn_implementation": "eager", "use_prompts": 1})
    assert config.to_dict()["model_type"] == "prompt_cam" and config._attn_implementation is None
    with pytest.raises(ValueError, match="no field 'trust_remote_code'"):
        PromptCAMConfig.from_dict({**saved, "trust_remote_code": True})
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


def train_a_little(model, folder, **arguments):
    """Three steps of transformers' own Trainer."""
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(random_images(8))]
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
    }
    trainer = Trainer(model, TrainingArguments(folder, **{**defaults, **arguments}), train_dataset=data)
    trainer.train()


# Before transformers 5.23, some families called them by the second names.
QUERY_AND_VALUE = ("q_proj", "v_proj", "query", "value")


def lora(model, **fields):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(QUERY_AND_VALUE), r=2, **fields))


@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_lora_in_a_frozen_backbone_trains_alone_is_saved_loaded_and_merged(family, tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = lora(model, lora_dropout=0.1)
    train_a_little(adapted, tmp_path / "run")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert all(parameter.abs().max() > 0 for name, parameter in adapted.named_parameters() if "lora_B" in name)
    adapted.save_pretrained(tmp_path / "adapter")

    images = random_images()
    expected = adapted.eval()(images, trait_classes="all")
    fresh = PromptCAMForImageClassification.from_pretrained(tmp_path / "model")
    assert (fresh(images).logits - expected.logits).abs().max() > 1e-3
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "merged")
    for each in (loaded, merged, reloaded):
        output = each(images, trait_classes="all")
        assert_computed((output.logits, output.trait_maps), (expected.logits, expected.trait_maps))
    changed = {name for name, tensor in reloaded.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(tuple(f"{each}.weight" for each in QUERY_AND_VALUE))}
    with pytest.raises(ValueError, match="has no name to fetch it by"):
        merged.save_pretrained(tmp_path / "prompts", include_backbone=False)


def test_the_example_of_lora_runs(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    page = Path(__file__).parents[1] / "docs" / "transformers.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "peft" in block)
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    model.save_pretrained("my_model")
    dataset = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(random_images(8))]
    names = {"dataset": dataset}
    exec(example, names)
    merged = PromptCAMForImageClassification.from_pretrained("my_merged_model")
    expected = names["adapted"].eval()(random_images()).logits
    assert_computed(merged(random_images()).logits, expected)
    assert not torch.equal(expected, model(random_images()).logits)


def test_lora_and_prompts_train_together(tmp_path):
    model = tiny_model()
    before = model.class_prompts.clone()
    adapted = lora(model, modules_to_save=["classifier"])
    model.class_prompts.requires_grad_(True)
    train_a_little(adapted, tmp_path / "run")
    assert not torch.equal(model.class_prompts, before)
    expected = adapted.eval()(random_images()).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "merged")
    assert_computed(loaded(random_images()).logits, expected)
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())


def test_lora_s_dropout_is_on_in_training_and_the_frozen_backbone_s_is_not():
    model = tiny_model(backbone_fields={"hidden_dropout_prob": 0.1})
    adapted = lora(model, lora_dropout=0.1).train()
    modes = {name: module.training for name, module in adapted.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert {training for name, training in modes.items() if "lora_" in name} == {True}
    assert {training for name, training in modes.items() if "lora_" not in name} == {False}


def test_prompts_are_no_modules_that_peft_could_save():
    adapted = lora(tiny_model(), modules_to_save=["class_prompts"])
    with pytest.raises(ValueError, match="class_prompts is a parameter: leave it out of modules_to_save"):
        adapted.train()


@pytest.mark.parametrize("backbone_elsewhere", [False, True])
def test_quantised_weights_are_saved_and_loaded(backbone_folder, backbone_elsewhere, tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "float", include_backbone=not backbone_elsewhere)
    quantised = PromptCAMForImageClassification.from_pretrained(
        tmp_path / "float", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
    )
    images = random_images()
    expected, output = (each(images, trait_classes="all") for each in (model, quantised))
    difference = (output.logits - expected.logits).abs().max()
    assert 0 < difference < 0.02 * expected.logits.abs().max()
    torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=0.01, rtol=0.05)
    quantised.save_pretrained(tmp_path / "int8")
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "int8")
    assert_computed(loaded(images).logits, output.logits)
    with pytest.raises(ValueError, match="The backbone is quantised"):
        quantised.save_pretrained(tmp_path / "prompts", include_backbone=False)


@pytest.mark.parametrize("labels", [[1, 4], [[1], [4]], [[0, 0.25, 0, 0, 0.75], [1, 0, 0, 0, 0]]], ids=str)
def test_loss_of_one_class_an_image(model, labels):
    labels = torch.tensor(labels)
    output = model(random_images(), labels=labels)
    log_shares = output.logits.log_softmax(-1)
    shares = labels if labels.is_floating_point() else torch.nn.functional.one_hot(labels.flatten(), 5)
    torch.testing.assert_close(output.loss, -(log_shares * shares).sum(-1).mean())
    as_int = labels if labels.is_floating_point() else labels.int()
    torch.testing.assert_close(model(random_images(), labels=as_int).loss, output.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_loss_of_several_classes_an_image(model, dtype):
    model.config.problem_type = "multi_label_classification"
    labels = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=dtype)
    output = model(random_images(), labels=labels)
    shares = output.logits.sigmoid()
    expected = -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean()
    torch.testing.assert_close(output.loss, expected)


def test_other_losses(model, tmp_path):
    before = model.config.to_dict()
    model(random_images(), labels=torch.tensor([1, 4]))
    assert model.config.to_dict() == before
    model.loss_function = lambda labels, logits, config: logits.sum() * 0 + 7
    assert model(random_images(), labels=torch.tensor([1, 4])).loss.item() == 7
    with pytest.raises(ValueError, match="not regression"):
        tiny_model(problem_type="regression")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not regression"):
        PromptCAMForImageClassification.from_pretrained(tmp_path, problem_type="regression")
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path, problem_type="multi_label_classification")
    loaded.save_pretrained(tmp_path)
    assert PromptCAMConfig.from_pretrained(tmp_path).problem_type == "multi_label_classification"


def test_label_smoothing_in_trainer(model, tmp_path):
    trainer = Trainer(model, TrainingArguments(tmp_path, label_smoothing_factor=0.1, report_to=[], use_cpu=True))
    labels = torch.tensor([1, 4])
    loss = trainer.compute_loss(model, {"pixel_values": random_images(), "labels": labels})
    expected = torch.nn.functional.cross_entropy(model(random_images()).logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("switch", ["output_attentions", "output_hidden_states"])
def test_outputs_that_the_configuration_asks_for(model, switch, tmp_path):
    images, returned = random_images(), switch.removeprefix("output_")
    expected = model(images, **{switch: True}).get(returned)
    assert len(expected) >= 3 and model(images).get(returned) is None
    setattr(model.config, switch, True)
    model.save_pretrained(tmp_path)
    for each in (
        model,
        PromptCAMForImageClassification.from_pretrained(tmp_path),
        tiny_model(model.backbone.config.model_type, **model.config.prompt_fields(), **{switch: True}),
    ):
        assert each.backbone.config._attn_implementation == "sdpa"
        assert_computed(each(images).get(returned), expected)
        assert each(images, **{switch: False}).get(returned) is None


def test_tuples_that_the_configuration_asks_for(model, tmp_path):
    expected = model(random_images())
    model.config.return_dict = False
    model.save_pretrained(tmp_path)
    for each in (model, PromptCAMForImageClassification.from_pretrained(tmp_path)):
        (logits,) = each(random_images())
        assert_computed(logits, expected.logits)
        assert_computed(each(random_images(), return_dict=True).logits, expected.logits)


PARTS = ["class_prompts", "agnostic_prompts", "classifier.weight", "classifier.bias"]


@pytest.mark.parametrize("damage", ["missing", "of another shape"])
@pytest.mark.parametrize("part", [*PARTS, "backbone.embeddings.cls_token", "other_prompts.0.classifier.weight"])
def test_weights_that_a_folder_lacks_are_initialised(model, part, damage, tmp_path):
    if part.startswith("other_prompts"):
        if not model.config.freeze_backbone:
            pytest.skip("A trained backbone has one prompt set.")
        model.add_prompts("other", id2label=ID2LABEL)
    if part == "agnostic_prompts" and model.agnostic_prompts is None:
        pytest.skip("A Shallow model has none.")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    saved = {name: tensor.clone() for name, tensor in weights.items()}
    if damage == "missing":
        del weights[part]
    else:
        weights[part] = torch.ones(7)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    # Freed memory is what an uninitialised tensor shows.
    rubbish = [torch.full((size,), 4e25) for size in (1, 32, 32, 32, 160, 320, 320) for _ in range(50)]
    del rubbish
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5 if "prompts" in part.rpartition(".")[2] else 0.2
    for name, tensor in loaded.state_dict().items():
        if name == part:
            assert tensor.abs().max() <= bound and (tensor.any() or part == "classifier.bias")
        elif name in saved:
            assert torch.equal(tensor, saved[name])


def test_modules_of_a_subclass_are_initialised(tmp_path):
    class WithHead(PromptCAMForImageClassification):
        def __init__(self, config):
            super().__init__(config)
            self.head = torch.nn.Linear(150, 150)
            self.post_init()

    tiny_model().save_pretrained(tmp_path)
    head = WithHead.from_pretrained(tmp_path).head
    assert 0.015 < head.weight.std() < 0.025 and not head.bias.any()


def test_input_embeddings_can_be_replaced(family):
    model = tiny_model(family)
    before, images = model(random_images()).logits, random_images()
    replaced = copy.deepcopy(model.get_input_embeddings())
    model.set_input_embeddings(replaced)
    assert model.get_input_embeddings() is replaced
    assert_computed(model(images).logits, before)
    with torch.no_grad():
        for parameter in replaced.parameters():
            parameter *= -1
    assert (model(images).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("include_backbone", [True, False])
def test_shards(backbone_folder, include_backbone, sets, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    if sets == 2:
        model.add_prompts("other", id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "saved", include_backbone=include_backbone, max_shard_size="1KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    for auto in (PromptCAMForImageClassification, AutoModelForImageClassification):
        loaded = auto.from_pretrained(tmp_path / "saved")
        assert_stored(loaded, model)
    single = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    single.load_prompts(tmp_path / "saved", "other")
    assert torch.equal(single.other_prompts[0].class_prompts, (model, *model.other_prompts)[-1].class_prompts)


@pytest.mark.parametrize("variant", ["fp16", None])
def test_variants_of_prompts_alone(backbone_folder, variant, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    for size in ("1KB", "1GB"):
        folder = tmp_path / size
        model.save_pretrained(folder, include_backbone=False, variant=variant, max_shard_size=size)
        assert_stored(PromptCAMForImageClassification.from_pretrained(folder, variant=variant), model)


def rewrite(folder, change):
    """Change the weights of a saved model."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["backbone.layernorm.weight", "class_prompt", "other_prompts.x.class_prompts"])
def test_prompts_alone_bring_no_weights_but_prompts(backbone_folder, name, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    rewrite(tmp_path / "prompts", lambda weights: weights.update({name: torch.ones(32)}))
    with pytest.raises(ValueError, match=f"is to hold prompts only, and holds the weight '{name}' too"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts")
    with pytest.raises(ValueError, match="is to hold prompts only"):
        model.load_prompts(tmp_path / "prompts", "other")


def change_config(folder, fields, backbone_fields):
    saved = json.loads((folder / "config.json").read_text())
    saved["backbone_config"] |= backbone_fields
    (folder / "config.json").write_text(json.dumps(saved | fields))


@pytest.mark.parametrize("include_backbone", [True, False])
@pytest.mark.parametrize(
    ("fields", "backbone_fields", "message"),
    [
        ({}, {"hidden_size": 10**12}, "configuration|loaded"),
        ({}, {"hidden_size": 2**16}, "but its configuration is that of a model of"),
        ({}, {"num_hidden_layers": 999}, "too few for 999 layers"),
        ({"num_agnostic_prompts": 10**9}, {}, "but its configuration is that of a model of"),
        ({}, {"image_size": 10**6}, "but its configuration is that of a model of"),
        ({}, {"intermediate_size": 49}, r"has the shape \(48,\), but its configuration asks for \(49,\)"),
        ({"num_agnostic_prompts": 6}, {}, r"The weight agnostic_prompts of .* asks for \(2, 6, 32\)"),
        ({}, {"hidden_act": "x"}, "cannot be loaded: .*KeyError"),
        ({}, {"patch_size": 0}, "cannot be loaded: .*ZeroDivisionError"),
        ({}, {"num_attention_heads": 0}, "cannot be loaded|hidden"),
    ],
    ids=str,
)
def test_a_configuration_that_the_weights_do_not_fit_takes_no_memory(
    backbone_folder, include_backbone, fields, backbone_fields, message, tmp_path
):
    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model", include_backbone=include_backbone)
    change_config(tmp_path / "model", fields, backbone_fields)
    # What is refused here would be allocated otherwise.
    with pytest.raises(ValueError, match=message) as caught:
        PromptCAMForImageClassification.from_pretrained(tmp_path / "model")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("include_backbone", [True, False])
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "header", "gone", "pickle"])
def test_damaged_weights_are_refused(backbone_folder, include_backbone, damage, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(backbone_folder, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model", include_backbone=include_backbone)
    file = tmp_path / "model" / "model.safetensors"
    content = file.read_bytes()
    if damage in ("gone", "pickle"):
        file.unlink()
        if damage == "pickle":
            (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo no'\ntR.")
    else:
        damaged = {"empty": b"", "cut": content[:-5], "text": b"x" * 99, "header": b"\xff" * 8 + content[8:]}
        file.write_bytes(damaged[damage])
    with pytest.raises((ValueError, OSError)) as caught:
        PromptCAMForImageClassification.from_pretrained(tmp_path / "model")
    assert type(caught.value) in (ValueError, OSError)


def test_gradients_pass_through_the_attention_that_is_returned(model):
    output = model.train()(random_images(), output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.logits[:, 0].sum().backward()
    assert all(weights.grad is not None and weights.grad.abs().max() > 0 for weights in output.attentions)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_in_trainer(model, reentrant, tmp_path):
    plain = copy.deepcopy(model)
    train_a_little(plain, tmp_path, optim="sgd")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    train_a_little(model, tmp_path, optim="sgd", **options)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", [name if name == "deep" else rarely(name) for name in VARIANTS], indirect=True)
def test_bf16_and_compile_in_trainer(model, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    plain = copy.deepcopy(model)
    train_a_little(plain, tmp_path, optim="sgd")
    train_a_little(model, tmp_path, optim="sgd", bf16=True, torch_compile=True, torch_compile_backend="aot_eager")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, plain.get_parameter(name), atol=0.02, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("model", [name if name == "deep" else rarely(name) for name in VARIANTS], indirect=True)
@pytest.mark.filterwarnings("ignore")
def test_onnx_with_trait_maps(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Maps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            output = self.model(pixel_values, trait_classes="all")
            return output.logits, output.trait_maps

    batch = {0: torch.export.Dim("batch")}
    torch.onnx.export(
        Maps(),
        (random_images(2),),
        tmp_path / "model.onnx",
        dynamo=True,
        dynamic_shapes=(batch,),
        input_names=["pixels"],
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = random_images(3)
    logits, maps = session.run(None, {"pixels": images.numpy()})
    expected = model(images, trait_classes="all")
    assert_computed((torch.tensor(logits), torch.tensor(maps)), (expected.logits, expected.trait_maps))
