# SPDX-License-Identifier: MIT
"""Which maps find the traits? All maps of Prompt-CAM and its rivals, on drawn birds whose traits are known.

    python benchmarks/bench_explanations.py OUT [--seeds 0 1 2 3 4] [--methods prompt_cam linear_probe]
        [--split validation] [--birds 20] [--faithfulness 90] [--road 0] [--maps ...] [--baseline-maps ...]

Trains every method on the embedded backbone with the same birds, once for each seed, and measures its maps on the
same birds: localisation and specificity on all of them, insertion and deletion, and ROAD, on as many as are asked for.
Means over seeds and their standard deviation are printed.

A model is in OUT/seed_N/METHOD, its results in reports beside it. What is there already is used again, and a run that
was interrupted goes on.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from prompt_cam_hf.baselines.cams import ATTENTION_MAPS
from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.data.ground_truth import bird_mask
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.evaluation import evaluate
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.measure import Protocol
from prompt_cam_hf.evaluation.report import EVALUATION
from prompt_cam_hf.evaluation.subjects import MAPS
from prompt_cam_hf.explanations.aggregate import AGGREGATIONS
from prompt_cam_hf.training.demo import RECIPES
from prompt_cam_hf.training.recipe import load_recipe
from prompt_cam_hf.training.train import RESULTS_FILE, train

# By the name of a method: its recipe, and what differs from it. VPT has as many prompts as there are classes.
METHODS: dict[str, tuple[str, dict]] = {
    "prompt_cam": ("birds", {}),
    "prompt_cam_deep": ("birds_deep", {}),
    "linear_probe": ("birds", {"method": "linear_probe"}),
    "vpt": ("birds", {"method": "vpt", "num_agnostic_prompts": len(BIRD_CLASSES), "first_prompt_layer": 4}),
    "intr": ("intr_birds", {}),
}
_PER_CLASS = {"train": 60, "validation": 20, "test": 20}
_POST_HOC = tuple(name for name in MAPS if name not in AGGREGATIONS)


def draw_birds() -> ImageData:
    """The birds of every split, which are those of `prompt-cam demo`."""
    birds = {split: birds_dataset(split, count) for split, count in _PER_CLASS.items()}
    images = {split: data.select_columns(["image", "label"]) for split, data in birds.items()}
    return ImageData(**images, id2label={label: bird.name for label, bird in enumerate(BIRD_CLASSES)})


def train_method(name: str, folder: Path, seed: int) -> Path:
    """The folder of a method's model, which is trained if it is not there yet."""
    if (folder / name / RESULTS_FILE).exists():  # written last
        return folder / name
    recipe_name, settings = METHODS[name]
    recipe = load_recipe(
        RECIPES / f"{recipe_name}.yaml",
        backbone=BACKBONE,
        output_dir=folder / name,
        seed=seed,
        resume_from_checkpoint=True,
        **settings,
    )
    train(recipe, draw_birds())
    return folder / name


def measure(model: Path, split: str, count: int, maps: list[str], protocol: Protocol) -> list[dict]:
    """The means of a model's maps on `count` birds of each class: those of an earlier run if it had these maps."""
    limit = "" if protocol.limit is None else f"_{protocol.limit}_{protocol.preset}"
    report = model.parent / f"report_{model.name}_{'_'.join(protocol.metrics)}_{split}_{count}{limit}"
    found = report / EVALUATION
    if not found.exists() or not set(maps) <= {mean["map"] for mean in _means(found)}:
        birds = birds_dataset(split, count)
        truth = GroundTruth("the drawn birds' parts", lambda index, name, image: bird_mask(birds[index]))
        evaluate(model, birds, report, maps=maps, protocol=protocol, ground_truth=truth, overwrite=True)
    return [mean for mean in _means(found) if mean["map"] in (*maps, "")]


def _means(evaluation: Path) -> list[dict]:
    return json.loads(evaluation.read_text(encoding="utf-8"))["all"]


def _maps_of(method: str, maps: list[str], baseline_maps: list[str]) -> list[str]:
    if method.startswith("prompt_cam"):
        return maps
    if method == "intr":
        return [name for name in maps if name not in ATTENTION_MAPS]
    return [name for name in baseline_maps if name not in AGGREGATIONS]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--split", default="test", choices=["validation", "test"], help="the birds that are measured on"
    )
    parser.add_argument("--birds", type=int, default=20, help="of each class; all are used for localisation")
    parser.add_argument("--faithfulness", type=int, default=90, help="birds for insertion and deletion; 0 for none")
    parser.add_argument("--road", type=int, default=0, help="birds for ROAD, which takes longest; 0 for none")
    parser.add_argument("--preset", default="rise-eighth", help="of insertion and deletion")
    parser.add_argument("--maps", nargs="+", default=list(MAPS), help="of Prompt-CAM and INTR")
    parser.add_argument("--baseline-maps", nargs="+", default=list(_POST_HOC), help="of linear probe and VPT")
    parser.add_argument("--only-train", action="store_true", help="train the models, and measure nothing")
    arguments = parser.parse_args()
    protocols = [Protocol(metrics=("localisation", "specificity"))]
    for metric in ("faithfulness", "road"):
        if limit := getattr(arguments, metric):
            protocols.append(Protocol(metrics=(metric,), preset=arguments.preset, limit=limit))
    found = defaultdict(dict)
    for seed in arguments.seeds:
        for method in arguments.methods:
            model = train_method(method, arguments.out / f"seed_{seed}", seed)
            maps = _maps_of(method, arguments.maps, arguments.baseline_maps)
            for protocol in [] if arguments.only_train else protocols:
                for mean in measure(model, arguments.split, arguments.birds, maps, protocol):
                    found[mean["model"], mean["map"], mean["metric"]][seed] = mean["value"]
    metrics = list(dict.fromkeys(metric for *_, metric in found))
    print("| model: map |", " | ".join(metrics), "|")
    print("| --- |" + " --- |" * len(metrics))
    for model_name, map_name in dict.fromkeys(key[:2] for key in found):
        cells = (list(found.get((model_name, map_name, metric), {}).values()) for metric in metrics)
        shown = ("" if not cell else f"{np.mean(cell):.3f} ± {np.std(cell, ddof=len(cell) > 1):.3f}" for cell in cells)
        print(f"| {model_name}: {map_name or 'the model'} |", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
