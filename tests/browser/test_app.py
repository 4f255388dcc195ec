# SPDX-License-Identifier: MIT
"""The page of `prompt-cam app` in a browser: its numbers are those of the functions, for each visitor."""

import io
import re
import time
from functools import partial

import numpy as np
import pytest
from conftest import ID2LABEL, tiny_model
from PIL import Image
from playwright.sync_api import Page, expect

from browser.conftest import NARROW
from browser.looks import faint_text, sticks_out
from prompt_cam_hf import explain, remove_trait
from prompt_cam_hf.app import build_app
from prompt_cam_hf.birds import BIRD_CLASSES, birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.data.splits import ImageData
from prompt_cam_hf.training.demo import RECIPES
from prompt_cam_hf.training.recipe import load_recipe
from prompt_cam_hf.training.train import train

SETTINGS = {
    "num_train_epochs": 12, "warmup_epochs": 1, "eval_every_epochs": 12, "cache_views": 1, "train_batch_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A model that reads most birds, trained in seconds, and a test bird of each class as a file."""
    folder = tmp_path_factory.mktemp("app")
    sizes = {"train": 8, "validation": 1, "test": 2}
    drawn = {name: birds_dataset(name, n, 96, num_proc=1, cache_dir=folder / "drawn") for name, n in sizes.items()}
    recipe = load_recipe(
        RECIPES / "birds.yaml", backbone=BACKBONE, output_dir=folder / "model", cache_dir=folder / "cache", **SETTINGS
    )
    images = {name: data.select_columns(["image", "label"]) for name, data in drawn.items()}
    train(recipe, ImageData(**images, id2label={n: bird.name for n, bird in enumerate(BIRD_CLASSES)}))
    (folder / "birds").mkdir()
    for number in range(len(BIRD_CLASSES)):
        drawn["test"][number]["image"].save(folder / "birds" / f"{number:02}.png")
    return folder, drawn["test"]


@pytest.fixture(scope="module")
def address(birds):
    folder, _ = birds
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        app = build_app(folder / "model", examples=folder / "birds", device="cpu")
        _, url, _ = app.launch(prevent_thread_lock=True, quiet=True)
        yield url
        uploads = [path for path in (folder / "uploads").rglob("*") if path.is_file()]
        app.close()
        # Nothing of what visitors uploaded or made outlives the page; its server ends in a thread of its own.
        end = time.monotonic() + 10
        while any(path.exists() for path in uploads) and time.monotonic() < end:
            time.sleep(0.1)
        assert uploads and not [path for path in uploads if path.exists()]


@pytest.fixture
def visit(address, open_page):
    """Open the page, and wait until it is ready."""

    def visit(query: str = "", **options) -> Page:
        page = open_page(address + query, **options)
        expect(page.locator("#examples button").first).to_be_visible(timeout=20_000)
        return page

    return visit


def pick(page: Page, number: int) -> None:
    page.locator(f'#examples [data-example="{number}"]').click()
    expect(page.locator("#command")).to_contain_text(f"{number:02}.png", timeout=20_000)


def upload(page: Page, name: str, content: bytes) -> None:
    clear = page.locator("#picker button[aria-label='Clear']")
    if clear.count():
        clear.first.click()
    page.locator("#picker input[type=file]").first.set_input_files(
        {"name": name, "mimeType": "image/png", "buffer": content}
    )


def choose(page: Page, where: str, name: str) -> None:
    page.locator(f"{where} input").first.fill(name)
    page.keyboard.press("Enter")


def table(page: Page, where: str) -> list[list[str]]:
    rows = page.locator(f"{where} tbody tr").all()
    return [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in rows]


def expected_scores(explanation) -> list[list[str]]:
    return [[str(s.rank), s.label, f"{s.probability:.1%}", f"{s.logit:.2f}"] for s in explanation.top]


def near(shown: list[list[str]], expected: list[list[str]]) -> bool:
    """Equal up to the last digit shown, which may be rounded the other way."""
    numbers, words = r"[-+]?\d+\.?\d*", partial(re.sub, r"[-+]?\d+\.?\d*", "#")
    shown, expected = str(shown), str(expected)
    first, second = ([float(n) for n in re.findall(numbers, text)] for text in (shown, expected))
    return words(shown) == words(expected) and np.allclose(first, second, rtol=0, atol=0.11)


def find_bird(birds) -> tuple[int, tuple[int, ...]]:
    """A bird that is read correctly, and as another class without the box around its traits."""
    folder, drawn = birds
    for number in range(len(BIRD_CLASSES)):
        rows, cols = np.nonzero(drawn[number]["discriminative_mask"])
        box = tuple(map(int, (cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)))
        removal = remove_trait(folder / "model", folder / "birds" / f"{number:02}.png", box)
        if removal.before.prediction.number == drawn[number]["label"] != removal.after.prediction.number:
            return number, box
    raise AssertionError("no bird's prediction rests on its traits")


def test_the_whole_way(visit, birds, tmp_path):
    folder, _ = birds
    number, box = find_bird(birds)
    label = BIRD_CLASSES[number].name
    image, model = folder / "birds" / f"{number:02}.png", folder / "model"
    page = visit()
    # Pick, and the answer.
    pick(page, number)
    told = explain(model, image)
    assert page.locator(".pc-best b").inner_text() == label
    assert near(table(page, "#answer"), expected_scores(told))
    # Ask: the predicted class and another one, typed.
    other = told.scores[1].label
    choose(page, "#asked", label)
    choose(page, "#asked", other)
    expect(page.locator("#heads h3")).to_have_count(2)
    told = explain(model, image, [label, other])
    for row, traits in zip(page.locator("#heads section").all(), told.classes, strict=True):
        assert row.locator("p").inner_text() == traits.verdict
        names = row.locator("button b").all_inner_texts()
        assert names == [*(f"head {head}" for head in traits.head_order), "all heads"]
        captions = row.locator("button span").all_inner_texts()[:-1]
        shares = [
            f"head {head} peak {_percent(traits.maps[head].max())}, {traits.attention_on_patches[head]:.0%} on patches"
            for head in traits.head_order
        ]
        assert near([captions], [shares])
    # Look: the second head of the first class, beside the other class.
    head = told.classes[0].head_order[1]
    page.locator(f'#heads [data-place="0"][data-head="{head}"]').click()
    expect(page.locator("#large figcaption").first).to_have_text(f"{label}: head {head}")
    before = page.locator("#large img").first.get_attribute("src")
    page.locator("#opacity input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#large img").first).not_to_have_attribute("src", before)
    choose(page, "#beside", other)
    expect(page.locator("#large .pc-panels figcaption")).to_have_count(4)
    # Try: a box around the trait turns the prediction, as it does for the function.
    area = page.locator("#canvas canvas")
    area.scroll_into_view_if_needed()
    corner = area.bounding_box()
    scale = corner["width"] / 96
    page.mouse.move(corner["x"] + box[0] * scale, corner["y"] + box[1] * scale)
    page.mouse.down()
    page.mouse.move(corner["x"] + box[2] * scale, corner["y"] + box[3] * scale, steps=3)
    page.mouse.up()
    page.locator("#remove-painted").click()
    expect(page.locator("#removed table")).to_be_visible(timeout=20_000)
    shown = tuple(
        map(int, re.search(r"\((\d+), (\d+), (\d+), (\d+)\)", page.locator("#python").inner_text()).groups())
    )
    assert np.abs(np.subtract(shown, box)).max() <= 1
    removal = remove_trait(model, image, shown, label)
    assert page.locator("#removed p b").first.inner_text() == removal.verdict
    headings = page.locator("#removed h4 b").all_inner_texts()
    assert headings == [each.prediction.label for each in (removal.before, removal.after, removal.control)]
    assert headings[0] == label != headings[1]
    # The slider: as few heads as suffice, and one fewer.
    page.locator("#kept input[type=number]").fill("1")
    page.keyboard.press("Tab")
    score = told.classes[0].scores_with_first_heads[1]
    expect(page.locator("#kept-scores p")).to_contain_text(f"with 1 of {len(told.classes[0].maps)} heads")
    assert near([[page.locator("#kept-scores p").inner_text()]], [[_kept_words(told, score)]])
    # Take along.
    page.locator("#ending label", has_text="csv").click()
    page.locator("#make").click()
    with page.expect_download() as download:
        page.locator("#file a[download]").first.click()
    download.value.save_as(tmp_path / "removal.csv")
    lines = (tmp_path / "removal.csv").read_text().splitlines()
    assert lines[0] == removal.to_csv().splitlines()[0] and near([lines], [
        [line.replace(str(image), image.name) for line in removal.to_csv().splitlines()]
    ])  # fmt: skip
    # The link asks the same again.
    page.locator("#link a").click()
    expect(page.locator("#asked")).to_contain_text(label, timeout=20_000)
    expect(page.locator("#asked")).to_contain_text(other)


