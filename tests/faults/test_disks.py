# SPDX-License-Identifier: MIT
"""A full disk, two runs in one folder, and several threads: one sentence, one result, the same answers."""

import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from faults.conftest import draw_classes
from faults.processes import Ran, caught, refused_well, run, start, train
from faults.test_kills import COMMANDS, results, same
from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor, open_image
from prompt_cam_hf.data.splits import load_image_data
from prompt_cam_hf.loading import load_pipeline
from prompt_cam_hf.training.data import ImageDataset
from prompt_cam_hf.training.features import cache_features

KIND = "full disks, two runs, threads"


@pytest.fixture(scope="module", name="expected")
def fixture_expected(world, tmp_path_factory):
    made: dict[str, dict] = {}

    def make(name: str) -> dict:
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "out"
            ran = run(COMMANDS[name].call, *COMMANDS[name].arguments(world, folder), seconds=120)
            assert ran.code == 0, ran
            made[name] = results(COMMANDS[name], folder)
        return made[name]

    return make


# --- A full disk ---


@pytest.mark.parametrize("size", [8_000, 20_000, 100_000])
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "prepare"])
def test_a_quota_is_told_and_nothing_half_written_counts(world, expected, tmp_path, refused, name, size):
    command, out = COMMANDS[name], tmp_path / "out"
    arguments = command.arguments(world, out)
    ran = run(command.call, *arguments, file_size=size, seconds=120)
    if ran.code != 0:
        assert ran.refused_well(), ran
        refused()
    assert (ran.code == 0) == (out / command.done).exists()
    if ran.code != 0:
        again = run(command.call, *arguments, seconds=120)
        assert again.code == 0, again
    assert same(results(command, out), expected(name))


def fill_cache(backbone: str, photos: str, folder: str, views: int) -> float:
    """Cache many views; the mean of what is read back."""
    labels = dict(enumerate(("blue", "green", "red")))
    model = PromptCAMForImageClassification.from_backbone(backbone, id2label=labels, first_prompt_layer=1)
    images = ImageDataset(load_image_data(photos, validation_fraction=0).train, build_image_processor(32))
    cached = cache_features(model, images, folder, num_views=views)
    return float(np.mean([item["prefix_hidden_states"].mean() for item in (cached[i] for i in range(len(cached)))]))


