# SPDX-License-Identifier: MIT
"""A tree of classes: read, trained level by level, and followed on an image."""

import json
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from conftest import random_images, tiny_model
from hub_server import connect, serve
from PIL import Image
from safetensors.torch import load_file
from small_runs import as_arguments, fixture_backbone, fixture_photos, fixture_recipe  # noqa: F401
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner
from workplace import TREE as BIRDS
from workplace import save_taxonomy

from prompt_cam_hf import PromptCAMForImageClassification, PromptCAMImageClassificationPipeline
from prompt_cam_hf.birds import BIRD_CLASSES
from prompt_cam_hf.birds.backbone import TAXONOMY
from prompt_cam_hf.cli.common import one_sentence_errors
from prompt_cam_hf.cli.taxonomy import taxonomy as command
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.data.splits import load_image_data
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.explanations.taxonomy_path import TaxonomyPath, explain_path, find_taxonomy
from prompt_cam_hf.hub.publish import publish
from prompt_cam_hf.modeling.backbone_prompt_cam import backbone_layers
from prompt_cam_hf.training.train_taxonomy import evaluate_paths, main, relabel, train_taxonomy

COLOURS = "colour,warmth,all\nred,warm,colours\nblue,cold,colours\ngreen,cold,colours\n"


@pytest.fixture
def write(tmp_path):
    def write(text, name="tree.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_tree_is_read_from_the_leaves_up(write, encoding):
    tree = read_taxonomy(write(BIRDS.replace(",Passer,", " ,  Passer ,"), encoding=encoding))
    assert tree.levels == ("species", "genus", "family") and tree.leaf_level == "species"
    assert tree.nodes("genus") == ["Corvus", "Cyanocitta", "Passer"]
    assert tree.nodes("family") == ["Corvidae", "Passeridae"]
    assert tree.node_of("Steller's Jay", "genus") == "Cyanocitta"
    assert tree.ancestor("genus", "Corvus", at="family") == "Corvidae"
    assert tree.ancestor("species", "House Sparrow", at="family") == "Passeridae"
    assert read_taxonomy(write(tree.to_csv())) == tree
    tree.check_classes(["House Sparrow", "Blue Jay", "Steller's Jay", "Common Raven"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Corvus,Corvidae", "Corvus", r"tree.csv, row 4 \(Common Raven\): the family is missing; the 3 levels"),
        ("Corvus,Corvidae", "Corvus, ", r"row 4 \(Common Raven\): the family is missing"),
        ("Common Raven,Corvus", "Common Raven,", r"row 4 \(Common Raven\): the genus is missing"),
        ("Common Raven", " ", r"row 4 \(\): the species is missing"),
        ("Corvus,Corvidae", "Corvus,Corvidae,birds", r"row 4 \(Common Raven\): there are 4 cells for the 3 levels"),
        ("Common Raven", "Blue Jay", "row 4: the species 'Blue Jay' has a row already"),
        (
            "Steller's Jay,Cyanocitta,Corvidae",
            "Steller's Jay,Cyanocitta,Picidae",
            "row 3: the genus 'Cyanocitta' belongs to the family 'Picidae' here, but to 'Corvidae' in row 2",
        ),
        ("species,genus,family", "species", "the first row names 1 level; there have to be two at least"),
        ("species,genus", "species,Species", "names the level 'species' twice"),
        ("species,genus", "species,a/b", "'a/b' in the first row cannot be the name of a level"),
        ("species,genus", "species,", "'' in the first row cannot be the name of a level"),
        (BIRDS, "", "tree.csv is empty; its first row names the levels"),
        (BIRDS, "species,genus\nBlue Jay,Cyanocitta\n", "names 1 classes; there have to be two"),
    ],
)
def test_faults_of_a_tree_are_named(write, old, new, message):
    assert BIRDS.count(old) == 1
    with pytest.raises(ValueError, match=message):
        read_taxonomy(write(BIRDS.replace(old, new)))


def test_files_that_are_no_tree_are_refused(write, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no taxonomy file"):
        read_taxonomy(tmp_path / "nowhere.csv")
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_taxonomy(write("species,genus\nBl\xe4umeise,Cyanistes\n", encoding="latin-1"))


def test_the_leaves_have_to_be_the_classes(write):
    tree = read_taxonomy(write(BIRDS))
    names = ["House Sparrow", "Blue Jay", "Steller's Jay", "Common Raven"]
    with pytest.raises(ValueError, match="no row for the class 'Common_Raven'; the nearest is 'Common Raven'"):
        tree.check_classes([*names[:3], "Common_Raven"])
    with pytest.raises(ValueError, match="no row for the class 'Quail' in its column 'species'"):
        tree.check_classes([*names, "Quail"])
    with pytest.raises(ValueError, match="The data has no class 'Blue Jay', which the taxonomy has a row for"):
        tree.check_classes(names[:1] + names[2:])


def test_the_tree_of_the_documentation_is_that_of_the_drawn_birds():
    tree = read_taxonomy(TAXONOMY)
    tree.check_classes(bird.name for bird in BIRD_CLASSES)
    assert [len(tree.nodes(level)) for level in tree.levels] == [18, 8, 4]


def test_relabelled_images_are_the_same_images(write, photos):
    data = load_image_data(photos)
    assert data.id2label == {0: "red", 1: "green", 2: "blue"}
    tree = read_taxonomy(write(COLOURS))
    assert relabel(data, tree, "colour") is data
    changed = relabel(data, tree, "warmth")
    assert changed.id2label == {0: "cold", 1: "warm"}
    for split in ("train", "validation", "test"):
        before, after = getattr(data, split), getattr(changed, split)
        assert after["image"] == before["image"]
        assert after["label"] == [{"red": 1, "green": 0, "blue": 0}[data.id2label[label]] for label in before["label"]]
        assert after.features["label"].names == ["cold", "warm"]


def weights(folder):
    return load_file(folder / "model.safetensors")


def paths_by_hand(folder, photos):
    """The counts over the test images, one image and one level at a time."""
    parents = {"red": "warm", "blue": "cold", "green": "cold"}
    right, consistent, total = 0, 0, 0
    processor = AutoImageProcessor.from_pretrained(folder)
    models = {
        level: PromptCAMForImageClassification.from_pretrained(folder / "levels" / level)
        for level in ("warmth", "colour")
    }
    for file in sorted((photos / "test").glob("*/*.png")):
        pixel_values = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        said = {
            level: model.config.id2label[model(pixel_values).logits.argmax().item()] for level, model in models.items()
        }
        truth = file.parent.name.partition(".")[2]
        right += said == {"colour": truth, "warmth": parents[truth]}
        consistent += parents[said["colour"]] == said["warmth"]
        total += 1
    return {"num_images": total, "all_levels_right": right / total, "consistent": consistent / total}


@pytest.mark.slow
def test_one_command_trains_all_levels(write, photos, recipe, tmp_path, capsys):
    plan = recipe(num_agnostic_prompts=0, cache_features=True, cache_views=1, cache_dir=str(tmp_path / "cache"))
    arguments = [*as_arguments(plan), "--taxonomy", str(write(COLOURS))]
    main(arguments)
    out = tmp_path / "out"
    assert {path.name for path in (out / "levels").iterdir()} == {"warmth", "colour"}  # one root tells nothing apart
    # All levels start from the same cached features: one file for training, one for validation.
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    printed = capsys.readouterr().out
    assert "warmth" in printed and f"Saved in {out}" in printed

    results = json.loads((out / "results.json").read_text())["levels"]
    assert list(results) == ["warmth", "colour"]
    for level, chance in (("warmth", 1 / 2), ("colour", 1 / 3)):
        assert results[level] == json.loads((out / "levels" / level / "results.json").read_text())
        assert results[level]["chance"]["top1"] == chance
        assert results[level]["test"]["top1"] > chance
        assert not any(name.startswith("backbone") for name in weights(out / "levels" / level))
    shares = paths_by_hand(out, photos)
    assert json.loads((out / "results.json").read_text())["paths"] == {"test": shares}
    assert f"Test: {shares['all_levels_right']:.1%} of the images are right at every level" in printed

    # Together they are what each is alone.
    model = AutoModelForImageClassification.from_pretrained(out)
    assert list(model.prompt_sets) == ["warmth", "colour"] and model.prompts_in_use == "colour"
    images = random_images(3)
    for level, output in model.forward_sets(images).items():
        alone = PromptCAMForImageClassification.from_pretrained(out / "levels" / level)
        torch.testing.assert_close(output.logits, alone(images).logits, atol=2e-6, rtol=1e-5)

    # The path is the prediction of each level's own model.
    image = photos / "test" / "001.red" / "0.png"
    path = explain_path(out, image)
    for level, explanation in path.explanations.items():
        pipe = pipeline(
            "image-classification",
            model=str(out / "levels" / level),
            pipeline_class=PromptCAMImageClassificationPipeline,
        )
        best = pipe(str(image), trait_maps=True, top_k=1)[0]
        assert path.nodes[level] == best["label"]
        traits = explanation.classes[0]
        assert traits.probability == pytest.approx(best["score"], abs=1e-6)
        np.testing.assert_allclose(traits.maps, best["trait_maps"], atol=1e-6)
        assert list(traits.head_order) == best["head_order"]


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_tree_goes_on_level_by_level(write, recipe, tmp_path, capsys):
    quick = {"num_train_epochs": 2, "warmup_epochs": 1}
    out = tmp_path / "out"
    tree = read_taxonomy(write(COLOURS))
    train_taxonomy(recipe(**quick), tree)
    with pytest.raises(FileExistsError, match="is not empty; choose another output_dir"):
        train_taxonomy(recipe(**quick), tree)
    before = {level: (out / "levels" / level / "model.safetensors").stat() for level in ("warmth", "colour")}
    whole = weights(out)

    # Stopped in the middle of the second level.
    for name in ("results.json", "model.safetensors"):
        (out / "levels" / "colour" / name).unlink()
        (out / name).unlink()
    go_on = recipe(**quick, resume_from_checkpoint=True)
    train_taxonomy(go_on, tree)
    assert (out / "levels" / "warmth" / "model.safetensors").stat() == before["warmth"]
    again = weights(out)
    assert again.keys() == whole.keys() and all(torch.equal(again[name], whole[name]) for name in whole)

    # A new level is added to what is there.
    wider = read_taxonomy(write("colour,letter,warmth\nred,r,warm\nblue,b,cold\ngreen,g,cold\n"))
    result = train_taxonomy(go_on, wider)
    assert list(result.model.prompt_sets) == ["warmth", "letter", "colour"]
    assert (out / "levels" / "warmth" / "model.safetensors").stat() == before["warmth"]
    assert read_taxonomy(out / "taxonomy.csv") == wider

    other = read_taxonomy(write(COLOURS.replace("green,cold", "green,warm")))
    with pytest.raises(ValueError, match="has 'green' in the warmth 'cold', the taxonomy says 'warm'"):
        train_taxonomy(go_on, other)
    with pytest.raises(ValueError, match=r"levels/.* has learning_rate 0\.1, the recipe says 0\.2"):
        train_taxonomy(recipe(**quick, learning_rate=0.2, resume_from_checkpoint=True), wider)
    capsys.readouterr()


def test_what_does_not_fit_is_refused_before_training(write, recipe, tmp_path, capsys):
    tree = read_taxonomy(write(COLOURS))
    for changes, message in [
        ({"method": "linear_probe"}, "A taxonomy is for method prompt_cam; the recipe says linear_probe"),
        ({"hub_model_id": "me/birds", "hub_license": "mit"}, "hub_model_id is for a single run"),
        ({"resume_from_checkpoint": "out/checkpoint-3"}, "each level has checkpoints of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            train_taxonomy(recipe(**changes), tree)
    with pytest.raises(ValueError, match="no row for the class 'green'"):
        train_taxonomy(recipe(), read_taxonomy(write("colour,warmth\nred,warm\nblue,cold\n")))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match="holds no taxonomy to go on with"):
        train_taxonomy(recipe(resume_from_checkpoint=True), tree)
    with pytest.raises(SystemExit, match=r"error: There is no tree; give one as --taxonomy TREE\.csv"):
        main(as_arguments(recipe()))
    with pytest.raises(SystemExit, match="error: There is no taxonomy file"):
        main([*as_arguments(recipe()), "--taxonomy=nowhere.csv"])
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert not stopped.value.code and "--taxonomy TREE.csv" in capsys.readouterr().out


@pytest.fixture
def birds(write, tmp_path):
    """A random model with the sets of `BIRDS`, saved with its tree."""
    folder = tmp_path / "birds"
    save_taxonomy(folder, read_taxonomy(write(BIRDS)))
    return folder


@pytest.fixture
def images(tmp_path):
    random = np.random.default_rng(5)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        colour = random.integers(0, 256, 3)
        pixels = (random.integers(0, 256, (40, 60, 3)) * 0.3 + colour * 0.7).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    return folder


def test_conflicts_with_the_tree_are_named(birds, images):
    parents = {"Blue Jay": "Cyanocitta", "Steller's Jay": "Cyanocitta", "Common Raven": "Corvus"}
    parents |= {"House Sparrow": "Passer", "Cyanocitta": "Corvidae", "Corvus": "Corvidae", "Passer": "Passeridae"}
    path = explain_path(birds, images / "00.png")
    assert list(path.nodes) == ["family", "genus", "species"]
    seen = []
    # As if each combination of nodes had been predicted.
    for scores in product(*(explanation.scores for explanation in path.explanations.values())):
        predicted = {
            level: replace(explanation, scores=(score,))
            for (level, explanation), score in zip(path.explanations.items(), scores, strict=True)
        }
        got = replace(path, explanations=predicted)
        family, genus, species = (score.label for score in scores)
        expected = {}
        if parents[genus] != family:
            expected["genus"] = f"belongs to the family {parents[genus]}"
        if parents[species] != genus:
            expected["species"] = f"belongs to the genus {parents[species]}"
        assert got.nodes == {"family": family, "genus": genus, "species": species}
        assert got.conflicts == expected and got.consistent == (not expected)
        assert ("no path of the tree" in str(got)) == bool(expected)
        assert all(f"{level}: {got.nodes[level]}" in str(got) for level in got.nodes)
        assert all(conflict in str(got) for conflict in expected.values())
        seen.append(got.consistent)
    # As many paths as leaves.
    assert len(seen) == 2 * 3 * 4 and sum(seen) == 4


def test_a_path_is_told_as_data_and_drawn(birds, images):
    path = explain_path(birds, images / "00.png", kind="evidence")
    assert isinstance(path, TaxonomyPath)
    told = json.loads(path.to_json())
    assert told["image"] == str(images / "00.png") and told["consistent"] == path.consistent
    assert told["kind"] == "evidence" and told["image_size"] == {"width": 60, "height": 40}
    assert [step["level"] for step in told["path"]] == ["family", "genus", "species"]
    for step, (level, explanation) in zip(told["path"], path.explanations.items(), strict=True):
        assert step["label"] == path.nodes[level] and step["conflict"] == path.conflicts.get(level)
        np.testing.assert_allclose(step["maps"], explanation.classes[0].maps)
        assert step["head_order"] == list(explanation.classes[0].head_order)
    rows = path.to_rows()
    assert [row["level"] for row in rows] == ["family"] * 4 + ["genus"] * 4 + ["species"] * 4
    assert {row["image"] for row in rows} == {str(images / "00.png")}

    figure = path.figure(heads=2)
    texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    for level, node in path.nodes.items():
        assert any(text.startswith(f"{level}: {node}") for text in texts)
    panels = [axis for axis in figure.axes if axis.images and axis.get_title()]
    assert len(panels) == 3 * (1 + 2)


def test_whole_paths_are_counted(birds, tmp_path):
    """Predictions that are right, wrong but a path of the tree, and no path at all: counted by hand."""
    tree = read_taxonomy(birds / "taxonomy.csv")
    names = dict(enumerate(sorted(tree.paths)))  # Blue Jay, Common Raven, House Sparrow, Steller's Jay
    jay, other_jay = (path[::-1] for name, path in tree.paths.items() if "Jay" in name)
    answers = [jay, other_jay, ("Corvidae", "Corvus", "House Sparrow"), jay, ("Passeridae", "Cyanocitta", "Blue Jay")]
    labels = [0, 0, 2, 0, 0]

    class Answers(torch.nn.Module):
        """Says what it is told to, in batches of two."""

        prompt_sets = ("family", "genus", "species")
        device = torch.device("cpu")

        def forward_sets(self, pixel_values, levels):
            outputs = {}
            for place, level in enumerate(levels):
                nodes = tree.nodes(level)
                numbers = [nodes.index(answers[int(index)][place]) for index in pixel_values]
                outputs[level] = SimpleNamespace(logits=torch.eye(len(nodes))[numbers])
            return outputs

        def only_prompts(self, level):
            return SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(tree.nodes(level)))))

    images = [{"pixel_values": torch.tensor(index), "labels": label} for index, label in enumerate(labels)]
    counted = evaluate_paths(Answers(), images, names, tree, batch_size=2)
    assert counted == {"num_images": 5, "all_levels_right": 2 / 5, "consistent": 3 / 5}


