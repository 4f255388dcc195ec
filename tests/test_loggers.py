# SPDX-License-Identifier: MIT
"""Loggers beside the training program's own: TensorBoard and trackio, without a network."""

import sqlite3

import pytest
from faults.processes import run
from faults.processes import train as train_program
from small_runs import (  # noqa: F401 - fixtures are found by being here
    as_arguments,
    fixture_backbone,
    fixture_photos,
    fixture_recipe,
    log_of,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prompt_cam_hf.training import recipe as recipe_module
from prompt_cam_hf.training.train import train


def test_tensorboard_has_what_the_log_has(recipe, tmp_path):
    train(recipe(num_train_epochs=2, trainer={"report_to": "tensorboard"}))
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    for name, key in (("train/loss", "loss"), ("eval/top1", "eval_top1")):
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(value)) for step, value in log_of(tmp_path / "out", key)]


def test_trackio_logs_into_a_folder_of_this_machine(recipe, tmp_path):
    """It reads where to log when it is imported, so it gets a process of its own."""
    arguments = [*as_arguments(recipe(num_train_epochs=2)), "--trainer.report_to=trackio", "--trainer.project=birds"]
    ran = run(train_program, *arguments, environment={"TRACKIO_DIR": str(tmp_path / "trackio")}, memory=None)
    assert ran.code == 0, ran
    with sqlite3.connect(tmp_path / "trackio" / "birds.db") as database:
        runs = database.execute("SELECT DISTINCT run_name FROM metrics").fetchall()
        logged = " ".join(str(row) for row in database.execute("SELECT * FROM metrics"))
    assert runs == [("out",)]  # one run, called after the folder, though the test split is reported after training
    assert "train/loss" in logged and "eval/top1" in logged


def test_a_logger_that_is_not_installed_is_told_before_training(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_module, "get_available_reporting_integrations", lambda: ["wandb"])
    with pytest.raises(
        ValueError, match=r"report_to names trackio, which is not installed; run `pip install trackio`"
    ):
        train(recipe(trainer={"report_to": ["wandb", "trackio"]}))
    assert not (tmp_path / "out").exists()
