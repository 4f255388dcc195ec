# SPDX-License-Identifier: MIT
"""Mean insertion and deletion of a model's maps over a data set, as one `evaluate` metric.

Works without a network, as a class or as a script, as `prompt_cam_hf.metrics.classification` does. The model is an
argument of `compute`; for long runs call `prompt_cam_hf.metrics.faithfulness` batch by batch: this metric keeps all
images until it computes.
"""

from collections.abc import Sequence
from typing import Any

import evaluate

from prompt_cam_hf.metrics.faithfulness import deletion, insertion
from prompt_cam_hf.metrics.metric_info import MAP_COLUMNS, as_batch, metric_info
from prompt_cam_hf.metrics.scoring import Scorer

_DESCRIPTION = "Insertion and deletion (Petsiuk et al., BMVC 2018) of a classifier's maps, by a protocol with a name."

_INPUTS_DESCRIPTION = """
Args:
    predictions: (n, rows, cols), one map an image, all of one grid; higher is stronger.
    references: (n,), the class asked about in each image: the true one or the predicted one.
    pixel_values: (n, channels, height, width), from the image processor.
    model: The classifier, in evaluation mode; images go to its device.
    preset: "rise", "rise-eighth", "rise-black" or "fast"; see prompt_cam_hf.metrics.faithfulness.PRESETS.
    batch_size: the number of images that go through the model at once.
    image_mean, image_std: Of the image processor, for "rise-black".

Returns:
    preset: the name of the protocol.
    num_images: n.
    insertion, deletion: mean areas under the curves, 0 to 1. Insertion is good when high, deletion when low.
    insertion_curve, deletion_curve: (num_steps + 1,) mean probabilities of the class.
    insertion_per_image, deletion_per_image: (n,) areas.
"""


class FaithfulnessReport(evaluate.Metric):
    """Mean insertion and deletion of maps (n, rows, cols) for classes (n,) of a model's images; see `inputs`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(_DESCRIPTION, _INPUTS_DESCRIPTION, **MAP_COLUMNS)

    def _compute(
        self,
        predictions: Any,
        references: Any,
        pixel_values: Any,
        model: Scorer,
        preset: str = "rise",
        batch_size: int = 32,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        images, maps, classes = as_batch(model, predictions, references, pixel_values)
        arguments = (model, images, maps, classes, preset, batch_size)
        inserted, deleted = insertion(*arguments), deletion(*arguments, image_mean, image_std)
        return {
            "preset": preset,
            "num_images": len(images),
            "insertion": inserted.auc.mean().item(),
            "deletion": deleted.auc.mean().item(),
            "insertion_curve": inserted.curve.mean(dim=0).numpy(),
            "deletion_curve": deleted.curve.mean(dim=0).numpy(),
            "insertion_per_image": inserted.auc.numpy(),
            "deletion_per_image": deleted.auc.numpy(),
        }
