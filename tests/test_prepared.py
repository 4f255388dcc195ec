# SPDX-License-Identifier: MIT
"""What prompts bring to the layers is computed once, and no change of a weight goes unseen."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import ID2LABEL, NUM_CLASSES, assert_computed, random_images, tiny_model
from PIL import Image
from test_modeling import VARIANTS
from transformers import pipeline

from prompt_cam_hf import explain
from prompt_cam_hf.modeling import backbone_prompt_cam, prepared_prompt_cam
from prompt_cam_hf.modeling.backbone_prompt_cam import run_layer

# Relative to the scale of the numbers, which is about 1.
CLOSE = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture
def memories(monkeypatch):
    """What stands in for prompts as memory, each time that a layer runs; and the computations of a whole set."""
    seen = {"used": 0, "computed": 0}
    original, compute = backbone_prompt_cam.project, prepared_prompt_cam.keys_and_values

    def project(layer, heads, queries, memory=None, *args):
        seen["used"] += isinstance(memory, backbone_prompt_cam.KeysAndValues)
        return original(layer, heads, queries, memory, *args)

    def keys_and_values(*args):
        seen["computed"] += 1
        return compute(*args)

    monkeypatch.setattr(backbone_prompt_cam, "project", project)
    monkeypatch.setattr(prepared_prompt_cam, "keys_and_values", keys_and_values)
    return seen


def ask(model, images):
    with torch.no_grad():
        output = model(images, trait_classes="all")
    return output.logits, output.trait_maps


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_numbers_stay(family, variant, guard):
    model = tiny_model(family, **VARIANTS[variant])
    with guard():
        for images in (random_images(1), random_images(3), random_images(3)):
            expected = model(images, trait_classes="all", output_hidden_states=True)
            whole = model(images, output_attentions=True)
            state = model.last_layer_state(images)
            with model.prepared():
                output = model(images, trait_classes="all", output_hidden_states=True)
                own = model(images, output_attentions=True)
                prepared_state = model.last_layer_state(images)
            torch.testing.assert_close(output.logits, expected.logits, **CLOSE)
            torch.testing.assert_close(output.trait_maps, expected.trait_maps, **CLOSE)
            assert_computed(output.hidden_states, expected.hidden_states)
            torch.testing.assert_close(own.attentions, whole.attentions, **CLOSE)
            assert_computed(tuple(prepared_state.projections), tuple(state.projections))
            assert_computed(prepared_state.outputs, state.outputs)


def test_attention_in_parts_is_the_same(monkeypatch):
    model = tiny_model()
    expected = ask(model, random_images())
    monkeypatch.setattr(backbone_prompt_cam, "_SCORES_AT_ONCE", 2 * 4 * 17 * 2)
    monkeypatch.setattr(backbone_prompt_cam, "_QUERIES_AT_ONCE", 2)
    with model.prepared():
        assert_computed(ask(model, random_images()), expected)


def test_prompts_far_stronger_or_weaker_than_the_image_leave_no_overflow():
    model = tiny_model()
    for scale in (1e3, -1e3):
        with torch.no_grad():
            model.backbone.layers[-1].attention.q_proj.weight *= scale / abs(scale) * 30
        expected = ask(model, random_images())
        with model.prepared():
            logits, trait_maps = ask(model, random_images())
        assert torch.isfinite(logits).all()
        assert_computed((logits, trait_maps), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model().to(dtype)
    expected = ask(model, random_images())
    with model.prepared():
        logits, trait_maps = ask(model, random_images())
    assert logits.dtype == dtype
    torch.testing.assert_close((logits, trait_maps), expected, atol=0.05, rtol=0.05)


def test_computed_once_for_many_images(memories):
    model = tiny_model()
    with model.prepared():
        for _ in range(4):
            ask(model, random_images())
    assert memories == {"computed": 2, "used": 8}
    ask(model, random_images())
    assert memories["used"] == 8


def change_by_hand(model):
    with torch.no_grad():
        model.class_prompts[0] += 1


def change_through_data(model):
    model.agnostic_prompts.data[0, :, 0] += 1


def change_a_frozen_weight(model):
    with torch.no_grad():
        model.backbone.layers[1].attention.k_proj.bias += 1


def replace_a_frozen_weight(model):
    model.backbone.layers[0].layernorm_before.weight = torch.nn.Parameter(torch.full((32,), 0.5), requires_grad=False)


def replace_a_module(model):
    projection = copy.deepcopy(model.backbone.layers[2].attention.v_proj)
    model.backbone.layers[2].attention.v_proj = projection
    projection.weight.data.mul_(2)


def replace_prompts(model):
    model.class_prompts = torch.nn.Parameter(2 * model.class_prompts.detach())


def load_weights(model):
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})


def assign_weights(model):
    model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()}, assign=True)


def train(model, **options):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)
    with torch.enable_grad():
        model(random_images(), labels=torch.tensor([1, 4])).loss.backward()
    optimizer.step()
    model.eval()


def train_fused(model):
    train(model, fused=True)


def train_in_inference_mode(model):
    with torch.inference_mode(False):
        train(model)


def round_weights(model):
    # Twice, since the memory of the first may be used again.
    model.to(torch.bfloat16)
    model.to(torch.float32)


def double_precision(model):
    model.double()


def hook(model):
    model.backbone.layers[0].attention.k_proj.register_forward_hook(lambda module, args, output: 2 * output)


CHANGES = [
    change_by_hand,
    change_through_data,
    change_a_frozen_weight,
    replace_a_frozen_weight,
    replace_a_module,
    replace_prompts,
    load_weights,
    assign_weights,
    train,
    train_fused,
    train_in_inference_mode,
    round_weights,
    double_precision,
    hook,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("variant", ["deep", "between"])
def test_a_change_is_seen(change, variant):
    model = tiny_model(**VARIANTS[variant])
    images = random_images()
    with model.prepared():
        before = ask(model, images)
        change(model)
        after = ask(model, images)
    expected = ask(model, images)
    assert not torch.equal(before[0], after[0])
    assert_computed(after, expected)


def test_sets_are_each_their_own():
    model = tiny_model()
    for name, fields in {"birds": {}, "shallow": {"class_prompt_layer": 0}, "late": {"first_prompt_layer": 1}}.items():
        model.add_prompts(name, id2label={index: f"{name} {index}" for index in range(3)}, **fields)
    images, names = random_images(), list(model.prompt_sets)
    expected = {}
    for name in names:
        with model.using_prompts(name):
            expected[name] = ask(model, images)
    with model.prepared(), torch.no_grad():
        for _ in range(2):
            for name in names:
                with model.using_prompts(name):
                    assert_computed(ask(model, images), expected[name])
                assert_computed(ask(model.only_prompts(name), images), expected[name])
            for name, output in model.forward_sets(images, trait_classes="all").items():
                assert_computed((output.logits, output.trait_maps), expected[name])


def test_two_models_are_prepared_at_once(memories):
    first, second = tiny_model(), tiny_model(class_prompt_layer=1)
    images = random_images()
    expected = [ask(model, images) for model in (first, second)]
    with first.prepared(), second.prepared():
        for _ in range(3):
            assert_computed([ask(model, images) for model in (first, second)], expected)
    assert memories == {"computed": 2 + 1, "used": 3 * (2 + 1)}


def test_nothing_is_prepared_where_a_change_could_not_be_told(memories):
    with torch.inference_mode():
        made_in_inference_mode = tiny_model()
    trained = tiny_model(freeze_backbone=False)
    hooked = tiny_model()
    hook(hooked)
    for model in (made_in_inference_mode, trained, hooked):
        expected = ask(model, random_images())
        with model.prepared():
            assert_computed(ask(model, random_images()), expected)
    assert not memories["used"]


def test_training_and_gradients_are_as_ever(memories):
    model = tiny_model()
    images, labels = random_images(), torch.tensor([1, 4])
    model(images, labels=labels).loss.backward()
    expected = model.class_prompts.grad.clone()
    model.zero_grad()
    with model.prepared():
        ask(model, images)
        used = memories["used"]
        model(images, labels=labels).loss.backward()
        with torch.no_grad():
            model.train()(images)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.eval()(images)
    assert_computed(model.class_prompts.grad, expected)
    assert memories["used"] == used


def test_threads_see_the_weights_of_now():
    model = tiny_model()
    images = random_images()
    stop, wrong = threading.Event(), []

    def ask_again_and_again():
        with model.prepared():
            while not stop.is_set():
                ask(model, images)
            if not torch.allclose(ask(model, images)[0], expected[0], atol=1e-5):
                wrong.append(1)

    threads = [threading.Thread(target=ask_again_and_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        change_by_hand(model)
        change_a_frozen_weight(model)
    expected = ask(model, images)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_in_use_is_copied_and_pickled():
    model = tiny_model()
    with model.prepared():
        expected = ask(model, random_images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_computed(ask(other, random_images()), expected)
        other.class_prompts.data.zero_()
        assert_computed(ask(model, random_images()), expected)


@pytest.mark.slow
def test_compiled_and_exported_models_do_not_hold_on_to_what_is_prepared():
    torch._dynamo.reset()
    model = tiny_model()
    images = random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with model.prepared(), torch.no_grad():
        model(images)
        compiled(images)
        exported = torch.export.export(model, (images,), strict=False)
        change_by_hand(model)
        assert_computed(compiled(images).logits, model(images).logits)
    assert "class_prompts" in exported.state_dict
    assert not [name for name in exported.constants if "lifted" in name and exported.constants[name].numel() > 32]


def test_own_queries_may_be_known_when_attention_is_asked_for():
    """Weights are computed the ordinary way, from the same projections."""
    model = tiny_model(id2label=ID2LABEL)
    layer, config = model.backbone.layers[-1], model.backbone.config
    prompts, tokens = model.class_prompts.detach()[None], torch.randn(2, 17, 32)
    with torch.no_grad():
        known = backbone_prompt_cam.know_queries(layer, 4, prompts)
        expected = run_layer(layer, prompts, config, tokens, output_attentions=True)
        output = run_layer(layer, prompts, config, tokens, output_attentions=True, known=known)
        fast = run_layer(layer, prompts, config, tokens, known=known)
    assert output.attentions.shape == (2, 4, NUM_CLASSES, NUM_CLASSES + 17)
    assert_computed(tuple(output)[:2], tuple(expected)[:2])
    assert_computed(fast.hidden_states, expected.hidden_states)


def test_the_pipeline_and_explanations_prepare_once_and_see_changes(model_folder, memories):
    pipe = pipeline("image-classification", model=model_folder)
    image = Image.fromarray((255 * torch.rand(32, 32, 3)).byte().numpy())
    first = pipe(image, trait_maps=True)
    for _ in range(2):
        again = pipe(image)
        assert_computed([each["score"] for each in again], [each["score"] for each in first])
    # Two layers with agnostic prompts.
    assert memories == {"computed": 2, "used": 6}
    change_through_data(pipe.model)
    scores = {each["label"]: each["score"] for each in pipe(image)}
    pixel_values = pipe.image_processor(image, return_tensors="pt")["pixel_values"]
    expected = ask(pipe.model, pixel_values)[0].softmax(-1)[0]
    assert_computed(scores, {name: expected[index].item() for index, name in pipe.model.config.id2label.items()})
    memories["computed"] = 0
    explanations = explain(pipe.model, [image] * 3, image_processor=pipe.image_processor, batch_size=1)
    assert memories["computed"] == 2
    for explanation in explanations:
        assert_computed({score.label: score.probability for score in explanation.scores}, scores)


def test_one_block_within_another_and_again():
    model, images = tiny_model(), random_images()
    expected, prepared = ask(model, images), model.prepared()
    with prepared:
        with prepared, model.prepared():
            assert_computed(ask(model, images), expected)
        assert_computed(ask(model, images), expected)
    with prepared:
        change_by_hand(model)
        changed = ask(model, images)
    assert_computed(changed, ask(model, images))
    with pytest.raises(ZeroDivisionError), prepared:
        1 / 0  # noqa: B018
    assert not prepared_prompt_cam._IN_USE.get()
