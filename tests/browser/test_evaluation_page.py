# SPDX-License-Identifier: MIT
"""The page of an evaluation as a person reads it."""

import numpy as np
import pytest
from conftest import ID2LABEL, random_images, tiny_model
from PIL import Image
from playwright.sync_api import expect

from browser.conftest import NARROW, WIDE
from browser.looks import faint_text, sticks_out
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.evaluation import evaluate
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.measure import Protocol


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """Eight images, two models, and maps enough for curves of several kinds."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_model().save_pretrained(folder / "my_model")
    build_image_processor(32).save_pretrained(folder / "my_model")
    for number, pixels in enumerate(random_images(8).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()):
        (folder / "photos" / ID2LABEL[number % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "photos" / ID2LABEL[number % 2] / f"{number}.png")
    mask = np.zeros((32, 32), dtype=bool)
    mask[8:20, 4:16] = True
    evaluate(
        folder / "my_model",
        folder / "photos",
        folder / "out",
        baselines=[folder / "my_model"],
        maps=["attention_sum", "evidence_sum", "attention_top3"],
        baseline_maps=["hires_cam", "rollout"],
        protocol=Protocol(("faithfulness", "localisation", "sanity"), preset="fast"),
        ground_truth=GroundTruth("squares", lambda index, name, image: mask),
    )
    return folder / "out" / "index.html"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everything_can_be_read(open_page, report, width, dark):
    page = open_page(report, width, dark)
    assert not faint_text(page) and not sticks_out(page)
    # What charts say, as large as it is on the screen.
    for text in page.locator(".charts text").all():
        assert text.bounding_box()["height"] > 12
    for label in page.locator(".legend li").all():
        assert label.evaluate("label => parseFloat(getComputedStyle(label).fontSize)") >= 16


def test_the_last_column_can_be_reached(open_page, report):
    page = open_page(report, NARROW)
    sanity = page.locator(".scroll").last
    rest = "box => box.scrollWidth - box.clientWidth - box.scrollLeft"
    assert sanity.evaluate(rest) > 0
    sanity.focus()
    for _ in range(200):
        page.keyboard.press("ArrowRight")
        if sanity.evaluate(rest) < 1:
            break
    assert sanity.evaluate(rest) < 1
    # And what the row is about is still there.
    name, box = sanity.locator("tbody th").first.bounding_box(), sanity.bounding_box()
    assert name["x"] == pytest.approx(box["x"], abs=1)
    # Narrow tables need no scrolling.
    assert page.locator(".scroll").nth(1).evaluate(rest) <= 0


def test_curves_differ_in_more_than_colour(open_page, report):
    for dark in (False, True):
        page = open_page(report, dark=dark)
        samples = page.locator(".legend svg")
        looks = samples.evaluate_all(
            """all => all.map(one => [getComputedStyle(one).stroke, one.children[0].getAttribute("stroke-dasharray"),
                                      one.children[1].getAttribute("d")])"""
        )
        assert len(looks) == 5 and all(len(set(kind)) >= 4 for kind in zip(*looks, strict=True))
        # The curves look as the legend says.
        drawn = page.locator(".charts g").evaluate_all("all => all.map(one => getComputedStyle(one).stroke)")
        assert drawn == 2 * [colour for colour, _, _ in looks]
        paper = page.evaluate("getComputedStyle(document.querySelector('figure')).backgroundColor")
        assert paper not in drawn


def test_the_best_of_a_column_is_told_without_colour(open_page, report):
    page = open_page(report)
    table = page.get_by_role("region", name="Faithfulness").locator("table")
    for column in (1, 2):
        cells = table.locator(f"tbody tr td:nth-child({column + 1})").all_inner_texts()
        values = [float(text.removeprefix("★").split()[0]) for text in cells]
        best = max(values) if column == 1 else min(values)
        assert [text.startswith("★") for text in cells] == [value == best for value in values]
    heads = table.locator("thead th").all_inner_texts()
    assert "↑ high is good" in heads[1] and "↓ low is good" in heads[2]


def test_images_are_enlarged_and_true_traits_outlined(open_page, report):
    page = open_page(report)
    figures = page.locator("main .pairs figure")
    assert figures.count() >= 4
    for figure in figures.all():
        boxes = (
            "svg => [svg.viewBox.baseVal, svg.lastElementChild.getBBox()].map((b) => [b.x, b.y, b.width, b.height])"
        )
        view, line = figure.locator("svg").nth(1).evaluate(boxes)
        assert np.divide(line, view[2]) == pytest.approx(np.divide([4, 8, 12, 12], 32), abs=0.01)
    page.get_by_role("button", name="Enlarge").first.press("Enter")
    expect(page.locator("#enlarged-place")).to_have_text(f"1 of {figures.count()}")
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Enlarge").first).to_be_focused()
