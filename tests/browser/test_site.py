# SPDX-License-Identifier: MIT
"""The site of the documentation as a reader sees it, opened from a folder as it could be from a server."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

import prompt_cam_hf
from browser.conftest import NARROW, WIDE
from browser.looks import faint_text, sticks_out

pytest.importorskip("mkdocs", reason="the site is built with the newest transformers only")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def build(folder: Path, root: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everything_can_be_read(site, open_page, width, dark):
    page = open_page(site / "index.html", width=width, dark=dark)
    names = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]  # which a server shows
    assert len(names) > 25
    # What is wide is wide in the window of a phone, and colours are those of the scheme at any width.
    for path in names if width == NARROW and dark else names[:3]:
        page.goto(path.as_uri())
        assert not faint_text(page) and not sticks_out(page), path
        assert all(image.evaluate("one => one.naturalWidth") for image in page.locator("article img").all()), path
        assert page.locator("h1").count() == 1, path
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(
    ("words", "title"),
    [("remove_trait", "Python"), ("num_agnostic_prompts", "Recipes"), ("insertion", "explanations")],
)
def test_search_finds(site, open_page, words, title, width):
    page = open_page(site / "traits" / "explain.html", width=width)
    if width == NARROW:
        page.locator("label.md-header__button[for=__search]").click()
    field = page.get_by_placeholder("Search")
    field.click()
    field.press_sequentially(words)
    results = page.locator(".md-search-result__list h1, .md-search-result__list h2")
    expect(results.first).to_be_visible(timeout=20_000)
    headings = page.locator(".md-search-result__list").inner_text()
    assert title in headings
    page.locator(".md-search-result__link").first.click()
    expect(page.locator("article")).to_contain_text(re.compile(words, re.IGNORECASE))


def test_the_scheme_is_chosen_by_hand(site, open_page):
    page = open_page(site / "index.html")
    page.locator("label[title=Dark]").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"


def test_the_list_for_language_models_has_every_page(site):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[.+?\]\((.+?)\): \w.+[.?!]$", text, re.MULTILINE)
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert sorted(listed) == sorted(pages - {"index.html", "404.html", "files/tiny_vit.html"})


def test_references_are_made_from_the_code(site):
    python = (site / "reference" / "python.html").read_text()
    for text in (
        'id="prompt_cam_hf.explain"',
        "Parameters:",
        "Raises:",
        "Examples:",
        'id="prompt_cam_hf.PromptCAMConfig"',
    ):
        assert text in python, text
    assert "--box" in (site / "reference" / "commands.html").read_text()
    assert "num_agnostic_prompts" in (site / "reference" / "recipes.html").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_faults_stop_the_build(tmp_path):
    copy = tmp_path / "copy"
    left_out = shutil.ignore_patterns(".*", "build", "tests", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    with open(copy / "docs" / "ideas.md", "a") as page:
        page.write("[x](nowhere.md) [x](training.md#not-there) [x](../gone.py)\n")
    (copy / "docs" / "orphan.md").write_text("# In no navigation\n")
    built = build(tmp_path / "site", root=copy)
    assert built.returncode != 0
    for complaint in ("nowhere.md", "#not-there", "gone.py", "orphan.md"):
        assert complaint in built.stderr, complaint


def test_every_public_name_is_in_the_reference():
    named = re.findall(
        r"^::: prompt_cam_hf\.(\w+)$", (ROOT / "docs" / "reference" / "python.md").read_text(), re.MULTILINE
    )
    assert sorted(named) == sorted(set(prompt_cam_hf.__all__) - {"__version__"})
