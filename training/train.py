# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["prompt_cam_hf"]
# ///
"""Training: from a recipe to a trained Prompt-CAM, or to a baseline on the same backbone.

    prompt-cam train PHOTOS --out FOLDER [--recipe RECIPE] [--key value ...]
    accelerate launch training/train.py RECIPE [--key value ...]
    accelerate launch -m prompt_cam_hf.training.train RECIPE [--key value ...]
    uv run training/train.py RECIPE [--key value ...]

The best epoch is chosen on the validation part; the test split is looked at once, at the end.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from huggingface_hub import HfApi, ModelCardData
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor
from transformers.trainer_utils import IntervalStrategy

from prompt_cam_hf.baselines import (
    INTRForImageClassification,
    LinearProbe,
    VPTForImageClassification,
    build_linear_probe,
)
from prompt_cam_hf.data.image_processors import backbone_image_processor, output_size
from prompt_cam_hf.data.images import build_detr_image_processor, build_image_processor
from prompt_cam_hf.data.splits import ImageData, load_image_data
from prompt_cam_hf.files import LOCK_FILE, only_writer, write_atomically
from prompt_cam_hf.hub.patience import limit_waiting
from prompt_cam_hf.hub.publish import publish
from prompt_cam_hf.hub.upload import check_license, check_repo_id, explained_upload_errors, find_token
from prompt_cam_hf.messages import tell_error
from prompt_cam_hf.metrics.classification import ClassificationReport, build_compute_metrics
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import embed, grid_size, image_size
from prompt_cam_hf.training.cache_files import DEFAULT_CACHE_DIR
from prompt_cam_hf.training.data import DetrAugmentation, ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.features import FeatureCollator, FeatureDataset, PrefixModel, cache_features
from prompt_cam_hf.training.image_cache import cache_images
from prompt_cam_hf.training.recipe import Recipe, load_recipe, num_workers, parse_recipe, training_arguments
from prompt_cam_hf.training.report import (
    METRICS,
    as_png,
    find_weaknesses,
    plot_confusion,
    plot_learning_curve,
    print_results,
    standard_error,
    trivial_metrics,
)
from prompt_cam_hf.training.trainer import (
    PromptCAMTrainer,
    complete_checkpoints,
    load_trained_parameters,
    newest_checkpoint,
    on_main_process,
    remove_checkpoints_after,
)

logger = logging.getLogger(__name__)

# What to say after Ctrl-C, whenever it comes.
INTERRUPTED = "Interrupted. The same command with --resume_from_checkpoint goes on after the last whole epoch."

RECIPE_FILE = "recipe.yaml"
RESULTS_FILE = "results.json"

# What may change when a run is resumed: where it lies and how it runs, not what it computes.
_CHANGEABLE_KEYS = {
    "cache_dir", "dataloader_num_workers", "eval_batch_size", "hub_license", "hub_model_id", "hub_private_repo",
    "include_backbone", "output_dir", "resume_from_checkpoint",
}  # fmt: skip


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        model: With the weights of `best_epoch`, in evaluation mode.
        image_processor: Does what evaluation did; saved with the model.
        output_dir: Holds all of this.
        best_epoch: Counted from 1; the best on validation, the last where there is no validation part.
        metrics: By split (validation, test, as far as there are), for `chance`, and for `largest_class`, which names
            classes by how common they are: top1, top5 and macro_accuracy, 0 to 1; of splits, top1_standard_error too.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    output_dir: Path
    best_epoch: int
    metrics: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Run:
    """A training run that is ready to start: recipe, data and model have been checked.

    `image_processor` is that of evaluation; `checkpoint` is where to start, None to start from nothing.
    """

    recipe: Recipe
    data: ImageData
    image_processor: BaseImageProcessor
    trainer: PromptCAMTrainer
    checkpoint: Path | None

    def train(self) -> TrainResult:
        """Train, evaluate, save and report.

        Raises:
            FileExistsError: another process writes to the output folder, or has written there since the run was
                prepared.
            FloatingPointError: the loss became infinite or not a number.
        """
        folder = Path(self.recipe.output_dir)
        with only_writer(folder) if self.trainer.args.should_save else nullcontext():
            return self._train(folder)

    def _train(self, folder: Path) -> TrainResult:
        trainer = self.trainer
        if trainer.args.should_save:
            self._open_folder(folder)
        trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        best_epoch = self._restore_best_epoch(folder)
        test = None if self.data.test is None else ImageDataset(self.data.test, self.image_processor)
        splits = {"validation": trainer.eval_dataset, "test": test}
        reports = {name: _report(trainer, split) for name, split in splits.items() if split is not None}
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        model = model.model if isinstance(model, LinearProbe) else model
        result = TrainResult(model, self.image_processor, folder, best_epoch, self._metrics(reports))
        if trainer.args.should_save:
            notes = find_weaknesses(self.data)
            self._save(result, reports, notes)
            chosen = "the last" if self.data.validation is None else "the best on validation"
            title = f"Epoch {best_epoch} of {self.recipe.num_train_epochs}, {chosen}"
            print_results(title, result.metrics, self._num_images(), notes)
            print(f"Saved in {folder}")
            if self.recipe.hub_model_id:
                _upload(folder, self.recipe)
        PartialState().wait_for_everyone()
        return result

    def _open_folder(self, folder: Path) -> None:
        if _find_checkpoint(self.recipe) != self.checkpoint:
            raise FileExistsError(f"Another run has written to {folder} in the meantime; start this one again.")
        if self.checkpoint is None:
            write_atomically(folder / RECIPE_FILE, self.recipe.to_yaml().encode())
        remove_checkpoints_after(self.checkpoint, folder)
        if self.data.skipped:
            self.data.write_skipped(folder / "skipped_images.csv")

    def _restore_best_epoch(self, folder: Path) -> int:
        state = self.trainer.state
        best_step = state.best_global_step or state.global_step
        load_trained_parameters(self.trainer.model, folder / f"checkpoint-{best_step}")
        return best_step * self.recipe.num_train_epochs // state.max_steps

    def _metrics(self, reports: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        number = self._num_images()
        measured = {
            name: {
                **{key: report[key] for key in METRICS},
                "top1_standard_error": standard_error(report["top1"], number[name]),
            }
            for name, report in reports.items()
        }
        return measured | trivial_metrics(self.data)

    def _num_images(self) -> dict[str, int]:
        splits = {name: getattr(self.data, name) for name in ("train", "validation", "test")}
        return {name: len(split) for name, split in splits.items() if split is not None}

    def _save(self, result: TrainResult, reports: dict[str, dict[str, Any]], notes: list[str]) -> None:
        folder = result.output_dir
        options: dict[str, Any] = {} if self.recipe.include_backbone else {"include_backbone": False}
        result.model.save_pretrained(folder, **options)
        result.image_processor.save_pretrained(folder)
        self.trainer.save_state()
        for name, report in reports.items():
            names = [label for _, label in sorted(self.data.id2label.items())]
            table = pd.DataFrame(report["confusion"], index=names, columns=names)
            table.to_csv(folder / f"confusion_{name}.csv", index_label="true \\ predicted")
            write_atomically(folder / f"confusion_{name}.png", as_png(plot_confusion(table, name)))
        curve = plot_learning_curve(self.trainer.state.log_history, result.best_epoch, result.metrics)
        write_atomically(folder / "learning_curve.png", as_png(curve))
        facts = {
            "best_epoch": result.best_epoch,
            "best_epoch_chosen_on": None if self.data.validation is None else "validation",
            "num_train_epochs": self.recipe.num_train_epochs,
            "num_classes": len(self.data.id2label),
            # Where files lie on this machine is nobody else's business: cards are made of this.
            "dataset": None if Path(self.recipe.data).expanduser().exists() else self.recipe.data,
            "num_images": self._num_images(),
            **result.metrics,
            "notes": notes,
            "versions": {name: version(name) for name in ("prompt_cam_hf", "transformers", "torch")},
        }
        write_atomically(folder / RESULTS_FILE, (json.dumps(facts, indent=2) + "\n").encode())


def train(recipe: Recipe, data: ImageData | None = None) -> TrainResult:
    """Train as the recipe says.

    Args:
        recipe: The settings.
        data: Images in place of what `recipe.data` names.

    Returns:
        The finished run, which is also saved in `recipe.output_dir`.

    Raises:
        FileExistsError: `output_dir` is not empty, and the recipe does not say to resume.
        ValueError, OSError: recipe, data and backbone do not fit together; one sentence says which and why.
        FloatingPointError: training diverged.

    Example:
        On a folder `photos` with one folder for each class, with the tiny backbone that comes with the package:

        >>> from prompt_cam_hf import train
        >>> from prompt_cam_hf.birds.backbone import BACKBONE
        >>> from prompt_cam_hf.training.recipe import Recipe
        >>> recipe = Recipe(data="photos", backbone=BACKBONE, output_dir="first_try", num_train_epochs=2,
        ...                 warmup_epochs=0)
        >>> result = train(recipe)
        >>> sorted(result.metrics)
        ['chance', 'largest_class', 'validation']
    """
    return prepare_run(recipe, data).train()


def prepare_run(recipe: Recipe, data: ImageData | None = None) -> Run:
    """Do all of `train` that can be refused, before the first step; raises what `train` raises."""
    arguments = training_arguments(recipe)
    _check_writable(Path(recipe.output_dir))
    checkpoint = on_main_process(partial(_find_checkpoint, recipe))
    if recipe.hub_model_id and arguments.should_save:
        _check_upload(recipe)
    data = data or on_main_process(partial(load_data, recipe))
    if recipe.train_batch_size > len(data.train):
        raise ValueError(
            f"train_batch_size is {recipe.train_batch_size}, but there are only {len(data.train)} training images; "
            "choose at most as many."
        )
    if arguments.should_save:
        for note in find_weaknesses(data):
            logger.warning(note)
    # The order of these two makes the prompts the same in every process and every time.
    set_seed(recipe.seed)
    model = _build_model(recipe, data.id2label).to(arguments.device)
    image_processor = _build_image_processor(recipe)
    on_resnet = getattr(model.config, "is_on_resnet", False)
    if recipe.resizing == "detr" and not on_resnet:
        raise ValueError(f"resizing: detr is for a DETR's ResNet, and {recipe.backbone} is a vision transformer.")
    patch_grid = None if on_resnet else _find_patch_grid(model.backbone, recipe, image_processor)
    train_dataset, eval_dataset = _training_data(recipe, data, image_processor, model, arguments)
    arguments.warmup_steps = recipe.warmup_epochs * -(-len(data.train) // recipe.train_batch_size)
    if eval_dataset is None:
        arguments.eval_strategy = IntervalStrategy.NO
    trainer = PromptCAMTrainer(
        model,
        arguments,
        eval_every_epochs=recipe.eval_every_epochs,
        backbone_learning_rate=recipe.backbone_learning_rate,
        drop_rate_at_epoch=recipe.drop_rate_at_epoch,
        data_collator=FeatureCollator(patch_grid),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        compute_metrics=build_compute_metrics(),
    )
    return Run(recipe, data, image_processor, trainer, checkpoint)


def _build_model(recipe: Recipe, id2label: dict[int, str]) -> PrefixModel:
    """The method's model with new, untrained parameters on the pre-trained backbone."""
    common: dict[str, Any] = {"id2label": id2label, "revision": recipe.backbone_revision}
    if recipe.method == "linear_probe":
        return LinearProbe(build_linear_probe(recipe.backbone, **common))
    if recipe.method == "intr":
        frozen = not recipe.backbone_learning_rate
        return INTRForImageClassification.from_backbone(
            recipe.backbone, freeze_backbone=frozen, **common, **recipe.intr
        )
    common |= {name: getattr(recipe, name) for name in ("first_prompt_layer", "prompt_dropout", "drop_path_rate")}
    if recipe.method == "vpt":
        num_prompts = len(id2label) if recipe.num_agnostic_prompts is None else recipe.num_agnostic_prompts
        deep = recipe.class_prompt_layer == -1
        return VPTForImageClassification.from_backbone(recipe.backbone, num_prompts=num_prompts, deep=deep, **common)
    return PromptCAMForImageClassification.from_backbone(
        recipe.backbone,
        class_prompt_layer=recipe.class_prompt_layer,
        num_agnostic_prompts=recipe.num_agnostic_prompts,
        **common,
    )


