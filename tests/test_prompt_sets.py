# SPDX-License-Identifier: MIT
"""Several prompt sets on one backbone: each is the model that has this set alone."""

import copy
import json
import pickle
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FAMILIES, assert_computed, assert_stored, random_images, rarely, tiny_backbone_config, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTForImageClassification

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import backbone_layers, build_backbone

# What tells a variant, and how many classes it has: no two sets of a model have the same shapes.
VARIANTS = {
    "deep": ({}, 5),
    "bare": ({"num_agnostic_prompts": 0}, 4),
    "shallow": ({"class_prompt_layer": 0}, 3),
    "between": ({"class_prompt_layer": 1, "num_agnostic_prompts": 2}, 6),
    "late": ({"first_prompt_layer": 1, "prompt_dropout": 0.3}, 2),
}
PARTS = ("class_prompts", "agnostic_prompts", "classifier.weight", "classifier.bias")


def names_of(name, count):
    return {index: f"{name} {index}" for index in range(count)}


def alone(family="vit", variants=VARIANTS):
    """One model a set, all with the same backbone."""
    models = {
        name: tiny_model(family, id2label=names_of(name, count), **fields)
        for name, (fields, count) in variants.items()
    }
    first = next(iter(models.values()))
    for model in models.values():
        model.backbone.load_state_dict(first.backbone.state_dict())
    return models


def parts_of(model):
    return {key: value for key, value in model.state_dict().items() if key in PARTS}


def together(models, variants=VARIANTS):
    """All sets in one model; the first is in use."""
    first, *others = models
    config = copy.deepcopy(models[first].config)
    config.prompts_in_use = first
    model = PromptCAMForImageClassification(config).eval()
    model.load_state_dict(models[first].state_dict())
    for name in others:
        model.add_prompts(
            name,
            id2label=models[name].config.id2label,
            state_dict=copy.deepcopy(parts_of(models[name])),
            **variants[name][0],
        )
    return model


def assert_is(model, expected):
    """The set in use holds what `expected` holds, and gives what it gives, everywhere."""
    assert_stored(model.backbone, expected.backbone)
    stored, others = parts_of(model.only_prompts(model.prompts_in_use)), parts_of(expected)
    assert stored.keys() == others.keys() and all(torch.equal(stored[key], others[key]) for key in stored)
    assert model.config.id2label == expected.config.id2label
    assert model.config.label2id == expected.config.label2id
    assert model.config.num_labels == expected.config.num_labels
    images = random_images()
    with torch.no_grad():
        for arguments in ({"output_attentions": True, "output_hidden_states": True}, {"trait_classes": "all"}):
            got, wanted = (each(images, **arguments).to_tuple() for each in (model, expected))
            assert_computed(got, wanted)


def test_every_set_is_the_model_that_has_it_alone(family):
    models = alone(family)
    model = together(models)
    assert list(model.prompt_sets) == list(VARIANTS)
    for name in ("shallow", "deep", "late", "bare", "between", "bare"):
        model.set_prompts(name)
        assert model.prompts_in_use == name
        assert_is(model, models[name])
    assert list(model.prompt_sets) == list(VARIANTS)


def test_several_sets_at_once_are_each_alone(family):
    models = alone(family)
    model = together(models)
    images = random_images(3)
    for names in (None, ["late", "between"], ["bare"]):
        with torch.no_grad():
            outputs = model.forward_sets(images, names, trait_classes="all")
        assert list(outputs) == (names or list(VARIANTS))
        for name, output in outputs.items():
            with torch.no_grad():
                expected = models[name](images, trait_classes="all")
            torch.testing.assert_close(output.logits, expected.logits, atol=2e-6, rtol=1e-5)
            torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=1e-6, rtol=1e-5)
            assert torch.equal(output.trait_classes, expected.trait_classes)
    assert model.prompts_in_use == "deep"
    predicted = model.forward_sets(images, ["late"], output_trait_maps=True)["late"]
    assert torch.equal(predicted.trait_classes, predicted.logits.argmax(-1, keepdim=True))
    plain = model.forward_sets(images)["bare"]
    assert plain.trait_maps is None and plain.trait_classes is None
    assert model.forward_sets(images, []) == {}


