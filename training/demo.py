# SPDX-License-Identifier: MIT
"""The demonstration, where the truth is known: train on drawn birds, measure, draw, save and load again.

It calls what every user can call: `train` with a recipe, the measurements and figures of `prompt_cam_hf.birds`, and
transformers' pipeline. `prompt-cam demo` is this module from the command line.
"""

import io
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from matplotlib.figure import Figure
from PIL import Image
from transformers import pipeline

from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.birds.evaluation import measure_localisation, measure_removal, read_birds
from prompt_cam_hf.birds.figures import plot_counterfactuals, plot_failures, plot_trait_hits
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.modeling import PromptCAMImageClassificationPipeline
from prompt_cam_hf.training.recipe import load_recipe
from prompt_cam_hf.training.train import RECIPE_FILE, TrainResult, train

RECIPES = Path(__file__).with_name("recipes")
MODEL_FOLDER, IMAGES_FOLDER, REPORT_FILE = "model", "birds", "report.json"
_DOTS_PER_INCH = 100
_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration found; `numbers` is what report.json holds.

    Attributes:
        folder: Holds all of it: the model, the report, the figures, and one test bird of each class as a file.
        figures: The files of the figures; that of the failures only where there are any.
        numbers: `accuracy` (with `chance`), what `measure_localisation` and `measure_removal` return under
            `localisation`, `accuracy_left` and `predictions_flipped`, what was trained and how long all took.
    """

    folder: Path
    figures: list[Path]
    numbers: dict[str, Any]


def run_demo(
    folder: Path,
    *,
    deep: bool = False,
    seed: int = 0,
    birds_per_class: tuple[int, int, int] = (60, 20, 20),
    num_proc: int | None = None,
    **settings: Any,
) -> DemoReport:
    """Train a Prompt-CAM on drawn birds, measure it, and write everything to a folder.

    What is there already is used again: drawn birds, cached features, and the training run in the folder, which goes
    on where it stopped.

    Args:
        folder: New, empty, or of an earlier demonstration with the same settings.
        deep: Train the paper's Deep, not the reduced variant.
        seed: Of the prompts, the order of the images and their augmentation. The birds stay the same.
        birds_per_class: To train on, to choose the best epoch on, and to test on.
        num_proc: Processes that draw birds; one for each processor core by default.
        **settings: Keys of the recipe that win over recipes/birds.yaml or recipes/birds_deep.yaml.

    Returns:
        What was found, and where the files are.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the folder holds a demonstration with other settings, or a setting is wrong.
    """
    start = time.time()
    _check_folder(folder)
    recipe = load_recipe(
        RECIPES / ("birds_deep.yaml" if deep else "birds.yaml"),
        backbone=BACKBONE,
        output_dir=folder / MODEL_FOLDER,
        seed=seed,
        resume_from_checkpoint=True,
        **settings,
    )
    birds = {
        split: birds_dataset(split, count, recipe.image_size, num_proc=num_proc)
        for split, count in zip(_SPLITS, birds_per_class, strict=True)
    }
    result = train(recipe, _image_data(birds))
    test = birds["test"]
    reading = read_birds(result.model, result.image_processor, test)
    removal = measure_removal(result.model, result.image_processor, test, reading, seed)
    figures = {
        "trait_hits.png": plot_trait_hits(test, reading),
        "failures.png": plot_failures(test, reading),
        "counterfactuals.png": plot_counterfactuals(result.model, result.image_processor, test, reading),
    }
    drawn = {folder / name: figure for name, figure in figures.items() if figure is not None}
    for path, figure in drawn.items():
        write_atomically(path, _compact_png(figure))
    images = _save_images(test, folder / IMAGES_FOLDER)
    numbers = {
        "variant": "Deep" if deep else "class prompts at the last layer, no class-agnostic prompts, cached features",
        "seed": seed,
        "num_birds": dict(zip(_SPLITS, map(len, birds.values()), strict=True)),
        "best_epoch": result.best_epoch,
        "num_train_epochs": recipe.num_train_epochs,
        "accuracy": result.metrics["test"]["top1"],
        "chance": result.metrics["chance"]["top1"],
        "localisation": measure_localisation(reading),
        **removal,
        "same_after_loading": _answers_agree(result, images),
        "seconds": round(time.time() - start, 1),
    }
    write_atomically(folder / REPORT_FILE, (json.dumps(numbers, indent=2) + "\n").encode())
    return DemoReport(folder, list(drawn), numbers)


def _check_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / MODEL_FOLDER / RECIPE_FILE).is_file():
        raise FileExistsError(f"The folder {folder} holds something else than a demonstration; choose another one.")


def _image_data(birds: dict[str, datasets.Dataset]) -> ImageData:
    images = {split: data.select_columns(["image", "label"]) for split, data in birds.items()}
    return ImageData(**images, id2label={label: bird.name for label, bird in enumerate(BIRD_CLASSES)})


def _save_images(birds: datasets.Dataset, folder: Path) -> list[Path]:
    """One bird of each class as a file, to try the commands on."""
    folder.mkdir(exist_ok=True)
    files = []
    for bird in birds.select(range(min(len(BIRD_CLASSES), len(birds)))):
        buffer = io.BytesIO()
        bird["image"].save(buffer, "PNG")
        files.append(folder / f"{BIRD_CLASSES[bird['label']].name}.png")
        write_atomically(files[-1], buffer.getvalue())
    return files


def _answers_agree(result: TrainResult, images: list[Path]) -> bool:
    """Whether the saved model, loaded as any user would, gives the same classes as the one in memory."""
    settings: dict[str, Any] = {"task": "image-classification", "pipeline_class": PromptCAMImageClassificationPipeline}
    loaded = pipeline(model=str(result.output_dir), **settings)
    trained = pipeline(model=result.model, image_processor=result.image_processor, **settings)
    files = [str(path) for path in images]
    return [best[0]["label"] for best in loaded(files, top_k=1)] == [
        best[0]["label"] for best in trained(files, top_k=1)
    ]


def _compact_png(figure: Figure) -> bytes:
    """A figure as a PNG of 256 colours, an eighth of the size."""
    drawn, compact = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DOTS_PER_INCH)
    # Pillow's other ways turn the small red and yellow parts, which are what matters, brown.
    palette = Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1)
    palette.save(compact, "PNG", optimize=True)
    return compact.getvalue()
