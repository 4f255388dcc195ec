# SPDX-License-Identifier: MIT
"""What belongs in a Hub repository, how it gets there in one commit, and what is said when the Hub fails."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import (
    CardData,
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.utils import cached_file

from prompt_cam_hf.loading import load_image_processor
from prompt_cam_hf.modeling.checkpoint_prompt_cam import NOT_ACCEPTED, find_cause, tell_reason

CARD_FILE = "README.md"
# Images of the card.
GALLERY_FOLDER = "trait_maps"

_TRY_AGAIN = "All files go into one commit, so nothing is there by halves: try again"


def is_hub_id(name: str | os.PathLike | None) -> bool:
    """Whether a name can be that of a Hub repository, and is not that of a folder here."""
    if not isinstance(name, str) or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_repo_id(repo_id: str) -> None:
    """Refuse, with a ValueError, what is not the full name of a repository, owner/name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a Hub repository: {error}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} does not say whose repository it is; give it as owner/{repo_id}.")


def check_license(data: CardData) -> None:
    """Refuse metadata without a licence, with a ValueError: what others may do with a model is never guessed."""
    license = data.get("license")
    if not isinstance(license, str) or not license:
        raise ValueError(
            "The model card has no licence; give the model's licence by its identifier on the Hub, such as mit or "
            "cc-by-4.0."
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise ValueError(
            f"{license!r} is not the identifier of a licence; the Hub's are of the form mit, apache-2.0, cc-by-4.0 "
            "(https://huggingface.co/docs/hub/repositories-licenses)."
        )
    if license == "other" and not (data.get("license_name") and data.get("license_link")):
        raise ValueError('The licence "other" needs license_name and license_link.')


def check_class_names(model: PreTrainedModel) -> None:
    """Refuse, with a ValueError, a model whose class names are transformers' placeholders."""
    names = model.config.id2label or {}
    if all(name == f"LABEL_{index}" for index, name in names.items()):
        raise ValueError(
            f"The model's {len(names)} classes have no names (LABEL_0, LABEL_1 ...); set config.id2label and "
            "config.label2id, or give id2label where the model is made."
        )


def save_repository(
    folder: Path,
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    card: ModelCard,
    include_backbone: bool = True,
) -> None:
    """Write a Hub repository's files into a new folder: weights, config, the model's code, image processor and card.

    Folders of this machine that the config names are not written.

    Raises:
        ValueError: the card has no licence, the classes have no names, or the backbone is left out and cannot be
            fetched from the Hub.
    """
    check_license(card.data)
    check_class_names(model)
    name = model.config.backbone_name_or_path
    if not include_backbone and name and not is_hub_id(name):
        raise ValueError(
            f"Prompts alone are of use only with a backbone that others can fetch, and {name} is a folder here; "
            "publish the backbone too, or train on one from the Hub."
        )
    model.save_pretrained(folder, include_backbone=include_backbone)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["backbone_config"].pop("_name_or_path", None)
    if not is_hub_id(name):
        config["backbone_name_or_path"] = None
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    image_processor.save_pretrained(folder)
    card.save(folder / CARD_FILE)


def image_processor_of(model: PreTrainedModel) -> BaseImageProcessor:
    """The image processor in the folder or repository that a model was loaded from; a ValueError without one."""
    try:
        return load_image_processor(model.name_or_path or os.devnull)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The image processor is missing: {model.name_or_path or 'a model made in memory'} has none. Give it as "
            "image_processor=..."
        ) from error