def _check_writable(folder: Path) -> None:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Nothing can be written to the output folder {folder}: {there} is "
            f"{'read-only' if there.is_dir() else 'a file'}; choose another output_dir."
        )


def _find_checkpoint(recipe: Recipe) -> Path | None:
    """Where to start in `output_dir`: at a checkpoint, or, where that is None, from nothing."""
    folder, resume = Path(recipe.output_dir), recipe.resume_from_checkpoint
    checkpoint = None
    if holds_run(folder, resume):
        check_same_recipe(recipe, folder)
        checkpoint = newest_checkpoint(folder)
    if isinstance(resume, str) and resume != "auto":
        checkpoint = next((path for path in complete_checkpoints(folder) if path.samefile(resume)), None)
        if checkpoint is None:
            raise FileNotFoundError(f"{resume} is not a complete checkpoint of the output folder {folder}.")
    return checkpoint


def holds_run(folder: Path, resume: bool | str) -> bool:
    """Whether there is a run in the output folder to go on with, as `resume_from_checkpoint` asks.

    Raises:
        FileExistsError: the folder holds something, and the recipe does not say to resume.
    """
    if not folder.exists() or all(path.name == LOCK_FILE for path in folder.iterdir()):
        return False
    if resume is False:
        raise FileExistsError(
            f"The output folder {folder} is not empty; choose another output_dir, or go on with the run that is in "
            "it: --resume_from_checkpoint."
        )
    return True


