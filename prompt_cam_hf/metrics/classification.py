# SPDX-License-Identifier: MIT
"""Top-1, top-5 and macro accuracy and the confusion counts of a classifier, as one `evaluate` metric.

Works without a network, as a class or as a script: `evaluate.load(".../prompt_cam_hf/metrics/classification.py")`.
"""

# One import a line: evaluate reads the imports of a metric script line by line.
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
from sklearn.metrics import confusion_matrix
from transformers import EvalPrediction

from prompt_cam_hf.metrics.metric_info import metric_info

_DESCRIPTION = "Top-1, top-5 and macro accuracy and the confusion counts of a classifier, from its scores."

_INPUTS_DESCRIPTION = """
Args:
    predictions: (n, C) finite scores, one a class; higher is better. Logits and probabilities give the same result.
    references: (n,) true classes, 0 to C - 1.

Returns:
    top1: share of the images whose true class has the highest score, 0 to 1. Of equal scores the lower class wins.
    top5: share of the images whose true class is among the five highest scores (all C where C is below 5).
    macro_accuracy: mean over the classes that occur in `references` of the share of their images that top1 counts.
    confusion: (C, C) int64 counts; rows are true classes, columns predicted ones.
"""


class ClassificationReport(evaluate.Metric):
    """Top-1, top-5, macro accuracy (0 to 1) and confusion counts (C, C) from scores (n, C) and true classes (n,)."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(_DESCRIPTION, _INPUTS_DESCRIPTION, predictions=("float32", 1), references=("int64", 0))

    def _compute(self, predictions: Any, references: Any) -> dict[str, Any]:
        scores = np.asarray(predictions)
        true_classes = np.asarray(references)
        _check_scores(scores, true_classes)
        num_classes = scores.shape[1]
        ranking = np.argsort(-scores, axis=1, kind="stable")
        confusion = confusion_matrix(true_classes, ranking[:, 0], labels=range(num_classes))
        images_per_class = confusion.sum(axis=1)
        present = images_per_class > 0
        return {
            "top1": float(np.mean(ranking[:, 0] == true_classes)),
            "top5": float(np.mean((ranking[:, :5] == true_classes[:, None]).any(axis=1))),
            "macro_accuracy": float(np.mean(confusion.diagonal()[present] / images_per_class[present])),
            "confusion": confusion,
        }


def _check_scores(scores: np.ndarray, true_classes: np.ndarray) -> None:
    if scores.ndim != 2:
        raise ValueError(f"predictions have the shape {scores.shape}; they must be (images, classes).")
    num_classes = scores.shape[1]
    broken = np.flatnonzero(~np.isfinite(scores).all(axis=1))
    if len(broken):
        raise ValueError(
            f"{len(broken)} of {len(scores)} images have scores that are not finite, first image {broken[0]}."
        )
    outside = np.flatnonzero((true_classes < 0) | (true_classes >= num_classes))
    if len(outside):
        raise ValueError(
            f"Image {outside[0]} has the true class {true_classes[outside[0]]}; with {num_classes} scores an image, "
            f"classes run from 0 to {num_classes - 1}."
        )


def build_compute_metrics() -> Callable[[EvalPrediction], dict[str, float]]:
    """Build a `compute_metrics` for Trainer that gives `top1`, `top5` and `macro_accuracy`.

    The logits are taken as the first prediction where a model returns several.
    """
    metric = ClassificationReport(keep_in_memory=True)

    def compute_metrics(evaluation: EvalPrediction) -> dict[str, float]:
        logits = evaluation.predictions[0] if isinstance(evaluation.predictions, tuple) else evaluation.predictions
        report = metric.compute(predictions=logits, references=evaluation.label_ids)
        return {name: report[name] for name in ("top1", "top5", "macro_accuracy")}

    return compute_metrics
