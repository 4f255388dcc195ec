# SPDX-License-Identifier: MIT
"""The page as a Space: what is written, what goes to a Hub over HTTP, and what is refused before."""

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
from conftest import ID2LABEL, assert_stored, tiny_model
from hub_server import READER, connect, metadata, metadata_errors, serve
from PIL import Image
from test_cli import run

from prompt_cam_hf import PromptCAMForImageClassification, publish_space, write_space
from prompt_cam_hf.app.session import AskedModel, Question
from prompt_cam_hf.hub import space as space_module

MODEL, SPACE = "org/birds", "org/birds-demo"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub(tmp_path):
    with serve() as hub, connect(hub, tmp_path / "home"):
        yield hub


@pytest.fixture
def model_on_hub(hub, model_folder):
    hub.add(MODEL, {path.name: path.read_bytes() for path in model_folder.iterdir() if path.is_file()})
    hub.requests.clear()


@pytest.fixture
def photos(tmp_path):
    """Two classes; a large photo that tells where it was taken, and one with a comment and transparency."""
    folder = tmp_path / "secret-photos"
    pixels = np.random.default_rng(0).integers(0, 256, (1300, 2000, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned upright
    exif.get_ifd(0x8825)[1] = "N"  # the place
    for name in ("Blue Jay", 'Bird: "a" & <b>'):
        (folder / name).mkdir(parents=True)
    Image.fromarray(pixels).save(folder / "Blue Jay" / "secret-name.jpg", exif=exif, comment=b"secret comment")
    Image.fromarray(pixels[:40, :30]).convert("RGBA").save(folder / "Blue Jay" / "z.png")
    Image.fromarray(pixels[:40, :30]).save(folder / 'Bird: "a" & <b>' / "secret-name.png")
    return folder


@pytest.fixture
def _from_index(monkeypatch):
    """As if this package had been installed from an index: pip then leaves no direct_url.json."""
    package = space_module._this_package()

    class FromIndex(type(package)):
        def read_text(self, filename):
            return None if filename == "direct_url.json" else super().read_text(filename)

    monkeypatch.setattr(space_module, "_this_package", lambda: FromIndex(package._path))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- The files ---


@pytest.mark.usefixtures("_from_index", "model_on_hub")
def test_a_model_on_the_hub_needs_four_kinds_of_files(tmp_path, photos):
    sizes = write_space(MODEL, tmp_path / "space", license="cc-by-4.0", examples=photos, examples_license="CC0")
    files = contents(tmp_path / "space")
    assert sizes == {name: len(content) for name, content in files.items()}
    images = {"examples/Blue Jay/001.jpg", "examples/Blue Jay/002.jpg", 'examples/Bird: "a" & <b>/001.jpg'}
    assert files.keys() == {"app.py", "README.md", "requirements.txt"} | images
    assert 'build_app("org/birds", examples="examples")' in files["app.py"].decode()
    compile(files["app.py"], "app.py", "exec")

    card = files["README.md"].decode()
    assert not metadata_errors(card, "space")
    assert metadata(card) == {
        "title": "Prompt-CAM: birds", "sdk": "gradio", "sdk_version": version("gradio"),
        "python_version": f"{sys.version_info[0]}.{sys.version_info[1]}", "app_file": "app.py",
        "license": "cc-by-4.0", "models": [MODEL], "tags": metadata(card)["tags"],
    }  # fmt: skip
    assert "Licence of the images in `examples`: CC0." in card and "`org/birds`" in card

    lines = files["requirements.txt"].decode().splitlines()
    assert lines[0] == f"prompt_cam_hf=={version('prompt_cam_hf')}"
    pins = dict(line.split("==") for line in lines)
    assert {"torch", "transformers", "huggingface_hub", "pillow", "gradio"} < pins.keys() and "mypy" not in pins
    for name, pinned in pins.items():
        assert version(name).split("+")[0] == pinned

    assert not [name for name, content in files.items() if b"secret" in content or str(tmp_path).encode() in content]


@pytest.mark.usefixtures("_from_index", "model_on_hub")
def test_examples_are_small_upright_and_say_nothing_else(tmp_path, photos):
    write_space(MODEL, tmp_path / "space", license="mit", examples=photos, examples_license="CC0")
    with Image.open(tmp_path / "space" / "examples" / "Blue Jay" / "001.jpg") as image:
        assert image.format == "JPEG" and image.size == (666, 1024)
        assert not image.getexif() and not {"exif", "comment", "icc_profile"} & image.info.keys()
    with Image.open(tmp_path / "space" / "examples" / "Blue Jay" / "002.jpg") as image:
        assert image.size == (30, 40) and image.mode == "RGB"
    first = contents(tmp_path / "space")
    write_space(MODEL, tmp_path / "again", license="mit", examples=photos, examples_license="CC0")
    assert contents(tmp_path / "again") == first


@pytest.mark.usefixtures("_from_index")
def test_a_folder_is_copied_and_needs_no_network(tmp_path, model_folder):
    (model_folder / "taxonomy.csv").write_text("class,order\nclass 0,a\n")
    (model_folder / "recipe.yaml").write_text(f"data: {tmp_path}\n")
    write_space(model_folder, tmp_path / "space", license="mit")
    files = contents(tmp_path / "space")
    assert 'build_app("model")' in files["app.py"].decode() and "model/taxonomy.csv" in files
    assert "model/recipe.yaml" not in files and not [n for n, c in files.items() if str(tmp_path).encode() in c]
    assert metadata(files["README.md"].decode()).get("models") is None
    assert metadata(files["model/README.md"].decode()) == {"license": "mit"}
    assert_stored(PromptCAMForImageClassification.from_pretrained(tmp_path / "space" / "model"), tiny_model())


@pytest.mark.usefixtures("_from_index")
def test_the_licence_is_that_of_the_models_card(tmp_path, model_folder):
    with pytest.raises(ValueError, match="The Space has no licence; give one by its identifier"):
        write_space(model_folder, tmp_path / "space")
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://example.org/mine\ntags: [x]\n---\n# x\n"
    (model_folder / "README.md").write_text(card)
    write_space(model_folder, tmp_path / "space", model_id=MODEL)
    given = metadata((tmp_path / "space" / "README.md").read_text())
    assert given["license"] == "other" and given["license_name"] == "mine" and given["models"] == [MODEL]
    assert not (tmp_path / "space" / "model").exists()


def test_where_no_index_has_this_package_it_is_copied(tmp_path, model_folder, monkeypatch):
    """As in a clone, where a build may have left its notes: the package lies beside app.py, which imports it."""
    left_behind = tmp_path / "clone" / "prompt_cam_hf.egg-info"
    left_behind.mkdir(parents=True)
    (left_behind / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: prompt_cam_hf\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path / "clone")
    assert version("prompt_cam_hf") == "0.0.1"
    write_space(model_folder, tmp_path / "space", license="mit")
    folder = tmp_path / "space" / "prompt_cam_hf"
    assert "prompt_cam_hf" not in (tmp_path / "space" / "requirements.txt").read_text()
    assert "copy of the package prompt_cam_hf, version" in (tmp_path / "space" / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    for here, there in [("prompt_cam_hf", "."), ("modeling", "modeling"), ("training", "training")]:
        for path in (ROOT / here).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert (folder / there / path.relative_to(ROOT / here)).read_bytes() == path.read_bytes()
    assert (folder / "model_cards" / "template.md").is_file()
    assert not [path for path in folder.rglob("*") if path.name == "__pycache__"]


HOSTILE = [
    '"\nsdk: docker\nx: "',
    "--- \n---\n# x",
    "a: b # c",
    "{{ 1 + 1 }}",
    "<script>alert(1)</script>",
    "\u202eevil",
    "!!python/x",
]


@pytest.mark.usefixtures("_from_index", "model_on_hub")
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text(tmp_path, photos, text):
    write_space(MODEL, tmp_path / "space", license="mit", title=text, examples=photos, examples_license=text)
    card = (tmp_path / "space" / "README.md").read_text(encoding="utf-8")
    given = metadata(card)
    assert given["sdk"] == "gradio" and given.keys() <= {
        "title", "sdk", "sdk_version", "python_version", "app_file", "license", "models", "tags",
    }  # fmt: skip
    assert " ".join(given["title"].split()) == " ".join(text.replace("\u202e", "\\u202e").split())
    body = card.split("\n---\n", 1)[1]
    assert "<script>" not in body and "\u202e" not in card and "\n---\n" not in body


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("my_modle", "There is no folder my_modle, and a model on the Hub has a name such as me/garden-birds"),
        ("org/my birds", "There is no folder org/my birds"),
        ('org/birds"); import os; ("', "There is no folder"),
        ("org/nothing", "org/nothing"),
    ],
)
def test_models_that_are_not_there(hub, tmp_path, model, message):
    with pytest.raises(OSError, match=re.escape(message)):
        write_space(model, tmp_path / "space", license="mit")
    assert not (tmp_path / "space").exists()


def test_other_models_are_refused(hub, tmp_path):
    hub.add("org/vit", {"config.json": json.dumps({"model_type": "vit"}).encode()})
    with pytest.raises(ValueError, match="org/vit is a model of type 'vit', not a Prompt-CAM"):
        write_space("org/vit", tmp_path / "space", license="mit")


def broken(photos):
    (photos / "Blue Jay" / "x.jpg").write_bytes(b"no image")


def with_strange_folder(photos):
    (photos / "a\nb").mkdir()
    Image.new("RGB", (4, 4)).save(photos / "a\nb" / "x.png")


def with_too_many(photos):
    for number in range(100):
        Image.new("RGB", (4, 4)).save(photos / f"{number}.png")


@pytest.mark.usefixtures("_from_index")
@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (None, {"examples_license": None}, "give both the folder and the images' licence"),
        (None, {"examples": None}, "give both the folder and the images' licence"),
        (None, {"license": "MIT License"}, "'MIT License' is not the identifier of a licence"),
        (None, {"license": "other"}, '"other" needs license_name and license_link'),
        (None, {"model_id": "birds"}, "give it as owner/birds"),
        (None, {"examples": "nowhere"}, "There is no folder nowhere of examples"),
        (broken, {}, "Cannot read the image .*x.jpg"),
        (with_strange_folder, {}, r"The folder of examples a\\nb has characters in its name"),
        (with_too_many, {}, "A Space shows 100 examples at most, and .* holds 103 images"),
    ],
)
def test_what_is_refused_leaves_nothing(tmp_path, model_folder, photos, spoil, options, message):
    if spoil:
        spoil(photos)
    before = contents(tmp_path)
    given = {"license": "mit", "examples": photos, "examples_license": "CC0", **options}
    with pytest.raises((ValueError, OSError), match=message):
        write_space(model_folder, tmp_path / "space", **given)
    assert contents(tmp_path) == before and not (tmp_path / "space").exists()


