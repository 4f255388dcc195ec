# SPDX-License-Identifier: MIT
"""`prompt-cam evaluate`: are the explanations right?"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prompt_cam_hf.cli import common

if TYPE_CHECKING:
    import datasets
    import numpy as np
    from PIL import Image

    from prompt_cam_hf.evaluation import Evaluation
    from prompt_cam_hf.evaluation.build import GroundTruth

DRAWN_BIRDS = "drawn-birds"

# What of CUB's annotations counts as the place to be found, and its name in reports.
CubMask = Literal["box", "segmentation", "parts"]
_CUB_WORDS: dict[CubMask, str] = {"box": "boxes", "segmentation": "segmentations", "parts": "part points"}


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a Prompt-CAM, or of a baseline.")],
    data: Annotated[
        str,
        typer.Option(
            help="Folder of class folders, CSV or Parquet file, a data set's id on the Hub, or drawn-birds for the "
            "embedded birds, whose traits are known."
        ),
    ],
    out: common.OutOption,
    baseline: Annotated[
        list[str] | None, typer.Option(help="A model to compare with, of the same classes; repeat it for several.")
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help="faithfulness, localisation, specificity, sanity, road; repeat it for several. By default all but "
            "road."
        ),
    ] = None,
    maps: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="A map of the model; repeat it for several. attention_sum, attention_first, attention_top3, "
            "attention_sufficient, attention_shapley, attention_evidence, attention_shapley_evidence, evidence_sum, "
            "evidence_positive, grad_cam, hires_cam, layer_cam, eigen_cam, rollout, raw_attention, legrad, "
            "chefer_cam, finer_grad_cam, finer_hires_cam, finer_layer_cam.",
        ),
    ] = None,
    baseline_maps: Annotated[
        list[str] | None, typer.Option("--baseline-map", help="A map of the baselines; repeat it for several.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(help="Of insertion, deletion: rise, rise-eighth, rise-black, fast. Publish those of rise."),
    ] = "rise-eighth",
    classes: Annotated[Literal["predicted", "true"], typer.Option(help="Whose map and probability.")] = "predicted",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Measure maps on so many images only, drawn at random.")
    ] = None,
    split: common.SplitOption = None,
    cub: Annotated[
        Path | None, typer.Option(help="The unpacked CUB_200_2011 that the images come from, for its annotations.")
    ] = None,
    cub_mask: Annotated[CubMask, typer.Option(help="Which of CUB's annotations.")] = "segmentation",
    fish_vista: Annotated[
        Path | None, typer.Option(help="A clone of Fish-Vista that the images come from, for its trait masks.")
    ] = None,
    fish_traits: Annotated[
        list[str] | None,
        typer.Option(
            "--fish-vista-trait",
            help="A trait that counts, such as 'Dorsal fin'; repeat it for several. All by default.",
        ),
    ] = None,
    birds_per_class: Annotated[int, typer.Option(min=1, help="Of drawn-birds.")] = 20,
    image_column: common.ImageColumnOption = "image",
    label_column: common.LabelColumnOption = "label",
    seed: Annotated[int, typer.Option(min=0, help="Of the order of images, and of all that is drawn.")] = 0,
    batch_size: common.BatchSizeOption = 32,
    overwrite: common.OverwriteOption = False,
    device: common.DeviceOption = None,
) -> None:
    """Measure whether a model is right, and whether its maps are.

    Writes evaluation.json, measurements.parquet, curves.svg and index.html, one page that works offline, to --out.
    When it was interrupted, the same command goes on. Images that cannot be read are left out, and the exit status
    is then 1. Several processes share the work when the command is started with `accelerate launch -m prompt_cam_hf
    evaluate ...`.
    """
    from accelerate import PartialState

    from prompt_cam_hf.birds import birds_dataset
    from prompt_cam_hf.evaluation import evaluate as run_evaluation
    from prompt_cam_hf.evaluation.measure import Protocol

    images: str | datasets.Dataset = data
    if cub and fish_vista:
        raise ValueError("The images come from one data set: give --cub or --fish-vista, not both.")
    ground_truth = _cub_truth(cub, cub_mask) if cub else None
    if fish_vista:
        ground_truth = _fish_truth(fish_vista, fish_traits)
    if data == DRAWN_BIRDS and not os.path.exists(data):
        images = birds_dataset(split or "test", birds_per_class)
        ground_truth, split = _bird_truth(images), None
    try:
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
                classes=classes,
                limit=limit,
                seed=seed,
                batch_size=batch_size,
            ),
            ground_truth=ground_truth,
            split=split,
            image_column=image_column,
            label_column=label_column,
            overwrite=overwrite,
            device=device,
        )
    except KeyboardInterrupt as error:
        common.say("Interrupted. The same command goes on after the last images that were measured.", style="yellow")
        raise typer.Exit(130) from error
    if PartialState().is_main_process:
        _print(found)
    if found.num_unreadable:
        raise typer.Exit(1)


def _bird_truth(birds: "datasets.Dataset") -> "GroundTruth":
    from prompt_cam_hf.data.ground_truth import bird_mask
    from prompt_cam_hf.evaluation.build import GroundTruth

    return GroundTruth("the drawn birds' parts", lambda index, name, image: bird_mask(birds[index]))


def _cub_truth(folder: Path, kind: CubMask) -> "GroundTruth":
    from prompt_cam_hf.data.ground_truth import bounding_box_mask, point_mask, read_cub, segmentation_mask
    from prompt_cam_hf.evaluation.build import GroundTruth

    annotations = read_cub(folder)

    def truth(index: int, name: str, image: "Image.Image") -> "np.ndarray | None":
        annotation = annotations.get(Path(name).name)
        if annotation is None:
            return None
        if kind == "segmentation":
            return segmentation_mask(annotation)
        mask = bounding_box_mask if kind == "box" else point_mask
        return mask(annotation, (image.height, image.width))

    return GroundTruth(f"CUB's {_CUB_WORDS[kind]}", truth)


def _fish_truth(folder: Path, traits: list[str] | None) -> "GroundTruth":
    from prompt_cam_hf.data.ground_truth import read_fish_vista, trait_mask
    from prompt_cam_hf.evaluation.build import GroundTruth

    fish = read_fish_vista(folder)
    trait_mask(fish, "", traits)  # refuses an unknown trait before anything is measured
    asked = f" ({', '.join(traits)})" if traits else ""
    return GroundTruth(f"Fish-Vista's traits{asked}", lambda index, name, image: trait_mask(fish, name, traits))


def _print(found: "Evaluation") -> None:
    from prompt_cam_hf.evaluation.report import PAGE, tables
    from prompt_cam_hf.explanations.results import format_table

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
