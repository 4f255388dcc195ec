# SPDX-License-Identifier: MIT
"""Trait maps: where the prompt of a class attends, and how much each patch contributes to the class's score.

"attention" is the paper's map (Prompt-CAM, Chowdhury et al., CVPR 2025, section 3). "evidence" shares out what the
class's score owes to it that heads attend to some places more than to others: integrated gradients (Sundararajan et
al., *Axiomatic Attribution for Deep Networks*, ICML 2017) along the way from the paper's own blur.
"""

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.explanations.class_names import check_classes
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.base_prompt_cam import MapLayout
from prompt_cam_hf.modeling.outputs_prompt_cam import LastLayerState
from prompt_cam_hf.modeling.ranking_prompt_cam import ScoringModel, head_contexts

MapKind = Literal["attention", "evidence"]

# A box in pixels of an image, as Pillow's `crop` takes it: left, top, right, bottom; here with fractions.
Box = tuple[float, float, float, float]

# Points on the way from blurred to sharp. On drawn birds, the evidence for the predicted class misses its sum by up to
# 2 thousandths of the score with 8 points, and by 5 millionths with 16 (docs/evaluation.md).
EVIDENCE_STEPS = 16


# Gradients need tensors that were not made in inference mode, whatever the caller's mode is.
@torch.inference_mode(False)
def trait_maps(
    model: PromptCAMForImageClassification,
    pixel_values: torch.Tensor,
    classes: torch.Tensor | None = None,
    kind: MapKind = "attention",
    interpolate_pos_encoding: bool = False,
    steps: int = EVIDENCE_STEPS,
) -> torch.Tensor:
    """Compute the maps of classes on images, one for each head of the last layer.

    Args:
        model: The model, in evaluation mode. Its parameters' gradients are left as they are.
        pixel_values: (batch, channels, height, width).
        classes: (batch,) or (batch, k), the classes asked about. None: the predicted class.
        kind: "attention" or "evidence"; see `maps_from_state`.
        interpolate_pos_encoding: As in the model's `forward`.
        steps: Points at which evidence looks on the way from blurred to sharp heads; see `maps_from_state`.

    Returns:
        (batch, k, heads, rows, cols), float32; k is 1 where `classes` has no such axis.

    Raises:
        ValueError: `kind` is unknown, `classes` does not fit, or `steps` is below 1.

    Example:
        >>> from PIL import Image
        >>> from transformers import pipeline
        >>> from prompt_cam_hf import trait_maps
        >>> pipe = pipeline("image-classification", model="my_model")
        >>> pixel_values = pipe.image_processor(Image.open("bird.jpg"), return_tensors="pt")["pixel_values"]
        >>> maps = trait_maps(pipe.model, pixel_values, kind="evidence")
        >>> maps[0, 0].sum(dim=(-2, -1))  # the evidence in each head for the predicted class, in logits
    """
    check_kind(kind)
    with torch.no_grad():
        state = model.last_layer_state(pixel_values, interpolate_pos_encoding)
        if classes is None:
            classes = model.last_layer_logits(state).argmax(dim=-1)
    asked = check_classes(classes, len(pixel_values), model.config.num_labels)
    return maps_from_state(model, state, asked.to(state.projections.keys.device), kind, steps)


def maps_from_state(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    classes: torch.Tensor,
    kind: MapKind = "attention",
    steps: int = EVIDENCE_STEPS,
) -> torch.Tensor:
    """Compute maps from a state of the network that is there already, (batch, k, heads, rows, cols), float32.

    "attention": the softmax weights a[h, t] of the class's prompt in head h on patch t. The weights on all tokens add
    up to 1; those on patches alone add up to less, since prompts and prefix tokens get attention too.

    "evidence": how much it raises (above 0) or lowers (below 0) the class's score s, in logits, that head h attends to
    token t not by the same weight u = 1 / number of tokens as to all others, but by a[h, t]. In the last layer, the
    class's prompt sees the tokens only through the contexts of the heads

        c[h] = sum over t of a[h, t] v[h, t]

    with the values v (their bias included). All that follows (output projection, residual connection, second norm,
    MLP, final norm, classifier) is a function s(c) of the contexts of all heads. A blurred head's context is the mean
    of the values. On the straight way c(x), 0 <= x <= 1, on which all heads get from blurred (the blur "tokens" of the
    heads' ranking) to sharp at the same pace, let g[h] be the mean of ds/dc[h]. The evidence of token t in head h is

        e[h, t] = (a[h, t] - u) v[h, t] . g[h]

    Over all heads and tokens it adds up to s(c(1)) - s(c(0)): the score, less the score with all heads blurred (the
    completeness of integrated gradients). A token that gets less than u of the attention takes part in the blurred
    context, so leaving it out counts too. The mean is taken by Gauss-Legendre quadrature.

    Args:
        model: The model, in evaluation mode.
        state: From `model.last_layer_state`, without gradient.
        classes: (batch, k), the classes asked about.
        kind: See above.
        steps: Points of the quadrature, 1 or more. Each costs the last layer's row of each class, forth and back.

    Raises:
        ValueError: `kind` is unknown, or `steps` is below 1.
    """
    check_kind(kind)
    if kind == "attention":
        with torch.no_grad():
            return model.trait_maps(state, classes)
    rows, cols = state.grid
    return token_evidence(model, state, classes, steps)[..., -rows * cols :].unflatten(-1, (rows, cols))