@pytest.mark.usefixtures("_from_index")
def test_without_gradio_its_version_is_not_known(tmp_path, model_folder, monkeypatch):
    def find(name):
        if name == "gradio":
            raise PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(space_module, "version", find)
    with pytest.raises(ModuleNotFoundError, match=r'gradio is not installed here.*pip install "prompt_cam_hf\[app\]"'):
        write_space(model_folder, tmp_path / "space", license="mit")
    answer = run("space", model_folder, tmp_path / "space", "--license", "mit")
    assert answer.exit_code == 2 and answer.stderr.startswith("Error: gradio is not installed here, so its version")
    assert not (tmp_path / "space").exists()


@pytest.mark.usefixtures("_from_index")
def test_a_folder_that_is_there(tmp_path, model_folder, photos):
    folder = tmp_path / "space"
    folder.mkdir()
    write_space(model_folder, folder, license="mit", examples=photos, examples_license="CC0")
    (folder / "NOTES.md").write_text("mine")
    before = contents(folder)
    with pytest.raises(FileExistsError, match="holds a Space already; choose a new folder, or overwrite it"):
        write_space(model_folder, folder, license="mit")
    with pytest.raises(ValueError, match="has no licence"):
        write_space(model_folder, folder, overwrite=True)
    assert contents(folder) == before
    write_space(model_folder, folder, license="mit", model_id=MODEL, overwrite=True)
    assert contents(folder).keys() == {"app.py", "README.md", "requirements.txt", "NOTES.md"}
    with pytest.raises(FileExistsError, match="holds no Space of this package; choose a new folder"):
        write_space(model_folder, model_folder, license="mit", overwrite=True)


