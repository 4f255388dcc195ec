# SPDX-License-Identifier: MIT
"""Rendering of pages that consist of one HTML file: templates are filled in, and images are embedded.

Pages extend `templates/page.html.j2`, which has the style (phones, dark mode, print, keyboard) and forbids the browser
to fetch anything. An image and its maps are a `Drawn`: the image is embedded once, the browser lays the maps over it.
"""

import base64
import io
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from prompt_cam_hf.explanations.figures import overlay
from prompt_cam_hf.explanations.maps import Box, resize_map
from prompt_cam_hf.messages import printable

# Tried in turn until an image is small enough.
_QUALITIES = (75, 60, 45, 30)
# A map is embedded with so many pixels a patch, and so many colours.
_PIXELS_PER_PATCH, _MAX_MAP_SIDE, _COLOURS = 4, 64, 64


class EmbeddedImage(NamedTuple):
    """An image as a data URI; with width and height the browser reserves the place before it decodes it."""

    uri: str
    width: int
    height: int


def embed_thumbnail(image: Image.Image, max_side: int, max_bytes: int) -> EmbeddedImage:
    """Shrink an RGB image and embed it as WebP of at most `max_side` pixels and `max_bytes` (before base64).

    If the lowest quality is still larger than that, the image is halved in size.
    """
    small = image.copy()
    small.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    while True:
        for quality in _QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=4)
            if buffer.tell() <= max_bytes or max(small.size) == 1:
                return _embed(buffer.getvalue(), "image/webp", small.size)
        small = small.resize((max(small.width // 2, 1), max(small.height // 2, 1)), Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class DrawnMap:
    """A map as it lies over an image, with what stands under it.

    Attributes:
        image: The colours, transparent where the map is weak.
        title: What the map is of.
        peak: The value of the brightest colour, in words. Each map has its own.
        alt: What it shows, for those who cannot see it.
    """

    image: EmbeddedImage
    title: str
    peak: str
    alt: str


@dataclass(frozen=True)
class Drawn:
    """An image and some of its maps, side by side.

    `box` is the part of the embedded image that the maps cover, as a share of its width and height: left, top, width,
    height. `outline` is an SVG path that surrounds the true traits, in pixels of the embedded image; "" for none.
    """

    name: str
    image: EmbeddedImage
    maps: list[DrawnMap]
    caption: str
    box: Box
    outline: str = ""


def share_of(box: Box, size: tuple[int, int]) -> Box:
    """A box (left, top, right, bottom) in pixels as shares of an image's size: left, top, width, height."""
    left, top, right, bottom = box
    width, height = size
    return left / width, top / height, (right - left) / width, (bottom - top) / height


def embed_map(trait_map: np.ndarray) -> EmbeddedImage:
    """Embed a map (rows, cols; at least 0) as PNG, in the colours and the transparency of `overlay`.

    The brightest colour is the map's own highest value, so that a weak map can be seen too: give its peak in words.
    """
    rows, cols = trait_map.shape
    factor = max(min(_PIXELS_PER_PATCH, _MAX_MAP_SIDE // max(rows, cols)), 1)
    strength = resize_map(trait_map, (cols * factor, rows * factor)) / max(trait_map.max(), np.finfo(np.float32).tiny)
    colours, opacity = _map_colours()
    image = Image.fromarray(np.rint(strength * (_COLOURS - 1)).astype(np.uint8)).convert("P")
    image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=opacity.tobytes())
    return _embed(buffer.getvalue(), "image/png", image.size)


@cache
def _map_colours() -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 3) and opacity (n,) of weak to strong, uint8: what `overlay` adds to black, and leaves of white."""
    ramp = np.linspace(0, 1, _COLOURS)[None]
    black, white = (overlay(Image.new("L", ramp.shape[::-1], grey), ramp, 1.0)[0].astype(float) for grey in (0, 255))
    opacity = 1 - (white - black).mean(axis=-1) / 255
    return np.rint(black / opacity[:, None]).clip(0, 255).astype(np.uint8), np.rint(255 * opacity).astype(np.uint8)


def scale_colours(over_image: bool) -> str:
    """The colours from weak to strong as stops of a CSS gradient: of maps over a mid-grey image, or of maps alone."""
    ramp = np.linspace(0, 1, 9)[None]
    if over_image:
        colours = overlay(Image.new("L", ramp.shape[::-1], 128), ramp, 1.0)[0]
    else:
        colours = np.rint(255 * mpl.colormaps["inferno"](ramp[0])[:, :3]).astype(int)
    return ", ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in colours)


def embed_pixels(pixels: np.ndarray) -> EmbeddedImage:
    """Embed RGB pixels (rows, cols, 3; uint8) exactly, as PNG; for grids that the page enlarges."""
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _embed(buffer.getvalue(), "image/png", image.size)


def _embed(content: bytes, mime_type: str, size: tuple[int, int]) -> EmbeddedImage:
    return EmbeddedImage(f"data:{mime_type};base64,{base64.b64encode(content).decode()}", *size)


def render_page(template: str, **context: Any) -> str:
    """Fill in a template of the folder `templates`; text is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("prompt_cam_hf", "templates"),
        autoescape=True,
        finalize=_visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["percent"] = percent
    environment.globals["scale_colours"] = scale_colours
    return environment.get_template(template).render(context)


def _visible(value: Any) -> Any:
    """Text without what would hide in it or turn it around, such as U+202E."""
    if not isinstance(value, str):
        return value
    shown = "".join(char if char.isprintable() or char in "\n\t" else printable(char) for char in value)
    return Markup(shown) if isinstance(value, Markup) else shown


def percent(share: float) -> str:
    """A share as a percentage, with a decimal where it would otherwise be rounded to 0 or 100."""
    if 0 < share < 0.0005 or 0.9995 <= share < 1:
        return "under 0.1%" if share < 0.5 else "over 99.9%"
    return f"{share:.0%}" if share in (0, 1) or 0.005 <= share < 0.995 else f"{share:.1%}"