def check_same_recipe(recipe: Recipe, folder: Path) -> None:
    """Refuse to go on with a run in a folder with another recipe than it was started with.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a key differs that changes what is computed.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise FileNotFoundError(f"The output folder {folder} holds no run to resume: {RECIPE_FILE} is missing.")
    before = load_recipe(folder / RECIPE_FILE)
    for name in sorted(vars(recipe).keys() - _CHANGEABLE_KEYS):
        old, new = getattr(before, name), getattr(recipe, name)
        if old != new:
            raise ValueError(
                f"The run in {folder} has {name} {old!r}, the recipe says {new!r}; a run that is resumed keeps its "
                "recipe."
            )


def load_data(recipe: Recipe) -> ImageData:
    """Load the images that a recipe names; raises what `load_image_data` raises."""
    return load_image_data(
        recipe.data,
        name=recipe.data_name,
        revision=recipe.data_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        validation_fraction=recipe.validation_fraction,
        seed=recipe.seed,
        skip_unreadable=recipe.skip_unreadable,
    )


def _build_image_processor(recipe: Recipe) -> BaseImageProcessor:
    """The backbone's own image processor, unless the recipe says what is done instead."""
    given = {name: getattr(recipe, name) for name in ("image_size", "image_mean", "image_std")}
    given = {name: value for name, value in given.items() if value is not None}
    if recipe.resizing == "detr":
        return build_detr_image_processor()
    if given:
        return build_image_processor(**given)
    try:
        return backbone_image_processor(recipe.backbone, revision=recipe.backbone_revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The backbone {recipe.backbone} does not say which images it expects; give image_size, image_mean and "
            f"image_std. The reason was: {error}"
        ) from error