# --- On the Hub ---


@pytest.mark.usefixtures("_from_index", "model_on_hub")
def test_one_commit_has_everything(hub, tmp_path, photos):
    written = write_space(MODEL, tmp_path / "space", license="mit", examples=photos, examples_license="CC0")
    publication = publish_space(MODEL, SPACE, license="mit", examples=photos, examples_license="CC0")
    (commit,) = hub.commits(f"spaces/{SPACE}")
    assert commit.changed == publication.files.keys() == written.keys()
    assert {name: commit.files[name] for name in written} == contents(tmp_path / "space")
    assert publication.url == f"{hub.url}/spaces/{SPACE}" and publication.commit_url.endswith(commit.oid)
    assert SPACE not in hub.repositories
    # Published again without examples and from another package: what is no longer written is no longer there.
    publish_space(MODEL, SPACE, license="mit")
    assert hub.files(f"spaces/{SPACE}").keys() == {".gitattributes", "app.py", "README.md", "requirements.txt"}


@pytest.mark.usefixtures("_from_index", "model_on_hub")
def test_what_goes_wrong_on_the_way_leaves_no_commit(hub, monkeypatch):
    for request, status in [("repos/create", 402), ("POST .*/commit/", 500), ("preupload", 504)]:
        hub.fail(request, status, times=100)
        with pytest.raises((OSError, ValueError), match="upload to org/birds-demo") as caught:
            publish_space(MODEL, SPACE, license="mit")
        assert "\n" not in str(caught.value)
        assert f"spaces/{SPACE}" not in hub.repositories or not hub.commits(f"spaces/{SPACE}")
        hub.faults.clear()
    with pytest.raises(ValueError, match='The Hub refused the upload to org/birds-demo: "license" must be one of'):
        publish_space(MODEL, SPACE, license="gpl-99")
    publish_space(MODEL, SPACE, license="mit")
    assert len(hub.commits(f"spaces/{SPACE}")) == 1
    with pytest.raises(ValueError, match="org/birds-demo is there already and is public"):
        publish_space(MODEL, SPACE, license="mit", private=True)
    publish_space(MODEL, "org/hidden", license="mit", private=True)
    assert hub.repositories["spaces/org/hidden"].private
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(PermissionError, match="may not write to org/birds-demo"):
        publish_space(MODEL, SPACE, license="mit")
    with pytest.raises(ValueError, match="give it as owner/demo"):
        publish_space(MODEL, "demo", license="mit")


