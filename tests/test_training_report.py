# SPDX-License-Identifier: MIT
"""What a finished run says of itself: which numbers are weak, the table, and the two figures."""

import io
import json
import os
import random
import re

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import rarely
from PIL import Image
from small_runs import (  # noqa: F401 - fixtures are found by being here
    fixture_backbone,
    fixture_finished,
    fixture_photos,
    fixture_recipe,
    log_of,
)

from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.training.recipe import num_workers, training_arguments
from prompt_cam_hf.training.report import (
    as_png,
    find_weaknesses,
    plot_confusion,
    plot_learning_curve,
    print_results,
    standard_error,
    trivial_metrics,
)
from prompt_cam_hf.training.train import prepare_run, train


def image_data(names: list[str], train: list[int], validation: list[int] | None = None, test: list[int] | None = None):
    """Data of as many images a class as the lists say, without images."""

    def split(sizes: list[int] | None) -> datasets.Dataset | None:
        labels = [label for label, size in enumerate(sizes or []) for _ in range(size)]
        return None if sizes is None else datasets.Dataset.from_dict({"label": labels})

    return ImageData(split(train), split(validation), split(test), dict(enumerate(names)))


# --- Weak numbers ---


def test_the_standard_error_is_the_spread_of_an_accuracy():
    draws = random.Random(0)
    for share, number in ((0.5, 16), (0.9, 100)):
        found = [sum(draws.random() < share for _ in range(number)) / number for _ in range(4000)]
        assert np.std(found) == pytest.approx(standard_error(share, number), rel=0.05)
    assert standard_error(0.5, 100) == pytest.approx(0.05)


def test_strong_numbers_have_no_notes():
    assert not find_weaknesses(image_data(["a", "b"], [50, 60], [50, 50]))
    assert not find_weaknesses(image_data(["a", "b"], [50, 60]))
    assert not find_weaknesses(image_data(["a", "b"], [70, 30]))
    assert find_weaknesses(image_data(["a", "b"], [80, 20]))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            image_data(["a", "b"], [9, 9], [8, 8]),
            r"The best epoch is chosen on 16 validation images, .* has a standard error of up to 12 points: .*",
        ),
        (
            image_data(["sparrow", "wren", "tit"], [80, 10, 10]),
            r"80% of the training images are of the class sparrow, where an even share is 33%: .*",
        ),
        (
            image_data(["Blue Jay", "Cardinal", "blue_jay"], [5, 5, 5]),
            r"The classes 'Blue Jay' and 'blue_jay' differ only in case, spaces, hyphens or underscores; .*",
        ),
        (image_data(["Mésange", "Me\u0301sange"], [5, 5]), "The classes 'Mésange' and 'Me\u0301sange' differ only .*"),
    ],
    ids=["few", "uneven", "spelling", "accents"],
)
def test_weak_numbers_are_told(data, expected):
    (note,) = find_weaknesses(data)
    assert re.fullmatch(expected, note)


def test_what_needs_no_image():
    """Six classes; the test split has another proportion than train."""
    data = image_data(list("abcdef"), [30, 20, 5, 4, 3, 1], [1] * 6, [2, 10, 1, 1, 1, 5])
    metrics = trivial_metrics(data)
    assert metrics["chance"] == pytest.approx({"top1": 1 / 6, "top5": 5 / 6, "macro_accuracy": 1 / 6})
    assert metrics["largest_class"] == pytest.approx({"top1": 2 / 20, "top5": 15 / 20, "macro_accuracy": 1 / 6})


def test_the_largest_class_has_a_column_where_it_tells_more_than_chance(capsys):
    for sizes in ([8, 2], [5, 5]):
        print_results("Title", trivial_metrics(image_data(["a", "b"], sizes, None, sizes)), {}, ["Mind [this]."])
        printed = capsys.readouterr().out
        assert ("largest class" in printed) == (sizes == [8, 2]) == ("80.0%" in printed)
        assert "Note: Mind [this]." in printed


def test_notes_and_errors_are_printed_and_saved(finished, capsys, recipe, caplog):
    folder = finished[1].output_dir
    facts = json.loads((folder / "results.json").read_text())
    (note,) = facts["notes"]
    assert note.startswith("The best epoch is chosen on 3 validation images")
    top1 = facts["test"]["top1"]
    assert facts["test"]["top1_standard_error"] == pytest.approx((top1 * (1 - top1) / 15) ** 0.5)
    train(recipe(num_train_epochs=2))
    printed = capsys.readouterr().out
    assert f"Note: {note}" in printed and re.search(r"\d% ± \d+\.\d", printed)
    assert [record.message for record in caplog.records].count(note) == 1  # before the first step


