# SPDX-License-Identifier: MIT
"""The model against the straightforward computation, and as a good PreTrainedModel."""

import copy
import pickle
import threading

import pytest
import torch
from conftest import (
    FAMILIES,
    ID2LABEL,
    NUM_CLASSES,
    assert_computed,
    assert_stored,
    random_images,
    rarely,
    tiny_backbone_config,
    tiny_model,
)
from straightforward import run_straightforwardly
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTModel

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import (
    backbone_layers,
    build_backbone,
    embed,
    rotary_positions,
    run_layer,
)

VARIANTS = {
    "deep": {},
    "shallow": {"class_prompt_layer": 0},
    "between": {"class_prompt_layer": 1},
    "few agnostic prompts": {"num_agnostic_prompts": 2},
    "no agnostic prompts": {"num_agnostic_prompts": 0},
    "late prompts": {"first_prompt_layer": 1},
    "late and between": {"first_prompt_layer": 1, "class_prompt_layer": 1},
}
LABELS = torch.tensor([1, 4])


def prompt_gradients(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters)


def trainable_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_straightforward_computation_in_value_and_gradient(family, variant):
    model = tiny_model(family, **VARIANTS[variant]).train()
    images = random_images()
    expected = run_straightforwardly(model, images)
    output = model(images, labels=LABELS, trait_classes="all")

    torch.testing.assert_close(output.logits, expected.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=1e-6, rtol=1e-5)
    expected_loss = torch.nn.functional.cross_entropy(expected.logits, LABELS)
    torch.testing.assert_close(output.loss, expected_loss, atol=1e-6, rtol=1e-5)
    for got, wanted in zip(prompt_gradients(model, output.loss), prompt_gradients(model, expected_loss), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_layer_without_memory_is_the_family_s_own(family):
    model = tiny_model(family)
    images = random_images()
    backbone = model.backbone
    hidden = embed(backbone, images, interpolate_pos_encoding=False)
    rotary = rotary_positions(backbone, hidden, (4, 4), model.config.num_prefix_tokens)
    options = {}
    if rotary is not None:
        options["position_embeddings"] = backbone.rope_embeddings(images)
    if "clip" in family or "siglip" in family:
        options["attention_mask"] = None
    for layer in backbone_layers(backbone):
        own = layer(hidden, **options)
        ours = run_layer(layer, hidden, backbone.config, query_rotary=rotary).hidden_states
        torch.testing.assert_close(ours, own, atol=1e-6, rtol=1e-6)
        hidden = own


@pytest.mark.parametrize(("height", "width"), [(48, 24), (40, 64)])
def test_other_sizes_and_shapes_come_back_on_the_right_grid(family, height, width):
    model = tiny_model(family)
    images = random_images(2, height, width)
    adapts_always = "dinov" in family
    options = {} if adapts_always else {"interpolate_pos_encoding": True}
    expected = run_straightforwardly(model, images, **options)
    output = model(images, output_trait_maps=True, trait_classes="all", interpolate_pos_encoding=True)
    assert output.trait_maps.shape == (2, NUM_CLASSES, 4, height // 8, width // 8)
    torch.testing.assert_close(output.logits, expected.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=1e-6, rtol=1e-5)
    if not adapts_always:
        with pytest.raises(ValueError, match=f"{height}x{width} pixels, the backbone expects 32x32"):
            model(images)


@pytest.mark.parametrize("patch_size", [8, 14, 16])
def test_patch_sizes(patch_size):
    size = 4 * patch_size
    model = tiny_model("dinov2", {"patch_size": patch_size, "image_size": size})
    images = random_images(2, size, 2 * size)
    output = model(images, trait_classes="all")
    assert output.trait_maps.shape[-2:] == (4, 8)
    expected = run_straightforwardly(model, images)
    torch.testing.assert_close(output.trait_maps, expected.trait_maps, atol=1e-6, rtol=1e-5)


def test_a_trait_map_points_at_the_patch_that_differs():
    """The maps' rows and columns are the image's: change one patch, and only its place in the keys changes."""
    model = tiny_model("vit", num_agnostic_prompts=0, backbone_fields={"num_hidden_layers": 1})
    images = random_images(1)
    changed = images.clone()
    changed[:, :, 8:16, 24:32] += 3
    before, after = (model(x, trait_classes="all").trait_maps for x in (images, changed))
    ratio = after / before
    elsewhere = torch.ones(4, 4, dtype=torch.bool)
    elsewhere[1, 3] = False
    # Softmax rescales all other patches by one common factor a head.
    spread = ratio[..., elsewhere].std(dim=-1)
    assert spread.max() < 1e-5
    assert ((ratio[..., 1, 3] - ratio[..., 0, 0]).abs() > 1e-3).all()


def test_trait_maps_of_asked_classes():
    model = tiny_model()
    images = random_images(3)
    everything = model(images, trait_classes="all")
    predicted = model(images, output_trait_maps=True)
    assert predicted.trait_classes.tolist() == everything.logits.argmax(-1, keepdim=True).tolist()
    for i, c in enumerate(predicted.trait_classes[:, 0]):
        torch.testing.assert_close(predicted.trait_maps[i, 0], everything.trait_maps[i, c])
    some = model(images, trait_classes=torch.tensor([4, 0]))
    torch.testing.assert_close(some.trait_maps, everything.trait_maps[:, [4, 0]])
    each = model(images, trait_classes=torch.tensor([[1], [2], [3]]))
    torch.testing.assert_close(each.trait_maps[2, 0], everything.trait_maps[2, 3])
    assert model(images).trait_maps is None
    assert model(images).trait_classes is None


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (torch.tensor([5]), "from 0 to 4"),
        (torch.tensor([-1]), "from 0 to 4"),
        (torch.tensor([0.5]), "whole numbers"),
        (torch.tensor([[1], [2], [3]]), r"must be \(k,\) or \(batch, k\), with batch=2"),
        ("most", 'give "all"'),
    ],
)
def test_wrong_trait_classes_are_refused(classes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_images(), trait_classes=classes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_output_attentions_and_hidden_states(variant):
    model = tiny_model(**VARIANTS[variant])
    images = random_images()
    plain = model(images, trait_classes="all")
    output = model(images, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(output.logits, plain.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(output.trait_maps, plain.trait_maps, atol=1e-6, rtol=1e-5)
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4
    for weights in output.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    last = output.attentions[-1]
    assert last.shape == (2, 4, NUM_CLASSES, NUM_CLASSES + 1 + 16)
    torch.testing.assert_close(last[..., -16:].unflatten(-1, (4, 4)).transpose(1, 2), output.trait_maps)
    assert output.hidden_states[-1].shape == (2, NUM_CLASSES, 32)
    torch.testing.assert_close(model.score(output.hidden_states[-1]), output.logits)


def test_prompts_stand_first_in_every_attention():
    """A prompt that nobody can overlook shows up in the first columns, whichever way it entered."""
    model = tiny_model("vit", num_agnostic_prompts=1)
    norm, layer = model.backbone.layers[0].layernorm_before, model.backbone.layers[0].attention
    images = random_images(1)
    weights = model(images, output_attentions=True).attentions[0]
    hidden = torch.cat((model.agnostic_prompts[0].expand(1, -1, -1), model.backbone.embeddings(images)), dim=1)
    q, k = (p(norm(hidden)).view(1, 18, 4, 8).transpose(1, 2) for p in (layer.q_proj, layer.k_proj))
    expected = torch.softmax(q[:, :, 1:] @ k.transpose(2, 3) / 8**0.5, dim=-1)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-5)


def test_fused_and_eager_attention_agree():
    model = tiny_model()
    assert model.backbone.config._attn_implementation == "sdpa"
    fused = model(random_images(), trait_classes="all")
    model.set_attn_implementation("eager")
    assert model.backbone.config._attn_implementation == "eager"
    eager = model(random_images(), trait_classes="all")
    torch.testing.assert_close(fused.logits, eager.logits, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(fused.trait_maps, eager.trait_maps, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "variant", ["no agnostic prompts", "late prompts", "late and between"], ids=lambda name: name.replace(" ", "_")
)
def test_starting_from_the_fixed_prefix_changes_nothing(family, variant):
    model = tiny_model(family, **VARIANTS[variant]).train()
    images = random_images(2, 32, 48)
    prefix = model.encode_prefix(images, interpolate_pos_encoding=True)
    assert not prefix.requires_grad
    whole = model(images, labels=LABELS, interpolate_pos_encoding=True, trait_classes="all")
    short = model(prefix_hidden_states=prefix, patch_grid=(4, 6), labels=LABELS, trait_classes="all")
    assert_computed((short.logits, short.trait_maps), (whole.logits, whole.trait_maps))
    assert_computed(prompt_gradients(model, short.loss), prompt_gradients(model, whole.loss))


def test_fixed_prefix_errors():
    images = random_images()
    with pytest.raises(ValueError, match="prompts enter the first layer"):
        tiny_model().encode_prefix(images)
    with pytest.raises(ValueError, match="freeze_backbone=False"):
        tiny_model(first_prompt_layer=1, freeze_backbone=False).encode_prefix(images)
    model = tiny_model(first_prompt_layer=1)
    with pytest.raises(ValueError, match=r"hold 17 tokens an image; a grid of 2x8 patches makes 17|patch_grid"):
        model(prefix_hidden_states=model.encode_prefix(random_images(1, 32, 32)), patch_grid=(2, 7))
    with pytest.raises(ValueError, match="either pixel_values or prefix_hidden_states"):
        model()


def test_only_prompts_and_classifier_train_whatever_the_caller_does():
    expected = {"class_prompts", "agnostic_prompts", "classifier.weight", "classifier.bias"}
    model = tiny_model()
    assert trainable_names(model) == expected
    for mode in (True, False, True):
        model.train(mode)
        assert trainable_names(model) == expected
        assert model.training is mode
        assert not any(module.training for module in model.backbone.modules())
    thawed = tiny_model(freeze_backbone=False).train()
    assert len(trainable_names(thawed)) == len(list(thawed.parameters()))
    assert all(module.training for module in thawed.backbone.modules())


def test_a_training_step_moves_prompts_and_nothing_else():
    model = tiny_model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(random_images(), labels=LABELS).loss.backward()
    optimizer.step()
    # One bias for all classes shifts no softmax: its gradient is zero but for what rounding leaves.
    torch.testing.assert_close(model.classifier.bias.detach(), before.pop("classifier.bias"), atol=1e-6, rtol=0)
    moved = {name for name in before if not torch.equal(model.state_dict()[name], before[name])}
    assert moved == {"class_prompts", "agnostic_prompts", "classifier.weight"}


def test_prompt_dropout_draws_one_mask_for_the_batch():
    model = tiny_model(prompt_dropout=0.5).train()
    image = random_images(1)
    logits = model(image.repeat(4, 1, 1, 1)).logits
    torch.testing.assert_close(logits, logits[:1].expand(4, -1))  # the same mask for every image
    assert not torch.allclose(logits, model(image.repeat(4, 1, 1, 1)).logits)  # another one in the next step
    model.eval()
    assert_computed(model(image).logits, model(image).logits)


def test_prompt_dropout_equals_scaling_the_prompts_by_its_mask():
    model = tiny_model(prompt_dropout=0.25, num_agnostic_prompts=0).train()
    image = random_images(1)
    torch.manual_seed(3)
    dropped = model(image).logits
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(model.class_prompts), 0.25)
    model.eval()
    model.class_prompts.data *= mask
    torch.testing.assert_close(dropped, model(image).logits)


def test_stochastic_depth_drops_whole_branches_an_image():
    """With rate r in the last layer, an image keeps attention and MLP, loses one, or both: four possible outputs."""
    model = tiny_model(num_agnostic_prompts=0, drop_path_rate=0.4, backbone_fields={"num_hidden_layers": 2}).train()
    image = random_images(1)
    layer = model.backbone.layers[-1]
    with torch.no_grad():
        state = model.last_layer_state(image)
        prompts = state.class_prompts
        q, k, v = state.projections
        attended = torch.softmax(q @ k.transpose(2, 3) / 8**0.5, dim=-1) @ v
        attended = layer.attention.o_proj(attended.transpose(1, 2).flatten(-2))
        possible = []
        for keep_attention in (0, 1 / 0.6):
            hidden = prompts + keep_attention * attended
            for keep_mlp in (0, 1 / 0.6):
                possible.append(model.score(hidden + keep_mlp * layer.mlp(layer.layernorm_after(hidden)))[0])
        seen = [model(image.repeat(50, 1, 1, 1)).logits for _ in range(4)]
    counts = torch.zeros(4)
    for logits in torch.cat(seen):
        distances = torch.stack([(logits - p).abs().max() for p in possible])
        assert distances.min() < 1e-5
        counts[distances.argmin()] += 1
    expected = 200 * torch.tensor([0.16, 0.24, 0.24, 0.36])
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def test_gradient_checkpointing_changes_nothing():
    for fields in ({}, {"class_prompt_layer": 1}, {"prompt_dropout": 0.3, "drop_path_rate": 0.3}):
        model = tiny_model(**fields).train()
        images = random_images()
        torch.manual_seed(5)
        plain = model(images, labels=LABELS)
        expected = prompt_gradients(model, plain.loss)
        model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        output = model(images, labels=LABELS)
        torch.testing.assert_close(output.loss, plain.loss)
        for got, wanted in zip(prompt_gradients(model, output.loss), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_gradient_checkpointing_keeps_less():
    def bytes_kept(model):
        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(random_images(4), labels=torch.tensor([0, 1, 2, 3]))
        return sum(kept.values())

    model = tiny_model(backbone_fields={"num_hidden_layers": 6}).train()
    plain = bytes_kept(model)
    model.gradient_checkpointing_enable()
    assert bytes_kept(model) < 0.6 * plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = tiny_model()
    images = random_images()
    expected = model(images, trait_classes="all")
    half = copy.deepcopy(model).to(dtype)(images, trait_classes="all")
    assert half.logits.dtype == dtype and half.trait_maps.dtype == torch.float32
    torch.testing.assert_close(half.logits.float(), expected.logits, atol=0.1, rtol=0.1)
    torch.testing.assert_close(half.trait_maps, expected.trait_maps, atol=0.02, rtol=0.2)


def test_bf16_autocast_trains(family):
    model = tiny_model(family).train()
    images = random_images()
    expected = model(images, labels=LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, labels=LABELS, output_trait_maps=True)
    torch.testing.assert_close(output.loss, expected.loss, atol=0.05, rtol=0.05)
    output.loss.backward()
    assert model.class_prompts.grad.dtype == torch.float32
    assert torch.isfinite(model.class_prompts.grad).all()


@pytest.mark.slow
@pytest.mark.parametrize("family_name", ["vit", rarely("dinov2"), "dinov3_vit", rarely("siglip_vision_model")])
def test_compiles_without_a_graph_break(family_name):
    torch._dynamo.reset()
    model = tiny_model(family_name)
    images = random_images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=2e-6, rtol=1e-5)
    model.train()
    loss = compiled(images, labels=LABELS).loss
    torch.testing.assert_close(loss, model(images, labels=LABELS).loss, atol=2e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_compiles_with_inductor(tmp_path, monkeypatch):
    # In the cache that all processes share, another one may be writing the same file.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model = tiny_model()
    images = random_images()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=2e-6, rtol=1e-5)


def test_pickle_and_deepcopy(tmp_path):
    model = tiny_model()
    images = random_images()
    expected = model(images).logits
    clone = copy.deepcopy(model)
    clone.class_prompts.data.zero_()
    assert_computed(model(images).logits, expected)
    reread = pickle.loads(pickle.dumps(model))
    assert_stored(reread, model)
    assert_computed(reread(images).logits, expected)
    assert trainable_names(reread) == trainable_names(model)


def test_models_with_different_backbones_live_side_by_side_in_threads():
    models = {name: tiny_model(name) for name in FAMILIES}
    images = random_images()
    expected = {name: model(images, trait_classes="all") for name, model in models.items()}
    wrong = []

    def work(name):
        for _ in range(5):
            got = models[name](images, trait_classes="all")
            if not torch.allclose(got.logits, expected[name].logits, atol=1e-6):
                wrong.append(name)
            if not torch.allclose(got.trait_maps, expected[name].trait_maps, atol=1e-6):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_models_do_not_share_a_config(caplog):
    first = tiny_model()
    second = PromptCAMForImageClassification(first.config)
    first.set_attn_implementation("eager")
    assert not caplog.records  # transformers finds the backbone that the nested config belongs to
    assert first.config.backbone_config._attn_implementation == "eager"
    assert second.backbone.config._attn_implementation == "sdpa"
    assert second.config.backbone_config._attn_implementation == "sdpa"


def test_from_backbone_takes_a_loaded_model_and_leaves_it_alone():
    classifier = ViTForImageClassification(tiny_backbone_config()).train()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    model = PromptCAMForImageClassification.from_backbone(classifier, id2label=ID2LABEL)
    model.backbone.layers[0].mlp.fc1.weight.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert all(parameter.requires_grad for parameter in classifier.parameters())
    assert classifier.training
    torch.testing.assert_close(model.backbone.embeddings(random_images()), classifier.vit.embeddings(random_images()))


def test_from_backbone_takes_a_loaded_backbone_of_any_family(family):
    backbone = build_backbone(tiny_backbone_config(family)).eval()
    model = PromptCAMForImageClassification.from_backbone(backbone, id2label=ID2LABEL)
    images = random_images()
    expected = backbone(images).last_hidden_state
    torch.testing.assert_close(model.backbone(images).last_hidden_state, expected)


def test_from_backbone_refuses_what_it_does_not_know():
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    )
    with pytest.raises(ValueError, match=r"type 'bert'; supported are: clip_vision_model, deit, dinov2"):
        PromptCAMForImageClassification.from_backbone(bert, id2label=ID2LABEL)


def test_prompts_are_initialised_as_in_the_official_code(tmp_path):
    config = PromptCAMConfig(backbone_config=tiny_model().config.backbone_config, num_labels=300)
    model = PromptCAMForImageClassification(config)
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    for prompts in (model.class_prompts, model.agnostic_prompts):
        assert prompts.abs().max() <= bound
        assert prompts.abs().max() > 0.99 * bound
        assert abs(prompts.std() - bound / 3**0.5) < 0.02 * bound
    assert model.classifier.bias.item() == 0
    assert 0.01 < model.classifier.weight.std() < 0.03
    # Loading a backbone draws them just so.
    ViTModel(config.backbone_config, add_pooling_layer=False).save_pretrained(tmp_path)
    model = PromptCAMForImageClassification.from_backbone(tmp_path, id2label=config.id2label)
    assert 0.99 * bound < model.class_prompts.abs().max() <= bound


def test_auto_class_makes_the_model():
    model = AutoModelForImageClassification.from_config(tiny_model().config)
    assert type(model) is PromptCAMForImageClassification


def test_return_dict_false_gives_a_tuple():
    model = tiny_model()
    loss, logits = model(random_images(), labels=LABELS, return_dict=False)[:2]
    assert loss.ndim == 0 and logits.shape == (2, NUM_CLASSES)
