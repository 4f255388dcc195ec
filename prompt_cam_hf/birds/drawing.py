# SPDX-License-Identifier: MIT
"""Drawing a bird: from a spec to an image and the mask of every part."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .anatomy import Pose, outlines, rotated
from .classes import COLOURS, PARTS, TRAIT_PARTS, BirdSpec, split_value
from .raster import Layer, Patch, clip_to, composite, cut_out, fill, join, outset, smooth_open, stroke
from .scenery import Scenery, paint_wash, scenery

# Plumage without a trait: browns, greys and olives, none close to a colour of COLOURS.
_TINTS = np.array(
    [
        (150, 116, 84), (136, 134, 132), (134, 130, 88), (184, 158, 120), (116, 126, 138), (160, 112, 88),
        (168, 164, 150),
    ]
)  # fmt: skip
_HORN = np.array([(66, 62, 62), (112, 100, 84), (88, 84, 92)])
_LEGS = np.array([(70, 64, 66), (150, 112, 96), (120, 104, 72)])
# How a natural part differs from the plumage: a factor on the tint, and a share of cream mixed in.
_NATURAL = {
    "body": (1.0, 0.0),
    "head": (0.97, 0.04),
    "crown": (0.86, 0.0),
    "throat": (1.0, 0.4),
    "breast": (1.0, 0.26),
    "wing": (0.8, 0.0),
    "wing-bar": (0.9, 0.12),
    "tail": (0.76, 0.0),
    "eye-ring": (1.0, 0.22),
}
_CREAM = np.array([236.0, 226.0, 204.0])
# Bars and spots are dark on the grounds whose channels sum to more than this, pale on the others.
_BRIGHT = 330
_DARK_MARKS, _PALE_MARKS = np.array([34.0, 30.0, 32.0]), np.array([240.0, 238.0, 228.0])
# Body length as a share of the image's side, before the whole bird is made to fit.
_SCALE_RANGE = (0.38, 0.56)
# Free space between the bird and the image's border, as a share of its side.
_MARGIN = 0.02
_SOLID = ("body", "head", "tail", "beak", "crest", "toes 0", "toes 1")


@dataclass(frozen=True)
class _Look:
    """The random draws of one image; none depends on the bird's values, so changing a value changes nothing else."""

    pose: Pose
    scale: float
    flip: bool
    place: tuple[float, float]
    tint: np.ndarray
    horn: np.ndarray
    legs: np.ndarray
    jitter: np.ndarray
    phase: np.ndarray
    scenery: Scenery
    light: np.ndarray
    grain: float


def _sample_look(rng: np.random.Generator) -> _Look:
    def tone(table: np.ndarray) -> np.ndarray:
        return table[int(rng.integers(len(table)))] * rng.uniform(0.86, 1.1) + rng.uniform(-8, 8, 3)

    return _Look(
        pose=Pose.sample(rng),
        scale=rng.uniform(*_SCALE_RANGE),
        flip=bool(rng.random() < 0.5),
        place=(rng.random(), rng.random()),
        tint=tone(_TINTS),
        horn=tone(_HORN),
        legs=tone(_LEGS),
        jitter=rng.uniform(-12, 12, (len(TRAIT_PARTS), 3)),
        phase=rng.random((len(TRAIT_PARTS), 2)),
        scenery=scenery(rng),
        light=np.array(
            [rng.uniform(0.86, 1.08), rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(-0.05, 0.05)]
        ),
        grain=rng.uniform(1.0, 4.0),
    )


def _place(look: _Look, size: int) -> tuple[dict[str, np.ndarray], float]:
    """The bird's outlines in pixels: turned, flipped, scaled to fit and put somewhere in the image."""
    shapes = {name: rotated(shape, look.pose.turn) for name, shape in outlines(look.pose).items()}
    if look.flip:
        shapes = {name: shape * (-1, 1) for name, shape in shapes.items()}
    solid = np.vstack([shapes[name] for name in _SOLID])
    low, high = solid.min(axis=0), solid.max(axis=0)
    scale = min(look.scale, (1 - 2 * _MARGIN) / float((high - low).max()))
    slack = 1 - 2 * _MARGIN - scale * (high - low)
    shift = _MARGIN + slack * look.place - scale * low
    return {name: (scale * shape + shift) * size for name, shape in shapes.items()}, scale * size


