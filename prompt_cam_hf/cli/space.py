# SPDX-License-Identifier: MIT
"""`prompt-cam space`: the page of `prompt-cam app` as a folder, for the Hub or for another machine."""

from pathlib import Path
from typing import Annotated

import typer

from prompt_cam_hf.cli.common import ModelArgument, OverwriteOption, say

ExamplesOption = Annotated[
    Path | None, typer.Option(help="Folder of images for the Space to choose from, best in a folder for each class.")
]
ExamplesLicenseOption = Annotated[str | None, typer.Option(help="Licence that allows to show these images.")]


def space(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="Folder for the files; it is made.")],
    license: Annotated[str | None, typer.Option(help="Licence of the Space, such as mit or cc-by-4.0.")] = None,
    title: Annotated[str | None, typer.Option(help="Name of the Space on the Hub.")] = None,
    examples: ExamplesOption = None,
    examples_license: ExamplesLicenseOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Write the page of `prompt-cam app` as the files of a Space.

    A model in a folder is copied into it; one on the Hub is loaded from there. Without --license, that of the card in
    the model's folder holds. `prompt-cam publish --space` puts model and page on the Hub at once.
    """
    from prompt_cam_hf.hub.space import write_space

    sizes = write_space(
        model,
        folder,
        license=license,
        title=title,
        examples=examples,
        examples_license=examples_license,
        overwrite=overwrite,
    )
    print(folder)
    say(
        f"{len(sizes)} files. See the page: python {folder / 'app.py'}. "
        f"Put it on the Hub: hf upload OWNER/NAME {folder} --repo-type space"
    )
