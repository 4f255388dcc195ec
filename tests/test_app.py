# SPDX-License-Identifier: MIT
"""What the page computes and shows, without a browser: the functions' numbers, and each visitor's own."""

import base64
import io
import json
import os
import re
import shlex
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl
from urllib.request import urlopen

import gradio
import numpy as np
import pytest
import torch
from conftest import ID2LABEL, IMAGE_SIZE, NUM_CLASSES, assert_computed, tiny_model
from PIL import Image
from test_boundaries import imports
from typer.testing import CliRunner

from prompt_cam_hf import compare, explain, explain_path, remove_trait
from prompt_cam_hf.app import build_app, fragments, session
from prompt_cam_hf.app.calls import write_command, write_python
from prompt_cam_hf.app.examples import Examples
from prompt_cam_hf.app.session import AskedModel, Question, look, read_region, save_result, with_first_heads
from prompt_cam_hf.cli import app as command
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.aggregate import aggregate_maps
from prompt_cam_hf.explanations.figures import MapStyle, overlay
from prompt_cam_hf.explanations.results import Result
from prompt_cam_hf.html import embed_thumbnail
from prompt_cam_hf.loading import Classifier, load_pipeline

HEADS = 4


def noise(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3)).astype(np.uint8))


@pytest.fixture
def sharp_folder(model_folder):
    """Its attention is sharper than that of random weights, so that a head's region is a part of the image."""
    model = tiny_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "query" in name:
                parameter *= 30
    model.save_pretrained(model_folder)
    return model_folder


@pytest.fixture
def asked(sharp_folder):
    return AskedModel(sharp_folder, "cpu")


@pytest.fixture
def visit(asked):
    question = Question(asked.prompts_in_use, (2, 0))
    return asked.ask(noise(), "bird.png", question)


def test_the_answer_is_that_of_the_functions(asked, sharp_folder, visit):
    expected = explain(sharp_folder, noise(), ["class 2", "class 0"])
    assert visit.explanation.source == "bird.png"
    assert [traits.label for traits in visit.explanation.classes] == ["class 2", "class 0"]
    assert_computed([s.logit for s in visit.explanation.scores], [s.logit for s in expected.scores])
    for traits, other in zip(visit.explanation.classes, expected.classes, strict=True):
        assert_computed(torch.from_numpy(traits.maps), torch.from_numpy(other.maps))
        assert traits.head_order == other.head_order
    pixel_values = build_image_processor(IMAGE_SIZE)(noise(), return_tensors="pt")["pixel_values"]
    combined = aggregate_maps(load_pipeline(sharp_folder).model, pixel_values, torch.tensor([[2, 0]]))[0]
    assert_computed(torch.from_numpy(visit.combined), combined)
    evidence = asked.ask(noise(), "", replace(visit.question, classes=(), kind="evidence"))
    best = evidence.explanation.prediction
    assert evidence.explanation.classes[0].number == best.number
    assert_computed(torch.from_numpy(evidence.combined[0]), torch.from_numpy(evidence.traits.maps.sum(axis=0)))
    assert evidence.head == evidence.traits.head_order[0]


def test_a_second_class_and_a_removal_are_those_of_the_functions(asked, sharp_folder, visit):
    compared = asked.compare(look(visit, 1, 3), 4).comparison
    expected = compare(sharp_folder, noise(), ["class 0", "class 4"])
    assert [traits.label for traits in compared.classes] == ["class 0", "class 4"]
    assert_computed(torch.from_numpy(compared.overlap), torch.from_numpy(expected.overlap))
    for region in (visit.head, (8, 4, 24, 20)):
        removed = asked.remove(visit, region, "mean").removal
        expected = remove_trait(sharp_folder, noise(), region, "class 2", method="mean")
        assert (removed.mask == expected.mask).all() and (removed.control_mask == expected.control_mask).all()
        for mine, other in zip(removed.scores(), expected.scores(), strict=True):
            assert [score.label for score in mine] == [score.label for score in other]
            assert_computed([score.logit for score in mine], [score.logit for score in other])
        assert removed.after.source == "bird.png"


def test_the_first_heads_change_the_score_of_one_class(visit):
    for count in range(HEADS + 1):
        scores = with_first_heads(visit, count)
        logits = [0.0] * NUM_CLASSES
        for score in visit.explanation.scores:
            logits[score.number] = score.logit
        logits[2] = visit.traits.scores_with_first_heads[count]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert [score.rank for score in scores] == [1, 2, 3, 4, 5]
        assert [score.number for score in scores] == sorted(range(NUM_CLASSES), key=lambda number: -logits[number])
        assert_computed([score.probability for score in scores], [float(shares[score.number]) for score in scores])
    assert with_first_heads(visit, HEADS)[0].label == visit.explanation.prediction.label
    with pytest.raises(ValueError, match="first 5 heads were asked for; there are 4"):
        with_first_heads(visit, 5)


