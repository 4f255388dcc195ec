# SPDX-License-Identifier: MIT
"""The card of a model: `read_card_facts` gathers what is known about it (`CardFacts`), `render_card` writes the card.

What is not known is left out. The text is the Jinja template `model_cards/template.md`; the Hub reads the metadata at
its top. The finished cards in `model_cards/` are those of the official checkpoints (`official.py`).
"""

import html
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.hub.upload import is_hub_id
from prompt_cam_hf.messages import one_line
from prompt_cam_hf.modeling import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import patch_size

TAGS = ["prompt-cam", "interpretability", "explainable-ai", "fine-grained-classification", "vision-transformer"]

# The keys of a recipe that determine what was computed. The others are about files and the machine.
RECIPE_KEYS = (
    "optimizer", "learning_rate", "momentum", "weight_decay", "train_batch_size", "num_train_epochs", "warmup_epochs",
    "warmup_learning_rate", "min_learning_rate", "prompt_dropout", "drop_path_rate", "augmentation",
    "validation_fraction", "seed", "bf16", "fp16",
)  # fmt: skip

# The name of a data set of files, since names of folders may be private.
_OWN_IMAGES = "own images"
_METRICS = {"top1": "top-1", "top5": "top-5", "macro_accuracy": "macro accuracy"}
_HUB_DATASET = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True)
class GalleryImage:
    """A figure of trait maps: its path in the repository, what it shows, and the path of the photo that it shows."""

    file: str
    caption: str
    photo: str


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known about a Prompt-CAM. The card leaves out what is not given.

    Attributes:
        repo_id: The repository, as owner/name.
        license: The model's licence, by its identifier on the Hub; if that is "other", `license_name` and
        `license_link`
            say which.
        class_names: The classes in the order of their numbers.
        backbone: The Hub id of the backbone; `backbone_revision` is a branch, tag or commit.
        prompts_only: The repository does not contain the backbone.
        model_facts: Further rows of the table that describes the model, by their names.
        dataset_name: What the model was trained on, at `dataset_url`; one on the Hub also becomes metadata.
        dataset_license: The terms of that data set, in plain words.
        num_images: The number of images by split.
        accuracy: By split (validation, test, chance): top1, top5 and macro_accuracy, 0 to 1; the notes are sentences
            below the table: how the epoch was chosen, who measured.
        evaluation: By metric: its value, and optionally low, high, num_images and protocol; notes as above.
        gallery: Figures of trait maps, whose photos become examples of the Hub's widget; `gallery_license` is the
            licence of the photos.
        recipe: The settings of the training, below the sentences of `recipe_notes`.
        versions: The versions of libraries, by name.
        source_name: Who reports the numbers at `source_url`, if not the publisher.
        made_by: The command that makes the model in a folder called `name`, where no repository holds it.
        metadata: Further fields of `huggingface_hub.ModelCardData`; they replace those made from the facts.

    Raises:
        ValueError: there is a gallery, but the licence of its photos is not given.
    """

    repo_id: str
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    class_names: Sequence[str] = ()
    backbone: str | None = None
    backbone_revision: str | None = None
    prompts_only: bool = False
    model_facts: Mapping[str, str] = field(default_factory=dict)
    dataset_name: str | None = None
    dataset_url: str | None = None
    dataset_license: str | None = None
    num_images: Mapping[str, int] = field(default_factory=dict)
    accuracy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    accuracy_notes: Sequence[str] = ()
    evaluation: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation_notes: Sequence[str] = ()
    gallery: Sequence[GalleryImage] = ()
    gallery_license: str | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    source_name: str | None = None
    source_url: str | None = None
    made_by: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that photos are shown only under a licence."""
        if self.gallery and not self.gallery_license:
            raise ValueError(
                "Trait maps show the photos that they were made from, so the photos' licence must be given."
            )

    @property
    def name(self) -> str:
        """What the model is called: its repository, without the owner."""
        return self.repo_id.split("/")[-1]

    def hub_metadata(self) -> ModelCardData:
        """The metadata at the top of the card, which the Hub reads."""
        match = _HUB_DATASET.fullmatch(self.dataset_url or "")
        hub_dataset = match[1] if match else None
        results = _eval_results(self, hub_dataset)
        fields: dict[str, Any] = {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
            "base_model": self.backbone,
            "datasets": [hub_dataset] if hub_dataset else None,
            "library_name": "transformers",
            "pipeline_tag": "image-classification",
            "tags": TAGS,
            "widget": [
                {"src": hf_hub_url(self.repo_id, image.photo), "example_title": image.caption}
                for image in self.gallery
            ]
            or None,
            "metrics": ["accuracy"] if results else None,
            "eval_results": results or None,
            "model_name": self.name if results else None,
            **self.metadata,
        }
        return ModelCardData(**fields)