# --- The commands ---


@pytest.mark.usefixtures("_from_index")
def test_publish_with_a_space(hub, model_folder, photos):
    options = ("--license", "mit", "--space", SPACE, "--examples", photos, "--examples-license", "CC0")
    answer = run("publish", model_folder, MODEL, *options, "--dry-run")
    assert answer.exit_code == 0, answer.output
    assert "app.py" in answer.stdout and "examples/ (3 files)" in answer.stdout
    assert f"The Space would be one commit to {hub.url}/spaces/{SPACE}" in answer.stderr
    assert not hub.requests

    answer = run("publish", model_folder, MODEL, *options)
    assert answer.exit_code == 0, answer.output
    (model,), (page,) = hub.commits(MODEL), hub.commits(f"spaces/{SPACE}")
    assert [line.rpartition("/")[2] for line in answer.stdout.splitlines()[-2:]] == [model.oid, page.oid]
    assert metadata(page.files["README.md"].decode())["models"] == [MODEL]
    assert "model/config.json" not in page.files
    loaded = PromptCAMForImageClassification.from_pretrained(MODEL)
    assert loaded.config.id2label == ID2LABEL

    # What is wrong with the Space is told before the model is uploaded.
    for more, message in [
        (("--examples", photos), "give both the folder and the images' licence"),
        (("--revision", "tried"), "A Space shows the model of the branch main"),
    ]:
        answer = run("publish", model_folder, "org/other", "--license", "mit", "--space", SPACE, *more)
        assert answer.exit_code == 2 and message in " ".join(answer.stderr.split())
    answer = run("publish", model_folder, "org/other", "--license", "mit", "--examples", photos)
    assert answer.exit_code == 2 and "Examples are for a Space" in answer.stderr
    answer = run("publish", model_folder, "org/other", "--license", "mit", "--space", "demo")
    assert answer.exit_code == 2 and "give it as owner/demo" in answer.stderr
    assert "org/other" not in hub.repositories

    answer = run("publish", model_folder, "org/private", "--license", "mit", "--space", "org/private", "--private")
    assert answer.exit_code == 0 and "secret HF_TOKEN" in answer.stderr
    assert hub.repositories["org/private"].private and hub.repositories["spaces/org/private"].private

    # Where only the Space fails on its way, the model is there, and both are told.
    hub.fail("POST /api/spaces/.*/commit/", 500, times=100)
    answer = run("publish", model_folder, "org/half", "--license", "mit", "--space", "org/half")
    assert answer.exit_code == 2 and answer.stdout.splitlines()[-1].endswith(hub.commits("org/half")[0].oid)
    assert "The upload to org/half broke off" in answer.stderr and not hub.commits("spaces/org/half")


