# SPDX-License-Identifier: MIT
"""Model cards: they say what was recorded, and nothing else, and the Hub takes their metadata."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ID2LABEL, tiny_model
from docs_blocks import check_line
from hub_server import metadata, metadata_errors
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.card import (
    RECIPE_KEYS,
    CardFacts,
    GalleryImage,
    read_card_facts,
    render_card,
)
from prompt_cam_hf.hub.official import TOP1, official_card, official_facts
from prompt_cam_hf.training.recipe import Recipe

CARDS = Path(__file__).parents[1] / "model_cards"

RESULTS = {
    "best_epoch": 7,
    "best_epoch_chosen_on": "validation",
    "num_train_epochs": 12,
    "num_classes": 5,
    "num_images": {"train": 1234, "validation": 56, "test": 789},
    "validation": {"top1": 0.75, "top5": 1.0, "macro_accuracy": 0.7},
    "test": {"top1": 0.7125, "top5": 0.98, "macro_accuracy": 0.65},
    "chance": {"top1": 0.2, "top5": 1.0, "macro_accuracy": 0.2},
    "versions": {"transformers": "9.8.7", "torch": "6.5.4"},
}
EVALUATION = {
    "protocol": "the true class of each image",
    "metrics": {
        "insertion": {"value": 0.61234, "low": 0.6, "high": 0.625, "protocol": "rise | 5 heads", "num_images": 1000},
        "deletion": {"value": 0.09, "low": None, "high": None, "num_images": 7},
        "not computed": {"value": None},
    },
}


@pytest.fixture
def folder(tmp_path):
    """What training and evaluation leave behind."""
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    recipe = {"backbone": "/home/me/vit", "data": "/home/me/photos", "optimizer": "sgd", "learning_rate": 0.025}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def card_of(folder, **given) -> ModelCard:
    model = tiny_model()
    data = read_card_facts(folder, "me/birds", model, build_image_processor(32), **({"license": "mit"} | given))
    return render_card(data)


def rows(card: ModelCard, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the line under its head."""
    section = card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if set("".join(row)) - {"-"} or not "".join(row)]


def test_a_card_says_what_was_recorded(folder):
    card = card_of(
        folder,
        dataset_name="Garden birds",
        dataset_url="https://huggingface.co/datasets/me/garden",
        dataset_license="CC BY 4.0",
        gallery=[GalleryImage("trait_maps/1.png", "Robin, score 98%", "trait_maps/1.jpg")],
        gallery_license="CC0",
    )
    assert rows(card, "Accuracy") == [
        ["", "images", "top-1", "top-5", "macro accuracy"],
        ["validation", "56", "75.0%", "100.0%", "70.0%"],
        ["test", "789", "71.2%", "98.0%", "65.0%"],
        ["chance", "", "20.0%", "100.0%", "20.0%"],
    ]
    assert "Epoch 7 of 12, chosen on the validation images. The test images were used for no choice." in card.text
    assert rows(card, "Evaluation") == [
        ["metric", "value", "interval", "images", "protocol"],
        ["insertion", "0.6123", "0.6 to 0.625", "1,000", r"rise \| 5 heads"],
        ["deletion", "0.09", "", "7", ""],
    ]
    assert "Protocol: the true class of each image." in card.text
    facts = dict(rows(card, "Description")[1:])
    assert facts["Trained on"] == "[Garden birds](https://huggingface.co/datasets/me/garden)"
    assert facts["Licence of the data"] == "CC BY 4.0" and facts["Licence of the model"] == "mit"
    assert facts["Images"] == "train 1,234, validation 56, test 789"
    assert facts["Vision transformer"] == "3 layers of 32 channels and 4 heads, patches of 8x8 pixels"
    assert facts["Prompts"].startswith(
        "5 class prompts from layer 2 on (Deep; layers are 0 to 2), 5 class-agnostic prompts in each of 2"
    )
    # Class prompts, class-agnostic prompts of two layers, and a classifier with a bias.
    assert facts["Trained parameters"] == str(5 * 32 + 2 * 5 * 32 + 32 + 1)
    assert facts["Input"] == "32x32 pixels, mean (0.5, 0.5, 0.5), standard deviation (0.5, 0.5, 0.5)"
    assert "\n".join(ID2LABEL.values()) in card.text
    assert "![Robin, score 98%](trait_maps/1.png)" in card.text and "Licence of the photos: CC0." in card.text
    assert "learning_rate: 0.025" in card.text and "/home/me" not in card.content
    assert "- transformers 9.8.7\n- torch 6.5.4\n" in card.text


