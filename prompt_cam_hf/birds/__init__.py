# SPDX-License-Identifier: MIT
"""Drawn birds with known traits: a fine-grained data set on which a trait map can be right or wrong.

Real images carry no ground truth about traits. Here every class is defined by one or two local traits, every part has
a mask, and any bird can be drawn again with one trait changed, so that explanations can be checked.
"""

from .classes import (
    BIRD_CLASSES,
    COLOURS,
    PARTS,
    PATTERNS,
    TRAIT_PARTS,
    BirdSpec,
    counterfactual,
    matching_classes,
    part_values,
    split_value,
)
from .dataset import bird_spec, birds_dataset, other_birds_dataset, row_spec
from .drawing import draw_bird, unpack_masks

__all__ = [
    "BIRD_CLASSES", "COLOURS", "PARTS", "PATTERNS", "TRAIT_PARTS", "BirdSpec", "bird_spec", "birds_dataset",
    "counterfactual", "draw_bird", "matching_classes", "other_birds_dataset", "part_values", "row_spec",
    "split_value", "unpack_masks",
]  # fmt: skip