def _marks(
    pattern: str, patch: Patch, origin: np.ndarray, axis: np.ndarray, unit: float, phase: np.ndarray
) -> np.ndarray:
    """How strong a pattern's marks are, (rows, cols) in 0 to 1: bars across the axis, or staggered spots."""
    rows, cols = patch.alpha.shape
    y = (patch.top + np.arange(rows) + 0.5 - origin[1])[:, None]
    x = (patch.left + np.arange(cols) + 0.5 - origin[0])[None, :]
    along, across = (x * axis[0] + y * axis[1]) / unit + phase[0], (y * axis[0] - x * axis[1]) / unit + phase[1]
    if pattern == "barred":
        period = 0.105
        place = along / period
        distance = np.abs(place - np.floor(place) - 0.5) * period
        return np.clip((0.026 - distance) * unit + 0.5, 0, 1)
    period = 0.1
    row = np.floor(across / period)
    down = across / period - row - 0.5
    place = along / period + (row % 2) * 0.5
    side = place - np.floor(place) - 0.5
    return np.clip((0.03 - np.sqrt(down * down + side * side) * period) * unit + 0.5, 0, 1)


class _Painter:
    """Collects the layers of one bird."""

    def __init__(self, spec: BirdSpec, look: _Look, size: int) -> None:
        self.spec, self.look, self.size = spec, look, size
        self.shapes, self.unit = _place(look, size)
        self.ink = np.minimum(look.tint * 0.3, 60)
        self.layers: list[Layer] = []

    def patch(self, name: str) -> Patch | None:
        """A shape, filled."""
        return fill(self.shapes[name], self.size)

    def line(self, name: str, start: float, end: float) -> Patch | None:
        """An open shape as a line, its width at both ends in body lengths."""
        return fill(stroke(self.shapes[name], start * self.unit, end * self.unit), self.size)

    def add(self, patch: Patch | None, colour: np.ndarray, part: str | None = None, opacity: float = 1.0) -> None:
        """Lay a patch over what is there; None, which is outside of the image, is left out."""
        if patch is None:
            return
        if opacity < 1:
            patch = Patch(patch.top, patch.left, patch.alpha * opacity)
        if colour.ndim == 1:
            colour = colour[:, None, None]
        self.layers.append(Layer(patch, colour, None if part is None else PARTS.index(part)))

    def outline(self, name: str, width: float = 0.02) -> None:
        """An ink line round a shape; lay it before the shape itself."""
        self.add(fill(outset(self.shapes[name], max(width * self.unit, 0.7)), self.size), self.ink, opacity=0.75)

    def natural(self, part: str) -> np.ndarray:
        """The colour (3,) of a part without a trait."""
        if part == "beak":
            return self.look.horn
        factor, cream = _NATURAL[part]
        return (1 - cream) * self.look.tint * factor + cream * _CREAM

    def trait(self, part: str, patch: Patch | None) -> None:
        """Paint a part with its value."""
        value = self.spec.values[part]
        if patch is None or value is None:
            self.add(patch, self.natural(part), part)
            return
        index = TRAIT_PARTS.index(part)
        pattern, name = split_value(value)
        colour = np.clip(np.array(COLOURS[name]) + self.look.jitter[index], 10, 250)
        if pattern != "plain":
            middle = self.shapes[part].mean(axis=0)
            marks = _marks(pattern, patch, middle, self.axis(part), self.unit, self.look.phase[index])
            mark = _DARK_MARKS if sum(COLOURS[name]) > _BRIGHT else _PALE_MARKS
            colour = colour[:, None, None] + marks * (mark - colour)[:, None, None]
        self.add(patch, colour, part)

    def axis(self, part: str) -> np.ndarray:
        """The unit vector along which a part's bars follow each other."""
        across = self.shapes["vane 1"] if part == "tail" else self.shapes["feather 1"]
        along = across[-1] - across[0]
        return along / math.sqrt(float(along[0] * along[0] + along[1] * along[1]))


