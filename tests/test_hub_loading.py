# SPDX-License-Identifier: MIT
"""Loading from a Hub over HTTP: in fresh processes with and without this package, offline, pinned, and with faults."""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ID2LABEL, random_images, rarely, tiny_backbone_config, tiny_model
from hub_server import MINE, WRITER, HubServer, connect, serve
from PIL import Image
from test_parity import Official
from transformers import ViTModel

from prompt_cam_hf import PromptCAMForImageClassification, PromptCAMImageClassificationPipeline
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.publish import publish
from prompt_cam_hf.loading import load_pipeline
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone

REPO, PROMPTS, BACKBONE = "org/birds", "org/prompts", "museum/backbone"

_LOAD = """
import importlib.util, json, re, sys
from pathlib import Path
here = importlib.util.find_spec("prompt_cam_hf") is not None
assert here is (sys.argv[1] == "with"), "this is not the process that was meant"
import transformers
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

old = sys.argv[2]
if here:
    import prompt_cam_hf
    options, pipe_options = {}, {"pipeline_class": prompt_cam_hf.PromptCAMImageClassificationPipeline}
else:
    options = pipe_options = {"trust_remote_code": True}
processor = AutoImageProcessor.from_pretrained("org/birds")
inputs = processor(Image.open("photo.jpg"), return_tensors="pt")
answer, modules = {}, set()
for name, repo, revision in [("new", "org/birds", None), ("old", "org/birds", old), ("prompts", "org/prompts", None)]:
    model = AutoModelForImageClassification.from_pretrained(repo, revision=revision, **options)
    answer[name] = model(**inputs).logits[0].tolist()
    modules.add(type(model).__module__)
pipe = pipeline("image-classification", model="org/birds", **pipe_options)
modules.add(type(pipe).__module__)
answer["maps"] = pipe("photo.jpg", trait_maps=True, top_k=3)
if not here:  # the three lines of the card, as they stand
    card = Path(transformers.utils.cached_file("org/birds", "README.md")).read_text()
    (lines,) = re.findall(r"```python\\n(.*?)```", card, flags=re.DOTALL)
    scope = {}
    exec(lines, scope)
    assert str(scope["answers"]) == str(answer["maps"])
model.save_pretrained("saved")
assert "trust_remote_code" not in Path("saved/config.json").read_text()
for row in answer["maps"]:
    row["trait_maps"] = row["trait_maps"].tolist()
assert all(module.startswith("prompt_cam_hf" if here else "transformers_modules.org") for module in modules), modules
print(json.dumps(answer))
"""


