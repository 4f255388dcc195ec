# SPDX-License-Identifier: MIT
"""Maps made of the gradients of a class's score with respect to attention, layer by layer.

- chefer_cam: Chefer et al. (*Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder
  Transformers*, ICCV 2021, equations 5 and 6), for a transformer with self-attention alone: relevances R are the
  identity at first, and each layer adds E[relu(G * A)] R to them, where A is the layer's attention, G the gradient of
  the score with respect to it, * the product of each two entries, and E the mean over heads. The map is the scored
  token's row.
- legrad: Bousselham et al. (*LeGrad: An Explainability Method for Vision Transformers via Feature Formation
  Sensitivity*, ICCV 2025, arXiv 2404.03214): relu(G), averaged over heads and queries and summed over layers, where G
  is the gradient with respect to a layer's attention of the score that the layer's own output would get if it were the
  last layer's. The authors' maps are scaled to 0 to 1 at the end; these are not.

A Prompt-CAM's class prompts enter at some layer, and layers before it have no output that could be scored; its LeGrad
maps are of the layers from there on, in Deep of the last layer alone. Gradients reach all layers in chefer_cam.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import LayerOutput, backbone_layers, grid_size
from prompt_cam_hf.modeling.configuration_prompt_cam import num_prefix_tokens

from .attention import follow_layers, run_own_layers, scored_rows
from .backbone import backbone_of, forward_options
from .vpt import VPTConfig

# The whole graph of an image is in memory: for ViT-B/16 at 224 pixels about 0.2 GB.
_IMAGES_AT_ONCE = 8


def chefer_cam(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, classes: torch.Tensor
) -> torch.Tensor:
    """The relevance of each patch for the scores of classes, by the rule of Chefer et al. (see above).

    Args:
        model: A linear probe, a VPT or a Prompt-CAM, in evaluation mode.
        pixel_values: (batch, channels, height, width).
        interpolate_pos_encoding: As in the model's `forward`.
        classes: (batch, k), the classes asked about.

    Returns:
        (batch, k, rows, cols), float32, 0 or above.
    """
    return _in_parts(_chefer_maps, model, pixel_values, interpolate_pos_encoding, classes)


def legrad(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, classes: torch.Tensor
) -> torch.Tensor:
    """How strongly the scores of classes would rise with the attention to each patch; arguments as in `chefer_cam`."""
    return _in_parts(_legrad_maps, model, pixel_values, interpolate_pos_encoding, classes)


def _in_parts(
    find_maps: Callable[..., Iterator[torch.Tensor]],
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    interpolate_pos_encoding: bool,
    classes: torch.Tensor,
) -> torch.Tensor:
    """The maps (batch, k, rows, cols) of a few images at a time; `find_maps` yields (batch, patches) for each k."""
    grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
    parts = zip(pixel_values.split(_IMAGES_AT_ONCE), classes.split(_IMAGES_AT_ONCE), strict=True)
    found = [
        torch.stack([each.detach() for each in find_maps(model, images, interpolate_pos_encoding, asked)], dim=1)
        for images, asked in parts
    ]
    return torch.cat(found).unflatten(-1, grid)


def _chefer_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, classes: torch.Tensor
) -> Iterator[torch.Tensor]:
    outputs = _run_with_graph(model, pixel_values, interpolate_pos_encoding)
    attentions = [_attention(output) for output in outputs]
    (scores,) = _scores_of_layers(model, pixel_values, interpolate_pos_encoding, outputs[-1:])
    grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
    for column, of_class in zip(_columns(scores, classes), classes.unbind(dim=1), strict=True):
        gradients = torch.autograd.grad(column.sum(), attentions, retain_graph=True)
        with torch.no_grad():
            pairs = zip(gradients, attentions, strict=True)
            relevant = ((gradient * attention).relu().mean(dim=1) for gradient, attention in pairs)
            rows = scored_rows(model, follow_layers(model, relevant, grid, torch.add), grid)
            row = rows[torch.arange(len(rows)), of_class] if model.config.model_type == "prompt_cam" else rows[:, 0]
            if not num_prefix_tokens(backbone_of(model).config) and model.config.model_type != "prompt_cam":
                row = row - 1 / row.shape[-1]  # what the patches that are scored, on average, were made of at first
        yield row


def _legrad_maps(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, classes: torch.Tensor
) -> Iterator[torch.Tensor]:
    outputs = _run_with_graph(model, pixel_values, interpolate_pos_encoding)
    if model.config.model_type == "prompt_cam":
        outputs = outputs[model.config.class_layer :]
    scores = _scores_of_layers(model, pixel_values, interpolate_pos_encoding, outputs)
    grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
    columns = zip(*(_columns(of_layer, classes) for of_layer in scores), strict=True)
    for of_layers in columns:
        total = torch.zeros(())
        for column, output in zip(of_layers, outputs, strict=True):
            (gradient,) = torch.autograd.grad(column.sum(), _attention(output), retain_graph=True)
            # All tokens count as queries, those too whose outputs are dropped and whose gradients would be 0.
            rises = gradient.relu().mean(dim=1).sum(dim=1) / gradient.shape[-1]
            total = total.to(gradient.device) + rises[:, -grid[0] * grid[1] :]
        yield total


def _attention(output: LayerOutput) -> torch.Tensor:
    assert output.attentions is not None  # they were asked for
    return output.attentions


def _columns(scores: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The scores (batch,) of each of the classes (batch, k), of scores (batch, num_labels)."""
    return scores.float().gather(1, classes.to(scores.device)).unbind(dim=1)


@torch.enable_grad()
def _run_with_graph(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> list[LayerOutput]:
    """What each layer of the backbone puts out, with the graph from the images on and the attention in it."""
    images = pixel_values.detach().clone().requires_grad_()
    if model.config.model_type not in ("prompt_cam", VPTConfig.model_type):
        return list(run_own_layers(model, images, interpolate_pos_encoding))
    outputs: list[LayerOutput] = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for layer in backbone_layers(backbone_of(model))
    ]
    try:
        model(images, output_attentions=True, interpolate_pos_encoding=interpolate_pos_encoding)
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def _scores_of_layers(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool, outputs: list[LayerOutput]
) -> torch.Tensor:
    """What scores the outputs of layers get, each as if it were the last layer's, (layers, batch, num_labels)."""
    if model.config.model_type == "prompt_cam":
        prompted, num_labels = cast(PromptCAMForImageClassification, model), model.config.num_labels
        with torch.enable_grad():
            return torch.stack([prompted.score(output.hidden_states[:, :num_labels]) for output in outputs])
    config = backbone_of(model).config
    rows, cols = grid_size(config, *pixel_values.shape[-2:])
    num_tokens = num_prefix_tokens(config) + rows * cols

    def take_place(module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        """Hand all layers' outputs on in place of the last one's, as so many more images, with their graph."""
        torch.set_grad_enabled(True)
        tokens = torch.cat([output.hidden_states[:, -num_tokens:] for output in outputs])
        return tokens if isinstance(output, torch.Tensor) else (tokens, *output[1:])

    hook = backbone_layers(backbone_of(model))[-1].register_forward_hook(take_place)
    try:
        with torch.no_grad():  # until the outputs are there
            logits = model(pixel_values, **forward_options(model, interpolate_pos_encoding)).logits
    finally:
        hook.remove()
    return logits.unflatten(0, (len(outputs), len(pixel_values)))


__all__ = ["chefer_cam", "legrad"]
