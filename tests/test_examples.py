# SPDX-License-Identifier: MIT
"""The examples in the docstrings of the public functions run as they stand."""

import doctest
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image
from test_readme import workplace  # noqa: F401
from test_taxonomy import birds, write  # noqa: F401

import prompt_cam_hf
from prompt_cam_hf.explanations.explain import explain

NAMES = ("Blue Jay", "Cardinal", "Steller Jay")
FUNCTIONS = [name for name in prompt_cam_hf.__all__ if inspect.isroutine(getattr(prompt_cam_hf, name))]


@pytest.fixture
def examples_folder(workplace, birds):  # noqa: F811
    """The working directory of the examples: `my_model`, `bird.jpg`, `photos`, `birds`, `model.pt`, `recipe.yaml`."""
    Path("recipe.yaml").write_text("backbone: facebook/dino-vitb16\nlearning_rate: 0.01\n")
    predicted = explain("my_model", "bird.jpg").prediction.number
    # The bird is a Steller Jay to the model, and nothing else.
    others = iter([*NAMES[:2], "Goldfinch", "Robin"])
    id2label = {number: NAMES[2] if number == predicted else next(others) for number in range(5)}
    tiny_model(id2label=id2label).save_pretrained("my_model")
    random = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 2)):
        for name in id2label.values():
            folder = workplace / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return workplace


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_run(name, examples_folder):
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(getattr(prompt_cam_hf, name)))
    source = "".join(example.source for example in examples)
    assert re.search(rf"^from prompt_cam_hf import .*\b{name}\b", source, re.MULTILINE) and f"{name}(" in source
    exec(source, {})