@pytest.mark.usefixtures("_from_index")
def test_space_command(tmp_path, model_folder, photos):
    arguments = ("space", model_folder, tmp_path / "space", "--license", "mit", "--title", "My birds")
    answer = run(*arguments, "--examples", photos, "--examples-license", "CC0")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout == f"{tmp_path / 'space'}\n" and "hf upload OWNER/NAME" in answer.stderr
    assert metadata((tmp_path / "space" / "README.md").read_text())["title"] == "My birds"
    answer = run(*arguments)
    assert answer.exit_code == 2 and "holds a Space already" in answer.stderr
    answer = run(*arguments, "--overwrite")
    assert answer.exit_code == 0 and not (tmp_path / "space" / "examples").exists()


# --- Running it ---


_SPACES = """
import pickle
from functools import wraps

inside = False

def GPU(function):
    @wraps(function)
    def run(*arguments, **options):
        global inside
        arguments, options = pickle.loads(pickle.dumps((arguments, options)))
        inside = True
        try:
            return pickle.loads(pickle.dumps(function(*arguments, **options)))
        finally:
            inside = False
    return run
"""


def test_on_zero_gpu_the_network_runs_in_the_other_process_only(tmp_path, model_folder, monkeypatch):
    """ZeroGPU gives a GPU to a worker inside `spaces.GPU`, and pickles what goes there and back."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "spaces.py").write_text(_SPACES)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    plain = AskedModel(model_folder)
    question = Question(plain.prompts_in_use)
    expected = plain.remove(plain.compare(plain.ask(picture, "x.png", question), 1), (2, 2, 12, 14), "mean")

    monkeypatch.syspath_prepend(tmp_path / "site")
    model = AskedModel(model_folder)
    spaces = sys.modules["spaces"]
    monkeypatch.delitem(sys.modules, "spaces")
    ran = []
    for module in model._classifier(model.prompts_in_use).model.modules():
        module.register_forward_pre_hook(lambda *_: ran.append(spaces.inside))
    visit = model.remove(model.compare(model.ask(picture, "x.png", question), 1), (2, 2, 12, 14), "mean")
    assert ran and all(ran)
    for name, result in expected.results.items():
        assert str(visit.results[name]) == str(result)
