# SPDX-License-Identifier: MIT
"""`prompt-cam compare`: what do classes share on an image, and what tells them apart?"""

from pathlib import Path
from typing import Annotated

import typer

from prompt_cam_hf.cli.common import (
    DeviceOption,
    ModelArgument,
    OverwriteOption,
    load_pipeline,
    one_sentence_errors,
)
from prompt_cam_hf.cli.explain import (
    HeadsOption,
    Kind,
    KindOption,
    Method,
    MethodOption,
    OutlineOption,
    OutOption,
    Scale,
    ScaleOption,
    output_paths,
    save_result,
)
from prompt_cam_hf.explanations.compare import compare as compare_classes
from prompt_cam_hf.explanations.figures import check_head_count


def compare(
    model: ModelArgument,
    image: Annotated[Path, typer.Argument(help="The image.")],
    out: OutOption,
    classes: Annotated[list[str] | None, typer.Option(help="A class by its name; give two or more.")] = None,
    true: Annotated[
        str | None, typer.Option(help="In place of --classes: the class that a misread image belongs to.")
    ] = None,
    heads: HeadsOption = None,
    kind: KindOption = Kind.attention,
    method: MethodOption = Method.greedy,
    scale: ScaleOption = Scale.figure,
    outline: OutlineOption = False,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
) -> None:
    """Compare classes on one image, or the true class with the predicted one.

    Writes NAME.comparison.png, .json and .csv to --out.
    """
    with one_sentence_errors():
        outputs = output_paths([image], out, "comparison", overwrite)
        classifier = load_pipeline(model, device)
        check_head_count(heads, classifier.model.config.backbone_config.num_attention_heads)
        comparison = compare_classes(
            classifier, image, classes or None, true=true, kind=kind.value, method=method.value
        )
        save_result(comparison, outputs[image], heads=heads, scale=scale.value, outline=outline)
        print(comparison)


__all__ = ["compare"]
