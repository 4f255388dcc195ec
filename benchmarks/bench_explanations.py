# SPDX-License-Identifier: MIT
"""Which maps find the traits? All maps of Prompt-CAM and its rivals, on drawn birds whose traits are known.

    python benchmarks/bench_explanations.py OUT [--seeds 0 1 2] [--birds 20] [--metrics localisation specificity]

Trains a Prompt-CAM, a linear probe and a VPT on the embedded backbone with the same birds and recipe (VPT with as many
prompts, in the last layer as well), once for each seed, and evaluates all their maps on the same test birds. Results
are in OUT/seed_N/report_METRICS; the means over seeds are printed. Models that are there already are used again.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.data.ground_truth import bird_mask
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.evaluation import evaluate
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.measure import Protocol
from prompt_cam_hf.explanations.aggregate import AGGREGATIONS
from prompt_cam_hf.training.demo import RECIPES
from prompt_cam_hf.training.recipe import load_recipe
from prompt_cam_hf.training.train import train

_METHODS = {
    "prompt_cam": {},
    "linear_probe": {"method": "linear_probe"},
    "vpt": {"method": "vpt", "num_agnostic_prompts": len(BIRD_CLASSES), "first_prompt_layer": 4},
}
_PER_CLASS = {"train": 60, "validation": 20, "test": 20}
_POST_HOC = (
    "grad_cam",
    "hires_cam",
    "layer_cam",
    "eigen_cam",
    "rollout",
    "raw_attention",
    "finer_grad_cam",
    "finer_hires_cam",
)


def train_models(folder: Path, seed: int) -> dict[str, Path]:
    """The three models, trained where they are not there yet."""
    birds = {split: birds_dataset(split, count) for split, count in _PER_CLASS.items()}
    images = {split: data.select_columns(["image", "label"]) for split, data in birds.items()}
    data = ImageData(**images, id2label={label: bird.name for label, bird in enumerate(BIRD_CLASSES)})
    folders = {name: folder / name for name in _METHODS}
    for name, settings in _METHODS.items():
        recipe = load_recipe(
            RECIPES / "birds.yaml",
            backbone=BACKBONE,
            output_dir=folders[name],
            seed=seed,
            resume_from_checkpoint=True,
            **settings,
        )
        train(recipe, data)
    return folders


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--birds", type=int, default=20, help="test birds of each class")
    parser.add_argument("--metrics", nargs="+", default=["faithfulness", "localisation", "specificity"])
    parser.add_argument("--maps", nargs="+", default=[*AGGREGATIONS, *_POST_HOC], help="of the Prompt-CAM")
    parser.add_argument("--baseline-maps", nargs="+", default=_POST_HOC, help="of linear probe and VPT")
    arguments = parser.parse_args()
    test = birds_dataset("test", arguments.birds)
    truth = GroundTruth("the drawn birds' parts", lambda index, name, image: bird_mask(test[index]))
    found = defaultdict(list)
    for seed in arguments.seeds:
        folders = train_models(arguments.out / f"seed_{seed}", seed)
        result = evaluate(
            folders["prompt_cam"],
            test,
            arguments.out / f"seed_{seed}" / f"report_{'_'.join(arguments.metrics)}",
            baselines=[folders["linear_probe"], folders["vpt"]],
            maps=arguments.maps,
            baseline_maps=arguments.baseline_maps,
            protocol=Protocol(metrics=tuple(arguments.metrics), preset="rise"),
            ground_truth=truth,
            overwrite=True,
        )
        for mean in result.means:
            found[mean.model, mean.map, mean.metric].append(mean.value)
    metrics = list(dict.fromkeys(metric for *_, metric in found))
    print("| model: map |", " | ".join(metrics), "|")
    print("| --- |" + " --- |" * len(metrics))
    for model, map_name in dict.fromkeys(key[:2] for key in found):
        cells = (found.get((model, map_name, metric)) for metric in metrics)
        shown = ("" if not cell else f"{np.mean(cell):.3f} ± {np.std(cell, ddof=len(cell) > 1):.3f}" for cell in cells)
        print(f"| {model}: {map_name} |", " | ".join(shown), "|")


if __name__ == "__main__":
    main()
