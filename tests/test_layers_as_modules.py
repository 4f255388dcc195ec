# SPDX-License-Identifier: MIT
"""Tools take the backbone's layers for the modules that they are: hooks, wrappers, compilers, devices, threads."""

import copy
import pickle
import threading

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import IMAGE_SIZE, assert_computed, random_images, tiny_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from prompt_cam_hf.modeling.backbone_prompt_cam import backbone_class, backbone_layers

VARIANTS = {
    "deep": ("vit", {}),
    "deep dinov2": ("dinov2", {}),
    "shallow": ("vit", {"class_prompt_layer": 0}),
    "between dinov3": ("dinov3_vit", {"class_prompt_layer": 1}),
    "unfrozen": ("vit", {"freeze_backbone": False}),
}
LABELS = torch.tensor([1, 4])
CLASSES = torch.tensor([[1, 2], [4, 0]])


@pytest.fixture(params=VARIANTS)
def model(request):
    family, fields = VARIANTS[request.param]
    return tiny_model(family, **fields)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_layers_are_the_family_s_own_in_name_and_in_an_ordinary_call(family):
    model = tiny_model(family)
    model_class, options = backbone_class(model.backbone.config)
    stock = model_class(model.backbone.config, **options).eval()
    stock.load_state_dict(model.backbone.state_dict(), strict=False)
    images = random_images()
    assert_computed(model.backbone(images).last_hidden_state, stock(images).last_hidden_state)
    for layer, other in zip(backbone_layers(model.backbone), backbone_layers(stock), strict=True):
        assert type(layer).__name__ == type(other).__name__ and isinstance(layer, type(other))
        assert type(layer).__name__ in model._no_split_modules


def test_a_layer_survives_pickle_and_deepcopy():
    layer = tiny_model().backbone.layers[0]
    hidden = torch.randn(1, 3, 32)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert_computed(other(hidden), layer(hidden))


@pytest.mark.parametrize("options", [{}, {"trait_classes": CLASSES}, {"output_attentions": True}], ids=str)
def test_hooks_on_every_layer_fire_once_a_forward(model, options):
    before, after = [], []
    for index, layer in enumerate(backbone_layers(model.backbone)):
        layer.register_forward_pre_hook(lambda module, args, index=index: before.append((index, args[0].shape[-1])))
        layer.register_forward_hook(lambda module, args, output, index=index: after.append((index, output)))
    output = model(random_images(), output_hidden_states=True, **options)
    assert before == [(0, 32), (1, 32), (2, 32)]
    assert [index for index, _ in after] == [0, 1, 2]
    # As from the family's own layers: the hidden states, or a tuple that begins with them.
    for (_, seen), expected in zip(after, output.hidden_states[1:], strict=True):
        assert_computed(seen[0] if isinstance(seen, tuple) else seen, expected)


def test_hooks_change_what_a_layer_gets_and_gives():
    """Taking a layer out by hooks is what a model without it computes."""
    model = tiny_model(num_agnostic_prompts=0)
    shorter = copy.deepcopy(model)
    shorter.backbone.layers = nn.ModuleList([model.backbone.layers[0], model.backbone.layers[2]])
    shorter.config.backbone_config.num_hidden_layers = shorter.backbone.config.num_hidden_layers = 2
    handle = model.backbone.layers[1].register_forward_hook(lambda module, args, output: args[0])
    assert_computed(model(random_images()).logits, shorter(random_images()).logits)
    handle.remove()
    model.backbone.layers[2].register_full_backward_hook(lambda module, *gradients: seen.append(module))
    seen = []
    model(random_images(), labels=LABELS).loss.backward()
    assert seen == [model.backbone.layers[2]]


@pytest.mark.slow
@pytest.mark.long
def test_asked_classes_are_compiled_and_exported_without_a_graph_break(model, tmp_path, monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (2, 3):
        images, classes = random_images(batch), torch.arange(2 * batch).view(batch, 2) % 5
        expected = model(images, trait_classes=classes)
        output = compiled(images, trait_classes=classes)
        assert_computed((output.logits, output.trait_maps), (expected.logits, expected.trait_maps))
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        model,
        (random_images(2),),
        {"trait_classes": CLASSES},
        dynamic_shapes={"pixel_values": {0: batch}, "trait_classes": {0: batch}},
        strict=False,
    )
    output = exported.module()(images, trait_classes=classes)
    assert_computed((output.logits, output.trait_maps), (expected.logits, expected.trait_maps))


@pytest.mark.slow
def test_single_layers_are_compiled(model):
    torch._dynamo.reset()
    images = random_images()
    expected = model(images, trait_classes=CLASSES)
    plain = model(images)
    compiled_layers = []

    def backend(graph, inputs):
        compiled_layers.append(graph)
        return graph.forward

    for layer in backbone_layers(model.backbone):
        layer.compile(fullgraph=True, backend=backend)
    output = model(images, trait_classes=CLASSES)
    assert compiled_layers
    assert_computed((output.logits, output.trait_maps), (expected.logits, expected.trait_maps))
    assert_computed(model(images).logits, plain.logits)


