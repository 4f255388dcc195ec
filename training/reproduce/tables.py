# SPDX-License-Identifier: MIT
"""The experiments that end in a table: faithfulness, accuracy, the layer that class prompts enter, backbones."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModel

from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.data.image_processors import backbone_image_processor
from prompt_cam_hf.data.prepare import FACTS
from prompt_cam_hf.evaluation.summary import Mean
from prompt_cam_hf.explanations.sheet import Row, Sheet, draw_sheet
from prompt_cam_hf.loading import model_name
from prompt_cam_hf.training.recipe import Recipe, load_recipe
from prompt_cam_hf.training.recipe_files import RECIPES
from prompt_cam_hf.training.reproduce.published import (
    FAITHFULNESS,
    FAITHFULNESS_RECIPE,
    PROMPT_CAM_MAP,
    accuracy_text,
)
from prompt_cam_hf.training.reproduce.workshop import (
    MODELS_FOLDER,
    Workshop,
)

RANDOM_BACKBONE = "random weights"
_LINE_COLOUR = "#0072b2"
# Of drawn birds: the earlier class prompts enter, the less can be cached.
_VARIANTS_EPOCHS = 8


class Finding(NamedTuple):
    """What an experiment found.

    Attributes:
        title: What was asked.
        columns, rows: The table, as text.
        notes: What to know when the numbers are compared, a sentence or two each.
        figures: By file name.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]
    figures: Mapping[str, Figure]


def stack(named: Sequence[tuple[str, Sheet]]) -> Figure:
    """One figure of the rows of several sheets, each row under the name of its sheet."""
    rows = [
        Row(f"{name}: {row.title}" if name else row.title, row.panels) for name, sheet in named for row in sheet.rows
    ]
    return draw_sheet(Sheet(rows, named[0][1].bars))


def table1(shop: Workshop, folder: Path, rivals: Sequence[str]) -> Finding:
    """Insertion and deletion of Prompt-CAM's map beside the maps of its rivals, the evaluation's own lists of maps."""
    trained = shop.prompt_cam()
    others = [shop.train(rival, rival).folder for rival in rivals]
    metrics = ("faithfulness", "localisation") if shop.birds else ("faithfulness",)
    found = shop.evaluate(trained, folder / "report", metrics, baselines=others)
    by_map: dict[tuple[str, str], dict[str, Mean]] = {}
    for mean in found.means:
        if mean.map:
            by_map.setdefault((mean.model, mean.map), {})[mean.metric] = mean
    shown = ["insertion", "deletion", *(["pointing game"] if shop.birds else [])]
    own_name = found.means[0].model
    rows = []
    for (model, map_name), means in by_map.items():
        key = PROMPT_CAM_MAP if model == own_name else map_name if model == "linear_probe" else ""
        published = [f"{value:.2f}" for value in FAITHFULNESS.get(key, ())] or ["-", "-"]
        rows.append((f"{model}: {map_name}", *published, *(str(means[metric]) for metric in shown)))
    preset = found.protocol.of("insertion", found.ground_truth)
    num = max(means["insertion"].num_images for means in by_map.values())
    return Finding(
        "Insertion (high is good) and deletion (low is good) of Prompt-CAM's map beside its rivals'",
        ("model: map", "insertion, published", "deletion, published", *shown),
        rows,
        (
            f"Published: {FAITHFULNESS_RECIPE}, validation images; how many heads are summed, which class is asked, "
            "and what removed pixels become is not published.",
            f"Ours: {num} test images, protocol {preset}; in brackets the 95 % bootstrap interval. The map "
            "of Prompt-CAM is this package's default. The full report with curves is in report/index.html.",
        ),
        {},
    )


def table2(shop: Workshop, rivals: Sequence[str]) -> Finding:
    """Accuracy of Prompt-CAM beside its rivals on the same backbone."""
    rows = []
    for method in ("prompt_cam", *rivals):
        trained = shop.train(method, method)
        rows.append((method, accuracy_text(shop.recipe_name, method), trained.accuracy))
    return Finding(
        f"Top-1 accuracy on {len(shop.test):,} test images, beside the linear probe's",
        ("method", "published", "ours ± standard error"),
        rows,
        (
            "Published numbers are those of the epoch that was best on the test split. Ours chooses the epoch on "
            "validation images and looks at the test split once.",
        ),
        {},
    )


