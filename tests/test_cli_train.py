# SPDX-License-Identifier: MIT
"""`prompt-cam train`, as a user types it: what it trains, and the one sentence that it ends with when it cannot."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import rarely
from faults.processes import prompt_cam, run, start
from hub_server import connect, serve
from small_runs import (  # noqa: F401 - fixtures are found by being here
    assert_same_weights,
    fixture_backbone,
    fixture_photos,
    weights_of,
)
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.training.recipe_files import RECIPES, list_recipes
from prompt_cam_hf.training.train import INTERRUPTED, main
from prompt_cam_hf.training.trainer import complete_checkpoints

ROOT = Path(__file__).parents[1]


@pytest.fixture(name="small")
def fixture_small(backbone):
    """Keys that make a run of a second of a recipe."""
    keys = {
        "backbone": backbone, "image_size": 32, "learning_rate": 0.1, "train_batch_size": 8, "num_train_epochs": 2,
        "warmup_epochs": 1, "dataloader_num_workers": 0,
    }  # fmt: skip
    return [part for name, value in keys.items() for part in (f"--{name}", str(value))]


def prompt_cam_train(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def refusal(answer) -> str:
    """The sentence that a command ended with, on one line."""
    assert answer.exit_code == 2, answer.output
    return " ".join(answer.stderr.splitlines()[-1].split())


# --- What it runs ---


def test_a_recipe_by_name_from_anywhere(photos, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = prompt_cam_train(photos, "--out", "model", *small)
    assert answer.exit_code == 0, answer.output
    assert "Saved in model" in answer.stdout and "macro accuracy" in answer.stdout
    saved, named = (
        yaml.safe_load(path.read_text()) for path in (Path("model/recipe.yaml"), RECIPES / "own_photos.yaml")
    )
    assert saved["skip_unreadable"] is named["skip_unreadable"] is True
    assert (saved["data"], saved["output_dir"], saved["num_train_epochs"]) == (str(photos), "model", 2)
    # The same from Python's name for it, and with the recipe that was saved.
    main(["own_photos", "--data", str(photos), "--output_dir", "again", *small])
    assert prompt_cam_train("--recipe", "model/recipe.yaml", "--out", "third").exit_code == 0
    for other in ("again", "third"):
        assert_same_weights("model", other)


def test_lists():
    names = list_recipes()
    assert names.keys() == {path.stem for path in RECIPES.iterdir()}
    printed = prompt_cam_train("--list-recipes").stdout.splitlines()
    assert [line.split()[0] for line in printed] == sorted(names)
    assert all(re.fullmatch(r"\w+ +[A-Z].*\.", line) for line in printed)
    keys = prompt_cam_train("--list-keys").stdout
    assert "--num_train_epochs VALUE" in keys and "Default: 100." in keys


def test_recipes_are_listed_without_waiting_for_torch():
    code = (
        "import sys; from prompt_cam_hf.training.recipe_files import list_recipes; list_recipes(); print(*sys.modules)"
    )
    # As the command imports the package; otherwise it registers the model.
    code = f"import sys; sys.argv[0] = 'prompt-cam'; {code}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "yaml"} & set(ran.stdout.split())


# --- What it refuses ---


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{photos}", "--epochs", "3"], "Error: unknown key 'epochs'; the nearest one is 'warmup_epochs'."),
        (["{photos}", "--seed", "x"], "Error: seed must be a whole number, got 'x'."),
        (["--seed", "3", "{photos}"], "Error: '{photos}' is neither a key (--key) nor the value of one; name the "
         "images by --data, or, with prompt-cam train, before all keys."),
        (["{photos}", "--recipe", "own_photo"], "Error: There is no recipe file 'own_photo', nor a recipe of that "
         "name; the nearest name is 'own_photos', and `prompt-cam train --list-recipes` lists all."),
        (["./nowhere"], "Error: There is no folder or file ./nowhere."),
        (["{photos}", "--train_batch_size", "1000"], "Error: train_batch_size is 1000, but there are only 27 training "
         "images; choose at most as many."),
        (["{photos}", "--learning_rate", "1e30", "--warmup_epochs", "0", "--prompt_dropout", "0"],
         "Error: The loss is nan after epoch 1: training has diverged. Lower the learning_rate (now 1e+30), or use "
         "more warmup_epochs."),
        (["{photos}", "--trainer.report_to", "tensorbord"],
         "Error: trainer.report_to: unknown logger 'tensorbord'; the nearest one is 'tensorboard'."),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)  # fmt: skip
def test_mistakes_get_one_sentence(photos, small, tmp_path, arguments, sentence):
    arguments = [part.format(photos=photos) for part in arguments]
    if arguments[0] == "--seed":
        small = []
    answer = prompt_cam_train(*arguments[:1], *small, *arguments[1:], "--out", tmp_path / "out")
    assert refusal(answer) == sentence.format(photos=photos)
    assert "Traceback" not in answer.output


def test_where_nothing_can_be_written(photos, small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        sentence = refusal(prompt_cam_train(photos, "--out", out, *small))
        assert sentence.endswith(f"{tmp_path / 'file'} is a file; choose another output_dir.")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    sentence = refusal(prompt_cam_train(photos, "--out", tmp_path / "a" / "b", *small))
    assert sentence == (
        f"Error: Nothing can be written to the output folder {tmp_path / 'a' / 'b'}: {tmp_path} is read-only; choose "
        "another output_dir."
    )


def test_a_full_disk(photos, small, tmp_path):
    ran = run(prompt_cam, "train", photos, "--out", tmp_path / "out", *small, file_size=8_000)
    assert ran.code == 2 and ran.refused_well(), ran
    assert "File too large" in ran.err or "is the disk full?" in ran.err, ran
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_failed_upload_keeps_its_sentence(photos, small, tmp_path):
    upload = ("--hub_model_id", "org/sparrows", "--hub_license", "mit")
    with serve() as hub, connect(hub, tmp_path / "home"):
        hub.fail("PUT /lfs-storage", 500, times=100)
        answer = prompt_cam_train(photos, "--out", tmp_path / "out", *small, *upload)
    pattern = (
        rf"Error: The model is trained and saved in {tmp_path}/out, but not uploaded: .* Then: prompt-cam publish "
        rf"{tmp_path}/out org/sparrows --license mit"
    )
    assert re.search(f"{pattern}$", refusal(answer))
    assert "Saved in" in answer.stdout and json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, rarely(2)])
def test_interrupted_and_resumed(photos, small, tmp_path, workers):
    arguments = ["train", photos, *small, "--dataloader_num_workers", workers, "--num_train_epochs", 40]
    running = start(prompt_cam, *arguments, "--out", tmp_path / "out", memory=None)
    while running.process.is_alive() and not complete_checkpoints(tmp_path / "out"):
        time.sleep(0.01)
    os.killpg(running.process.pid, signal.SIGINT)  # as a terminal does it, which tells the workers too
    ran = running.wait()
    assert (ran.code, ran.err.splitlines()[-1]) == (130, INTERRUPTED), ran
    assert "Traceback" not in ran.err
    assert not (tmp_path / "out" / "results.json").exists()
    ran = run(prompt_cam, *arguments, "--out", tmp_path / "out", "--resume_from_checkpoint", memory=None)
    assert ran.code == 0, ran
    whole = run(prompt_cam, *arguments, "--out", tmp_path / "whole", memory=None)
    assert whole.code == 0, whole
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


# --- Under accelerate's launcher ---


@pytest.mark.slow
@pytest.mark.long
def test_the_launcher_is_quiet_where_it_is_told_to(photos):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", ROOT / "training" / "train.py", "own_photos", "--seed=x"]
    ran = subprocess.run(list(map(str, launch)), capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == ["error: seed must be a whole number, got 'x'."]


def test_the_launcher_of_several_processes_quotes_the_sentence(tmp_path, monkeypatch):
    """Its summary is made of what the failed process left in this file."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match=r"error: seed must be a whole number, got 'x'\."):
        main(["own_photos", "--seed=x"])
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert failure.message == "error: seed must be a whole number, got 'x'."
    assert abs(failure.timestamp - time.time()) < 60
