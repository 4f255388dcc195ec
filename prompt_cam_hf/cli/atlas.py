# SPDX-License-Identifier: MIT
"""`prompt-cam atlas`: where do the prompts of all classes look, over a whole data set?"""

from typing import Annotated

import typer

from prompt_cam_hf.cli import common


def atlas(
    model: common.ModelArgument,
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, folder of images, CSV or Parquet file, or a data set's id on the Hub."
        ),
    ],
    out: common.OutOption,
    split: common.SplitOption = None,
    top_heads: Annotated[int, typer.Option(min=1, help="So many heads of an image count as its top ones.")] = 3,
    examples: Annotated[int, typer.Option(min=0, help="Images to show of each class.")] = 3,
    method: common.MethodOption = "greedy",
    batch_size: common.BatchSizeOption = 8,
    image_column: common.ImageColumnOption = "image",
    label_column: common.LabelColumnOption = "label",
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Sum up over many images which heads each class rests on.

    Also where these heads look, and which classes are confused.

    Writes images.parquet, classes.parquet, atlas.json and index.html, one page that works offline, to --out. When it
    was interrupted, the same command goes on. Images that cannot be read are listed and left out, and the exit status
    is then 1.
    """
    from prompt_cam_hf.class_atlas import atlas as make_atlas
    from prompt_cam_hf.loading import load_pipeline

    result = make_atlas(
        load_pipeline(model, device),
        data,
        out,
        split=split,
        top_heads=top_heads,
        num_examples=examples,
        method=method,
        batch_size=batch_size,
        overwrite=overwrite,
        image_column=image_column,
        label_column=label_column,
    )
    summary = result.summary
    rate = f", {summary.accuracy:.1%} recognised" if summary.accuracy is not None else ""
    print(f"{summary.total - summary.num_unreadable} images of {len(summary.classes)} classes{rate}: {result.page}")
    if summary.num_unreadable:
        raise typer.Exit(1)
