# SPDX-License-Identifier: MIT
"""Carrying out a plan: images are linked or copied into an image folder that any interruption leaves whole.

An image appears in its place complete or not at all, so that the same command goes on after a kill. What the plan
does not name is never touched.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pandas as pd
from datasets.utils import tqdm

from prompt_cam_hf.data.prepare.archives import Source, SourceFile
from prompt_cam_hf.data.prepare.plan import Plan, PlannedImage
from prompt_cam_hf.data.sources import some_of
from prompt_cam_hf.files import only_writer

# Written last: it lists every image, and says that the folder is complete.
MANIFEST = "manifest.csv"
_COLUMNS = ("split", "class", "file", "bytes", "source")


def write_image_folder(plan: Plan, source: Source, destination: Path) -> None:
    """Put the images of a plan into a folder: `SPLIT/CLASS/IMAGE`, and the list `manifest.csv`.

    Extracted images are hard-linked, and copied where the file system cannot link; those in archives are copied. An
    image that is there already, with the right size, stays as it is.

    Raises:
        FileExistsError: `destination` holds something that the plan does not, or another file in an image's place, or
            another process writes there.
        OSError: there is too little space, or writing failed.
        ValueError: `destination` and the source lie in one another, or an archive is damaged.
    """
    _check_destination(plan, source, destination)
    with only_writer(destination):
        missing = [image for image in plan.images if not _is_there(image, destination)]
        extracted = next((image.source for image in missing if not image.source.in_archive), None)
        can_link = extracted is not None and _can_link(extracted, destination)
        to_copy = [image for image in missing if image.source.in_archive or not can_link]
        _check_space(sum(image.source.size for image in to_copy), destination)
        with tqdm(total=len(missing), desc=f"Preparing {plan.facts.title}", unit=" images") as progress:
            for image in sorted(missing, key=lambda image: image.source.position):
                _place(image.source, destination / image.path, can_link)
                progress.update()
        _write_manifest(plan, destination)


def _check_destination(plan: Plan, source: Source, destination: Path) -> None:
    inner, outer = destination.resolve(), source.path.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"{destination} and {source.path} lie in one another; choose a folder apart from the source.")
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination} is a file; choose a new folder.")
    planned = {str(image.path) for image in plan.images}
    if _is_our_manifest(destination / MANIFEST):
        planned.add(MANIFEST)
    foreign = []
    for parent, subfolders, names in os.walk(destination):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        within = Path(parent).relative_to(destination)
        foreign += [path for name in sorted(names) if (path := (within / name).as_posix()) not in planned]
    # Hidden files are our own unfinished copies, and what file managers leave behind.
    if foreign := [path for path in foreign if not Path(path).name.startswith(".")]:
        raise FileExistsError(
            f"{destination} holds files that are not part of {plan.facts.title} as asked for: {some_of(foreign)}; "
            "choose a new folder."
        )


def _is_our_manifest(path: Path) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline().strip() == ",".join(_COLUMNS).encode()


def _is_there(image: PlannedImage, destination: Path) -> bool:
    path = destination / image.path
    if not path.exists():
        return False
    if path.is_file() and (size := path.stat().st_size) == image.source.size:
        return True
    found = f"has {size} bytes" if path.is_file() else "is not a file"
    raise FileExistsError(
        f"{path} is another file than {image.source}: it {found}, and not {image.source.size}; remove it, "
        "or choose a new folder."
    )


def _can_link(file: SourceFile, folder: Path) -> bool:
    """Try whether images of the source can be hard-linked here."""
    trial = folder / ".link.part"
    trial.unlink(missing_ok=True)
    try:
        os.link(file.location.resolve(), trial)
    except OSError:
        return False
    trial.unlink()
    return True


def _check_space(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free, and the images take {needed / 1e9:.2f} GB; free some space."
        )


def _place(file: SourceFile, target: Path, can_link: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if can_link and not file.in_archive:
        # Fails for single files too: on many systems one file can have only so many links.
        with suppress(OSError):
            os.link(file.location.resolve(), target)
            return
    _write(target, file.read())


def _write(path: Path, content: bytes) -> None:
    """Write all of a file or nothing, by a name that is always the same: what a killed run left is replaced."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_manifest(plan: Plan, destination: Path) -> None:
    rows = [(i.split, i.class_folder, i.path, i.source.size, i.source.path) for i in plan.images]
    _write(destination / MANIFEST, pd.DataFrame(rows, columns=_COLUMNS).to_csv(index=False).encode())
