# SPDX-License-Identifier: MIT
"""The examples in the docstrings of the public functions run as they stand."""

import doctest
import inspect
import re

import pytest
from workplace import fixture_made, fixture_workplace  # noqa: F401

import prompt_cam_hf

FUNCTIONS = [name for name in prompt_cam_hf.__all__ if inspect.isroutine(getattr(prompt_cam_hf, name))]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name == "reproduce" else ()) for name in FUNCTIONS]
)
def test_examples_run(name, workplace):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(prompt_cam_hf, name)))
    source = "".join(example.source for example in examples)
    assert re.search(rf"^from prompt_cam_hf import .*\b{name}\b", source, re.MULTILINE) and f"{name}(" in source
    exec(source, {})