def test_what_is_painted_is_the_region():
    assert read_region((100, 50), [{"tool": "box", "points": [[0.5, 0.2], [0.25, 0.8]]}]) == (25, 10, 50, 40)
    # A box outside of the image or without area is a pixel of it.
    assert read_region((100, 50), [{"tool": "box", "points": [[2, 0.5], [3, 0.5]]}]) == (99, 25, 100, 26)
    stroke = {"tool": "brush", "width": 0.2, "points": [[0.2, 0.5], [0.6, 0.5]]}
    mask = read_region((100, 50), [stroke])
    rows, cols = np.mgrid[:50, :100] + 0.5
    distance = np.hypot(cols - np.clip(cols, 20, 60), rows - 25)
    assert mask[distance < 9].all() and not mask[distance > 11.5].any()
    both = read_region((100, 50), [stroke, {"tool": "box", "points": [[0.9, 0], [1, 0.2]]}])
    expected = mask.copy()
    expected[:10, 90:] = True
    assert (both == expected).all()
    with pytest.raises(ValueError, match="Nothing is painted"):
        read_region((100, 50), [])
    with pytest.raises(ValueError, match="too many lines"):
        read_region((100, 50), [{"tool": "brush", "width": 0.1, "points": [[0, 0]] * 100_001}])


def test_the_large_map_follows_opacity_and_threshold():
    image, trait_map = noise(1, (32, 32)), np.arange(16, dtype=np.float32).reshape(4, 4) / 30
    style = MapStyle(image, None, "attention", {}, False, "figure")
    drawn = overlay(image, trait_map, 0.5)
    assert (np.asarray(fragments.blend(style, trait_map, 0.5, 0, 0)) == np.asarray(image)).all()
    assert (np.asarray(fragments.blend(style, trait_map, 0.5, 1, 0)) == drawn).all()
    half = np.asarray(fragments.blend(style, trait_map, 0.5, 0.5, 0)).astype(float)
    assert np.abs(half - (np.asarray(image).astype(float) + drawn) / 2).max() <= 0.5
    cut = np.asarray(fragments.blend(style, trait_map, 0.5, 1, 0.6))
    changed = (cut != np.asarray(image)).any(axis=-1)
    # The first row of patches has at most a fifth of the threshold, the last at least four thirds of it.
    assert not changed[:8].any() and changed[-6:].mean() > 0.9


def test_the_removed_region_is_outlined(asked, visit):
    box = (12, 8, 36, 32)
    removal = asked.remove(visit, box, "mean").removal
    html = fragments.show_removal(removal)
    assert removal.verdict in html
    images = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in re.findall(r"base64,([^\"]+)", html)]
    assert len(images) == 3 * (1 + 3)
    for image, mask in zip(images[::4], (removal.mask, removal.mask, removal.control_mask), strict=True):
        far = np.abs(np.asarray(image.convert("RGB")).astype(int) - (127, 255, 212)).max(axis=-1)
        rows, cols = np.nonzero(mask)
        edge = np.zeros_like(mask)
        edge[rows.min(), cols.min() : cols.max() + 1] = edge[rows.max(), cols.min() : cols.max() + 1] = True
        assert np.median(far[edge]) < 60 < np.median(far[~mask])


def test_links_restore_the_question(asked):
    question = Question(asked.prompts_in_use, (3, 1), "evidence", "shapley")
    assert asked.read_query(dict(parse_qsl(asked.write_query(question)))) == question
    assert asked.read_query({}) == Question(asked.prompts_in_use)
    strange = {"class1": "no such bird", "class2": "class 1", "kind": "x", "method": "y", "prompts": "z", "w": "v"}
    assert asked.read_query(strange) == Question(asked.prompts_in_use, (1,))


