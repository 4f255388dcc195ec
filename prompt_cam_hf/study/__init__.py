# SPDX-License-Identifier: MIT
"""A kit for a study with people: which traits do they recognise in the maps of several models (paper, section 4.4)?

`make` draws a form in which nobody can tell the models apart, `score` computes shares with intervals, and how far the
raters agree.
"""

from prompt_cam_hf.study.make import make_study
from prompt_cam_hf.study.score import StudyScore, score_study

__all__ = ["StudyScore", "make_study", "score_study"]