def offload_whole_layers(model):
    """Each layer's weights come to the processor when it is called, and leave when it is done."""
    for layer in backbone_layers(model.backbone):
        weights = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
        add_hook_to_module(layer, hook)


def offload_single_weights(model):
    cpu_offload(model.backbone, "cpu")


def dispatch_layers(model):
    names = [name for name, _ in model.named_children()]
    dispatch_model(model, {**dict.fromkeys(names, "cpu"), "": "cpu"}, main_device="cpu", force_hooks=True)


@pytest.mark.parametrize("offload", [offload_whole_layers, offload_single_weights, dispatch_layers])
def test_offloaded_layers_give_the_same(model, offload):
    images = random_images()
    expected = model(images, trait_classes=CLASSES)
    offload(model)
    with torch.no_grad(), model.prepared():
        output = model(images, trait_classes=CLASSES)
        state = model.last_layer_state(images)
        logits = model.last_layer_logits(state)
    assert_computed((output.logits, output.trait_maps), (expected.logits, expected.trait_maps))
    assert_computed(logits, expected.logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_runs_layers_by_calling_them(model, reentrant):
    images = random_images()
    model.train()
    model(images, labels=LABELS).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    calls = []
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for index, layer in enumerate(backbone_layers(model.backbone)):
        layer.register_forward_pre_hook(lambda module, args, index=index: calls.append(index))
    model(images, labels=LABELS).loss.backward()
    assert_computed(gradients(model), expected)
    # A trained layer of transformers 5.17 runs its hooks again when it is recomputed.
    assert sorted(calls) in ([0, 1, 2], [0, 0, 1, 1, 2, 2])
    if model.config.freeze_backbone:
        assert calls == [0, 1, 2]


# What a wrapper does to the model, and then what two processes get.
def shard_layers(model):
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


def shard_checkpointed_layers(model):
    model.gradient_checkpointing_enable()
    return shard_layers(model)


WRAPPERS = {
    "fsdp2 by layer": shard_layers,
    "fsdp2 by layer, checkpointed": shard_checkpointed_layers,
    "fsdp2 whole": fully_shard,
    "ddp": DistributedDataParallel,
}


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run_distributed(rank, address, answers):
    """One of two processes: each has an image of its own; answers are the first one's."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = {}
    for variant, (family, fields) in VARIANTS.items():
        for wrapper, wrap in WRAPPERS.items():
            model = tiny_model(family, **fields).train()
            sharded = wrap(model)
            optimizer = torch.optim.SGD([p for p in sharded.parameters() if p.requires_grad], lr=0.1)
            own = slice(rank, rank + 1)
            output = sharded(random_images()[own], labels=LABELS[own], trait_classes=CLASSES[own])
            output.loss.backward()
            optimizer.step()
            weights = {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}
            with torch.no_grad():
                logits = sharded(random_images()[own]).logits
            results[variant, wrapper] = (output.trait_maps.detach(), weights, logits)
    if rank == 0:
        torch.save(results, answers)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(run_distributed, (folder / "address", folder / "answers.pt"), nprocs=2)
    return torch.load(folder / "answers.pt")


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_processes_get_what_one_gets(variant, wrapper, distributed):
    family, fields = VARIANTS[variant]
    model = tiny_model(family, **fields).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(random_images(), labels=LABELS, trait_classes=CLASSES)
    output.loss.backward()
    optimizer.step()
    trait_maps, weights, logits = distributed[variant, wrapper]
    assert_computed(trait_maps, output.trait_maps[:1])
    assert_computed(weights, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    assert_computed(logits, model(random_images()).logits[:1].detach())


def test_eight_threads_each_ask_another_thing():
    model = tiny_model(num_agnostic_prompts=2)
    names = {index: f"bird {index}" for index in range(3)}
    model.add_prompts("birds", id2label=names)
    model.add_prompts("shallow", id2label=names, class_prompt_layer=0)
    images = random_images(2, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = model(images, trait_classes="all")
        expected_sets = model.forward_sets(images, trait_classes="all")
    wrong = []

    @torch.no_grad()
    def ask(number):
        for _ in range(10):
            if number % 2:
                got, wanted = {"": model(images, trait_classes="all")}, {"": expected}
            else:
                got, wanted = model.forward_sets(images, trait_classes="all"), expected_sets
            for name, output in got.items():
                same = torch.allclose(output.logits, wanted[name].logits, atol=1e-5)
                if not (same and torch.allclose(output.trait_maps, wanted[name].trait_maps, atol=1e-5)):
                    wrong.append((number, name))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.prompts_in_use == next(iter(model.prompt_sets))


def test_inner_attention_that_is_returned_is_what_gradients_pass_through():
    model = tiny_model(num_agnostic_prompts=2).train()
    output = model(random_images(), labels=LABELS, output_attentions=True)
    for weights in output.attentions:
        weights.retain_grad()
    output.loss.backward()
    assert all(weights.grad.abs().sum() > 0 for weights in output.attentions)