def _find_patch_grid(
    backbone: PreTrainedModel, recipe: Recipe, image_processor: BaseImageProcessor
) -> tuple[int, int]:
    size = output_size(image_processor)
    try:
        with torch.no_grad():
            embed(backbone, torch.zeros(1, 3, *size, device=backbone.device), interpolate_pos_encoding=False)
        return grid_size(backbone.config, *size)
    except ValueError as error:
        rows, columns = image_size(backbone.config)
        raise ValueError(
            f"image_size is {size[0]}, but the backbone {recipe.backbone} takes images of {rows}x{columns} pixels."
        ) from error


def _training_data(
    recipe: Recipe,
    data: ImageData,
    image_processor: BaseImageProcessor,
    model: PrefixModel,
    arguments: TrainingArguments,
) -> tuple[Dataset, Dataset | None]:
    """Training and validation images, or what the fixed first layers make of them."""
    augmentation = DetrAugmentation if recipe.resizing == "detr" else TrainingAugmentation
    transform = augmentation(image_processor, recipe.seed) if recipe.augmentation else image_processor
    train_images = ImageDataset(data.train, transform)
    eval_images = None if data.validation is None else ImageDataset(data.validation, image_processor)
    cache_dir = recipe.cache_dir or DEFAULT_CACHE_DIR
    readers = num_workers(recipe, reads_images=True)
    if recipe.cache_images:
        train_images = cache_images(train_images, cache_dir, num_workers=readers)
        eval_images = None if eval_images is None else cache_images(eval_images, cache_dir, num_workers=readers)
    if not recipe.cache_features:
        return train_images, eval_images
    cached: Callable[..., FeatureDataset] = partial(
        cache_features,
        model,
        cache_dir=cache_dir,
        autocast_dtype=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None,
        batch_size=recipe.eval_batch_size,
        num_workers=readers,
    )
    num_views = min(recipe.cache_views, recipe.num_train_epochs) if recipe.augmentation else 1
    train_features = cached(dataset=train_images, num_views=num_views)
    return train_features, None if eval_images is None else cached(dataset=eval_images)


