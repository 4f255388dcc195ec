# SPDX-License-Identifier: MIT
"""A repository's code never runs, and nobody is asked whether it should."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from faults.processes import prompt_cam, run, train, train_taxonomy

KIND = "a repository's code"

EVIL = """
from pathlib import Path
Path(__file__).parent.joinpath("executed").touch()
Path("executed").touch()
class Evil: pass
EvilConfig = EvilModel = EvilProcessor = EvilPipeline = Evil
"""
CONFIG = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForImageClassification": "evil.EvilModel",
}
PROCESSORS = {"AutoImageProcessor": "evil.EvilProcessor", "AutoProcessor": "evil.EvilProcessor"}


def alter(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def in_processor(folder: Path) -> None:
    alter(folder / "preprocessor_config.json", auto_map=PROCESSORS)


def in_unknown_processor(folder: Path) -> None:
    alter(folder / "preprocessor_config.json", auto_map=PROCESSORS, image_processor_type="EvilProcessor")


def in_config(folder: Path) -> None:
    alter(folder / "config.json", auto_map=CONFIG)


def in_other_config(folder: Path) -> None:
    alter(folder / "config.json", auto_map=CONFIG, model_type="evil")


def in_pipelines(folder: Path) -> None:
    pipelines = {"image-classification": {"impl": "evil.EvilPipeline", "pt": ["AutoModelForImageClassification"]}}
    alter(folder / "config.json", custom_pipelines=pipelines)


def in_all(folder: Path) -> None:
    in_processor(folder)
    in_config(folder)
    in_pipelines(folder)


PLACES = {
    "processor": in_processor, "unknown processor": in_unknown_processor, "config": in_config,
    "other config": in_other_config, "pipelines": in_pipelines, "all": in_all,
}  # fmt: skip
COMMANDS = {
    "predict": (prompt_cam, lambda model, world: ["predict", model, world.photos / "test"]),
    "explain": (prompt_cam, lambda model, world: ["explain", model, world.photos / "test/red", "--out", "out"]),
    "compare": (
        prompt_cam,
        lambda model, world: ["compare", model, world.photos / "test/red/0.png", "--out", "out", "--true", "red"],
    ),
    "atlas": (prompt_cam, lambda model, world: ["atlas", model, world.photos, "--out", "out"]),
    "evaluate": (
        prompt_cam,
        lambda model, world: ["evaluate", model, "--data", world.photos, "--out", "out", "--limit", "4"],
    ),
    "publish": (
        prompt_cam,
        lambda model, world: ["publish", model, "org/model", "--license", "mit", "--dry-run", "--out", "out"],
    ),
    "train": (train, lambda model, world: ["--backbone", model, *world.recipe(model.with_name("run"))]),
    "taxonomy": (
        train_taxonomy,
        lambda model, world: ["--backbone", model, "--taxonomy", world.tree, *world.recipe(model.with_name("run"))],
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_code_is_not_run_whatever_is_answered(world, tmp_path, refused, command, place):
    call, arguments = COMMANDS[command]
    training = call is not prompt_cam
    model = shutil.copytree(world.backbone if training else world.model, tmp_path / "model")
    if training:  # a backbone has a processor too, as they come from the Hub
        shutil.copy(world.model / "preprocessor_config.json", model)
    (model / "evil.py").write_text(EVIL)
    PLACES[place](model)
    home = tmp_path / "home"
    ran = run(
        call, *arguments(model, world), stdin="y\n" * 20, cwd=tmp_path, environment={"HF_MODULES_CACHE": str(home)}
    )
    assert not list(tmp_path.rglob("executed")) and not list(home.rglob("executed")), ran
    assert "[y/N]" not in ran.out + ran.err and "Do you wish" not in ran.out + ran.err, "the user was asked"
    if ran.code:
        assert ran.refused_well(), ran
        refused()


@pytest.mark.short
def test_the_installed_command_runs_no_code(world, tmp_path):
    """As a user types it, with `y` on standard input."""
    model = shutil.copytree(world.model, tmp_path / "model")
    (model / "evil.py").write_text(EVIL)
    in_unknown_processor(model)
    command = [sys.executable, "-m", "prompt_cam_hf", "predict", str(model), str(world.photos / "test")]
    ran = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert not list(tmp_path.rglob("executed")), ran.stderr[-2000:]
    assert "[y/N]" not in ran.stdout + ran.stderr