@pytest.mark.parametrize("agnostic", [0, 2])
def test_layers_that_levels_share_run_once(images, agnostic):
    levels = {"family": ["Corvidae", "Passeridae"], "genus": ["Cyanocitta", "Corvus", "Passer"]}
    model = tiny_model(
        id2label=dict(enumerate(levels["family"])),
        num_agnostic_prompts=agnostic,
        prompt_sets=[
            {"name": "family"},
            {"name": "genus", "id2label": dict(enumerate(levels["genus"])), "num_agnostic_prompts": agnostic},
        ],
        prompts_in_use="family",
    )
    parents = {"Cyanocitta": "Corvidae", "Corvus": "Corvidae", "Passer": "Passeridae"}
    tree = Taxonomy(("genus", "family"), {name: (name, parent) for name, parent in parents.items()})
    processor = build_image_processor(32)
    calls = [0] * 3
    for index, layer in enumerate(backbone_layers(model.backbone)):

        def count(*_, index=index):
            calls[index] += 1

        layer.mlp.register_forward_hook(count)
    path = explain_path(model, images / "00.png", tree, image_processor=processor)
    # Agnostic prompts are a level's own, and change every layer. The last layer's are class prompts, with the ranking.
    assert calls[:2] == ([1, 1] if agnostic == 0 else [2, 2])
    for level, explanation in path.explanations.items():
        with model.using_prompts(level):
            alone = explain(model, images / "00.png", image_processor=processor)
        assert [score.label for score in explanation.scores] == [score.label for score in alone.scores]
        assert explanation.prediction.logit == pytest.approx(alone.prediction.logit, abs=1e-5)
        np.testing.assert_allclose(explanation.classes[0].maps, alone.classes[0].maps, atol=1e-6)
        assert explanation.classes[0].head_order == alone.classes[0].head_order
        assert (explanation.box, explanation.source) == (alone.box, alone.source)
        assert explanation.image.size == (60, 40)


