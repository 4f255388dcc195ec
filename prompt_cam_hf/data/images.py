# SPDX-License-Identifier: MIT
"""Opening images, finding them in folders, and the image processor of the official preprocessing.

The official implementation squashes every image to a fixed size, with mean and standard deviation 0.5.
"""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

from prompt_cam_hf.messages import printable

logger = logging.getLogger(__name__)

# Pixels only: for PostScript Pillow would start Ghostscript.
_FORMATS = {
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
}  # fmt: skip

# Sets the most pixels that an image may have; a small file may hold gigabytes of them.
MAX_PIXELS_VARIABLE = "PROMPT_CAM_MAX_PIXELS"
_MAX_PIXELS = 128_000_000

# Pixels a side that an image processor may make; beyond, no memory would hold the attention.
MAX_SIDE = 8192

ImageSource = str | os.PathLike | bytes | Image.Image | Mapping[str, Any]


class UnreadableImageError(ValueError):
    """An image that cannot be decoded to its last pixel; the message names the file and the reason."""


def image_name(source: ImageSource) -> str:
    """Give the path of an image, for a message; empty where it has none."""
    if isinstance(source, Mapping):
        source = source.get("path") or b""
    if isinstance(source, Image.Image):
        return str(getattr(source, "filename", ""))
    return "" if isinstance(source, bytes) else os.fspath(source)


def _open_lazily(source: ImageSource) -> Image.Image:
    """Open without decoding; the caller closes the image."""
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, Mapping):
        if source.get("bytes") is None and source.get("path") is None:
            raise ValueError("there is neither a path nor bytes")
        return _open_lazily(source["path"] if source.get("bytes") is None else source["bytes"])
    if isinstance(source, bytes):
        return _open_file(BytesIO(source))
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise ValueError("it is not a regular file")
    return _open_file(source)


@cache
def _formats() -> tuple[str, ...]:
    """The formats of pixels that Pillow can open here."""
    Image.init()
    return tuple(sorted(_FORMATS & Image.OPEN.keys()))


def _open_file(file: str | os.PathLike | BytesIO) -> Image.Image:
    """Open a file, and refuse an image of too many pixels before any is decoded."""
    limit = int(os.environ.get(MAX_PIXELS_VARIABLE, _MAX_PIXELS))
    if MAX_PIXELS_VARIABLE in os.environ:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would come first
    image = None
    try:
        image = Image.open(file, formats=_formats())
        number = image.width * image.height
    except Image.DecompressionBombError as error:
        number = int(re.findall(r"\d+", str(error))[0])
    if image is None or number > limit:
        if image is not None:
            image.close()
        raise ValueError(
            f"it has {number:,} pixels, and at most {limit:,} are read; make it smaller, or, where memory allows, set "
            f"{MAX_PIXELS_VARIABLE}={number} in the environment"
        )
    return image


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Map the whole 16-bit range onto 0..255; Pillow's own conversion would cut off everything above 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels are 32-bit numbers of no known range; save it with 8 or 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bit(image)
    if image.mode == "P":
        # The same colours as the direct way, without Pillow's warning about transparent palettes.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is empty or in no image format that Pillow can read"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def open_image(source: ImageSource, least_side: int | None = None) -> Image.Image:
    """Open an image and decode it fully.

    The result equals that of transformers' own `load_image`, which pipelines use, so that a model sees in use what it
    saw in training: an alpha channel is dropped, not blended with a background. Only 16-bit images differ: they are
    scaled to 8 bits, where `load_image` clips them.

    Args:
        source: A path, the bytes of an encoded file, a PIL image, or a value of `datasets.Image(decode=False)`: a
            mapping with `path` and `bytes`.
        least_side: Allow a JPEG to be decoded at a half, a quarter or an eighth of its size, as far as no side becomes
            shorter than so many pixels. A camera's photo takes a fraction of the time then.

    Returns:
        The image as 8-bit RGB, turned upright by its EXIF orientation.

    Raises:
        FileNotFoundError: the path does not exist.
        UnreadableImageError: the image is broken or truncated, no regular file, in no format of pixels, too large (see
            `MAX_PIXELS_VARIABLE`), or has 32-bit pixels.
    """
    with _opened(source, least_side) as image:
        return _upright_rgb(image)


@contextmanager
def _opened(source: ImageSource, least_side: int | None) -> Iterator[Image.Image]:
    """Open without decoding; what goes wrong then or in the block has one sentence."""
    try:
        with _open_lazily(source) as image:
            if least_side is not None:
                image.draft(None, (least_side, least_side))
            yield image
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type there is on broken files
        name = image_name(source) or "given as bytes or pixels"
        raise UnreadableImageError(f"Cannot read the image {printable(name)}: {_reason(error)}") from error


