# SPDX-License-Identifier: MIT
"""`prompt-cam publish`: how do others get the model?"""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from prompt_cam_hf.cli.common import say
from prompt_cam_hf.cli.space import ExamplesLicenseOption, ExamplesOption

if TYPE_CHECKING:
    from prompt_cam_hf.hub.publish import Publication


def publish(
    folder: Annotated[Path, typer.Argument(help="Folder of a trained Prompt-CAM.")],
    repo: Annotated[str, typer.Argument(help="The Hub repository, as owner/name; it is made if need be.")],
    license: Annotated[str | None, typer.Option(help="Licence of the model, such as mit or cc-by-4.0.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Name of what the model was trained on.")] = None,
    dataset_url: Annotated[str | None, typer.Option(help="Address of that data set.")] = None,
    dataset_license: Annotated[str | None, typer.Option(help="Licence of that data set.")] = None,
    evaluation: Annotated[Path | None, typer.Option(help="Folder that `prompt-cam evaluate` wrote.")] = None,
    gallery: Annotated[list[Path] | None, typer.Option(help="Photo to show with its trait maps; repeatable.")] = None,
    gallery_license: Annotated[str | None, typer.Option(help="Licence that allows to show these photos.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    prompts_only: Annotated[
        bool, typer.Option("--prompts-only", help="Leave out the backbone, if it is on the Hub.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; main by default.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --dry-run: leave it in this new folder.")] = None,
    space: Annotated[
        str | None, typer.Option(help="Also make a Space of this name, owner/name: the page of `prompt-cam app`.")
    ] = None,
    examples: ExamplesOption = None,
    examples_license: ExamplesLicenseOption = None,
) -> None:
    """Upload a trained model to the Hub.

    One commit holds the weights, code, image processor and card. The card is README.md in the folder, if there is one.
    Otherwise it is written from what training and evaluation recorded there, and from these options. Log in with
    `hf auth login` first, or set HF_TOKEN.
    """
    from prompt_cam_hf.hub.publish import publish as publish_folder
    from prompt_cam_hf.hub.space import publish_space

    if space is None and (examples or examples_license):
        raise ValueError("Examples are for a Space: give its name as --space owner/name.")
    if space is not None and revision is not None:
        raise ValueError("A Space shows the model of the branch main: give either --space or --revision.")

    def publish_page(dry_run: bool) -> "Publication":
        return publish_space(
            folder,
            str(space),
            model_id=repo,
            license=license,
            examples=examples,
            examples_license=examples_license,
            private=private,
            dry_run=dry_run,
        )

    # Before the model is uploaded, for what is wrong with the Space leaves nothing of either on the Hub.
    page = publish_page(dry_run=True) if space else None
    facts: dict[str, Any] = {
        "license": license,
        "dataset_name": dataset,
        "dataset_url": dataset_url,
        "dataset_license": dataset_license,
        "gallery_license": gallery_license,
        "evaluation_folder": evaluation,
    }
    publication = publish_folder(
        folder,
        repo,
        private=private,
        prompts_only=prompts_only,
        revision=revision,
        dry_run=dry_run,
        out=out,
        gallery=gallery or [],
        **{name: value for name, value in facts.items() if value is not None},
    )
    _print_files(publication)
    if page:
        _print_files(page)
    if publication.commit_url:
        print(publication.commit_url)
        if page:
            print(publish_page(dry_run=False).commit_url)
            if private:
                say(f"Give the Space a secret HF_TOKEN that may read {repo}: {page.url}/settings")
    else:
        kind = "private" if private else "public"
        say(
            f"Nothing was uploaded. It would be one commit to {publication.url}, branch {publication.revision}; the "
            f"repository is {kind}, if it is new."
        )
        if page:
            say(f"The Space would be one commit to {page.url}.")
        if out:
            say(f"All of the model is in {out}.")


def _print_files(publication: "Publication") -> None:
    table = Table("file", caption="The backbone is fetched from where it is." if publication.prompts_only else None)
    table.add_column("size", justify="right")
    for name, group in groupby(publication.files.items(), key=lambda file: file[0].partition("/")[0]):
        files = dict(group)
        label = name if name in files else f"{name}/ ({len(files)} {'file' if len(files) == 1 else 'files'})"
        table.add_row(label, _format_size(sum(files.values())))
    table.add_section()
    table.add_row(f"{len(publication.files)} files", _format_size(sum(publication.files.values())))
    Console().print(table, markup=False)


def _format_size(size: int) -> str:
    return f"{size:,} B" if size < 10_000 else f"{size / 1e3:,.0f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"
