# SPDX-License-Identifier: MIT
"""Publishing to a Hub over HTTP: one commit with everything in it, or a clear sentence and no commit."""

import json
import logging
import shutil
import traceback
from pathlib import Path

import pytest
import torch
from conftest import ID2LABEL, assert_computed, assert_stored, random_images, tiny_backbone_config, tiny_model
from hub_server import READER, TOKENS, WRITER, HubServer, connect, metadata, metadata_errors, serve
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import Trainer, TrainingArguments, ViTModel
from typer.testing import CliRunner

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.cli import app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.publish import make_gallery, publish
from prompt_cam_hf.hub.upload import save_repository

CODE = {path.name for path in (Path(__file__).parents[1] / "modeling").glob("*_prompt_cam.py")}
FILES = CODE | {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
REPO = "org/birds"


@pytest.fixture
def hub(tmp_path):
    with serve() as hub, connect(hub, tmp_path / "home"):
        yield hub


@pytest.fixture
def backbone_on_hub(hub, tmp_path):
    return put_backbone(hub, tmp_path, seed=7)


def put_backbone(hub: HubServer, tmp_path: Path, seed: int) -> str:
    torch.manual_seed(seed)
    folder = tmp_path / f"backbone-{seed}"
    ViTModel(tiny_backbone_config(), add_pooling_layer=False).save_pretrained(folder)
    hub.add("museum/backbone", {path.name: path.read_bytes() for path in folder.iterdir()})
    return "museum/backbone"


def logits(model: PromptCAMForImageClassification) -> torch.Tensor:
    with torch.no_grad():
        return model(random_images()).logits


def test_one_commit_has_everything(hub, model_folder, tmp_path):
    before = {path: path.read_bytes() for path in model_folder.iterdir()}
    publication = publish(model_folder, REPO, license="mit")
    (commit,) = hub.commits(REPO)
    assert commit.changed == FILES == publication.files.keys()
    assert publication.commit_url == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert {name: len(content) for name, content in commit.files.items() if name in FILES} == publication.files
    config = json.loads(commit.files["config.json"])
    assert config["auto_map"]["AutoModelForImageClassification"].startswith("modeling_prompt_cam.")
    assert config["custom_pipelines"]["image-classification"]["impl"].startswith("pipeline_prompt_cam.")
    assert load(commit.files["model.safetensors"]).keys() == load_file(model_folder / "model.safetensors").keys()
    assert metadata(commit.files["README.md"].decode())["license"] == "mit"
    assert not hub.repositories[REPO].private
    assert {path: path.read_bytes() for path in model_folder.iterdir()} == before


def test_nothing_of_this_machine_is_published(hub, tmp_path):
    ViTModel(tiny_backbone_config(), add_pooling_layer=False).save_pretrained(tmp_path / "secret-place" / "vit")
    model = PromptCAMForImageClassification.from_backbone(tmp_path / "secret-place" / "vit", id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "recipe.yaml").write_text(f"data: {tmp_path}\nlearning_rate: 0.25\nbackbone: {tmp_path}\n")
    publish(tmp_path / "model", REPO, license="mit")
    files = hub.files(REPO)
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    assert b"learning_rate: 0.25" in files["README.md"]
    assert json.loads(files["config.json"])["backbone_fingerprint"] == model.config.backbone_fingerprint


def test_a_dry_run_shows_what_would_be_uploaded(hub, model_folder, tmp_path):
    planned = publish(model_folder, REPO, license="mit", dry_run=True, out=tmp_path / "out", token=False)
    assert not hub.requests and planned.commit_url is None
    published = publish(model_folder, REPO, license="mit")
    assert planned.files == published.files
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == hub.files(REPO)[name]
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "out")
    assert_stored(loaded, tiny_model())
    assert_computed(logits(loaded), logits(tiny_model()))
    with pytest.raises(FileExistsError, match="out exists already"):
        publish(model_folder, REPO, license="mit", dry_run=True, out=tmp_path / "out")


