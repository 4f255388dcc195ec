# SPDX-License-Identifier: MIT
"""The paper by one command: each experiment end to end, on coloured squares; all of them on drawn birds (slow)."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from small_runs import fixture_backbone, fixture_photos  # noqa: F401
from transformers import ViTModel, pipeline
from typer.testing import CliRunner

from prompt_cam_hf import explain, reproduce
from prompt_cam_hf.birds import birds_dataset
from prompt_cam_hf.cli import app
from prompt_cam_hf.training import reproduce as door
from prompt_cam_hf.training.reproduce import EXPERIMENTS, workshop
from prompt_cam_hf.training.reproduce.maps import draw_blurring
from prompt_cam_hf.training.reproduce.published import LINEAR_PROBE_ACCURACY, PROMPT_CAM_ACCURACY, accuracy_text

NUM_TEST = 15


@pytest.fixture(scope="module")
def experiment(photos, backbone, tmp_path_factory):
    """Run an experiment on the squares; all share their models."""
    out = tmp_path_factory.mktemp("reproduction") / "out"
    tree = out.parent / "tree.csv"
    tree.write_text("colour,kind\nred,warm\ngreen,cold\nblue,cold\n")
    settings = {
        "backbone": str(backbone), "image_size": 32, "learning_rate": 0.1, "train_batch_size": 8, "warmup_epochs": 1,
        "num_train_epochs": 6, "dataloader_num_workers": 0,
    }  # fmt: skip
    run = partial(reproduce, data=photos, out=out, recipe="dino_cub", **settings)
    return lambda name, **options: run(name, **({"taxonomy": tree} if name == "taxonomy" else {}), **options)


def rows_of(done):
    return [dict(zip(done.finding.columns, row, strict=True)) for row in done.finding.rows]


def share(text):
    return float(text.split(" ±")[0].rstrip("% ")) / 100


def test_accuracy_is_that_of_the_models(experiment, photos):
    done = experiment("table2")
    rows = rows_of(done)
    assert [row["method"] for row in rows] == ["prompt_cam", "linear_probe"]
    assert [row["published"] for row in rows] == ["73.2 %", "78.6 %"]
    for row in rows:
        files = sorted((photos / "test").rglob("*.png"))
        pipe = pipeline("image-classification", model=str(done.folder.parent / "models" / row["method"]))
        answers = pipe([str(file) for file in files], top_k=1)
        right = np.mean([a[0]["label"] == f.parent.name[4:] for a, f in zip(answers, files, strict=True)])
        assert share(row["ours ± standard error"]) == pytest.approx(right, abs=6e-4)
        assert len(files) == NUM_TEST
    assert {path.name for path in done.folder.iterdir()} == {"table.md", "result.json"}
    saved = json.loads((done.folder / "result.json").read_text())
    assert saved["rows"] == rows and "recipe dino_cub, 6 epochs" in saved["notes"][0]
    assert "| prompt_cam | 73.2 % | " in (done.folder / "table.md").read_text()


def test_faithfulness_is_that_of_the_report(experiment):
    done = experiment("table1", limit=4)
    report = json.loads((done.folder / "report" / "evaluation.json").read_text())
    found = {(one["model"], one["map"], one["metric"]): one["value"] for one in report["all"]}
    rows = rows_of(done)
    assert {row["model: map"] for row in rows} == {f"{model}: {name}" for model, name, _ in found if name}
    for row in rows:
        for metric in ("insertion", "deletion"):
            value = found[(*row["model: map"].split(": "), metric)]
            assert float(row[metric].split()[0]) == pytest.approx(value, abs=6e-4)
    published = {row["model: map"]: row["deletion, published"] for row in rows}
    assert published["linear_probe: grad_cam"] == "0.17" and published["linear_probe: hires_cam"] == "-"
    assert published[rows[0]["model: map"]] == "0.09"


def test_each_layer_is_a_variant(experiment):
    done = experiment("variants")
    assert [row["variant"] for row in rows_of(done)] == ["Shallow", "between", "Deep"]
    layers = [
        json.loads((done.folder.parent / "models" / name / "config.json").read_text())["class_prompt_layer"]
        for name in ("layer_0", "layer_1", "prompt_cam")
    ]
    assert layers == [0, 1, -1] and [path.name for path in done.figures] == ["variants.png"]


def test_heads_are_blurred_until_the_class_is_lost(experiment, photos):
    done = experiment("heads")
    model = done.folder.parent / "models" / "prompt_cam"
    explained = explain(str(model), photos / "test")
    correct = [one for one in explained if f".{one.prediction.label}/" in one.source]
    needed = np.array([one.classes[0].sufficient for one in correct])
    rows = rows_of(done)
    assert [float(row["of the images"].rstrip("%")) for row in rows] == pytest.approx(
        [100 * (needed == count).mean() for count in range(needed.max() + 1)], abs=0.06
    )
    assert rows[-1]["so many or fewer"] == "100.0%" and 1 <= len(done.figures) <= 3
    # What the figure says of each step is what becomes of the class's probability.
    one = max(correct, key=lambda one: one.classes[0].sufficient)
    traits, figure = one.classes[0], draw_blurring(one)
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    others = torch.tensor([score.logit for score in one.scores if score.number != traits.number])
    for step in range(1, 5 - traits.sufficient + 1):
        score = torch.tensor([traits.scores_with_first_heads[4 - step]])
        verdict = "still on top" if score > others.max() else "class lost"
        probability = torch.cat((score, others)).softmax(0)[0]
        (title,) = (" ".join(title.split()) for title in titles if f"step {step}:" in " ".join(title.split()))
        assert f"{probability:.0%}, {verdict}" in title
        assert (verdict == "still on top") == (step <= 4 - traits.sufficient)


def test_another_classs_maps(experiment):
    done = experiment("own-and-other", images=2)
    *rows, mean = rows_of(done)
    assert len(rows) == len(done.figures) == 2 and "mean of" in mean["own class"]
    assert all(row["own class"] != row["runner-up"] for row in rows)


def test_disagreements_are_counted(experiment, photos):
    done = experiment("disagreements")
    right = {}
    files = sorted((photos / "test").rglob("*.png"))
    for name in ("prompt_cam", "linear_probe"):
        pipe = pipeline("image-classification", model=str(done.folder.parent / "models" / name))
        answers = pipe([str(file) for file in files], top_k=1)
        right[name] = np.array([a[0]["label"] == f.parent.name[4:] for a, f in zip(answers, files, strict=True)])
    own, probe = right["prompt_cam"], right["linear_probe"]
    expected = [own & probe, probe & ~own, own & ~probe, ~own & ~probe]
    assert [int(row["number"]) for row in rows_of(done)] == [int(found.sum()) for found in expected]
    assert bool(done.figures) == bool((probe & ~own).any())


def test_regions_are_removed(experiment):
    done = experiment("manipulation", limit=5)
    assert next(row["removed"] for row in rows_of(done)) == "where the first head looks"
    assert done.figures


def test_backbones_are_those_that_are_named(experiment, backbone, tmp_path):
    other = tmp_path / "other_backbone"
    torch.manual_seed(5)
    config = ViTModel.from_pretrained(backbone).config
    ViTModel(config, add_pooling_layer=False).save_pretrained(other)
    done = experiment("backbones", backbones=[str(backbone), str(other)])
    assert [row["published"] for row in rows_of(done)] == ["73.2 %", "-"]
    assert rows_of(done)[1]["backbone"] == "other_backbone" and done.figures[0].name == "backbones.png"


@pytest.mark.slow
@pytest.mark.long
def test_paths_by_level_and_by_node(experiment, photos):
    done = experiment("taxonomy", nodes=True)
    level, node = rows_of(done)
    assert (level["sets"], node["sets"]) == ("2", "2") and node["a path of the tree"] == "100.0%"
    assert node["class right"] == node["whole path right"]
    # Walked by hand: first warm or cold, then, of what was read as cold, green or blue.
    models = done.folder.parent / "models"
    files = sorted((photos / "test").rglob("*.png"))
    by_kind, by_colour = (
        [
            a[0]["label"]
            for a in pipeline("image-classification", model=str(models / name))(list(map(str, files)), top_k=1)
        ]
        for name in ("node_0", "node_1")
    )
    walked = ["red" if kind == "warm" else colour for kind, colour in zip(by_kind, by_colour, strict=True)]
    right = np.mean([name == file.parent.name[4:] for name, file in zip(walked, files, strict=True)])
    assert share(node["class right"]) == pytest.approx(right, abs=6e-4)


def test_what_is_trained_is_used_again_and_a_kill_goes_on(experiment, monkeypatch):
    folder = experiment("table2").folder.parent / "models"
    before = (folder / "prompt_cam" / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(workshop, "train", lambda *_: pytest.fail("it was trained again"))
        experiment("table2")
    assert (folder / "prompt_cam" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="has num_train_epochs 6, the recipe says 7"):
        experiment("table2", **{"num_train_epochs": 7})


def test_a_run_that_was_stopped_goes_on(photos, backbone, tmp_path, monkeypatch):
    run = partial(
        reproduce, "table2", photos, tmp_path / "out", recipe="dino_cub", rivals=(), backbone=str(backbone),
        image_size=32, num_train_epochs=3, warmup_epochs=0, train_batch_size=8, dataloader_num_workers=0,
    )  # fmt: skip
    saved = []

    def stop(self, *arguments):
        saved.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prompt_cam_hf.training.train.Run._save", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    folder = tmp_path / "out" / "models" / "prompt_cam"
    assert saved and not (folder / "results.json").exists() and list(folder.glob("checkpoint-*"))
    steps = max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))
    run()
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == steps and (folder / "results.json").is_file()


def test_published_numbers():
    assert accuracy_text("dinov2_pet", "prompt_cam") == "92.7 %" and accuracy_text("dinov2_pet", "linear_probe") == "-"
    assert len(PROMPT_CAM_ACCURACY) == 8 and len(LINEAR_PROBE_ACCURACY) == 4


def test_mistakes_get_one_sentence(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    photos = ("--data", photos)
    for arguments, sentence in (
        (("table3",), "There is no experiment 'table3'; choose one of table1, table2"),
        (("table2", *photos), "has 3 classes and is none of the data sets with a published recipe"),
        (("table2", *photos, "--recipe", "dino_cubs"), "the nearest name is 'dino_cub'"),
        (
            ("table2", *photos, "--recipe", "own_photos", "--hub_model_id", "a/b", "--hub_license", "mit"),
            "a single run",
        ),
        (("table2", "--data", photos[1] / "train", "--recipe", "own_photos"), "has no test split"),
        (("table2", "--learning_rat", 3), "the nearest one is 'learning_rate'"),
        (("table2", "--out", tmp_path / "full"), "holds something else than experiments"),
        (("taxonomy", *photos, "--recipe", "dino_cub"), "A tree is needed for these data"),
        (("table2", *photos, "--recipe", "dino_cub", "--rival", "oracle"), "method must be prompt_cam or"),
    ):
        out = () if "--out" in arguments else ("--out", tmp_path / "out")
        more = ("--backbone", "nowhere") if "--recipe" not in arguments else ()
        answer = CliRunner().invoke(app, ["reproduce", *map(str, (*arguments, *out, *more))])
        told = " ".join(answer.stderr.split())
        assert answer.exit_code == 2 and sentence in told and told.count("Error: ") == 1, answer.output


@pytest.mark.slow
@pytest.mark.long
def test_every_experiment_on_drawn_birds(tmp_path, monkeypatch):
    monkeypatch.setattr(workshop, "birds_dataset", partial(birds_dataset, cache_dir=tmp_path / "drawn", num_proc=1))
    common = ["--birds-per-class", "6", "1", "2", "--images", "1"]
    common += ["--warmup_epochs", "1", "--cache_views", "1", "--train_batch_size", "16", "--eval_every_epochs", "4"]
    for name in EXPERIMENTS:
        # The earlier class prompts enter, the less is cached.
        epochs, out = ("2", tmp_path / "few") if name == "variants" else ("8", tmp_path / "out")
        keys = ["--num_train_epochs", epochs, "--cache_dir", str(tmp_path / "cache"), "--out", str(out)]
        keys += ["--limit", "2" if name == "table1" else "9"]
        answer = CliRunner().invoke(app, ["reproduce", name, *common, *keys], catch_exceptions=False)
        assert answer.exit_code == 0, answer.output
        assert str(out / name / "table.md") in answer.stdout
        told = (out / name / "table.md").read_text()
        assert "drawn birds on the package's tiny backbone" in told
    with pytest.raises(ValueError, match="choose another --out"):
        door.reproduce("table2", out=tmp_path / "out", birds_per_class=(5, 1, 2))
