# SPDX-License-Identifier: MIT
"""Evaluations: numbers against the metrics' functions image by image, runs that are killed or shared, and the page."""

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ID2LABEL, NUM_CLASSES, tiny_backbone_config, tiny_model
from PIL import Image
from transformers import AutoModelForImageClassification

from prompt_cam_hf.baselines import VPTConfig, VPTForImageClassification, build_linear_probe, cam_maps
from prompt_cam_hf.baselines.backbone import backbone_of
from prompt_cam_hf.data.images import build_image_processor, open_image
from prompt_cam_hf.evaluation import build, evaluate, report
from prompt_cam_hf.evaluation.build import GroundTruth
from prompt_cam_hf.evaluation.curves import charts
from prompt_cam_hf.evaluation.measure import METRIC_GROUPS, ROW_SCHEMA, Protocol
from prompt_cam_hf.evaluation.subjects import load_subject
from prompt_cam_hf.evaluation.summary import Mean, as_text, summarize
from prompt_cam_hf.explanations.aggregate import DEFAULT_AGGREGATION, aggregate_maps
from prompt_cam_hf.html import EmbeddedImage
from prompt_cam_hf.loading import load_classifier, model_name
from prompt_cam_hf.metrics import faithfulness, localization, sanity
from prompt_cam_hf.metrics.road import road
from prompt_cam_hf.metrics.specificity import class_specificity
from prompt_cam_hf.modeling.backbone_prompt_cam import build_backbone

RESULTS = {"evaluation.json", "measurements.parquet", "curves.svg", "index.html"}
MAPS = ("attention_sum", "evidence_positive")
BASELINE_MAPS = ("rollout", "finer_grad_cam")
NUM_IMAGES = 19  # more than a part has
SIZE = (40, 50)


