# SPDX-License-Identifier: MIT
"""Classes are found by the names that people write."""

import pytest

from prompt_cam_hf.explanations.class_names import find_class, find_classes

NAMES = {0: "Blue Jay", 1: "Green_Jay", 2: "Red-winged Blackbird", 3: "Jay", 4: "blue jay", 5: "Ōtus ÉLÉGANS"}


def test_names_are_found_however_they_are_written():
    assert find_class(NAMES, "Blue Jay") == 0
    assert find_class(NAMES, "blue jay") == 4
    assert find_class(NAMES, " green  JAY") == 1
    assert find_class(NAMES, "red_winged blackbird") == 2
    assert find_class(NAMES, "ōtus élégans") == 5
    assert find_classes(NAMES, ["Jay", 2, "Green Jay", 3]) == [3, 2, 1]
    assert find_classes(NAMES, "Jay") == [3] and find_classes(NAMES, 4) == [4]


def test_a_miss_offers_the_nearest_names():
    with pytest.raises(
        ValueError, match=r"no class 'Red winged Blackbrid' among the model's 6; did you mean 'Red-wing"
    ):
        find_class(NAMES, "Red winged Blackbrid")
    # What holds the name comes first.
    with pytest.raises(ValueError, match="did you mean 'Red-winged Blackbird'"):
        find_class(NAMES, "bird")
    with pytest.raises(ValueError, match="the model knows 6 classes, such as 'Blue Jay', 'Green_Jay'"):
        find_class(NAMES, "zzz")
    with pytest.raises(ValueError, match=r"'BLUE JAY' is not clear: it may be 'Blue Jay' \(number 0\) and 'blue jay'"):
        find_class(NAMES, "BLUE JAY")
    with pytest.raises(ValueError, match="no class number 6; the model's go from 0 to 5"):
        find_classes(NAMES, [6])
    with pytest.raises(ValueError, match="No class was named"):
        find_classes(NAMES, [])