def test_images_of_another_size():
    models = alone()
    wide = random_images(height=48, width=64)
    outputs = together(models).forward_sets(wide, trait_classes="all", interpolate_pos_encoding=True)
    for name, output in outputs.items():
        expected = models[name](wide, trait_classes="all", interpolate_pos_encoding=True)
        assert output.trait_maps.shape[-2:] == (6, 8)
        torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=1e-6, rtol=1e-5)


def layer_calls(model, names):
    """How often each layer runs in one forward of these sets."""
    calls = [0] * model.config.backbone_config.num_hidden_layers
    hooks = []
    for index, layer in enumerate(backbone_layers(model.backbone)):

        def count(*_, index=index):
            calls[index] += 1

        hooks.append(layer.mlp.register_forward_hook(count))
    with torch.no_grad():
        model.forward_sets(random_images(), names)
    for hook in hooks:
        hook.remove()
    return calls


def test_what_sets_share_runs_once(family):
    bare = {"num_agnostic_prompts": 0}
    variants = {
        "order": (bare, 2),
        "family": (bare, 3),
        "species": (bare, 5),
        "from 1": ({**bare, "class_prompt_layer": 1}, 4),
        "own": ({}, 5),
        "late": ({"first_prompt_layer": 1}, 4),
    }
    model = together(alone(family, variants), variants)
    assert layer_calls(model, ["order", "family", "species"]) == [1, 1, 3]
    assert layer_calls(model, ["order", "late"]) == [1, 2, 2]
    assert layer_calls(model, ["from 1", "order"]) == [1, 2, 2]
    assert layer_calls(model, ["order", "own", "species"]) == [3, 3, 3]
    assert layer_calls(model, ["own"]) == [1, 1, 1]


def test_equal_agnostic_prompts_are_shared():
    variants = {name: ({"num_agnostic_prompts": 3}, count) for name, count in (("a", 4), ("b", 5), ("c", 3))}
    models = alone(variants=variants)
    models["b"].agnostic_prompts.data.copy_(models["a"].agnostic_prompts)
    models["c"].agnostic_prompts.data.copy_(models["a"].agnostic_prompts)
    models["c"].agnostic_prompts.data[1, 0, 0] += 1
    model = together(models, variants)
    assert layer_calls(model, ["a", "b"]) == [1, 1, 2]
    assert layer_calls(model, ["a", "b", "c"]) == [1, 3, 3]
    for name, output in model.forward_sets(random_images()).items():
        torch.testing.assert_close(output.logits, models[name](random_images()).logits, atol=2e-6, rtol=1e-5)


def test_changing_the_set_copies_nothing():
    model = together(alone())

    def places():
        return {
            (tuple(tensor.shape), tensor.data_ptr())
            for tensor in [*model.parameters(), *model.buffers()]
            if tensor.numel()
        }

    before = places()
    for name in VARIANTS:
        model.set_prompts(name)
        assert places() == before
        assert places() == before
        alone_ = model.only_prompts(name)
        assert {parameter.data_ptr() for parameter in alone_.parameters()} <= {place for _, place in before}
    model.set_prompts("deep")
    with pytest.raises(KeyError), model.using_prompts("bare"):
        assert model.prompts_in_use == "bare"
        raise KeyError
    assert model.prompts_in_use == "deep"


def test_a_model_with_one_set_is_what_it_was(tmp_path):
    model = tiny_model()
    assert model.prompts_in_use == "default"
    assert model.prompt_sets == {"default": "5 classes, Deep, 5 agnostic prompts in 2 layers, in use"}
    assert {key for key in model.state_dict() if not key.startswith("backbone.")} == set(PARTS)
    assert model.config.prompt_sets is None
    with torch.no_grad():
        assert_computed(model.forward_sets(random_images())["default"].logits, model(random_images()).logits)
    model.save_pretrained(tmp_path)
    named = PromptCAMForImageClassification.from_pretrained(tmp_path, prompts_in_use="species")
    assert list(named.prompt_sets) == ["species"]
    assert_is(named, model)