def upright_size(source: ImageSource, least_side: int | None = None) -> tuple[int, int]:
    """Width and height of what `open_image` gives, from the head of the file alone; raises the same."""
    with _opened(source, least_side) as image:
        width, height = image.size
        lies_on_its_side = image.getexif().get(ExifTags.Base.Orientation) in range(5, 9)
        return (height, width) if lies_on_its_side else (width, height)


def image_suffixes() -> set[str]:
    """List the endings of the formats that are opened, in lower case and with the dot."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in _formats()}


def visible_files(folder: Path, elsewhere: Iterable[Path] = ()) -> list[Path]:
    """List the files in a folder at any depth, sorted, following links to files and folders.

    Each folder is read once, whatever links lead to it. Hidden files and folders (`.name`) are passed over, and so are
    folders like `__MACOSX` and the folders `elsewhere`, which are read on their own.

    Raises:
        PermissionError: a folder may not be read.
    """
    found: list[Path] = []
    # Real folders come before links, so that files have their own paths.
    waiting, links = [folder], list[Path]()
    seen = {_identity(path) for path in elsewhere} - {_identity(folder)}
    while waiting or links:
        current = waiting.pop() if waiting else links.pop(0)
        if _identity(current) in seen:
            logger.warning("%s: passed over, because it leads to a folder that is read already.", current)
            continue
        seen.add(_identity(current))
        for path in sorted(current.iterdir()):
            if path.name.startswith("."):
                continue
            if not path.is_dir():
                found.append(path)
            elif not path.name.startswith("__"):
                (links if path.is_symlink() else waiting).append(path)
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """List the images among files and in folders, in the order of `paths`, those of a folder sorted.

    Files are taken as they are; of a folder, `visible_files` with the ending of an image.

    Raises:
        FileNotFoundError: a path does not exist.
        PermissionError: a folder may not be read.
        ValueError: a folder has no images.
    """
    suffixes = image_suffixes()
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {printable(str(path))}.")
        if not path.is_dir():
            found.append(path)
            continue
        images = [file for file in visible_files(path) if file.suffix.lower() in suffixes]
        if not images:
            raise ValueError(f"The folder {path} holds no images.")
        found += images
    return found


def unreadable_reason(source: ImageSource) -> str | None:
    """Say in words why `open_image` would refuse an image; None where the image can be read.

    Faster than `open_image`: a JPEG is decoded at an eighth of its size, for which its file is still read to the end.
    """
    try:
        with _open_lazily(source) as image:
            image.draft(None, (1, 1))
            _upright_rgb(image)
    except Exception as error:  # as in `open_image`
        return _reason(error)
    return None


def build_image_processor(
    image_size: int | tuple[int, int] = 224,
    image_mean: Sequence[float] = (0.5, 0.5, 0.5),
    image_std: Sequence[float] = (0.5, 0.5, 0.5),
) -> BaseImageProcessor:
    """Build the image processor of the official preprocessing, for every backbone.

    It runs on torchvision where that can be imported and on PIL elsewhere; once saved, it loads in both places.

    Args:
        image_size: To which every image is squashed (bilinear, no crop): one side, or (rows, cols), in pixels.
        image_mean: Subtracted from red, green and blue, after pixels were scaled to 0..1.
        image_std: By which red, green and blue are divided then.

    Raises:
        ValueError: a size is below one pixel, or the statistics are not three numbers.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and 0 < side <= MAX_SIDE for side in size):
        raise ValueError(f"image_size is {image_size!r}; it has to be a side or (rows, cols), 1 to {MAX_SIDE} pixels.")
    if len(image_mean) != 3 or len(image_std) != 3 or min(image_std) <= 0:
        raise ValueError(
            f"image_mean is {image_mean!r} and image_std {image_std!r}; each has to be three numbers, one a channel, "
            "with standard deviations above 0."
        )
    processor_class: type[BaseImageProcessor]
    if is_torchvision_available():
        from transformers import ViTImageProcessor as processor_class
    else:
        from transformers import ViTImageProcessorPil as processor_class
    return processor_class(
        do_resize=True,
        size={"height": size[0], "width": size[1]},
        resample=Image.Resampling.BILINEAR,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(image_mean),
        image_std=list(image_std),
    )


def build_detr_image_processor(shortest_edge: int = 800, longest_edge: int = 1333) -> BaseImageProcessor:
    """Build DETR's image processor, which keeps an image's shape; INTR uses it with these sizes.

    It runs on torchvision where that can be imported and on PIL elsewhere.

    Args:
        shortest_edge: To which an image's shorter side is resized, in pixels.
        longest_edge: Where the longer side would be more, it becomes this, and the shorter side less.
    """
    processor_class: type[BaseImageProcessor]
    if is_torchvision_available():
        from transformers import DetrImageProcessor as processor_class
    else:
        from transformers import DetrImageProcessorPil as processor_class
    return processor_class(size={"shortest_edge": shortest_edge, "longest_edge": longest_edge})
