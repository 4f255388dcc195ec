# SPDX-License-Identifier: MIT
"""The numbers that the paper and the official implementation publish, for the tables that set ours beside them.

Accuracies are top-1 in per cent of the official checkpoints, which were chosen on the test split; insertion and
deletion are on CUB with DINO, by a protocol that is not published in full (docs/metrics.md).
"""

# By recipe: of Prompt-CAM, and of a linear probe on the same backbone.
PROMPT_CAM_ACCURACY = {
    "dino_cub": 73.2,
    "dino_cars": 83.2,
    "dino_dogs": 81.1,
    "dino_pet": 91.3,
    "dino_birds525": 98.8,
    "dinov2_cub": 74.1,
    "dinov2_dogs": 81.3,
    "dinov2_pet": 92.7,
}
LINEAR_PROBE_ACCURACY = {"dino_cub": 78.6, "dino_dogs": 82.4, "dino_pet": 92.4, "dino_birds525": 99.2}

# By map: insertion and deletion; PROMPT_CAM_MAP is the sum of the attention of its top heads.
PROMPT_CAM_MAP = "prompt_cam"
FAITHFULNESS = {
    PROMPT_CAM_MAP: (0.61, 0.09),
    "grad_cam": (0.52, 0.17),
    "layer_cam": (0.54, 0.13),
    "eigen_cam": (0.56, 0.22),
    "rollout": (0.55, 0.27),
}
FAITHFULNESS_RECIPE = "dino_cub"


def accuracy_text(recipe: str, method: str) -> str:
    """The published top-1 accuracy of a method under a recipe, or a dash."""
    tables = {"prompt_cam": PROMPT_CAM_ACCURACY, "linear_probe": LINEAR_PROBE_ACCURACY}
    value = tables.get(method, {}).get(recipe)
    return "-" if value is None else f"{value:.1f} %"
