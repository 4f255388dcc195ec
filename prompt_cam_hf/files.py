# SPDX-License-Identifier: MIT
"""Writing files that are complete whenever they exist, and folders that one process at a time writes to."""

import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

# In a folder that a process writes to. It may be left behind by a kill, and then holds nobody up.
LOCK_FILE = ".lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from writing to it until the end of the block.

    The system lets go of the lock when this process ends, however it does. On Windows there is no lock.

    A new folder in which nothing was written is removed again.

    Raises:
        FileExistsError: another process writes there; the message says which.
        OSError: the folder cannot be made.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    from fcntl import LOCK_EX, LOCK_NB, lockf

    path = folder / LOCK_FILE
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            try:
                # Not flock, which processes that read images would inherit.
                lockf(file, LOCK_EX | LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise FileExistsError(
                    f"{folder} is being written to by {_read_holder(path)}; wait for it to end, or choose another "
                    "folder."
                ) from error
            except OSError as error:  # a file system without locks
                logger.warning("%s cannot be locked (%s); start no second run there.", folder, error)
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue  # removed by a process that has just ended
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                if is_new:
                    with suppress(OSError):  # it holds something
                        folder.rmdir()
            return


def _read_holder(lock: Path) -> str:
    """What the process that has just taken the lock has written into it, or writes in the next moment."""
    for _ in range(20):
        with suppress(FileNotFoundError):  # it has ended
            if holder := lock.read_text(encoding="utf-8"):
                return holder
        time.sleep(0.05)
    return "another process"


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
