# SPDX-License-Identifier: MIT
"""`prompt-cam remove`: does the class stand without a trait?"""

from typing import Annotated, Literal

import typer

from prompt_cam_hf.cli import common


@common.takes_figure_options
def remove(
    model: common.ModelArgument,
    image: common.ImageArgument,
    out: common.OutOption,
    class_name: Annotated[
        str | None, typer.Option("--class", help="The class asked about, by its name; by default the predicted one.")
    ] = None,
    box: Annotated[
        tuple[int, int, int, int] | None,
        typer.Option(help="The region in pixels of the upright image.", metavar="LEFT TOP RIGHT BOTTOM"),
    ] = None,
    head: Annotated[
        int | None, typer.Option(min=0, help="In place of --box, where this head looks; the top head by default.")
    ] = None,
    method: Annotated[
        Literal["inpaint", "mean", "blur"],
        typer.Option(help="Fill the region from around it, with the mean colour, or by blurring."),
    ] = "inpaint",
    heads: common.HeadsOption = None,
    kind: common.KindOption = "attention",
    *,
    figure: common.FigureOptions,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Remove a region from an image, and see whether the class stands.

    As a control, a region of the same shape is removed elsewhere.

    Writes NAME.removal.png (or --format), .json and .csv to --out.
    """
    from prompt_cam_hf.explanations.figures import check_head_count
    from prompt_cam_hf.explanations.removal import Region, remove_trait
    from prompt_cam_hf.loading import load_pipeline

    if box is not None and head is not None:
        raise ValueError("Give either --box or --head.")
    region: Region = "top head" if head is None else head
    outputs = common.output_paths([image], out, "removal", figure.figure_format, overwrite)
    classifier = load_pipeline(model, device)
    check_head_count(heads, classifier.model.num_trait_heads)
    removal = remove_trait(classifier, image, box or region, class_name, method=method, kind=kind)
    common.save_result(removal, outputs[image], heads, figure)
    common.show(removal)
