# SPDX-License-Identifier: MIT
"""`prompt-cam explain`: which traits decide?"""

from dataclasses import replace
from itertools import islice
from typing import Annotated

import typer

from prompt_cam_hf.cli import common


@common.takes_figure_options
def explain(
    model: common.ModelArgument,
    images: common.ImagesArgument,
    out: common.OutOption,
    classes: Annotated[
        list[str] | None,
        typer.Option(help="A class by its name; repeat it for several. By default, the predicted one."),
    ] = None,
    heads: common.HeadsOption = None,
    kind: common.KindOption = "attention",
    method: common.MethodOption = "greedy",
    *,
    figure: common.FigureOptions,
    batch_size: common.BatchSizeOption = 8,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Show which traits decide, and where the model looks.

    For each image, NAME.traits.png (or --format), .json and .csv are written to --out, in folders
    like those of the images. Images that cannot be read are named on standard error and left out, and the exit
    status is then 1.
    """
    from prompt_cam_hf.data.images import find_images
    from prompt_cam_hf.explanations.class_names import find_classes
    from prompt_cam_hf.explanations.explain import explain_each
    from prompt_cam_hf.explanations.figures import check_head_count
    from prompt_cam_hf.loading import as_classifier, load_pipeline

    num_explained = 0
    outputs = common.output_paths(find_images(images), out, "traits", figure.figure_format, overwrite)
    classifier = as_classifier(load_pipeline(model, device))
    numbers = find_classes(classifier.model.config.id2label, classes) if classes else None
    check_head_count(heads, classifier.model.num_trait_heads)
    readable = common.open_readable(outputs)
    while batch := dict(islice(readable, batch_size)):
        explanations = explain_each(
            classifier, batch.values(), numbers, kind=kind, method=method, batch_size=batch_size
        )
        for file, explanation in zip(batch, explanations, strict=True):
            explanation = replace(explanation, source=str(file))
            common.save_result(explanation, outputs[file], heads, figure)
            common.show(f"{explanation}\n")
        num_explained += len(batch)
    if num_explained < len(outputs):
        raise typer.Exit(1)
