# SPDX-License-Identifier: MIT
"""`publish`: makes the folder of a trained model a repository on the Hub, with code and card.

The repository is made in a temporary folder and loaded from there first. Then it is uploaded in one commit.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData, constants
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.explanations.figures import plot_trait_maps
from prompt_cam_hf.explanations.taxonomy_path import TAXONOMY_FILE
from prompt_cam_hf.hub import upload
from prompt_cam_hf.hub.card import GalleryImage, read_card_facts, render_card
from prompt_cam_hf.loading import load_complete, load_image_processor
from prompt_cam_hf.modeling import (
    PromptCAMConfig,
    PromptCAMForImageClassification,
    PromptCAMImageClassificationPipeline,
)

# More photos or heads would not fit into a card.
MAX_GALLERY_IMAGES = 8
_GALLERY_HEADS = 4
_DOTS_PER_INCH = 120
_WIDGET_SIZE = (640, 640)  # at most, in pixels


@dataclass(frozen=True)
class Publication:
    """A repository that was uploaded, or would be.

    `files` has the size in bytes of each file; `prompts_only` says that a model's repository does not contain the
    backbone; `commit_url` is None in a dry run; `repo_type` is model or space.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    prompts_only: bool = False
    commit_url: str | None = None
    repo_type: str = "model"

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{constants.ENDPOINT}/{constants.REPO_TYPES_URL_PREFIXES.get(self.repo_type, '')}{self.repo_id}"


def publish(
    model: str | os.PathLike | PromptCAMForImageClassification,
    repo_id: str,
    *,
    image_processor: BaseImageProcessor | None = None,
    model_card: ModelCard | None = None,
    private: bool = False,
    prompts_only: bool = False,
    dry_run: bool = False,
    out: str | os.PathLike | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload Prompt-CAM",
    gallery: Sequence[str | os.PathLike] = (),
    **facts: Any,
) -> Publication:
    """Upload a trained model with its code, image processor and card, in one commit.

    The card is `model_card`, or the folder's README.md if there is one, unchanged. Otherwise it is written from what
    training and evaluation left in the folder and from `facts`, which must give the licence.

    Args:
        model: A folder that holds a model and its image processor, as training or `save_pretrained` left them; or a
            model in memory. Of several prompt sets, `model.only_prompts(name)` publishes one.
        repo_id: The repository, as owner/name; it is created if it does not exist.
        image_processor: With a model in memory. None: that of the folder or repository that it was loaded from.
        model_card: With a model in memory; it needs a licence. None: where there are no `facts`, the card of the
            folder or repository that the model was loaded from.
        private: Make a new repository private, and refuse one that is public.
        prompts_only: Leave out the backbone, which must be on the Hub. A folder without a backbone is always published
            in this way.
        dry_run: Do everything except the upload. Nothing is fetched from the Hub, except for the backbone if
            `prompts_only` is set.
        out: With `dry_run`: a new folder for what would be uploaded.
        token: A Hub token. None: the token of the machine's login.
        revision: The branch; it is created if it does not exist. None: main.
        commit_message: The first line of the commit message.
        gallery: At most `MAX_GALLERY_IMAGES` photos to show in the card with their trait maps; `gallery_license` is
            then needed, too.
        **facts: What is not recorded in the folder: fields of `CardFacts` such as license, dataset_name, dataset_url,
            dataset_license and gallery_license; and evaluation_folder, the folder that `evaluate` wrote.

    Returns:
        What was uploaded, or would be.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: card, licence, class names, weights or image processor are missing, a recorded file is damaged, an
            argument is for a model in memory only, or the Hub refuses the files.
        PermissionError: there is no token, or it does not allow to write there.
        OSError: the Hub cannot be reached, or failed; nothing was committed then.

    Example:
        >>> from prompt_cam_hf import publish
        >>> publication = publish("my_model", "me/garden-birds", license="cc-by-4.0", dry_run=True)
        >>> publication.files  # {"README.md": 3012, ...}: size in bytes
    """
    upload.check_repo_id(repo_id)
    if not dry_run:
        token = upload.find_token(token)
        if out is not None:
            raise ValueError(f"Only a dry run leaves what it made in a folder; give dry_run=True with {out}.")
    elif out is not None and Path(out).exists():
        raise FileExistsError(f"{out} exists already; choose a new folder.")
    with TemporaryDirectory() as temporary:
        staged = Path(temporary, "repository")
        if isinstance(model, str | os.PathLike):
            if image_processor is not None or model_card is not None:
                raise ValueError(f"A folder is published as it is; put the image processor and the card into {model}.")
            folder = Path(model)
        else:
            folder = Path(temporary, "model")
            if model_card is None and not facts:
                model_card = upload.card_of(model)
            _save_model(folder, model, image_processor or upload.image_processor_of(model), model_card)
        prompts_only = _stage(staged, folder, repo_id, prompts_only, gallery, facts)
        sizes = {name: path.stat().st_size for name, path in upload.list_files(staged).items()}
        commit = None
        if not dry_run:
            commit = upload.upload_repository(
                staged, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
            )
        elif out is not None:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(staged, out)
    url = None if commit is None else commit.commit_url
    return Publication(repo_id, revision or constants.DEFAULT_REVISION, sizes, prompts_only, url)


