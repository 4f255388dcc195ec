# SPDX-License-Identifier: MIT
"""The atlas: its numbers against plain loops, its page as a browser reads it, and runs that are killed."""

import base64
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

import datasets
import matplotlib as mpl
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ID2LABEL, NUM_CLASSES, assert_computed, random_images, rarely, tiny_backbone_config, tiny_model
from PIL import Image
from transformers import CLIPImageProcessor, ViTForImageClassification

from prompt_cam_hf.class_atlas import atlas, build, page
from prompt_cam_hf.class_atlas.collect import MapSums, concentration
from prompt_cam_hf.class_atlas.summary import ClassSummary, Confusion, Example, Summary
from prompt_cam_hf.data.images import build_image_processor, open_image
from prompt_cam_hf.data.labelled_images import read_labelled_images
from prompt_cam_hf.explanations.figures import overlay
from prompt_cam_hf.explanations.ranking import rank_heads
from prompt_cam_hf.html import embed_pixels, embed_thumbnail, percent

HEADS = 4
RESULTS = ("images.parquet", "classes.parquet", "atlas.json", "index.html")


def image(seed: int) -> Image.Image:
    """Coarse coloured noise, so that a random network tells images apart; every one has another shape."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((40 + seed, 64), Image.Resampling.NEAREST)


@lru_cache
def _trained_model(family, class_prompt_layer):
    """Random prompts say the same of everything; some steps of training, and they tell the test images apart."""
    model = tiny_model(family, class_prompt_layer=class_prompt_layer)
    pixel_values = torch.cat(
        [build_image_processor(32)(image(seed), return_tensors="pt")["pixel_values"] for seed in range(22)]
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.03)
    for _ in range(40):
        model(pixel_values, labels=torch.arange(22) % NUM_CLASSES).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def varied_model(family="vit", id2label=ID2LABEL, class_prompt_layer=-1):
    """A model that recognises several classes."""
    model = tiny_model(family, id2label=id2label, class_prompt_layer=class_prompt_layer)
    model.load_state_dict(_trained_model(family, class_prompt_layer).state_dict())
    return model


def predict(model, image):
    with torch.no_grad():
        return model(build_image_processor(32)(image, return_tensors="pt")["pixel_values"]).logits[0]


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path / "photos")


def save_photos(folder):
    """Class folders with 22 images, two of three in the folder of what the model says, and a broken one."""
    model = varied_model()
    for seed in range(22):
        label = int(predict(model, image(seed)).argmax())
        label = (label + 1 + seed % 2) % NUM_CLASSES if seed % 3 == 2 else label
        path = folder / f"{label + 1:03d}.class_{label}" / f"{seed:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image(seed).save(path)
    broken = sorted(folder.iterdir())[0] / "broken & torn.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n torn")
    return folder


def run(photos, out, model=None, **options):
    options = {"image_processor": build_image_processor(32), "batch_size": 3, **options}
    return atlas(model or varied_model(), photos, out, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_the_long_way(model, photos, top_heads):
    """What the tables must say, one image at a time."""
    rows = []
    for path in sorted(photos.rglob("*.png")):
        label = int(path.parent.name.rpartition("_")[2])
        if path.name.startswith("broken"):
            rows.append({"image": f"{path.parent.name}/{path.name}", "label": label, "unreadable": True})
            continue
        pixel_values = build_image_processor(32)(open_image(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = model(pixel_values, output_trait_maps=True)
        ranking = rank_heads(model, pixel_values)
        logits = output.logits[0].tolist()
        order = sorted(range(NUM_CLASSES), key=lambda c: -logits[c])
        total = sum(math.exp(value) for value in logits)
        maps = output.trait_maps[0, 0].double().numpy()
        spread = []
        for one in maps:
            flat = [value / one.sum() for value in one.flatten()]
            spread.append(1 + sum(value * math.log(value) for value in flat) / math.log(len(flat)))
        head_order = ranking.order[0].tolist()
        top = head_order[:top_heads]
        lead = (math.exp(logits[order[0]]) - math.exp(logits[order[1]])) / total
        rows.append(
            {
                "image": f"{path.parent.name}/{path.name}",
                "label": label,
                "prediction": order[0],
                "runner_up": order[1],
                "score": logits[order[0]],
                "probability": math.exp(logits[order[0]]) / total,
                "runner_up_score": logits[order[1]],
                "label_score": logits[label],
                "label_probability": math.exp(logits[label]) / total,
                "head_order": head_order,
                "head_scores": ranking.scores[0].tolist(),
                "sufficient": ranking.sufficient.item(),
                "attention_on_patches": [one.sum() for one in maps],
                "concentration": spread,
                "clearness": lead * sum(maps[h].sum() * spread[h] for h in top) / len(top),
                "maps": maps,
                "unreadable": False,
            }
        )
    return rows


@pytest.mark.parametrize(
    "family_name, fields",
    [("vit", {}), ("dinov2_with_registers", {"class_prompt_layer": 0}), ("clip_vision_model", {})],
)
def test_tables_equal_plain_loops(photos, tmp_path, family_name, fields, monkeypatch):
    monkeypatch.setattr(build, "PART_SIZE", 7)
    model = varied_model(family_name, **fields)
    result = run(photos, tmp_path / "out", model, top_heads=2, num_examples=2)
    expected = rows_the_long_way(model, photos, 2)

    rows = pq.read_table(result.images).to_pylist()
    assert [row["index"] for row in rows] == list(range(len(expected))) and len(rows) == 23
    for row, wanted in zip(rows, expected, strict=True):
        assert row["image"] == wanted["image"] and row["label"] == ID2LABEL[wanted["label"]]
        assert (row["unreadable"] is not None) == wanted["unreadable"]
        if wanted["unreadable"]:
            assert row["prediction"] is None and row["correct"] is None and row["head_order"] is None
            continue
        assert row["prediction"] == ID2LABEL[wanted["prediction"]]
        assert row["runner_up"] == ID2LABEL[wanted["runner_up"]]
        assert row["correct"] == (wanted["prediction"] == wanted["label"])
        assert row["head_order"] == wanted["head_order"] and row["sufficient"] == wanted["sufficient"]
        for name in ("score", "probability", "runner_up_score", "label_score", "label_probability", "clearness"):
            assert row[name] == pytest.approx(wanted[name], abs=1e-5), name
        for name in ("head_scores", "attention_on_patches", "concentration"):
            assert row[name] == pytest.approx(wanted[name], abs=1e-5), name

    readable = [row for row in expected if not row["unreadable"]]
    used = defaultdict(list)
    for row in readable:
        if row["label"] == row["prediction"]:
            used[row["label"]].append(row)
    classes = pq.read_table(result.classes).to_pylist()
    assert [row["class"] for row in classes] == list(ID2LABEL.values())
    for row in classes:
        number, mine = row["number"], used[row["number"]]
        labelled = [r for r in readable if r["label"] == number]
        assert row["num_labelled"] == len(labelled) and row["num_used"] == row["num_correct"] == len(mine)
        assert row["num_predicted"] == sum(r["prediction"] == number for r in readable)
        assert row["accuracy"] == (len(mine) / len(labelled) if labelled else None)
        wrong = Counter(r["prediction"] for r in labelled if r["prediction"] != number)
        if wrong:
            other = min(wrong, key=lambda c: (-wrong[c], c))
            assert (row["most_confused_with"], row["num_confused"]) == (ID2LABEL[other], wrong[other])
        else:
            assert row["most_confused_with"] is None and row["num_confused"] == 0
        assert row["examples"] == [r["image"] for r in sorted(mine, key=lambda r: -r["clearness"])[:2]]
        if not mine:
            assert row["mean_maps"] is None and row["head_in_top"] is None
            continue
        np.testing.assert_allclose(row["mean_maps"], np.mean([r["maps"] for r in mine], axis=0), atol=1e-6)
        for head in range(HEADS):
            in_top = sum(head in r["head_order"][:2] for r in mine) / len(mine)
            in_sufficient = sum(head in r["head_order"][: r["sufficient"]] for r in mine) / len(mine)
            assert row["head_in_top"][head] == pytest.approx(in_top)
            assert row["head_in_sufficient"][head] == pytest.approx(in_sufficient)
            for name, column in (
                ("mean_attention_on_patches", "attention_on_patches"),
                ("mean_concentration", "concentration"),
            ):
                assert row[name][head] == pytest.approx(np.mean([r[column][head] for r in mine]), abs=1e-5)
        assert row["mean_sufficient"] == pytest.approx(np.mean([r["sufficient"] for r in mine]))

    correct = [row["label"] == row["prediction"] for row in readable]
    assert result.summary.accuracy == pytest.approx(np.mean(correct))
    per_class = [row["accuracy"] for row in classes if row["accuracy"] is not None]
    assert result.summary.mean_class_accuracy == pytest.approx(np.mean(per_class))
    assert result.summary.total == 23 and result.summary.num_unreadable == 1
    pairs = Counter((r["label"], r["prediction"]) for r in readable if r["label"] != r["prediction"])
    assert {(c.label, c.prediction): c.count for c in result.summary.confusions} == pairs
    counts = [confusion.count for confusion in result.summary.confusions]
    assert counts == sorted(counts, reverse=True)
    for confusion in result.summary.confusions:
        pair = [r for r in readable if (r["label"], r["prediction"]) == (confusion.label, confusion.prediction)]
        pair.sort(key=lambda r: -r["clearness"])
        assert [example.name for example in confusion.examples] == [r["image"] for r in pair[:2]]


def test_there_is_something_to_see(photos, tmp_path):
    """The tests above mean little unless several classes are recognised, and several confused."""
    summary = run(photos, tmp_path / "out").summary
    assert sum(found.used > 1 for found in summary.classes) >= 3
    assert len(summary.confusions) >= 3
    assert 0.5 < summary.accuracy < 0.8


@pytest.mark.parametrize("method", ["exact", "shapley"])
def test_the_ranking_can_be_chosen(photos, tmp_path, method):
    model = varied_model()
    row = pq.read_table(run(photos, tmp_path / "out", model, method=method, blur="patches").images).to_pylist()[0]
    image = open_image(photos / row["image"])
    pixel_values = build_image_processor(32)(image, return_tensors="pt")["pixel_values"]
    ranking = rank_heads(model, pixel_values, method=method, blur="patches")
    assert row["head_order"] == ranking.order[0].tolist() and row["sufficient"] == ranking.sufficient.item()
    assert row["head_scores"] == pytest.approx(ranking.scores[0].tolist(), abs=1e-5)


def test_concentration_has_known_ends():
    one = np.zeros((2, 3, 4, 4), np.float32)
    one[:, :, 1, 2] = 0.3
    assert concentration(one) == pytest.approx(np.ones((2, 3)))
    assert concentration(np.full((4, 4), 0.01)) == pytest.approx(0, abs=1e-9)
    half = np.zeros((4, 4))
    half[:2] = 1
    assert concentration(half) == pytest.approx(1 - math.log(8) / math.log(16))


class Stopped(BaseException):
    """In place of the signal that no program can catch."""


def test_a_killed_run_goes_on_to_the_same_bytes(photos, tmp_path, monkeypatch):
    """Stopped before each file that is put in its place, and when only the tidying up is left."""
    monkeypatch.setattr(build, "PART_SIZE", 8)
    run(photos, tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert set(whole) == set(RESULTS)
    replace, unlink, calls, stop_at = os.replace, Path.unlink, 0, 0

    def count():
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise Stopped

    def stopping_replace(*paths):
        count()
        replace(*paths)

    def stopping_unlink(path, **options):
        if not path.name.endswith(".partial"):
            count()
        unlink(path, **options)

    monkeypatch.setattr(os, "replace", stopping_replace)
    monkeypatch.setattr(Path, "unlink", stopping_unlink)
    finished, tidying = False, 0
    while not finished:
        stop_at, calls, out = stop_at + 1, 0, tmp_path / f"out_{stop_at + 1}"
        try:
            run(photos, out)
            finished = True
        except Stopped:
            stop_at, calls = -stop_at, 0
            done = (out / "index.html").exists()
            if done:
                tidying += 1
                with pytest.raises(FileExistsError):
                    run(photos, out)
            run(photos, out, overwrite=done)
            stop_at = -stop_at
        assert contents(out) == whole, f"stopped at {stop_at}"
    # Settings, three parts each with a state, four results; then the state, three parts, settings and the lock go.
    assert stop_at == 1 + 3 * 2 + 4 + tidying + 1 and tidying == 6


def test_finished_parts_are_not_made_again(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PART_SIZE", 6)
    asked = []
    collect = build.collect

    def counting(classifier, images, places, *arguments):
        asked.append(places.start)
        if places.start == 12 and len(asked) == 3:
            raise Stopped
        return collect(classifier, images, places, *arguments)

    monkeypatch.setattr(build, "collect", counting)
    with pytest.raises(Stopped):
        run(photos, tmp_path / "out")
    run(photos, tmp_path / "out")
    assert asked == [0, 6, 12, 12, 18]


KILLED = """
import os, signal, sys
replace, calls = os.replace, 0
def killing(*paths):
    global calls
    calls += 1
    if calls == {stop_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = killing
sys.path.insert(0, {tests!r})
import test_class_atlas
test_class_atlas.build.PART_SIZE = 6
test_class_atlas.run({photos!r}, {out!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [4, rarely(11)])
def test_kill_9(photos, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(build, "PART_SIZE", 6)
    out = tmp_path / "out"
    code = KILLED.format(stop_at=stop_at, tests=str(Path(__file__).parent), photos=str(photos), out=str(out))
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (out / "index.html").exists() and (out / "atlas_parts").is_dir()
    run(photos, out)
    run(photos, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def interrupted(photos, out, monkeypatch, **options):
    """Leave an unfinished atlas."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_page", lambda *arguments: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            run(photos, out, **options)


def test_parts_of_other_settings_are_refused(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    interrupted(photos, out, monkeypatch)
    before = contents(out)
    other = varied_model()
    with torch.no_grad():
        other.classifier.bias += 1e-3
    renamed = varied_model(id2label={**ID2LABEL, 0: "first"})
    for reason, options in {
        "model weights": {"model": other},
        "images, model settings": {"model": renamed},
        "top heads": {"top_heads": 1},
        "ranking": {"method": "shapley"},
        "image processor": {"image_processor": build_image_processor(32, image_mean=(0.4, 0.5, 0.5))},
    }.items():
        with pytest.raises(ValueError, match=f"unfinished atlas with other settings .{reason}.;"):
            run(photos, out, **options)
    taken_away = next(path for path in photos.rglob("*.png"))
    aside = tmp_path / "aside.png"
    shutil.move(taken_away, aside)
    with pytest.raises(ValueError, match=r"other settings \(images\)"):
        run(photos, out)
    shutil.move(aside, taken_away)
    assert contents(out) == before
    run(photos, out, batch_size=5, num_examples=1)  # these two may change
    assert set(contents(out)) == set(RESULTS)


def test_a_changed_image_is_noticed(photos, tmp_path, monkeypatch):
    interrupted(photos, tmp_path / "out", monkeypatch)
    changed = next(path for path in photos.rglob("1*.png"))
    image(99).save(changed)
    with pytest.raises(ValueError, match=r"other settings \(images\)"):
        run(photos, tmp_path / "out")


def test_nothing_is_overwritten_or_deleted_unasked(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(photos, out)
    (out / "notes.txt").write_text("mine")
    first = contents(out)
    with pytest.raises(FileExistsError, match=r"index\.html exists already"):
        run(photos, out, top_heads=1)
    assert contents(out) == first
    run(photos, out, top_heads=1, overwrite=True)
    second = contents(out)
    assert second["notes.txt"] == b"mine" and second["images.parquet"] != first["images.parquet"]
    # A run that replaces goes on, too: what it had is not lost, and the old results stay until the new ones are there.
    interrupted(photos, out, monkeypatch, overwrite=True)
    assert {name: contents(out)[name] for name in second} == second
    assert (out / "atlas_parts" / "state").exists()
    # Another run with other settings may drop these parts, and only these.
    (out / "atlas_parts" / "letter.txt").write_text("mine")
    run(photos, out, overwrite=True, top_heads=2)
    assert contents(out)["atlas_parts/letter.txt"] == b"mine"
    assert set(contents(out)) == {*RESULTS, "notes.txt", "atlas_parts/letter.txt"}
    with pytest.raises(FileExistsError, match="holds files that no atlas has made"):
        run(photos, out, overwrite=True)

    table = tmp_path / "tables"
    table.mkdir()
    (table / "images.parquet").write_text("not yours")
    with pytest.raises(FileExistsError, match=r"images\.parquet exists already"):
        run(photos, table)
    assert contents(table) == {"images.parquet": b"not yours"}


def test_images_without_labels(tmp_path):
    model = varied_model()
    folder = tmp_path / "flat"
    folder.mkdir()
    for seed in range(8):
        image(seed).save(folder / f"{seed}.png")
    result = run(folder, tmp_path / "out", model)
    predictions = [ID2LABEL[int(predict(model, image(seed)).argmax())] for seed in range(8)]
    rows = pq.read_table(result.images).to_pylist()
    assert [row["image"] for row in rows] == [f"{seed}.png" for seed in range(8)]
    assert [row["prediction"] for row in rows] == predictions
    assert all(row[name] is None for row in rows for name in ("label", "correct", "label_score"))
    assert result.summary.accuracy is None and result.summary.mean_class_accuracy is None
    for row in pq.read_table(result.classes).to_pylist():
        assert row["num_used"] == row["num_predicted"] == predictions.count(row["class"])
        assert row["accuracy"] is None
    assert "each image counts for the class that it was taken for" in result.page.read_text()

    table = datasets.Dataset.from_dict({"photo": [image(seed) for seed in range(8)]}).cast_column(
        "photo", datasets.Image()
    )
    with pytest.raises(ValueError, match="no column 'image'; set image_column to one of photo"):
        run(table, tmp_path / "table", model)
    again = run(table, tmp_path / "table", model, image_column="photo")
    assert [row["prediction"] for row in pq.read_table(again.images).to_pylist()] == predictions
    assert pq.read_table(again.images).to_pylist()[3]["image"] == "row 3"


def test_of_equal_examples_the_first_is_taken(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in "abcdef":
        image(0).save(folder / f"{name}.png")
    summary = run(folder, tmp_path / "out", batch_size=1, num_examples=2).summary
    assert [[e.name for e in found.examples] for found in summary.classes if found.used] == [["a.png", "b.png"]]


def test_labels_are_found_by_name(photos, tmp_path, caplog):
    stranger = photos / "Unknown species"
    stranger.mkdir()
    image(50).save(stranger / "x.png")
    image(51).save(photos / "loose.png")
    images = read_labelled_images(photos, ID2LABEL)
    assert "left out loose.png, in no class folder" in caplog.text
    assert re.search(r"the model knows \d of \d classes; .*: Unknown species\.", caplog.text)
    for index, label in enumerate(images.labels):
        folder = images.name(index).split("/")[0]
        assert label == (None if folder == "Unknown species" else int(folder[-1]))
    row = next(
        row
        for row in pq.read_table(run(photos, tmp_path / "out").images).to_pylist()
        if row["image"].endswith("x.png")
    )
    assert row["label"] is None and row["prediction"] is not None


def test_one_split_is_looked_at(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data / "train")
    shutil.copytree(photos, data / "test")
    for path in sorted((data / "test").rglob("*.png"))[1::2]:
        path.unlink()
    for folder in (data / "test").iterdir():
        if not any(folder.iterdir()):
            folder.rmdir()
    count = sum(1 for _ in (data / "test").rglob("*.png"))
    assert len(read_labelled_images(data, ID2LABEL)) == count
    assert read_labelled_images(data, ID2LABEL).name(0).startswith("test/")
    assert len(read_labelled_images(data, ID2LABEL, split="train")) == 23
    with pytest.raises(ValueError, match="no split 'validation'; they have train, test"):
        read_labelled_images(data, ID2LABEL, split="validation")


def test_mistakes_get_one_sentence(photos, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="top_heads is 5; the model's last layer has 4 heads, so 1 to 4"):
        run(photos, out, top_heads=5)
    with pytest.raises(ValueError, match="method='random' is not known"):
        run(photos, out, method="random")
    with pytest.raises(ValueError, match="blur='away' is not known"):
        run(photos, out, blur="away")
    with pytest.raises(ValueError, match="batch_size 0"):
        run(photos, out, batch_size=0)
    with pytest.raises(FileNotFoundError, match="no folder or file"):
        run(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no"):
        run(tmp_path / "empty", out)
    with pytest.raises(ValueError, match="not a Prompt-CAM"):
        run(photos, out, ViTForImageClassification(tiny_backbone_config()))
    with pytest.raises(ValueError, match="different sizes"):
        processor = CLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
        run(photos, out, varied_model("dinov2"), image_processor=processor)
    assert not any((out / name).exists() for name in RESULTS)

    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("a.png", "b.png"):
        (torn / name).write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"None of the 2 images can be read: .*a\.png"):
        run(torn, tmp_path / "torn_out")


# --- The page ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser and a screen reader make of a page."""

    VOID = ("meta", "img", "br", "input", "link", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.anchors, self.images, self.drawn, self.tags = [], [], [], [], [], Counter()
        self.headings, self.urls, self.labelled_by = [], [], []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.anchors.append(attributes["href"])
        if tag == "img":
            self.images.append(attributes)
        if tag == "image":
            self.drawn.append(attributes)
        if attributes.get("role") == "img":
            assert attributes["aria-label"].strip()
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        self.urls += [attributes[name] for name in ("src", "href", "action", "poster", "srcset") if name in attributes]
        self.labelled_by += [attributes["aria-labelledby"]] if "aria-labelledby" in attributes else []

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def html(photos, tmp_path):
    names = {number: name for number, name in ID2LABEL.items()}
    return run(photos, tmp_path / "out", varied_model(id2label=names)).page.read_text(encoding="utf-8")


def test_the_page_is_sound_and_needs_nothing_else(html):
    found = Page(html)
    assert len(found.ids) == len(set(found.ids))
    assert all(url.startswith(("#", "data:")) for url in found.urls)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert {anchor[1:] for anchor in found.anchors} <= set(found.ids)
    assert set(found.labelled_by) <= set(found.ids)
    for attributes in found.images:
        assert attributes["alt"].strip() and attributes["src"].startswith("data:image/")
        assert int(attributes["width"]) > 0 and int(attributes["height"]) > 0
    assert found.headings[0] == 1 and found.headings.count(1) == 1
    assert all(below - above <= 1 for above, below in zip(found.headings, found.headings[1:], strict=False))
    for tag in ("main", "nav", "header", "footer", "title", "details", "summary"):
        assert found.tags[tag], tag
    for number in range(NUM_CLASSES):
        assert f"#class-{number}" in found.anchors and f"class-{number}" in found.ids
    assert 'lang="en"' in html and "width=device-width" in html and "prefers-color-scheme: dark" in html
    assert "broken & torn.png" in found.text and "broken & torn" not in html.replace("broken &amp; torn", "")


def opened(uri):
    """An embedded image, (height, width, 4), from 0 to 1."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(image.convert("RGBA")) / 255


def test_the_pages_images_can_be_opened(html):
    found = Page(html)
    for attributes in found.images:
        assert opened(attributes["src"]).shape[:2] == (int(attributes["height"]), int(attributes["width"]))
    for attributes in found.drawn:
        assert max(opened(attributes["href"]).shape[:2]) <= 480


def test_each_map_has_its_own_scale_up_to_its_peak(html, photos):
    rows = {row["image"]: row for row in rows_the_long_way(varied_model(), photos, 3) if not row["unreadable"]}
    classes = html.partition('id="classes"')[2].partition('id="confusions"')[0]
    seen = 0
    for name, caption, figure in re.findall(
        "<figure>\n<figcaption><span>(.*?): (.*?)</span>(.*?)</figure>", classes, re.DOTALL
    ):
        row = rows[name]
        assert caption.startswith(f"probability {percent(row['probability'])}; next {ID2LABEL[row['runner_up']]}, ")
        panels = re.findall(
            r'<image href="(.*?)".*?head (\d+).*?</span> (\S+)</span>', figure.partition("</li>")[2], re.DOTALL
        )
        assert [int(head) for _, head, _ in panels] == row["head_order"][:3]
        for uri, head, peak in panels:
            values = row["maps"][int(head)]
            assert peak == percent(float(values.max()))
            # As figures draw it, over a grey image, but in steps of 64 colours.
            shown = opened(uri)
            grey = Image.new("L", shown.shape[1::-1], 128)
            expected = overlay(grey, values, float(values.max())) / 255
            np.testing.assert_allclose(
                128 / 255 * (1 - shown[..., 3:]) + shown[..., :3] * shown[..., 3:], expected, atol=0.04
            )
            seen += 1
    assert seen > 9


def test_each_mean_map_has_its_own_scale_up_to_its_peak(html, photos):
    rows = [row for row in rows_the_long_way(varied_model(), photos, 3) if not row["unreadable"]]
    seen = 0
    for number, section in re.findall('<h3 id="class-([0-9]+)">(.*?)</section>', html, re.DOTALL):
        number, found = int(number), Page(section.partition("</h3>")[2])
        used = [row["maps"] for row in rows if row["label"] == row["prediction"] == number]
        shown = [one for one in found.images if one.get("class") == "grid"]
        assert bool(shown) == bool(used)
        heads = [int(re.match(r"Mean map of head (\d+)", one["alt"])[1]) for one in shown]
        expected = [np.mean([maps[head] for maps in used], axis=0) for head in heads]
        peaks = re.findall(r'class="grid".*?</span> (\S+)</span>', section, re.DOTALL)
        for one, mean, peak in zip(shown, expected, peaks, strict=True):
            colours = mpl.colormaps["inferno"](mean / mean.max())[..., :3]
            np.testing.assert_allclose(opened(one["src"])[..., :3], colours, atol=4 / 255)  # a step of the colour map
            assert peak == percent(float(mean.max()))
            seen += 1
    assert seen


def test_names_cannot_break_the_page(tmp_path):
    evil = {0: '<script>alert("x")</script>', 1: 'a" onload="b', 2: "c & d", 3: "ü 🐦", 4: "' e"}
    model = varied_model(id2label=evil)
    folder = tmp_path / "flat"
    folder.mkdir()
    for seed in range(6):
        image(seed).save(folder / f"<b>{seed}.png")
    found = Page(run(folder, tmp_path / "out", model).page.read_text(encoding="utf-8"))
    assert found.tags["script"] == 1 and found.tags["b"] == 0
    assert all(name in found.text for name in evil.values())


@pytest.mark.slow
@pytest.mark.long
def test_the_page_stays_small(monkeypatch):
    """200 classes with every image as large as it may be are under 20 MB; more classes never need much more."""
    model = tiny_model()
    embedded = page.EmbeddedImage("data:image/webp;base64," + "A" * (page.MAX_PHOTO_BYTES * 4 // 3), 320, 320)
    # Noise takes more than any map of a network.
    noise = page.embed_map(np.random.default_rng(0).random((16, 16)))
    maps = [page.DrawnMap(noise, "head 3", "12%", "head 3, strongest at the upper left")] * 5

    def draw(classifier, images, wanted, heads_shown, *rest):
        for example, classes in wanted:
            shown = maps[: heads_shown if len(classes) == 1 else 4]
            yield page.Drawn(example.name, embedded, shown, "a caption", (0, 0, 1, 1))

    monkeypatch.setattr(page, "_draw", draw)
    for num_classes, limit in ((200, 20e6), (3000, 26e6)):
        model.config.id2label = {number: f"Some species of bird number {number}" for number in range(num_classes)}
        classes = []
        for number, name in model.config.id2label.items():
            examples = [Example(i, f"some/folder/image_{i}.jpg", number, 0.5, (0, 1, 2)) for i in range(3)]
            found = ClassSummary(number, name, *(np.full(12, 20.0) for _ in range(4)), 30, 30, 25, 25, 50, examples)
            found.mistaken.update({0: 1, 1: 2, num_classes - 1: 1})
            classes.append(found)
        confusions = [Confusion(i, i + 1, 5, classes[i].examples[:2]) for i in range(20)]
        summary = Summary(classes, confusions, 30 * num_classes, [], 0)
        sums = MapSums(np.random.default_rng(0).random((num_classes, 12, 14, 14)), np.full(num_classes, 25))
        images = None
        classifier = type("Classifier", (), {"model": model})()
        numbers = ("num_trained_on", "num_classes", "num_images", "num_unreadable", "num_labelled")
        facts = dict.fromkeys(("model", "data", "split", "warning"), "a") | dict.fromkeys(numbers, 1)
        html = page.write_page(classifier, images, summary, sums, build.Options(), facts, 8)
        assert len(html.encode()) < limit
        assert html.count("data:image/webp") <= page.MAX_PHOTOS
        assert html.count('<h3 id="class-') == min(num_classes, page.MAX_CLASSES)
        assert ("fewer examples than classes.parquet names" in html) == (num_classes > 200)
        assert ("2000 classes with the fewest images are not on it" in html) == (num_classes == 3000)
        found = Page(html)
        assert {anchor[1:] for anchor in found.anchors} <= set(found.ids)


def test_thumbnails_are_never_too_large():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    for limit in (20000, 5000, 500, 100):
        embedded = embed_thumbnail(noise, 160, limit)
        assert len(embedded.uri) <= limit * 4 / 3 + 40
        assert max(embedded.width, embedded.height) <= 160
    assert embed_thumbnail(noise.resize((20, 10)), 160, 5000)[1:] == (20, 10)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    decoded = Image.open(io.BytesIO(base64.b64decode(embed_pixels(pixels).uri.partition(",")[2])))
    assert np.array_equal(np.asarray(decoded), pixels)


def test_places_in_words():
    trait_map = np.zeros((6, 9))
    trait_map[0, 8] = 1
    assert page.strongest_place(trait_map) == "at the upper right"
    trait_map[3, 4] = 2
    assert page.strongest_place(trait_map) == "in the middle"
    trait_map[5, 4] = 3
    assert page.strongest_place(trait_map) == "at the lower centre"


def test_the_model_is_left_as_it_was(photos, tmp_path):
    model = varied_model()
    before = model(random_images()).logits
    run(photos, tmp_path / "out", model)
    assert_computed(model(random_images()).logits, before)