def test_private(hub, model_folder):
    publish(model_folder, REPO, license="mit", private=True)
    assert hub.repositories[REPO].private
    publish(model_folder, REPO, license="apache-2.0", private=True)
    assert len(hub.commits(REPO)) == 2
    publish(model_folder, "org/shown", license="mit")
    with pytest.raises(ValueError, match="org/shown is there already and is public"):
        publish(model_folder, "org/shown", license="apache-2.0", private=True)
    assert len(hub.commits("org/shown")) == 1


def test_another_branch(hub, model_folder):
    publish(model_folder, REPO, license="mit", revision="tried")
    assert not hub.commits(REPO) and len(hub.commits(REPO, "tried")) == 1
    publish(model_folder, REPO, license="apache-2.0", revision="tried", commit_message="Again")
    assert [commit.title for commit in hub.commits(REPO, "tried")] == ["Upload Prompt-CAM", "Again"]


# --- Prompts only ---


def test_prompts_only_fetches_its_backbone_from_another_repository(hub, backbone_on_hub, tmp_path):
    model = PromptCAMForImageClassification.from_backbone(backbone_on_hub, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    assert publish(tmp_path / "model", REPO, license="mit", prompts_only=True).prompts_only
    published = load(hub.files(REPO)["model.safetensors"])
    assert not [name for name in published if name.startswith("backbone.")]
    assert metadata(hub.files(REPO)["README.md"].decode())["base_model"] == backbone_on_hub
    assert b"fetched from `museum/backbone`" in hub.files(REPO)["README.md"]
    loaded = PromptCAMForImageClassification.from_pretrained(REPO)
    assert_stored(loaded, model)
    assert_computed(logits(loaded), logits(model))

    # A folder without backbone is published so without being told.
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    build_image_processor(32).save_pretrained(tmp_path / "prompts")
    publish(tmp_path / "prompts", "org/again", license="mit")
    assert load(hub.files("org/again")["model.safetensors"]).keys() == published.keys()

    # Another model moves in under the backbone's name.
    put_backbone(hub, tmp_path, seed=8)
    with pytest.raises(ValueError, match=r"prompts for a backbone with fingerprint \w{12}, but museum/backbone has"):
        PromptCAMForImageClassification.from_pretrained(REPO)
    with pytest.raises(ValueError, match="prompts for a backbone with fingerprint"):
        publish(tmp_path / "model", "org/late", license="mit", prompts_only=True)
    assert "org/late" not in hub.repositories


def test_prompts_whose_backbone_nobody_could_fetch_are_refused(hub, tmp_path):
    ViTModel(tiny_backbone_config(), add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = PromptCAMForImageClassification.from_backbone(tmp_path / "vit", id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="Prompts alone are of use only with a backbone that others can fetch"):
        publish(tmp_path / "model", REPO, license="mit", prompts_only=True)
    assert not hub.requests


# --- What goes wrong on the way ---


@pytest.mark.parametrize(
    ("request_", "status", "kind", "message"),
    [
        ("PUT /lfs-storage", 500, OSError, r"The upload to org/birds broke off, for the Hub failed \(status 500\)"),
        ("PUT /lfs-storage", 403, PermissionError, "may not write to org/birds"),
        ("POST /lfs-verify", 503, OSError, r"broke off, for the Hub failed \(status 503\)"),
        ("objects/batch", 500, OSError, r"broke off, for the Hub failed \(status 500\)"),
        ("preupload", 504, OSError, r"broke off, for the Hub failed \(status 504\)"),
        ("POST .*/commit/", 500, OSError, r"broke off, for the Hub failed \(status 500\)"),
        ("POST .*/commit/", 412, ValueError, "The Hub refused the upload to org/birds: Internal error"),
        ("repos/create", 502, OSError, r"broke off, for the Hub failed \(status 502\)"),
        ("validate-yaml", 500, OSError, r"broke off, for the Hub failed \(status 500\)"),
    ],
)
def test_a_fault_leaves_no_commit_and_a_retry_works(hub, model_folder, request_, status, kind, message):
    hub.fail(request_, status, times=100)
    with pytest.raises(kind, match=message) as caught:
        publish(model_folder, REPO, license="mit")
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)
    assert REPO not in hub.repositories or not hub.commits(REPO)
    hub.faults.clear()
    publish(model_folder, REPO, license="mit")
    (commit,) = hub.commits(REPO)
    assert commit.changed == FILES


def test_a_passing_fault_is_survived(hub, model_folder):
    hub.fail("PUT /lfs-storage", 503, times=2)
    publish(model_folder, REPO, license="mit")
    assert len(hub.commits(REPO)) == 1


def test_an_older_commit_survives_a_failed_upload(hub, model_folder):
    publish(model_folder, REPO, license="mit")
    before = dict(hub.files(REPO))
    tiny_model(class_prompt_layer=0).save_pretrained(model_folder)
    hub.fail("PUT /lfs-storage", 500, times=100)
    with pytest.raises(OSError, match="broke off"):
        publish(model_folder, REPO, license="mit")
    assert hub.files(REPO) == before and len(hub.commits(REPO)) == 1


@pytest.mark.parametrize(
    ("token", "kind", "message"),
    [
        (None, PermissionError, "There is no Hub token: log in with `hf auth login`, or set HF_TOKEN"),
        ("hf_UnknownSecretToken000", PermissionError, "does not accept the token"),
        (READER, PermissionError, "The token may not write to org/birds"),
        (f"{WRITER}\nand more", ValueError, "holds spaces, line breaks"),
    ],
)
def test_tokens(hub, model_folder, monkeypatch, caplog, capfd, token, kind, message):
    caplog.set_level(logging.DEBUG)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(kind, match=message) as caught:
        publish(model_folder, REPO, license="mit", token=token)
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert not [secret for secret in (*TOKENS, "SecretToken") if secret in said]
    assert REPO not in hub.repositories
    publish(model_folder, REPO, license="mit", token=WRITER)
    assert len(hub.commits(REPO)) == 1


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, backbone_on_hub, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    model = PromptCAMForImageClassification.from_backbone(backbone_on_hub, id2label=ID2LABEL)
    model.save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    publish(tmp_path / "model", REPO, license="mit", prompts_only=True, token=WRITER)
    hub.fail("PUT /lfs-storage", 500, times=100)
    with pytest.raises(OSError, match="broke off") as caught:
        publish(tmp_path / "model", "org/other", license="mit", token=WRITER)
    storage = [request for request in hub.requests if request.headers["Host"].startswith("localhost")]
    assert {request.method for request in storage} >= {"PUT", "GET"}
    assert not [request.path for request in storage if "authorization" in map(str.lower, request.headers)]
    assert not [request.path for request in hub.requests if WRITER in request.path]
    written = [path for path in tmp_path.rglob("*") if path.is_file() and WRITER.encode() in path.read_bytes()]
    assert not written
    said = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert "lfs-storage" in said and WRITER not in said


def test_no_network(hub, model_folder, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"The Hub at http://127.0.0.1:9 cannot be reached \(.*\)\. All files"):
        publish(model_folder, REPO, license="mit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="Offline mode is on, so nothing can be uploaded: unset HF_HUB_OFFLINE"):
        publish(model_folder, REPO, license="mit")


def test_metadata_that_the_hub_does_not_take(hub, model_folder):
    with pytest.raises(ValueError, match='The Hub refused the upload to org/birds: "license" must be one of'):
        publish(model_folder, REPO, license="gpl-99")
    assert not hub.commits(REPO)


# --- What is refused before anything is sent ---


def without_weights(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["class_prompts"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def with_damaged_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_class_names(folder):
    names = {index: f"LABEL_{index}" for index in range(5)}
    tiny_model(id2label=names).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"license": None}, "has no licence; give the model's licence"),
        (None, {"license": "MIT License"}, "'MIT License' is not the identifier of a licence"),
        (None, {"license": "other"}, '"other" needs license_name and license_link'),
        (None, {"repo_id": "birds"}, "does not say whose repository it is; give it as owner/birds"),
        (None, {"repo_id": "org/my birds"}, "'org/my birds' is not the name of a Hub repository"),
        (without_weights, {}, "class_prompts"),
        (with_damaged_weights, {}, "cannot be loaded: "),
        (without_class_names, {}, r"5 classes have no names \(LABEL_0, LABEL_1 ...\)"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), {}, "holds no image processor"),
        (lambda folder: (folder / "config.json").unlink(), {}, "There is no model in .*: it has no config.json"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n"), {"license": None}, "README.md: .* no licence"),
        (lambda folder: (folder / "README.md").write_text("# Mine\n"), {}, r"published as it is; .* \(license ...\)"),
        (lambda folder: (folder / "results.json").write_text("{"), {}, r"results\.json cannot be read"),
        (lambda folder: (folder / "evaluation.json").write_text('{"metrics": {"a": 1}}'), {}, "'a' has no number"),
        (None, {"gallery": ["x.jpg"] * 9, "gallery_license": "mit"}, "8 photos at most; 9 were given"),
        (None, {"gallery": ["x.jpg"], "gallery_license": "mit"}, "x.jpg"),
    ],
)  # fmt: skip
def test_what_is_not_complete_is_not_uploaded(hub, model_folder, spoil, options, message):
    if spoil:
        spoil(model_folder)
    options = {"repo_id": REPO, "license": "mit"} | options
    options = {name: value for name, value in options.items() if value is not None}
    with pytest.raises((OSError, ValueError), match=message):
        publish(model_folder, **options)
    assert not hub.requests


