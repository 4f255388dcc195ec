# SPDX-License-Identifier: MIT
"""Maps made after training of the patches that speak for a class, for any model on a supported backbone.

The target activation A is that of the recipe that pytorch-grad-cam gives for vision transformers: the output of the
last layer's first norm, at the patches. G is the gradient of the class's score with respect to it; i runs over
patches, k over channels.

- grad_cam: Selvaraju et al. (ICCV 2017, equations 1 and 2), relu(sum_k w_k A_ik), w_k the mean of G_ik over patches.
- hires_cam: Draelos & Carin (2020, arXiv 2011.08891), relu(sum_k G_ik A_ik): gradient times activation.
- layer_cam: Jiang et al. (IEEE TIP 2021), relu(sum_k relu(G_ik) A_ik).
- eigen_cam: Muhammad & Yeasin (IJCNN 2020), relu of the projection of A, centred over the patches, on its first right
  singular vector. Singular vectors have no sign: here the patch that lies farthest out is positive. No class, no
  gradient.
- rollout, raw_attention: see `attention_rollout` and `raw_attention`; the latter averaged over heads.
- legrad, chefer_cam: of gradients with respect to attention, see `prompt_cam_hf.baselines.attention_gradients`.

Finer-CAM (Zhang et al., CVPR 2025, arXiv 2501.11309) is any of the first three, with another score: the class's less
alpha times the mean of the `similar_classes` whose scores on the image lie closest to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from prompt_cam_hf.explanations.class_names import check_classes
from prompt_cam_hf.modeling.backbone_prompt_cam import backbone_layers, first_norm, grid_size

from .attention import attention_rollout, raw_attention
from .attention_gradients import chefer_cam, legrad
from .backbone import backbone_of, forward_options

CamMethod = Literal[
    "grad_cam", "hires_cam", "layer_cam", "eigen_cam", "rollout", "raw_attention", "legrad", "chefer_cam"
]
CAM_METHODS: tuple[str, ...] = get_args(CamMethod)
# Made of the attention of the token that a score is read from; an INTR reads none of its backbone's.
ATTENTION_MAPS = ("rollout", "raw_attention", "legrad", "chefer_cam")
_GRADIENT_METHODS = ("grad_cam", "hires_cam", "layer_cam")
_GRADIENTS_OF_ATTENTION = {"legrad": legrad, "chefer_cam": chefer_cam}


# Gradients need tensors that were not made in inference mode, whatever the caller's mode is.
@torch.inference_mode(False)
def cam_maps(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    method: CamMethod = "grad_cam",
    classes: torch.Tensor | None = None,
    *,
    similar_classes: int = 0,
    alpha: float = 1.0,
    signed: bool = False,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Maps of classes on images, on the patch grid.

    The network runs once (for the attention maps twice or more), without a graph up to the last layer; each class of
    an image takes one backward pass through the last layer, for all images together. "legrad" and "chefer_cam" need
    the whole graph and go back through all layers. Nothing of the model changes: gradients,
    `requires_grad`, hooks and modes stay as they are. Modules in training mode run in evaluation mode meanwhile.

    Args:
        model: A linear probe (any image classification model of transformers on a supported backbone), a VPT, or a
            Prompt-CAM. There the patches are what its class prompts attend to, so gradients reach them as keys and
            values, and the attention maps are those of the class's prompt.
        pixel_values: (batch, channels, height, width).
        method: See above. "eigen_cam", "rollout" and "raw_attention" give all classes the same map, but for the latter
            two of a Prompt-CAM.
        classes: (batch,) or (batch, k), the classes asked about. None: the predicted class.
        similar_classes: Finer-CAM's number of classes to contrast with, 3 in its authors' code; 0: none.
        alpha: Finer-CAM's weight of that contrast.
        signed: Leave out the last relu: what speaks against the class, or lies on Eigen-CAM's other side, is below 0.
        interpolate_pos_encoding: As in the model's `forward`.

    Returns:
        (batch, rows, cols), or (batch, k, rows, cols) where `classes` has that axis; float32, not scaled.

    Raises:
        ValueError: `method` is unknown, `classes` does not fit, there are not so many similar classes, or the method
            has no gradient to contrast.
    """
    if method not in CAM_METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(CAM_METHODS)}.")
    if similar_classes and method not in _GRADIENT_METHODS:
        raise ValueError(
            f"Finer-CAM contrasts gradients, and {method!r} has none; use similar_classes with one of "
            f"{', '.join(_GRADIENT_METHODS)}."
        )
    num_labels = len(model.config.id2label or ())
    if not 0 <= similar_classes < num_labels:
        raise ValueError(
            f"similar_classes={similar_classes} must be from 0 to {num_labels - 1}, the number of other classes."
        )
    run = CamRun(model, pixel_values, interpolate_pos_encoding)
    logits = run.logits
    asked = check_classes(logits.argmax(dim=-1) if classes is None else classes.to(logits.device), *logits.shape)
    maps = run.maps(method, asked, similar_classes, alpha, signed)
    return maps if classes is not None and classes.ndim == 2 else maps[:, 0]


