# SPDX-License-Identifier: MIT
"""Means of the measurements with their confidence intervals, mean curves, and `Evaluation`, which holds them all."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from scipy.stats import bootstrap

from prompt_cam_hf.evaluation.measure import Protocol

CONFIDENCE = 0.95
_RESAMPLES = 2000
# Resamples at a time, which bounds the memory.
_BOOTSTRAP_BATCH = 50


@dataclass(frozen=True)
class Mean:
    """A metric of a model, or of one of its maps ("" for the model itself), over images.

    `low` and `high` are the ends of the 95 % bootstrap interval of the mean, NaN with one image; `num_images` counts
    the images on which the metric could be measured.
    """

    model: str
    map: str
    metric: str
    value: float
    low: float
    high: float
    num_images: int

    def __str__(self) -> str:
        if np.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


# (model, map, metric)
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        means: Each metric of each model and map, with its confidence interval.
        curves: The mean curves of insertion and deletion, by (model, map, metric).
        protocol: What was measured, and how.
        ground_truth: What the maps were localised against, in words. None: localisation was not measured.
        origin: Where the images come from, in words.
        num_images: The number of images that could be read.
        num_unreadable: The number of images that could not be read.
        folder: Where evaluation.json, measurements.parquet and index.html are.
    """

    means: list[Mean]
    curves: dict[Key, np.ndarray]
    protocol: Protocol
    ground_truth: str | None
    origin: str
    num_images: int
    num_unreadable: int
    folder: Path


def summarize(tables: Iterable[pa.Table], seed: int = 0) -> tuple[list[Mean], dict[Key, np.ndarray]]:
    """Compute the mean of each metric, and the mean curve of each metric that has curves.

    The means are in the order in which they first appear in the rows, of `ROW_SCHEMA`; `seed` is that of the
    bootstrap.
    """
    values: dict[Key, list[float]] = {}
    totals: dict[Key, np.ndarray] = {}
    counts: dict[Key, int] = {}
    for table in tables:
        for row in table.select(["model", "map", "metric", "value", "curve"]).to_pylist():
            key = (row["model"], row["map"], row["metric"])
            values.setdefault(key, [])
            if not np.isnan(row["value"]):
                values[key].append(row["value"])
            if row["curve"] is not None:
                totals[key] = totals.get(key, 0.0) + np.asarray(row["curve"], np.float64)
                counts[key] = counts.get(key, 0) + 1
    means = [_mean(key, np.asarray(found), seed) for key, found in values.items()]
    return means, {key: total / counts[key] for key, total in totals.items()}


def _mean(key: Key, values: np.ndarray, seed: int) -> Mean:
    if not len(values):
        return Mean(*key, float("nan"), float("nan"), float("nan"), 0)
    low = high = float("nan")
    if len(values) > 1:
        low, high = bootstrap(
            (values,),
            np.mean,
            n_resamples=_RESAMPLES,
            batch=_BOOTSTRAP_BATCH,
            confidence_level=CONFIDENCE,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return Mean(*key, float(values.mean()), float(low), float(high), len(values))
