# SPDX-License-Identifier: MIT
"""The study with people: the form hides the models, and simulated raters of known skill are scored right."""

import csv
import re
from itertools import combinations

import numpy as np
import pytest
from conftest import ID2LABEL, random_images, tiny_backbone_config, tiny_model
from PIL import Image
from typer.testing import CliRunner

from prompt_cam_hf.baselines import build_linear_probe
from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone
from prompt_cam_hf.study import make_study, score_study
from prompt_cam_hf.study.make import KEY_COLUMNS
from prompt_cam_hf.study.score import ANSWER_COLUMNS, agreement

TRAITS = {"class 0": ["red <b>crown</b>", "long tail"], "class 1": ['"barred" wing']}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models with telling names, six images of three classes, and traits of two of them."""
    folder = tmp_path_factory.mktemp("study")
    tiny_model().save_pretrained(folder / "secret_cam")
    probe = build_linear_probe(build_backbone(tiny_backbone_config()), id2label=ID2LABEL)
    probe.save_pretrained(folder / "secret_probe")
    for name in ("secret_cam", "secret_probe"):
        build_image_processor(32).save_pretrained(folder / name)
    pixels = random_images(6, 40, 60).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).numpy()
    for number, image in enumerate(pixels):
        (folder / "photos" / f"class {number % 3}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / "photos" / f"class {number % 3}" / f"secret_{number}.png")
    with open(folder / "traits.csv", "w", newline="") as file:
        rows = [(name, trait) for name, listed in TRAITS.items() for trait in listed]
        csv.writer(file).writerows([("class", "trait"), *rows])
    return folder


def run(*arguments):
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(folder):
    models = (folder / "secret_cam", folder / "secret_probe")
    answer = run(
        "make", *models, "--data", folder / "photos", "--traits", folder / "traits.csv", "--out", folder / "out"
    )
    assert answer.exit_code == 0, answer.output
    return folder / "out"


def test_the_form_does_not_say_whose_maps_they_are(made):
    page, key = (made / "study.html").read_text(), read(made / "key.csv")
    assert "secret" not in page and "probe" not in page
    # Four images of classes with traits, once for each model, in an order that mixes the models.
    assert {(row["model"], row["image"]) for row in key} == {
        (model, f"class {number % 3}/secret_{number}.png")
        for model in ("1: secret_cam", "2: secret_probe")
        for number in (0, 1, 3, 4)
    }
    pictures = list(dict.fromkeys(row["picture"] for row in key))
    assert pictures == [f"P{number:03d}" for number in range(1, 9)]
    models = [next(row["model"] for row in key if row["picture"] == code) for code in pictures]
    assert models not in (sorted(models), sorted(models, reverse=True))
    # Every trait of the image's class is asked for, escaped, and nothing else.
    asked = re.findall(r'data-picture="(P\d+)" data-trait="([^"]*)"', page)
    escaped = {"<": "&lt;", ">": "&gt;", '"': "&#34;"}
    expected = [(row["picture"], re.sub('[<>"]', lambda found: escaped[found[0]], row["trait"])) for row in key]
    assert asked == expected
    assert all(row["trait"] in TRAITS[row["class"]] for row in key) and len(key) == 2 * (2 * 2 + 2)
    # Four heads of the Prompt-CAM, one map of the probe.
    maps = [page.count(f'aria-label="map {number} of picture') for number in (1, 2, 3, 4, 5)]
    assert maps == [8, 4, 4, 4, 0]


def test_a_study_is_made_once_and_again_the_same(made, folder):
    arguments = (folder / "secret_cam", folder / "secret_probe", "--data", folder / "photos")
    arguments = ("make", *arguments, "--traits", folder / "traits.csv", "--out", made)
    before = (made / "key.csv").read_text()
    assert "exists already" in run(*arguments).stderr
    assert run(*arguments, "--overwrite").exit_code == 0 and (made / "key.csv").read_text() == before
    assert run(*arguments, "--overwrite", "--seed", 1).exit_code == 0 and (made / "key.csv").read_text() != before
    assert run(*arguments, "--overwrite").exit_code == 0


def simulate(folder, skills, num_images, num_raters, seed):
    """Raters who recognise each trait by chance, as likely as the model's maps show it; some say yes more readily."""
    random = np.random.default_rng(seed)
    models = list(skills)
    key = [
        ("s", f"P{place:03d}", trait, models[place % len(models)], f"image {place // len(models)}", "class")
        for place in range(num_images * len(models))
        for trait in ("crown", "tail")
    ]
    with open(folder / "key.csv", "w", newline="") as file:
        csv.writer(file).writerows([KEY_COLUMNS, *key])
    files = []
    readiness = random.uniform(-0.1, 0.1, num_raters)
    shown = {row: random.random() for row in key}
    for rater in range(num_raters):
        files.append(folder / f"answers_{rater}.csv")
        with open(files[-1], "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(ANSWER_COLUMNS)
            for row in key:
                # Half of the raters' answers follow the picture, half are their own: they agree in part.
                drawn = shown[row] if random.random() < 0.5 else random.random()
                yes = drawn < skills[row[3]] + readiness[rater]
                writer.writerow((row[0], f"rater {rater}", *row[1:3], "yes" if yes else "no"))
    return files


def test_the_true_shares_of_simulated_raters_lie_in_the_intervals(tmp_path):
    skills = {"1: a": 0.6, "2: b": 0.4, "3: c": 0.3}  # about the paper's three
    covered, widths = [], []
    for seed in range(12):
        files = simulate(tmp_path, skills, 25, 8, seed)
        found = score_study(tmp_path, files)
        assert [one.model for one in found.models] == list(skills) and found.num_raters == 8
        for one in found.models:
            covered.append(one.low <= skills[one.model] <= one.high)
            widths.append(one.high - one.low)
            assert one.low < one.share < one.high and one.num_answers == 8 * 50
    # Of 36 intervals of 95 %, 34 are expected to hold the truth, and hardly ever fewer than 30.
    assert sum(covered) >= 31
    assert 0.05 < np.mean(widths) < 0.3


def long_way(answers):
    """Fleiss' kappa by counting pairs of raters, question by question."""
    pairs = [[row[a] == row[b] for a, b in combinations(range(len(row)), 2)] for row in answers]
    observed = np.mean([np.mean(row) for row in pairs])
    shares = [np.mean(answers == value) for value in (0, 1)]
    chance = sum(share**2 for share in shares)
    return (observed - chance) / (1 - chance)


def test_agreement():
    random = np.random.default_rng(0)
    base = random.integers(0, 2, (40, 1))
    noisy = np.where(random.random((40, 5)) < 0.2, 1 - base, base)
    assert agreement(noisy) == pytest.approx(long_way(noisy))
    assert agreement(np.repeat(base, 4, axis=1)) == pytest.approx(1)
    assert abs(agreement(random.integers(0, 2, (4000, 3)))) < 0.05
    # Cohen's own definition: chance goes by each rater's own shares.
    two = noisy[:, :2]
    observed = (two[:, 0] == two[:, 1]).mean()
    yes = two.mean(axis=0)
    chance = yes.prod() + (1 - yes).prod()
    assert agreement(two) == pytest.approx((observed - chance) / (1 - chance))
    for nothing in (noisy[:, :1], noisy[:0], np.ones((5, 3))):
        assert np.isnan(agreement(nothing))


def test_answers_that_do_not_fit_are_refused(tmp_path):
    files = simulate(tmp_path, {"1: a": 0.5, "2: b": 0.5}, 3, 2, 0)
    answer = run("score", tmp_path, *files)
    assert answer.exit_code == 0 and "2 raters" in answer.stdout and "Cohen's kappa" in answer.stdout
    assert "missing" not in answer.stdout
    text = files[0].read_text()
    part = tmp_path / "part.csv"
    for changed, sentence in (
        (text.replace("s,rater", "t,rater", 1), "another study, 't'"),
        (text.replace("P000", "P999", 1), "a question that the study does not have: P999"),
        (text.replace("yes", "perhaps", 1), "the answer 'perhaps'; an answer is yes or no"),
        (text.replace("rater 0,", ",", 1), "without the name of a rater"),
        (text.replace("recognised", "seen"), "has the columns"),
        (text.splitlines()[0] + "\n", "There are no answers"),
    ):
        part.write_text(changed)
        answer = run("score", tmp_path, part)
        assert answer.exit_code == 2 and sentence in " ".join(answer.stderr.split()), answer.output
    assert "twice" in run("score", tmp_path, files[0], files[0]).stderr
    assert "There is no file" in run("score", tmp_path / "nowhere", files[0]).stderr
    part.write_text("".join(text.splitlines(keepends=True)[:-2]))
    assert "2 answers are missing" in run("score", tmp_path, part, files[1]).stdout


def test_mistakes_get_one_sentence(folder, tmp_path):
    (tmp_path / "traits.csv").write_text("class,trait\nclass 2,\n")
    common = ("make", folder / "secret_cam", "--data", folder / "photos", "--out", tmp_path / "out")
    for more, sentence in (
        ((), "give them as --traits"),
        (("--traits", tmp_path / "traits.csv"), "line 2: class or trait is missing"),
        (("--traits", folder / "key.csv"), "There is no file of traits"),
        (("--traits", folder / "photos" / "class 0" / "secret_0.png"), "is not a CSV file in UTF-8"),
    ):
        answer = run(*common, *more)
        assert answer.exit_code == 2 and sentence in answer.stderr, answer.output
        assert answer.stderr.count("Error: ") == 1
    with pytest.raises(ValueError, match="There is no class 'dodo'"):
        make_study([folder / "secret_cam"], folder / "photos", {"dodo": ["beak"]}, tmp_path / "out")
    with pytest.raises(ValueError, match="of a class that traits are given for"):
        make_study([folder / "secret_cam"], folder / "photos", {"class 4": ["beak"]}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
