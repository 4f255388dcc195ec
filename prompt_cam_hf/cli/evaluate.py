# SPDX-License-Identifier: MIT
"""`prompt-cam evaluate`: are the explanations right?"""

import os
from enum import Enum
from pathlib import Path
from typing import Annotated

import datasets
import numpy as np
import typer
from accelerate import PartialState
from PIL import Image

from prompt_cam_hf.birds import birds_dataset
from prompt_cam_hf.cli.atlas import SplitName
from prompt_cam_hf.cli.common import DeviceOption, OverwriteOption, one_sentence_errors
from prompt_cam_hf.cli.explain import OutOption
from prompt_cam_hf.data.ground_truth import bird_mask, bounding_box_mask, point_mask, read_cub, segmentation_mask
from prompt_cam_hf.evaluation import Evaluation
from prompt_cam_hf.evaluation import evaluate as run_evaluation
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.measure import METRIC_GROUPS, Protocol
from prompt_cam_hf.evaluation.report import PAGE, tables
from prompt_cam_hf.evaluation.subjects import MAPS
from prompt_cam_hf.explanations.results import format_table
from prompt_cam_hf.metrics.faithfulness import PRESETS

DRAWN_BIRDS = "drawn-birds"


class AskedClass(str, Enum):
    """Whose map is measured."""

    predicted = "predicted"
    true = "true"


class CubMask(str, Enum):
    """What of CUB's annotations counts as the place to be found."""

    box = "box"
    segmentation = "segmentation"
    parts = "parts"


_CUB_WORDS = {CubMask.box: "boxes", CubMask.segmentation: "segmentations", CubMask.parts: "part points"}


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Prompt-CAM, or of a baseline.")],
    data: Annotated[
        str,
        typer.Option(
            help="Folder of class folders, CSV or Parquet file, a data set's id on the Hub, or drawn-birds for the "
            "embedded birds, whose traits are known."
        ),
    ],
    out: OutOption,
    baseline: Annotated[
        list[str] | None, typer.Option(help="A model to compare with, of the same classes; repeat it for several.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(METRIC_GROUPS)}; repeat it for several. By default all but road."),
    ] = None,
    maps: Annotated[
        list[str] | None, typer.Option("--map", help=f"A map of the model; repeat it for several. {', '.join(MAPS)}.")
    ] = None,
    baseline_maps: Annotated[
        list[str] | None, typer.Option("--baseline-map", help="A map of the baselines; repeat it for several.")
    ] = None,
    preset: Annotated[str, typer.Option(help=f"Of insertion and deletion: {', '.join(PRESETS)}.")] = "rise",
    classes: Annotated[AskedClass, typer.Option(help="Whose map and probability.")] = AskedClass.predicted,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure maps on so many images only, drawn at random.")
    ] = None,
    split: Annotated[
        SplitName | None, typer.Option(help="By default the last of train, validation and test that there is.")
    ] = None,
    cub: Annotated[
        Path | None, typer.Option(help="The unpacked CUB_200_2011 that the images come from, for its annotations.")
    ] = None,
    cub_mask: Annotated[CubMask, typer.Option(help="Which of CUB's annotations.")] = CubMask.segmentation,
    birds_per_class: Annotated[int, typer.Option(min=1, help="Of drawn-birds.")] = 20,
    image_column: Annotated[str, typer.Option(help="Column of images or paths, in tables and data sets.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of class names, in tables and data sets.")] = "label",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of images, and of all that is drawn.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that go through the network at once.")] = 32,
    overwrite: OverwriteOption = False,
    device: DeviceOption = None,
) -> None:
    """Measure whether a model is right, and whether its maps are: faithfulness, localisation, specificity, sanity.

    Writes evaluation.json, measurements.parquet, curves.svg and index.html, one page that works offline, to --out.
    When it was interrupted, the same command goes on. Images that cannot be read are left out, and the exit status
    is then 1. Several processes share the work when the command is started with `accelerate launch -m prompt_cam_hf
    evaluate ...`.
    """
    with one_sentence_errors():
        images: str | datasets.Dataset = data
        ground_truth = None if cub is None else _cub_truth(cub, cub_mask)
        if data == DRAWN_BIRDS and not os.path.exists(data):
            images = birds_dataset(split.value if split else "test", birds_per_class)
            ground_truth, split = _bird_truth(images), None
        found = run_evaluation(
            model,
            images,
            out,
            baselines=baseline or (),
            maps=maps,
            baseline_maps=baseline_maps,
            protocol=Protocol(
                metrics=tuple(metrics) if metrics else Protocol.metrics,
                preset=preset,
                classes=classes.value,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
            ),
            ground_truth=ground_truth,
            split=split.value if split else None,
            image_column=image_column,
            label_column=label_column,
            overwrite=overwrite,
            device=device,
        )
    if PartialState().is_main_process:
        _print(found)
    if found.num_unreadable:
        raise typer.Exit(1)


def _bird_truth(birds: datasets.Dataset) -> GroundTruth:
    return GroundTruth("the drawn birds' parts", lambda index, name, image: bird_mask(birds[index]))


def _cub_truth(folder: Path, kind: CubMask) -> GroundTruth:
    annotations = read_cub(folder)

    def truth(index: int, name: str, image: Image.Image) -> np.ndarray | None:
        annotation = annotations.get(Path(name).name)
        if annotation is None:
            return None
        if kind is CubMask.segmentation:
            return segmentation_mask(annotation)
        mask = bounding_box_mask if kind is CubMask.box else point_mask
        return mask(annotation, (image.height, image.width))

    return GroundTruth(f"CUB's {_CUB_WORDS[kind]}", truth)


def _print(found: Evaluation) -> None:
    columns = ("model and map", "metric", "mean [95 % interval]", "images", "protocol")
    for table in tables(found.means):
        # Metrics as rows: there are more of them than of maps, and lines would grow long.
        rows = [
            (name, mean.metric, str(mean), str(mean.num_images), found.protocol.of(mean.metric, found.ground_truth))
            for name, means in table.rows
            for mean in means
            if mean is not None
        ]
        print(f"{table.title}\n{format_table(columns, rows)}\n")
    print(found.folder / PAGE)


__all__ = ["DRAWN_BIRDS", "AskedClass", "CubMask", "evaluate"]