def test_what_does_not_load_as_the_same_model_is_not_uploaded(hub, model_folder, monkeypatch):
    def save_wrongly(folder, *arguments, **options):
        save_repository(folder, *arguments, **options)
        weights = load_file(folder / "model.safetensors")
        weights["class_prompts"][2, 3] += 1e-3
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("prompt_cam_hf.hub.upload.save_repository", save_wrongly)
    with pytest.raises(ValueError, match="does not load as the same model; nothing was published"):
        publish(model_folder, REPO, license="mit")
    assert not hub.requests


# --- The card ---


def test_a_card_of_ones_own_is_published_as_it_is(hub, model_folder):
    text = "---\nlicense: cc-by-4.0\n---\n\n# My birds\n![x](trait_maps/x.png)\n"
    (model_folder / "README.md").write_text(text)
    (model_folder / "trait_maps").mkdir()
    Image.new("RGB", (4, 4)).save(model_folder / "trait_maps" / "x.png")
    publish(model_folder, REPO)
    assert hub.files(REPO)["README.md"].decode() == text
    assert hub.commits(REPO)[0].changed == FILES | {"trait_maps/x.png"}


def test_gallery(hub, model_folder, tmp_path):
    photo = tmp_path / "secret-name.jpg"
    taken = Image.Exif()
    taken[270] = "secret place"
    Image.effect_noise((60, 40), 90).convert("RGB").save(photo, exif=taken, comment=b"secret place")
    with pytest.raises(ValueError, match="the photos' licence must be given"):
        publish(model_folder, REPO, license="mit", gallery=[photo])
    publish(model_folder, REPO, license="mit", gallery=[photo, photo], gallery_license="cc0-1.0")
    card = hub.files(REPO)["README.md"].decode()
    assert "Licence of the photos: cc0-1.0." in card and "secret-name" not in card
    assert card.count("](trait_maps/") == 2 and metadata_errors(card) == []
    files = {f"trait_maps/{number}.{kind}" for number in (1, 2) for kind in ("png", "jpg")}
    assert hub.commits(REPO)[0].changed == FILES | files
    assert b"secret place" in photo.read_bytes() and b"secret place" not in hub.files(REPO)["trait_maps/1.jpg"]
    (first, _) = metadata(card)["widget"]
    assert first["src"].endswith(f"/{REPO}/resolve/main/trait_maps/1.jpg") and "score" in first["example_title"]
    # In a folder of a class, the one class that it is read as, and not the other four.
    captions = []
    for name in ID2LABEL.values():
        (tmp_path / name).mkdir()
        shutil.copy(photo, tmp_path / name / "photo.jpg")
        images = make_gallery(tiny_model(), build_image_processor(32), [tmp_path / name / "photo.jpg"], tmp_path)
        captions.append(images[0].caption)
    (read,) = [name for name, caption in zip(ID2LABEL.values(), captions, strict=True) if "in truth" not in caption]
    for name, caption in zip(ID2LABEL.values(), captions, strict=True):
        assert caption.startswith(f"{read}, score " if name == read else f"{read}, in truth {name}, score ")
    # Photos that are no longer shown are no longer there.
    publish(model_folder, REPO, license="mit", gallery=[photo], gallery_license="cc0-1.0")
    assert [name for name in hub.files(REPO) if name.startswith("trait_maps/")] == [
        "trait_maps/1.jpg",
        "trait_maps/1.png",
    ]


