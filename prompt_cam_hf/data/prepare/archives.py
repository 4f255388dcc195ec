# SPDX-License-Identifier: MIT
"""The files of a downloaded data set, extracted or still in its archives: listed, found by path, and read.

Nothing is ever extracted to the path that an archive names: files are listed by these paths, and read as streams.
"""

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".zip")

# What the largest list of a data set stays far below, and an image too.
_MAX_FILE_SIZE = 1 << 29

# What the standard library raises on an archive that is cut off, altered or locked with a password.
_DAMAGE = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, RuntimeError)


@dataclass(frozen=True)
class SourceFile:
    """One file of a data set: its path within the folder or archive, with slashes, and its size in bytes.

    `location` is the file itself, or the archive that holds it; `position` is the archive's number and the place in
    it:
    reading in this order passes through each archive once.
    """

    path: str
    size: int
    location: Path
    in_archive: bool
    position: tuple[int, int]
    content: Callable[[], bytes]

    @property
    def folder(self) -> str:
        """The folder of the file within the source; empty at the top."""
        return str(PurePosixPath(self.path).parent).removeprefix(".")

    def __str__(self) -> str:
        return f"{self.path} in {self.location}" if self.in_archive else str(self.location)

    def read(self) -> bytes:
        """Read all of it; raises ValueError where the archive is damaged, or the content has not `size` bytes."""
        if self.size > _MAX_FILE_SIZE:
            raise _too_large(self, self.size)
        with _damage_named(self):
            content = self.content()
        if len(content) != self.size:
            raise ValueError(f"{self} gave {len(content)} bytes instead of {self.size}; download the data set again.")
        return content


@contextmanager
def _damage_named(what: object) -> Iterator[None]:
    """Turn what a damaged archive raises into one sentence."""
    try:
        yield
    except _DAMAGE as error:
        reason = str(error).split("\n")[0].rstrip(":")  # tarfile goes on with a line for each format
        raise ValueError(f"Cannot read {what} ({reason}): the archive is damaged, download it again.") from error