def other_process(code: str, hub_url: str, home: Path, *arguments: str, package: bool, **settings: str):
    """Run Python without what this process has loaded; without the package, also without .pth files, which name it."""
    environment = {
        "HF_ENDPOINT": hub_url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": os.environ["PATH"],
        "PYTHONPATH": "" if package else sysconfig.get_path("purelib"),
        **settings,
    }
    home.mkdir(exist_ok=True)
    command = [sys.executable, *([] if package else ["-S"]), "-c", code, "with" if package else "without", *arguments]
    return subprocess.run(
        command, env=environment, cwd=home.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def put_backbone(hub: HubServer, folder: Path, name: str = BACKBONE) -> None:
    torch.manual_seed(7)
    ViTModel(tiny_backbone_config(), add_pooling_layer=False).save_pretrained(folder)
    hub.add(name, {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Two commits of a model, its answers to a photo, and prompts that name a backbone in a third repository."""
    folder = tmp_path_factory.mktemp("published")
    with serve() as hub:
        with connect(hub, folder / "home"):
            put_backbone(hub, folder / "backbone")
            processor = build_image_processor(32)
            models = {
                "old": tiny_model(),
                "new": tiny_model(class_prompt_layer=1),
                "prompts": PromptCAMForImageClassification.from_backbone(BACKBONE, id2label=ID2LABEL),
            }
            for name, model in models.items():
                model.save_pretrained(folder / name)
                processor.save_pretrained(folder / name)
            publish(folder / "old", REPO, license="mit")
            publish(folder / "new", REPO, license="mit")
            publish(folder / "prompts", PROMPTS, license="mit", prompts_only=True)
        (folder / "elsewhere").mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        photo = folder / "elsewhere" / "photo.jpg"
        Image.fromarray(pixels).save(photo)
        inputs = processor(Image.open(photo), return_tensors="pt")
        with torch.no_grad():
            logits = {name: model(**inputs).logits[0].tolist() for name, model in models.items()}
        pipe = PromptCAMImageClassificationPipeline(
            model=models["new"], image_processor=processor, task="image-classification"
        )
        maps = pipe(str(photo), trait_maps=True, top_k=3)
        yield SimpleNamespace(hub=hub, folder=folder / "elsewhere", logits=logits, maps=maps)


def assert_same_answers(run: subprocess.CompletedProcess, published: SimpleNamespace) -> None:
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout.splitlines()[-1])
    for name, expected in published.logits.items():
        assert answer[name] == pytest.approx(expected, abs=1e-6), name
    assert published.logits["old"] != pytest.approx(published.logits["new"], abs=1e-3)
    for got, expected in zip(answer["maps"], published.maps, strict=True):
        assert (got["label"], got["head_order"]) == (expected["label"], expected["head_order"])
        assert got["score"] == pytest.approx(expected["score"], abs=1e-6)
        np.testing.assert_allclose(got["trait_maps"], expected["trait_maps"], atol=1e-6)


def test_without_the_package_and_then_offline(published):
    hub, home = published.hub, published.folder / "home-without"
    old = hub.commits(REPO)[0].oid
    assert not home.exists()
    run = other_process(_LOAD, hub.url, home, old, package=False)
    assert_same_answers(run, published)
    # The pinned weights came with the code of their own commit.
    assert f"/{REPO}/resolve/{old}/modeling_prompt_cam.py" in {request.path for request in hub.requests}

    # Nothing answers at the old address.
    offline = other_process(_LOAD, "http://127.0.0.1:9", home, old, package=False, HF_HUB_OFFLINE="1")
    assert_same_answers(offline, published)


def test_with_the_package_no_permission_is_needed(published):
    home = published.folder / "home-with"
    run = other_process(_LOAD, published.hub.url, home, published.hub.commits(REPO)[0].oid, package=True)
    assert_same_answers(run, published)
    assert not list(home.rglob("*_prompt_cam.py"))  # code of the repository was not even fetched


_PREDICT = "import sys; from prompt_cam_hf.cli import app; app(['predict', *sys.argv[2:]], prog_name='prompt-cam')"


@pytest.mark.slow
def test_a_command_without_a_network_tries_once(published):
    home, photo = published.folder / "home-command", "photo.jpg"

    def predict(url: str, repo: str):
        return other_process(_PREDICT, url, home, repo, photo, "--format", "json", package=True)

    first = predict(published.hub.url, PROMPTS)
    assert first.returncode == 0, first.stderr
    nobody = "http://127.0.0.1:9"
    cached = predict(nobody, PROMPTS)  # with its backbone
    assert cached.returncode == 0 and json.loads(cached.stdout) == json.loads(first.stdout), cached.stderr
    unknown = predict(nobody, "org/none")
    assert unknown.returncode == 2 and not unknown.stdout
    assert re.fullmatch(
        r"Error: The Hub at http://127\.0\.0\.1:9 cannot be reached \(.*refused\), and org/none is neither a folder "
        r"here nor in the cache; check the network and try again\.\n",
        unknown.stderr,
    )
    assert not any("Retrying" in ran.stderr for ran in (cached, unknown))


# --- Faults ---


@pytest.fixture
def client(published, tmp_path):
    """This process with an empty cache; faults end with the test."""
    with connect(published.hub, tmp_path) as patch:
        yield patch
    published.hub.faults.clear()


def load(name: str = REPO, **options) -> list[float]:
    model = PromptCAMForImageClassification.from_pretrained(name, **options)
    with torch.no_grad():
        return model(random_images()).logits.tolist()


def test_a_broken_download_is_resumed(published, client):
    client.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    published.hub.fail("GET /cdn", times=1)
    published.hub.requests.clear()
    broken = load()
    assert broken == load()
    ranges = [r.headers.get("Range") for r in published.hub.requests if r.method == "GET" and "/cdn" in r.path]
    assert ranges[0] is None and re.fullmatch(r"bytes=[1-9]\d+-", ranges[1])


@pytest.mark.parametrize("name", [REPO, PROMPTS])
def test_a_download_that_keeps_breaking_leaves_nothing_corrupt(published, client, tmp_path, name):
    client.setattr("huggingface_hub.file_download.http_get.__kwdefaults__", {"_nb_retries": 1}, raising=False)
    published.hub.fail("GET /cdn", times=1000)
    with pytest.raises(
        ConnectionError, match=r"the download of \S+ broke off \(.*\)\. Nothing incomplete .* try again"
    ):
        load(name)
    whole = {len(content) for content in published.hub.objects.values()}
    blobs = [
        path for path in tmp_path.rglob("blobs/*") if path.stat().st_size > 100_000 or path.suffix == ".incomplete"
    ]
    assert not blobs and whole
    published.hub.faults.clear()
    assert load(name) == load(name)


@pytest.mark.parametrize(
    ("name", "fault", "token", "kind", "message"),
    [
        ("org/none", None, WRITER, FileNotFoundError, "neither a folder org/none nor a repository of that name"),
        ("org/none", None, "", FileNotFoundError, "if it is a private one, log in"),
        (REPO, None, "hf_UnknownSecretToken000", PermissionError, "The Hub does not accept the token"),
        (REPO, ("/resolve/", 403), WRITER, PermissionError, "The token may not read org/birds"),
        (REPO, ("/resolve/", 503), WRITER, ConnectionError, "cannot be reached|The Hub failed while org/birds"),
        (REPO, ("GET /cdn", 500), WRITER, ConnectionError, r"Hub failed while org/birds was loaded \(status 500\)"),
        (PROMPTS, ("museum/backbone/resolve", 404), WRITER, OSError, "prompts only, and its backbone 'museum/back"),
    ],
)  # fmt: skip
def test_one_sentence_says_what_is_wrong(published, client, name, fault, token, kind, message):
    client.setenv("HF_TOKEN", token)
    if fault:
        published.hub.fail(*fault, times=1000)
    with pytest.raises(kind, match=message) as caught:
        load(name)
    assert "\n" not in str(caught.value) and "SecretToken" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fault", "kind", "message"),
    [
        ("org/none", None, FileNotFoundError, "neither a folder org/none nor a repository of that name"),
        (REPO, ("GET /cdn", 500), ConnectionError, r"Hub failed while org/birds was loaded \(status 500\)"),
    ],
)
def test_commands_say_it_too(published, client, name, fault, kind, message):
    """transformers' pipeline() would give a traceback as its message."""
    if fault:
        published.hub.fail(*fault, times=1000)
    with pytest.raises(kind, match=message) as caught:
        load_pipeline(name)
    assert "\n" not in str(caught.value)


def test_no_such_revision_no_network_offline(published, client):
    with pytest.raises(FileNotFoundError, match="org/birds has no revision tried"):
        load(revision="tried")
    client.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="Offline mode is on, and org/birds is not in the cache"):
        load()
    client.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    client.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    client.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )
    with pytest.raises(ConnectionError, match=r"The Hub at http://127.0.0.1:9 cannot be reached"):
        load()


def test_backbones_take_the_hub_keywords(published, client, tmp_path):
    hub, name = published.hub, "org/many"
    hub.add(name, {f"small/vit/{file}": content for file, content in hub.files(BACKBONE).items()}, private=True)
    client.setenv("HF_TOKEN", "")
    place = {"subfolder": "small/vit", "cache_dir": tmp_path / "cache"}
    with pytest.raises(FileNotFoundError, match="if it is a private one, log in"):
        load_backbone(name, **place)
    model = PromptCAMForImageClassification.from_backbone(
        name, id2label=ID2LABEL, num_agnostic_prompts=0, token=WRITER, **place
    )
    assert list((tmp_path / "cache").rglob("small/vit/model.safetensors"))
    expected = PromptCAMForImageClassification.from_backbone(BACKBONE, id2label=ID2LABEL).backbone.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.backbone.state_dict().items())

    hub.requests.clear()
    assert load_backbone(name, local_files_only=True, **place).config.hidden_size == 32
    assert not hub.requests
    with pytest.raises(OSError):
        load_backbone(name, local_files_only=True, subfolder="small/vit", cache_dir=tmp_path / "empty")

    # Prompts alone remember the subfolder.
    model.save_pretrained(tmp_path / "prompts", include_backbone=False)
    loaded = PromptCAMForImageClassification.from_pretrained(tmp_path / "prompts", token=WRITER)
    assert loaded.config.backbone_subfolder == "small/vit"
    assert all(torch.equal(value, expected[key]) for key, value in loaded.backbone.state_dict().items())