# --- The other two ways ---


def test_a_model_in_memory(hub, model_folder):
    card = ModelCard("---\nlicense: mit\n---\n\n# From memory\n")
    model, processor = tiny_model(), build_image_processor(32)
    publication = publish(model, REPO, image_processor=processor, model_card=card, private=True)
    (commit,) = hub.commits(REPO)
    assert publication.commit_url.endswith(commit.oid) and commit.changed == FILES and hub.repositories[REPO].private
    assert b"# From memory" in commit.files["README.md"] and not hasattr(model.config, "custom_pipelines")
    unnamed = tiny_model(id2label={index: f"LABEL_{index}" for index in range(5)})
    for given, options, message in [
        (model, {"model_card": card}, "image processor is missing: a model made in memory has none"),
        (model, {"image_processor": processor}, "model card is missing: a model made in memory has none"),
        (model, {"image_processor": processor, "model_card": ModelCard("---\na: b\n---\n")}, "has no licence"),
        (unnamed, {"image_processor": processor, "model_card": card}, "5 classes have no names"),
        (model_folder, {"image_processor": processor}, "A folder is published as it is; put the image processor"),
    ]:
        with pytest.raises(ValueError, match=message):
            publish(given, REPO, **options)
    assert len(hub.commits(REPO)) == 1

    # What was loaded from somewhere has both from there: from a repository, or from a folder.
    loaded = PromptCAMForImageClassification.from_pretrained(REPO)
    publish(loaded, "org/copy")
    assert hub.commits("org/copy")[0].changed == FILES
    for name in FILES - {"config.json"}:
        assert hub.files("org/copy")[name] == hub.files(REPO)[name], name
    loaded = PromptCAMForImageClassification.from_pretrained(model_folder)
    with pytest.raises(ValueError, match=r"model card is missing: .*model has none"):
        publish(loaded, "org/third")
    publish(loaded, "org/third", license="mit")
    assert hub.commits("org/third")[0].changed == FILES
    loaded = PromptCAMForImageClassification.from_pretrained("org/third")
    assert_stored(loaded, model)
    assert_computed(logits(loaded), logits(model))