def variants(shop: Workshop, folder: Path) -> Finding:
    """Accuracy by the layer that class prompts enter: Shallow, Deep, and each layer between."""
    recipe = dataclasses.replace(shop.recipe, class_prompt_layer=-1)
    if shop.birds and "num_train_epochs" not in shop.settings:
        recipe = dataclasses.replace(recipe, num_train_epochs=_VARIANTS_EPOCHS)
    deep = shop.prompt_cam() if recipe == shop.recipe else shop.train("deep", recipe=recipe)
    config: Any = deep.model.config
    last = config.backbone_config.num_hidden_layers - 1
    names = {0: "Shallow", last: "Deep"}
    rows, shares, errors = [], [], []
    for layer in range(last + 1):
        trained = deep
        if layer < last:
            cached = recipe.cache_features and layer > 0  # before the first layer there is nothing to cache
            trained = shop.train(f"layer_{layer}", recipe=recipe, class_prompt_layer=layer, cache_features=cached)
        cells = [str(layer), names.get(layer, "between"), trained.accuracy]
        if shop.birds:
            found = shop.evaluate(trained, folder / f"report_layer_{layer}", ("localisation",))
            cells.append(str(next(mean for mean in found.means if mean.metric == "pointing game")))
        rows.append(cells)
        shares.append(100 * trained.test["top1"])
        errors.append(100 * trained.test["top1_standard_error"])
    before = "layers before the class prompts have agnostic ones."
    if recipe.num_agnostic_prompts == 0:
        before = "layers before the class prompts have none."
    figure = Figure((4.4, 3.2), layout="constrained")
    axis = figure.subplots()
    axis.errorbar(range(last + 1), shares, errors, marker="o", capsize=4, color=_LINE_COLOUR)
    axis.set_xticks(range(last + 1), [f"{layer}\n{names.get(layer, '')}" for layer in range(last + 1)])
    axis.set_xlabel("layer that class prompts enter")
    axis.set_ylabel("top-1 accuracy, % (bar: standard error)")
    axis.set_ylim(max(min(shares) - 15, 0), 102)
    axis.grid(alpha=0.3)
    return Finding(
        "Shallow, Deep, and each layer between: what is lost where class prompts enter earlier?",
        ("layer", "variant", "top-1 ± standard error", *(["pointing game"] if shop.birds else [])),
        rows,
        (
            "Layers count from 0. No accuracy of the variants is among the published numbers.",
            f"Every variant has {recipe.num_train_epochs} epochs and the same recipe, not tuned for each; {before}",
        ),
        {"variants.png": figure},
    )


def backbones(shop: Workshop, names: Sequence[str]) -> Finding:
    """The same data on several backbones: accuracy, and where each one's most important heads look on one image."""
    row = shop.examples(np.arange(len(shop.test)))[0]
    asked = int(shop.labels[row])
    cells, sheets = [], []
    for label, (recipe_name, recipe) in _recipes(shop, names).items():
        is_own = recipe.backbone == shop.recipe.backbone
        folder = "backbone_" + re.sub(r"[^\w.-]", "_", label)
        trained = shop.prompt_cam() if is_own else shop.train(folder, recipe=recipe)
        cells.append((label, accuracy_text(recipe_name, "prompt_cam"), trained.accuracy))
        (explanation,) = shop.explain(trained, [row], classes=asked)
        sheets.append((label, explanation.sheet(None, False, "map")))
    notes = [
        "Published numbers are those of the epoch that was best on the test split.",
        "The figure shows one image, the first of its class in the test split, and the maps of its true class.",
    ]
    if shop.birds and not names:
        notes.append(
            f"One backbone comes with the package. The other one has its shape, and {RANDOM_BACKBONE} as before any "
            "training."
        )
    title = "Prompt-CAM on several backbones: accuracy, and the heads that decide"
    columns = ("backbone", "published", "top-1 ± standard error")
    return Finding(title, columns, cells, notes, {"backbones.png": stack(sheets)})


def _recipes(shop: Workshop, names: Sequence[str]) -> dict[str, tuple[str, Recipe]]:
    """By the name of a backbone: its recipe's name and the recipe; where one is published for the data, that one."""
    if shop.birds:
        chosen = {model_name(name): name for name in names}
        chosen = chosen or {"packaged tiny ViT": str(BACKBONE), RANDOM_BACKBONE: str(_random_backbone(shop))}
        return {label: ("", dataclasses.replace(shop.recipe, backbone=name)) for label, name in chosen.items()}
    data = shop.recipe_name.partition("_")[2]
    places = {"data": shop.recipe.data, "output_dir": shop.out}
    keys = {name: value for name, value in shop.settings.items() if name != "backbone"}
    found = {}
    for path in sorted(RECIPES.glob(f"*_{data}.yaml")) if data in FACTS else ():
        if load_recipe(path, **places).method == "prompt_cam":
            published = load_recipe(path, **keys, **places)
            found[published.backbone] = (path.stem, published)
    found[shop.recipe.backbone] = (shop.recipe_name, shop.recipe)
    own = {name: ("", dataclasses.replace(shop.recipe, backbone=name)) for name in names}
    return {model_name(name): (own | found)[name] for name in names or found}


def _random_backbone(shop: Workshop) -> Path:
    """A backbone like the packaged one with random weights, the same ones every time."""
    folder = shop.out / MODELS_FOLDER / RANDOM_BACKBONE
    if not (folder / "model.safetensors").is_file():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            AutoModel.from_config(AutoConfig.from_pretrained(BACKBONE)).save_pretrained(folder)
        backbone_image_processor(BACKBONE).save_pretrained(folder)
    return folder