def test_new_prompts_start_as_those_of_a_new_model(tmp_path):
    build_backbone(tiny_backbone_config()).save_pretrained(tmp_path)
    model = PromptCAMForImageClassification.from_backbone(tmp_path, id2label=names_of("a", 5))
    torch.manual_seed(3)
    model.add_prompts("b", id2label=names_of("b", 3), class_prompt_layer=1, num_agnostic_prompts=4)
    assert model.prompts_in_use == "default"
    assert model.prompt_sets["b"] == "3 classes, class prompts from layer 1, 4 agnostic prompts in 1 layers"
    model = model.only_prompts("b")
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    for prompts in (model.class_prompts.detach(), model.agnostic_prompts.detach()):
        assert prompts.abs().max() <= bound and prompts.std() == pytest.approx(bound / 3**0.5, rel=0.15)
    assert model.classifier.weight.detach().std() == pytest.approx(0.02, rel=0.5) and not model.classifier.bias.any()


def test_training_touches_the_set_in_use_only():
    models = alone()
    model = together(models).train()
    # As a Trainer would, with decay on all that it is given.
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1, weight_decay=0.1)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(PARTS)
    before = copy.deepcopy(model.state_dict())
    model(random_images(), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == set(PARTS)
    model.set_prompts("bare")
    own = {f"other_prompts.0.{part}" for part in PARTS} - {"other_prompts.0.agnostic_prompts"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == own
    assert_is(model.eval(), models["bare"])
    # What a user froze stays frozen.
    model.requires_grad_(False)
    model.set_prompts("late")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_saved_together(family, tmp_path):
    models = alone(family)
    model = together(models)
    model.set_prompts("between")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [each["name"] for each in config["prompt_sets"]] == list(VARIANTS)
    assert config["prompts_in_use"] == "between"
    assert config["prompt_sets"][0]["id2label"]["4"] == "deep 4" and config["id2label"]["5"] == "between 5"
    for loaded in (
        PromptCAMForImageClassification.from_pretrained(tmp_path),
        AutoModelForImageClassification.from_pretrained(tmp_path, device_map="auto"),
    ):
        assert loaded.prompts_in_use == "between"
        trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
        assert trained == {f"other_prompts.2.{part}" for part in PARTS}
        for name in VARIANTS:
            loaded.set_prompts(name)
            assert_is(loaded, models[name])
    half = PromptCAMForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    half.set_prompts("deep")
    assert half(random_images()).logits.dtype == torch.bfloat16


def test_saved_apart_a_set_is_an_ordinary_checkpoint(family, tmp_path):
    models = alone(family)
    model = together(models)
    for name in ("deep", "bare"):
        model.save_pretrained(tmp_path / name, prompts=name)
        models[name].save_pretrained(tmp_path / "expected" / name)
        got, expected = (
            load_file(folder / "model.safetensors") for folder in (tmp_path / name, tmp_path / "expected" / name)
        )
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)
        configs = [
            json.loads((folder / "config.json").read_text())
            for folder in (tmp_path / name, tmp_path / "expected" / name)
        ]
        assert configs[0] == configs[1]
    assert model.prompts_in_use == "deep" and list(model.prompt_sets) == list(VARIANTS)
    with pytest.raises(ValueError, match="This model has no prompt set 'genus'; it has 'deep', 'bare'"):
        model.save_pretrained(tmp_path / "none", prompts="genus")
    assert not (tmp_path / "none").exists()


@pytest.fixture
def backbone_folder(tmp_path):
    torch.manual_seed(7)
    build_backbone(tiny_backbone_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def new_model(backbone, name, count, **fields):
    return PromptCAMForImageClassification.from_backbone(backbone, id2label=names_of(name, count), **fields)


@pytest.mark.parametrize("include_backbone", [True, False])
def test_sets_are_loaded_from_checkpoints(backbone_folder, tmp_path, include_backbone):
    models = {
        "order": new_model(backbone_folder, "order", 2, num_agnostic_prompts=0),
        "family": new_model(backbone_folder, "family", 3),
        "species": new_model(backbone_folder, "species", 5, class_prompt_layer=1),
    }
    for name in ("family", "species"):
        models[name].save_pretrained(tmp_path / name, include_backbone=include_backbone)
    model = copy.deepcopy(models["order"])
    for name in ("family", "species"):
        model.load_prompts(tmp_path / name, name)
    assert model.prompts_in_use == "default"
    for name in ("family", "species"):
        model.set_prompts(name)
        assert_is(model, models[name])
    # One set out of several: by its name, whether it is in use there or not.
    model.save_pretrained(tmp_path / "several", include_backbone=include_backbone)
    for name in ("family", "species"):
        other = copy.deepcopy(models["order"])
        other.load_prompts(tmp_path / "several", name)
        other.set_prompts(name)
        assert_is(other, models[name])
    with pytest.raises(ValueError, match="no prompt set 'genus'; it has 'default', 'family', 'species'"):
        copy.deepcopy(models["order"]).load_prompts(tmp_path / "several", "genus")
    # All of them, and apart again.
    reloaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "several")
    reloaded.save_pretrained(tmp_path / "apart", prompts="family", include_backbone=False)
    assert set(load_file(tmp_path / "apart" / "model.safetensors")) == set(PARTS)
    assert_is(PromptCAMForImageClassification.from_pretrained(tmp_path / "apart"), models["family"])


@pytest.mark.parametrize("include_backbone", [True, False])
def test_prompts_of_another_backbone_are_refused(backbone_folder, tmp_path, include_backbone):
    torch.manual_seed(8)
    build_backbone(tiny_backbone_config()).save_pretrained(tmp_path / "other")
    other = new_model(tmp_path / "other", "other", 3)
    other.save_pretrained(tmp_path / "checkpoint", include_backbone=include_backbone)
    model = new_model(backbone_folder, "own", 4)
    with pytest.raises(ValueError, match=r"fingerprint \w{12}, but this model's has \w{12}: prompts work on"):
        model.load_prompts(tmp_path / "checkpoint", "other")
    assert list(model.prompt_sets) == ["default"] and len(model.other_prompts) == 0
    # The weights count, not what a file says about them.
    other.backbone.load_state_dict(model.backbone.state_dict())
    other.save_pretrained(tmp_path / "same")
    model.load_prompts(tmp_path / "same", "other")
    # float16 has other bits, and the record is taken for them.
    model.save_pretrained(tmp_path / "own", include_backbone=include_backbone)
    half = PromptCAMForImageClassification.from_pretrained(tmp_path / "own", dtype=torch.float16)
    half.load_prompts(tmp_path / "same", "again")
    assert half.other_prompts[1].class_prompts.dtype == torch.float16


def test_mistakes_get_one_sentence(backbone_folder, tmp_path):
    model = new_model(backbone_folder, "own", 4)
    ViTForImageClassification(tiny_backbone_config()).save_pretrained(tmp_path / "vit")
    labels = names_of("x", 3)
    with pytest.raises(ValueError, match="is a model of type 'vit', not a Prompt-CAM"):
        model.load_prompts(tmp_path / "vit", "x")
    with pytest.raises(OSError, match="nowhere"):
        model.load_prompts(tmp_path / "nowhere", "x")
    with pytest.raises(ValueError, match="There is a prompt set 'default' already"):
        model.add_prompts("default", id2label=labels)
    with pytest.raises(ValueError, match="Prompt set 'x': Prompt-CAM tells classes apart"):
        model.add_prompts("x", id2label={0: "one"})
    with pytest.raises(ValueError, match="Prompt set 'x': a set has no 'freeze_backbone' of its own; it has id2label"):
        model.add_prompts("x", id2label=labels, freeze_backbone=False)
    with pytest.raises(ValueError, match="Prompt set 'x': class_prompt_layer=9 is not a layer"):
        model.add_prompts("x", id2label=labels, class_prompt_layer=9)
    with pytest.raises(ValueError, match=r"'x': the weight agnostic_prompts has to be \(2, 3, 32\), .* is absent"):
        model.add_prompts("x", id2label=labels, state_dict={"class_prompts": torch.zeros(3, 32)})
    with pytest.raises(ValueError, match="This model has no prompt set 'x'; it has 'default'"):
        model.set_prompts("x")
    with pytest.raises(ValueError, match="no prompt set 'x'"):
        model.forward_sets(random_images(), ["default", "x"])
    with pytest.raises(ValueError, match="trait_classes='some' is not known; give \"all\""):
        model.forward_sets(random_images(), trait_classes="some")
    trained = tiny_model(freeze_backbone=False)
    with pytest.raises(ValueError, match="must stay as it is: freeze_backbone=False allows one set"):
        trained.add_prompts("x", id2label=labels)
    # Nothing half done.
    assert list(model.prompt_sets) == ["default"] and model.config.prompt_sets is None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"name": "a"}, {"name": "b"}], "Prompt set 'b': PromptCAMConfig needs the class"),
        ([{"name": "b", "id2label": {0: "x", 1: "y"}}], "prompts_in_use='a' must be one of the prompt_sets, .* 'b'"),
        ([{"name": "a"}, {"name": "b", "class_prompt_layer": 0}], "Prompt set 'b': PromptCAMConfig needs the class"),
        (
            [{"name": "a"}, {"name": "b", "id2label": {0: "x", 1: "x"}}],
            "Prompt set 'b': id2label gives the name 'x' to two",
        ),
        ([{"name": "a"}, {"name": "a", "id2label": {0: "x", 1: "y"}}], r"a name of its own; one has 'a'"),
        ([{"name": "a"}, {"id2label": {0: "x", 1: "y"}}], r"a name of its own; one has 'None'"),
        ([{"name": "a"}, {"name": "b", "labels": 3}], "Prompt set 'b': a set has no 'labels' of its own"),
    ],
)
def test_wrong_configurations_are_refused(sets, message):
    with pytest.raises(ValueError, match=message):
        PromptCAMConfig(
            backbone_config=tiny_backbone_config(), id2label=names_of("own", 4), prompt_sets=sets, prompts_in_use="a"
        )


