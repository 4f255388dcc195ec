# SPDX-License-Identifier: MIT
"""How are trait maps drawn? On the original picture, all on one scale, with the attention that they leave out said."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

# Perceptually uniform, and readable by the colour-blind.
_COLOUR_MAP = "inferno"
_INCHES = 2.2


def overlay(image: Image.Image, trait_map: np.ndarray, vmax: float) -> np.ndarray:
    """Lay a trait map over a picture.

    Args:
        image: The original picture, of any size.
        trait_map: Attention to each patch, (rows, cols).
        vmax: The attention that gets the brightest colour; 0 gets none.

    Returns:
        An RGB picture of the same size, uint8, (height, width, 3).
    """
    # Bicubic resampling overshoots, hence the clipping.
    resized = Image.fromarray(np.asarray(trait_map, dtype=np.float32)).resize(image.size, Image.Resampling.BICUBIC)
    strength = np.clip(np.asarray(resized) / max(vmax, np.finfo(np.float32).tiny), 0, 1)
    colours = mpl.colormaps[_COLOUR_MAP](strength)[..., :3]
    opacity = 0.25 + 0.6 * strength[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    return np.rint(255 * ((1 - opacity) * grey + opacity * colours)).astype(np.uint8)


def plot_trait_maps(
    image: Image.Image,
    trait_maps: np.ndarray,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    vmax: float | None = None,
) -> Figure:
    """Draw a picture beside the trait maps of one class.

    Args:
        image: The original picture.
        trait_maps: (heads, rows, cols), as in the pipeline's answer or one class of `PromptCAMOutput.trait_maps`.
        heads: The heads to draw, in this order; all by default. The first `k` of the pipeline's `head_order` are the
            most important ones.
        title: The class, or what else belongs over the picture.
        vmax: Attention of the brightest colour; the strongest of the drawn maps by default. One scale serves all maps
            of a figure: a weak head looks weak.

    Raises:
        ValueError: `trait_maps` is not of three dimensions, or a head does not exist.
    """
    trait_maps = np.asarray(trait_maps)
    if trait_maps.ndim != 3:
        raise ValueError(f"trait_maps has the shape {trait_maps.shape}; it must be (heads, rows, cols), of one class.")
    heads = range(len(trait_maps)) if heads is None else heads
    if any(not 0 <= head < len(trait_maps) for head in heads):
        raise ValueError(f"heads={list(heads)}: there are heads 0 to {len(trait_maps) - 1} only.")
    if vmax is None:
        vmax = float(max((trait_maps[head].max() for head in heads), default=0))
    height = _INCHES * image.height / image.width
    figure = Figure(figsize=(_INCHES * (len(heads) + 1), height + 0.55), layout="constrained")
    axes = figure.subplots(1, len(heads) + 1, squeeze=False)[0]
    axes[0].imshow(image)
    axes[0].set_title("picture", fontsize=9)
    for axis, head in zip(axes[1:], heads, strict=True):
        axis.imshow(overlay(image, trait_maps[head], vmax))
        axis.set_title(f"head {head}: {trait_maps[head].sum():.0%} on patches", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


__all__ = ["overlay", "plot_trait_maps"]
