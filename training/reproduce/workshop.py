# SPDX-License-Identifier: MIT
"""What the experiments share: the images, the recipe, and models that are trained where they are not there yet."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.data.ground_truth import bird_mask
from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.data.prepare import FACTS
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.evaluation import Evaluation, evaluate
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.measure import Protocol
from prompt_cam_hf.explanations.explain import Explanation, explain_each
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.loading import Classifier, load_classifier, load_image_processor, model_name
from prompt_cam_hf.progress import follow
from prompt_cam_hf.training.data import ImageDataset
from prompt_cam_hf.training.recipe import Recipe, load_recipe
from prompt_cam_hf.training.train import RESULTS_FILE, check_same_recipe, load_data, train

DRAWN_BIRDS = "drawn-birds"
MODELS_FOLDER, DATA_FILE = "models", "data.json"
# Trains on cached features, in seconds.
BIRDS_RECIPE = "birds"
_BATCH_SIZE = 32
_BIRDS_LIMIT = 36  # of two images a class, on average


class Trained(NamedTuple):
    """A finished run: its folder, the model in evaluation mode, and `test` of its results (top1 and more, 0 to 1)."""

    folder: Path
    model: PreTrainedModel
    image_processor: BaseImageProcessor
    test: dict[str, float]

    @property
    def classifier(self) -> Classifier:
        """The model with its image processor, for `explain`."""
        return Classifier(self.model, self.image_processor)

    @property
    def accuracy(self) -> str:
        """Top-1 on the test split with its standard error, in words."""
        return f"{100 * self.test['top1']:.1f} ± {100 * self.test['top1_standard_error']:.1f} %"


@dataclass(frozen=True)
class Workshop:
    """The data and the settings of an experiment.

    Attributes:
        out: Holds the trained models, which all experiments share, and a folder for each experiment.
        recipe: Of the Prompt-CAM.
        recipe_name: Its name, by which published numbers are found.
        settings: Keys that won over the recipe, and win over those of the rivals too.
        images: In splits; there is a test split.
        birds: The test split of drawn birds with their masks; None for other data.
        num_images: Test images that are drawn in a figure.
        limit: Test images on which maps are measured, drawn at random; None: all.
    """

    out: Path
    recipe: Recipe
    recipe_name: str
    settings: dict[str, Any]
    images: ImageData
    birds: datasets.Dataset | None
    num_images: int
    limit: int | None

    @property
    def test(self) -> datasets.Dataset:
        """The test split."""
        assert self.images.test is not None  # `open_workshop` refuses data without one
        return self.images.test

    @cached_property
    def labels(self) -> np.ndarray:
        """The classes of the test images, (images,)."""
        return np.asarray(self.test["label"])

    def train(
        self,
        name: str,
        method: str = "prompt_cam",
        images: ImageData | None = None,
        recipe: Recipe | None = None,
        **changes: Any,
    ) -> Trained:
        """Train a model, or load the one that an earlier experiment has finished; an interrupted run goes on.

        Args:
            name: Of its folder in `models`.
            method: As in recipes.
            images, recipe: In place of the experiment's.
            **changes: Keys of the recipe that differ.

        Raises:
            ValueError: the folder holds a run with another recipe, or a key is wrong.
        """
        images = images or self.images
        folder = self.out / MODELS_FOLDER / name
        recipe = recipe or self.recipe
        changes = {"train_batch_size": min(recipe.train_batch_size, len(images.train)), "method": method, **changes}
        recipe = dataclasses.replace(recipe, output_dir=str(folder), resume_from_checkpoint=True, **changes)
        if (folder / RESULTS_FILE).is_file():
            check_same_recipe(recipe, folder)
        else:
            print(f"Training {name}", flush=True)
            train(recipe, images)
        pipeline = load_classifier(folder)
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        return Trained(folder, pipeline.model.eval(), load_image_processor(folder), results.get("test", {}))

    @property
    def about(self) -> str:
        """What is behind the numbers that are ours."""
        recipe, counts = self.recipe, {name: getattr(self.images, name) for name in ("train", "validation", "test")}
        numbers = ", ".join(f"{len(split):,} {use}" for use, split in counts.items() if split is not None)
        where = "drawn birds on the package's tiny backbone, so compare nothing with numbers from photos"
        if self.birds is None:
            where = f"{Path(recipe.data).name}, backbone {model_name(recipe.backbone)}"
        how = f"recipe {self.recipe_name}, {recipe.num_train_epochs} epochs, seed {recipe.seed}"
        if self.recipe_name == BIRDS_RECIPE:
            how += " (class prompts in the last layer only; the paper's Deep is --recipe birds_deep)"
        return f"Ours: {where}; {numbers} images; {how}."

    def prompt_cam(self) -> Trained:
        """The Prompt-CAM of the recipe."""
        return self.train("prompt_cam")

    @torch.no_grad()
    def read(self, trained: Trained, rows: np.ndarray | None = None) -> np.ndarray:
        """The scores (images, classes) of test images, by default all."""
        chosen = self.test if rows is None else self.test.select(rows)
        batches = DataLoader(ImageDataset(chosen, trained.image_processor), _BATCH_SIZE)
        shown = follow(batches, len(batches), "Reading test images", " batches")
        logits = [trained.model(batch["pixel_values"].to(trained.model.device)).logits.cpu() for batch in shown]
        return torch.cat(logits).float().numpy()

    def image(self, row: int) -> Image.Image:
        """Open a test image."""
        return open_image(self.test[row]["image"])

    def examples(self, rows: np.ndarray) -> list[int]:
        """The first of these rows of each class, of classes that lie evenly apart: at most `num_images`."""
        found, first = np.unique(self.labels[rows], return_index=True)
        places = np.unique(np.linspace(0, len(found) - 1, min(self.num_images, len(found))).round().astype(int))
        return rows[first[places]].tolist() if len(found) else []

    def sample(self, rows: np.ndarray) -> np.ndarray:
        """At most `limit` of these rows, drawn at random by the recipe's seed, in their order."""
        if self.limit is None or self.limit >= len(rows):
            return rows
        return np.sort(np.random.default_rng(self.recipe.seed).choice(rows, self.limit, replace=False))

    def explain(self, trained: Trained, rows: np.ndarray | list[int], **options: Any) -> Iterator[Explanation]:
        """Explain test images one after another; options as in `explain_each`."""
        shown = follow(rows, len(rows), "Explaining test images", " images")
        return explain_each(trained.classifier, map(self.image, shown), **options)

    def evaluate(self, trained: Trained, folder: Path, metrics: tuple[str, ...], **options: Any) -> Evaluation:
        """Evaluate a model on the test images, maps on `limit` of them, localisation where the truth is known."""
        truth = None
        if birds := self.birds:
            truth = GroundTruth("the drawn birds' parts", lambda row, name, image: bird_mask(birds[row]))
        # Steps of a row of pixels are what RISE published; a bird of 96 pixels takes a fifth of the passes.
        preset = "rise-eighth" if birds else "rise"
        protocol = Protocol(metrics=metrics, preset=preset, limit=self.limit, seed=self.recipe.seed)
        return evaluate(
            trained.folder, self.test, folder, protocol=protocol, ground_truth=truth, overwrite=True, **options
        )