# --- Code that nobody allowed ---

_EVIL = "from pathlib import Path\nPath('executed').touch()\nclass Evil: pass\n"
_ATTACK = """
import sys
from pathlib import Path
from transformers import AutoConfig, AutoModelForImageClassification, pipeline
trusting = {"trust_remote_code": True} if sys.argv[1] == "without" else {}
if sys.argv[1] == "with":
    import prompt_cam_hf
for repo in sys.argv[2:]:
    for load in (
        lambda: AutoConfig.from_pretrained(repo, **trusting),
        lambda: AutoModelForImageClassification.from_pretrained(repo, **trusting),
        lambda: pipeline("image-classification", model=repo, **trusting),
    ):
        try:
            load()
        except Exception as error:
            print(repo, type(error).__name__, " ".join(str(error).split())[:300])
        else:
            print(repo, "loaded")
    assert not Path("executed").exists(), repo
"""


def evil_copy(files: dict[str, bytes], **changes) -> dict[str, bytes]:
    """A repository with evil.py, and another config."""
    config = json.loads(files["config.json"]) | changes
    return files | {"config.json": json.dumps(config).encode(), "evil.py": _EVIL.encode()}


@pytest.mark.parametrize(
    "package", [pytest.param(False, id="without the package"), rarely(True, id="with the package")]
)
def test_code_of_a_backbone_never_runs(published, tmp_path, package):
    """Neither by a nested config nor by the repository that prompts name, though the model's own code may run.

    With the package, no code of a repository runs at all.
    """
    hub = published.hub
    whole, prompts, backbone = (dict(hub.files(name)) for name in (REPO, PROMPTS, BACKBONE))
    auto_map = {name: "evil.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForImageClassification")}
    permission = {"auto_map": auto_map, "trust_remote_code": True}
    pipelines = {"image-classification": {"impl": "evil.Evil", "pt": ["AutoModelForImageClassification"]}}
    nested = json.loads(whole["config.json"])["backbone_config"]
    hub.add("evil/nested", evil_copy(whole, backbone_config=nested | permission))
    hub.add("evil/deeper", evil_copy(whole, backbone_config=nested | {"vision_config": nested | permission}))
    hub.add("evil/backbone", evil_copy(backbone, **permission))
    hub.add("evil/strange", evil_copy(backbone, **permission, model_type="evil"))
    for name in ("backbone", "strange"):
        hub.add(f"evil/names-{name}", evil_copy(prompts, backbone_name_or_path=f"evil/{name}"))
    hub.add("evil/code", evil_copy(whole, auto_map=auto_map, custom_pipelines=pipelines))
    hub.add("evil/permission", evil_copy(whole, **permission))
    repositories = ["evil/nested", "evil/deeper", "evil/names-backbone", "evil/names-strange"]
    repositories += ["evil/code", "evil/permission"] if package else []
    run = other_process(_ATTACK, hub.url, tmp_path / "home", *repositories, package=package)
    assert run.returncode == 0, run.stderr
    for name in ("nested", "deeper", "names-backbone", *(["code"] if package else [])):
        assert run.stdout.count(f"evil/{name} loaded") == 3, run.stdout
    assert run.stdout.count("evil/names-strange loaded") == 1, run.stdout  # its own configuration, which names no code
    assert "ValueError evil/strange needs code of its own, which is never run for a backbone" in run.stdout
    assert not package or "no field 'trust_remote_code'" in run.stdout


