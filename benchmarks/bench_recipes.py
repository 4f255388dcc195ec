# SPDX-License-Identifier: MIT
"""Which settings of a recipe are best? Accuracy, and on drawn birds how well the maps find the traits, over seeds.

    python benchmarks/bench_recipes.py OUT [--recipe birds] --try "{}" --try "{prompt_dropout: 0.3}" \\
        --try "{method: linear_probe}" [--seeds 0 1 2] [--split validation|test]
    python benchmarks/bench_recipes.py OUT --data PHOTOS --recipe own_photos_cpu --try "{learning_rate: 0.03}" ...

Trains every try (keys of the recipe that differ, as YAML) once for each seed on the embedded backbone, and prints
means and their standard deviation. Choose on validation; the test split is for what has been chosen. Of drawn birds,
the default data, the maps of Prompt-CAM are measured too, on the same split.

A model is in OUT/seed_N/TRY. What is there already is used again, and a run that was interrupted goes on.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from bench_explanations import draw_birds, measure

from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.evaluation.measure import Protocol
from prompt_cam_hf.training.demo import RECIPES
from prompt_cam_hf.training.recipe import load_recipe
from prompt_cam_hf.training.train import RESULTS_FILE, train

_MAP = "attention_shapley"
_MAP_METRICS = (
    "pointing game",
    "relevance mass",
    "mass at matched sharpness",
    "relevance rank",
    "mass lost to runner-up",
)
_BIRDS_PER_CLASS = 20  # of validation and test alike


def name_of(settings: dict[str, Any]) -> str:
    """What a try is called, in the table and as a folder."""
    return ",".join(f"{key}={value}" for key, value in sorted(settings.items())) or "the recipe"


def train_once(folder: Path, recipe: str, data: str | None, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What the results file of a run holds; the run takes place if it is not in the folder yet."""
    if not (folder / RESULTS_FILE).exists():  # written last
        keys = {"backbone": BACKBONE, "output_dir": folder, "seed": seed, "resume_from_checkpoint": True, **settings}
        if data is None:
            train(load_recipe(RECIPES / f"{recipe}.yaml", **keys), draw_birds())
        else:
            train(load_recipe(RECIPES / f"{recipe}.yaml", data=data, **keys))
    return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))


def measure_maps(folder: Path, split: str) -> dict[str, float]:
    """How well a model's map of all heads finds the traits of drawn birds."""
    protocol = Protocol(metrics=("localisation", "specificity"))
    means = measure(folder, split, _BIRDS_PER_CLASS, [_MAP], protocol)
    return {mean["metric"]: mean["value"] for mean in means if mean["metric"] in _MAP_METRICS}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", help="folder of photos as of `prompt-cam train`; drawn birds where it is not given")
    parser.add_argument("--recipe", default="birds", help="name of a recipe of the package")
    parser.add_argument("--try", dest="tries", type=yaml.safe_load, action="append", required=True, metavar="YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--split", default="validation", choices=["validation", "test"])
    arguments = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for seed in arguments.seeds:
        for settings in arguments.tries:
            name = name_of(settings)
            folder = arguments.out / f"seed_{seed}" / name
            results = train_once(folder, arguments.recipe, arguments.data, seed, settings)
            found[name]["accuracy"].append(results[arguments.split]["top1"])
            if arguments.data is None and settings.get("method", "prompt_cam") == "prompt_cam":
                for metric, value in measure_maps(folder, arguments.split).items():
                    found[name][metric].append(value)
            latest = {metric: round(values[-1], 3) for metric, values in found[name].items()}
            print(f"seed {seed}, {name}: {latest}", flush=True)
    metrics = ["accuracy", *(_MAP_METRICS if arguments.data is None else ())]
    print(f"\n| {arguments.split}, seeds {' '.join(map(str, arguments.seeds))} |", " | ".join(metrics), "|")
    print("| --- |" + " --- |" * len(metrics))
    for name, values in found.items():
        cells = [values[metric] for metric in metrics]
        shown = (f"{np.mean(cell):.3f} ± {np.std(cell, ddof=len(cell) > 1):.3f}" if cell else "" for cell in cells)
        print(f"| {name} |", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
