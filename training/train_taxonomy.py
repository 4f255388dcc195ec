# SPDX-License-Identifier: MIT
"""Training on a tree of classes: from a recipe to a model with one prompt set for each level of the tree.

    accelerate launch training/train_taxonomy.py RECIPE.yaml --taxonomy TREE.csv [--key value ...]
    accelerate launch -m prompt_cam_hf.training.train_taxonomy RECIPE.yaml --taxonomy TREE.csv [--key value ...]

Each level is an ordinary run of `training/train.py` with the same images under other labels, in `OUTPUT_DIR/levels`;
`OUTPUT_DIR` itself gets the model with all prompt sets (Prompt-CAM, Chowdhury et al., CVPR 2025, figure 9).
"""

import dataclasses
import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.taxonomy_path import TAXONOMY_FILE
from prompt_cam_hf.files import only_writer, write_atomically
from prompt_cam_hf.loading import load_image_processor
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.training.data import ImageDataset
from prompt_cam_hf.training.recipe import Recipe, parse_recipe, training_arguments
from prompt_cam_hf.training.train import (
    RESULTS_FILE,
    check_same_recipe,
    holds_run,
    load_data,
    one_sentence_exit,
    train,
)
from prompt_cam_hf.training.trainer import on_main_process

LEVELS_FOLDER = "levels"


@dataclass(frozen=True)
class TaxonomyResult:
    """A model with a prompt set for each level.

    Attributes:
        model: With all prompt sets, named after the levels; the leaf's is in use. In evaluation mode.
        image_processor: Saved with the model.
        output_dir: Holds all of this, and in `levels` the run of each level.
        results: For each level, from the root to the leaf, what its `results.json` says.
        paths: What `evaluate_paths` found on the test split; None where there is none.
    """

    model: PromptCAMForImageClassification
    image_processor: BaseImageProcessor
    output_dir: Path
    results: dict[str, dict[str, Any]]
    paths: dict[str, float] | None


def train_taxonomy(recipe: Recipe, taxonomy: Taxonomy, data: ImageData | None = None) -> TaxonomyResult:
    """Train a prompt set for each level of a tree as the recipe says, and save them together.

    With `resume_from_checkpoint`, levels that are finished are kept as they are, and new levels of the tree added.

    Args:
        recipe: As for `train`; `output_dir` is the folder of all levels.
        taxonomy: The tree; its leaves are the classes of the data. A level with a single node is passed over.
        data: Images in place of what `recipe.data` names.

    Returns:
        The model with all prompt sets, which is also saved in `recipe.output_dir`.

    Raises:
        FileExistsError: `output_dir` is not empty, and the recipe does not say to resume, or another process writes
            there.
        ValueError, OSError: recipe, data, tree and backbone do not fit together; one sentence says which and why.
        FloatingPointError: training diverged.
    """
    folder = Path(recipe.output_dir)
    _check_recipe(recipe)
    training_arguments(recipe)  # joins the other processes, where there are several
    levels = [level for level in reversed(taxonomy.levels) if len(taxonomy.nodes(level)) > 1]
    recipes = {level: _level_recipe(recipe, level) for level in levels}
    with only_writer(folder) if PartialState().is_main_process else nullcontext():
        finished = on_main_process(partial(_open_folder, folder, taxonomy, recipes, recipe.resume_from_checkpoint))
        images = data or on_main_process(partial(load_data, recipe))
        taxonomy.check_classes(images.id2label.values())
        on_main_process(partial(_write_taxonomy, folder, taxonomy))
        for level in levels:
            if level not in finished:
                if PartialState().is_main_process:
                    print(f"{level}: {len(taxonomy.nodes(level))} classes", flush=True)
                train(recipes[level], relabel(images, taxonomy, level))
        PartialState().wait_for_everyone()
        result = _put_together(folder, [Path(recipes[level].output_dir) for level in levels])
        if images.test is not None:
            result.model.to(PartialState().device)
            test = ImageDataset(images.test, result.image_processor)
            paths = evaluate_paths(result.model, test, images.id2label, taxonomy, recipe.eval_batch_size)
            result = dataclasses.replace(result, paths=paths)
        if PartialState().is_main_process:
            _save(result, recipe.include_backbone)
            _print_results(result)
        PartialState().wait_for_everyone()
    return result


def relabel(data: ImageData, taxonomy: Taxonomy, level: str) -> ImageData:
    """Give the images of a data set the nodes of a level, in sorted order, for classes."""
    if level == taxonomy.leaf_level:
        return data
    nodes = taxonomy.nodes(level)
    numbers = {number: nodes.index(taxonomy.node_of(name, level)) for number, name in data.id2label.items()}
    feature = datasets.ClassLabel(names=nodes)

    def change(split: datasets.Dataset | None) -> datasets.Dataset | None:
        if split is None:
            return None
        labels = [numbers[label] for label in split["label"]]
        return split.remove_columns("label").add_column("label", labels, feature=feature)

    return ImageData(
        change(data.train), change(data.validation), change(data.test), dict(enumerate(nodes)), data.skipped
    )


