# SPDX-License-Identifier: MIT
"""A Space's folder, started where nothing of this clone is, answers in a browser."""

import os
import socket
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
from conftest import tiny_model
from PIL import Image
from playwright.sync_api import expect

from prompt_cam_hf import explain
from prompt_cam_hf.data.images import build_image_processor

ROOT = Path(__file__).parents[2]


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A fresh environment with a wheel of this package; the libraries are those of the tests, for these are large."""
    folder = tmp_path_factory.mktemp("fresh")
    # Of what git knows, for a build leaves files behind.
    run("git", "-C", ROOT, "checkout-index", "--all", f"--prefix={folder}/source/", check=True)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    built = run(python, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
    if "setuptools" in built.stderr and built.returncode:
        pytest.skip("pip reaches no index to build a wheel with")
    assert built.returncode == 0, built.stderr
    run(python, "-m", "pip", "install", "--no-deps", *folder.glob("*.whl"), check=True)
    place = run(python, "-c", "import site; print(site.getsitepackages()[0])", check=True).stdout.strip()
    # The .pth files in these folders, such as that of this clone, are not read.
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(place, "libraries.pth").write_text("\n".join(libraries) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.long
def test_a_written_space_answers(python, tmp_path, open_page):
    tiny_model(id2label={0: "Blue Jay", 1: "Wren"}).save_pretrained(tmp_path / "model")
    build_image_processor(32).save_pretrained(tmp_path / "model")
    (tmp_path / "examples" / "Wren").mkdir(parents=True)
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "examples" / "Wren" / "x.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ("--license", "mit", "--examples", "examples", "--examples-license", "CC0")
    written = run(python.with_name("prompt-cam"), "space", "model", "space", *options, cwd=tmp_path, env=environment)
    assert written.returncode == 0, written.stderr
    # The Space has a copy of the package, and is to need no other.
    run(python, "-m", "pip", "uninstall", "--yes", "prompt_cam_hf", check=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    command = [python, tmp_path / "space" / "app.py"]
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, cwd="/", env=environment, stderr=log) as app:
        try:
            wait_for(port, app, tmp_path / "log")
            page = open_page(f"http://127.0.0.1:{port}/")
            page.locator("#examples button").click()
            best = page.locator("#answer .pc-best")
            expect(best).to_be_visible(timeout=60_000)
            expected = explain(tmp_path / "model", tmp_path / "space" / "examples" / "Wren" / "001.jpg").prediction
            assert best.locator("b").inner_text() == expected.label
            assert best.locator("span").inner_text() == f"{expected.probability:.1%}"
            assert str(tmp_path / "space") not in page.content()
            page.close()  # or it would complain that the server is gone
        finally:
            app.terminate()


def wait_for(port: int, app: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert app.poll() is None, log.read_text()
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    pytest.fail(log.read_text())
