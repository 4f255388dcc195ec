# SPDX-License-Identifier: MIT
"""`prompt-cam convert`, from files and from a Hub repository."""

import io
import json

import pytest
import torch
from hub_server import connect, serve
from safetensors.torch import load_file
from test_cli import run
from test_parity import FIXTURES, Official
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor

NAMES = ["Blue Jay", "Cardinal", "Sora", "Wren", "Ovenbird", "Bobolink", "Mallard"]


def checkpoint(name: str) -> bytes:
    file = io.BytesIO()
    torch.save({"model_state_dict": Official(name).state_dict}, file)
    return file.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(checkpoint("vit_c7"))
    return path


def assert_same_scores(folder, name):
    model, stored = (
        PromptCAMForImageClassification.from_pretrained(folder),
        load_file(FIXTURES / f"{name}.safetensors"),
    )
    with torch.no_grad():
        logits = model(stored["pixel_values"]).logits
    torch.testing.assert_close(logits, stored["logits"], atol=1e-5, rtol=0)
    size = model.config.backbone_config.image_size
    assert AutoImageProcessor.from_pretrained(folder).to_dict() == build_image_processor(size).to_dict()
    return model


def test_a_file_becomes_a_folder_with_model_and_image_processor(file, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join(NAMES) + "\n\n", encoding="utf-8")
    answer = run("convert", file, "--out", tmp_path / "out", "--classes", tmp_path / "names.txt", "--heads", 4)
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == f"{tmp_path / 'out'}\n" and "LABEL_0" not in answer.stderr
    model = assert_same_scores(tmp_path / "out", "vit_c7")
    assert model.config.id2label == dict(enumerate(NAMES))


def test_classes_are_numbered_in_the_order_of_their_folders(file, tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / "train" / f"{7 - number:03d}.{name}").mkdir(parents=True)
    (tmp_path / "train" / "notes.txt").touch()
    answer = run("convert", file, "--out", tmp_path / "out", "--classes", tmp_path / "train", "--heads", 4)
    assert answer.exit_code == 0, answer.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in enumerate(reversed(NAMES))}


def test_from_a_hub_repository(tmp_path):
    files = {f"checkpoints/{name}/model.pt": checkpoint(name) for name in ("vit_c7", "dinov2_c5")}
    with serve() as hub, connect(hub, tmp_path / "home"):
        hub.add("museum/several", files | {"README.md": b"", "args.yaml": b""})
        hub.add("museum/one", {"model.pt": files["checkpoints/vit_c7/model.pt"]})
        hub.add("museum/none", {"README.md": b""})

        listed = run("convert", "museum/several", "--out", tmp_path / "out")
        assert listed.exit_code == 2
        assert "2 official checkpoints, and one is to be chosen by --file" in listed.stderr
        assert "checkpoints/dinov2_c5/model.pt, checkpoints/vit_c7/model.pt." in listed.stderr
        wrong = run("convert", "museum/several", "--file", "args.yaml", "--out", tmp_path / "out")
        assert wrong.exit_code == 2 and "museum/several has no args.yaml; the files in it are" in wrong.stderr
        none = run("convert", "museum/none", "--out", tmp_path / "out")
        assert none.exit_code == 2 and "has 0 official checkpoints" in none.stderr
        nowhere = run("convert", "museum/nowhere", "--out", tmp_path / "out")
        assert nowhere.exit_code == 2 and "neither a folder museum/nowhere nor a repository" in nowhere.stderr
        assert not (tmp_path / "out").exists()
        assert not any(request.path.endswith("model.pt") for request in hub.requests)

        asked = ("museum/several", "--file", "checkpoints/dinov2_c5/model.pt")
        answer = run("convert", *asked, "--heads", 3, "--out", tmp_path / "chosen")
        assert answer.exit_code == 0, answer.output
        assert_same_scores(tmp_path / "chosen", "dinov2_c5")
        assert "Its 5 classes are called LABEL_0" in answer.stderr
        answer = run("convert", "museum/one", "--heads", 4, "--out", tmp_path / "only")
        assert answer.exit_code == 0, answer.output
        assert_same_scores(tmp_path / "only", "vit_c7")


def test_from_a_folder(file, tmp_path):
    answer = run("convert", tmp_path, "--heads", 4, "--out", tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert_same_scores(tmp_path / "out", "vit_c7")


def test_mistakes_get_one_sentence_and_write_nothing(file, tmp_path):
    out, texts = tmp_path / "out", {"few": "a\nb\n", "gap": "a\n\nb\n", "twice": "a\nb\na\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").touch()
    for arguments, message in [
        ((file, "--out", out, "--heads", 5), "its 48 channels cannot be divided among 5 heads"),
        ((file, "--out", out, "--heads", 4, "--classes", tmp_path / "few"), "names 2 classes, but the checkpoint has"),
        ((file, "--out", out, "--classes", tmp_path / "gap"), "Line 2 of"),
        ((file, "--out", out, "--classes", tmp_path / "twice"), "repeats the class name 'a'"),
        ((file, "--out", out, "--classes", file), "is not a text file"),
        ((file, "--out", out, "--classes", tmp_path / "nowhere.txt"), "nowhere.txt"),
        ((file, "--out", out, "--file", "other.pt"), "There is no file"),
        ((tmp_path / "nowhere.pt", "--out", out), "There is no file"),
        ((tmp_path / "text.pt", "--out", out), "text.pt is not a checkpoint of plain tensors"),
        ((file, "--out", tmp_path / "full", "--heads", 4), "is not an empty folder"),
    ]:
        answer = run("convert", *arguments)
        assert answer.exit_code == 2, answer.output
        assert message in " ".join(answer.stderr.split())
        assert answer.stderr.count("Error: ") == 1 and "Traceback" not in answer.output
        assert answer.stdout == "" and not out.exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]