# --- The documentation ---

# Each block in a process of its own, as a reader runs it: importing prompt_cam_hf changes what transformers loads.
# `prompt-cam convert` is left to test_cli_convert.py, for its lines are choices and not steps; the model is trained.
_DOCS = r"""
import os, re, shlex, sys
from pathlib import Path
from transformers import AutoModelForImageClassification, pipeline
for page in sys.argv[2:]:
    for language, block in re.findall(r"```(python|bash)\n(.*?)```", Path(page).read_text(), flags=re.DOTALL):
        child = os.fork()
        if child:
            assert os.waitpid(child, 0)[1] == 0, block
            continue
        if language == "python":
            exec(block, {})
        else:
            from typer.testing import CliRunner
            from prompt_cam_hf.cli import app
            lines = block.replace("\\\n", " ")
            for command in re.findall(r"^prompt-cam (?!convert|train)(.*)", lines, flags=re.MULTILINE):
                answer = CliRunner().invoke(app, shlex.split(command, comments=True))
                assert answer.exit_code == 0, command + answer.output
                print(command)
        sys.stdout.flush()
        os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.long
def test_the_pages_run_as_they_stand(tmp_path):
    """docs/publishing.md and docs/official_checkpoints.md, in order, against a Hub; training was done before."""
    docs = Path(__file__).parents[1] / "docs"
    tiny = tiny_backbone_config(image_size=224, patch_size=16)
    official = Official("vit_c7").state_dict
    official["pos_embed"] = torch.randn(1, 1 + 14 * 14, 48)
    torch.save({"model_state_dict": official}, tmp_path / "model.pt")
    photos = ["photos/test/House Sparrow/0003.jpg", "photos/test/Tree Sparrow/0004.jpg", "my_examples/1.jpg"]
    birds = ["001.Black_footed_Albatross", *(f"00{number}.Species_{number}" for number in range(2, 8))]
    photos += [f"CUB/{split}/{bird}/1.jpg" for split in ("train", "test") for bird in birds]
    for photo in photos:
        (tmp_path / photo).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 40), (30, 90, 160)).save(tmp_path / photo)
    with serve() as hub:
        with connect(hub, tmp_path / "home"):
            ViTModel(tiny, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
            hub.add("facebook/dino-vitb16", {path.name: path.read_bytes() for path in (tmp_path / "vit").iterdir()})
            names = {0: "House Sparrow", 1: "Tree Sparrow"}
            model = PromptCAMForImageClassification.from_backbone("facebook/dino-vitb16", id2label=names)
            model.save_pretrained(tmp_path / "my_model")
            build_image_processor(224).save_pretrained(tmp_path / "my_model")
        pages = [str(docs / "publishing.md"), str(docs / "official_checkpoints.md")]
        run = other_process(_DOCS, hub.url, tmp_path / "home", *pages, package=True, HF_TOKEN=MINE)
        assert run.returncode == 0, run.stderr[-3000:]
        assert run.stdout.count("publish my_model") == 5 and "predict promptcam-dino-cub" in run.stdout
        assert len(hub.commits("me/garden-birds")) == 3
        assert "examples/001.jpg" in hub.files("spaces/me/garden-birds-traits") and (tmp_path / "my_space").is_dir()
        assert "safetensors" in " ".join(hub.files("me/garden-birds-prompts"))
        assert b"As the authors of Prompt-CAM report it" in hub.files("me/promptcam-dino-cub")["README.md"]