def load_template(package: str, path: str) -> jinja2.Template:
    """A template of a card in Markdown; a name that it is not given is an error."""
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(files(package).joinpath(path).read_text("utf-8"))


def render_card(facts: CardFacts) -> ModelCard:
    """Write the card; metadata that huggingface_hub does not accept are a ValueError."""
    template = load_template("prompt_cam_hf.model_cards", "template.md")
    class_names = list(map(one_line, facts.class_names))
    text = template.render(
        vars(facts)
        | {
            "metadata": facts.hub_metadata().to_yaml(),
            "title": facts.name,
            "class_names": class_names,
            "fence": _fence(class_names),
            "backbone_fetched_from": _backbone(facts, "@") if facts.prompts_only else None,
            "description": {name: _cell(value) for name, value in _description(facts).items()},
            "accuracy": _accuracy_table(facts),
            "evaluation": _evaluation_table(facts),
            "recipe": yaml.safe_dump(dict(facts.recipe), sort_keys=False).strip() if facts.recipe else None,
        }
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))


def read_card_facts(
    folder: str | os.PathLike,
    repo_id: str,
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    prompts_only: bool = False,
    evaluation_folder: str | os.PathLike | None = None,
    **given: Any,
) -> CardFacts:
    """Gather what training and evaluation left in a folder, what the model itself tells, and what is given.

    In the folder, results.json, recipe.yaml and evaluation.json are looked for; each may be missing, and the last may
    be in `evaluation_folder`. Fields of `CardFacts` that are given, such as license, replace what was found.

    Raises:
        ValueError: a file is not what training or evaluation writes.
        FileNotFoundError: `evaluation_folder` holds no evaluation.
    """
    folder = Path(folder)
    evaluation_file = Path(evaluation_folder or folder, "evaluation.json")
    if evaluation_folder and not evaluation_file.is_file():
        raise FileNotFoundError(
            f"There is no evaluation.json in {evaluation_folder}; `prompt-cam evaluate` writes it."
        )
    results, evaluation = _read(folder / "results.json"), _read(evaluation_file)
    settings = _read(folder / "recipe.yaml")
    recipe = {key: settings[key] for key in RECIPE_KEYS if key in settings}
    if recipe.get("optimizer") == "adamw":
        recipe.pop("momentum", None)
    protocol = evaluation.get("protocol")
    found: dict[str, Any] = {
        "class_names": [model.config.id2label[index] for index in range(model.config.num_labels)],
        "backbone": model.config.backbone_name_or_path if is_hub_id(model.config.backbone_name_or_path) else None,
        "backbone_revision": model.config.backbone_revision,
        "num_images": results.get("num_images", {}),
        "accuracy": {name: results[name] for name in ("validation", "test", "chance") if name in results},
        "accuracy_notes": _describe_choice(results),
        "evaluation": _measured(evaluation, evaluation_file),
        "evaluation_notes": [f"Protocol: {protocol}."] if isinstance(protocol, str) else [],
        "recipe": recipe,
        "versions": results.get("versions", {}),
        **_dataset(results),
        **given,
    }
    found["model_facts"] = _describe_model(model) | _describe_input(image_processor) | given.get("model_facts", {})
    return CardFacts(repo_id=repo_id, prompts_only=prompts_only, **found)


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file; empty if there is no such file."""
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold names and values, not {type(content).__name__}.")
    return content


def _dataset(results: Mapping[str, Any]) -> dict[str, str]:
    """What training recorded of its data: their id on the Hub, or only that they are files of the publisher."""
    if "dataset" not in results:
        return {}
    name = results["dataset"]
    if name is None:
        return {"dataset_name": _OWN_IMAGES}
    url = {"dataset_url": f"https://huggingface.co/datasets/{name}"} if "/" in name else {}
    return {"dataset_name": name, **url}


def _measured(evaluation: Mapping[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """The metrics of an evaluation that have a value; metrics that could not be computed have null."""
    metrics = evaluation.get("metrics", {})
    for name, metric in metrics.items() if isinstance(metrics, dict) else [("metrics", metrics)]:
        if not isinstance(metric, dict) or not isinstance(metric.get("value", ""), int | float | None):
            raise ValueError(f"{path}: {name!r} has no number as its value.")
    return {name: metric for name, metric in metrics.items() if metric["value"] is not None}


def _describe_model(model: PromptCAMForImageClassification) -> dict[str, str]:
    config: PromptCAMConfig = model.config
    shape = config.backbone_config
    rows, columns = patch_size(shape)
    layer, last = config.class_layer, shape.num_hidden_layers - 1
    agnostic = config.agnostic_prompts_per_layer if config.num_agnostic_layers else 0
    variant = "Deep" if layer == last else "Shallow" if layer == 0 else "between Deep and Shallow"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "Vision transformer": f"{shape.num_hidden_layers} layers of {shape.hidden_size} channels and "
        f"{shape.num_attention_heads} heads, patches of {rows}x{columns} pixels",
        "Prompts": f"{config.num_labels} class prompts from layer {layer} on ({variant}; layers are 0 to {last})"
        + (f", {agnostic} class-agnostic prompts in each of {config.num_agnostic_layers} layers" if agnostic else ""),
        "Trained parameters": f"{trained:,}",
    }


def _describe_input(image_processor: BaseImageProcessor) -> dict[str, str]:
    settings = image_processor.to_dict()
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if not size or not {"height", "width"} <= set(size):
        return {}
    text = f"{size['height']}x{size['width']} pixels"
    if settings.get("do_normalize"):
        text += f", mean {_numbers(settings['image_mean'])}, standard deviation {_numbers(settings['image_std'])}"
    return {"Input": text}


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _describe_choice(results: Mapping[str, Any]) -> list[str]:
    if "best_epoch" not in results:
        return []
    epoch = f"Epoch {results['best_epoch']} of {results['num_train_epochs']}"
    chosen_on = results.get("best_epoch_chosen_on")
    if chosen_on is None:
        return [f"{epoch}, the last one: no images were held out to choose it on."]
    return [
        f"{epoch}, chosen on the {chosen_on} images."
        + (" The test images were used for no choice." if "test" in results else "")
    ]


def _description(facts: CardFacts) -> dict[str, str]:
    """The table that describes the model."""
    dataset, license = facts.dataset_name, facts.license
    rows = {
        "Backbone": _backbone(facts, ", revision "),
        "Classes": str(len(facts.class_names)) if facts.class_names else None,
        **facts.model_facts,
        "Trained on": f"[{dataset}]({facts.dataset_url})" if dataset and facts.dataset_url else dataset,
        "Images": ", ".join(f"{split} {number:,}" for split, number in facts.num_images.items()),
        "Licence of the data": facts.dataset_license,
        "Licence of the model": f"[{facts.license_name}]({facts.license_link})" if facts.license_name else license,
    }
    return {name: value for name, value in rows.items() if value}


def _backbone(facts: CardFacts, separator: str) -> str | None:
    return separator.join(filter(None, (facts.backbone, facts.backbone_revision))) or None


def _accuracy_table(facts: CardFacts) -> list[list[str]]:
    if not facts.accuracy:
        return []
    number = facts.num_images
    measured = {
        key: name for key, name in _METRICS.items() if any(key in values for values in facts.accuracy.values())
    }
    rows = [["", "images", *measured.values()]]
    for split, values in facts.accuracy.items():
        percent = [f"{values[key]:.1%}" if key in values else "" for key in measured]
        rows.append([split, f"{number[split]:,}" if split in number else "", *percent])
    return _without_empty_columns(rows)


def _evaluation_table(facts: CardFacts) -> list[list[str]]:
    rows = [["metric", "value", "interval", "images", "protocol"]]
    for name, metric in facts.evaluation.items():
        bounds = [metric.get("low"), metric.get("high")]
        interval = "" if None in bounds else f"{bounds[0]:.4g} to {bounds[1]:.4g}"
        number = f"{metric['num_images']:,}" if metric.get("num_images") else ""
        texts = (name, f"{metric['value']:.4g}", interval, number, metric.get("protocol") or "")
        rows.append([_cell(text) for text in texts])
    return _without_empty_columns(rows) if facts.evaluation else []


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    return [[row[index] for index in kept] for row in rows]


def _eval_results(facts: CardFacts, hub_dataset: str | None) -> list[EvalResult]:
    """The results that the Hub lists; each must name a data set."""
    name = facts.dataset_name
    if not name:
        return []
    measured: list[tuple[str | None, str, str, float]] = [
        (split, "accuracy", f"{_METRICS[key]} accuracy" if key != "macro_accuracy" else _METRICS[key], value)
        for split, values in facts.accuracy.items()
        for key, value in values.items()
        if split != "chance" and key in _METRICS
    ]
    measured += [
        (None, metric, f"{metric} ({values['protocol']})" if values.get("protocol") else metric, values["value"])
        for metric, values in facts.evaluation.items()
    ]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=hub_dataset or re.sub(r"[^\w.-]+", "-", name.lower()).strip("-"),
            dataset_name=name,
            dataset_split=split,
            metric_type=metric_type,
            metric_name=metric_name,
            metric_value=value,
            source_name=facts.source_name,
            source_url=facts.source_url,
        )
        for split, metric_type, metric_name, value in measured
    ]


def _cell(text: str) -> str:
    """Text on one line, without what would end the cell of a Markdown table."""
    return html.escape(one_line(text)).replace("|", "\\|")


def _fence(lines: Sequence[str]) -> str:
    """A fence that none of the lines can close."""
    return "`" * max(3, *(len(run) + 1 for line in lines for run in re.findall("`+", line)), 3)
