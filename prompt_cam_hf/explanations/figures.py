# SPDX-License-Identifier: MIT
"""Drawing trait maps on the original image, all maps of a figure on one scale, with a colour bar that explains it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from prompt_cam_hf.explanations.maps import Box, MapKind, resize_map
from prompt_cam_hf.explanations.sheet import ColourBar, Panel, Row, draw_rows

Scale = Literal["figure", "head"]

# Perceptually uniform, and readable by the colour-blind; the second one for values with a sign.
_COLOUR_MAP = "inferno"
_SIGNED_COLOUR_MAP = "coolwarm"
_DEFAULT_HEADS = 4
_MEANING: Mapping[MapKind, str] = {
    "attention": "share of a head's attention on a patch",
    "evidence": "evidence of a patch, in logits: red raises the class's score, blue lowers it",
}
_MEANING_OF_DIFFERENCE: Mapping[MapKind, str] = {
    "attention": "difference in attention on a patch: red, the first looks more; blue, the other does",
    "evidence": "difference in evidence of a patch, in logits: red, the first has more; blue, the other does",
}


def overlay(
    image: Image.Image, trait_map: np.ndarray, vmax: float, *, signed: bool = False, box: Box | None = None
) -> np.ndarray:
    """Draw a trait map over an image that is turned grey.

    Args:
        image: The original image, of any size.
        trait_map: One number for each patch, (rows, cols).
        vmax: The value drawn in the brightest colour.
        signed: Whether values below 0 have colours too, the strongest at -vmax.
        box: The part of the image that the map covers, from `map_box`; what the model did not see is drawn pale.

    Returns:
        An RGB image of the same size, uint8, (height, width, 3).
    """
    strength = resize_map(trait_map, image.size, box) / max(vmax, np.finfo(np.float32).tiny)
    if signed:
        strength = np.clip(strength, -1, 1)
        colours = mpl.colormaps[_SIGNED_COLOUR_MAP]((strength + 1) / 2)[..., :3]
        # Weak values keep enough colour to tell their sign.
        opacity = 0.9 * np.abs(strength)[..., None] ** 0.75
    else:
        strength = np.clip(strength, 0, 1)
        colours = mpl.colormaps[_COLOUR_MAP](strength)[..., :3]
        opacity = 0.25 + 0.6 * strength[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    pixels = (1 - opacity) * grey + opacity * colours
    if box is not None:
        left, top, right, bottom = (max(round(side), 0) for side in box)
        unseen = np.ones(pixels.shape[:2], bool)
        unseen[top:bottom, left:right] = False
        pixels[unseen] = 0.3 * grey[unseen] + 0.7
    return np.rint(255 * pixels).astype(np.uint8)


@dataclass(frozen=True)
class MapStyle:
    """What the maps of a figure have in common.

    They cover the `box` of the image (from `map_box`; None: all of it). `vmax` is the value of the brightest colour
    where the scale is "figure"; with "head" each map has one of its own. `outline` marks what reaches half of the
    scale.
    """

    image: Image.Image
    box: Box | None
    kind: MapKind
    vmax: float
    outline: bool
    scale: Scale
    difference: bool = False

    def __post_init__(self) -> None:
        if self.scale not in ("figure", "head"):
            raise ValueError(f'scale={self.scale!r} is not known; use "figure" or "head".')

    @property
    def signed(self) -> bool:
        """Whether values below 0 have colours too."""
        return self.difference or self.kind == "evidence"

    def number(self, value: float) -> str:
        """A value of a map as text: a percentage of the attention, or logits."""
        if value == 0:
            return "0"
        sign = "+" if self.signed else ""
        if self.kind == "evidence":
            return f"{value:{sign}.2g}"
        return f"{value:{sign}.{0 if abs(value) >= 0.1 else 1 if abs(value) >= 0.01 else 2}%}"

    def image_panel(self) -> Panel:
        """The image as it is."""
        return Panel(np.asarray(self.image.convert("RGB")), "image")

    def draw(self, trait_map: np.ndarray, *title: str) -> Panel:
        """One map as a panel, with its title's lines."""
        vmax = self.vmax
        if self.scale == "head":
            vmax = float(np.abs(trait_map).max())
            title = (*title, f"max {self.number(vmax).replace('+', '±')}")
        pixels = overlay(self.image, trait_map, vmax, signed=self.signed, box=self.box)
        outline = None
        if self.outline and vmax > 0:
            outline = resize_map(trait_map, self.image.size, self.box) / vmax
        return Panel(pixels, "\n".join(title), outline, (-0.5, 0.5) if self.signed else (0.5,))

    def colour_bar(self) -> ColourBar:
        """The legend of the colours, as they look on a mid-grey image."""
        label = (_MEANING_OF_DIFFERENCE if self.difference else _MEANING)[self.kind]
        label += "; each map on its own scale" if self.scale == "head" else "; one scale for all maps"
        if self.outline:
            label += "; outlined: half of it"
        if self.box is not None and self._crops():
            label += "; pale: not seen by the model"
        values = np.linspace(-1 if self.signed else 0, 1, 256)[None]
        colours = overlay(Image.new("L", (256, 1), 128), values, 1.0, signed=self.signed)
        largest = "max" if self.scale == "head" else self.number(self.vmax)
        half = "half" if self.scale == "head" else self.number(self.vmax / 2)
        if self.signed:
            smallest = "-max" if self.scale == "head" else self.number(-self.vmax)
            ticks = [(0.0, smallest), (0.5, "0"), (1.0, largest)]
        else:
            ticks = [(0.0, "0"), (0.5, half), (1.0, largest)]
        return ColourBar(label, colours, ticks, ((0.25, 0.75) if self.signed else (0.5,)) if self.outline else ())

    def _crops(self) -> bool:
        left, top, right, bottom = self.box or (0, 0, *self.image.size)
        return max(left, top, self.image.width - right, self.image.height - bottom) >= 1


