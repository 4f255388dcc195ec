# SPDX-License-Identifier: MIT
"""The metrics agree with scikit-learn's, load without a network, and refuse scores that mean nothing."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, top_k_accuracy_score
from transformers import EvalPrediction

import prompt_cam_hf.metrics.classification as classification
from prompt_cam_hf.metrics.classification import ClassificationReport, build_compute_metrics


@pytest.fixture
def metric():
    return ClassificationReport(keep_in_memory=True)


@pytest.fixture
def evaluation():
    """Scores of 300 images on 12 classes, better than chance, with the last class missing and the rest unequal."""
    random = np.random.default_rng(0)
    references = np.minimum(random.integers(0, 11, 300), random.integers(0, 11, 300))
    predictions = random.normal(size=(300, 12)).astype("float32")
    predictions[np.arange(300), references] += 1.5
    return predictions, references


def test_agrees_with_scikit_learn(metric, evaluation):
    predictions, references = evaluation
    report = metric.compute(predictions=predictions, references=references)
    predicted = predictions.argmax(axis=1)
    assert report["top1"] == pytest.approx(accuracy_score(references, predicted))
    assert report["top5"] == pytest.approx(top_k_accuracy_score(references, predictions, k=5, labels=range(12)))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        balanced = balanced_accuracy_score(references, predicted)
    assert report["macro_accuracy"] == pytest.approx(balanced)
    assert report["macro_accuracy"] != pytest.approx(report["top1"])


def test_confusion_counts_true_classes_in_rows(metric):
    # Two images of class 0, one of them taken for class 2; one of class 2; class 1 occurs nowhere.
    scores = np.array([[3, 1, 2], [0, 1, 5], [0, 1, 5]])
    report = metric.compute(predictions=scores, references=[0, 0, 2])
    assert report["confusion"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    assert report["top1"] == pytest.approx(2 / 3)
    assert report["macro_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert report["top5"] == 1.0


def test_equal_scores_earn_no_credit(metric):
    report = metric.compute(predictions=np.zeros((100, 100)), references=range(100))
    assert report["top1"] == pytest.approx(1 / 100)
    assert report["top5"] == pytest.approx(5 / 100)
    assert report["confusion"][:, 0].tolist() == [1] * 100


def test_batches_give_what_the_whole_gives(metric, evaluation):
    predictions, references = evaluation
    whole = metric.compute(predictions=predictions, references=references)
    for start in range(0, 300, 70):
        metric.add_batch(predictions=predictions[start : start + 70], references=references[start : start + 70])
    batched = metric.compute()
    assert batched.pop("confusion").tolist() == whole.pop("confusion").tolist()
    assert batched == whole


def test_loads_as_a_script_without_a_network(evaluation, metric, monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    predictions, references = evaluation
    loaded = evaluate.load(str(Path(classification.__file__)), cache_dir=str(tmp_path))
    report = loaded.compute(predictions=predictions, references=references)
    expected = metric.compute(predictions=predictions, references=references)
    assert report.pop("confusion").tolist() == expected.pop("confusion").tolist()
    assert report == expected


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([[0.0, 1.0], [float("nan"), 0.0]], [0, 1], "1 of 2 images have scores that are not finite, first image 1"),
        ([[0.0, 1.0], [0.0, 1.0]], [0, 2], "Image 1 has the true class 2; .* run from 0 to 1"),
        ([[0.0, 1.0], [0.0, 1.0]], [0, -100], "Image 1 has the true class -100"),
    ],
)
def test_refuses_what_has_no_meaning(metric, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, references=references)


def test_trainer_gets_scalars_from_the_first_prediction(metric, evaluation):
    predictions, references = evaluation
    expected = metric.compute(predictions=predictions, references=references)
    del expected["confusion"]
    compute_metrics = build_compute_metrics()
    assert compute_metrics(EvalPrediction(predictions=predictions, label_ids=references)) == expected
    several = (predictions, np.zeros((300, 7)))
    assert compute_metrics(EvalPrediction(predictions=several, label_ids=references)) == expected
