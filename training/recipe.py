# SPDX-License-Identifier: MIT
"""The settings of a training run: defaults, recipe files, the command line, and what they mean for Trainer.

The defaults are the official DINO settings (Prompt-CAM, Chowdhury et al., CVPR 2025).
"""

import contextlib
import dataclasses
import difflib
import math
import os
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import numpy as np
import torch
import yaml
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from prompt_cam_hf.data.images import MAX_SIDE
from prompt_cam_hf.messages import one_line
from prompt_cam_hf.training.recipe_files import find_recipe

# Beyond these no machine would come to an end, so they are slips.
_LARGEST = {
    "dataloader_num_workers": 256,
    "eval_batch_size": 100_000,
    "image_size": MAX_SIDE,
    "num_agnostic_prompts": 10_000,
    "seed": 2**32 - 1,
    "train_batch_size": 100_000,
}

# What may stand under the key `intr`.
_INTR_SIZES = {
    *("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"),
    *("encoder_ffn_dim", "decoder_ffn_dim", "activation_function", "dropout", "attention_dropout"),
    "activation_dropout",
}
# What may stand under the key `trainer`, as far as the recipe's own keys do not decide it.
_TRAINER = {argument.name for argument in dataclasses.fields(TrainingArguments)}


def _key(text: str, **default: Any) -> Any:
    """A field that carries its meaning, for --help and docs/reference/recipes.md."""
    return field(metadata={"help": text}, **default)