def test_a_published_tree_is_found_on_the_hub(birds, images, tmp_path):
    (birds / "levels" / "genus").mkdir(parents=True)
    (birds / "levels" / "genus" / "results.json").write_text("{}")
    (birds / "results.json").write_text(json.dumps({"levels": {"genus": {}}}))
    expected = explain_path(birds, images / "00.png")
    with serve() as hub, connect(hub, tmp_path / "home"):
        publication = publish(birds, "org/birds", license="mit")
        assert hub.files("org/birds")["taxonomy.csv"] == (birds / "taxonomy.csv").read_bytes()
        assert "taxonomy.csv" in publication.files
        assert not [name for name in hub.files("org/birds") if "/" in name or name == "results.json"]
        path = explain_path("org/birds", images / "00.png")
        assert path.nodes == expected.nodes and path.conflicts == expected.conflicts
        answer = run("org/birds", images / "00.png", "--out", tmp_path / "paths")
        assert answer.exit_code == 0 and "species: " in answer.stdout
        tiny_model().save_pretrained(tmp_path / "plain")
        build_image_processor(32).save_pretrained(tmp_path / "plain")
        publish(tmp_path / "plain", "org/plain", license="mit")
        with pytest.raises(FileNotFoundError, match=r"org/plain has no taxonomy\.csv; give the tree"):
            find_taxonomy("org/plain")
    with pytest.raises(OSError, match="org/elsewhere"):
        find_taxonomy("org/elsewhere")


