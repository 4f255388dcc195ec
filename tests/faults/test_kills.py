# SPDX-License-Identifier: MIT
"""Kills at random moments of each command: the same command, run again, ends with what it would have made at once."""

import io
import json
import random
import shutil
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from faults.conftest import SEED, World, draw_classes
from faults.processes import prompt_cam, run, start, train, train_taxonomy

KIND = "kills"
KILLS = 6  # of each command, spread over its time
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Command:
    """Something to interrupt.

    Attributes:
        call: Runs it.
        arguments: Its arguments, for the folder that it writes to.
        done: What stands in that folder when it is complete, and not before.
        results: What of it has to come out the same.
    """

    call: Callable[..., Any]
    arguments: Callable[[World, Path], list[Any]]
    done: str
    results: tuple[str, ...]


def many(world: World) -> Path:
    """More images than a part of an atlas holds."""
    folder = world.photos.parent / "many"
    return folder if folder.exists() else draw_classes(folder, 100)


def leaves(world: World) -> Path:
    """Medicinal Leaf in its layout: 30 classes, here with 40 images each, which lie in one archive."""
    path = world.photos.parent / "leaves.tar"
    if not path.exists():
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG")
        with tarfile.open(path, "w") as archive:
            for number in range(30 * 40):
                name = f"Segmented Medicinal Leaf Images/Leaf {number % 30}/L-{number:04}.jpg"
                entry = tarfile.TarInfo(f"Medicinal Leaf Dataset/{name}")
                entry.size = file.tell()
                archive.addfile(entry, io.BytesIO(file.getvalue()))
    return path


TRAINED = ("model.safetensors", "results.json", "config.json", "confusion_test.csv")
COMMANDS = {
    "train": Command(
        train,
        lambda world, out: world.recipe(out, resume_from_checkpoint="auto", num_train_epochs=12),
        "results.json",
        TRAINED,
    ),
    "cache": Command(
        train,
        lambda world, out: world.recipe(
            out, resume_from_checkpoint="auto", cache_features=True, first_prompt_layer=1, num_train_epochs=12,
            cache_dir=out.with_suffix(".cache"), cache_views=12,
        ),
        "results.json",
        TRAINED,
    ),
    "taxonomy": Command(
        train_taxonomy,
        lambda world, out: [*world.recipe(out, resume_from_checkpoint="auto"), "--taxonomy", world.tree],
        "results.json",
        ("model.safetensors", "results.json", "config.json", "taxonomy.csv"),
    ),
    "atlas": Command(
        prompt_cam,
        lambda world, out: ["atlas", world.model, many(world), "--out", out, "--device", "cpu"],
        "index.html",
        ("images.parquet", "classes.parquet"),
    ),
    "evaluate": Command(
        prompt_cam,
        lambda world, out: [
            "evaluate", world.model, "--data", many(world), "--out", out, "--device", "cpu",
            "--metrics", "faithfulness", "--limit", 64,
        ],
        "index.html",
        ("evaluation.json", "measurements.parquet"),
    ),
    "prepare": Command(
        prompt_cam,
        lambda world, out: ["prepare", "medicinal_leaf", leaves(world), out],
        "manifest.csv",
        ("manifest.csv",),
    ),
}  # fmt: skip