# --- Figures ---


@pytest.mark.parametrize("number", [2, 16, rarely(200), rarely(300)])
def test_confusions_are_drawn(number):
    names = [f"White breasted Kingfisher {index}" for index in range(number)]
    counts = np.random.default_rng(0).integers(0, 2, (number, number)) + 8 * np.eye(number, dtype=int)
    counts[0] = 0  # a class without images
    figure = plot_confusion(pd.DataFrame(counts, index=names, columns=names), "test")
    axes = figure.axes[0]
    shown = np.asarray(axes.images[0].get_array())
    expected = [[count / max(1, sum(row)) for count in row] for row in counts.tolist()]
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == (names if number <= 250 else [])
    numbers = {(round(text.get_position()[1]), round(text.get_position()[0])): text.get_text() for text in axes.texts}
    cells = {cell: str(counts[cell]) for cell in zip(*map(list, np.nonzero(counts)), strict=True)}
    assert numbers == (cells if number <= 15 else {})
    assert axes.get_title() == f"Confusions, {counts.sum()} test images"
    width, height = Image.open(io.BytesIO(as_png(figure))).size
    assert max(width, height) < 6000
    assert number > 250 or max(width, height) / number > 12  # pixels for the name of a class


@pytest.mark.filterwarnings("error")
def test_names_are_drawn_as_they_are():
    names = ["$\\frac{1$", "a_b^c", "\x1b[31mred", "long_" * 30, "红雀"]
    figure = plot_confusion(pd.DataFrame(np.eye(5, dtype=int), index=names, columns=names), "test")
    shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert shown[:3] == ["$\\frac{1$", "a_b^c", "\\x1b[31mred"]
    assert shown[3] == ("long_" * 30)[:49] + "…" and len(shown[4]) == 2
    assert as_png(figure).startswith(b"\x89PNG")


def test_the_learning_curve_shows_the_log(finished):
    folder, metrics = finished[1].output_dir, finished[1].metrics
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    loss, top1 = plot_learning_curve(history, finished[1].best_epoch, metrics).axes
    for panel, key in ((loss, "loss"), (top1, "eval_top1")):
        assert panel.lines[0].get_xydata().tolist() == [
            pytest.approx([step / 4, value]) for step, value in log_of(folder, key)
        ]
        assert panel.lines[1].get_xdata()[0] == finished[1].best_epoch
    assert top1.lines[2].get_ydata()[0] == pytest.approx(1 / 3)
    without = plot_learning_curve([line for line in history if "loss" in line], 8, metrics)
    assert len(without.axes) == 1 and "epoch 8" in without.axes[0].get_legend().get_texts()[0].get_text()
    for name in ("learning_curve", "confusion_test", "confusion_validation"):
        Image.open(folder / f"{name}.png").verify()


# --- Workers and loggers ---


def test_workers_are_as_many_as_there_are_cores(recipe, monkeypatch):
    default = recipe(dataloader_num_workers=None)
    for cores, processes, expected in ((1, 1, 1), (2, 1, 2), (64, 1, 4), (8, 4, 2), (2, 8, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert num_workers(default, reads_images=True) == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    arguments = training_arguments(default)
    assert (arguments.dataloader_num_workers, arguments.dataloader_persistent_workers) == (3, True)
    for settings, expected in (
        ({"dataloader_num_workers": 6}, 6),
        ({"dataloader_num_workers": 6, "cache_features": True}, 6),
        ({"dataloader_num_workers": None, "cache_features": True}, 0),
        ({"dataloader_num_workers": 0}, 0),
    ):
        arguments = training_arguments(recipe(**settings))
        assert arguments.dataloader_num_workers == expected
        assert arguments.dataloader_persistent_workers == (expected > 0)
    kept = training_arguments(recipe(dataloader_num_workers=2, trainer={"dataloader_persistent_workers": False}))
    assert not kept.dataloader_persistent_workers


@pytest.mark.filterwarnings("error:This DataLoader will create")
def test_the_default_does_not_make_torch_warn(recipe):
    trainer = prepare_run(recipe(dataloader_num_workers=None)).trainer
    assert len(next(iter(trainer.get_train_dataloader()))["labels"]) == 8