def plot_trait_maps(
    image: Image.Image,
    trait_maps: np.ndarray,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    vmax: float | None = None,
    *,
    outline: bool = False,
    scale: Scale = "figure",
) -> Figure:
    """Draw an image beside the attention maps of one class.

    Args:
        image: The original image.
        trait_maps: (heads, rows, cols), as in the pipeline's answer or one class of `PromptCAMOutput.trait_maps`.
        heads: The heads to draw, in this order; all by default. The first `k` of the pipeline's `head_order` are the
            most important ones.
        title: A line over the image, such as the class.
        vmax: The attention drawn in the brightest colour; by default the highest of all drawn maps. All maps share
            this scale, so a weak head looks weak.
        outline: Outline what reaches half of the scale.
        scale: "figure", or "head" to draw each map on its own scale, which shows weak heads.

    Raises:
        ValueError: `trait_maps` is not of three dimensions, a head does not exist, or `scale` is unknown.
    """
    trait_maps = np.asarray(trait_maps)
    if trait_maps.ndim != 3:
        raise ValueError(f"trait_maps has the shape {trait_maps.shape}; it must be (heads, rows, cols), of one class.")
    heads = range(len(trait_maps)) if heads is None else heads
    if any(not 0 <= head < len(trait_maps) for head in heads):
        raise ValueError(f"heads={list(heads)}: there are heads 0 to {len(trait_maps) - 1} only.")
    if vmax is None:
        vmax = float(max((trait_maps[head].max() for head in heads), default=0))
    style = MapStyle(image, None, "attention", vmax, outline, scale)
    panels = [
        style.draw(trait_maps[head], f"head {head}", f"{trait_maps[head].sum():.0%} on patches") for head in heads
    ]
    return draw_rows([Row(title or "", [style.image_panel(), *panels])], [style.colour_bar()])


def check_head_count(heads: int | None, available: int) -> int:
    """The number of heads to show: by default 4, or all where there are fewer; refused where there are fewer than
    asked.
    """
    if heads is None:
        return min(_DEFAULT_HEADS, available)
    if not 1 <= heads <= available:
        raise ValueError(f"heads={heads}: the model has {available} heads, so 1 to {available} can be shown.")
    return heads