@torch.no_grad()
def evaluate_paths(
    model: PromptCAMForImageClassification,
    dataset: ImageDataset,
    id2label: dict[int, str],
    taxonomy: Taxonomy,
    batch_size: int = 32,
) -> dict[str, float]:
    """Count the images whose whole path is right, and those whose predictions form a path of the tree, right or not.

    The data set has the numbers of the leaf classes. Where there are several processes, each evaluates its share.

    Returns:
        `num_images`; `all_levels_right` and `consistent`, shares from 0 to 1.
    """
    levels = [level for level in reversed(taxonomy.levels) if level in model.prompt_sets]
    names = {level: model.only_prompts(level).config.id2label for level in levels}
    found: list[tuple[bool, bool]] = []
    with PartialState().split_between_processes(list(range(len(dataset)))) as own:
        for batch in DataLoader(Subset(dataset, own), batch_size):
            named = {
                level: [names[level][number] for number in output.logits.argmax(dim=-1).tolist()]
                for level, output in model.forward_sets(batch["pixel_values"].to(model.device), levels).items()
            }
            for leaf, *path in zip(batch["labels"].tolist(), *named.values(), strict=True):
                nodes = dict(zip(levels, path, strict=True))
                right = all(node == taxonomy.node_of(id2label[leaf], level) for level, node in nodes.items())
                found.append((right, not taxonomy.conflicts(nodes)))
    found = gather_object(found)
    return {
        "num_images": len(found),
        "all_levels_right": sum(right for right, _ in found) / len(found),
        "consistent": sum(consistent for _, consistent in found) / len(found),
    }


def _check_recipe(recipe: Recipe) -> None:
    if recipe.method != "prompt_cam":
        raise ValueError(f"A taxonomy is for method prompt_cam; the recipe says {recipe.method}.")
    if recipe.hub_model_id:
        raise ValueError("hub_model_id is for a single run; publish the finished folder instead.")
    if isinstance(recipe.resume_from_checkpoint, str) and recipe.resume_from_checkpoint != "auto":
        raise ValueError(
            "resume_from_checkpoint is a path, but each level has checkpoints of its own; give it without a value."
        )


def _level_recipe(recipe: Recipe, level: str) -> Recipe:
    # The backbone is saved once, with all prompt sets.
    folder = str(Path(recipe.output_dir) / LEVELS_FOLDER / level)
    return dataclasses.replace(recipe, output_dir=folder, include_backbone=False)


def _open_folder(folder: Path, taxonomy: Taxonomy, recipes: dict[str, Recipe], resume: bool | str) -> set[str]:
    """The levels that an earlier run, of the same recipe and tree, has finished."""
    if not holds_run(folder, resume):
        return set()
    if not (folder / TAXONOMY_FILE).is_file():
        raise FileNotFoundError(f"The output folder {folder} holds no taxonomy to go on with: no {TAXONOMY_FILE}.")
    _check_same_tree(read_taxonomy(folder / TAXONOMY_FILE), taxonomy, folder)
    finished = {level for level, recipe in recipes.items() if (Path(recipe.output_dir) / RESULTS_FILE).is_file()}
    for level in finished:
        check_same_recipe(recipes[level], Path(recipes[level].output_dir))
    return finished


def _check_same_tree(before: Taxonomy, now: Taxonomy, folder: Path) -> None:
    for level in now.levels:
        for name in sorted(set(before.paths) | set(now.paths)) if level in before.levels else ():
            old, new = (tree.node_of(name, level) if name in tree.paths else None for tree in (before, now))
            if old != new:
                raise ValueError(
                    f"The run in {folder} has {name!r} in the {level} {old!r}, the taxonomy says {new!r}; a run that "
                    "is resumed keeps its tree, but may get new levels."
                )


def _write_taxonomy(folder: Path, taxonomy: Taxonomy) -> None:
    write_atomically(folder / TAXONOMY_FILE, taxonomy.to_csv().encode())


def _put_together(folder: Path, runs: list[Path]) -> TaxonomyResult:
    """One model with the prompt sets of all runs, the last one's in use."""
    first, *others = runs
    model = PromptCAMForImageClassification.from_pretrained(first, prompts_in_use=first.name)
    for run in others:
        model.load_prompts(run, run.name)
    model.set_prompts(runs[-1].name)
    results = {run.name: json.loads((run / RESULTS_FILE).read_text(encoding="utf-8")) for run in runs}
    return TaxonomyResult(model.eval(), load_image_processor(first), folder, results, None)


def _save(result: TaxonomyResult, include_backbone: bool) -> None:
    result.model.save_pretrained(result.output_dir, include_backbone=include_backbone)
    result.image_processor.save_pretrained(result.output_dir)
    facts: dict[str, Any] = {"levels": result.results}
    if result.paths is not None:
        facts["paths"] = {"test": result.paths}
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_atomically(result.output_dir / RESULTS_FILE, text.encode())


def _print_results(result: TaxonomyResult) -> None:
    table = Table("level", "classes", "best epoch", "validation top-1", "test top-1", "chance")
    for level, facts in result.results.items():
        shares = (
            f"{facts[split]['top1']:.1%}" if split in facts else "" for split in ("validation", "test", "chance")
        )
        table.add_row(level, str(facts["num_classes"]), str(facts["best_epoch"]), *shares)
    Console().print(table, markup=False)
    if result.paths is not None:
        right, consistent = (f"{result.paths[share]:.1%}" for share in ("all_levels_right", "consistent"))
        print(f"Test: {right} of the images are right at every level; {consistent} get a path that the tree has")
    print(f"Saved in {result.output_dir}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `RECIPE.yaml --taxonomy TREE.csv [--key value ...]`."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--taxonomy")
    given, rest = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"} & set(rest):
        print(__doc__)
    with one_sentence_exit(TypeError):
        recipe = parse_recipe(rest)
        if given.taxonomy is None:
            raise ValueError("There is no tree; give one as --taxonomy TREE.csv.")
    with one_sentence_exit(FloatingPointError):
        train_taxonomy(recipe, read_taxonomy(given.taxonomy))
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
