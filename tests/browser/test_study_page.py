# SPDX-License-Identifier: MIT
"""The form of a study as a rater fills it in, in Chromium."""

import csv

import pytest
from conftest import ID2LABEL, random_images, tiny_model
from PIL import Image
from playwright.sync_api import expect

from browser.conftest import NARROW, WIDE
from browser.looks import faint_text, sticks_out
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.study import make_study, score_study

TRAITS = {"class 0": ["red crown, <i>bright</i>"], "class 1": ['a "barred" wing', "long tail"]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Two images a model of two models: six questions."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("one", "two"):
        tiny_model().save_pretrained(folder / name)
        build_image_processor(32).save_pretrained(folder / name)
    for number, pixels in enumerate(random_images(2).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()):
        (folder / "photos" / ID2LABEL[number]).mkdir(parents=True)
        Image.fromarray(pixels).save(folder / "photos" / ID2LABEL[number] / f"{number}.png")
    return make_study([folder / "one", folder / "two"], folder / "photos", TRAITS, folder / "out")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everything_can_be_read(open_page, study, width, dark):
    page = open_page(study, width, dark)
    assert not faint_text(page) and not sticks_out(page)


def test_a_rater_fills_it_in(open_page, study, tmp_path):
    page = open_page(study, NARROW)
    state, save = page.get_by_role("status"), page.get_by_role("button", name="Save my answers")
    expect(state).to_have_text("0 of 6 questions answered.")
    page.get_by_label("Your name").fill("Ada L")
    questions = page.locator("fieldset[data-trait]")
    for number, wanted in enumerate(("yes", "no", "yes", "no", "yes")):
        questions.nth(number).get_by_label(wanted, exact=False).first.check()
    expect(state).to_have_text("5 of 6 questions answered.")
    # What was answered outlives the page.
    page.reload()
    expect(state).to_have_text("5 of 6 questions answered.")
    expect(page.get_by_label("Your name")).to_have_value("Ada L")
    # An open question is pointed at, and then answered by the keyboard.
    page.once("dialog", lambda dialog: dialog.dismiss())
    save.click()
    page.keyboard.press("Space")
    expect(state).to_have_text("6 of 6 questions answered.")
    with page.expect_download() as download:
        save.click()
    expect(state).to_contain_text("6 answers are saved in answers_")
    answers = tmp_path / "answers.csv"
    download.value.save_as(answers)
    assert download.value.suggested_filename.endswith("_Ada_L.csv")
    with open(answers, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(study.with_name("key.csv"), newline="") as file:
        key = list(csv.DictReader(file))
    assert [(row["picture"], row["trait"]) for row in rows] == [(row["picture"], row["trait"]) for row in key]
    assert [row["recognised"] for row in rows] == ["yes", "no", "yes", "no", "yes", "yes"]
    found = score_study(study.parent, [answers])
    assert sum(one.share * one.num_answers for one in found.models) == pytest.approx(4) and found.missing == 0


def test_a_name_that_would_break_the_file_is_refused(open_page, study):
    page = open_page(study)
    page.get_by_label("Your name").fill('=cmd|"calc"')
    page.get_by_role("button", name="Save my answers").click()
    assert not page.locator("#rater").evaluate("input => input.checkValidity()")
    expect(page.get_by_role("status")).to_have_text("0 of 6 questions answered.")
