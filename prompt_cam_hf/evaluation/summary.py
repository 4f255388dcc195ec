# SPDX-License-Identifier: MIT
"""What do the measurements of all images say? Means with confidence intervals, and mean curves."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from scipy.stats import bootstrap

CONFIDENCE = 0.95
_RESAMPLES = 2000
# Resamples at a time: bounds memory, whatever the number of images.
_BOOTSTRAP_BATCH = 50


@dataclass(frozen=True)
class Mean:
    """A metric of a model, or of one of its maps, over images.

    Attributes:
        model: The model's name.
        map: The map's name, "" for metrics of the model itself.
        metric: The metric's name.
        value: The mean over the images.
        low: Lower end of the 95 % bootstrap interval of the mean; NaN with one image.
        high: Its upper end.
        num_images: Images that the metric could be measured on.
    """

    model: str
    map: str
    metric: str
    value: float
    low: float
    high: float
    num_images: int

    def __str__(self) -> str:
        """Value and interval."""
        if np.isnan(self.low):
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


# (model, map, metric)
Key = tuple[str, str, str]


def summarize(tables: Iterable[pa.Table], seed: int = 0) -> tuple[list[Mean], dict[Key, np.ndarray]]:
    """Means in the order in which they first appear, and the mean curve of each metric that has curves.

    Args:
        tables: Rows of `ROW_SCHEMA`.
        seed: Of the bootstrap.
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


__all__ = ["CONFIDENCE", "Key", "Mean", "summarize"]