def test_one_of_several_prompt_sets_is_published(hub):
    model = tiny_model()
    model.add_prompts("fish", id2label={0: "cod", 1: "eel", 2: "ray"})
    publish(model.only_prompts("fish"), REPO, image_processor=build_image_processor(32), license="mit")
    loaded = PromptCAMForImageClassification.from_pretrained(REPO)
    assert loaded.config.id2label == {0: "cod", 1: "eel", 2: "ray"} and list(loaded.prompt_sets) == ["default"]
    assert torch.equal(loaded.class_prompts, model.other_prompts[0].class_prompts)


def test_transformers_own_push_to_hub(hub, model_folder):
    """Weights, config, code and a stub of a card in one commit; the image processor goes up by itself."""
    model = PromptCAMForImageClassification.from_pretrained(model_folder)
    model.push_to_hub(REPO, private=True)
    (commit,) = hub.commits(REPO)
    assert commit.changed == FILES - {"preprocessor_config.json"} and hub.repositories[REPO].private
    build_image_processor(32).push_to_hub(REPO)
    assert hub.files(REPO).keys() >= FILES
    assert_computed(logits(PromptCAMForImageClassification.from_pretrained(REPO)), logits(model))


def test_a_plain_trainer_with_push_to_hub(hub, tmp_path):
    model = tiny_model()
    data = [{"pixel_values": image, "labels": index % 5} for index, image in enumerate(random_images(4))]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=1, report_to=[], use_cpu=True, push_to_hub=True, hub_model_id=REPO,
        hub_strategy="end", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=build_image_processor(32))
    trainer.train()
    trainer.push_to_hub(license="mit")
    (commit,) = hub.commits(REPO)
    assert commit.changed >= FILES
    assert metadata(commit.files["README.md"].decode())["license"] == "mit"
    loaded = PromptCAMForImageClassification.from_pretrained(REPO)
    torch.testing.assert_close(logits(loaded), logits(model.eval()))


