# SPDX-License-Identifier: MIT
"""`prompt-cam taxonomy`: which path through the tree does an image take?"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from prompt_cam_hf.cli import common


@common.takes_figure_options
def taxonomy(
    model: common.ModelArgument,
    images: common.ImagesArgument,
    out: common.OutOption,
    tree: Annotated[
        Path | None, typer.Option(help="CSV file of the tree, in place of the one that was saved with the model.")
    ] = None,
    heads: common.HeadsOption = None,
    kind: common.KindOption = "attention",
    *,
    figure: common.FigureOptions,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Follow images through a tree of classes, level by level.

    Shows what each level says, and where its most important heads look.

    For each image, NAME.path.png (or --format), .json and .csv are written to --out, in folders
    like those of the images. Images that cannot be read are named on standard error and left out, and the exit
    status is then 1.
    """
    from prompt_cam_hf.data.images import find_images
    from prompt_cam_hf.data.taxonomy_tree import read_taxonomy
    from prompt_cam_hf.explanations.figures import check_head_count
    from prompt_cam_hf.explanations.taxonomy_path import explain_path, find_taxonomy
    from prompt_cam_hf.loading import load_pipeline

    num_explained = 0
    outputs = common.output_paths(find_images(images), out, "path", figure.figure_format, overwrite)
    classifier = load_pipeline(model, device)
    levels = read_taxonomy(tree or find_taxonomy(model))
    check_head_count(heads, classifier.model.config.backbone_config.num_attention_heads)
    for file, image in common.open_readable(outputs):
        path = replace(explain_path(classifier, image, levels, kind=kind), source=str(file))
        common.save_result(path, outputs[file], heads, figure)
        common.show(path)
        num_explained += 1
    if num_explained < len(outputs):
        raise typer.Exit(1)