@dataclass(kw_only=True)
class Recipe:
    """All settings of a training run. The site has the same text as a table (docs/reference/recipes.md).

    Values are converted where nothing is lost (1 for a number, the text "1e-6" that YAML 1.1 makes of 1e-6).

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range, or contradicts another one.
    """

    # Model
    method: Literal["prompt_cam", "linear_probe", "vpt", "intr"] = _key(
        "prompt_cam, or a baseline: vpt has the same prompts and reads CLS (Deep or Shallow, see class_prompt_layer), "
        "linear_probe has none and leaves the settings of prompts aside, and so does intr, an encoder and decoder on "
        "the backbone's patches or on a DETR's ResNet.",
        default="prompt_cam",
    )
    backbone: str = _key("Vision transformer to build on: a Hub id or a folder, in any format of docs/backbones.md.")
    backbone_revision: str | None = _key("Branch, tag or commit of the backbone on the Hub.", default=None)
    class_prompt_layer: int = _key(
        "Layer that class prompts enter, counted from 0: -1 the last (Deep), 0 the first (Shallow).", default=-1
    )
    num_agnostic_prompts: int | None = _key(
        "Class-agnostic prompts in each layer before class_prompt_layer; empty: as many as classes.", default=None
    )
    first_prompt_layer: int = _key("First layer that class-agnostic prompts enter, counted from 0.", default=0)
    prompt_dropout: float = _key("Dropout on the prompts, one mask a batch.", default=0.1)
    drop_path_rate: float = _key("Stochastic depth of the last layer, rising evenly from 0.", default=0.1)

    intr: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Sizes and dropout of method intr, as fields of INTRConfig; empty: the published ones."},
    )

    # Data
    data: str = _key("Images: a folder with train/ (validation/, test/), a CSV or Parquet file, or a Hub id.")
    data_name: str | None = _key("Configuration of a Hub data set.", default=None)
    data_revision: str | None = _key("Branch, tag or commit of a Hub data set.", default=None)
    image_column: str = _key("Column that holds the image or its path.", default="image")
    label_column: str = _key("Column that holds the class.", default="label")
    validation_fraction: float = _key(
        "Part of train to hold out, class by class, where there is no validation split; 0: nothing, keep the "
        "last epoch.",
        default=0.1,
    )
    skip_unreadable: bool = _key("Leave out images that cannot be read and list them.", default=False)
    image_size: int | None = _key(
        "Side in pixels to which every image is squashed. Where this and the next two are empty, images are prepared "
        "as the backbone expects them; where one is given, 224, 0.5 and 0.5 stand for the others.",
        default=None,
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of red, green and blue (0..1) that is subtracted."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of red, green and blue that is divided by."}
    )
    resizing: Literal["squash", "detr"] = _key(
        "detr, for method intr on a DETR's ResNet: images keep their shape, the shorter side becomes 800 pixels, in "
        "training 480 to 800 at random, the longer one at most 1333.",
        default="squash",
    )
    augmentation: bool = _key("Random crops and left-right flips in training.", default=True)

    # Optimisation
    optimizer: Literal["sgd", "adamw"] = _key("sgd or adamw.", default="sgd")
    learning_rate: float = _key("Highest learning rate, reached after the warm-up.", default=0.005)
    backbone_learning_rate: float = _key(
        "Rate of the backbone of method intr, in place of learning_rate; 0: the backbone stays as it is.", default=0.0
    )
    momentum: float = _key("Momentum of sgd; adamw does not use it.", default=0.9)
    weight_decay: float = _key("Weight decay on prompts, head and its bias alike.", default=0.001)
    train_batch_size: int = _key("Images a step, over all processes together.", default=16)
    num_train_epochs: int = _key("Passes over the training images.", default=100)
    warmup_epochs: int = _key("Epochs in which the rate rises.", default=20)
    warmup_learning_rate: float = _key("Rate at the start of the warm-up.", default=0.0)
    min_learning_rate: float = _key("Rate at the end of the cosine.", default=1e-6)
    drop_rate_at_epoch: int | None = _key(
        "Epoch after which the rate is a tenth, constant before and after; in place of warm-up and cosine.",
        default=None,
    )
    seed: int = _key("Seed of prompts, order, augmentation and the validation part.", default=42)

    # Running
    output_dir: str = _key("New folder for model, checkpoints and results.")
    resume_from_checkpoint: bool | str = _key(
        "Go on after an interruption: true, from the newest checkpoint in output_dir, or a checkpoint's path.",
        default=False,
    )
    eval_every_epochs: int = _key("Epochs between looks at validation; the last epoch counts always.", default=1)
    eval_batch_size: int = _key("Images a step and process in evaluation.", default=32)
    bf16: bool = _key("Mixed precision with bfloat16.", default=False)
    fp16: bool = _key("Mixed precision with float16 (older GPUs).", default=False)
    gradient_checkpointing: bool = _key(
        "Less memory, more time: layers run again in the backward pass.", default=False
    )
    dataloader_num_workers: int | None = _key(
        "Processes that read images, 0 for none of their own; empty: one for each processor core, at most 4, and none "
        "with cache_features.",
        default=None,
    )
    cache_images: bool = _key("Open and resize images once, and keep the pixels on disk.", default=False)
    cache_features: bool = _key("Compute once, and keep on disk, what no prompt changes.", default=False)
    cache_views: int = _key("Augmented views of each image to cache, used in turn.", default=10)
    cache_dir: str | None = _key(
        "Folder of cached images and features; empty: with the Hugging Face caches.", default=None
    )
    include_backbone: bool = _key("Save the backbone with the model, so that it stands alone.", default=True)
    hub_model_id: str | None = _key("Upload the finished model to this Hub repository.", default=None)
    hub_private_repo: bool = _key("Make that repository private; one that is public already is refused.", default=True)
    hub_license: str | None = _key("Licence of the uploaded model, such as mit; hub_model_id needs it.", default=None)
    trainer: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Further settings of transformers' TrainingArguments; --trainer.KEY on the command line."},
    )

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(Recipe).items():
            setattr(self, name, _convert(name, getattr(self, name), kind))
        self.backbone, self.output_dir = os.path.expanduser(self.backbone), os.path.expanduser(self.output_dir)
        self._check_ranges()
        self._check_combinations()

    def _check_ranges(self) -> None:
        for name in ("data", "backbone", "output_dir"):
            if not str(getattr(self, name)).strip():
                raise ValueError(f"{name} is empty; the recipe has to name one.")
        for name, value in vars(self).items():
            if not all(math.isfinite(number) for number in np.ravel(value) if isinstance(number, float)):
                raise ValueError(f"{name} must be finite, got {value}.")
        counts = ("train_batch_size", "num_train_epochs", "eval_every_epochs", "eval_batch_size", "drop_rate_at_epoch")
        for name in (*counts, "image_size", "cache_views"):
            _require(getattr(self, name) is None or getattr(self, name) >= 1, self, name, "at least 1")
        for name in ("warmup_epochs", "weight_decay", "dataloader_num_workers", "seed", "backbone_learning_rate"):
            _require((getattr(self, name) or 0) >= 0, self, name, "0 or more")
        for name, most in _LARGEST.items():
            _require((getattr(self, name) or 0) <= most, self, name, f"at most {most:,}")
        for name in ("prompt_dropout", "drop_path_rate", "momentum", "validation_fraction"):
            _require(0 <= getattr(self, name) < 1, self, name, "at least 0 and below 1")
        _require(self.learning_rate > 0, self, "learning_rate", "above 0")
        for name in ("warmup_learning_rate", "min_learning_rate"):
            _require(0 <= getattr(self, name) <= self.learning_rate, self, name, "between 0 and learning_rate")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            _require(values is None or len(values) == 3, self, name, "three numbers, for red, green and blue")
        _require(self.image_std is None or min(self.image_std) > 0, self, "image_std", "above 0")

    def _check_combinations(self) -> None:
        if self.warmup_epochs >= self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must be below num_train_epochs ({self.num_train_epochs}); a "
                "short run needs a short warm-up."
            )
        if self.method == "vpt" and self.class_prompt_layer not in (-1, 0):
            raise ValueError(
                f"class_prompt_layer must be -1 (Deep) or 0 (Shallow) with method vpt, got {self.class_prompt_layer}; "
                "where its prompts enter is first_prompt_layer."
            )
        self._check_intr()
        if self.method == "linear_probe" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing saves nothing with method linear_probe: no layer has a gradient.")
        if self.method != "prompt_cam" and not self.include_backbone:
            raise ValueError(f"include_backbone: false is for prompts; method {self.method} saves whole models only.")
        if self.hub_model_id and not self.hub_license:
            raise ValueError(
                "hub_license must say under which licence the model is uploaded to hub_model_id, by its identifier on "
                "the Hub, such as mit or cc-by-4.0."
            )
        if self.hub_model_id and self.method != "prompt_cam":
            raise ValueError(
                f"hub_model_id is for Prompt-CAMs; method {self.method} saves a model to upload yourself."
            )
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other; choose one.")
        ours = _trainer_settings(self)
        for name in self.trainer:
            if name in ours:
                raise ValueError(f"trainer.{name} is set by the recipe's own keys, and cannot be given under trainer.")
            if name not in _TRAINER:
                raise ValueError(_unknown(f"trainer.{name}", [f"trainer.{key}" for key in _TRAINER - set(ours)]))
        for argument in dataclasses.fields(TrainingArguments):
            if argument.name in self.trainer and argument.type in (bool, int, float):
                value = self.trainer[argument.name]
                self.trainer[argument.name] = _convert(f"trainer.{argument.name}", value, argument.type)
        if self.trainer.get("gradient_accumulation_steps", 1) < 1:
            raise ValueError("trainer.gradient_accumulation_steps must be at least 1.")

    def _check_intr(self) -> None:
        if self.drop_rate_at_epoch is not None and self.warmup_epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup_epochs}, but with drop_rate_at_epoch the rate is constant from the "
                "start; set warmup_epochs to 0."
            )
        if self.method != "intr":
            defaults = {key.name: _default(key) for key in dataclasses.fields(Recipe) if not _is_required(key)}
            for name in ("intr", "backbone_learning_rate", "resizing"):
                if getattr(self, name) != defaults[name]:
                    raise ValueError(f"{name} is for method intr, and the method is {self.method}.")
            return
        for name in self.intr:
            if name not in _INTR_SIZES:
                raise ValueError(_unknown(f"intr.{name}", [f"intr.{key}" for key in _INTR_SIZES]))
        if self.cache_features and self.backbone_learning_rate:
            raise ValueError("cache_features is for a backbone that stays as it is; set backbone_learning_rate to 0.")
        if self.resizing == "detr" and any((self.image_size, self.image_mean, self.image_std)):
            raise ValueError("resizing: detr prepares images as DETR does; leave image_size, _mean and _std out.")
        if self.resizing == "detr" and self.cache_images:
            raise ValueError("cache_images needs images of one size, and resizing: detr draws another in each epoch.")

    def to_yaml(self) -> str:
        """Write the recipe as YAML that gives the same run again; how the run was resumed is left out."""
        values = dataclasses.asdict(self)
        del values["resume_from_checkpoint"]
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load_recipe(path: str | os.PathLike, **overrides: Any) -> Recipe:
    """Read a recipe.

    Args:
        path: A file in YAML, or the name of a recipe that comes with the package, such as "own_photos".
        **overrides: Keys that win over the file.

    Raises:
        FileNotFoundError: there is no such file, and no recipe of that name.
        TypeError, ValueError: the file has other lines than `key: value`, a key is unknown, there twice or missing,
            or `Recipe` refuses a value.

    Example:
        >>> from prompt_cam_hf import load_recipe
        >>> recipe = load_recipe("own_photos", data="photos", output_dir="out")
        >>> recipe.learning_rate
    """
    settings = _read_yaml(find_recipe(path))
    if isinstance(settings.get("trainer"), dict):
        overrides["trainer"] = settings["trainer"] | overrides.get("trainer", {})
    return _build_recipe(settings | overrides)