def token_evidence(
    model: ScoringModel, state: LastLayerState, classes: torch.Tensor, steps: int = EVIDENCE_STEPS
) -> torch.Tensor:
    """The evidence e of `maps_from_state` for every token, (batch, k, heads, tokens), float32.

    Tokens stand in the order class prompts, prefix tokens, patches.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}; evidence looks at 1 point or more between blurred and sharp heads.")
    with torch.no_grad():
        prompts, weights, sharp, blurred = head_contexts(model, state, classes)
    gradient = torch.zeros_like(sharp, dtype=torch.float32)
    # Points and shares are those of the interval from -1 to 1.
    points, shares = (each.tolist() for each in np.polynomial.legendre.leggauss(steps))
    for point, share in zip(points, shares, strict=True):
        contexts = torch.lerp(blurred, sharp, (1 + point) / 2)
        with torch.enable_grad():
            contexts.requires_grad_(True)
            scores = model.score(model.finish_last_layer(prompts, contexts))
            # A row's score depends on its own contexts alone, so one backward pass serves all images and classes.
            gradient += share / 2 * torch.autograd.grad(scores.sum(), contexts)[0].float()
    with torch.no_grad():
        # (batch, heads, k, tokens): each value on the gradient at its head's context.
        worth = gradient.transpose(1, 2) @ state.projections.values.float().transpose(-1, -2)
        return ((weights - 1 / weights.shape[-1]) * worth).transpose(1, 2)


def check_kind(kind: str) -> None:
    """Refuse, with a ValueError, an unknown kind of map."""
    if kind not in get_args(MapKind):
        raise ValueError(f'kind={kind!r} is not known; use "attention" or "evidence".')


def map_box(model: PromptCAMForImageClassification, image_processor: BaseImageProcessor, image: Image.Image) -> Box:
    """Find the part of an upright image that its maps cover, smaller than the image where the image processor crops.

    Most processors squash the whole image. CLIP's resizes the shorter side and cuts out the middle, so the model does
    not see the rest. Nor does it see pixels at the right and bottom that do not fill a patch.

    Returns:
        left, top, right, bottom in pixels of the image, with fractions.

    Raises:
        ValueError: the image processor resizes in a way that is not known.
    """
    return layout_box(model.map_layout, image_processor, image)


def layout_box(
    layout: Callable[[int, int], MapLayout], image_processor: BaseImageProcessor, image: Image.Image
) -> Box:
    """Do as `map_box`, for any model whose maps lie on images of a height and width as `layout` says."""
    settings = image_processor.to_dict()
    width, height = float(image.width), float(image.height)
    if settings.get("do_resize"):
        size = settings["size"]
        if "shortest_edge" in size:
            scale = size["shortest_edge"] / min(width, height)
            if "longest_edge" in size:  # DETR's, which is not to be exceeded
                scale = min(scale, size["longest_edge"] / max(width, height))
            resized = (width * scale, height * scale)
        elif not {"height", "width"} <= set(size):
            raise ValueError(f"The image processor resizes to {size}; maps can be laid back from a height and width.")
        else:
            resized = (size["width"], size["height"])
    else:
        resized = (width, height)
    seen = resized
    if settings.get("do_center_crop"):
        seen = (settings["crop_size"]["width"], settings["crop_size"]["height"])
    (rows, cols), (patch_height, patch_width) = layout(int(seen[1]), int(seen[0]))
    # In pixels of the resized image, then in those of the original.
    left, top = ((whole - part) / 2 for whole, part in zip(resized, seen, strict=True))
    right, bottom = left + cols * patch_width, top + rows * patch_height
    across, down = width / resized[0], height / resized[1]
    return (left * across, top * down, right * across, bottom * down)


def resize_map(trait_map: np.ndarray, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Resize a map (rows, cols) to an image of `size` (width, height) by bicubic interpolation.

    Outside of `box`, the part of the image that the map covers (from `map_box`), the answer is 0.

    Returns:
        (height, width), float32.
    """
    left, top, right, bottom = (0, 0, *size) if box is None else (round(side) for side in box)
    trait_map = np.asarray(trait_map, dtype=np.float32)
    rows, cols = trait_map.shape
    # Border patches are repeated outwards: at an edge, Pillow would make them overshoot.
    resized = Image.fromarray(np.pad(trait_map, 2, mode="edge")).resize(
        (max(right - left, 1), max(bottom - top, 1)), Image.Resampling.BICUBIC, box=(2, 2, cols + 2, rows + 2)
    )
    laid = Image.new("F", size)
    laid.paste(resized, (left, top))
    # Bicubic resampling overshoots; no pixel gets more than the strongest patch.
    return np.clip(np.array(laid), min(trait_map.min(), 0), max(trait_map.max(), 0))


def strong_region(
    trait_map: np.ndarray, size: tuple[int, int], box: Box | None = None, level: float = 0.25
) -> np.ndarray:
    """Find the pixels, (height, width), bool, where a map has at least the share `level` of its highest value.

    Attention is often so sharp that only one patch of a trait reaches half of the highest value, though the trait
    covers several. `size` and `box` are as in `resize_map`.

    Raises:
        ValueError: the map has no value above 0, or `level` is not above 0 and below 1.
    """
    if not 0 < level < 1:
        raise ValueError(f"level={level}; it is a share of the map's highest value, above 0 and below 1.")
    if not np.max(trait_map) > 0:
        raise ValueError("The map has no value above 0, so it has no strong region.")
    laid = resize_map(trait_map, size, box)
    return laid >= laid.max() * level
