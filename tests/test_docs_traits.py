# SPDX-License-Identifier: MIT
"""The Python and the commands of docs/traits run as they stand, and links lead somewhere."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image
from typer.testing import CliRunner

from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.explain import explain

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "docs" / "traits" / f"{name}.md"
    for name in ("explain", "classes", "compare", "field_traits", "misread", "what_a_map_says")
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder with what the pages take for granted; the misread image is none of "Steller Jay"."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(id2label=dict(enumerate(("Blue Jay", "Steller Jay", "Cardinal"))))
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "query" in name:
            parameter.data *= 30  # sharper attention than that of random weights
    model.save_pretrained("my_model")
    build_image_processor(32).save_pretrained("my_model")
    random = np.random.default_rng(0)
    images = (Image.fromarray(random.integers(0, 256, (150, 200, 3), dtype=np.uint8)) for _ in range(99))
    next(images).save("blue_jay.jpg")
    for image in images:
        image.save("misread.jpg")
        if explain("my_model", "misread.jpg").prediction.label != "Steller Jay":
            return tmp_path
    raise AssertionError("the random model knows nothing but Steller Jays")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(workplace, page):
    text = page.read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    commands = re.findall(r"^prompt-cam (.*)$", text, flags=re.MULTILINE)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, str(page), "exec"), {})
    for command in commands:
        answer = CliRunner().invoke(app, shlex.split(command, comments=True))
        assert answer.exit_code == 0, answer.output
    assert not commands or list((workplace / "traits").glob("*.png"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        headings = re.findall(r"^#+ (.*)$", other.read_text(), flags=re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target
