# SPDX-License-Identifier: MIT
"""How do the recorded facts of a model become its card? What nobody recorded is left out, and nothing is made up.

The text is the Jinja template `model_cards/template.md`; the metadata on top is what the Hub reads.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.hub.upload import is_hub_id
from prompt_cam_hf.modeling import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import patch_size

TAGS = ["prompt-cam", "interpretability", "explainable-ai", "fine-grained-classification", "vision-transformer"]

# Keys of a recipe that say what was computed. The others say where files were and how the machine was used.
RECIPE_KEYS = (
    "optimizer", "learning_rate", "momentum", "weight_decay", "train_batch_size", "num_train_epochs", "warmup_epochs",
    "warmup_learning_rate", "min_learning_rate", "prompt_dropout", "drop_path_rate", "augmentation",
    "validation_fraction", "seed", "bf16", "fp16",
)  # fmt: skip

_METRICS = {"top1": "top-1", "top5": "top-5", "macro_accuracy": "macro accuracy"}
_HUB_DATASET = re.compile(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+)/?")


@dataclass(frozen=True)
class GalleryImage:
    """An image of trait maps in the repository.

    Attributes:
        file: Its name there.
        caption: What it shows.
    """

    file: str
    caption: str


class PromptCAMModelCardData(ModelCardData):
    """What a Prompt-CAM's card says: the metadata that the Hub reads, and the facts of its text.

    Args:
        repo_id: The repository, as owner/name.
        license: The model's licence, by its identifier on the Hub.
        class_names: In the order of their numbers.
        backbone: Hub id of the backbone.
        backbone_revision: Branch, tag or commit of that repository.
        prompts_only: The repository has no backbone.
        model_facts: More rows for the table of what the model is, by their names.
        dataset_name: What the model was trained on.
        dataset_url: Where that is. An address on the Hub also becomes metadata.
        dataset_license: Under what terms, in plain words.
        num_images: Photos by split.
        accuracy: top1, top5 and macro_accuracy, 0 to 1, by split (validation, test, chance).
        accuracy_notes: Sentences below the table: how the epoch was chosen, who measured.
        evaluation: value, and perhaps low, high, num_images and protocol, by metric.
        evaluation_notes: Sentences below the table.
        gallery: Images of trait maps.
        gallery_license: Licence of their photos.
        recipe: Settings of the training.
        recipe_notes: Sentences above the settings.
        versions: Versions of libraries, by name.
        source_name: Who reports the numbers, if it is not who publishes them.
        source_url: Where.
        **metadata: Further fields of `huggingface_hub.ModelCardData`.

    Raises:
        ValueError: there are images, but nothing is said about the licence of their photos.
    """

    def __init__(
        self,
        *,
        repo_id: str,
        license: str | None = None,
        class_names: Sequence[str] = (),
        backbone: str | None = None,
        backbone_revision: str | None = None,
        prompts_only: bool = False,
        model_facts: Mapping[str, str] | None = None,
        dataset_name: str | None = None,
        dataset_url: str | None = None,
        dataset_license: str | None = None,
        num_images: Mapping[str, int] | None = None,
        accuracy: Mapping[str, Mapping[str, float]] | None = None,
        accuracy_notes: Sequence[str] = (),
        evaluation: Mapping[str, Mapping[str, Any]] | None = None,
        evaluation_notes: Sequence[str] = (),
        gallery: Sequence[GalleryImage] = (),
        gallery_license: str | None = None,
        recipe: Mapping[str, Any] | None = None,
        recipe_notes: Sequence[str] = (),
        versions: Mapping[str, str] | None = None,
        source_name: str | None = None,
        source_url: str | None = None,
        **metadata: Any,
    ):
        if gallery and not gallery_license:
            raise ValueError(
                "Trait maps show the photos that they were made from, so the photos' licence must be given."
            )
        text = {
            name: value for name, value in locals().items() if name not in ("self", "__class__", "license", "metadata")
        }
        hub_dataset = _HUB_DATASET.fullmatch(dataset_url or "")
        self.text: dict[str, Any] = {}
        results = _eval_results(text, hub_dataset[1] if hub_dataset else None)
        defaults = {
            "base_model": backbone,
            "datasets": [hub_dataset[1]] if hub_dataset else None,
            "library_name": "transformers",
            "pipeline_tag": "image-classification",
            "tags": TAGS,
            "metrics": ["accuracy"] if results else None,
            "eval_results": results or None,
            "model_name": repo_id.split("/")[-1] if results else None,
        }
        super().__init__(license=license, **(defaults | metadata))
        self.text = text

    def _to_dict(self, data_dict: dict[str, Any]) -> None:
        super()._to_dict(data_dict)
        del data_dict["text"]


def render_card(data: PromptCAMModelCardData) -> ModelCard:
    """The card that says what is known, and nothing else.

    Raises:
        ValueError: huggingface_hub does not accept the metadata.
    """
    facts = data.text
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("prompt_cam_hf.model_cards").joinpath("template.md").read_text("utf-8"))
    what = f"Prompt-CAM on {_short(facts['backbone'])}" if facts["backbone"] else "Prompt-CAM"
    text = template.render(
        facts
        | {
            "card_data": data.to_yaml(),
            "title": f"{what}: {facts['dataset_name']}" if facts["dataset_name"] else what,
            "backbone_fetched_from": _backbone(facts, "@") if facts["prompts_only"] else None,
            "facts": {name: _cell(value) for name, value in _facts(data).items()},
            "accuracy": _accuracy_table(facts),
            "evaluation": _evaluation_table(facts),
            "recipe": yaml.safe_dump(dict(facts["recipe"]), sort_keys=False).strip() if facts["recipe"] else None,
        }
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))


def read_card_data(
    folder: str | os.PathLike,
    repo_id: str,
    model: PromptCAMForImageClassification,
    image_processor: BaseImageProcessor,
    prompts_only: bool = False,
    evaluation_folder: str | os.PathLike | None = None,
    **given: Any,
) -> PromptCAMModelCardData:
    """What training and evaluation left in a folder, the model itself, and what is given, together.

    Args:
        folder: Where results.json, recipe.yaml and evaluation.json are looked for; each may be missing.
        repo_id: The repository, as owner/name.
        model: The model in that folder.
        image_processor: Its image processor.
        prompts_only: The repository will have no backbone.
        evaluation_folder: Where evaluation.json is, if not in `folder`.
        **given: Further arguments of `PromptCAMModelCardData`, such as license; they win.

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
    recorded = {
        "class_names": [model.config.id2label[index] for index in range(model.config.num_labels)],
        "backbone": model.config.backbone_name_or_path if is_hub_id(model.config.backbone_name_or_path) else None,
        "backbone_revision": model.config.backbone_revision,
        "model_facts": _describe_model(model) | _describe_images(image_processor),
        "num_images": results.get("num_images"),
        "accuracy": {name: results[name] for name in ("validation", "test", "chance") if name in results},
        "accuracy_notes": _describe_choice(results),
        "evaluation": _measured(evaluation, evaluation_file),
        "evaluation_notes": [f"Protocol: {protocol}."] if isinstance(protocol, str) else [],
        "recipe": recipe,
        "versions": results.get("versions"),
    }
    given["model_facts"] = recorded["model_facts"] | given.get("model_facts", {})
    return PromptCAMModelCardData(repo_id=repo_id, prompts_only=prompts_only, **(recorded | given))


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, empty where there is none."""
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


def _measured(evaluation: Mapping[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """The metrics of an evaluation that have a value; null is what could not be computed."""
    metrics = evaluation.get("metrics", {})
    for name, metric in metrics.items() if isinstance(metrics, dict) else [("metrics", metrics)]:
        if not isinstance(metric, dict) or not isinstance(metric.get("value", ""), int | float | None):
            raise ValueError(f"{path}: {name!r} has no number as its value.")
    return {name: metric for name, metric in metrics.items() if metric["value"] is not None}


def _describe_model(model: PromptCAMForImageClassification) -> dict[str, str]:
    config: PromptCAMConfig = model.config
    shape = config.backbone_config
    rows, columns = patch_size(shape)
    layer = config.class_layer + 1
    agnostic = config.agnostic_prompts_per_layer if config.num_agnostic_layers else 0
    variant = "Deep" if layer == shape.num_hidden_layers else "Shallow" if layer == 1 else "between Deep and Shallow"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "Vision transformer": f"{shape.num_hidden_layers} layers of {shape.hidden_size} channels and "
        f"{shape.num_attention_heads} heads, patches of {rows}x{columns} pixels",
        "Prompts": f"{config.num_labels} class prompts from layer {layer} of {shape.num_hidden_layers} on "
        f"({variant})"
        + (f", {agnostic} class-agnostic prompts in each of {config.num_agnostic_layers} layers" if agnostic else ""),
        "Trained parameters": f"{trained:,}",
    }


def _describe_images(image_processor: BaseImageProcessor) -> dict[str, str]:
    settings = image_processor.to_dict()
    size = settings.get("crop_size") if settings.get("do_center_crop") else settings.get("size")
    if not size or not {"height", "width"} <= set(size):
        return {}
    text = f"{size['height']}x{size['width']} pixels"
    if settings.get("do_normalize"):
        text += f", mean {_numbers(settings['image_mean'])}, standard deviation {_numbers(settings['image_std'])}"
    return {"Images": text}


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _describe_choice(results: Mapping[str, Any]) -> list[str]:
    if "best_epoch" not in results:
        return []
    epoch = f"Epoch {results['best_epoch']} of {results['num_train_epochs']}"
    chosen_on = results.get("best_epoch_chosen_on")
    if chosen_on is None:
        return [f"{epoch}, the last one: no photos were held out to choose it on."]
    return [
        f"{epoch}, chosen on the {chosen_on} photos."
        + (" The test photos chose nothing." if "test" in results else "")
    ]


def _facts(data: PromptCAMModelCardData) -> dict[str, str]:
    """The table of what the model is."""
    facts = data.text
    dataset = facts["dataset_name"]
    rows = {
        "Backbone": _backbone(facts, ", revision "),
        **(facts["model_facts"] or {}),
        "Classes": str(len(facts["class_names"])) if facts["class_names"] else None,
        "Trained on": f"[{dataset}]({facts['dataset_url']})" if dataset and facts["dataset_url"] else dataset,
        "Photos": ", ".join(f"{split} {number:,}" for split, number in (facts["num_images"] or {}).items()),
        "Licence of the data": facts["dataset_license"],
        "Licence of the model": f"[{data.license_name}]({data.license_link})" if data.license_name else data.license,
    }
    return {name: value for name, value in rows.items() if value}


def _backbone(facts: Mapping[str, Any], separator: str) -> str | None:
    return separator.join(filter(None, (facts["backbone"], facts["backbone_revision"]))) or None


def _accuracy_table(facts: Mapping[str, Any]) -> list[list[str]]:
    accuracy: Mapping[str, Mapping[str, float]] = facts["accuracy"] or {}
    if not accuracy:
        return []
    number = facts["num_images"] or {}
    measured = {key: name for key, name in _METRICS.items() if any(key in values for values in accuracy.values())}
    rows = [["", "photos", *measured.values()]]
    for split, values in accuracy.items():
        percent = [f"{values[key]:.1%}" if key in values else "" for key in measured]
        rows.append([split, f"{number[split]:,}" if split in number else "", *percent])
    return _without_empty_columns(rows)


def _evaluation_table(facts: Mapping[str, Any]) -> list[list[str]]:
    metrics: Mapping[str, Mapping[str, Any]] = facts["evaluation"] or {}
    rows = [["metric", "value", "interval", "photos", "protocol"]]
    for name, metric in metrics.items():
        bounds = [metric.get("low"), metric.get("high")]
        interval = "" if None in bounds else f"{bounds[0]:.4g} to {bounds[1]:.4g}"
        number = metric.get("num_images")
        texts = (
            name,
            f"{metric['value']:.4g}",
            interval,
            f"{number:,}" if number else "",
            metric.get("protocol") or "",
        )
        rows.append([_cell(text) for text in texts])
    return _without_empty_columns(rows) if metrics else []


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [index for index in range(len(rows[0])) if any(row[index] for row in rows[1:])]
    return [[row[index] for index in kept] for row in rows]


def _eval_results(facts: Mapping[str, Any], hub_dataset: str | None) -> list[EvalResult]:
    """What the Hub lists as results; it wants a data set's name beside each."""
    name = facts["dataset_name"]
    if not name:
        return []
    measured = [
        (split, "accuracy", f"{_METRICS[key]} accuracy" if key != "macro_accuracy" else _METRICS[key], value)
        for split, values in (facts["accuracy"] or {}).items()
        for key, value in values.items()
        if split != "chance" and key in _METRICS
    ]
    measured += [
        (None, metric, f"{metric} ({values['protocol']})" if values.get("protocol") else metric, values["value"])
        for metric, values in (facts["evaluation"] or {}).items()
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
            source_name=facts["source_name"],
            source_url=facts["source_url"],
        )
        for split, metric_type, metric_name, value in measured
    ]


def _short(backbone: str) -> str:
    return backbone.split("/")[-1]


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


__all__ = ["GalleryImage", "PromptCAMModelCardData", "read_card_data", "render_card"]