def test_the_model_stays_as_it_was(birds, images):
    model = PromptCAMForImageClassification.from_pretrained(birds)
    explain_path(model, images / "00.png", birds / "taxonomy.csv", image_processor=build_image_processor(32))
    assert model.prompts_in_use == "species"


def test_models_and_trees_that_do_not_fit_are_refused(birds, images, model_folder, write):
    image = images / "00.png"
    with pytest.raises(FileNotFoundError, match=r"model has no taxonomy\.csv; give the tree"):
        explain_path(model_folder, image)
    with pytest.raises(ValueError, match="prompt sets 'default', and none of them is a level of the taxonomy: 'spec"):
        explain_path(model_folder, image, birds / "taxonomy.csv")
    with pytest.raises(ValueError, match="set 'genus' has a class 'Corvus', and the taxonomy has no such genus"):
        explain_path(birds, image, write(BIRDS.replace("Corvus,", "Raben,"), "other.csv"))


def run(*arguments):
    app = typer.Typer()
    app.command()(one_sentence_errors()(command))
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_figure_and_data(birds, images, tmp_path):
    out = tmp_path / "paths"
    (images / "broken.png").write_bytes(b"nothing")
    answer = run(birds, images / "00.png", images / "broken.png", "--out", out, "--heads", 2)
    assert answer.exit_code == 1 and "broken.png" in answer.stderr
    assert {path.name for path in out.iterdir()} == {f"00.path.{suffix}" for suffix in ("png", "json", "csv")}
    expected = explain_path(birds, images / "00.png")
    assert str(expected) in answer.stdout
    told = json.loads((out / "00.path.json").read_text())
    assert [step["label"] for step in told["path"]] == list(expected.nodes.values())
    assert Image.open(out / "00.path.png").width > 300
    assert run(birds, images / "00.png", "--out", out).exit_code == 2  # not written over


def test_mistakes_get_one_sentence(birds, images, model_folder, tmp_path):
    for arguments, message in [
        ((model_folder, images), "has no taxonomy.csv; give the tree"),
        ((birds, images, "--tree", tmp_path / "none.csv"), "There is no taxonomy file"),
        ((birds, images, "--heads", 9), "heads=9: the model has 4 heads"),
    ]:
        answer = run(*arguments, "--out", tmp_path / "out")
        assert answer.exit_code == 2 and message in " ".join(answer.stderr.split())
        assert not (tmp_path / "out").exists()