def _paint_bird(painter: _Painter) -> None:
    add, patch, look = painter.add, painter.patch, painter.look
    dark, pale = painter.ink, np.array([255.0, 252.0, 240.0])

    painter.outline("tail")
    tail = patch("tail")
    painter.trait("tail", tail)
    for k in range(3):
        add(clip_to(painter.line(f"vane {k}", 0.018, 0.022), tail), dark, opacity=0.5)
    for k in (1, 0):
        add(patch(f"toes {k}"), look.legs * 0.9, "legs")
        add(patch(f"leg {k}"), look.legs * (1.0 - 0.2 * k), "legs")

    head, body = patch("head"), patch("body")
    crown = join(clip_to(patch("crown"), head), patch("crest") if look.pose.crest > 0 else None)
    for name in ("body", "head", "beak", *(("crest",) if look.pose.crest > 0 else ())):
        painter.outline(name)
    add(body, painter.natural("body"), "body")
    add(clip_to(patch("belly"), body), pale, opacity=0.25)
    painter.trait("breast", clip_to(patch("breast"), body))
    add(head, painter.natural("head"), "head")
    painter.trait("throat", clip_to(patch("throat"), head, body))
    painter.trait("crown", crown)
    add(cut_out(body, patch("body light")), dark, opacity=0.25)
    painter.outline("wing", 0.016)
    wing = patch("wing")
    painter.trait("wing", wing)
    add(cut_out(wing, patch("wing light")), pale, opacity=0.25)
    for k in range(3):
        add(clip_to(painter.line(f"feather {k}", 0.014, 0.022), wing), dark, opacity=0.5)
    painter.trait("wing-bar", clip_to(patch("wing-bar"), wing))
    painter.trait("beak", patch("beak"))
    add(painter.line("gape", 0.02, 0.01), dark, opacity=0.5)
    painter.trait("eye-ring", patch("eye-ring"))
    add(patch("eye"), np.array([22.0, 18.0, 18.0]), "eye")
    add(patch("glint"), pale, "eye")


def _perch(painter: _Painter) -> Patch | None:
    slope, width, bend = painter.look.scenery.perch
    foot = painter.shapes["foot"] / painter.size
    x = np.array([-0.06, 0.5 * foot[0], foot[0], 0.5 * (1 + foot[0]), 1.06])
    y = foot[1] + 0.5 * width + slope * (x - foot[0]) + bend * np.array([1.0, 0.6, 0, -0.5, -1.2])
    return fill(stroke(smooth_open(np.stack([x, y], axis=1)), width * 1.15, width * 0.85) * painter.size, painter.size)


def unpack_masks(mask_image: np.ndarray | Image.Image) -> dict[str, np.ndarray]:
    """Unpack a mask image (rows, cols), such as a row's `masks`, into a boolean mask of each of `PARTS`."""
    bits = np.asarray(mask_image, dtype=np.uint16)
    return {part: (bits >> index & 1).astype(bool) for index, part in enumerate(PARTS)}


def check_size(size: int) -> None:
    """Refuse images of fewer than 32 pixels a side, too small to show every part."""
    if size < 32:
        raise ValueError(f"size is {size} pixels, but a bird needs at least 32 to show its parts.")


def draw_bits(spec: BirdSpec, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Draw a bird in its surroundings, as arrays; raises ValueError where `size` is below 32 pixels.

    Returns:
        The image (size, size, 3; uint8, RGB) and the mask image (size, size; uint16). Bit k of the mask image says
        that part k of `PARTS` is seen in the pixel: repainting the part changes it. Parts side by side share the
        pixels of their border.
    """
    check_size(size)
    rng = np.random.Generator(np.random.PCG64(spec.seed))
    look = _sample_look(rng)
    scene = look.scenery
    painter = _Painter(spec, look, size)
    for shape in scene.behind:
        painter.add(fill(shape.outline * size, size), shape.colour, opacity=shape.opacity)
    painter.add(_perch(painter), scene.bark)
    _paint_bird(painter)
    for shape in scene.front:
        painter.add(fill(shape.outline * size, size), shape.colour, opacity=shape.opacity)
    image, bits = composite(painter.layers, paint_wash(scene, size))
    level, down, right, warm = look.light
    y, x = ((np.arange(size) + 0.5) / size - 0.5)[:, None], ((np.arange(size) + 0.5) / size - 0.5)[None, :]
    tone = np.array([1 + warm, 1.0, 1 - warm])[:, None, None]
    grain = (rng.random((size, size)) + rng.random((size, size)) - 1) * look.grain
    image = image * (level + down * y + right * x) * tone + grain
    return np.clip(image + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0), bits


def draw_bird(spec: BirdSpec, size: int = 96) -> tuple[Image.Image, dict[str, np.ndarray]]:
    """Draw a bird in its surroundings; raises ValueError where `size` is below 32 pixels.

    Returns:
        The RGB image, and for each of `PARTS` the pixels that show it, boolean, (size, size).
    """
    image, bits = draw_bits(spec, size)
    return Image.fromarray(image), unpack_masks(bits)
