# SPDX-License-Identifier: MIT
"""Drawing trait maps on the original image, with a colour bar that explains them.

Attention of one head is often ten times as sharp as that of another, and on one scale the other is black. So each map
has its own scale unless another is asked for, and its peak stands over it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from prompt_cam_hf.explanations.maps import Box, MapKind, resize_map
from prompt_cam_hf.explanations.sheet import ColourBar, Page, Panel, Row, Sheet, draw_sheet

Scale = Literal["map", "head", "figure"]

# Perceptually uniform, and readable by the colour-blind; the second one for values with a sign.
_COLOUR_MAP = "inferno"
_SIGNED_COLOUR_MAP = "coolwarm"
_DEFAULT_HEADS = 4
# Panels are at most a few inches wide, and more pixels than this would only make files and drawing heavy.
_MAX_PIXELS = 1_000_000
_MEANING: Mapping[MapKind, str] = {
    "attention": "share of a head's attention on a patch",
    "evidence": "evidence of a patch, in logits: red raises the class's score, blue lowers it",
}
_MEANING_OF_DIFFERENCE: Mapping[MapKind, str] = {
    "attention": "difference in attention on a patch: red, the first looks more; blue, the other does",
    "evidence": "difference in evidence of a patch, in logits: red, the first has more; blue, the other does",
}

_SCALES: Mapping[Scale, str] = {
    "map": "each map on a scale of its own, up to its peak",
    "head": "each head on a scale of its own, up to its highest peak",
    "figure": "one scale for all maps",
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

    They cover the `box` of the image (from `map_box`; None: all of it). `vmax` holds, for each head, the value of the
    brightest colour, where the scale is not "map". `outline` marks what reaches half of the scale.
    """

    image: Image.Image
    box: Box | None
    kind: MapKind
    vmax: Mapping[int, float]
    outline: bool
    scale: Scale
    difference: bool = False

    @property
    def signed(self) -> bool:
        """Whether values below 0 have colours too."""
        return self.difference or self.kind == "evidence"

    @cached_property
    def _drawn(self) -> tuple[Image.Image, Box | None]:
        """The image and the box at the size at which they are drawn."""
        width, height = self.image.size
        share = (_MAX_PIXELS / (width * height)) ** 0.5
        if share >= 1:
            return self.image, self.box
        size = (max(round(width * share), 1), max(round(height * share), 1))
        across, down = size[0] / width, size[1] / height
        box = self.box and (self.box[0] * across, self.box[1] * down, self.box[2] * across, self.box[3] * down)
        return self.image.resize(size, reducing_gap=2.0), box

    def number(self, value: float) -> str:
        """A value of a map as text: a percentage of the attention, or logits."""
        if value == 0:
            return "0"
        sign = "+" if self.signed else ""
        if self.kind == "evidence":
            return f"{value:{sign}.2g}"
        return f"{value:{sign}.{0 if abs(value) >= 0.1 else 1 if abs(value) >= 0.01 else 2}%}"

    def image_panel(self, title: str = "image", region: np.ndarray | None = None) -> Panel:
        """The image as it is; `region` (height, width), bool, is outlined."""
        image, _ = self._drawn
        outline = None if region is None else np.asarray(Image.fromarray(region).resize(image.size), np.float32)
        return Panel(np.asarray(image.convert("RGB")), title, outline)

    def draw(self, head: int, trait_map: np.ndarray, *title: str) -> Panel:
        """A head's map as a panel, titled with the head, the map's peak and more lines."""
        image, box = self._drawn
        peak = float(trait_map.flat[np.abs(trait_map).argmax()])
        vmax = abs(peak) if self.scale == "map" else self.vmax[head]
        title = (f"head {head}: peak {self.number(peak)}", *title)
        outline = None
        if self.outline and vmax > 0:
            outline = resize_map(trait_map, image.size, box) / vmax
        pixels = overlay(image, trait_map, vmax, signed=self.signed, box=box)
        return Panel(pixels, "\n".join(title), outline, (-0.5, 0.5) if self.signed else (0.5,))

    def colour_bar(self) -> ColourBar:
        """The legend of the colours, as they look on a mid-grey image."""
        label = (_MEANING_OF_DIFFERENCE if self.difference else _MEANING)[self.kind]
        label += f"; {_SCALES[self.scale]}"
        if self.outline:
            label += "; outlined: half of the scale"
        if self.box is not None and self._crops():
            label += "; pale: not seen by the model"
        values = np.linspace(-1 if self.signed else 0, 1, 256)[None]
        colours = overlay(Image.new("L", (256, 1), 128), values, 1.0, signed=self.signed)
        if self.scale == "figure":
            vmax = max(self.vmax.values(), default=0.0)
            smallest, half, largest = map(self.number, (-vmax, vmax / 2, vmax))
        else:
            peak = "peak" if self.scale == "map" else "highest peak"
            smallest, half, largest = f"-{peak}", "half", f"+{peak}" if self.signed else peak
        ticks = (
            [(0.0, smallest), (0.5, "0"), (1.0, largest)] if self.signed else [(0.0, "0"), (0.5, half), (1.0, largest)]
        )
        return ColourBar(label, colours, ticks, ((0.25, 0.75) if self.signed else (0.5,)) if self.outline else ())

    def _crops(self) -> bool:
        left, top, right, bottom = self.box or (0, 0, *self.image.size)
        return max(left, top, self.image.width - right, self.image.height - bottom) >= 1