def same(first: Any, second: Any) -> bool:
    """Equal, but for the last bits of numbers."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple | np.ndarray):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, float):
        return first == pytest.approx(second, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True)
    return first == second


def content(path: Path, folder: Path) -> Any:
    """What a result says; where it lies is not part of it."""
    if path.suffix == ".safetensors":
        return {name: tensor.float().numpy().ravel() for name, tensor in load_file(path).items()}
    if path.suffix == ".parquet":
        return pd.read_parquet(path).to_dict("list")
    if path.suffix == ".json":
        return json.loads(path.read_text().replace(str(folder), ""))
    return path.read_text()


def results(command: Command, folder: Path) -> dict[str, Any]:
    return {name: content(folder / name, folder) for name in command.results}


@pytest.fixture(scope="module", name="uninterrupted")
def fixture_uninterrupted(world, tmp_path_factory):
    """What each command makes when it is left in peace, and its time."""
    made: dict[str, tuple[dict[str, Any], float]] = {}

    def make(name: str) -> tuple[dict[str, Any], float]:
        if name not in made:
            command, folder = COMMANDS[name], tmp_path_factory.mktemp(name) / "out"
            ran = run(command.call, *command.arguments(world, folder), seconds=120)
            assert ran.code == 0, ran
            made[name] = results(command, folder), ran.seconds
        return made[name]

    return make


def moments() -> list:
    drawn = random.Random(SEED)
    shares = [(name, round((kill + drawn.random()) / KILLS, 2)) for name in COMMANDS for kill in range(KILLS)]
    short = {("train", shares[3][1])}
    return [
        pytest.param(*row, id=f"{row[0]} at {row[1]:.0%}", marks=[pytest.mark.short] if row in short else [])
        for row in shares
    ]


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("name", "share"), moments())
def test_a_killed_command_can_be_run_again(world, uninterrupted, tmp_path, name, share):
    command, (expected, seconds) = COMMANDS[name], uninterrupted(name)
    out = tmp_path / "out"
    arguments = command.arguments(world, out)
    start(command.call, *arguments).kill(after=share * seconds)
    if (out / command.done).exists():
        assert same(results(command, out), expected), "something half-written was taken for whole"
    again = run(command.call, *arguments, seconds=120)
    if again.code != 0:
        # It had come to its end, and says so.
        assert again.refused_well() and "exists already" in again.err and (out / command.done).exists(), again
    assert same(results(command, out), expected)
    left = [path.name for path in out.rglob("*") if path.name.endswith((".partial", ".part", ".tmp"))]
    assert not left, "an unfinished file was left behind"


def test_killed_again_and_again(world, uninterrupted, tmp_path):
    """A lock or a part that one kill leaves behind does not stop the next run."""
    command, (expected, seconds) = COMMANDS["train"], uninterrupted("train")
    arguments = command.arguments(world, tmp_path / "out")
    for share in (0.5, 0.6, 0.7, 0.4):
        start(command.call, *arguments).kill(after=share * seconds)
    ran = run(command.call, *arguments, seconds=120)
    assert ran.code == 0, ran
    assert same(results(command, tmp_path / "out"), expected)


# --- Damaged caches, and damaged states of an interrupted run ---


def cached_arguments(world: World, out: Path) -> list[str]:
    return world.recipe(
        out, cache_features=True, first_prompt_layer=1, cache_dir=out.parent / "cache", cache_views=2,
        resume_from_checkpoint="auto",
    )  # fmt: skip


def cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[: int(len(content) * share)]


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


CACHE_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": cut(0),
    "cut in its head": cut(0.0005),
    "cut to a half": cut(0.5),
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "zeros behind its head": lambda content: content[:128] + bytes(len(content) - 128),
    "another head": lambda content: content[:128].replace(b"<f4", b"<i4") + content[128:],
    "one bit": flipped,
    "NaN": lambda content: content[:128] + np.full((len(content) - 128) // 4, np.nan, np.float32).tobytes(),
    "a web page": lambda content: b"<html></html>",
    "a pickle": lambda content: b"\x80\x04N.",
}


@pytest.fixture(scope="module", name="cached")
def fixture_cached(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached") / "out"
    ran = run(train, *cached_arguments(world, out))
    assert ran.code == 0, ran
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.short] if name == "cut to a half" else []) for name in CACHE_DAMAGE]
)
def test_a_damaged_cache_is_made_again(world, cached, tmp_path, name):
    shutil.copytree(cached.parent / "cache", tmp_path / "cache")
    damaged = [path for path in (tmp_path / "cache").glob("*.npy")]
    assert damaged
    for path in damaged:
        path.write_bytes(CACHE_DAMAGE[name](path.read_bytes()))
    ran = run(train, *cached_arguments(world, tmp_path / "out"))
    assert ran.code == 0, ran
    command = COMMANDS["cache"]
    assert same(results(command, tmp_path / "out"), results(command, cached))


def emptied(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.write_bytes(b"") for path in found(folder, pattern)] and None


def removed(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.unlink() for path in found(folder, pattern)] and None


def halved(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [path.write_bytes(cut(0.5)(path.read_bytes())) for path in found(folder, pattern)] and None


def found(folder: Path, pattern: str) -> list[Path]:
    paths = list(folder.glob(pattern))
    assert paths, pattern
    return paths


CHECKPOINT = ("optimizer.*", "scheduler.pt", "rng_state*", "trainer_state.json", "model.safetensors")
STATES = [
    *((f"{what} {name}", "train", change(f"checkpoint-*/{name}"))
      for name in CHECKPOINT for what, change in (("no", removed), ("empty", emptied), ("half of", halved))),
    ("empty recipe", "train", emptied("recipe.yaml")),
    ("half of the recipe", "train", halved("recipe.yaml")),
    ("no recipe", "train", removed("recipe.yaml")),
    ("empty settings", "atlas", emptied("atlas_parts/settings.json")),
    ("half of the settings", "atlas", halved("atlas_parts/settings.json")),
    ("empty sums", "atlas", emptied("atlas_parts/state")),
    ("half of the sums", "atlas", halved("atlas_parts/state")),
    ("no part", "atlas", removed("atlas_parts/part-*")),
    ("empty part", "atlas", emptied("atlas_parts/part-*")),
    ("half of a part", "atlas", halved("atlas_parts/part-*")),
    ("empty parts", "evaluate", emptied("evaluation_parts/*")),
    ("half of all parts", "evaluate", halved("evaluation_parts/*")),
]  # fmt: skip


@pytest.fixture(scope="module", name="unfinished")
def fixture_unfinished(world, tmp_path_factory):
    """A run that was killed when it had something to go on with."""
    made: dict[str, Path] = {}
    ready = {"train": "checkpoint-*/complete", "atlas": "atlas_parts/state", "evaluate": "evaluation_parts/part*"}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "out"
            process = start(COMMANDS[name].call, *COMMANDS[name].arguments(world, folder))
            while process.process.is_alive() and not list(folder.glob(ready[name])):
                time.sleep(0.002)
            process.kill()
            assert list(folder.glob(ready[name])) and not (folder / COMMANDS[name].done).exists()
            made[name] = folder
        return made[name]

    return make


@pytest.mark.parametrize(
    ("name", "command", "damage"), [pytest.param(*row, id=f"{row[1]}: {row[0]}") for row in STATES]
)
def test_a_damaged_state_is_refused_or_made_again(
    world, uninterrupted, unfinished, tmp_path, refused, name, command, damage
):
    expected, _ = uninterrupted(command)
    out = shutil.copytree(unfinished(command), tmp_path / "out")
    damage(out)
    arguments = COMMANDS[command].arguments(world, tmp_path / "out")
    # The recipe of the unfinished run has another folder in it, which a resumed run may change.
    ran = run(COMMANDS[command].call, *arguments, seconds=120)
    if ran.code == 0:
        assert same(results(COMMANDS[command], out), expected)
    else:
        assert ran.refused_well(), ran
        refused()
