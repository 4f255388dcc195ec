# SPDX-License-Identifier: MIT
"""Are a model's explanations right? The paper's Tables 1 and 2, and more, for any model and data.

`subjects` says which models and maps are compared, `measure` what is measured on each image, `parts` how a run
survives being killed, `summary` turns measurements into means with confidence intervals, `report` shows them, and
`build` puts them together.
"""

from prompt_cam_hf.evaluation.build import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
