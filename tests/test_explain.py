# SPDX-License-Identifier: MIT
"""Explanations and comparisons, against the model asked piece by piece."""

import csv
import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ID2LABEL, tiny_backbone_config, tiny_model
from PIL import Image
from transformers import ViTForImageClassification, pipeline

from prompt_cam_hf import PromptCAMImageClassificationPipeline
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.compare import Comparison, compare
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.explanations.maps import trait_maps
from prompt_cam_hf.explanations.ranking import rank_heads
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.loading import Classifier, as_classifier

HEADS = 4
SIZES = [(50, 40), (30, 90), (32, 32)]


def random_image(size=(50, 40), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def classifier():
    return Classifier(tiny_model(), build_image_processor(32))


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        random_image(size, number).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("kind", ["attention", "evidence"])
@pytest.mark.parametrize("method", ["greedy", "exact", "shapley"])
def test_it_says_what_the_model_says(classifier, method, kind):
    images = [random_image(size, seed) for seed, size in enumerate(SIZES)]
    names = ["class 3", "Class_0"]
    explanations = explain(classifier, images, names, kind=kind, method=method, batch_size=2)
    for image, explanation in zip(images, explanations, strict=True):
        pixel_values = classifier.image_processor(image, return_tensors="pt")["pixel_values"]
        logits = classifier.model(pixel_values).logits[0].detach()
        order = logits.argsort(descending=True).tolist()
        assert [score.number for score in explanation.scores] == order
        assert explanation.prediction.label == ID2LABEL[order[0]] and explanation.prediction.rank == 1
        for score in explanation.scores:
            assert score.logit == pytest.approx(logits[score.number].item(), abs=1e-5)
            assert score.probability == pytest.approx(logits.softmax(-1)[score.number].item(), abs=1e-5)
        assert explanation.image.size == image.size and explanation.box == (0, 0, *image.size)

        asked = torch.tensor([[3, 0]])
        ranking = rank_heads(classifier.model, pixel_values, asked, method)
        maps = trait_maps(classifier.model, pixel_values, asked, kind)[0].numpy()
        attention = trait_maps(classifier.model, pixel_values, asked)[0]
        assert [traits.number for traits in explanation.classes] == [3, 0]
        for row, traits in enumerate(explanation.classes):
            assert explanation.scores[traits.rank - 1].label == traits.label
            np.testing.assert_allclose(traits.maps, maps[row], atol=1e-5)
            assert traits.attention_on_patches == pytest.approx(attention[row].sum((-2, -1)).tolist(), abs=1e-5)
            assert traits.head_order == tuple(ranking.order[0, row].tolist())
            assert traits.head_scores == pytest.approx(ranking.scores[0, row].tolist(), abs=1e-5)
            sufficient = ranking.sufficient[0, row].item()
            assert traits.sufficient == (None if sufficient > HEADS else sufficient)
            assert traits.sufficient_heads == (() if sufficient > HEADS else traits.head_order[:sufficient])


def test_one_call_from_whatever_there_is(classifier, model_folder, photos):
    pipe = pipeline(
        "image-classification", model=str(model_folder), pipeline_class=PromptCAMImageClassificationPipeline
    )
    path = photos / "0.png"
    expected = explain(classifier, path)
    assert expected.source == str(path) and [traits.rank for traits in expected.classes] == [1]
    for model, options in [
        (model_folder, {}),
        (str(model_folder), {}),
        (pipe, {}),
        (classifier.model, {"image_processor": classifier.image_processor}),
    ]:
        for image in (path, str(path), path.read_bytes(), {"bytes": None, "path": str(path)}, Image.open(path)):
            explanation = explain(model, image, **options)
            assert explanation.prediction.logit == pytest.approx(expected.prediction.logit, abs=1e-5)
            np.testing.assert_allclose(explanation.classes[0].maps, expected.classes[0].maps, atol=1e-6)
        assert as_classifier(model, **options).model.config.model_type == "prompt_cam"
    several = explain(classifier, photos)
    assert [explanation.source for explanation in several] == [str(photos / f"{n}.png") for n in range(3)]
    assert [e.source for e in explain(classifier, iter(sorted(photos.iterdir())), batch_size=1)] == [
        e.source for e in several
    ]


def test_the_image_is_upright_and_in_its_own_size(classifier, tmp_path):
    image = random_image((60, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    explanation = explain(classifier, tmp_path / "turned.png")
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert explanation.image.size == (30, 60) and explanation.image.tobytes() == upright.tobytes()
    np.testing.assert_allclose(explanation.classes[0].maps, explain(classifier, upright).classes[0].maps)


def test_other_input_sizes_than_the_backbones(classifier):
    processor = build_image_processor((48, 64))
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        explain(classifier, random_image(), image_processor=processor)
    explanation = explain(classifier, random_image(), image_processor=processor, interpolate_pos_encoding=True)
    assert explanation.classes[0].maps.shape == (HEADS, 6, 8)


def test_exports(classifier, photos, tmp_path):
    explanation = explain(classifier, photos / "1.png", ["class 3", "class 1"], kind="evidence", method="exact")
    text = json.loads(explanation.to_json())
    assert text == json.loads(json.dumps(explanation.to_dict()))
    assert text["image"].endswith("1.png") and text["image_size"] == {"width": 30, "height": 90}
    assert [score["rank"] for score in text["top"]] == [1, 2, 3, 4, 5]
    for traits, exported in zip(explanation.classes, text["classes"], strict=True):
        np.testing.assert_allclose(exported["maps"], traits.maps, rtol=1e-6)
        assert exported["label"] == traits.label and exported["head_order"] == list(traits.head_order)
        assert exported["sufficient_heads"] == list(traits.sufficient_heads)

    rows = list(csv.DictReader(io.StringIO(explanation.to_csv())))
    assert [(row["class"], int(row["head"])) for row in rows] == [
        (traits.label, head) for traits in explanation.classes for head in traits.head_order
    ]
    for row in rows:
        traits = next(traits for traits in explanation.classes if traits.label == row["class"])
        trait_map = traits.maps[int(row["head"])]
        assert float(row["evidence_sum"]) == pytest.approx(trait_map.sum(), rel=1e-5)
        assert row["sufficient"] == str(int(row["head"]) in traits.sufficient_heads)
        # The middle of the strongest of 4 x 4 patches on 30 x 90 pixels.
        place = np.argwhere(trait_map == trait_map.max())[0]
        assert abs(int(row["max_x"]) - (place[1] + 0.5) * 7.5) <= 0.5
        assert abs(int(row["max_y"]) - (place[0] + 0.5) * 22.5) <= 0.5

    again = pickle.loads(pickle.dumps(explanation))
    assert again.to_json() == explanation.to_json() and again.image.tobytes() == explanation.image.tobytes()
    for name in ("a.json", "a.csv", "a.png", "a.pdf", "a.svg", "A.JPG", "a.webp"):
        explanation.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "a.json").read_text() == explanation.to_json()
    assert Image.open(tmp_path / "a.png").width > 300
    explanation.save(tmp_path / "few.png", heads=1)
    assert Image.open(tmp_path / "few.png").width < Image.open(tmp_path / "a.png").width
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".*"))