class Source:
    """A downloaded data set: a folder (with archives in it, or extracted), or one archive. A context manager.

    Extracted files are preferred: archives are opened only where something is missing without them. Hidden files and
    what macOS adds to archives are passed over.

    Args:
        path: The folder or archive.
        list_names: Names of files that are read while an archive is indexed, and kept in memory.

    Raises:
        FileNotFoundError: there is no such folder or archive.
        ValueError: it is a file of another kind.
    """

    def __init__(self, path: str | os.PathLike, list_names: Collection[str] = ()):
        self.path = Path(path).expanduser()
        self._list_names = frozenset(list_names)
        self._by_path: dict[str, list[SourceFile]] = {}
        self._by_name: dict[str, list[SourceFile]] = {}
        self._stack = ExitStack()
        self._archives: list[Path] = []
        if self.path.is_dir():
            self._index_folder()
        elif not self.path.exists():
            raise FileNotFoundError(f"There is no folder or archive {self.path}.")
        elif _is_archive(self.path.name):
            self._archives = [self.path]
        else:
            raise ValueError(f"{self.path} is neither a folder nor an archive ({', '.join(ARCHIVE_SUFFIXES)}).")

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def with_suffixes(self, suffixes: Collection[str]) -> list[SourceFile]:
        """List the files with these endings, sorted by path; archives are opened where there are none without."""
        found = self._with_suffixes(suffixes)
        if not found:
            self._index_archives()
            found = self._with_suffixes(suffixes)
        return sorted(found, key=lambda file: file.path)

    def find(self, path: str, folder: str | None = None) -> SourceFile | None:
        """Find a file by the end of its path, below whatever other folders, or exactly below `folder`.

        Of several, an extracted one goes before those in archives, and then the one the fewest folders deep. The
        answer is None where there is none; two that are equally deep are a ValueError, and so is a damaged archive.
        """
        found = self._find(path, folder)
        if not found and self._archives:
            self._index_archives()
            found = self._find(path, folder)
        ranks = [(file.in_archive, file.path.count("/")) for file in found]
        first = [file for file, rank in zip(found, ranks, strict=True) if rank == min(ranks)]
        if len(first) > 1:
            raise ValueError(f"{self.path} holds {path} twice: {first[0]}, and {first[1]}; keep one copy.")
        return first[0] if first else None

    def require(self, path: str, folder: str | None = None, hint: str = "") -> SourceFile:
        """Find a file that has to be there, as `find` does.

        Raises:
            FileNotFoundError: there is none; the message ends in `hint`, which says where to get it.
            ValueError: as in `find`.
        """
        if (file := self.find(path, folder)) is None:
            inside = f" beside the other lists in {folder}" if folder else ""
            raise FileNotFoundError(f"{self.path} holds no {path}{inside}{hint and '; ' + hint}.")
        return file

    def _find(self, path: str, folder: str | None) -> list[SourceFile]:
        if folder is not None:
            return self._by_path.get(str(PurePosixPath(folder, path)), [])
        named = self._by_name.get(PurePosixPath(path).name, [])
        return [file for file in named if f"/{file.path}".endswith(f"/{path}")]

    def _with_suffixes(self, suffixes: Collection[str]) -> list[SourceFile]:
        everything = (file for files in self._by_path.values() for file in files)
        return [file for file in everything if PurePosixPath(file.path).suffix.lower() in suffixes]

    def _add(self, file: SourceFile) -> None:
        parts = PurePosixPath(file.path).parts
        if not any(part.startswith(".") or part == "__MACOSX" for part in parts):
            self._by_path.setdefault(file.path, []).append(file)
            self._by_name.setdefault(parts[-1], []).append(file)

    def _index_folder(self) -> None:
        number = 0
        for parent, subfolders, names in os.walk(self.path, followlinks=True):
            subfolders.sort()
            depth = len(Path(parent).relative_to(self.path).parts)
            for name in sorted(names):
                location = Path(parent, name)
                if not location.is_file():  # a broken link
                    continue
                if _is_archive(name) and depth < 2:
                    self._archives.append(location)
                    continue
                path = location.relative_to(self.path).as_posix()
                size = location.stat().st_size
                self._add(SourceFile(path, size, location, False, (0, number), location.read_bytes))
                number += 1

    def _index_archives(self) -> None:
        """Index all archives that are not open yet: one pass through each."""
        archives, self._archives = self._archives, []
        for number, archive in enumerate(archives, 1):
            with _damage_named(archive):
                if archive.name.lower().endswith(".zip"):
                    self._index_zip(archive, number)
                else:
                    self._index_tar(archive, number)

    def _index_zip(self, archive: Path, number: int) -> None:
        opened = self._stack.enter_context(zipfile.ZipFile(archive))
        for place, entry in enumerate(opened.infolist()):
            if not entry.is_dir():
                path = _safe_path(entry.filename, archive)
                content = partial(opened.read, entry)
                self._add(SourceFile(path, entry.file_size, archive, True, (number, place), content))

    def _index_tar(self, archive: Path, number: int) -> None:
        opened = self._stack.enter_context(tarfile.TarFile.open(archive))
        for place, entry in enumerate(opened):
            path = _safe_path(entry.name, archive)
            if not entry.isfile():
                continue
            content = partial(_read_tar_entry, opened, entry)
            if PurePosixPath(path).name in self._list_names:
                if entry.size > _MAX_FILE_SIZE:
                    raise _too_large(f"{path} in {archive}", entry.size)
                # Going back to it later would unpack the archive from its beginning.
                content = partial(bytes, content())
            self._add(SourceFile(path, entry.size, archive, True, (number, place), content))


def _too_large(what: object, size: int) -> ValueError:
    return ValueError(
        f"{what} has {size:,} bytes, and at most {_MAX_FILE_SIZE:,} are read; it is no file of the data set."
    )


def _is_archive(name: str) -> bool:
    return name.lower().endswith(ARCHIVE_SUFFIXES) and not name.startswith(".")


def _read_tar_entry(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(entry)
    if file is None:
        raise tarfile.ReadError(f"{entry.name} is not a regular file")
    with file:
        return file.read()


def _safe_path(name: str, archive: Path) -> str:
    """Normalise the path of an archive's file; raises `ValueError` for one that leads out of the archive."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise ValueError(
            f"{archive} holds a file named {name!r}, which leads out of the folder; do not use this archive."
        )
    return str(path)
