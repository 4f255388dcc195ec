# SPDX-License-Identifier: MIT
"""`prompt-cam compare`: what do classes share on an image, and what tells them apart?"""

from typing import Annotated

import typer

from prompt_cam_hf.cli import common


@common.takes_figure_options
def compare(
    model: common.ModelArgument,
    image: common.ImageArgument,
    out: common.OutOption,
    classes: Annotated[list[str] | None, typer.Option(help="A class by its name; give two or more.")] = None,
    true: Annotated[
        str | None, typer.Option(help="In place of --classes: the class that a misread image belongs to.")
    ] = None,
    heads: common.HeadsOption = None,
    kind: common.KindOption = "attention",
    method: common.MethodOption = "greedy",
    *,
    figure: common.FigureOptions,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Show what classes share on an image, and what tells them apart.

    Either the classes of --classes, or the class of --true and the predicted one.

    Writes NAME.comparison.png (or --format), .json and .csv to --out.
    """
    from prompt_cam_hf.explanations.compare import compare as compare_classes
    from prompt_cam_hf.explanations.figures import check_head_count
    from prompt_cam_hf.loading import load_pipeline

    outputs = common.output_paths([image], out, "comparison", figure.figure_format, overwrite)
    classifier = load_pipeline(model, device)
    check_head_count(heads, classifier.model.num_trait_heads)
    comparison = compare_classes(classifier, image, classes or None, true=true, kind=kind, method=method)
    common.save_result(comparison, outputs[image], heads, figure)
    common.show(comparison)