def test_a_checkpoint_is_not_loaded_with_other_sets(tmp_path):
    model = together(alone())
    model.save_pretrained(tmp_path / "several")
    alone()["deep"].save_pretrained(tmp_path / "one")
    saved = json.loads((tmp_path / "several" / "config.json").read_text())["prompt_sets"]
    deep, bare, *others = saved
    for sets, message in [
        ([deep, {**bare, "name": "naked"}, *others], "'deep' (in use), 'naked', 'shallow'"),
        ([deep, *others, bare], "'deep' (in use), 'shallow', 'between', 'late', 'bare'"),
        ([deep, bare], "'deep' (in use), 'bare';"),
        ([deep], "cannot be loaded with a single prompt set;"),
        (None, "cannot be loaded with a single prompt set;"),
        (
            [deep, {**bare, "class_prompt_layer": 0}, *others],
            "The prompt set 'bare' of "
            f"{tmp_path / 'several'} was trained with class_layer=2 and cannot be loaded with class_layer=0",
        ),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            PromptCAMForImageClassification.from_pretrained(tmp_path / "several", prompt_sets=sets)
    # Class names and settings are those of the set in use.
    twins = [{"name": "a"}, {"name": "b", "id2label": names_of("b", 5)}]
    model = tiny_model(prompt_sets=twins, prompts_in_use="a")
    model.save_pretrained(tmp_path / "twins")
    with pytest.raises(ValueError, match=r"sets 'a' \(in use\), 'b' and cannot be loaded with .* 'a', 'b' \(in use\)"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "twins", prompts_in_use="b")
    with pytest.raises(ValueError, match="has a single prompt set and cannot be loaded with the prompt sets 'deep'"):
        PromptCAMForImageClassification.from_pretrained(tmp_path / "one", prompt_sets=saved, prompts_in_use="deep")
    same = PromptCAMForImageClassification.from_pretrained(tmp_path / "several", prompt_sets=saved)
    assert list(same.prompt_sets) == list(VARIANTS)


def test_sets_travel_with_the_model():
    models = alone()
    model = together(models)
    model.set_prompts("late")
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in VARIANTS:
            clone.set_prompts(name)
            assert_is(clone, models[name])
    moved = model.to(torch.float64)
    moved.set_prompts("shallow")
    assert_is(moved.float(), models["shallow"])


def test_threads_do_not_disturb_each_other():
    """Half of them ask all sets, half the one in use, and meanwhile the model does not change."""
    models = alone()
    model = together(models)
    model.set_prompts("between")
    images = random_images()
    with torch.no_grad():
        expected = {name: each(images).logits for name, each in models.items()}
    config = copy.deepcopy(model.config)

    def ask(worker):
        with torch.no_grad():
            if worker % 2:
                return {name: output.logits for name, output in model.forward_sets(images).items()}
            return {"between": model(images).logits}

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(96)))
    for answer in answers:
        for name, logits in answer.items():
            torch.testing.assert_close(logits, expected[name], atol=2e-6, rtol=1e-5)
    assert [len(answer) for answer in answers[:2]] == [1, len(VARIANTS)]
    assert model.config.to_dict() == config.to_dict()


