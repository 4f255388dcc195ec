# SPDX-License-Identifier: MIT
"""A Space: the page of `prompt-cam app` on the Hub, for one model.

`write_space` writes its files, `publish_space` uploads them. A Space installs this package from PyPI, if it was
installed from there here; else it gets a copy of the package that runs here, which may be newer than any release.
"""

import html
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, SpaceCardData, constants
from packaging.requirements import Requirement

from prompt_cam_hf.data.images import find_images, open_image
from prompt_cam_hf.explanations.taxonomy_path import TAXONOMY_FILE
from prompt_cam_hf.hub import upload
from prompt_cam_hf.hub.card import TAGS, load_template
from prompt_cam_hf.hub.publish import Publication, load_folder
from prompt_cam_hf.loading import check_prompt_cam, load_model_type
from prompt_cam_hf.messages import one_line, printable

# More would make the page slow to start.
MAX_EXAMPLES = 100
# Pixels of the longer side.
EXAMPLE_SIZE = 1024

# What of a Space is replaced when it is written again.
_FOLDERS = ("examples", "model", "prompt_cam_hf")
_FILES = ("app.py", "README.md", "requirements.txt")
_FIRST_LINE = '"""Which traits decide? The page of a Prompt-CAM, written by `prompt-cam space`."""'
# Several folders of the repository, and one of what is installed.
_PACKAGES = ("prompt_cam_hf", "prompt_cam_hf.modeling", "prompt_cam_hf.training", "prompt_cam_hf.model_cards")

_APP = """{first_line}

import os

from prompt_cam_hf.app import build_app

os.chdir(os.path.dirname(os.path.abspath(__file__)))
demo = build_app({arguments})

if __name__ == "__main__":
    demo.launch()
"""


