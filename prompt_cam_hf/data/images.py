# SPDX-License-Identifier: MIT
"""Opening images, finding them in folders, and the image processor of the official preprocessing.

The official implementation squashes every image to a fixed size, with mean and standard deviation 0.5.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

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
    return Image.open(BytesIO(source) if isinstance(source, bytes) else source)


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


def open_image(source: ImageSource) -> Image.Image:
    """Open an image and decode it fully.

    The result equals that of transformers' own `load_image`, which pipelines use, so that a model sees in use what it
    saw in training: an alpha channel is dropped, not blended with a background. Only 16-bit images differ: they are
    scaled to 8 bits, where `load_image` clips them.

    Args:
        source: A path, the bytes of an encoded file, a PIL image, or a value of `datasets.Image(decode=False)`: a
            mapping with `path` and `bytes`.

    Returns:
        The image as 8-bit RGB, turned upright by its EXIF orientation.

    Raises:
        FileNotFoundError: the path does not exist.
        UnreadableImageError: the image is broken or truncated, or has 32-bit pixels.
    """
    try:
        with _open_lazily(source) as image:
            return _upright_rgb(image)
    except FileNotFoundError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every type there is on broken files
        name = image_name(source) or "given as bytes or pixels"
        raise UnreadableImageError(f"Cannot read the image {name}: {_reason(error)}") from error


def image_suffixes() -> set[str]:
    """List the endings of the formats that Pillow can open, in lower case and with the dot."""
    return {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def visible_files(folder: Path) -> list[Path]:
    """List the files in a folder at any depth, sorted, following links to folders.

    Hidden files and folders (`.name`) are passed over, and so are folders like `__MACOSX`.
    """
    found: list[Path] = []
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    return sorted(found)


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """List the images among files and in folders, in the order of `paths`, those of a folder sorted.

    Files are taken as they are; of a folder, `visible_files` with the ending of an image.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no images.
    """
    suffixes = image_suffixes()
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"There is no file or folder {path}.")
        if not path.is_dir():
            found.append(path)
            continue
        images = [file for file in visible_files(path) if file.suffix.lower() in suffixes and file.is_file()]
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
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size is {image_size!r}; it has to be a side or (rows, cols) in pixels, from 1 up.")
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