def test_it_prints_well(classifier, photos):
    explanation = explain(classifier, photos / "0.png", ["class 3", "class 1"], kind="evidence")
    text, best = str(explanation), explanation.prediction
    assert text.splitlines()[0] == f"{photos / '0.png'}: {best.label} ({best.probability:.1%})"
    for traits in explanation.classes:
        assert f"{traits.label} - {traits.verdict} (greedy ranking)" in text
    assert "0.png" in repr(explanation) and "\n" not in repr(explanation)
    assert all(len(line) < 100 for line in text.splitlines())


def test_verdicts(classifier):
    traits = explain(classifier, random_image()).classes[0]
    traits = replace(traits, head_order=(2, 0, 3, 1))
    for rank, sufficient, sets, verdict in [
        (1, 1, None, "predicted: head 2 suffices"),
        (1, 3, None, "predicted: heads 2, 0 and 3 suffice"),
        (1, 2, 3, "predicted: heads 2 and 0 suffice (one of 3 sets as small)"),
        (1, 4, None, "predicted: needs all heads"),
        (1, 0, None, "predicted: stays on top with every head blurred"),
        (3, None, None, "rank 3"),
        (2, 1, 1, "rank 2: with head 2 alone it would be on top"),
    ]:
        changed = replace(traits, rank=rank, sufficient=sufficient, num_smallest_sets=sets)
        assert changed.verdict == verdict


@pytest.mark.parametrize("kind", ["attention", "evidence"])
def test_shared_and_own_maps(classifier, kind):
    comparison = compare(classifier, random_image(), ["class 4", 0, "class 2"], kind=kind)
    maps = np.stack([traits.maps for traits in comparison.classes])
    shared, own = np.zeros_like(maps[0]), np.zeros_like(maps)
    for place in np.ndindex(maps.shape[1:]):
        values = maps[(slice(None), *place)].tolist()
        if min(values) > 0 or max(values) < 0:
            shared[place] = min(values, key=abs)
        for index, value in enumerate(values):
            own[(index, *place)] = value - max(values[:index] + values[index + 1 :])
    np.testing.assert_allclose(comparison.shared, shared, atol=1e-7)
    np.testing.assert_allclose(comparison.own, own, atol=1e-7)
    largest = np.abs(maps).max(axis=0).sum(axis=(1, 2))
    np.testing.assert_allclose(comparison.overlap, np.abs(shared).sum(axis=(1, 2)) / largest, rtol=1e-5)
    pair = Comparison(replace(comparison.explanation, classes=comparison.classes[:2]))
    np.testing.assert_allclose(pair.own[0], maps[0] - maps[1])
    np.testing.assert_allclose(pair.own[1], -pair.own[0])
    if kind == "attention":
        # What is shared and what is its own make up a class's map.
        np.testing.assert_allclose(pair.shared + np.maximum(pair.own[0], 0), maps[0], atol=1e-7)


