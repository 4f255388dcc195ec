# SPDX-License-Identifier: MIT
"""Hostile names of classes, folders and files, in every output: shown as text, and never more than text."""

import html
import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import tiny_backbone_config
from transformers import ViTModel

from faults.conftest import COLOURS, draw
from faults.processes import prompt_cam, run
from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor

KIND = "hostile names"

NAMES = {
    "terminal escapes": "\x1b[2J\x1b[31mred\x1b]0;owned\x07",
    "HTML": "<script>alert(1)</script><img src=x onerror=alert(2)>",
    "an attribute": "\"' onmouseover=alert(3) x='",
    "a fence": "```\n\n# Owned heading\n\n```python\nowned()",
    "back-ticks": "`owned` ``` ~~~",
    "line breaks": "one\r\n# Owned title\n---\nlicense: owned\n---",
    "a table": "| owned | cell |\n|---|---|",
    "a template": "{{ 7 * 191 }}{% owned %}",
    "rich markup": "[bold red]owned[/bold red] [link=http://owned]x[/link]",
    "right to left": "\u202egnp.owned\u2066",
    "a formula": '=HYPERLINK("http://owned")',
}
# Characters that move a terminal's cursor, or turn its text around.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ROW = "\x1b[2J\x1b[31m<b>file</b> ` | {{ 7 * 191 }}\n# Owned row"


@pytest.fixture(scope="module", name="hostile")
def fixture_hostile(tmp_path_factory):
    """A model of classes with these names, and images of hostile names too, one of them unreadable."""
    # A model in a folder called "model" has the name of the folder around it.
    folder = tmp_path_factory.mktemp("secret-place") / "birds"
    ViTModel(tiny_backbone_config(), add_pooling_layer=False).save_pretrained(folder / "backbone")
    model = PromptCAMForImageClassification.from_backbone(
        folder / "backbone", id2label=dict(enumerate(NAMES.values()))
    )
    model.save_pretrained(folder / "model")
    build_image_processor(32).save_pretrained(folder / "model")
    for number in range(len(NAMES)):
        draw(folder / "photos" / f"class {number}" / f"{number}.png", list(COLOURS.values())[number % 3], number)
    shutil.copy(folder / "photos" / "class 0" / "0.png", folder / "photos" / "class 0" / f"{ROW.replace('/', '')}.png")
    (folder / "photos" / "class 1" / "broken.png").write_bytes(b"nothing")
    (folder / "photos" / "class 1" / f"broken {ROW.replace('/', '')}.png").write_bytes(b"nothing")
    paths = sorted(path.relative_to(folder) for path in (folder / "photos").rglob("*.png"))
    labels = [list(NAMES.values())[int(path.parent.name.split()[1])] for path in paths]
    pd.DataFrame({"image": map(str, paths), "label": labels}).to_parquet(folder / "photos.parquet")
    return folder


CARD = ["publish", "model", "org/model", "--license", "mit", "--dry-run", "--out", "card"]
SAYS = {
    "predict": ["predict", "model", "photos", "--top-k", "11"],
    "predict as CSV": ["predict", "model", "photos", "--top-k", "11", "--format", "csv"],
    "predict as JSON": ["predict", "model", "photos", "--top-k", "11", "--format", "json"],
    "explain": ["explain", "model", "photos", "--out", "explained"],
    "compare": [
        "compare",
        "model",
        "photos/class 0/0.png",
        "--out",
        "compared",
        "--classes",
        NAMES["HTML"],
        "--classes",
        NAMES["a fence"],
    ],
    "atlas": ["atlas", "model", "photos.parquet", "--out", "atlas"],
    "evaluate": ["evaluate", "model", "--data", "photos.parquet", "--out", "evaluated", "--limit", "4"],
    "publish": CARD,
    "a class that there is not": ["explain", "model", "photos", "--out", "x", "--classes", "\x1b[2Jnowhere\nnow"],
    "a file that there is not": ["predict", "model", "\x1b[2Jnowhere\nnow.png"],
    "a model that there is not": ["predict", "\x1b[2Jnowhere\nnow", "photos"],
    "data that there are not": ["atlas", "model", "\x1b[2Jnowhere\nnow", "--out", "x"],
}


