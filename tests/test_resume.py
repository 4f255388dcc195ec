# SPDX-License-Identifier: MIT
"""A training run that is interrupted, resumed, refused, or shared by two processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rarely
from small_runs import (  # noqa: F401 - fixtures are found by being here
    as_arguments,
    assert_same_weights,
    fixture_backbone,
    fixture_finished,
    fixture_photos,
    fixture_recipe,
    log_of,
)

from prompt_cam_hf.training.train import train
from prompt_cam_hf.training.trainer import complete_checkpoints

ROOT = Path(__file__).parents[1]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_never_overwritten(finished, recipe, tmp_path):
    out = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    before = files_of(out)
    with pytest.raises(FileExistsError, match=r"out is not empty; choose another output_dir, or .*--resume_from_ch"):
        train(recipe())
    assert files_of(out) == before


def test_another_recipe_cannot_resume(finished, recipe, tmp_path):
    out = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    before = files_of(out)
    with pytest.raises(ValueError, match=r"The run in .*out has learning_rate 0\.1, the recipe says 0\.2"):
        train(recipe(num_train_epochs=8, learning_rate=0.2, resume_from_checkpoint=True))
    assert files_of(out) == before


def test_resume_refusals(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint-4 is not a complete checkpoint of the output folder"):
        train(recipe(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4")))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"holds no run to resume: recipe\.yaml is missing"):
        train(recipe(resume_from_checkpoint=True))
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_may_be_said_from_the_start(recipe, tmp_path, resume):
    train(recipe(num_train_epochs=2, resume_from_checkpoint=resume))
    train(recipe(num_train_epochs=2, output_dir=str(tmp_path / "plain")))
    assert_same_weights(tmp_path / "out", tmp_path / "plain")


@pytest.mark.parametrize("damage", ["unfinished", "half written", "half removed"])
def test_unfinished_checkpoints_are_not_trusted(finished, recipe, tmp_path, damage):
    out = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    for path in out.iterdir():
        if path.is_file() and path.name != "recipe.yaml":
            path.unlink()
    last = out / "checkpoint-32"
    (last / "complete").unlink()
    if damage == "half written":
        (last / "model.safetensors").write_bytes((last / "model.safetensors").read_bytes()[:100])
        (last / "trainer_state.json").unlink()
    if damage == "half removed":
        (last / "model.safetensors").unlink()
    result = train(recipe(num_train_epochs=8, resume_from_checkpoint=True))
    assert_same_weights(out, finished[0].output_dir)
    assert_same_weights(last, Path(finished[0].output_dir) / "checkpoint-32")
    assert result.metrics == finished[1].metrics
    assert log_of(out, "loss") == log_of(finished[0].output_dir, "loss")


def test_resume_from_a_named_checkpoint(finished, recipe, tmp_path):
    out = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    first = complete_checkpoints(out)[0]
    assert first.name != "checkpoint-32"
    train(recipe(num_train_epochs=8, resume_from_checkpoint=str(first)))
    assert_same_weights(out, finished[0].output_dir)


def test_a_finished_run_can_be_resumed(finished, recipe, tmp_path):
    out = shutil.copytree(finished[0].output_dir, tmp_path / "out")
    result = train(recipe(num_train_epochs=8, resume_from_checkpoint=True))
    assert result.metrics == finished[1].metrics
    assert_same_weights(out, finished[0].output_dir)


def test_workers_change_nothing(recipe, tmp_path):
    """Workers that outlive epochs are started once, and once more where a run is resumed; dropout must not notice."""
    settings = {"num_train_epochs": 3, "prompt_dropout": 0.5}
    none, two, resumed = (tmp_path / name for name in ("none", "two", "resumed"))
    train(recipe(**settings, output_dir=str(none), dataloader_num_workers=0))
    train(recipe(**settings, output_dir=str(two), dataloader_num_workers=2))
    assert_same_weights(two / "checkpoint-12", none / "checkpoint-12")
    shutil.copytree(two, resumed)
    (resumed / "checkpoint-12" / "complete").unlink()
    train(recipe(**settings, output_dir=str(resumed), dataloader_num_workers=2, resume_from_checkpoint=True))
    assert_same_weights(resumed / "checkpoint-12", none / "checkpoint-12")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "prompt_cam_hf.training.train", *arguments]
    return subprocess.Popen(command, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_when(process: subprocess.Popen, condition) -> None:
    """SIGKILL as soon as the condition holds; fails where the process ends before."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.001)
    pytest.fail(f"ended before it could be killed:\n{process.communicate()[0]}")


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(recipe, tmp_path):
    """Killed in an epoch, then killed while a checkpoint is written; dropout, stochastic depth and views are on."""
    settings = {"num_train_epochs": 15}
    whole = recipe(**settings, output_dir=str(tmp_path / "whole"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(whole)
    torch.set_num_threads(num_threads)

    out = tmp_path / "out"
    arguments = as_arguments(recipe(**settings, resume_from_checkpoint=True))
    kill_when(start(arguments), lambda: len(complete_checkpoints(out)) == 2)
    seen = {path.name for path in out.iterdir()}

    def writing() -> bool:
        new = [path for path in out.glob("checkpoint-*") if path.name not in seen]
        return any(not (path / "complete").exists() for path in new)

    kill_when(start(arguments), writing)
    assert not (out / "results.json").exists()
    last = start(arguments)
    printed = last.communicate()[0]
    assert last.returncode == 0, printed
    assert_same_weights(out, whole.output_dir)
    for name in ("results.json", "confusion_test.csv"):
        assert (out / name).read_text() == (Path(whole.output_dir) / name).read_text()
    assert log_of(out, "loss") == log_of(whole.output_dir, "loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "cache"),
    [([str(ROOT / "training" / "train.py")], False), rarely(["-m", "prompt_cam_hf.training.train"], True)],
)
def test_two_processes_reach_the_losses_of_one(recipe, tmp_path, program, cache):
    """27 images in batches of 8: the last batch of an epoch is filled up, in one process as in two."""
    settings = {"prompt_dropout": 0, "drop_path_rate": 0}
    if cache:
        settings |= {"cache_features": True, "first_prompt_layer": 1}
    one = recipe(**settings, cache_dir=str(tmp_path / "one cache"))
    result = train(one)
    two = recipe(**settings, output_dir=str(tmp_path / "two"), cache_dir=str(tmp_path / "two cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [f"--main_process_port={port}", *program, *as_arguments(two)]
    done = subprocess.run(launch, env=one_thread(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("macro accuracy") == 1
    assert {path.name for path in complete_checkpoints(two.output_dir)[-1].glob("rng*")} == {
        "rng_state_0.pth", "rng_state_1.pth",
    }  # fmt: skip
    for key, tolerance in (("loss", 1e-4), ("eval_top1", 0)):
        steps, values = zip(*log_of(one.output_dir, key), strict=True)
        two_steps, two_values = zip(*log_of(two.output_dir, key), strict=True)
        assert two_steps == steps
        assert two_values == pytest.approx(values, rel=tolerance)
    facts = json.loads((Path(two.output_dir) / "results.json").read_text())
    assert facts["test"] == pytest.approx(result.metrics["test"])
