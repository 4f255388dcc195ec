# SPDX-License-Identifier: MIT
"""Mean localisation of maps over a data set, by six metrics, as one `evaluate` metric.

Works without a network, as a class or as a script, as `prompt_cam_hf.metrics.classification` does.
"""

from typing import Any

import evaluate
import numpy as np

from prompt_cam_hf.metrics import localization
from prompt_cam_hf.metrics.metric_info import metric_info

_METRICS = (
    localization.pointing_game,
    localization.relevance_mass_accuracy,
    localization.mass_at_matched_sharpness,
    localization.relevance_rank_accuracy,
    localization.region_iou,
)
_DESCRIPTION = "Localisation of maps against masks: six metrics, and what chance would reach."

_INPUTS_DESCRIPTION = """
Args:
    predictions: (n, rows, cols), one map an image; higher is stronger. Grids may differ.
    references: (n, height, width), boolean masks, of pixels or of the map's patches. Sizes may differ.
    k: of top_k_intersection.
    share: from this share of its pixels a patch is on the mask.

Returns:
    pointing_game, relevance_mass_accuracy, mass_at_matched_sharpness, relevance_rank_accuracy, top_k_intersection,
        region_iou: means over the images, 0 to 1; see prompt_cam_hf.metrics.localization.
    chance: the share of patches on the masks, which uninformative maps reach in every metric but region_iou.
    num_images: n minus the images whose mask is empty, which are left out.
"""


class LocalizationReport(evaluate.Metric):
    """Mean localisation of maps (n, rows, cols) against boolean masks (n, height, width); see `inputs`."""

    def _info(self) -> evaluate.MetricInfo:
        return metric_info(_DESCRIPTION, _INPUTS_DESCRIPTION, predictions=("float32", 2), references=("bool", 2))

    def _compute(
        self, predictions: Any, references: Any, k: int = 3, share: float = localization.PATCH_SHARE
    ) -> dict[str, float]:
        found = []
        for one_map, one_mask in zip(predictions, references, strict=True):
            values, mask = np.stack(list(one_map)), np.stack(list(one_mask)).astype(bool)
            patches = localization.patch_mask(mask, values.shape, share)
            if not patches.any():
                continue
            scores = {metric.__name__: metric(values, patches) for metric in _METRICS}
            scores["top_k_intersection"] = localization.top_k_intersection(values, patches, k)
            found.append({**scores, "chance": localization.chance_level(patches)})
        if not found:
            raise ValueError("No mask has a patch, so there is nothing to be found; check the masks.")
        means = {name: float(np.nanmean([scores[name] for scores in found])) for name in found[0]}
        return {**means, "num_images": len(found)}