@pytest.fixture(name="commands", scope="module")
def fixture_commands(hostile):
    """Each command is run once; what it wrote lies in its own copy of the folder."""
    done: dict = {}

    def command(name: str):
        if name not in done:
            folder = shutil.copytree(hostile, hostile.parent / f"{hostile.name}-{len(done)}")
            done[name] = run(prompt_cam, *SAYS[name], cwd=folder), folder
        return done[name]

    return command


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.short] if name == "predict" else []) for name in SAYS]
)
def test_nothing_moves_the_terminal(commands, name):
    ran, _ = commands(name)
    expected = (1, 2) if "not" in name.split() else (0, 1)
    assert ran.code in expected and "Traceback" not in ran.err, ran
    # Tables and JSON are for machines, which want names as they are.
    shown = "" if name in ("predict as CSV", "predict as JSON") else ran.out
    for printed in (shown, *(line.split("\r")[-1] for line in ran.err.splitlines())):
        found = CONTROLS.findall(printed.replace("\r\n", "\n"))
        assert not found, (found, ran)


@pytest.mark.parametrize("name", SAYS)
def test_a_refusal_is_one_line(commands, name):
    ran, _ = commands(name)
    if ran.code == 2:
        assert ran.refused_well(), ran
    else:
        assert not [line for line in ran.err.splitlines() if line.startswith("# Owned")], ran


def page(commands, name: str) -> tuple[str, Path]:
    ran, folder = commands(name)
    assert ran.code in (0, 1), ran
    return (folder / {"atlas": "atlas", "evaluate": "evaluated"}[name] / "index.html").read_text(), folder


# What a name must not become, in a page or a card.
OWNED = {
    "terminal escapes": CONTROLS,
    "HTML": re.compile("<script>alert|<img src=x"),
    "an attribute": re.compile(r"\sonmouseover=alert\(3\) x='[ >]"),
    "a fence": re.compile("(?m)^# Owned heading|^owned"),
    "line breaks": re.compile("(?m)^# Owned title|^license: owned"),
    "a template": re.compile("1337"),
    "right to left": re.compile("[\u202a-\u202e\u2066-\u2069]"),
}
NOTHING = re.compile("(?!)")


@pytest.mark.parametrize("command", ["atlas", "evaluate"])
@pytest.mark.parametrize("name", NAMES)
def test_a_page_shows_names_as_text(commands, command, name):
    text, _ = page(commands, command)
    found = OWNED.get(name, NOTHING).search(text)
    if name not in ("a fence", "line breaks"):  # a page knows neither
        assert not found, text[max(0, found.start() - 100) : found.end() + 100]
    if command == "atlas" and name in ("HTML", "an attribute", "back-ticks", "rich markup"):
        assert NAMES[name] in html.unescape(text)


@pytest.mark.parametrize("command", ["atlas", "evaluate"])
def test_a_page_has_no_html_of_a_file_name(commands, command):
    assert "<b>file" not in page(commands, command)[0]


@pytest.mark.parametrize("command", ["atlas", "evaluate"])
def test_a_page_names_no_place_of_this_machine(commands, command):
    text, folder = page(commands, command)
    assert str(folder) not in text and "secret-place" not in text


@pytest.mark.parametrize("table", ["images.parquet", "classes.parquet"])
def test_a_table_names_no_place_of_this_machine(commands, table):
    _, folder = page(commands, "atlas")
    assert b"secret-place" not in (folder / "atlas" / table).read_bytes()


def outside_of_fences(card: str) -> str:
    """The card without its metadata and its blocks of code; a fence is closed by one at least as long."""
    kept, fence = [], ""
    for line in re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).splitlines():
        marks = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence:
            if marks and marks[1].startswith(fence) and not line.strip(marks[1][0] + " "):
                fence = ""
        elif marks:
            fence = marks[1]
        else:
            kept.append(line)
    assert not fence, "a block of code has no end"
    return "\n".join(kept)


@pytest.mark.parametrize("place", ["class", "data set"])
@pytest.mark.parametrize("name", NAMES)
def test_a_card_shows_names_as_text(hostile, tmp_path, refused, place, name):
    """Each name in a card of its own, where no other can have opened a block of code."""
    folder = shutil.copytree(hostile / "model", tmp_path / "model")
    names = {str(number): f"class {number}" for number in range(len(NAMES))}
    names |= {"0": NAMES[name]} if place == "class" else {}
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": names, "label2id": {text: int(number) for number, text in names.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = run(prompt_cam, *CARD, *(["--dataset", NAMES[name]] if place == "data set" else []), cwd=tmp_path)
    if ran.code:
        assert ran.refused_well(), ran
        refused()
        return
    card = (tmp_path / "card" / "README.md").read_text()
    found = OWNED.get(name, NOTHING).search(outside_of_fences(card))
    assert not found, found
    assert not CONTROLS.search(card)
    assert card.count("\nlicense: ") == 1


def test_data_are_json_and_csv_whatever_the_names(commands):
    """A machine reads these: names stand in them as they are."""
    ran, _ = commands("predict as JSON")
    labels = {row["label"] for row in json.loads(ran.out)[0]["predictions"]}
    assert labels == set(NAMES.values())