def test_a_set_alone_is_an_ordinary_model_and_shares_its_weights():
    models = alone()
    model = together(models)
    for name in VARIANTS:
        single = model.only_prompts(name)
        assert_is(single, models[name])
        assert single.state_dict().keys() == models[name].state_dict().keys()
        assert single.prompts_in_use == "default" and model.prompts_in_use == "deep"
    with torch.no_grad():
        model.only_prompts("bare").class_prompts += 1
        moved = models["bare"].class_prompts + 1
    assert torch.equal(model.other_prompts[0].class_prompts, moved)
    with pytest.raises(ValueError, match="no prompt set 'x'"):
        model.only_prompts("x")


_ELSEWHERE = """
import json, sys
sys.modules["prompt_cam_hf"] = None  # not installed here
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__
images = torch.randn((2, 3, 32, 32), generator=torch.Generator().manual_seed(2))
answer = {name: output.logits.tolist() for name, output in model.forward_sets(images).items()}
model.load_prompts(sys.argv[2], "more")
model.set_prompts("more")
print(json.dumps([answer, model(images).logits.tolist(), model.config.id2label[0]]))
"""


def test_sets_work_where_only_transformers_is(tmp_path):
    models = alone()
    together(models).save_pretrained(tmp_path / "model")
    models["between"].save_pretrained(tmp_path / "more")
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "model"), str(tmp_path / "more")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "1",
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert run.returncode == 0, run.stderr
    answer, more, label = json.loads(run.stdout.splitlines()[-1])
    assert list(answer) == list(VARIANTS) and label == "between 0"
    for name, logits in {**answer, "between": more}.items():
        torch.testing.assert_close(torch.tensor(logits), models[name](random_images()).logits, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["vit", rarely("dinov3_vit")])
def test_compiled_models_change_their_set(family_name):
    assert family_name in FAMILIES
    torch._dynamo.reset()
    models = alone(family_name)
    model = together(models)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name in ("deep", "bare", "deep", "shallow"):
        model.set_prompts(name)
        logits = compiled(random_images()).logits
        torch.testing.assert_close(logits, models[name](random_images()).logits, atol=2e-6, rtol=1e-5)