def write_space(
    model: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    model_id: str | None = None,
    license: str | None = None,
    title: str | None = None,
    examples: str | os.PathLike | None = None,
    examples_license: str | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write the files of a Space: app.py, requirements.txt, README.md and examples.

    `python app.py` shows the page on this machine; `publish_space` puts it on the Hub. Versions are those that are
    installed here, and names of this machine's folders are not written.

    Args:
        model: A folder that holds a trained model, of which the Space gets a copy; or its id on the Hub, from where
            the Space loads it.
        folder: Where the files go; it is made.
        model_id: With a folder as `model`: load the model from this repository, and copy nothing.
        license: The licence of the Space, by its identifier on the Hub. None: that of the card in the model's folder.
        title: The Space's name on the Hub. None: made from the model's id.
        examples: A folder of at most `MAX_EXAMPLES` images to choose from, as they are or in folders that name their
            classes. They are stored as JPEG of at most `EXAMPLE_SIZE` pixels a side, under numbers, and without what
            cameras add, such as the place.
        examples_license: Needed with `examples`: the licence under which these may be shown, in plain words.
        overwrite: Replace a Space that was written into the folder before; other files there stay.

    Returns:
        The size in bytes of each file that was written, by its name in the Space.

    Raises:
        FileExistsError: the folder holds files, and `overwrite` is not set, or they are not a Space's.
        FileNotFoundError: there is no such model or folder of examples.
        ValueError: a licence is missing, the model is damaged or no Prompt-CAM, or an example cannot be read.
        ModuleNotFoundError: Gradio is not installed, so that its version is not known.
        OSError: the Hub cannot be reached, or a file not be written.

    Example:
        >>> from prompt_cam_hf import write_space
        >>> sizes = write_space("my_model", "my_space", license="cc-by-4.0")  # {"README.md": 1012, "app.py": 313, ...}
    """
    folder = Path(folder)
    _check_free(folder, overwrite)
    if model_id is not None:
        upload.check_repo_id(model_id)
    elif not os.path.isdir(model):
        model_id = _check_on_hub(os.fspath(model))
    metadata = _license_of(model, license)
    if (examples is None) != (examples_license is None):
        raise ValueError(
            "Examples are shown under a licence of their own: give both the folder and the images' licence."
        )
    package = _this_package()
    requirements = _requirements(package)
    # Installers write this file where a package comes from a folder, a file or an address, and not from an index.
    has_copy = package.read_text("direct_url.json") is not None
    if not has_copy:
        requirements.insert(0, f"prompt_cam_hf=={package.version}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".space-") as temporary:
        staged = Path(temporary)
        arguments = f'"{model_id or "model"}"'
        if examples is not None:
            arguments += ', examples="examples"'
            _copy_examples(Path(examples), staged / "examples")
        if model_id is None:
            _copy_model(Path(model), staged / "model", metadata)
        (staged / "app.py").write_text(_APP.format(first_line=_FIRST_LINE, arguments=arguments), encoding="utf-8")
        (staged / "requirements.txt").write_text("\n".join(requirements) + "\n", encoding="utf-8")
        if has_copy:
            _copy_package(package, staged)
        title = title or ("Prompt-CAM: " + model_id.split("/")[-1] if model_id else "Prompt-CAM")
        card = _render_card(title, metadata, model_id, examples_license, package.version if has_copy else None)
        (staged / upload.CARD_FILE).write_text(card, encoding="utf-8")
        sizes = {name: path.stat().st_size for name, path in upload.list_files(staged).items()}
        _move(staged, folder)
    return sizes


def publish_space(
    model: str | os.PathLike,
    space_id: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload the page of a Prompt-CAM",
    **options: Any,
) -> Publication:
    """Put the page of `prompt-cam app` on the Hub as a Space, in one commit.

    Args:
        model: As for `write_space`; a folder is copied into the Space, unless `model_id` names the repository that it
            was published as.
        space_id: The Space, as owner/name; it is created if it does not exist.
        private: Make a new Space private, and refuse one that is public. A model that is private needs a private Space
            with a secret HF_TOKEN that may read it.
        dry_run: Do everything except the upload.
        token: A Hub token. None: the token of the machine's login.
        commit_message: The first line of the commit message.
        **options: The other options of `write_space`: model_id, license, title, examples, examples_license.

    Returns:
        What was uploaded, or would be.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: as in `write_space`, or the Hub refuses the files.
        PermissionError: there is no token, or it does not allow to write there.
        OSError: the Hub cannot be reached, or failed; nothing was committed then.

    Example:
        >>> from prompt_cam_hf import publish_space
        >>> publish_space("my_model", "me/garden-birds-traits", license="cc-by-4.0", dry_run=True).files
    """
    upload.check_repo_id(space_id)
    if not dry_run:
        token = upload.find_token(token)
    with TemporaryDirectory() as temporary:
        staged = Path(temporary, "space")
        sizes = write_space(model, staged, **options)
        commit = None
        if not dry_run:
            commit = upload.upload_repository(
                staged,
                space_id,
                private=private,
                token=token,
                commit_message=commit_message,
                repo_type="space",
                own_folders=_FOLDERS,
            )
    url = None if commit is None else commit.commit_url
    return Publication(space_id, constants.DEFAULT_REVISION, sizes, commit_url=url, repo_type="space")


def _check_free(folder: Path, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    app = folder / "app.py"
    if not app.is_file() or not app.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINE):
        raise FileExistsError(f"{folder} exists already and holds no Space of this package; choose a new folder.")
    if not overwrite:
        raise FileExistsError(f"{folder} holds a Space already; choose a new folder, or overwrite it (--overwrite).")


def _check_on_hub(name: str) -> str:
    """The id of a Prompt-CAM on the Hub."""
    if "/" not in name or not upload.is_hub_id(name):
        raise FileNotFoundError(
            f"There is no folder {name}, and a model on the Hub has a name such as me/garden-birds."
        )
    check_prompt_cam(load_model_type(name), name)
    return name


def _license_of(model: str | os.PathLike, license: str | None) -> dict[str, Any]:
    """The metadata that say the licence: the given one, or that of the card in the model's folder."""
    card = Path(model, upload.CARD_FILE)
    if license is None and card.is_file():
        data = ModelCard.load(card).data.to_dict()
        found = {key: value for key, value in data.items() if key.startswith("license")}
    else:
        found = {"license": license}
    if not found.get("license"):
        raise ValueError("The Space has no licence; give one by its identifier on the Hub, such as mit or cc-by-4.0.")
    upload.check_license(ModelCardData(**found))
    return found


def _copy_model(model: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    loaded, image_processor, has_backbone = load_folder(model)
    card = ModelCard(f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n\nThe model of this Space.\n")
    upload.save_repository(target, loaded, image_processor, card, include_backbone=has_backbone)
    if (model / TAXONOMY_FILE).is_file():
        shutil.copy(model / TAXONOMY_FILE, target)


def _copy_examples(examples: Path, target: Path) -> None:
    """Write images anew under numbers, in the folders that name their classes."""
    if not examples.is_dir():
        raise FileNotFoundError(f"There is no folder {examples} of examples.")
    images = find_images([examples])
    if len(images) > MAX_EXAMPLES:
        raise ValueError(f"A Space shows {MAX_EXAMPLES} examples at most, and {examples} holds {len(images)} images.")
    numbers: Counter[Path] = Counter()
    for path in images:
        place = path.parent.relative_to(examples)
        if not str(place).isprintable():
            raise ValueError(
                f"The folder of examples {printable(str(place))} has characters in its name that no page can show; "
                "rename it."
            )
        numbers[place] += 1
        image = open_image(path)
        image.thumbnail((EXAMPLE_SIZE, EXAMPLE_SIZE))
        image.info.clear()  # comments would be written, too
        (target / place).mkdir(parents=True, exist_ok=True)
        image.save(target / place / f"{numbers[place]:03}.jpg", quality=90)


def _this_package() -> Distribution:
    """What is installed here; a clone may also hold what a build left behind, which has no file WHEEL."""
    for found in distributions(name="prompt_cam_hf"):
        if found.read_text("WHEEL") is not None:
            return found
    raise ModuleNotFoundError("prompt_cam_hf is not installed here, so what it needs is not known: pip install .")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f'{name} is not installed here, so its version is not known: pip install "prompt_cam_hf[app]".'
        ) from error


def _requirements(package: Distribution) -> list[str]:
    """The lines of requirements.txt for what this package and its page need, in the versions that run here."""
    needed = map(Requirement, package.requires or ())
    names = {line.name for line in needed if line.marker is None or line.marker.evaluate({"extra": "app"})}
    # What follows a plus is a build of the same version, which an index has not.
    return [f"{name}=={_version(name).split('+')[0]}" for name in sorted(names | {"gradio"}, key=str.lower)]


def _copy_package(package: Distribution, target: Path) -> None:
    """Copy this package to where app.py imports it from."""
    for name in _PACKAGES:
        with as_file(files(name)) as source:
            place = target.joinpath(*name.split("."))
            shutil.copytree(source, place, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
    license = package.read_text("licenses/LICENSE")
    if license:
        (target / "prompt_cam_hf" / "LICENSE").write_text(license, encoding="utf-8")


def _render_card(
    title: str,
    license: Mapping[str, Any],
    model_id: str | None,
    examples_license: str | None,
    copied_version: str | None,
) -> str:
    """README.md, whose metadata tell the Hub how to run the Space."""
    metadata = SpaceCardData(
        title=one_line(title),
        sdk="gradio",
        sdk_version=_version("gradio"),
        python_version=".".join(map(str, sys.version_info[:2])),
        app_file="app.py",
        models=[model_id] if model_id else None,
        tags=TAGS,
        **license,
    )
    return load_template("prompt_cam_hf", "templates/space.md.j2").render(
        metadata=metadata.to_yaml(),
        title=html.escape(one_line(title)),
        model_id=model_id,
        examples_license=html.escape(one_line(examples_license)) if examples_license else None,
        copied_version=copied_version,
    )


def _move(staged: Path, folder: Path) -> None:
    """Put the files in place of those that an earlier Space left there."""
    folder.mkdir(exist_ok=True)
    for name in (*_FOLDERS, *_FILES):
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        if (staged / name).exists():
            (staged / name).replace(folder / name)
