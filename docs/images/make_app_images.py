# SPDX-License-Identifier: MIT
"""Make the images of docs/app.md on drawn birds: python docs/images/make_app_images.py MODEL_FOLDER

MODEL_FOLDER holds a Prompt-CAM of the classes of `prompt_cam_hf.birds`. Chromium is looked for on the path.
"""

import io
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from prompt_cam_hf.app import build_app
from prompt_cam_hf.birds import BIRD_CLASSES, bird_spec, draw_bird

FOLDER = Path(__file__).parent
ASKED = "turquoise crown"


def save(page: Page, name: str, width: int, first: str | None, last: str) -> None:
    """A part of the page, from one heading to before another one, in 256 colours."""
    page.mouse.move(0, 0)
    page.evaluate("scrollTo(0, 0)")
    places = [page.get_by_role("heading", name=words).bounding_box()["y"] if words else 0 for words in (first, last)]
    clip = {"x": 0, "y": places[0], "width": width, "height": places[1] - places[0]}
    drawn = Image.open(io.BytesIO(page.screenshot(full_page=True, clip=clip))).convert("RGB")
    drawn.thumbnail((1000, 4000), Image.Resampling.LANCZOS)
    drawn.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=1).save(FOLDER / name, optimize=True)


def main(model: str) -> None:
    """Make all images."""
    with TemporaryDirectory() as examples, sync_playwright() as playwright:
        for number, bird in enumerate(BIRD_CLASSES):
            draw_bird(bird_spec("test", number), 480)[0].save(Path(examples) / f"{bird.name}.png")
        os.chdir(Path(model).parent)
        _, address, _ = build_app(Path(model).name, examples=examples).launch(prevent_thread_lock=True, quiet=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, width in (("light", 1400), ("dark", 1400), ("light", 420)):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.goto(address)
            page.locator("#examples button", has_text=ASKED).click(timeout=60_000)
            expect(page.locator("#heads button").first).to_be_visible(timeout=60_000)
            page.locator("#remove-head").click()
            expect(page.locator("#removed table")).to_be_visible(timeout=60_000)
            page.wait_for_timeout(1000)
            if width == 420:
                save(page, "app_phone.png", width, "3. Ask", "4. Look")
            elif scheme == "dark":
                save(page, "app_try.png", width, "5. Try", "6. Take along")
            else:
                save(page, "app.png", width, None, "5. Try")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1])