def _save_model(
    folder: Path,
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    model_card: ModelCard | None,
) -> None:
    """Write a model in memory down, to be published as any folder is."""
    upload.check_class_names(model)
    if model_card is not None:
        upload.check_license(model_card.data)
    model.save_pretrained(folder)
    image_processor.save_pretrained(folder)
    if model_card is not None:
        model_card.save(folder / upload.CARD_FILE)


def _stage(
    staged: Path,
    folder: Path,
    repo_id: str,
    prompts_only: bool,
    gallery: Sequence[str | os.PathLike],
    facts: dict[str, Any],
) -> bool:
    """Write the repository, check that it loads, and say whether it is without a backbone."""
    has_card = (folder / upload.CARD_FILE).is_file()
    if not has_card:  # before the model is loaded, which takes long
        upload.check_license(
            ModelCardData(**{key: value for key, value in facts.items() if key.startswith("license")})
        )
    model, image_processor, has_backbone = load_folder(folder)
    prompts_only = prompts_only or not has_backbone
    if has_card:
        card = _own_card(folder, staged, [*gallery, *facts])
    else:
        images = make_gallery(model, image_processor, gallery, staged)
        card = render_card(
            read_card_facts(folder, repo_id, model, image_processor, prompts_only, gallery=images, **facts)
        )
    upload.save_repository(staged, model, image_processor, card, include_backbone=not prompts_only)
    if (folder / TAXONOMY_FILE).is_file():
        shutil.copy(folder / TAXONOMY_FILE, staged)
    _check_loads(staged, model)
    return prompts_only


def make_gallery(
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    photos: Sequence[str | os.PathLike],
    folder: Path,
) -> list[GalleryImage]:
    """Draw photos beside the trait maps of their predicted classes, for a card, into `folder`/trait_maps.

    Each photo is put beside its figure, for the Hub's widget. Where a photo lies in a folder that is called like
    another class, that is named as the true one.

    Raises:
        ValueError: there are more than `MAX_GALLERY_IMAGES` photos, or one cannot be read.
        FileNotFoundError: there is no such photo.
    """
    if len(photos) > MAX_GALLERY_IMAGES:
        raise ValueError(f"A card shows {MAX_GALLERY_IMAGES} photos at most; {len(photos)} were given.")
    pipe = PromptCAMImageClassificationPipeline(
        model=model, image_processor=image_processor, task="image-classification"
    )
    images = []
    for number, photo in enumerate(photos, 1):
        image = open_image(photo)
        answer = pipe(image, trait_maps=True, top_k=1)[0]
        read, folder_name = answer["label"], Path(photo).absolute().parent.name
        is_misread = folder_name != read and folder_name in model.config.label2id
        title = f"{read}, in truth {folder_name}" if is_misread else read
        figure = plot_trait_maps(image, answer["trait_maps"], answer["head_order"][:_GALLERY_HEADS], title=title)
        file = f"{upload.GALLERY_FOLDER}/{number}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / file, dpi=_DOTS_PER_INCH)
        small = f"{upload.GALLERY_FOLDER}/{number}.jpg"
        image.thumbnail(_WIDGET_SIZE)
        image.info.clear()  # where and when it was taken stays at home
        image.save(folder / small)
        images.append(GalleryImage(file, f"{title}, score {answer['score']:.0%}", small))
    return images


def load_folder(folder: Path) -> tuple[PromptCAMForImageClassification, BaseImageProcessor, bool]:
    """The model in a folder, its image processor, and whether the folder has the backbone's weights.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: the model is damaged, or has no image processor.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"There is no model in {folder}: it has no config.json.")
    config = PromptCAMConfig.from_pretrained(folder)
    model = load_complete(PromptCAMForImageClassification, folder)
    try:
        image_processor = load_image_processor(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} holds no image processor; save the one that the model was trained with there: "
            "image_processor.save_pretrained(folder)."
        ) from error
    return model, image_processor, config.backbone_in_checkpoint


def _own_card(folder: Path, staged: Path, given: Sequence[Any]) -> ModelCard:
    """The README.md in the folder of the model; the images that belong to it are copied."""
    path = folder / upload.CARD_FILE
    if given:
        raise ValueError(
            f"{path} is the model's card and is published as it is; write into it what you gave ({given[0]} ...), or "
            "remove it, and a new card is written."
        )
    card = ModelCard.load(path)
    try:
        upload.check_license(card.data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if (folder / upload.GALLERY_FOLDER).is_dir():
        shutil.copytree(folder / upload.GALLERY_FOLDER, staged / upload.GALLERY_FOLDER)
    return card


def _check_loads(staged: Path, model: PromptCAMForImageClassification) -> None:
    """Load what would be uploaded, as its users will, and compare the weights."""
    loaded, expected = PromptCAMForImageClassification.from_pretrained(staged).state_dict(), model.state_dict()
    if loaded.keys() != expected.keys() or any(not torch.equal(loaded[key], expected[key]) for key in expected):
        raise ValueError("What would be uploaded does not load as the same model; nothing was published.")
