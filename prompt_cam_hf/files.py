# SPDX-License-Identifier: MIT
"""Writing files that are complete whenever they exist."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give another name in the same folder to write to, and rename that file to `path` at the end of the block.

    If the block raises an exception, what it wrote is removed and `path` stays as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never there incomplete, whenever the program is stopped."""
    with replacing(path) as partial:
        partial.write_bytes(content)