def _percent(peak: float) -> str:
    return f"{peak:.0%}" if peak >= 0.1 else f"{peak:.1%}" if peak >= 0.01 else f"{peak:.2%}"


def _kept_words(told, score: float) -> str:
    traits = told.classes[0]
    rank = 1 + sum(s.logit > score for s in told.scores if s.number != traits.number)
    count = len(traits.maps)
    return f"{traits.label} with 1 of {count} heads ({traits.head_order[0]}): score {score:.2f}, rank {rank}"


def encoded(kind: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(content, kind)
    return content.getvalue()


def test_a_bad_file_takes_the_place_of_the_image_before(visit):
    page = visit()
    pick(page, 0)
    upload(page, "<b>cut.png", encoded("PNG")[:2000])
    refusal = page.locator("#answer [role=alert]")
    expect(refusal).to_have_text("Cannot read the image <b>cut.png: image file is truncated", timeout=20_000)
    expect(page.locator("#heads button")).to_have_count(0)
    # A format that browsers do not show is shown nevertheless.
    upload(page, "fine.tiff", encoded("TIFF"))
    expect(page.locator("#command")).to_contain_text("fine.tiff", timeout=20_000)
    expect(page.locator("#picker img")).to_have_js_property("naturalWidth", 64)


def test_two_visitors_do_not_see_each_other(visit, birds):
    folder, _ = birds
    pages = [visit(), visit()]
    for number, page in enumerate(pages):
        page.locator(f'#examples [data-example="{number}"]').click()
    for turn in range(3):
        for number, page in enumerate(pages):
            expect(page.locator("#command")).to_contain_text(f"{number:02}.png", timeout=20_000)
            page.locator(f'#heads [data-place="0"][data-head="{turn}"]').click()
        for number, page in enumerate(pages):
            told = explain(folder / "model", folder / "birds" / f"{number:02}.png")
            expect(page.locator("#large figcaption").first).to_have_text(f"{told.prediction.label}: head {turn}")
            assert near(table(page, "#answer"), expected_scores(told))


def test_everything_can_be_done_with_the_keyboard(visit):
    page = visit()
    page.locator("#examples button").first.focus()
    page.keyboard.press("Enter")
    first = page.locator("#heads button").nth(1)
    expect(first).to_be_visible(timeout=20_000)
    first.focus()
    page.keyboard.press("Space")
    expect(first).to_have_attribute("aria-pressed", "true")
    page.locator("#canvas .pc-paint").focus()
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.locator("#remove-painted").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#removed table")).to_be_visible(timeout=20_000)
    # From 40 % to 60 % of 96 pixels, moved by 2 % to the right and down, and wider by 2 %.
    expect(page.locator("#python")).to_contain_text("(40, 40, 61, 60)")
    for _ in range(200):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#make') !== null"):
            break
    else:
        raise AssertionError("the last panel is not reached")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_can_be_read_on_a_phone(visit, dark):
    page = visit(width=NARROW, dark=dark)
    pick(page, 3)
    page.locator("#remove-head").click()
    expect(page.locator("#removed table")).to_be_visible(timeout=20_000)
    assert not sticks_out(page)
    assert not faint_text(page)


def test_a_question_without_an_image_or_a_region_is_answered_in_a_sentence(visit):
    page = visit()
    page.locator("#remove-head").click()
    expect(page.locator(".toast-body")).to_contain_text("Pick an image first.")
    page.locator(".toast-close").click()
    pick(page, 0)
    page.locator("#remove-painted").click()
    expect(page.locator(".toast-body")).to_contain_text("Nothing is painted on the image yet")


def test_prompt_sets_and_the_path_through_the_tree(open_page, tmp_path):
    folder = tmp_path / "model"
    model = tiny_model(num_agnostic_prompts=0)
    model.add_prompts("genus", id2label={0: "Cyanocitta", 1: "Corvus"}, num_agnostic_prompts=0)
    model.save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    rows = [f"{name},{'Corvus' if number else 'Cyanocitta'}\n" for number, name in ID2LABEL.items()]
    (folder / "taxonomy.csv").write_text(f"{model.prompts_in_use},genus\n" + "".join(rows))
    app = build_app(folder, device="cpu")
    page = open_page(app.launch(prevent_thread_lock=True, quiet=True)[1])
    upload(page, "bird.jpg", encoded("JPEG"))
    expect(page.locator("#answer li")).to_have_count(2, timeout=20_000)
    choose(page, "#asked", "class 3")
    expect(page.locator("#heads h3")).to_contain_text("class 3")
    choose(page, "#prompts", "genus")
    expect(page.locator("#answer tbody tr")).to_have_count(2)
    assert {row[1] for row in table(page, "#answer")} == {"Cyanocitta", "Corvus"}
    choose(page, "#asked", "Corvus")
    expect(page.locator("#heads h3")).to_contain_text("Corvus")
    expect(page.locator("#link a")).to_have_attribute("href", re.compile("prompts=genus&class1=Corvus"))
    app.close()