def open_workshop(
    data: str,
    out: Path,
    *,
    recipe: str | None,
    birds_per_class: tuple[int, int, int],
    num_images: int,
    limit: int | None,
    settings: dict[str, Any],
) -> Workshop:
    """Load the data, and find the recipe that is theirs.

    Raises:
        ValueError: no recipe is published for the data and none is given, the folder holds experiments on other data,
            or a setting is wrong.
        OSError: the data or the recipe cannot be found.
    """
    if num_images < 1 or (limit is not None and limit < 1) or min(birds_per_class) < 1:
        raise ValueError(f"images is {num_images}, limit {limit}, birds {birds_per_class}; at least 1 is needed.")
    birds = None
    if data == DRAWN_BIRDS and not Path(data).exists():
        name = recipe or BIRDS_RECIPE
        made = load_recipe(name, **{**_birds_keys(out), **settings})
        size = made.image_size or 96
        splits = dict(zip(("train", "validation", "test"), birds_per_class, strict=True))
        drawn = {split: birds_dataset(split, count, size) for split, count in splits.items()}
        limit = limit or _BIRDS_LIMIT
        birds, names = drawn["test"], {label: bird.name for label, bird in enumerate(BIRD_CLASSES)}
        images = ImageData(
            **{key: one.select_columns(["image", "label"]) for key, one in drawn.items()}, id2label=names
        )
    else:
        # Which recipe it is shows in the data themselves, which every recipe reads in the same way.
        made = load_recipe(recipe or "dino_cub", **{"data": data, "output_dir": out, **settings})
        images = load_data(made)
        name = recipe or f"dino_{_known_data_set(images, data)}"
        made = load_recipe(name, **{"data": data, "output_dir": out, **settings})
    workshop = Workshop(out, made, Path(name).stem, settings, images, birds, num_images, limit)
    if made.hub_model_id:
        raise ValueError("hub_model_id is for a single run; publish the finished folder of a model instead.")
    if images.test is None:
        raise ValueError(f"{data} has no test split, which the experiments are measured on; add test/.")
    _check_same_data(workshop, Path(data).name)
    return workshop


def _birds_keys(folder: Path) -> dict[str, Any]:
    return {"backbone": str(BACKBONE), "output_dir": folder}


def _known_data_set(images: ImageData, data: str) -> str:
    """The public data set that has so many classes and test images."""
    for name, facts in FACTS.items():
        num_test = 0 if images.test is None else len(images.test)
        if facts.num_classes == len(images.id2label) and num_test in facts.num_images.get("test", ()):
            return name
    raise ValueError(
        f"{data} has {len(images.id2label)} classes and is none of the data sets with a published recipe as they are "
        "published; name a recipe, such as --recipe own_photos."
    )


def _check_same_data(workshop: Workshop, data: str) -> None:
    """Keep experiments on different images apart, for they share their models."""
    splits = {name: getattr(workshop.images, name) for name in ("train", "validation", "test")}
    now = {"data": data, "num_images": {name: len(split) for name, split in splits.items() if split is not None}}
    file = workshop.out / DATA_FILE
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != now:
            raise ValueError(
                f"{workshop.out} holds experiments on {before['data']} with {before['num_images']} images, and these "
                f"are on {now['data']} with {now['num_images']}; choose another --out."
            )
    elif workshop.out.exists() and any(workshop.out.iterdir()):
        raise FileExistsError(
            f"The folder {workshop.out} holds something else than experiments; choose another --out."
        )
    else:
        workshop.out.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(now).encode())