def parse_recipe(arguments: Sequence[str]) -> Recipe:
    """Read `RECIPE [--key value ...]` as given on the command line; raises what `load_recipe` raises."""
    path, overrides = parse_overrides(arguments)
    return load_recipe(path, **overrides)


def parse_overrides(arguments: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Read `RECIPE [--key value ...]` into the recipe and the keys that win over it, without opening the recipe.

    Raises:
        ValueError: a key is unknown, or a value is not YAML.
    """
    found, rest = command_line_parser().parse_known_args(arguments)
    if rest and not rest[0].startswith("--"):
        raise ValueError(
            f"{rest[0]!r} is neither a key (--key) nor the value of one; name the images by --data, or, with "
            "prompt-cam train, before all keys."
        )
    if rest:
        raise ValueError(
            _unknown(rest[0][2:].partition("=")[0], [*_names(), *(f"trainer.{name}" for name in _TRAINER)])
        )
    given = vars(found)
    path = given.pop("recipe")
    kinds = get_type_hints(Recipe)
    values = {
        name: text if kinds.get(name) in (str, str | None) else _parse_yaml(text, f"--{name}")
        for name, text in given.items()
    }
    overrides = {name: value for name, value in values.items() if name in kinds}
    if trainer := {name[len("trainer.") :]: value for name, value in values.items() if name not in kinds}:
        overrides["trainer"] = trainer
    return path, overrides


def num_workers(recipe: Recipe, *, reads_images: bool) -> int:
    """Count the processes that bring data to each process of the run."""
    if recipe.dataloader_num_workers is not None:
        return recipe.dataloader_num_workers
    if not reads_images:
        return 0
    # What this process may use; macOS and Windows cannot say.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def training_arguments(recipe: Recipe) -> TrainingArguments:
    """Say what the recipe means for `Trainer`; this also joins the other processes, where there are several.

    `warmup_steps` stays 0: only with the data is it known how many steps an epoch has.

    Raises:
        ValueError: the batch cannot be shared evenly by the processes, or `report_to` names what is not installed.
    """
    defaults = {
        "report_to": "none",
        # Loggers that end a run after training take up the same one for the figures of the test split.
        "run_name": os.path.basename(os.path.abspath(recipe.output_dir)),
        # The official recipe does not clip gradients.
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "dataloader_persistent_workers": num_workers(recipe, reads_images=not recipe.cache_features) > 0,
        # Without this, several processes on a machine without a GPU would not know of each other.
        "use_cpu": not torch.accelerator.is_available(),
    }
    arguments = TrainingArguments(**{**defaults, **recipe.trainer, **_trainer_settings(recipe)})
    shares = arguments.world_size * max(1, arguments.n_gpu) * arguments.gradient_accumulation_steps
    if recipe.train_batch_size % shares:
        raise ValueError(
            f"train_batch_size counts the images of all processes together: {recipe.train_batch_size} cannot be "
            f"shared evenly by {shares} (processes x accumulation steps); choose a multiple of {shares}."
        )
    arguments.per_device_train_batch_size = recipe.train_batch_size // shares
    for name in arguments.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"trainer.report_to: {_unknown(name, INTEGRATION_TO_CALLBACK, 'logger')}")
        if name not in get_available_reporting_integrations():
            raise ValueError(
                f"trainer.report_to names {name}, which is not installed; run `pip install {name}`, or leave "
                "report_to out. The extra `logging` of this package brings tensorboard and trackio."
            )
    return arguments


def _trainer_settings(recipe: Recipe) -> dict[str, Any]:
    """The `TrainingArguments` that the recipe's own keys, or the training program, decide."""
    checkpointing = {"activation_checkpointing", "gradient_checkpointing"} & _TRAINER
    same = ("learning_rate", "weight_decay", "num_train_epochs", "seed", "bf16", "fp16")
    return {
        **{name: getattr(recipe, name) for name in same},
        "dataloader_num_workers": num_workers(recipe, reads_images=not recipe.cache_features),
        "output_dir": recipe.output_dir,
        "optim": "adamw_torch" if recipe.optimizer == "adamw" else "sgd",
        "optim_args": f"momentum={recipe.momentum}" if recipe.optimizer == "sgd" else None,
        "per_device_train_batch_size": recipe.train_batch_size,
        "per_device_eval_batch_size": recipe.eval_batch_size,
        "max_steps": -1,
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {
            "min_lr": recipe.min_learning_rate,
            "warmup_lr_rate": recipe.warmup_learning_rate / recipe.learning_rate,
        },
        "warmup_steps": 0,
        # The new name where there is one; the old one is deprecated there.
        min(checkpointing): recipe.gradient_checkpointing,
        "dataloader_drop_last": False,
        "remove_unused_columns": False,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": None,
        "save_only_model": False,
        "logging_strategy": "epoch",
        "logging_nan_inf_filter": False,
        "disable_tqdm": False,
        "metric_for_best_model": "top1",
        "greater_is_better": True,
        "load_best_model_at_end": False,
        "hub_model_id": None,
        "hub_private_repo": None,
        "push_to_hub": False,
        "resume_from_checkpoint": None,
    }


class _CommandLineParser(ArgumentParser):
    """Raises instead of printing the usage of forty keys above the one line that matters."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}. See --help.")


def command_line_parser() -> ArgumentParser:
    """Make the parser of `RECIPE [--key value ...]`, whose help has every key with its default."""
    parser = _CommandLineParser(
        usage="RECIPE [--key value ...]",
        description="Train a Prompt-CAM. A key on the command line wins over the recipe, the recipe over the default.",
        argument_default=SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="File with the keys below, or the name of a recipe.")
    kinds = get_type_hints(Recipe)
    for key in dataclasses.fields(Recipe):
        if key.name == "trainer":
            continue
        default = "" if _is_required(key) else f" Default: {_default(key)}."
        options: dict[str, Any] = {"help": (key.metadata["help"] + default).replace("%", "%%"), "metavar": "VALUE"}
        if bool in (kinds[key.name], *get_args(kinds[key.name])):
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(f"--{key.name}", **options)
    for name in _TRAINER:
        parser.add_argument(f"--trainer.{name}", help=SUPPRESS)
    return parser


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where} is not YAML: {one_line(error)}") from error


def _read_yaml(path: str | os.PathLike) -> dict[str, Any]:
    with open(path, encoding="utf-8") as file:
        text = file.read()
    content = _parse_yaml(text, os.fspath(path))
    keys = [node.value for node, _ in yaml.compose(text).value] if isinstance(content, dict) else []
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} is not a recipe: it must hold lines of the form `key: value`.")
    for key in keys:
        if key not in _names():
            raise ValueError(f"{os.fspath(path)}: {_unknown(key, _names())}")
        if keys.count(key) > 1:
            raise ValueError(f"{os.fspath(path)}: the key {key!r} stands there {keys.count(key)} times.")
    return content


def _build_recipe(settings: Mapping[str, Any]) -> Recipe:
    for name in settings:
        if name not in _names():
            raise ValueError(_unknown(name, _names()))
    missing = [key.name for key in dataclasses.fields(Recipe) if _is_required(key) and settings.get(key.name) is None]
    if missing:
        given = " ".join(f"--{name} ..." for name in missing)
        raise ValueError(f"The recipe has no {' and no '.join(missing)}; add it to the file or give {given}.")
    return Recipe(**settings)


def _convert(name: str, value: Any, kind: Any) -> Any:
    kinds = get_args(kind) if get_origin(kind) is UnionType else (kind,)
    for candidate in kinds:
        with contextlib.suppress(TypeError, ValueError):
            return _as_kind(value, candidate)
    raise TypeError(f"{name} must be {' or '.join(_describe(candidate) for candidate in kinds)}, got {value!r}.")


def _as_kind(value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal and value in get_args(kind):
        return value
    if get_origin(kind) is list and isinstance(value, list | tuple):
        return [_as_kind(item, get_args(kind)[0]) for item in value]
    if get_origin(kind) is dict and isinstance(value, dict):
        return dict(value)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value) is kind:
        return value
    raise TypeError


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    return {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        NoneType: "empty",
        list: "a list of numbers",
        dict: "a mapping of keys to values",
    }[get_origin(kind) or kind]


def _is_required(key: dataclasses.Field) -> bool:
    return key.default is dataclasses.MISSING and key.default_factory is dataclasses.MISSING


def _default(key: dataclasses.Field) -> Any:
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()


def _names() -> list[str]:
    return [key.name for key in dataclasses.fields(Recipe)]


def _unknown(name: Any, names: Iterable[str], what: str = "key") -> str:
    nearest = difflib.get_close_matches(str(name), sorted(names), n=1, cutoff=0)[0]
    return f"unknown {what} {name!r}; the nearest one is {nearest!r}."


def _require(condition: bool, recipe: Recipe, name: str, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {getattr(recipe, name)}.")