class CamRun:
    """One run of the network on images, from which the maps of any method and class are made; see `cam_maps`.

    Attributes:
        logits: (batch, num_labels), the scores.
    """

    @torch.inference_mode(False)
    def __init__(self, model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False):
        self._arguments = model, pixel_values, interpolate_pos_encoding
        self._attention: dict[str, torch.Tensor] = {}
        with _evaluation_mode(model):
            self._activation, self.logits = _run(*self._arguments)

    @torch.inference_mode(False)
    def maps(
        self,
        method: CamMethod,
        classes: torch.Tensor,
        similar_classes: int = 0,
        alpha: float = 1.0,
        signed: bool = False,
    ) -> torch.Tensor:
        """The maps (batch, k, rows, cols) of `classes` (batch, k); the other arguments are those of `cam_maps`."""
        model, pixel_values, _ = self._arguments
        if method in _GRADIENT_METHODS:
            gradients = _gradients(_scores(self.logits, classes, similar_classes, alpha), self._activation)
            maps = torch.stack([_weigh(method, self._activation, gradient) for gradient in gradients], dim=1)
        elif method in _GRADIENTS_OF_ATTENTION:
            with _evaluation_mode(model):
                maps = _GRADIENTS_OF_ATTENTION[method](*self._arguments, classes).flatten(2)
        elif method == "eigen_cam":
            maps = _project_on_first_component(self._activation)[:, None]
        else:
            maps = self._find_attention(method)
            if model.config.model_type == "prompt_cam":
                maps = maps[torch.arange(len(classes))[:, None], classes.to(maps.device)]
        grid = grid_size(backbone_of(model).config, *pixel_values.shape[-2:])
        maps = maps.expand(-1, classes.shape[1], -1).unflatten(-1, grid)
        return maps if signed else maps.relu()

    def _find_attention(self, method: str) -> torch.Tensor:
        """Rollout or raw attention, (batch, 1 or num_labels, patches), for which the network runs again, once."""
        if method not in self._attention:
            attention = attention_rollout if method == "rollout" else _mean_raw_attention
            with _evaluation_mode(self._arguments[0]):
                self._attention[method] = attention(*self._arguments).flatten(2)
        return self._attention[method]


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, and afterwards for each module the mode that it had."""
    in_training = [module for module in model.modules() if module.training]
    # Not by eval(), which is free to do more: a Prompt-CAM's freezes its backbone.
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _run(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The target activation (batch, patches, channels), and the scores (batch, num_labels) as a function of it."""
    backbone = backbone_of(model)
    rows, cols = grid_size(backbone.config, *pixel_values.shape[-2:])
    # A layer norms its queries first, then its memory: in a Prompt-CAM class prompts, then the tokens.
    cut = _GraphCut(rows * cols, skip=1 if model.config.model_type == "prompt_cam" else 0)
    hook = first_norm(backbone_layers(backbone)[-1]).register_forward_hook(cut)
    try:
        with torch.no_grad():  # until the cut
            logits = model(pixel_values, **forward_options(model, interpolate_pos_encoding)).logits
    finally:
        hook.remove()
    return cut.patches, logits


class _GraphCut:
    """A forward hook after which gradients are recorded, from the patches of the module's output on."""

    patches: torch.Tensor

    def __init__(self, num_patches: int, skip: int):
        self._num_patches, self._calls_left = num_patches, skip

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        self._calls_left -= 1
        if self._calls_left != -1:
            return output
        torch.set_grad_enabled(True)
        others, patches = output.detach().tensor_split([output.shape[1] - self._num_patches], dim=1)
        self.patches = patches.requires_grad_()
        return torch.cat((others, self.patches), dim=1)


def _scores(logits: torch.Tensor, classes: torch.Tensor, similar_classes: int, alpha: float) -> torch.Tensor:
    """The scores (batch, k) to explain."""
    scores = logits.float().gather(1, classes)
    if not similar_classes:
        return scores
    distances = (logits.detach()[:, None] - scores.detach()[..., None]).abs()
    distances = distances.scatter(-1, classes[..., None], torch.inf)
    similar = distances.topk(similar_classes, dim=-1, largest=False).indices
    return scores - alpha * logits.float()[:, None].expand(distances.shape).gather(-1, similar).mean(dim=-1)


def _gradients(scores: torch.Tensor, activation: torch.Tensor) -> Iterator[torch.Tensor]:
    """For each column of the scores (batch, k), its gradient (batch, patches, channels)."""
    for column in scores.unbind(dim=1):
        # An image's score depends on its own activation alone, so their sum has the gradients of all.
        (gradient,) = torch.autograd.grad(column.sum(), activation, retain_graph=True)
        yield gradient.float()


def _weigh(method: str, activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """A signed map (batch, patches) from activation and gradient, both (batch, patches, channels)."""
    activation = activation.detach().float()
    if method == "grad_cam":
        gradient = gradient.mean(dim=1, keepdim=True)
    elif method == "layer_cam":
        gradient = gradient.relu()
    return (gradient * activation).sum(dim=-1)


def _project_on_first_component(activation: torch.Tensor) -> torch.Tensor:
    """Eigen-CAM's signed map (batch, patches)."""
    activation = activation.detach().float()
    centred = activation - activation.mean(dim=1, keepdim=True)
    component = torch.linalg.svd(centred, full_matrices=False).Vh[:, 0]
    projection = (centred @ component[..., None])[..., 0]
    farthest = projection.gather(1, projection.abs().argmax(dim=1, keepdim=True))
    return projection * farthest.sign()


def _mean_raw_attention(
    model: PreTrainedModel, pixel_values: torch.Tensor, interpolate_pos_encoding: bool
) -> torch.Tensor:
    return raw_attention(model, pixel_values, interpolate_pos_encoding).mean(dim=2)


__all__ = ["ATTENTION_MAPS", "CAM_METHODS", "CamRun", "cam_maps"]
