# SPDX-License-Identifier: MIT
"""100 images: read as what they are, or called unreadable, by the check and by the reader alike, and in no time."""

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faults.conftest import SEED
from faults.processes import caught, is_sentence, run
from prompt_cam_hf.data.images import open_image, unreadable_reason

KIND = "images"
SECONDS = 20
MEMORY = 1 << 30
SIZE = (60, 40)
FORMATS = ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")


def pixels(mode: str = "RGB") -> Image.Image:
    """Noise, so that no part of a file can be left out."""
    random = np.random.default_rng(SEED)
    return Image.fromarray(random.integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8)).convert(mode)


def encoded(kind: str, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    pixels(mode).save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A grey image of one colour, in as few bytes as can be."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packer, row = zlib.compressobj(9), bytes(1 + width)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", packed), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def cut(kind: str, share: float) -> bytes:
    content = encoded(kind)
    return content[: int(len(content) * share)]


def scratched(kind: str, seed: int) -> bytes:
    drawn, content = random.Random(seed), bytearray(encoded(kind))
    for _ in range(8):
        content[drawn.randrange(12, len(content))] = drawn.randrange(256)
    return bytes(content)


def jpeg_as_large_as_can_be() -> bytes:
    content = encoded("JPEG")
    start = content.index(b"\xff\xc0") + 5
    return content[:start] + struct.pack(">HH", 65_000, 65_000) + content[start + 4 :]


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded("JPEG", exif=exif)


def sixteen_bit(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])).save(file, kind)
    return file.getvalue()


def floats() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full(SIZE[::-1], np.nan, np.float32)).save(file, "TIFF")
    return file.getvalue()


def animated() -> bytes:
    file = io.BytesIO()
    pixels().save(file, "GIF", save_all=True, append_images=[pixels("L").convert("RGB")] * 3)
    return file.getvalue()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_to_an_image(path: Path) -> None:
    (path.parent / "real").write_bytes(encoded("PNG"))
    path.symlink_to("real")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60 40\n%%EndComments\nshowpage\n%%EOF\n"
BOMB = zlib.compress(bytes(200 << 20), 9)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="60" height="40"><script>1</script></svg>'

# What is read has SIZE (upright); what is refused has None. Content, or what makes the file.
Content = bytes | Callable[[Path], None]
RIGHT: list[tuple[str, Content, tuple[int, int]]] = [
    *((f"{kind} in {mode}", encoded(kind, mode), SIZE)
      for kind, modes in {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1"), "JPEG": ("RGB", "L", "CMYK"),
                          "TIFF": ("RGB", "CMYK", "L", "1", "LAB"), "WEBP": ("RGB", "RGBA"), "GIF": ("P", "L"),
                          "BMP": ("RGB", "L")}.items() for mode in modes),
    ("16 bit PNG", sixteen_bit("PNG"), SIZE),
    ("16 bit TIFF", sixteen_bit("TIFF"), SIZE),
    ("animation", animated(), SIZE),
    ("lying on its side", with_orientation(6), SIZE[::-1]),
    ("an orientation that there is not", with_orientation(77), SIZE),
    ("a link", link_to_an_image, SIZE),
    ("one pixel", png_of(1, 1), (1, 1)),
    ("a line of 60,000 pixels", png_of(60_000, 1), (60_000, 1)),
]  # fmt: skip
REFUSED: list[tuple[str, Content]] = [
    *((f"{kind} cut to {share:.0%}", cut(kind, share))
      for kind in FORMATS for share in (0.05, 0.5, 0.95)),
    ("no bytes", b""),
    ("zeros", bytes(1000)),
    ("noise", random.Random(SEED).randbytes(5000)),
    ("PostScript", POSTSCRIPT),
    ("PDF", encoded("PDF")),
    ("SVG", SVG),
    ("a web page", b"<html><body>404 Not found</body></html>"),
    ("an archive", b"PK\x03\x04" + bytes(100)),
    ("floats that are no numbers", floats()),
    ("177 megapixels", png_of(13_300, 13_300)),
    ("4 gigapixels", jpeg_as_large_as_can_be()),
    ("text that unfolds a thousandfold", png_of(60, 40, (b"zTXt", b"Comment\0\0" + BOMB))),
    ("a width of nothing", png_of(0, 40)),
    ("a pipe", fifo),
    ("a socket", a_socket),
    ("a folder", Path.mkdir),
    ("a link to nowhere", link_to("nowhere.png")),
    ("a link to itself", link_to("x.png")),
    ("a link to endless zeros", link_to("/dev/zero")),
    ("a link to a terminal", link_to("/dev/tty")),
    ("a link to this process", link_to("/proc/self/mem")),
]  # fmt: skip
EITHER = [(f"{kind} scratched, {seed}", scratched(kind, SEED + seed)) for kind in FORMATS for seed in range(6)]
SUFFIXES = (".png", ".jpg")
SHORT = ("a pipe", "177 megapixels", "PostScript", "JPEG cut to 50%", "16 bit PNG")


def read(path: str) -> list[int]:
    image = open_image(path)
    assert image.mode == "RGB"
    return list(image.size)


def read_both(path: str) -> list:
    return [caught(read, path), caught(unreadable_reason, path)]


def params(rows: list[tuple]) -> list:
    return [pytest.param(*row, id=row[0], marks=[pytest.mark.short] if row[0] in SHORT else []) for row in rows]


@pytest.fixture(name="answers")
def fixture_answers(tmp_path):
    """What reader and check say of a file, without starting another program for it."""

    def answer(name: str, content: Content) -> tuple[dict, dict]:
        path = tmp_path / ("x.jpg" if name == "PostScript" else "x.png")
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        programs = tmp_path / "programs"
        programs.mkdir()
        (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\n")
        (programs / "gs").chmod(0o755)
        environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
        ran = run(read_both, str(path), seconds=SECONDS, memory=MEMORY, environment=environment)
        assert ran.code == 0, ran
        assert not (tmp_path / "executed").exists(), "Ghostscript was started"
        return ran.told

    return answer


def assert_refused(read: dict, check: dict) -> None:
    assert {"UnreadableImageError", "FileNotFoundError"} & set(read.get("kinds", ())), read
    assert is_sentence(read["message"]), read
    assert check.get("returned"), check


@pytest.mark.parametrize(("name", "content", "size"), params(RIGHT))
def test_an_image_is_read_as_what_it_is(answers, name, content, size):
    read, check = answers(name, content)
    assert read == {"returned": list(size)} and check == {"returned": None}


@pytest.mark.parametrize(("name", "content"), params(REFUSED))
def test_what_is_no_image_is_called_unreadable(answers, refused, name, content):
    read, check = answers(name, content)
    assert_refused(read, check)
    if "pixels" in name:
        assert "pixels" in read["message"] and "pixels" in check["returned"]
    refused()


@pytest.mark.parametrize(("name", "content"), params(EITHER))
def test_reader_and_check_agree(answers, refused, name, content):
    read, check = answers(name, content)
    if read == {"returned": list(SIZE)}:
        assert check == {"returned": None}
    else:
        assert_refused(read, check)
        refused()
