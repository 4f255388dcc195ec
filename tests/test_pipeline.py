# SPDX-License-Identifier: MIT
"""The pipeline, where this package is installed and where it is not."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ID2LABEL, IMAGE_SIZE, assert_computed, assert_stored, tiny_model
from PIL import Image
from straightforward import run_straightforwardly
from transformers import ImageClassificationPipeline, ViTImageProcessor, pipeline

from prompt_cam_hf import PromptCAMImageClassificationPipeline
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.modeling.ranking_prompt_cam import rank_heads_greedily


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [
        Image.fromarray(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in [(40, 60), (32, 32), (90, 50)]
    ]


def ours(folder, **options):
    return pipeline("image-classification", model=str(folder), **options)


def assert_same_answers(got, expected):
    """Answers to one image or to several: the same labels in the same order, and scores to the tolerance."""
    if isinstance(expected[0], list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_same_answers(one, other)
    else:
        assert [answer["label"] for answer in got] == [answer["label"] for answer in expected]
        assert all(answer.keys() == {"label", "score"} for answer in got)
        assert_computed([answer["score"] for answer in got], [answer["score"] for answer in expected])


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_k": 99}, {"function_to_apply": "none"}])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_without_trait_maps_it_is_the_stock_pipeline(model_folder, images, options, batch_size):
    stock = pipeline("image-classification", model=str(model_folder), pipeline_class=ImageClassificationPipeline)
    assert type(stock) is ImageClassificationPipeline
    assert type(ours(model_folder)) is PromptCAMImageClassificationPipeline
    expected = stock(images, batch_size=batch_size, **options)
    assert_same_answers(ours(model_folder)(images, batch_size=batch_size, **options), expected)
    assert_same_answers(ours(model_folder)(images, batch_size=batch_size, trait_maps=False, **options), expected)
    assert_same_answers(ours(model_folder)(images[0], **options), stock(images[0], **options))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_trait_maps_are_those_of_the_answers(model_folder, images, batch_size):
    pipe = ours(model_folder)
    plain = pipe(images, top_k=3)
    answers = pipe(images, top_k=3, trait_maps=True, batch_size=batch_size)
    pixel_values = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = run_straightforwardly(pipe.model, pixel_values)
        state = pipe.model.last_layer_state(pixel_values)
        order = rank_heads_greedily(pipe.model, state, torch.arange(5).expand(3, -1)).order
    for i, (row, plain_row) in enumerate(zip(answers, plain, strict=True)):
        assert [(a["label"]) for a in row] == [a["label"] for a in plain_row]
        assert [a["score"] for a in row] == pytest.approx([a["score"] for a in plain_row], abs=1e-6)
        for answer in row:
            c = pipe.model.config.label2id[answer["label"]]
            assert answer["trait_maps"].shape == (4, 4, 4) and answer["trait_maps"].dtype == np.float32
            np.testing.assert_allclose(answer["trait_maps"], expected.trait_maps[i, c], atol=1e-6, rtol=1e-5)
            assert answer["head_order"] == order[i, c].tolist()


def test_trait_maps_can_be_a_setting_of_the_pipeline(model_folder, images):
    answers = ours(model_folder, trait_maps=True, top_k=1)(images[0])
    assert set(answers[0]) == {"label", "score", "trait_maps", "head_order"}
    assert set(ours(model_folder, trait_maps=True)(images[0], trait_maps=False)[0]) == {"label", "score"}


def test_all_classes_by_default_top_five(tmp_path, images):
    names = {index: f"class {index}" for index in range(9)}
    tiny_model(id2label=names).save_pretrained(tmp_path)
    build_image_processor(32).save_pretrained(tmp_path)
    answers = ours(tmp_path)(images[0], trait_maps=True)
    assert len(answers) == 5 and all(answer["trait_maps"].shape == (4, 4, 4) for answer in answers)


_ELSEWHERE = """
import json, sys
sys.modules["prompt_cam_hf"] = None  # not installed here
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
folder, image = sys.argv[1:]
pipe = pipeline("image-classification", model=folder, trust_remote_code=True)
assert "transformers_modules" in type(pipe).__module__ and "transformers_modules" in type(pipe.model).__module__
maps = pipe(image, trait_maps=True, top_k=2)
for answer in maps:
    answer["trait_maps"] = answer["trait_maps"].tolist()
model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
inputs = pipe.image_processor(Image.open(image), return_tensors="pt")
logits = model(**inputs).logits[0].tolist()
model.save_pretrained(folder + "-saved-elsewhere")
print(json.dumps({"maps": maps, "plain": pipe(image, top_k=2), "logits": logits}))
"""


def test_the_folder_works_where_only_transformers_is(model_folder, images, tmp_path):
    images[0].save(tmp_path / "bird.png")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(
        [sys.executable, "-c", _ELSEWHERE, str(model_folder), str(tmp_path / "bird.png")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    pipe = ours(model_folder)
    assert_same_answers(answer["plain"], pipe(images[0], top_k=2))
    for got, expected in zip(answer["maps"], pipe(images[0], trait_maps=True, top_k=2), strict=True):
        assert got["head_order"] == expected["head_order"]
        np.testing.assert_allclose(got["trait_maps"], expected["trait_maps"], atol=1e-7)
    assert answer["logits"] == pytest.approx(
        [
            a["score"]
            for a in sorted(
                pipe(images[0], function_to_apply="none"), key=lambda a: pipe.model.config.label2id[a["label"]]
            )
        ],
        abs=1e-6,
    )
    # What was saved there, from the copied code, is a full checkpoint again.
    saved = tmp_path / "model-saved-elsewhere"
    assert {path.name for path in saved.glob("*.py")} == {path.name for path in model_folder.glob("*.py")}
    again = ours(saved_with_processor(saved, model_folder))
    assert_stored(again.model, pipe.model)
    assert_same_answers(again(images[0], top_k=2), answer["plain"])


def saved_with_processor(folder, source):
    ViTImageProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


def test_with_the_package_no_permission_is_needed(model_folder, images):
    stock = pipeline("image-classification", model=str(model_folder))
    pixel_values = build_image_processor(IMAGE_SIZE)(images[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores, classes = tiny_model()(pixel_values).logits[0].softmax(-1).sort(descending=True)
    expected = zip(classes.tolist(), scores.tolist(), strict=True)
    assert_same_answers(stock(images[0]), [{"label": ID2LABEL[c], "score": score} for c, score in expected])
