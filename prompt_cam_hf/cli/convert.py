# SPDX-License-Identifier: MIT
"""`prompt-cam convert`: make a model of a checkpoint of the official implementation."""

from pathlib import Path
from typing import Annotated

import typer

from prompt_cam_hf.cli.common import say


def convert(
    source: Annotated[
        str, typer.Argument(help="A .pt file, or a Hub repository or folder of such files (imageomics/Prompt-CAM).")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model and its image processor.")],
    file: Annotated[str | None, typer.Option(help="Which file of the repository; they are listed without it.")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names: a text file with one a line, or the folder of class folders trained on."),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(min=1, help="Heads of a layer; one for every 64 channels by default."),
    ] = None,
) -> None:
    """Convert a checkpoint of the official implementation, or of INTR's.

    The file is read without running any code in it. What is written loads with from_pretrained and pipeline.
    """
    from prompt_cam_hf.hub.convert import convert_official_checkpoint, find_official_checkpoint, read_class_names

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and is not an empty folder; choose another --out.")
    id2label = None if classes is None else read_class_names(classes)
    path = find_official_checkpoint(source, file)
    model, image_processor = convert_official_checkpoint(path, num_attention_heads=heads, id2label=id2label)
    model.save_pretrained(out)
    image_processor.save_pretrained(out)
    if id2label is None:
        say(f"Its {model.config.num_labels} classes are called LABEL_0, LABEL_1 ...; --classes names them.", "yellow")
    print(out)
