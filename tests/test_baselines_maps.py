# SPDX-License-Identifier: MIT
"""Post-hoc maps against the definitions, computed the long way: whole graph, prompts as tokens, textbook attention."""

import copy

import pytest
import torch
from conftest import COMPUTED, NUM_CLASSES, assert_computed, random_images
from straightforward import _layers, _textbook_attention, run_straightforwardly
from test_baselines_models import make, run_vpt
from torch import nn
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prompt_cam_hf.baselines import CAM_METHODS, VPTConfig, cam_maps, raw_attention
from prompt_cam_hf.modeling.configuration_prompt_cam import num_prefix_tokens

GRADIENT_METHODS = ("grad_cam", "hires_cam", "layer_cam")
CLASSES = torch.tensor([[1, 4], [3, 0]])
# How many prompts enter each of the three layers.
FRESH = {
    "probe": (0, 0, 0),
    "vpt deep": (0, 3, 3),
    "vpt shallow": (0, 3, 0),
    "prompt_cam deep": (5, 5, 5),
    "prompt_cam between": (5, 5, 0),
}
MODELS = tuple(FRESH)


# --- The long way ---


class LongRun:
    """The whole network with its whole graph; what it leaves behind.

    Attributes:
        logits: (batch, classes).
        activation: (batch, patches, channels), the last layer's first norm at the patches.
        attentions: Of each layer, (batch, heads, tokens, tokens), prompts first, among queries and keys alike.
        grid: Rows and columns of patches.
    """

    def __init__(self, model: PreTrainedModel, images: torch.Tensor, **options):
        kind = model.config.model_type
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        backbone = model.backbone if hasattr(model, "backbone") else getattr(model, "vision_model", model.base_model)
        self.config = backbone.config
        self.grid = tuple(side // backbone.config.patch_size for side in images.shape[-2:])
        layers = _layers(backbone)
        norms: list[torch.Tensor] = []
        inputs: dict[int, tuple] = {}
        last = layers[-1]
        (norm,) = [getattr(last, name) for name in ("layernorm_before", "norm1", "layer_norm1") if hasattr(last, name)]
        hooks = [norm.register_forward_hook(lambda module, args, output: norms.append(output))]
        for index, layer in enumerate(layers):
            hooks.append(
                layer.register_forward_pre_hook(
                    lambda module, args, kwargs, index=index: inputs.__setitem__(index, (args, kwargs)),
                    with_kwargs=True,
                )
            )
        if kind == "prompt_cam":
            self.logits = run_straightforwardly(model, images, **options).logits
        elif kind == VPTConfig.model_type:
            self.logits = run_vpt(model, images, **options)
        else:
            self.logits = model(images, **options).logits
        for hook in hooks:
            hook.remove()
        self.norm_output = norms[-1]
        self.num_patches = self.grid[0] * self.grid[1]
        self.activation = self.norm_output[:, -self.num_patches :]
        self.attentions = []
        for index, layer in enumerate(layers):
            args, kwargs = inputs[index]
            hidden = args[0] if args else kwargs.pop("hidden_states")
            rest = {"attention_mask": None} if "attention_mask" in kwargs or len(args) > 1 else {}
            if "position_embeddings" in kwargs:
                rest = {"position_embeddings": kwargs["position_embeddings"]}
            with torch.no_grad():
                heads = self.config.num_attention_heads
                self.attentions.append(_textbook_attention(layer, hidden.detach(), heads, rest))

    def gradient(self, scores: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(scores.sum(), self.norm_output, retain_graph=True)
        return gradient[:, -self.num_patches :]


def long_map(run: LongRun, method: str, image: int, score: torch.Tensor) -> torch.Tensor:
    """One signed map from the published definition, channel by channel and patch by patch."""
    activation = run.activation[image].detach().double()
    if method == "eigen_cam":
        centred = activation - activation.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred)  # right singular vectors are these eigenvectors
        projection = centred @ vectors[:, values.argmax()]
        return projection * torch.sign(projection[projection.abs().argmax()])
    gradient = run.gradient(score)[image].double()
    channels = range(activation.shape[1])
    if method == "grad_cam":
        return sum(gradient[:, k].mean() * activation[:, k] for k in channels)
    if method == "hires_cam":
        return sum(gradient[:, k] * activation[:, k] for k in channels)
    return sum(gradient[:, k].clamp(min=0) * activation[:, k] for k in channels)


@pytest.mark.parametrize("kind", MODELS)
def test_cams_are_the_published_ones(kind, family):
    """Values and signs, of several classes at once, on a rectangular grid."""
    images = random_images(2, 32, 48)
    model = make(kind, family)
    always = model.config.model_type in ("dinov2", "dinov2_with_registers")
    dinos = family.startswith("dino")
    found = {
        method: cam_maps(model, images, method, CLASSES, signed=True, interpolate_pos_encoding=not always)
        for method in (*GRADIENT_METHODS, "eigen_cam")
    }
    run = LongRun(model, images, **({} if dinos else {"interpolate_pos_encoding": True}))
    for method, maps in found.items():
        assert maps.shape == (2, 2, 4, 6) and maps.dtype == torch.float32 and not maps.requires_grad
        for image in range(2):
            for column in range(2):
                score = run.logits[image, CLASSES[image, column]]
                expected = long_map(run, method, image, score).view(4, 6)
                scale = expected.abs().max().item()
                torch.testing.assert_close(maps[image, column].double(), expected, atol=1e-4 * scale, rtol=1e-3)


def long_rollout(run: LongRun, kind: str, image: int, target: int) -> torch.Tensor:
    """Backwards from the scored token: its row of the product, layer by layer, over all tokens, prompts included."""
    prefix, tokens = num_prefix_tokens(run.config), run.attentions[-1].shape[-1]
    row = torch.zeros(tokens)
    if kind.startswith("prompt_cam"):
        row[target] = 1
    elif prefix:
        row[tokens - run.num_patches - prefix] = 1
    else:
        row[tokens - run.num_patches :] = 1 / run.num_patches
    for attention, fresh in zip(reversed(run.attentions), reversed(FRESH[kind]), strict=True):
        weights = attention[image].mean(dim=0)
        row = torch.cat((torch.zeros(len(weights) - len(row)), row))  # prompts whose outputs were dropped
        row = row @ (0.5 * weights + 0.5 * torch.eye(len(weights)))
        row = row[fresh:]  # what is due to prompts that entered here ends here
    return row[-run.num_patches :].view(run.grid)


@pytest.mark.parametrize("kind", MODELS)
def test_attention_is_that_of_the_textbook(kind, family):
    images = random_images()
    model = make(kind, family)
    rollout, raw = (cam_maps(model, images, method, CLASSES) for method in ("rollout", "raw_attention"))
    heads = raw_attention(model, images)
    run = LongRun(model, images)
    prefix = num_prefix_tokens(run.config)
    for image in range(2):
        for column in range(2):
            expected = long_rollout(run, kind, image, CLASSES[image, column])
            torch.testing.assert_close(rollout[image, column], expected, atol=1e-6, rtol=1e-4)
            rows = run.attentions[-1][image, :, :, -16:]
            if kind.startswith("prompt_cam"):
                row = rows[:, CLASSES[image, column]]
                shown = heads[image, CLASSES[image, column]]
            else:
                row = rows[:, -16 - prefix] if prefix else rows[:, -16:].mean(dim=1)
                shown = heads[image, 0]
            torch.testing.assert_close(shown, row.view(-1, 4, 4), atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(raw[image, column], row.mean(dim=0).view(4, 4), atol=1e-6, rtol=1e-4)


def run_recorded(model: PreTrainedModel, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Scores, and each layer's attention (batch, heads, tokens, tokens), all of the same graph; prompts are tokens."""
    weights = []

    def recorded(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        weights.append(torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1))
        return (weights[-1] @ value).transpose(1, 2).contiguous(), weights[-1]

    ALL_ATTENTION_FUNCTIONS.register("recorded", recorded)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "recorded"
    images = images.clone().requires_grad_()  # the backbone is frozen
    if model.config.model_type == "prompt_cam":
        # The textbook attention beside the last layer's own runs the layer once more.
        logits = run_straightforwardly(model, images).logits
        del weights[-2]
    elif model.config.model_type == VPTConfig.model_type:
        logits = run_vpt(model, images)
    else:
        logits = model(images).logits
    return logits, weights


def long_chefer(model: PreTrainedModel, images: torch.Tensor, kind: str, image: int, target: int) -> torch.Tensor:
    """Backwards from the scored token: its row of the product of 1 + E[relu(G * A)], over all tokens."""
    logits, attentions = run_recorded(model, images[image : image + 1])
    gradients = torch.autograd.grad(logits[0, target], attentions)
    backbone = model.backbone if hasattr(model, "backbone") else getattr(model, "vision_model", model.base_model)
    prefix, tokens = num_prefix_tokens(backbone.config), attentions[-1].shape[-1]
    row = torch.zeros(tokens)
    if kind.startswith("prompt_cam"):
        row[target] = 1
    elif prefix:
        row[tokens - 16 - prefix] = 1
    else:
        row[tokens - 16 :] = 1 / 16
    at_first = row[-16:].clone()
    for attention, gradient, fresh in zip(attentions[::-1], gradients[::-1], FRESH[kind][::-1], strict=True):
        relevant = (attention * gradient)[0].clamp(min=0).mean(dim=0).detach()
        row = torch.cat((torch.zeros(len(relevant) - len(row)), row))  # prompts whose outputs were dropped
        row = (row + row @ relevant)[fresh:]
    return row[-16:] - at_first


def long_legrad(model: PreTrainedModel, images: torch.Tensor, kind: str, image: int, target: int) -> torch.Tensor:
    """Of each layer that has scored tokens, the gradient in a network that ends there."""
    total = torch.zeros(16)
    for last in range({"prompt_cam deep": 2, "prompt_cam between": 1}.get(kind, 0), 3):
        shorter = copy.deepcopy(model)
        del _layers(shorter)[last + 1 :]
        if kind == "vpt shallow" and last < 1:  # the network ends before prompts enter
            shorter.config.num_prompts = 0
        logits, attentions = run_recorded(shorter, images[image : image + 1])
        (gradient,) = torch.autograd.grad(logits[0, target], attentions[-1])
        total += gradient[0].clamp(min=0).mean(dim=(0, 1))[-16:]
    return total


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "siglip_vision_model", "clip_vision_model"])
def test_gradients_of_attention_are_the_published_ones(kind, family):
    images = random_images()
    model = make(kind, family)
    found = {method: cam_maps(model, images, method, CLASSES) for method in ("chefer_cam", "legrad")}
    for method, the_long_way in (("chefer_cam", long_chefer), ("legrad", long_legrad)):
        for image, column in ((0, 1), (1, 0)):
            expected = the_long_way(copy.deepcopy(model), images, kind, image, int(CLASSES[image, column]))
            scale = expected.abs().max().item()
            assert scale > 0
            torch.testing.assert_close(found[method][image, column].flatten(), expected, atol=1e-4 * scale, rtol=1e-3)


def test_gradients_of_attention_equal_those_of_transformers():
    """Its own eager attention, with gradients retained."""
    images, target = random_images(1), 2
    model = make("probe", "vit")
    found = {method: cam_maps(model, images, method, torch.tensor([target])) for method in ("chefer_cam", "legrad")}
    model.set_attn_implementation("eager")
    output = model(images.clone().requires_grad_(), output_attentions=True, output_hidden_states=True)
    for attention in output.attentions:
        attention.retain_grad()
    output.logits[0, target].backward(retain_graph=True)
    relevance = torch.eye(17)
    for attention in output.attentions:
        relevance = relevance + (attention * attention.grad)[0].relu().mean(dim=0) @ relevance
    torch.testing.assert_close(found["chefer_cam"].flatten(), relevance[0, 1:], atol=1e-6, rtol=1e-4)
    total = torch.zeros(17)
    for attention, hidden in zip(output.attentions, output.hidden_states[1:], strict=True):
        score = model.classifier(model.base_model.layernorm(hidden)[:, 0])[0, target]
        total += torch.autograd.grad(score, attention, retain_graph=True)[0][0].relu().mean(dim=(0, 1))
    torch.testing.assert_close(found["legrad"].flatten(), total[1:], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_what_transformers_puts_out(implementation):
    """Its own eager attention, whichever implementation the model is set to; which stays as it was."""
    images = random_images()
    model = make("probe", "dinov2_with_registers")
    model.set_attn_implementation("eager")
    expected = model(images, output_attentions=True).attentions[-1][:, :, 0, -16:].view(2, -1, 4, 4)
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(raw_attention(model, images)[:, 0], expected, atol=1e-6, rtol=1e-4)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("kind", ["probe", "prompt_cam deep"])
@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_finer_cam_contrasts_with_the_closest_scores(kind, method):
    images = random_images()
    model = make(kind, "vit")
    found = cam_maps(model, images, method, CLASSES, similar_classes=2, alpha=0.6, signed=True)
    run = LongRun(model, images)
    for image in range(2):
        for column in range(2):
            target = CLASSES[image, column].item()
            logits, values = run.logits[image], run.logits[image].tolist()
            others = sorted(set(range(NUM_CLASSES)) - {target}, key=lambda c: abs(values[c] - values[target]))
            score = logits[target] - 0.6 * (logits[others[0]] + logits[others[1]]) / 2
            expected = long_map(run, method, image, score).float().view(4, 4)
            torch.testing.assert_close(found[image, column], expected, atol=1e-6, rtol=1e-3)


class ChannelsFirst(nn.Module):
    """A norm whose patches pass through `patches` as an image, (batch, channels, rows, cols)."""

    def __init__(self, norm: nn.Module, grid: tuple[int, int]):
        super().__init__()
        self.norm, self.grid, self.patches = norm, grid, nn.Identity()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(hidden)
        number = self.grid[0] * self.grid[1]
        image = self.patches(hidden[:, -number:].transpose(1, 2).unflatten(-1, self.grid))
        return torch.cat((hidden[:, :-number], image.flatten(2).transpose(1, 2)), dim=1)


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "siglip_vision_model"])
def test_grad_cam_and_hires_cam_equal_captum(family):
    attr = pytest.importorskip("captum.attr")
    images, classes = random_images(), torch.tensor([2, 4])
    model = make("probe", family)
    found = {method: cam_maps(model, images, method, classes, signed=True) for method in ("grad_cam", "hires_cam")}
    layer = _layers(model)[-1]
    name = next(name for name in ("layernorm_before", "norm1", "layer_norm1") if hasattr(layer, name))
    setattr(layer, name, ChannelsFirst(getattr(layer, name), (4, 4)))
    target = getattr(layer, name).patches
    forward = lambda pixels: model(pixels).logits  # noqa: E731
    images = images.requires_grad_()  # the probe is frozen
    grad_cam = attr.LayerGradCam(forward, target).attribute(images, classes)[:, 0]
    hires_cam = attr.LayerGradientXActivation(forward, target).attribute(images, classes).sum(dim=1)
    torch.testing.assert_close(found["grad_cam"], grad_cam.detach(), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(found["hires_cam"], hires_cam.detach(), atol=1e-6, rtol=1e-4)


# --- The interface ---


@pytest.mark.parametrize("method", CAM_METHODS)
@pytest.mark.parametrize("kind", ["probe", "prompt_cam deep"])
def test_shapes_and_default_class(kind, method):
    images = random_images(3)
    model = make(kind, "vit")
    predicted = model(images).logits.argmax(dim=-1)
    maps = cam_maps(model, images, method)
    assert maps.shape == (3, 4, 4) and (maps >= 0).all()
    assert_computed(maps, cam_maps(model, images, method, predicted))
    several = cam_maps(model, images, method, torch.stack((predicted, (predicted + 1) % 5), dim=1))
    assert several.shape == (3, 2, 4, 4)
    torch.testing.assert_close(several[:, 0], maps, atol=1e-6, rtol=1e-5)
    agnostic = method == "eigen_cam" or (kind == "probe" and method in ("rollout", "raw_attention"))
    assert torch.allclose(several[:, 0], several[:, 1], **COMPUTED) == agnostic
    assert_computed(cam_maps(model, images, method, predicted, signed=True).relu(), maps)
    one_by_one = torch.cat([cam_maps(model, image[None], method) for image in images])
    torch.testing.assert_close(maps, one_by_one, atol=1e-6, rtol=1e-4)


def state_of(model: PreTrainedModel) -> dict:
    modules = dict(model.named_modules())
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "hooks": {name: [len(getattr(module, kind)) for kind in kinds] for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "values": {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        "attention": model.config._attn_implementation,
        "grad mode": torch.is_grad_enabled(),
    }  # fmt: skip


def assert_same_state(first: dict, second: dict) -> None:
    for key in ("gradients", "values"):
        for name, value in first[key].items():
            other = second[key][name]
            assert value is other is None or torch.equal(value, other), name
    assert {k: v for k, v in first.items() if k not in ("gradients", "values")} == {
        k: v for k, v in second.items() if k not in ("gradients", "values")
    }


@pytest.mark.parametrize("kind", ["probe", "vpt deep", "prompt_cam deep"])
@pytest.mark.parametrize("method", ["grad_cam", "eigen_cam", "rollout", "chefer_cam"])
def test_nothing_of_the_model_changes(kind, method):
    """With gradients from before, unusual flags, half of the modules in training mode; on success and on failure."""
    images = random_images()
    model = make(kind, "vit")
    expected = cam_maps(model, images, method)
    model(images, labels=torch.tensor([0, 1])).loss.backward()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p, module.training = 0.5, True
    before = state_of(model)
    assert_computed(cam_maps(model, images, method), expected)
    assert_same_state(before, state_of(model))
    with pytest.raises(ValueError):
        cam_maps(model, random_images(2, 40, 40), method)
    with pytest.raises(ValueError):
        cam_maps(model, images, method, torch.tensor([0, 99]))
    assert_same_state(before, state_of(model))
    with torch.no_grad():
        assert_computed(cam_maps(model, images, method), expected)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert_computed(cam_maps(model, random_images(), method), expected)
        assert torch.is_inference_mode_enabled()


def test_no_graph_before_the_last_layer():
    """What is trainable in earlier layers costs nothing: their outputs are never part of a graph."""
    model = make("probe", "vit").requires_grad_(True)
    tracked = []
    for layer in _layers(model)[:-1]:
        layer.register_forward_hook(lambda module, inputs, output: tracked.append(output.requires_grad))
    cam_maps(model, random_images())
    assert tracked == [False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    images = random_images()
    model = make("probe", "vit")
    expected = cam_maps(model, images, "hires_cam", signed=True)
    found = cam_maps(model.to(dtype), images.to(dtype), "hires_cam", signed=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05 * expected.abs().max().item(), rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gradcam"}, "method='gradcam' is not known; use one of grad_cam, hires_cam"),
        ({"method": "rollout", "similar_classes": 1}, "Finer-CAM contrasts gradients, and 'rollout' has none"),
        ({"similar_classes": 5}, "similar_classes=5 must be from 0 to 4, the number of other classes"),
        ({"classes": torch.tensor([1, 2, 3])}, r"classes has the shape \(3,\); it must be \(batch,\) or \(batch, k\)"),
        ({"classes": torch.tensor([1, 5])}, "classes must be whole numbers from 0 to 4"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        cam_maps(make("probe", "vit"), random_images(), **arguments)


def test_other_models_are_refused():
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    with pytest.raises(ValueError, match="does not support backbones of type 'swin'"):
        cam_maps(SwinForImageClassification(config), random_images())
