# SPDX-License-Identifier: MIT
"""The app under bad files, hostile names, two visitors at once and a network that fails."""

import io
import json
import pickle
import re
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image
from playwright.sync_api import Page, Route, expect

from prompt_cam_hf import explain
from prompt_cam_hf.app import build_app
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.messages import printable

SCRIPT = '"><img src=x onerror="window.attacked = 1"><script>window.attacked = 1</script>'
NAMES = {0: SCRIPT, 1: "{{ 7 * 7 }}", 2: "\u202egnorw yaw eht", 3: "</textarea>'", 4: "Ünïcødé 鳥"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app") / "model"
    tiny_model(id2label=NAMES).save_pretrained(folder)
    build_image_processor(32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    return tmp_path_factory.mktemp("uploads")


@pytest.fixture(scope="module")
def address(model, uploads):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        app = build_app(model)
        app.launch(server_name="127.0.0.1", quiet=True, prevent_thread_lock=True)
        yield app.local_url
        app.close()


@pytest.fixture
def page_request(browser):
    context = browser.new_context()
    yield context.request
    context.close()


def picture(seed: int, size: tuple[int, int] = (60, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels in a few bytes."""
    header = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


PNG, JPEG = encoded(picture(0)), encoded(picture(0), "JPEG")
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>window.attacked = 1</script></svg>'
BAD = {
    "empty.png": b"",
    "text.png": b"This is no image.",
    "page.jpg": b"<html><script>window.attacked = 1</script></html>",
    "drawing.svg": SVG,
    "drawing.png": SVG,
    "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
    "document.png": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj",
    "pickle.png": pickle.dumps({"a": 1}),
    "archive.jpg": b"PK\x03\x04" + bytes(200),
    "cut.png": PNG[: len(PNG) // 2],
    "cut.jpg": JPEG[: len(JPEG) // 2],
    "cut.gif": encoded(picture(0), "GIF")[:300],
    "cut.tiff": encoded(picture(0), "TIFF")[:100],
    "cut.bmp": encoded(picture(0), "BMP")[:100],
    "header only.png": PNG[:33],
    "bomb.png": bomb(60_000),
    "too many pixels.png": bomb(8_000),
    "no pixels.png": bomb(0),
    "wrong sum.png": PNG[:50] + bytes([PNG[50] ^ 255]) + PNG[51:],
    "floats.tif": encoded(Image.fromarray(np.full((9, 9), 1e9, np.float32)), "TIFF"),
    "animation.gif": b"GIF89a\xff\xff\xff\xff\x00\x00\x00;",
    "icon.ico": b"\x00\x00\x01\x00\xff\xff" + bytes(30),
    "film.webp": b"RIFF\xff\xff\xff\x7fWEBPVP8 \xff\xff\xff\x7f",
    "noise.bmp": b"BM" + np.random.default_rng(1).bytes(300),
    f"{'long' * 50}.png": b"no image",
    "\u202egnp.exe.png": b"no image",
    f"{SCRIPT.replace('/', '')}.png": b"no image",
}  # fmt: skip


def upload(page: Page, name: str, content: bytes) -> None:
    kind = "image/" + name.rpartition(".")[2].replace("jpg", "jpeg")
    page.locator("#picker input[type=file]").first.set_input_files({"name": name, "mimeType": kind, "buffer": content})


def shown(page: Page) -> tuple[str, str]:
    """The predicted class and its share, once they are there."""
    expect(page.locator("#answer .pc-best")).to_be_visible(timeout=20_000)
    best = page.locator("#answer .pc-best")
    return best.locator("b").inner_text(), best.locator("span").inner_text()


def expected(model, image: Image.Image) -> tuple[str, str]:
    best = explain(model, image).prediction
    return printable(best.label), f"{best.probability:.1%}"


def test_bad_files_are_refused_in_a_sentence_and_the_page_goes_on(address, model, uploads, open_page):
    page = open_page(address)
    for name, content in BAD.items():
        upload(page, name, content)
        refusal = page.locator("#answer [role=alert]")
        expect(refusal, name).to_contain_text("Cannot read the image", timeout=20_000)
        words = refusal.inner_text()
        assert re.fullmatch(r"[^\n]+", words) and len(words) < 500, name
        assert "should not" not in words and "Traceback" not in words and str(uploads) not in words, words
        assert printable(name)[:40] in words, words
        expect(page.locator("#heads")).to_contain_text("Pick an image first.")
        # Where nothing was picked, the next refusal would otherwise be mistaken for this one.
        page.evaluate("document.querySelector('#answer [role=alert]').remove()")
    upload(page, "good.png", PNG)
    assert shown(page) == expected(model, picture(0))
    assert page.evaluate("window.attacked") is None


def test_a_file_that_is_too_large_is_refused(address, open_page, tmp_path, problems):
    with open(tmp_path / "large.png", "wb") as file:
        file.write(PNG)
        file.truncate(66 * 2**20)
    page = open_page(address)
    page.locator("#picker input[type=file]").first.set_input_files(tmp_path / "large.png")
    expect(page.get_by_text(re.compile("exceed the maximum allowed size of 64"))).to_be_visible(timeout=30_000)
    upload(page, "good.png", PNG)
    shown(page)
    problems.clear()


@pytest.mark.parametrize(
    "name", ["<b>&amp;\"'.png", "a/../../-rf $(touch x); `y`.png", f"\u202egnp.exe{'n' * 230}.png"]
)
def test_hostile_file_names_are_text(address, model, open_page, name):
    page = open_page(address)
    upload(page, name, PNG)
    assert shown(page) == expected(model, picture(0))
    page.locator("#make").click()
    link = page.locator("#file a[download]").first
    expect(link).to_be_visible(timeout=20_000)
    assert "<b>" not in link.inner_html()
    assert page.evaluate("window.attacked") is None


def test_two_visitors_at_once_have_nothing_of_each_other(address, model, open_page):
    pages, pictures = [open_page(address), open_page(address)], [picture(3), picture(4, (40, 90))]
    wanted = [expected(model, image) for image in pictures]
    assert wanted[0] != wanted[1]
    for page, image, name in zip(pages, pictures, ("first.png", "second.png"), strict=True):
        upload(page, name, encoded(image))
    assert [shown(page) for page in pages] == wanted

    heads = pages[1].locator("#heads").inner_html()
    pages[0].locator("#asked input").fill("Ünï")
    pages[0].locator("#asked input").press("Enter")
    expect(pages[0].locator("#heads")).to_contain_text("Ünïcødé 鳥", timeout=20_000)
    expect(pages[0].locator("#command")).to_contain_text("first.png")
    assert pages[1].locator("#heads").inner_html() == heads
    assert [shown(page) for page in pages] == wanted
    expect(pages[1].locator("#command")).to_contain_text("second.png")
    # A third visitor, and the second one after a reload, find an empty page.
    pages[1].reload()
    for page in (open_page(address), pages[1]):
        expect(page.locator("#answer")).to_contain_text("Pick an image first.")
        assert "first.png" not in page.content() and "second.png" not in page.content()


def test_many_uploads_at_once_are_answered_in_turn(address, model, open_page):
    pages = [open_page(address) for _ in range(4)]
    pictures = [picture(10 + number, (30 + number, 40)) for number in range(4)]
    for page, image in zip(pages, pictures, strict=True):
        upload(page, "x.png", encoded(image))
    assert [shown(page) for page in pages] == [expected(model, image) for image in pictures]


def test_the_page_needs_no_other_host(address, model, browser, problems):
    """Requests to other hosts would fail, as behind a firewall; `problems` names those that were tried."""
    context = browser.new_context()

    def answer(route: Route) -> None:
        if route.request.url.startswith(address):
            route.continue_()
        else:
            problems.append(route.request.url)
            route.abort()

    context.route("**/*", answer)
    page = context.new_page()
    page.goto(address)
    upload(page, "x.png", PNG)
    assert shown(page) == expected(model, picture(0))
    context.close()


def test_a_network_that_fails_for_a_while(address, model, open_page, problems):
    """It is said, what is on the page stays there meanwhile, and then the page is ready again."""
    page = open_page(address)
    upload(page, "x.png", PNG)
    first = shown(page)
    page.context.set_offline(True)
    page.locator("#kind").get_by_label("evidence").click()
    expect(page.get_by_text("Connection to the server was lost")).to_be_visible(timeout=20_000)
    assert shown(page) == first
    page.context.set_offline(False)
    expect(page.locator("#answer")).to_contain_text("Pick an image first.", timeout=20_000)
    upload(page, "x.png", PNG)
    assert shown(page) == first
    problems.clear()


def test_files_of_the_machine_are_not_given_out(address, model, page_request):
    for path in (model / "config.json", "/etc/passwd"):
        assert page_request.get(f"{address}gradio_api/file={path}").status in (403, 404)


def ask_by_hand(request, address: str, path: str) -> bool:
    """Whether the page answers a client of its own that claims to have uploaded this file."""
    config = request.get(f"{address}config").json()
    parts = {part["id"]: part["props"] for part in config["components"]}
    picker = next(number for number, props in parts.items() if props.get("elem_id") == "picker")
    pick = next(step for step in config["dependencies"] if [picker, "input"] in map(list, step["targets"]))
    upload = {"path": path, "url": path, "orig_name": "x.png", "meta": {"_type": "gradio.FileData"}}
    data = [upload if number == picker else parts[number].get("value") for number in pick["inputs"]]
    order = {"data": data, "fn_index": pick["id"], "session_hash": "made-up"}
    assert request.post(f"{address}gradio_api/queue/join", data=order).ok
    said = request.get(f"{address}gradio_api/queue/data?session_hash=made-up", timeout=20_000).text()
    return json.loads(re.findall(r"^data: (.*process_completed.*)$", said, re.MULTILINE)[-1])["success"]


def test_a_made_up_upload_reads_nothing(address, page_request, tmp_path):
    picture(0).save(tmp_path / "secret.png")
    file = {"name": "x.png", "mimeType": "image/png", "buffer": PNG}
    (uploaded,) = page_request.post(f"{address}gradio_api/upload", multipart={"files": file}).json()
    assert ask_by_hand(page_request, address, uploaded)
    assert not ask_by_hand(page_request, address, str(tmp_path / "secret.png"))
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        assert not ask_by_hand(page_request, address, f"http://127.0.0.1:{server.server_port}/secret.png")
        server.shutdown()
    assert not asked
