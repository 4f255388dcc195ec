# SPDX-License-Identifier: MIT
"""What the campaign attacks, and the table of what it found.

A case that passes was right, or it was `refused`, by a call of the fixture of that name; a case that fails was wrong.
All cases are slow but those marked `short`, which run with all other tests.
"""

import dataclasses
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_backbone_config
from PIL import Image
from transformers import ViTModel

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor

SEED = 13
COLOURS = {"blue": (40, 40, 220), "green": (40, 200, 40), "red": (220, 40, 40)}

_HERE = Path(__file__).parent
_found: dict[str, Counter] = defaultdict(Counter)


def pytest_collection_modifyitems(items):
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)
            if item.get_closest_marker("short") is None:
                item.add_marker(pytest.mark.slow)


@pytest.fixture
def refused(record_property):
    """To be called in a case that was refused as documented."""
    return lambda: record_property("fault", "refused well")


@pytest.fixture(autouse=True)
def _kind(request, record_property):
    record_property("kind", request.module.KIND)


def pytest_runtest_logreport(report):
    told = dict(report.user_properties)
    if "kind" not in told or (report.when != "call" and not report.failed):
        return
    outcome = "skipped" if report.skipped else "wrong" if report.failed else told.get("fault", "right")
    _found[told["kind"]][outcome] += 1


def pytest_terminal_summary(terminalreporter):
    if not _found:
        return
    columns = ("right", "refused well", "wrong", "skipped")
    rows = [("faults", "tried", *columns)]
    for kind, counts in [*sorted(_found.items()), ("all", sum(_found.values(), Counter()))]:
        tried = sum(counts[column] for column in columns[:3])
        rows.append((kind, str(tried), *(str(counts[column]) for column in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("faults")
    for first, *rest in rows:
        numbers = "  ".join(text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        terminalreporter.write_line(f"{first.ljust(widths[0])}  {numbers}")


@dataclasses.dataclass(frozen=True)
class World:
    """What is whole: a backbone, a model on it, the same model without its backbone, images, and a tree of classes."""

    backbone: Path
    model: Path
    prompts: Path
    photos: Path
    tree: Path

    def recipe(self, folder: Path, **settings) -> list[str]:
        """Arguments of a training run of a second into `folder`."""
        path = folder.with_suffix(".yaml")
        path.write_text(f"backbone: {self.backbone}\n")
        settings = {
            "data": self.photos, "output_dir": folder, "image_size": 32, "learning_rate": 0.1, "train_batch_size": 8,
            "num_train_epochs": 4, "warmup_epochs": 1, "dataloader_num_workers": 0, **settings,
        }  # fmt: skip
        return [str(path), *(f"--{name}={value}" for name, value in settings.items())]


def draw(path: Path, colour: tuple[int, int, int], seed: int, size: int = 40) -> None:
    """Save noise with a square of a colour."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 90, (size, size, 3)).astype(np.uint8)
    top, left = random.integers(0, size // 2, 2)
    pixels[top : top + size // 2, left : left + size // 2] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_classes(folder: Path, number: int, seed: int = 0) -> Path:
    """Make a folder of class folders with `number` images each."""
    for label, (name, colour) in enumerate(COLOURS.items()):
        for index in range(number):
            draw(folder / name / f"{index}.png", colour, seed + 100 * label + index)
    return folder


@pytest.fixture(scope="session", name="world")
def fixture_world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        backbone = ViTModel(tiny_backbone_config(), add_pooling_layer=False)
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        backbone.save_pretrained(folder / "backbone")
        model = PromptCAMForImageClassification.from_backbone(
            folder / "backbone", id2label=dict(enumerate(COLOURS)), first_prompt_layer=1
        )
    for name, whole in (("model", True), ("prompts", False)):
        model.save_pretrained(folder / name, include_backbone=whole)
        build_image_processor(32).save_pretrained(folder / name)
    draw_classes(folder / "photos" / "train", 6)
    draw_classes(folder / "photos" / "test", 3, seed=50)
    (folder / "tree.csv").write_text("colour,warmth,all\nred,warm,colours\nblue,cold,colours\ngreen,cold,colours\n")
    return World(folder / "backbone", folder / "model", folder / "prompts", folder / "photos", folder / "tree.csv")
