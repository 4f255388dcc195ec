# SPDX-License-Identifier: MIT
"""Mean ROAD of a model's maps over a data set, as one `evaluate` metric.

Works without a network, as a class or as a script, as `prompt_cam_hf.metrics.classification` does. For long runs call
`prompt_cam_hf.metrics.road.road` batch by batch: this metric keeps all images until it computes.
"""

from collections.abc import Sequence
from typing import Any

import evaluate

from prompt_cam_hf.metrics.metric_info import MAP_COLUMNS, as_batch, metric_info
from prompt_cam_hf.metrics.road import PERCENTILES, road
from prompt_cam_hf.metrics.scoring import Scorer

_DESCRIPTION = "ROAD (Rong et al., ICML 2022): pixels are removed in a map's order, and filled in from around them."

_INPUTS_DESCRIPTION = """
Args:
    predictions: (n, rows, cols), one map an image, all of one grid; higher is stronger.
    references: (n,), the class asked about in each image: the true one or the predicted one.
    pixel_values: (n, channels, height, width), from the image processor.
    model: The classifier, in evaluation mode; images go to its device.
    percentiles: Which parts of the pixels to remove, in per cent.
    seed: Of the noise on what fills the holes.
    batch_size: the number of images that go through the model at once.

Returns:
    num_images: n.
    road: the mean of the combined score, -0.5 to 0.5; high is good.
    morf_curve, lerf_curve: (percentiles,) mean probabilities without the most, and without the least relevant pixels.
    road_per_image: (n,) combined scores.
"""


class RoadReport(evaluate.Metric):
    """Mean ROAD of maps (n, rows, cols) for classes (n,) of a model's images; see `inputs`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(_DESCRIPTION, _INPUTS_DESCRIPTION, **MAP_COLUMNS)

    def _compute(
        self,
        predictions: Any,
        references: Any,
        pixel_values: Any,
        model: Scorer,
        percentiles: Sequence[float] = PERCENTILES,
        seed: int = 0,
        batch_size: int = 32,
    ) -> dict[str, Any]:
        images, maps, classes = as_batch(model, predictions, references, pixel_values)
        found = road(model, images, maps, classes, percentiles, seed=seed, batch_size=batch_size)
        return {
            "num_images": len(images),
            "road": found.combined.mean().item(),
            "morf_curve": found.morf.mean(dim=0).numpy(),
            "lerf_curve": found.lerf.mean(dim=0).numpy(),
            "road_per_image": found.combined.numpy(),
        }