def _report(trainer: PromptCAMTrainer, dataset: Dataset) -> dict[str, Any]:
    predictions = trainer.predict(dataset)
    return ClassificationReport(keep_in_memory=True).compute(
        predictions=predictions.predictions, references=predictions.label_ids
    )


def _check_upload(recipe: Recipe) -> None:
    """Refuse now what the Hub would refuse after the last epoch."""
    repo_id = str(recipe.hub_model_id)
    check_repo_id(repo_id)
    check_license(ModelCardData(license=recipe.hub_license))
    with explained_upload_errors(repo_id):
        HfApi(token=find_token(None)).whoami()


def _upload(folder: Path, recipe: Recipe) -> None:
    repo_id = str(recipe.hub_model_id)
    try:
        publish(folder, repo_id, private=recipe.hub_private_repo, license=recipe.hub_license)
    except Exception as error:  # whatever it is, what was trained must not seem lost
        raise OSError(
            f"The model is trained and saved in {folder}, but not uploaded: {tell_error(error)} Then: prompt-cam "
            f"publish {folder} {repo_id} --license {recipe.hub_license}"
        ) from error


@contextmanager
def one_sentence_exit(*documented: type[Exception]) -> Iterator[None]:
    """End the program with one sentence, which the first process alone prints, where it fails or is interrupted.

    `documented` are kinds of errors that tell a user what to do, beside OSError and ValueError.
    """
    limit_waiting()
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        yield
    except KeyboardInterrupt:
        if is_first:
            print(f"\n{INTERRUPTED}", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        sentence = f"error: {tell_error(error, (OSError, ValueError, *documented))}"
        if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            # The launcher of several processes ends with a summary, which quotes this.
            Path(path).write_text(json.dumps({"message": sentence, "timestamp": int(time.time())}))
        raise SystemExit(sentence if is_first else 1) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program `RECIPE [--key value ...]`, by default with the words of this process."""
    with one_sentence_exit(TypeError):
        recipe = parse_recipe(sys.argv[1:] if arguments is None else arguments)
    with one_sentence_exit(FloatingPointError):
        prepare_run(recipe).train()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