def test_metadata(folder):
    card = card_of(folder, dataset_name="Garden birds", dataset_url="https://huggingface.co/datasets/me/garden")
    assert metadata_errors(card.content) == []
    data = metadata(card.content)
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-classification"
    assert data["datasets"] == ["me/garden"] and data["license"] == "mit" and "base_model" not in data
    assert not {"text", "repo_id", "class_names", "eval_results", "model_name"} & set(data)
    # huggingface_hub reads the same results out of it, and writes the same again.
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "birds" and eval_results_to_model_index(name, results) == data["model-index"]
    assert ModelCardData(**data).to_dict() == data
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in results}
    assert found == {
        ("validation", "top-1 accuracy"): 0.75, ("validation", "top-5 accuracy"): 1.0,
        ("validation", "macro accuracy"): 0.7, ("test", "top-1 accuracy"): 0.7125, ("test", "top-5 accuracy"): 0.98,
        ("test", "macro accuracy"): 0.65, (None, "insertion (rise | 5 heads)"): 0.61234, (None, "deletion"): 0.09,
    }  # fmt: skip
    assert {(r.task_type, r.dataset_type, r.dataset_name) for r in results} == {
        ("image-classification", "me/garden", "Garden birds")
    }
    elsewhere = metadata(card_of(folder, dataset_name="Garden birds", dataset_url="https://example.org/x").content)
    assert (
        "datasets" not in elsewhere and elsewhere["model-index"][0]["results"][0]["dataset"]["type"] == "garden-birds"
    )


@pytest.mark.parametrize(
    ("recorded", "name", "hub"),
    [("me/garden", "me/garden", ["me/garden"]), (None, "own images", None), ("my.birds", "my.birds", None)],
)
def test_the_data_that_training_recorded(folder, recorded, name, hub):
    (folder / "results.json").write_text(json.dumps(RESULTS | {"dataset": recorded}))
    card = card_of(folder)
    data = metadata(card.content)
    assert card.text.startswith("\n# birds\n") and data["model-index"][0]["name"] == "birds"
    assert metadata_errors(card.content) == [] and data.get("datasets") == hub
    assert {result["dataset"]["name"] for result in data["model-index"][0]["results"]} == {name}
    trained_on = dict(rows(card, "Description")[1:])["Trained on"]
    assert trained_on == (f"[{name}](https://huggingface.co/datasets/{name})" if hub else name)
    given = metadata(card_of(folder, dataset_name="Garden birds").content)
    assert given["model-index"][0]["results"][0]["dataset"]["name"] == "Garden birds"


def test_what_is_unknown_is_left_out(tmp_path):
    card = card_of(tmp_path)
    for word in ("## Accuracy", "## Evaluation", "## Training", "## Versions", "## Trait maps", "None", "Trained on",
                 "Licence of the data", "Backbone", "Images |", "unknown", "Undefined"):  # fmt: skip
        assert word not in card.content, word
    assert "model-index" not in card.content and "metrics" not in card.content
    assert metadata_errors(card.content) == []
    assert "\n\n\n" not in card.content
    # Results without the name of a data set stay in the text: the Hub's list wants one.
    (tmp_path / "results.json").write_text(json.dumps({"test": {"top1": 0.5}}))
    card = card_of(tmp_path)
    assert rows(card, "Accuracy") == [["", "top-1"], ["test", "50.0%"]]
    assert "model-index" not in card.content and "Epoch" not in card.text


def test_epoch_that_was_not_chosen(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS | {"best_epoch": 12, "best_epoch_chosen_on": None}))
    assert "Epoch 12 of 12, the last one: no images were held out to choose it on." in card_of(tmp_path).text


