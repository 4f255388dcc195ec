# SPDX-License-Identifier: MIT
"""The evaluation of models and their maps: the paper's Tables 1 and 2, and more, for any model and data.

`subjects` loads the models and chooses their maps, `measure` measures both on each image, `summary` computes means
with confidence intervals, `report` renders them, and `build` has the function `evaluate`, which does all of it.
"""

from prompt_cam_hf.evaluation.build import evaluate
from prompt_cam_hf.evaluation.summary import Evaluation

__all__ = ["Evaluation", "evaluate"]