def card_of(model: PreTrainedModel) -> ModelCard:
    """The model card in the folder or repository that a model was loaded from; a ValueError without one."""
    path = None
    if model.name_or_path:
        path = cached_file(
            model.name_or_path,
            CARD_FILE,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if path is None:
        raise ValueError(
            f"The model card is missing: {model.name_or_path or 'a model made in memory'} has none. Give it as "
            "model_card=..., a huggingface_hub.ModelCard with a licence."
        )
    return ModelCard.load(Path(path))


def find_token(token: str | bool | None) -> str:
    """The token to write to the Hub with: the given one, or else that of the machine's login.

    Raises:
        PermissionError: there is none.
        ValueError: it cannot be a token. The message does not show it.
    """
    found = token if isinstance(token, str) else get_token() if token is not False else None
    if not found:
        raise PermissionError("There is no Hub token: log in with `hf auth login`, or set HF_TOKEN.")
    # The HTTP client would refuse it too, and print it.
    if not re.fullmatch(r"[!-~]+", found):
        raise ValueError("The Hub token holds spaces, line breaks or other characters that no token has.")
    return found


def list_files(folder: Path) -> dict[str, Path]:
    """All files in a folder, by their name in the repository, in sorted order."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def upload_repository(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload Prompt-CAM",
    repo_type: Literal["model", "space"] = "model",
    own_folders: Sequence[str] = (GALLERY_FOLDER,),
) -> CommitInfo:
    """Make all files of a folder one commit of a repository on the Hub; the repository is made if need be.

    The other arguments are those of `publish`.

    Args:
        repo_type: A Space runs on Gradio.
        own_folders: What an earlier upload put into these folders and this one does not is removed.

    Raises:
        PermissionError: there is no token, or it has not the right to write there.
        ConnectionError: the Hub cannot be reached.
        ValueError: the Hub refuses the files, or the repository is public against expectation.
        OSError: the Hub failed on the way; there is no commit then.
    """
    check_repo_id(repo_id)
    api = HfApi(token=find_token(token), library_name="prompt_cam_hf")
    with explained_upload_errors(repo_id):
        sdk = "gradio" if repo_type == "space" else None
        api.create_repo(repo_id, repo_type=repo_type, space_sdk=sdk, private=private, exist_ok=True)
        if private and api.repo_info(repo_id, repo_type=repo_type).private is False:
            raise ValueError(f"{repo_id} is there already and is public; make it private in its settings first.")
        if revision is not None:
            api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
        files = list_files(folder)
        there = api.list_repo_files(repo_id, repo_type=repo_type, revision=revision)
        old = [name for name in there if name.split("/")[0] in own_folders and name not in files]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in old),
            ],
            repo_type=repo_type,
            commit_message=commit_message,
            revision=revision,
        )


@contextmanager
def explained_upload_errors(repo_id: str) -> Iterator[None]:
    """Turn what a Hub client raises in an upload into one sentence, without addresses, which may hold signatures."""
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        explanation = _explain_upload(error, repo_id)
        if explanation is None:
            raise
        raise explanation from error


def _explain_upload(error: BaseException, repo_id: str) -> Exception | None:
    answer = find_cause(error, HfHubHTTPError)
    if answer is not None:
        return _explain_status(answer.response.status_code, answer.server_message, repo_id)
    if isinstance(error, OfflineModeIsEnabled):
        return ConnectionError("Offline mode is on, so nothing can be uploaded: unset HF_HUB_OFFLINE.")
    if isinstance(error, HTTPError):
        return ConnectionError(
            f"The Hub at {constants.ENDPOINT} cannot be reached ({tell_reason(error)}). {_TRY_AGAIN}."
        )
    if isinstance(error, RuntimeError):
        return OSError(f"The upload to {repo_id} broke off ({tell_reason(error)}). {_TRY_AGAIN}.")
    if isinstance(error, ValueError):
        return ValueError(" ".join(str(error).split()))
    return None


def _explain_status(status: int, message: str | None, repo_id: str) -> Exception:
    if status == 401:
        return PermissionError(NOT_ACCEPTED)
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo_id}: choose a repository of your own, or a token with that right."
        )
    if status == 404:
        return FileNotFoundError(f"The Hub has no repository or branch of the name {repo_id} that the token may see.")
    if 400 <= status < 500:
        reason = " ".join((message or f"status {status}").split())
        return ValueError(f"The Hub refused the upload to {repo_id}: {reason}.")
    return OSError(f"The upload to {repo_id} broke off, for the Hub failed (status {status}). {_TRY_AGAIN}.")