def test_backbone(tmp_path):
    model = tiny_model()
    model.config.backbone_name_or_path, model.config.backbone_revision = "museum/vit", "v2"
    processor = build_image_processor(32)
    card = render_card(read_card_facts(tmp_path, "me/birds", model, processor, prompts_only=True, license="mit"))
    assert metadata(card.content)["base_model"] == "museum/vit"
    assert dict(rows(card, "Description")[1:])["Backbone"] == "museum/vit, revision v2"
    assert "The backbone is fetched from `museum/vit@v2`" in card.text
    model.config.backbone_name_or_path = str(tmp_path)
    card = render_card(read_card_facts(tmp_path, "me/birds", model, processor, license="mit"))
    assert str(tmp_path) not in card.content and "base_model" not in card.content


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.json", "[1]", r"results\.json must hold names and values, not list"),
        ("results.json", "{", r"results\.json cannot be read: Expecting"),
        ("recipe.yaml", "a: [", r"recipe\.yaml cannot be read"),
        ("evaluation.json", '{"metrics": {"insertion": {"low": 1}}}', r"'insertion' has no number as its value"),
        ("evaluation.json", '{"metrics": [1]}', r"evaluation\.json: 'metrics' has no number"),
    ],
)
def test_damaged_records_are_refused(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        card_of(folder)


def test_an_evaluation_elsewhere(folder, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "evaluation.json").write_text(json.dumps({"metrics": {"pointing game": {"value": 0.5}}}))
    card = card_of(folder, evaluation_folder=tmp_path / "report")
    assert rows(card, "Evaluation") == [["metric", "value"], ["pointing game", "0.5"]]
    with pytest.raises(FileNotFoundError, match=r"There is no evaluation\.json in /nowhere"):
        card_of(folder, evaluation_folder="/nowhere")


def test_photos_need_a_licence():
    with pytest.raises(ValueError, match="the photos' licence must be given"):
        CardFacts(repo_id="me/x", gallery=[GalleryImage("trait_maps/1.png", "Robin", "trait_maps/1.jpg")])


def test_recipe_keys_are_those_of_recipes():
    assert set(RECIPE_KEYS) <= {field.name for field in dataclasses.fields(Recipe)}


@pytest.mark.parametrize("name", TOP1)
def test_official_cards(name):
    """The committed cards are what `python -m prompt_cam_hf.hub.official` writes."""
    text = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    card = official_card(name)
    assert text == str(card)
    assert metadata_errors(text) == []
    assert ModelCard.load(CARDS / f"{name}.md").data.to_dict() == metadata(text)
    data = metadata(text)
    results = data["model-index"][0]["results"]
    assert data["base_model"] == {"dino": "facebook/dino-vitb16", "dinov2": "facebook/dinov2-base"}[name.split("_")[0]]
    assert results[0]["metrics"] == [{"type": "accuracy", "value": TOP1[name], "name": "top-1 accuracy"}]
    assert all(result["source"]["url"].startswith("https://arxiv.org") for result in results)
    assert "As the authors of Prompt-CAM report it" in " ".join(text.split())
    assert ("| insertion | 0.61 |" in text) == (name == "dino_cub")
    # No repository is named that is not there: the model is made by a command, in the folder that the snippet reads.
    *commands, snippet = re.findall(r"```(?:bash|python)\n(.*?)```", text, re.DOTALL)
    assert "OWNER" not in text and f'model="promptcam-{name.replace("_", "-")}"' in snippet
    for line in commands[0].splitlines():
        check_line(shlex.split(line, comments=True))


def test_official_numbers_are_those_of_the_paper():
    """Once more from the table, in its order: DINO on CUB, Cars, Dogs, Pet, Birds-525; DINOv2 on CUB, Dogs, Pet."""
    names = [
        "dino_cub",
        "dino_cars",
        "dino_dogs",
        "dino_pet",
        "dino_birds525",
        "dinov2_cub",
        "dinov2_dogs",
        "dinov2_pet",
    ]
    assert [round(100 * TOP1[name], 1) for name in names] == [73.2, 83.2, 81.1, 91.3, 98.8, 74.1, 81.3, 92.7]
    assert set(TOP1) == set(names) == {path.stem for path in CARDS.glob("dino*.md")}


def test_official_facts_join_those_of_the_model(tmp_path):
    card = card_of(tmp_path, **official_facts("dinov2_pet"))
    facts = dict(rows(card, "Description")[1:])
    assert facts["Classes"] == "5" and facts["Backbone"] == "facebook/dinov2-base"
    assert facts["Vision transformer"].startswith("3 layers") and "Converted from" in facts
    assert rows(card, "Accuracy") == [["", "top-1"], ["test", "92.7%"]]
    with pytest.raises(ValueError, match=r"no official checkpoint 'dino_x'; there are dino_cub, dino_cars"):
        official_facts("dino_x")
