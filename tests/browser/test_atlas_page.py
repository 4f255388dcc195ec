# SPDX-License-Identifier: MIT
"""The page of an atlas as a person uses it."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect
from test_class_atlas import run, save_photos, varied_model

from browser.conftest import NARROW, WIDE
from browser.looks import faint_text, sticks_out

# Not in the order of the numbers, so that sorting by name does something.
NAMES = {0: "Green Jay", 1: "Blue_Jay", 2: "Zebra Finch", 3: "Ünder-bird of a rather long name, the lesser", 4: "Auk"}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """An atlas, small, with a class of each kind: well read, badly read, never read."""
    folder = tmp_path_factory.mktemp("atlas")
    photos = save_photos(folder / "photos")
    for path in photos.iterdir():
        path.rename(photos / NAMES[int(path.name[-1])])
    return run(photos, folder / "out", varied_model(id2label=NAMES))


@pytest.fixture
def open_atlas(made, open_page):
    return lambda **options: open_page(made.page, **options)


@pytest.fixture
def page(open_atlas) -> Page:
    return open_atlas()


def listed(page: Page) -> list[str]:
    """The names in the list of classes, as far as they are shown."""
    return page.locator("li[data-number]:visible a").all_text_contents()


def sections(page: Page) -> list[str]:
    """The headings of the classes, as far as they are shown."""
    return [text.split(" class ")[0] for text in page.locator("section[data-number]:visible h3").all_text_contents()]


def accuracies(made) -> dict[str, float | None]:
    return {row["class"]: row["accuracy"] for row in pq.read_table(made.classes).to_pylist()}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everything_can_be_read(open_atlas, width, dark):
    page = open_atlas(width=width, dark=dark)
    for closed in page.locator("summary").all():
        closed.click()
    assert not faint_text(page) and not sticks_out(page)
    # The last column of a table, too.
    for table in page.locator(".scroll").all():
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth")
    page.get_by_role("button", name="Enlarge").first.click()
    assert not faint_text(page) and not sticks_out(page)
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") != dark


def test_classes_come_before_confusions(page):
    headings = page.locator("main h2").all_inner_texts()
    assert headings.index("Classes") < headings.index("Classes that are taken for one another")


def test_classes_are_sorted(made, page):
    rate = accuracies(made)
    assert len({value for value in rate.values() if value is not None}) > 2
    order = page.get_by_label("Order")
    for choice, expected in {
        "by name": sorted(NAMES.values(), key=lambda name: name.replace("Ü", "U").lower()),
        "least recognised first": sorted(NAMES.values(), key=lambda name: 2 if rate[name] is None else rate[name]),
        "most recognised first": sorted(NAMES.values(), key=lambda name: 2 if rate[name] is None else -rate[name]),
        "by number": list(NAMES.values()),
    }.items():
        order.select_option(choice)
        assert listed(page) == sections(page) == expected, choice


def test_classes_are_filtered_by_name(page):
    page.get_by_label("Name has").fill("jay BLUE")
    assert listed(page) == sections(page) == ["Blue_Jay"]
    expect(page.get_by_role("status")).to_have_text("1 of 5 classes")
    for heading in page.locator("section[data-name]:not([data-number]):visible h3").all_text_contents():
        assert "Blue_Jay" in heading
    page.get_by_label("Name has").fill("nobody")
    assert listed(page) == sections(page) == []
    page.get_by_role("button", name="Show all").click()
    expect(page.get_by_role("status")).to_have_text("5 of 5 classes")
    assert listed(page) == list(NAMES.values())


def test_classes_are_filtered_by_accuracy(made, page):
    rate = {name: value for name, value in accuracies(made).items() if value is not None}
    middle = 100 * sorted(rate.values())[len(rate) // 2]
    page.get_by_label("at least").fill(f"{middle:.1f}")
    # To a tenth of a percent, as one would type it.
    assert listed(page) == [name for name, value in rate.items() if round(100 * value, 1) >= round(middle, 1)]
    page.get_by_label("at least").fill("")
    page.get_by_label("at most").fill(f"{middle:.1f}")
    assert sections(page) == [name for name, value in rate.items() if round(100 * value, 1) <= round(middle, 1)]


def test_a_link_shows_what_the_filter_hides(page):
    own = page.locator("section[data-number]").filter(has=page.locator("p a")).first
    link = own.locator("p a").first
    name, other = own.locator("h3").text_content().split(" class ")[0], link.text_content()
    page.get_by_label("Name has").fill(name)
    assert sections(page) == [name]
    link.click()
    assert set(sections(page)) == set(listed(page)) | {other} == {name, other}
    expect(page.locator("section[data-number] h3", has_text=other)).to_be_in_viewport()
    page.get_by_label("Name has").fill("nobody")
    page.goto(page.url.partition("#")[0] + "#class-1")
    assert sections(page) == ["Blue_Jay"]


def test_an_image_is_enlarged_by_mouse(page):
    figure = page.locator("main figure").first
    caption = figure.locator("figcaption span").inner_text()
    before = figure.locator("svg").first.bounding_box()
    figure.locator("svg").nth(1).click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    assert dialog.locator("figcaption").inner_text() == caption
    assert dialog.locator("svg").count() == figure.locator("svg").count()
    assert dialog.locator("svg").first.bounding_box()["width"] > 1.2 * before["width"]
    page.mouse.click(3, 3)  # outside
    expect(dialog).to_be_hidden()


def test_images_are_enlarged_by_keyboard(page):
    buttons = page.get_by_role("button", name="Enlarge")
    total = buttons.count()
    buttons.nth(0).focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    place = page.locator("#enlarged-place")
    expect(place).to_have_text(f"1 of {total}")
    page.keyboard.press("ArrowRight")
    expect(place).to_have_text(f"2 of {total}")
    assert dialog.locator("figcaption").inner_text() == page.locator("main figcaption span").nth(1).inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(place).to_have_text(f"{total} of {total}")  # round
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert dialog.evaluate(
        "dialog => dialog.contains(document.activeElement) || document.activeElement === document.body"
    )
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(buttons.nth(1)).to_be_focused()


def test_only_images_that_the_filter_shows_are_enlarged(page):
    page.get_by_label("Name has").fill("zebra")
    shown = page.locator("main figure:visible").count()
    assert 0 < shown < page.locator("main figure").count()
    page.get_by_role("button", name="Enlarge").first.click()
    assert page.locator("#enlarged-place").inner_text() == f"1 of {shown}"


def test_every_control_has_a_name(page):
    page.get_by_role("button", name="Enlarge").first.click()
    for tag in ("button", "input", "select"):
        for control in page.locator(tag).all():
            assert re.search(r"\w", control.aria_snapshot().partition('"')[2]), control


def test_maps_lie_on_their_image(page):
    """What the browser draws is the embedded image in grey under the embedded map: brightest at the map's peak."""
    figure = page.locator("main figure").first
    panels = figure.locator("svg")
    colourful = [
        panel.evaluate("svg => [...svg.children].map(child => child.tagName + (child.getAttribute('filter') ?? ''))")
        for panel in panels.all()
    ]
    assert colourful[0] == ["image"] and all(one == ["useurl(#grey)", "image"] for one in colourful[1:])
    for panel in panels.all()[1:]:
        outer, inner = panel.bounding_box(), panel.locator("> image").bounding_box()
        assert inner == pytest.approx(outer, abs=0.5)


def test_without_scripts_everything_is_there(made, open_atlas):
    page = open_atlas(java_script_enabled=False)
    assert listed(page) == sections(page) == list(NAMES.values())
    assert page.get_by_role("button").count() == 0 and page.get_by_label("Name has").is_hidden()
    assert page.locator("main figure").count() == Path(made.page).read_text(encoding="utf-8").count("<figure>")
