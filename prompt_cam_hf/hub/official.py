# SPDX-License-Identifier: MIT
"""The cards of the eight official checkpoints, with the numbers that the authors report, marked as theirs.

    python -m prompt_cam_hf.hub.official FOLDER

writes the cards into a folder. Those in `model_cards/` were written by it.
"""

import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from prompt_cam_hf.data.prepare.facts import FACTS
from prompt_cam_hf.hub.card import RECIPE_KEYS, CardFacts, render_card

PAPER_URL = "https://arxiv.org/abs/2501.09333"
# The licence of the authors' repository and of their weights on the Hub.
LICENSE = "mit"
# Where on the Hub they are; `prompt-cam convert` lists the files.
HUB_REPOSITORY = "imageomics/Prompt-CAM"
_AUTHORS = "the authors of Prompt-CAM"

# Top-1 on the test split as the authors report it, by recipe (backbone_dataset).
TOP1: Mapping[str, float] = {
    "dino_cub": 0.732,
    "dino_cars": 0.832,
    "dino_dogs": 0.811,
    "dino_pet": 0.913,
    "dino_birds525": 0.988,
    "dinov2_cub": 0.741,
    "dinov2_dogs": 0.813,
    "dinov2_pet": 0.927,
}
# The paper reports these for CUB with DINO alone.
_FAITHFULNESS = {"dino_cub": {"insertion": 0.61, "deletion": 0.09}}


def official_facts(name: str) -> dict[str, Any]:
    """What is known about an official checkpoint (a key of `TOP1`) besides its weights, as fields of `CardFacts`."""
    if name not in TOP1:
        raise ValueError(f"There is no official checkpoint {name!r}; there are {', '.join(TOP1)}.")
    dataset = FACTS[name.partition("_")[2]]
    recipe = yaml.safe_load((files("prompt_cam_hf.training") / "recipes" / f"{name}.yaml").read_text("utf-8"))
    facts: dict[str, Any] = {
        "backbone": recipe["backbone"],
        "model_facts": {
            "Converted from": f"the checkpoint that {_AUTHORS} publish (https://github.com/Imageomics/Prompt_CAM)",
            "Converted by": f"`prompt-cam convert {HUB_REPOSITORY} --file FILE.pt --classes FOLDER --out NEW_FOLDER`, "
            "where FOLDER holds the class folders, which name and number the classes",
        },
        "dataset_name": dataset.title,
        "dataset_url": dataset.page,
        "dataset_license": dataset.licence,
        "accuracy": {"test": {"top1": TOP1[name]}},
        "accuracy_notes": [
            f"As {_AUTHORS} report it for their checkpoint; not measured again. They evaluated on the test images "
            "every 10 epochs and chose the epoch by that, so the number is optimistic."
        ],
        "recipe": {key: recipe[key] for key in RECIPE_KEYS if key in recipe},
        "recipe_notes": [
            "The settings that the authors publish. Their recipe has batches of 16, and of 64 with their commands for "
            "4 GPUs."
        ],
        "source_name": "Prompt-CAM (CVPR 2025)",
        "source_url": PAPER_URL,
    }
    if name in _FAITHFULNESS:
        protocol = "as reported in the paper, which does not give it in full"
        facts["evaluation"] = {
            metric: {"value": value, "protocol": protocol} for metric, value in _FAITHFULNESS[name].items()
        }
        facts["evaluation_notes"] = [
            "Insertion: higher is better; deletion: lower is better. The paper does not say how many heads the maps "
            "are summed over, which class is explained, what removed pixels become, or the step."
        ]
    return facts


def official_card(name: str, license: str = LICENSE) -> ModelCard:
    """Write the card of an official checkpoint (a key of `TOP1`) that is to be converted, for it needs no weights."""
    facts = official_facts(name)
    backbone, _, dataset = name.partition("_")
    classes, patch = FACTS[dataset].num_classes, {"dino": 16, "dinov2": 14}[backbone]
    facts["model_facts"] = {
        "Vision transformer": f"12 layers of 768 channels and 12 heads, patches of {patch}x{patch} pixels",
        "Prompts": f"{classes} class prompts from layer 11 on (Deep; layers are 0 to 11), {classes} class-agnostic "
        "prompts in each of 11 layers",
        "Input": "224x224 pixels, mean (0.5, 0.5, 0.5), standard deviation (0.5, 0.5, 0.5)",
        "Classes": str(classes),
        **facts["model_facts"],
    }
    folder = f"promptcam-{name.replace('_', '-')}"
    made_by = (
        f"prompt-cam convert {HUB_REPOSITORY} --out {folder}  # lists the files\n"
        f"prompt-cam convert {HUB_REPOSITORY} --file FILE.pt --classes FOLDER_OF_CLASSES --out {folder}"
    )
    return render_card(CardFacts(repo_id=folder, license=license, made_by=made_by, **facts))


def main(folder: str) -> None:
    """Write all eight cards into a folder."""
    for name in TOP1:
        official_card(name).save(Path(folder) / f"{name}.md")


if __name__ == "__main__":
    main(sys.argv[1])