@pytest.fixture(name="small_disk")
def fixture_small_disk(tmp_path):
    """A file system of 8 MB, where the machine allows mounting."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_cache_larger_than_the_disk_is_refused(world, small_disk, refused):
    told = run(caught, fill_cache, str(world.backbone), str(world.photos), str(small_disk), 500).told
    assert refused_well(told) and "GB" in told["message"], told
    refused()


def test_a_disk_that_fills_while_features_are_cached(world, small_disk, refused):
    """Another program takes what is left, as soon as the file is there."""
    folder = small_disk / "cache"
    running = start(caught, fill_cache, str(world.backbone), str(world.photos), str(folder), 150)
    while running.process.is_alive() and not list(folder.glob("*.partial")):
        time.sleep(0.0005)
    try:
        with open(small_disk / "other", "wb") as other:
            while True:
                other.write(bytes(1 << 14))
                other.flush()
    except OSError:
        pass
    ran = running.wait()
    assert ran.code == 0, f"ended by signal {ran.code}\n{ran}"
    if "returned" not in ran.told:
        assert refused_well(ran.told), ran
        refused()
    (small_disk / "other").unlink(missing_ok=True)
    first = run(caught, fill_cache, str(world.backbone), str(world.photos), str(folder), 150).told
    plain = run(caught, fill_cache, str(world.backbone), str(world.photos), str(small_disk.parent / "c"), 150).told
    assert first["returned"] == pytest.approx(plain["returned"], abs=1e-6)


@pytest.mark.parametrize("name", ["train", "atlas", "evaluate"])
def test_a_full_disk_is_told(world, expected, small_disk, refused, name):
    command, out = COMMANDS[name], small_disk / "out"
    arguments = command.arguments(world, out)
    with open(small_disk / "other", "wb") as other:
        os.posix_fallocate(other.fileno(), 0, (8 << 20) - (40 << 10))
    ran = run(command.call, *arguments, seconds=120)
    assert ran.refused_well() and not (out / command.done).exists(), ran
    (small_disk / "other").unlink()
    again = run(command.call, *arguments, seconds=120)
    assert again.code == 0, again
    assert same(results(command, out), expected(name))
    refused()


# --- Two runs at once ---


@pytest.mark.parametrize("delay", [0.0, 0.3], ids=["at once", "a little later"])
@pytest.mark.parametrize("name", COMMANDS)
def test_of_two_runs_in_a_folder_one_is_refused(world, expected, tmp_path, refused, name, delay):
    command, out = COMMANDS[name], tmp_path / "out"
    arguments = command.arguments(world, out)
    first = start(command.call, *arguments)
    time.sleep(delay)
    second = start(command.call, *arguments)
    ran: list[Ran] = [first.wait(120), second.wait(120)]
    assert same(results(command, out), expected(name))
    good, bad = sorted(ran, key=lambda one: one.code != 0)
    assert good.code == 0, good
    if bad.code != 0:
        assert bad.refused_well(), bad
        holders = {str(one.process.pid) for one in (first, second)}
        assert any(pid in bad.err for pid in holders) or "exists already" in bad.err, "it is not said who holds it"
        refused()
    elif name != "prepare":  # the second finds all images in their places
        pytest.fail("both ran to their end in one folder, and neither was told of the other")


def test_two_runs_share_one_cache(world, tmp_path):
    """The second waits for what the first computes, or reads it."""
    arguments = [
        world.recipe(
            tmp_path / name, cache_features=True, first_prompt_layer=1, cache_dir=tmp_path / "cache", cache_views=4
        )
        for name in ("one", "two")
    ]
    ran = [process.wait(120) for process in [start(train, *given) for given in arguments]]
    assert [one.code for one in ran] == [0, 0], ran
    assert same(*(results(COMMANDS["train"], tmp_path / name) for name in ("one", "two")))
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


# --- Threads ---


def logits_in_threads(folder: str, number: int) -> list:
    """What one model says in several threads at once, each with its own images."""
    model = PromptCAMForImageClassification.from_pretrained(folder).eval()
    batches = torch.randn(number, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def ask(batch: torch.Tensor) -> list:
        with torch.no_grad():
            found = model(batch, output_trait_maps=True)
        return [found.logits.flatten().tolist(), found.trait_maps.flatten().tolist()]

    alone = [ask(batch) for batch in batches]
    with ThreadPoolExecutor(number) as pool:
        together = list(pool.map(ask, batches))
    return [alone, together]


@pytest.mark.short
def test_a_model_may_be_asked_from_several_threads(world):
    alone, together = run(logits_in_threads, str(world.model), 8).told
    assert same(alone, together)


def labels_in_threads(folder: str, photos: str) -> list:
    """Models loaded and asked in several threads at once."""
    files = sorted(Path(photos).rglob("*.png"))
    barrier = threading.Barrier(4)

    def ask(_: int) -> list:
        barrier.wait()
        pipe = load_pipeline(folder, "cpu")
        return [row["score"] for row in pipe([str(file) for file in files], trait_maps=False, top_k=3)[0]]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(4)))


def test_models_may_be_loaded_in_several_threads(world):
    first, *others = run(labels_in_threads, str(world.model), str(world.photos / "test")).told
    assert all(same(first, other) for other in others)


def images_in_threads(folder: str) -> int:
    files = sorted(Path(folder).rglob("*.png"))
    alone = [open_image(file).tobytes() for file in files]
    with ThreadPoolExecutor(8) as pool:
        return sum(
            one == other
            for one, other in zip(alone, pool.map(lambda file: open_image(file).tobytes(), files), strict=True)
        )


def test_images_may_be_opened_in_several_threads(tmp_path):
    draw_classes(tmp_path / "photos", 20)
    assert run(images_in_threads, str(tmp_path / "photos")).told == 60


def test_a_folder_that_vanishes_is_told(world, tmp_path, refused):
    """Images are removed between the check and the training."""
    photos = shutil.copytree(world.photos, tmp_path / "photos")
    running = start(train, *world.recipe(tmp_path / "out", data=photos, num_train_epochs=40))
    while running.process.is_alive() and not (tmp_path / "out" / "recipe.yaml").exists():
        time.sleep(0.002)
    shutil.rmtree(photos)
    ran = running.wait()
    assert ran.refused_well(), ran
    assert not (tmp_path / "out" / "results.json").exists()
    refused()
