# SPDX-License-Identifier: MIT
"""Rendering of pages that consist of one HTML file: templates are filled in, and images are embedded.

Pages extend `templates/page.html.j2`, which has the style (phones, dark mode, print, keyboard) and forbids the browser
to fetch anything.
"""

import base64
import io
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from prompt_cam_hf.messages import printable

# Tried in turn until an image is small enough.
_QUALITIES = (75, 60, 45, 30)


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
    environment.filters["percent"] = _percent
    return environment.get_template(template).render(context)


def _visible(value: Any) -> Any:
    """Text without what would hide in it or turn it around, such as U+202E."""
    if not isinstance(value, str):
        return value
    shown = "".join(char if char.isprintable() or char in "\n\t" else printable(char) for char in value)
    return Markup(shown) if isinstance(value, Markup) else shown


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) or 0.005 <= share < 0.995 else f"{share:.1%}"