def test_heads_of_a_comparison_take_turns(classifier):
    comparison = compare(classifier, random_image(), ["class 4", "class 0"])
    first, second = (traits.head_order for traits in comparison.classes)
    seen = []
    for a, b in zip(first, second, strict=True):
        seen += [head for head in (a, b) if head not in seen]
    assert comparison.top_heads(HEADS) == tuple(dict.fromkeys(seen)) and len(comparison.top_heads(2)) == 2


def test_a_misread_image(classifier, photos, tmp_path):
    path = photos / "0.png"
    scores = explain(classifier, path).scores
    comparison = compare(classifier, path, true=scores[2].label, kind="evidence")
    assert [traits.rank for traits in comparison.classes] == [3, 1]
    assert comparison.true_label == scores[2].label
    assert f"({scores[0].probability:.1%}), truly {scores[2].label}" in str(comparison)
    with pytest.raises(ValueError, match=r"0\.png is classified correctly, as 'class"):
        compare(classifier, path, true=scores[0].label)

    rows = comparison.to_rows()
    assert len(rows) == 2 * HEADS and {row["class"] for row in rows} == {scores[0].label, scores[2].label}
    for row in rows:
        index = [traits.label for traits in comparison.classes].index(row["class"])
        own = comparison.own[index, row["head"]]
        assert row["own_sum"] == pytest.approx(own[own > 0].sum(), rel=1e-5)
        assert row["overlap"] == pytest.approx(comparison.overlap[row["head"]])
    text = json.loads(comparison.to_json())
    np.testing.assert_allclose(text["own"], comparison.own, rtol=1e-6)
    assert text["true_label"] == scores[2].label and text["image"] == str(path)
    assert pickle.loads(pickle.dumps(comparison)).to_json() == comparison.to_json()
    comparison.save(tmp_path / "c.png")
    assert scores[2].label in repr(comparison)


def test_a_failed_save_leaves_the_old_file(classifier, tmp_path, monkeypatch):
    explanation = explain(classifier, random_image())
    for name in ("a.gif", "a", "a.docx"):
        with pytest.raises(ValueError, match=r"a result can be saved as \.png"):
            explanation.save(tmp_path / name)
    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_mistakes_get_one_sentence(classifier, photos, tmp_path):
    ViTForImageClassification(tiny_backbone_config()).save_pretrained(tmp_path / "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    image, model = random_image(), classifier.model
    for arguments, options, error, message in [
        ((classifier, image, "class 9"), {}, ValueError, "did you mean 'class 4'"),
        ((classifier, image, 5), {}, ValueError, "from 0 to 4"),
        ((classifier, image), {"kind": "saliency"}, ValueError, 'use "attention" or "evidence"'),
        ((classifier, image), {"method": "random"}, ValueError, 'use "greedy", "exact" or "shapley"'),
        ((classifier, image), {"batch_size": 0}, ValueError, "at least one image"),
        ((classifier, tmp_path / "broken.jpg"), {}, ValueError, "Cannot read the image"),
        ((classifier, tmp_path / "none.jpg"), {}, FileNotFoundError, "none.jpg"),
        ((classifier, tmp_path / "empty"), {}, ValueError, "holds no images"),
        ((tmp_path / "other", image), {}, ValueError, "'vit', not a Prompt-CAM, and has no trait maps"),
        ((model, image), {}, ValueError, "needs its image processor"),
        ((torch.nn.Linear(1, 1), image), {}, ValueError, "Linear is no model"),
    ]:
        with pytest.raises(error, match=message):
            explain(*arguments, **options)
    with pytest.raises(ValueError, match="Give either classes=, two or more, or true="):
        compare(classifier, image)
    with pytest.raises(ValueError, match="Only the class 'class 1' was named; a comparison needs two"):
        compare(classifier, image, ["class 1", "CLASS 1"])
    explanation = explain(classifier, image)
    for heads in (0, 5):
        with pytest.raises(ValueError, match=f"heads={heads}: the model has 4 heads"):
            explanation.figure(heads=heads)
    with pytest.raises(ValueError, match='use "map", "head" or "figure"'):
        explanation.figure(scale="row")