def find_scale(drawn: Iterable[tuple[int, np.ndarray]], scale: Scale) -> dict[int, float]:
    """The value of the brightest colour for each head, from the heads and maps that are drawn.

    Raises:
        ValueError: `scale` is unknown.
    """
    if scale not in _SCALES:
        raise ValueError(f'scale={scale!r} is not known; use "map", "head" or "figure".')
    peaks: dict[int, float] = {}
    for head, trait_map in drawn:
        peaks[head] = max(peaks.get(head, 0.0), float(np.abs(trait_map).max()))
    return dict.fromkeys(peaks, max(peaks.values(), default=0.0)) if scale == "figure" else peaks


def plot_trait_maps(
    image: Image.Image,
    trait_maps: np.ndarray,
    heads: Sequence[int] | None = None,
    title: str | None = None,
    vmax: float | None = None,
    *,
    outline: bool = False,
    scale: Scale = "map",
    columns: int | None = None,
    width: float | None = None,
    font_size: float | None = None,
) -> Figure:
    """Draw an image beside the attention maps of one class.

    Args:
        image: The original image.
        trait_maps: (heads, rows, cols), as in the pipeline's answer or one class of `PromptCAMOutput.trait_maps`.
        heads: The heads to draw, in this order; all by default. The first `k` of the pipeline's `head_order` are the
            most important ones.
        title: A line over the image, such as the class.
        vmax: The attention drawn in the brightest colour, for all maps; None: what `scale` says.
        outline: Outline what reaches half of the scale.
        scale, columns, width, font_size: As in `Result.figure`.

    Raises:
        ValueError: `trait_maps` is not of three dimensions, a head does not exist, `scale` is unknown, or the figure
            cannot be laid out so.
    """
    trait_maps = np.asarray(trait_maps)
    if trait_maps.ndim != 3:
        raise ValueError(f"trait_maps has the shape {trait_maps.shape}; it must be (heads, rows, cols), of one class.")
    heads = range(len(trait_maps)) if heads is None else heads
    if any(not 0 <= head < len(trait_maps) for head in heads):
        raise ValueError(f"heads={list(heads)}: there are heads 0 to {len(trait_maps) - 1} only.")
    if vmax is None:
        scales = find_scale(((head, trait_maps[head]) for head in heads), scale)
    else:
        scale, scales = "figure", dict.fromkeys(heads, vmax)
    style = MapStyle(image, None, "attention", scales, outline, scale)
    panels = [style.draw(head, trait_maps[head], f"{trait_maps[head].sum():.0%} on patches") for head in heads]
    rows = [Row(title or "", [style.image_panel(), *panels])]
    return draw_sheet(Sheet(rows, [style.colour_bar()]), Page(columns, width, font_size))


def check_head_count(heads: int | None, available: int) -> int:
    """The number of heads to show: by default 4, or all where there are fewer; refused where there are fewer than
    asked.
    """
    if heads is None:
        return min(_DEFAULT_HEADS, available)
    if not 1 <= heads <= available:
        raise ValueError(f"heads={heads}: the model has {available} heads, so 1 to {available} can be shown.")
    return heads