@pytest.mark.parametrize("kind", ["attention", "evidence"])
def test_the_calls_make_the_same(asked, visit, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise().save("bird.png")
    visit = asked.ask(noise(), "bird.png", replace(visit.question, kind=kind, method="exact"))
    visit = asked.compare(visit, 1)
    stroke = {"tool": "brush", "width": 0.3, "points": [[0.3, 0.5], [0.5, 0.5]]}
    for region in (read_region((48, 40), [stroke]), (4, 4, 20, 20), visit.head):
        visit = asked.remove(visit, region, "blur")
        save_result(visit, "removal", "region", tmp_path)
        for what, result in visit.results.items():
            made: dict = {}
            exec(write_python(asked, visit, what), made)
            assert made["result"].to_dict().keys() == result.to_dict().keys()
            assert_computed(_numbers(made["result"].to_dict()), _numbers(result.to_dict()))
        words = shlex.split(write_command(asked, visit, "removal"))
        assert bool(words) == (not isinstance(region, np.ndarray))
        if words:
            _check_command(words, tmp_path / "results" / "bird.removal.json", visit.removal)
    for what, ending in (("explanation", "traits"), ("comparison", "comparison")):
        words = shlex.split(write_command(asked, visit, what))
        _check_command(words, tmp_path / "results" / f"bird.{ending}.json", visit.results[what])


def _check_command(words: list[str], file: Path, result: Result) -> None:
    run = CliRunner().invoke(command, [*words[1:], "--overwrite"])
    assert words[0] == "prompt-cam" and run.exit_code == 0, run.stderr
    assert_computed(_numbers(json.loads(file.read_text())), _numbers(result.to_dict()))


def _numbers(told) -> list[float]:
    if isinstance(told, dict):
        return [number for key in sorted(told) for number in _numbers(told[key])]
    if isinstance(told, list | tuple):
        return [number for each in told for number in _numbers(each)]
    return [float(told)] if isinstance(told, int | float) else []


@pytest.mark.parametrize("ending", ["png", "pdf", "svg", "json", "csv"])
def test_results_are_taken_along(visit, ending, tmp_path):
    path = save_result(visit, "explanation", ending, tmp_path)
    assert path.name == f"bird.explanation.{ending}" and path.stat().st_size > 100
    with pytest.raises(ValueError, match="There is no removal yet"):
        save_result(visit, "removal", ending, tmp_path)
    with pytest.raises(ValueError, match=r"ending '\.exe'"):
        save_result(visit, "explanation", "exe", tmp_path)


def test_names_of_uploads_do_not_lead_out_of_the_folder(visit, tmp_path):
    odd = replace(visit, name="../../<b>x</b>.png")
    assert save_result(odd, "explanation", "csv", tmp_path).parent == tmp_path


def test_visitors_at_once_get_their_own_answers(asked):
    questions = [
        (noise(seed), Question(asked.prompts_in_use, (seed % NUM_CLASSES,), "evidence" if seed % 2 else "attention"))
        for seed in range(12)
    ]
    alone = [asked.ask(image, str(seed), question) for seed, (image, question) in enumerate(questions)]
    with ThreadPoolExecutor(4) as pool:
        together = list(
            pool.map(asked.ask, *zip(*((i, str(n), q) for n, (i, q) in enumerate(questions)), strict=True))
        )
    for one, other in zip(alone, together, strict=True):
        assert one.name == other.name and one.explanation.classes[0].label == other.explanation.classes[0].label
        assert_computed([s.logit for s in other.explanation.scores], [s.logit for s in one.explanation.scores])
        assert_computed(torch.from_numpy(other.traits.maps), torch.from_numpy(one.traits.maps))


def test_prompt_sets_and_the_tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise().save("bird.png")
    model = tiny_model(num_agnostic_prompts=0)
    species = model.prompts_in_use
    model.add_prompts("genus", id2label={0: "Cyanocitta", 1: "Corvus"}, num_agnostic_prompts=0)
    model.save_pretrained("model")
    build_image_processor(IMAGE_SIZE).save_pretrained("model")
    asked = AskedModel("model", "cpu")
    assert asked.prompt_sets == [species, "genus"]
    visit = asked.ask(noise(), "bird.png", Question("genus"))
    expected = explain(Classifier(model.only_prompts("genus"), build_image_processor(IMAGE_SIZE)), "bird.png")
    assert_computed([s.logit for s in visit.explanation.scores], [s.logit for s in expected.scores])
    assert visit.path is None and write_command(asked, visit, "explanation") == ""
    assert asked.read_query(dict(parse_qsl(asked.write_query(visit.question)))) == Question("genus")
    made: dict = {}
    exec(write_python(asked, visit, "explanation"), made)
    assert_computed([s.logit for s in made["result"].scores], [s.logit for s in expected.scores])
    rows = [f"{name},{'Corvus' if number else 'Cyanocitta'}\n" for number, name in ID2LABEL.items()]
    (tmp_path / "model" / "taxonomy.csv").write_text(f"{species},genus\n" + "".join(rows))
    asked = AskedModel("model", "cpu")
    visit = asked.ask(noise(), "bird.png", Question(species))
    assert visit.path.nodes == explain_path("model", "bird.png").nodes
    shown = fragments.show_answer(visit)
    assert all(f"<li>{level}: <b>{node}</b>" in shown for level, node in visit.path.nodes.items())
    exec(write_python(asked, visit, "path"), made)
    assert made["result"].nodes == visit.path.nodes
    assert write_command(asked, visit, "path") == "prompt-cam taxonomy model bird.png --out results"
    with pytest.raises(ValueError, match="There is no prompt set 'family'; there are"):
        asked.ask(noise(), "", Question("family"))


def test_what_the_page_does_not_have_is_refused(asked, visit):
    with pytest.raises(ValueError, match="There is no class 2 on the page; it shows 2"):
        look(visit, 2, 0)
    with pytest.raises(ValueError, match="There is no head 4; the model has 4"):
        look(visit, 0, 4)
    with pytest.raises(ValueError, match="There is no class number 9"):
        asked.ask(noise(), "", Question(asked.prompts_in_use, (9,)))


def test_images_of_too_many_pixels_are_refused(asked, monkeypatch):
    monkeypatch.setattr(session, "MAX_PIXELS", 48 * 40 - 1)
    with pytest.raises(ValueError, match="has 1,920 pixels, and this page takes up to 1,919; make it smaller"):
        asked.open(noise())


def test_text_of_models_and_visitors_is_escaped(asked, visit):
    nasty = '<img src=x onerror=alert(1)>"\u202e'
    traits = tuple(replace(traits, label=nasty) for traits in visit.explanation.classes)
    scores = tuple(replace(score, label=nasty) for score in visit.explanation.scores)
    visit = replace(visit, explanation=replace(visit.explanation, classes=traits, scores=scores))
    shown = [
        fragments.show_model(nasty, 3, 4),
        fragments.show_answer(visit),
        fragments.show_heads(visit),
        fragments.show_large(visit),
        fragments.show_kept(visit, 2),
        fragments.show_refusal(nasty),
        fragments.show_examples([(0, nasty, embed_thumbnail(noise(), 16, 1000))]),
    ]
    for html in shown:
        assert "&lt;img src=x onerror=alert(1)&gt;" in html
        assert "<img src=x" not in html and 'alt="<' not in html and "\u202e" not in html


def test_examples_are_listed_by_class(tmp_path):
    for name in ("jay/1.png", "jay/2.png", "crow/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        noise().save(tmp_path / name)
    (tmp_path / "crow" / "broken.png").write_bytes(b"no image")
    examples = Examples(tmp_path)
    assert examples.classes == ["crow", "jay"]
    assert [name for _, name, _ in examples.shown("jay")] == ["1", "2"]
    assert [name for _, name, _ in examples.shown("crow")] == ["3"]
    assert [name for _, name, _ in examples.shown()] == ["3", "1"]
    number, _, _ = examples.shown("crow")[0]
    assert examples.files[number] == tmp_path / "crow" / "3.png"
    assert Examples(tmp_path / "jay").classes == [] and len(Examples(tmp_path / "jay").shown()) == 2
    assert Examples().shown() == []
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        Examples(tmp_path / "nowhere")


def test_without_gradio_one_sentence_says_what_to_install(model_folder, monkeypatch):
    monkeypatch.setattr("prompt_cam_hf.app.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "prompt_cam_hf\[app\]"'):
        build_app(model_folder)
    result = CliRunner().invoke(command, ["app", str(model_folder)])
    assert result.exit_code == 2
    assert result.stderr.strip() == (
        'Error: The app needs Gradio, which is not installed: pip install "prompt_cam_hf[app]".'
    )


def test_the_command_serves_the_page_and_tidies_up(sharp_folder, tmp_path, monkeypatch):
    noise().save(tmp_path / "bird.png")
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    handler, seen = signal.getsignal(signal.SIGTERM), []

    def stop(page):
        with urlopen(page.local_url) as answer:
            seen.extend((answer.status, os.environ["GRADIO_TEMP_DIR"]))
        assert Path(seen[1]).is_dir()
        page.close()

    monkeypatch.setattr(gradio.Blocks, "block_thread", stop)
    arguments = ["app", str(sharp_folder), "--examples", str(tmp_path / "bird.png"), "--port", "0"]
    result = CliRunner().invoke(command, arguments)
    signal.signal(signal.SIGTERM, handler)
    assert result.exit_code == 0 and re.search(r"The page is at http://127.0.0.1:\d+/; Ctrl-C stops it", result.stderr)
    assert seen[0] == 200 and not Path(seen[1]).exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--examples", "nowhere"], "Error: There is no file or folder nowhere."),
        (["--port", "{taken}"], "Error: The page cannot be served at 127.0.0.1, port {taken}; if the port is taken"),
    ],
)
def test_mistakes_get_one_sentence(sharp_folder, monkeypatch, arguments, words):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        told = [argument.format(taken=taken) for argument in arguments]
        result = CliRunner().invoke(command, ["app", str(sharp_folder), *told])
    assert result.exit_code == 2 and words.format(taken=taken) in result.stderr


def test_only_the_layout_knows_gradio():
    files = (Path(session.__file__).parent).glob("*.py")
    knowing = {path.name for path in files if any(name == "gradio" for _, name in imports(path))}
    assert knowing == {"__init__.py", "page.py"}  # the first for type checking only