# --- The command ---


def command(*arguments):
    return CliRunner().invoke(app, ["publish", *map(str, arguments)])


def test_command(hub, model_folder, tmp_path, monkeypatch):
    answer = command(model_folder, REPO, "--license", "mit", "--dry-run", "--private")
    assert answer.exit_code == 0, answer.output
    assert all(name in answer.stdout for name in FILES) and f"{len(FILES)} files" in answer.stdout
    said = " ".join(answer.stderr.split())
    assert "Nothing was uploaded" in said and f"{hub.url}/{REPO}, branch main; the repository is private" in said
    assert not hub.requests

    answer = command(
        model_folder, REPO, "--license", "mit", "--dataset", "My birds", "--dataset-license", "cc0-1.0", "--private"
    )
    assert answer.exit_code == 0, answer.output
    (commit,) = hub.commits(REPO)
    assert answer.stdout.splitlines()[-1] == f"{hub.url}/{REPO}/commit/{commit.oid}"
    assert hub.repositories[REPO].private and b"My birds" in commit.files["README.md"]

    for arguments, message in [
        ((model_folder, REPO), "has no licence"),
        ((tmp_path / "nowhere", REPO, "--license", "mit"), "There is no model in"),
        ((model_folder, "else/birds", "--license", "mit"), "The token may not write to else/birds"),
    ]:
        answer = command(*arguments)
        assert answer.exit_code == 2 and answer.stdout == ""
        assert message in " ".join(answer.stderr.split()) and WRITER not in answer.output
    monkeypatch.delenv("HF_TOKEN")
    assert "There is no Hub token" in command(model_folder, REPO, "--license", "mit").stderr


def test_what_is_no_part_of_a_repository_stays_at_home(hub, model_folder):
    """Checkpoints, recipe, state, lists of images."""
    for name in ("recipe.yaml", "trainer_state.json", "skipped_images.csv", "confusion_test.csv"):
        (model_folder / name).write_text("{}")
    shutil.copytree(model_folder, model_folder / "checkpoint-3")
    publish(model_folder, REPO, license="mit")
    assert hub.commits(REPO)[0].changed == FILES