def save(model, folder: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A Prompt-CAM, a linear probe and a VPT of the same classes."""
    root = tmp_path_factory.mktemp("models")
    vpt = VPTConfig(backbone_config=tiny_backbone_config(), id2label=ID2LABEL, num_prompts=3)
    torch.manual_seed(0)
    probe = build_linear_probe(build_backbone(tiny_backbone_config()), id2label=ID2LABEL)
    return {
        "prompt_cam": save(tiny_model(), root / "prompt_cam"),
        "linear_probe": save(probe, root / "probe"),
        "vpt": save(VPTForImageClassification(vpt), root / "vpt"),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Images in class folders, one of which no model knows, and a broken one."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("photos")
    for index in range(NUM_IMAGES):
        name = "a stranger" if index == 4 else ID2LABEL[index % NUM_CLASSES]
        (folder / name).mkdir(exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        coarse.resize(SIZE[::-1], Image.Resampling.NEAREST).save(folder / name / f"{index:02d}.png")
    (folder / ID2LABEL[0] / "torn.png").write_bytes(b"torn")
    return folder


def mask_of(index: int, name: str, image: Image.Image) -> np.ndarray | None:
    """A square that depends on the image; nothing is known about some."""
    number = int(Path(name).stem)
    if number % 6 == 5:
        return None
    mask = np.zeros((image.height, image.width), dtype=bool)
    mask[8 : 12 + number, 10:30] = True
    return mask


TRUTH = GroundTruth("squares", mask_of)


def run(folders, photos, out, **options):
    options = {
        "baselines": [folders["linear_probe"], folders["vpt"]],
        "maps": MAPS,
        "baseline_maps": BASELINE_MAPS,
        "protocol": Protocol(METRIC_GROUPS, preset="fast"),
        "ground_truth": TRUTH,
        **options,
    }
    return evaluate(folders["prompt_cam"], photos, out, **options)


def quick(folders, photos, out, metrics=("specificity",), **options):
    """The cheapest run."""
    return run(folders, photos, out, **{"baselines": (), "maps": MAPS[:1], "protocol": Protocol(metrics), **options})


@pytest.fixture(scope="module")
def finished(folders, photos, tmp_path_factory):
    return run(folders, photos, tmp_path_factory.mktemp("finished"))


def measured(folder: Path) -> dict[tuple, tuple]:
    rows = pq.read_table(folder / "measurements.parquet").to_pylist()
    key, facts = ("image", "model", "map", "metric"), ("index", "label", "value", "curve")
    found = {tuple(row[name] for name in key): tuple(row[name] for name in facts) for row in rows}
    assert len(found) == len(rows)
    return found


def assert_same_numbers(first: Path, second: Path) -> None:
    first, second = measured(first), measured(second)
    assert first.keys() == second.keys()
    for key, (*facts, value, curve) in first.items():
        assert second[key][:2] == tuple(facts)
        assert second[key][2] == pytest.approx(value, abs=1e-5, nan_ok=True), key
        assert (curve is None) == (second[key][3] is None)
        assert curve is None or second[key][3] == pytest.approx(curve, abs=1e-5)


# --- Numbers ---


def make_map(model, pixel_values, classes, name):
    if name in MAPS:
        return aggregate_maps(model, pixel_values, classes, name)
    similar = 3 if name.startswith("finer") else 0
    return cam_maps(model, pixel_values, name.removeprefix("finer_"), classes, similar_classes=similar)


def measure_the_long_way(model, name, pixel_values, label, mask, first_stage):
    """All metrics of one map of one image."""
    asked = model(pixel_values).logits.argmax(-1)

    def explain(model, images, classes):
        return make_map(model, images, classes, name)

    one = explain(model, pixel_values, asked).detach()
    yield "insertion", faithfulness.insertion(model, pixel_values, one, asked, "fast").auc
    yield "deletion", faithfulness.deletion(model, pixel_values, one, asked, "fast").auc
    yield "road", road(model, pixel_values, one, asked).combined
    randomised = sanity.parameter_randomisation(model, pixel_values, explain, asked)
    yield f"left after randomising {first_stage}", randomised.similarity[:, 0]
    yield "left after randomising everything", randomised.similarity[:, -1]
    stable = sanity.map_stability(model, pixel_values, explain, [0.5] * 3, asked)
    yield "stability under noise", stable.noise
    yield "stability under a flip", stable.flip
    yield "like a random class's map", sanity.random_class_similarity(model, pixel_values, explain, asked)
    if label is None:
        return
    true = torch.tensor([label])
    specific = class_specificity(model, pixel_values, explain, true, None if mask is None else mask[None])
    yield "distance to runner-up", specific.distance[:, 0]
    yield "distance to random class", specific.distance[:, 1]
    if mask is None:
        return
    yield "mass lost to runner-up", specific.mass[:, 0] - specific.mass[:, 1]
    maps = explain(model, pixel_values, true).detach().numpy()
    yield "pointing game", localization.pointing_game(maps, mask[None])
    yield "relevance mass", localization.relevance_mass_accuracy(maps, mask[None])
    yield "mass at matched sharpness", localization.mass_at_matched_sharpness(maps, mask[None])
    yield "relevance rank", localization.relevance_rank_accuracy(maps, mask[None])
    yield "region IoU", localization.region_iou(maps, mask[None])
    yield "chance of pointing", localization.chance_level(localization.patch_mask(mask[None], (4, 4)))


@pytest.mark.slow
def test_numbers_are_those_of_the_metrics_image_by_image(finished, folders, photos):
    found = measured(finished.folder)
    models = {
        "prompt_cam": ("class prompts", MAPS),
        "probe": ("classifier", BASELINE_MAPS),
        "vpt": ("classifier", BASELINE_MAPS),
    }
    # One without label, one without mask, one that is torn, and some others.
    chosen = ("01", "04", "05", "08", "12", "torn")
    seen, images = set(), [path for path in sorted(photos.rglob("*.png")) if path.stem in chosen]
    assert len(images) == len(chosen)
    for kind, (first_stage, maps) in models.items():
        folder = folders["prompt_cam"].parent / kind
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        for path in images:
            image = f"{path.parent.name}/{path.name}"
            if path.stem == "torn":
                assert found[image, "", "", "unreadable"][2] == 1
                continue
            known = path.parent.name in ID2LABEL.values()
            label = list(ID2LABEL.values()).index(path.parent.name) if known else None
            pixel_values = build_image_processor(32)(open_image(path), return_tensors="pt")["pixel_values"]
            mask = mask_of(0, image, open_image(path))
            if mask is not None:
                # The processor squashes; a mask of rectangles is squashed by counting.
                squashed = Image.fromarray(np.uint8(mask) * 255).resize((32, 32), Image.Resampling.BILINEAR)
                mask = np.asarray(squashed) >= 127.5
            if known:
                right = float(model(pixel_values).logits.argmax() == label)
                assert found[image, kind, "", "accuracy"][1:3] == (path.parent.name, right)
                seen.add((image, kind, "", "accuracy"))
            for name in maps:
                for metric, value in measure_the_long_way(model, name, pixel_values, label, mask, first_stage):
                    key = (image, kind, name, metric)
                    value = np.asarray(value).item()
                    assert found[key][2] == pytest.approx(value, abs=2e-5, nan_ok=True), key
                    seen.add(key)
    names = {f"{path.parent.name}/{path.name}" for path in images}
    left = {key for key in found if key[0] in names and key not in seen and key[1]}
    # A mask that is unknown has no mass to lose.
    assert all(key[3] == "mass lost to runner-up" and math.isnan(found[key][2]) for key in left)


def test_the_files_say_the_same(finished):
    assert {path.name for path in finished.folder.iterdir()} == RESULTS
    assert (finished.num_images, finished.num_unreadable) == (NUM_IMAGES, 1)
    content = json.loads((finished.folder / "evaluation.json").read_text())
    assert content["num_images"] == NUM_IMAGES and content["num_unreadable"] == 1
    assert content["model"] == "prompt_cam" and content["map"] == MAPS[0]
    assert len(content["all"]) == len(finished.means)
    of_main = [mean for mean in finished.means if mean.model == "prompt_cam" and mean.map in ("", MAPS[0])]
    assert list(content["metrics"]) == [mean.metric for mean in of_main]
    for mean in of_main:
        facts = content["metrics"][mean.metric]
        assert (facts["value"], facts["low"], facts["high"]) == (mean.value, mean.low, mean.high)
        assert facts["num_images"] == mean.num_images
    protocols = {metric: facts["protocol"] for metric, facts in content["metrics"].items()}
    assert protocols["accuracy"] == "top-1"
    assert protocols["insertion"] == protocols["deletion"] == "fast, predicted class"
    assert protocols["pointing game"] == protocols["mass lost to runner-up"] == "squares, true class"
    assert protocols["distance to runner-up"] == "true class"
    assert protocols["stability under noise"] == protocols["road"] == "predicted class"
    found = measured(finished.folder)
    for mean in finished.means:
        values = [row[2] for key, row in found.items() if key[1:] == (mean.model, mean.map, mean.metric)]
        values = [value for value in values if not math.isnan(value)]
        assert mean.num_images == len(values) and mean.value == pytest.approx(np.mean(values))
        assert mean.low <= mean.value + 1e-9 and mean.value <= mean.high + 1e-9
    for (model, name, metric), curve in finished.curves.items():
        curves = [row[3] for key, row in found.items() if key[1:] == (model, name, metric)]
        assert len(curves) == NUM_IMAGES and curve == pytest.approx(np.mean(curves, axis=0), abs=1e-6)
    assert len(content["curves"]) == len(finished.curves) == 2 * (len(MAPS) + 2 * len(BASELINE_MAPS))
    for curve in content["curves"]:
        # A step is a patch, of 4 x 4.
        assert curve["part"] == pytest.approx(np.arange(17) / 16) and len(curve["curve"]) == 17


@pytest.mark.parametrize(
    ("kind", "maps"), [("prompt_cam", MAPS), ("linear_probe", ("grad_cam", "eigen_cam", "finer_hires_cam"))]
)
def test_the_network_runs_once_for_all_maps(folders, tmp_path, monkeypatch, capsys, kind, maps):
    """As often as was announced: for each image, and for each that is changed to test a map or the model."""
    pixels = np.random.default_rng(1).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    data = datasets.Dataset.from_dict(
        {"image": list(map(Image.fromarray, pixels)), "label": list(ID2LABEL.values())[:3] * 2},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    classifier = load_classifier(folders[kind])
    embedded, counted = [], []
    embeddings = backbone_of(classifier.model).get_input_embeddings()
    embeddings.register_forward_hook(lambda module, arguments, output: embedded.append(len(output)))

    class Recorder(contextlib.nullcontext):
        def update(self, passes):
            counted.append(passes)

    totals = []
    monkeypatch.setattr(build, "render_report", lambda *_: "")  # it reads the images that it shows again
    monkeypatch.setattr(build, "progress", lambda total, *_, **__: totals.append(total) or Recorder(Recorder()))
    for number, (metrics, limit) in enumerate((
        (("specificity",), 6), (("faithfulness",), 6), (("sanity",), 6), (METRIC_GROUPS, 4), (METRIC_GROUPS, 6)
    )):  # fmt: skip
        for record in (embedded, counted, totals):
            record.clear()
        protocol = Protocol(metrics, preset="rise-eighth", limit=limit, batch_size=4)
        evaluate(classifier, data, tmp_path / str(number), maps=maps, protocol=protocol)
        of_map = (2 * 3 if "faithfulness" in metrics else 0) + (2 * 9 if "road" in metrics else 0)
        of_image = (3 if "faithfulness" in metrics else 0) + (4 if "sanity" in metrics else 0)
        assert sum(counted) == totals[0] == 6 + limit * (of_map * len(maps) + of_image)
        assert sum(embedded) == totals[0] + 2 * 8  # two batches were timed
        assert f"Measuring 6 images with 1 model: {totals[0]:,} passes through the networks, about" in (
            capsys.readouterr().err
        )


def test_true_classes_and_a_limit(folders, photos, tmp_path):
    """Maps of images drawn at random, accuracy of all; other sizes of batches give the same."""
    protocol = Protocol(("faithfulness",), preset="fast", classes="true", limit=12, batch_size=5)
    found = quick(folders, photos, tmp_path / "out", protocol=protocol)
    counts = {mean.metric: mean.num_images for mean in found.means}
    assert counts == {"accuracy": NUM_IMAGES - 1, "insertion": 12, "deletion": 12}
    rows = {key: row for key, row in measured(found.folder).items() if key[3] in ("insertion", "deletion")}
    assert {index for index, *_ in rows.values()} != set(range(12))
    model = AutoModelForImageClassification.from_pretrained(folders["prompt_cam"]).eval()
    kinds = set()
    for (image, _, name, metric), (_, label, value, _) in rows.items():
        pixel_values = build_image_processor(32)(open_image(photos / image), return_tensors="pt")["pixel_values"]
        predicted = model(pixel_values).logits.argmax(-1)
        asked = predicted if label is None else torch.tensor([list(ID2LABEL.values()).index(label)])
        maps = aggregate_maps(model, pixel_values, asked, name)
        expected = getattr(faithfulness, metric)(model, pixel_values, maps, asked, "fast").auc
        assert value == pytest.approx(float(expected), abs=1e-5)
        kinds.add("unlabelled" if label is None else "right" if asked == predicted else "wrong")
    assert kinds == {"unlabelled", "right", "wrong"}
    other = quick(folders, photos, tmp_path / "other", protocol=Protocol(("faithfulness",), "fast", "true", 12))
    assert_same_numbers(found.folder, other.folder)


def test_defaults(folders, photos, tmp_path):
    """The aggregated map of a Prompt-CAM; the usual rivals of others; what does not fit a family is left out."""
    protocol = Protocol(("specificity",))
    out = tmp_path / "out"
    found = evaluate(folders["prompt_cam"], photos, out, baselines=[folders["vpt"]], protocol=protocol)
    maps = defaultdict(list)
    for mean in found.means:
        if mean.map not in maps[mean.model]:
            maps[mean.model].append(mean.map)
    assert maps["prompt_cam"] == ["", DEFAULT_AGGREGATION]
    usual = ["grad_cam", "hires_cam", "layer_cam", "eigen_cam", "rollout", "chefer_cam", "finer_hires_cam"]
    assert maps["vpt"] == ["", *usual]
    assert not (tmp_path / "out" / "curves.svg").exists()
    many_heads = tiny_model(backbone_fields={"hidden_size": 68, "num_attention_heads": 17})
    assert load_subject(save(many_heads, tmp_path / "many")).maps == (DEFAULT_AGGREGATION,)
    twice = quick(folders, photos, tmp_path / "twice", baselines=[folders["prompt_cam"]], baseline_maps=MAPS[:1] * 2)
    assert {mean.model for mean in twice.means} == {"prompt_cam (1)", "prompt_cam (2)"}
    assert len(twice.means) == 2 * 4
    assert all(mean.num_images == NUM_IMAGES - 1 for mean in twice.means if mean.metric != "mass lost to runner-up")


def test_what_a_model_is_called(tmp_path, monkeypatch):
    for folder in ("sparrows", "demo/model"):
        (tmp_path / folder).mkdir(parents=True)
    assert model_name(tmp_path / "sparrows") == model_name(f"{tmp_path}/sparrows/") == "sparrows"
    assert model_name(tmp_path / "demo" / "model") == "demo"
    monkeypatch.chdir(tmp_path / "demo" / "model")
    assert model_name(".") == "demo" and model_name("..") == "demo" and model_name("../../sparrows") == "sparrows"
    assert model_name("me/garden-birds") == "me/garden-birds"


def test_data_sets_without_labels(folders, tmp_path):
    images = [Image.fromarray(np.full((32, 32, 3), grey, np.uint8)) for grey in (10, 200)]
    data = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    protocol = Protocol(("faithfulness", "specificity", "localisation"), preset="fast")
    found = quick(folders, data, tmp_path / "out", protocol=protocol, ground_truth=None)
    assert [mean.metric for mean in found.means] == ["insertion", "deletion"]


def test_intervals_are_the_bootstraps():
    """Resampled the long way: about the same ends, within the noise of 2000 resamples."""
    values = np.random.default_rng(1).normal(size=40) ** 2
    rows = [
        {"index": i, "model": "m", "map": "a", "metric": "x", "value": value, "curve": [0.0, value]}
        for i, value in enumerate([*values, float("nan")])
    ]
    table = pa.Table.from_pylist(rows, ROW_SCHEMA)
    alone = pa.Table.from_pylist([rows[0] | {"metric": "alone"}], ROW_SCHEMA)
    nothing = pa.Table.from_pylist([rows[-1] | {"metric": "nothing"}], ROW_SCHEMA)
    even = pa.Table.from_pylist([row | {"metric": "even", "value": 0.5} for row in rows], ROW_SCHEMA)
    means, curves = summarize([table, alone, nothing, even])
    mean, one, none, constant = means
    random = np.random.default_rng(2)
    resampled = [values[random.integers(0, 40, 40)].mean() for _ in range(20_000)]
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert mean.num_images == 40 and mean.value == pytest.approx(values.mean())
    assert mean.low == pytest.approx(low, abs=0.03) and mean.high == pytest.approx(high, abs=0.03)
    assert one.value == values[0] and math.isnan(one.low) and one.num_images == 1 and str(one) == f"{values[0]:.3f}"
    assert math.isnan(none.value) and none.num_images == 0
    assert (constant.low, constant.value, constant.high) == (0.5, 0.5, 0.5)
    assert str(Mean("m", "a", "x", 0.5, 0.25, 0.75, 4)) == "0.500 [0.250, 0.750]"
    assert str(Mean("m", "a", "x", -1e-9, -0.0004, 0.0004, 4)) == "0.000 [0.000, 0.000]"
    assert curves["m", "a", "x"][0] == 0 and summarize([table])[0][0] == mean


# --- Interrupted, shared, refused ---


def test_interrupted_and_resumed(folders, photos, tmp_path, monkeypatch):
    whole, out = quick(folders, photos, tmp_path / "whole"), tmp_path / "out"
    measure_part, calls = build._measure_part, []

    def stop(*arguments):
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return measure_part(*arguments)

    monkeypatch.setattr(build, "_measure_part", stop)
    with pytest.raises(KeyboardInterrupt):
        quick(folders, photos, out)
    assert [path.name for path in out.iterdir()] == ["evaluation_parts"]
    parts = sorted((out / "evaluation_parts").glob("part-*"))
    kept = parts[0].stat().st_mtime_ns

    for change, setting in (
        ({"protocol": Protocol(("specificity",), seed=1)}, "seed"),
        ({"protocol": Protocol(("faithfulness",), preset="fast")}, "metrics, preset"),
        ({"maps": MAPS[1:]}, "models"),
        ({"ground_truth": GroundTruth("circles", mask_of)}, "ground truth"),
        ({"baselines": [folders["vpt"]]}, "image processors, models"),
    ):
        with pytest.raises(ValueError, match=rf"evaluation_parts holds an unfinished .* settings \({setting}\)"):
            quick(folders, photos, out, **change)
    assert sorted((out / "evaluation_parts").glob("part-*")) == parts and parts[0].stat().st_mtime_ns == kept

    # Settings that change no number may differ.
    calls.clear()
    monkeypatch.setattr(build, "_measure_part", lambda *arguments: calls.append(1) or measure_part(*arguments))
    quick(folders, photos, out, protocol=Protocol(("specificity",), batch_size=8))
    assert len(calls) == 1 and {path.name for path in out.iterdir()} == RESULTS - {"curves.svg"}
    assert (out / "measurements.parquet").read_bytes() == (whole.folder / "measurements.parquet").read_bytes()
    for name in ("evaluation.json", "index.html"):
        assert (out / name).read_bytes() == (whole.folder / name).read_bytes()


def test_interrupted_while_results_are_written(folders, photos, tmp_path, monkeypatch):
    """The page comes last; without it the same call goes on, and another one refuses."""
    replace = os.replace

    def stop_at_the_page(source, target):
        if Path(target).name == "index.html":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop_at_the_page)
        with pytest.raises(KeyboardInterrupt):
            quick(folders, photos, tmp_path)
    assert (tmp_path / "evaluation.json").exists() and not (tmp_path / "index.html").exists()
    (tmp_path / ".index.html.99.partial").write_text("half")
    with pytest.raises(ValueError, match="other settings"):
        quick(folders, photos, tmp_path, maps=MAPS[1:])
    with monkeypatch.context() as patched:
        patched.setattr(build, "_measure_part", lambda *_: 1 / 0)
        quick(folders, photos, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == RESULTS - {"curves.svg"}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_are_never_overwritten_unasked(folders, photos, tmp_path, monkeypatch):
    quick(folders, photos, tmp_path, metrics=("faithfulness",), protocol=Protocol(("faithfulness",), preset="fast"))
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"index\.html exists already; choose another folder, or set overwrite"):
        quick(folders, photos, tmp_path)
    assert contents(tmp_path) == before
    # Until there are new ones, the old ones stay.
    with monkeypatch.context() as patched:
        patched.setattr(build, "_measure_part", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick(folders, photos, tmp_path, overwrite=True)
    assert {name: before[name] for name in RESULTS} == {name: contents(tmp_path)[name] for name in RESULTS}
    quick(folders, photos, tmp_path, overwrite=True)
    after = contents(tmp_path)
    assert after.keys() == RESULTS - {"curves.svg"} and all(after[name] != before[name] for name in after)


@pytest.mark.parametrize("name", ["evaluation.json", "evaluation_parts/thesis.txt"])
def test_files_of_others_stay(folders, photos, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        quick(folders, photos, tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


SCRIPT = """
import sys
from prompt_cam_hf.evaluation import evaluate
from prompt_cam_hf.evaluation.measure import Protocol
model, photos, out = sys.argv[1:]
evaluate(model, photos, out, maps=["attention_sum"], protocol=Protocol(("faithfulness", "sanity"), preset="fast"))
"""


@pytest.mark.slow
def test_killed_and_resumed(folders, photos, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", SCRIPT, folders["prompt_cam"], photos, out]
    process = subprocess.Popen(command, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not list(out.glob("evaluation_parts/part-*.parquet")):
        time.sleep(0.001)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.html").exists() and len(list(out.glob("evaluation_parts/part-*.parquet"))) == 1
    protocol = Protocol(("faithfulness", "sanity"), preset="fast")
    evaluate(folders["prompt_cam"], photos, out, maps=["attention_sum"], protocol=protocol)
    assert {path.name for path in out.iterdir()} == RESULTS
    evaluate(folders["prompt_cam"], photos, tmp_path / "whole", maps=["attention_sum"], protocol=protocol)
    assert_same_numbers(out, tmp_path / "whole")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_measure_what_one_does(folders, photos, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += [f"--main_process_port={port}", "-m", "prompt_cam_hf", "evaluate", str(folders["prompt_cam"])]
    launch += ["--data", str(photos), "--metrics", "specificity", "--map", MAPS[0], "--out", str(tmp_path / "two")]
    done = subprocess.run(launch, env=one_thread(), capture_output=True, text=True)
    # One image is torn, so each process ends with 1, which the launcher reports.
    assert done.stdout.count("index.html") == 1, done.stderr
    one = quick(folders, photos, tmp_path / "one", ground_truth=None)
    assert_same_numbers(one.folder, tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == RESULTS - {"curves.svg"}
    assert (tmp_path / "two" / "evaluation.json").read_bytes() == (one.folder / "evaluation.json").read_bytes()


def test_mistakes_get_one_sentence(folders, photos, tmp_path):
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    other = save(tiny_model(id2label={**ID2LABEL, 3: "class three"}), tmp_path / "other")
    for change, sentence in (
        ({"maps": ["saliency"]}, "There is no map 'saliency'; choose among attention_sum, "),
        ({"baselines": [folders["vpt"]], "baseline_maps": ["evidence_sum"]}, "vpt has no map 'evidence_sum'"),
        ({"baselines": [other]}, "number 3 is 'class 3' in the one and 'class three' in the other"),
        ({"split": "test"}, "no split 'test'"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            quick(folders, photos, out, **change)
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        quick(folders, empty, out)
    with pytest.raises(OSError, match="nowhere"):
        evaluate(tmp_path / "nowhere", photos, out)
    for change, sentence in (
        ({"metrics": ("accuracy",)}, "no metrics 'accuracy'; choose among faithfulness, "),
        ({"preset": "slow"}, "no preset 'slow'; choose one of rise, "),
        ({"classes": "all"}, "classes='all' is not known"),
        ({"limit": 0}, "at least 1 is needed"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Protocol(**change)
    assert not out.exists()


def test_nothing_can_be_read(folders, tmp_path):
    (tmp_path / "photos" / "class 1").mkdir(parents=True)
    (tmp_path / "photos" / "class 1" / "a.png").write_bytes(b"torn")
    with pytest.raises(ValueError, match="None of the 1 images can be read"):
        quick(folders, tmp_path / "photos", tmp_path / "out")


# --- The page ---


class Page(HTMLParser):
    """What a browser and a screen reader make of a page."""

    VOID = ("meta", "img", "br", "input", "link", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.anchors, self.images, self.tags = [], [], [], [], Counter()
        self.urls, self.labelled_by, self.text, self.cells = [], [], "", []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags[tag] += 1
        if tag not in self.VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.anchors += [attributes["href"]] if tag == "a" else []
        self.images += [attributes] if tag == "image" else []
        self.cells += [""] if tag in ("td", "th") else []
        self.urls += [attributes[name] for name in ("src", "href", "action", "poster", "srcset") if name in attributes]
        self.labelled_by += [attributes["aria-labelledby"]] if "aria-labelledby" in attributes else []

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def test_the_page_is_sound_and_needs_nothing_else(finished, photos):
    html = (finished.folder / "index.html").read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert all(url.startswith(("#", "data:")) for url in page.urls)
    assert "http://" not in html and "https://" not in html and "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert str(photos) not in html
    assert {anchor[1:] for anchor in page.anchors} <= set(page.ids) and set(page.labelled_by) <= set(page.ids)
    assert {"table-1", "table-5", "curves", "best", "worst"} <= set(page.ids)
    for attributes in page.images:
        assert attributes["href"].startswith("data:image/")
        assert float(attributes["width"]) > 0 and float(attributes["height"]) > 0
    cells = "|".join(page.cells)
    for mean in finished.means:
        assert f"{mean}{mean.num_images} images" in cells
    assert "insertion↑ high is goodfast, predicted class" in cells
    assert "pointing game↑ high is goodsquares, true class" in cells
    assert "1 that cannot be read were left out" in page.text and "19 images" in page.text


def test_best_and_worst_images(finished):
    """By insertion minus deletion of the first map: the best of those that are read rightly, and the worst of all."""
    found = measured(finished.folder)
    gaps = {
        key[0]: row[2] - found[(*key[:3], "deletion")][2]
        for key, row in found.items()
        if key[1:] == ("prompt_cam", MAPS[0], "insertion")
    }
    order = sorted(gaps, key=lambda name: -gaps[name])
    worst = order[::-1][:4]
    right = [
        name for name in order if found.get((name, "prompt_cam", "", "accuracy"), (0, 0, 1))[2] and name not in worst
    ]
    assert right[:4] != order[:4]  # the best of all are misread
    html = (finished.folder / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r"<span>(\S[^\n]*?\.png): map of (class \d), .*?insertion minus deletion (-?\d\.\d\d)<", html)
    assert [name for name, _, _ in shown] == [*right[:4], *worst]
    for name, _, score in shown:
        assert float(score) == pytest.approx(gaps[name], abs=0.006)
    figures = re.findall(r"<figcaption><span>(.*?\.png):(.*?)</figure>", html, re.DOTALL)
    outlined = [name for name, figure in figures if "non-scaling-stroke" in figure]
    assert outlined == [name for name, _, _ in shown if int(Path(name).stem) % 6 != 5]


def test_one_image_is_the_best_if_it_was_not_misread(folders, tmp_path):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    model = load_subject(folders["prompt_cam"])
    with torch.no_grad():
        values = model.image_processor(image, return_tensors="pt")["pixel_values"]
        right = ID2LABEL[int(model.model(values).logits.argmax())]
    wrong = next(name for name in ID2LABEL.values() if name != right)
    for label, sections in ((right, {"best"}), (wrong, set())):
        (tmp_path / label / label).mkdir(parents=True)
        image.save(tmp_path / label / label / "5.png")
        found = quick(folders, tmp_path / label, tmp_path / f"{label} out")
        page = Page((found.folder / "index.html").read_text(encoding="utf-8"))
        assert {"best", "worst"} & set(page.ids) == sections


def test_the_outline_surrounds_the_mask():
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:5, 4:9] = True
    mask[8:, 18:] = True
    path = report._outline(mask, EmbeddedImage("", 40, 30))  # twice as wide, three times as high
    corners = [np.array([point.split() for point in part.split("L")], float) for part in path.split("M")[1:]]
    boxes = sorted((*one.min(axis=0), *one.max(axis=0)) for one in corners)
    np.testing.assert_allclose(boxes, [(8, 6, 18, 15), (36, 24, 40, 30)])
    assert report._outline(np.zeros((10, 20), dtype=bool), EmbeddedImage("", 40, 30)) == ""


def test_the_best_of_each_column():
    columns = ["insertion", "deletion", "left after randomising everything", "distance to runner-up", "road"]
    rows = {
        "a": (0.4, 0.4, -0.2, 0.9, None),
        "b": (0.70004, 0.1, 0.1, 0.1, 0.1),
        "c": (0.69996, math.nan, 0.3, 0.1, None),
    }
    means = {
        name: [None if value is None else Mean("m", name, "", value, value, value, 9) for value in values]
        for name, values in rows.items()
    }
    # What is shown is equal in the first column, and nothing to compare with is in the last.
    table = report.Table("t", "map", columns, list(means.items()))
    assert report.best_rows(table) == [{1, 2}, {1}, {1}, set(), set()]


def test_numbers_that_round_to_0_have_no_sign():
    assert str(Mean("m", "", "accuracy", -0.0004, -0.0006, 0.0004, 3)) == "0.000 [-0.001, 0.000]"
    assert as_text(-0.004, 2) == "0.00" and as_text(-0.006, 2) == "-0.01"


def test_charts_have_the_points_of_the_curves(finished):
    """Back from the coordinates of SVG."""
    for chart in charts(finished):
        top, bottom = chart.ticks[-1], chart.ticks[0]
        assert (top[0], bottom) == (0, (chart.height, "0"))
        assert len({(line.colour, line.marker) for line, _, _ in chart.curves}) == len(chart.curves) == 6
        for line, points, marked in chart.curves:
            curve = finished.curves[(*line.label.split(": "), chart.metric)]
            x, y = np.array([point.split(",") for point in points.split()], float).T
            np.testing.assert_allclose(x / chart.width, np.linspace(0, 1, len(curve)), atol=1e-3)  # of this preset
            np.testing.assert_allclose((1 - y / chart.height) * float(top[1]), curve, atol=1e-3)
            assert len(marked) == 5 and set(marked) <= set(zip(x, y, strict=True))
