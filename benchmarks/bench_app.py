# SPDX-License-Identifier: MIT
"""How long does the page of `prompt-cam app` take from a click to what it shows? `make bench-app` runs this.

A browser clicks; the time ends when the page shows the answer. Chromium is looked for on the path.
"""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

from prompt_cam_hf.app import build_app

GOAL = 1.0  # seconds


def time_changes(page: Page, where: str, actions: list[Callable[[], None]]) -> list[float]:
    """The seconds from each action to new images at `where`."""
    found = []
    for act in actions:
        before = page.locator(where).first.get_attribute("src", timeout=60_000) if found else None
        start = time.perf_counter()
        act()
        if before is None:
            expect(page.locator(where).first).to_be_visible(timeout=60_000)
        else:
            expect(page.locator(where).first).not_to_have_attribute("src", before, timeout=60_000)
        found.append(time.perf_counter() - start)
    return found[1:]


def main() -> None:
    """Print the median and the longest time of each kind of click."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a trained Prompt-CAM")
    parser.add_argument("--examples", type=Path, required=True, help="folder of at least six images")
    arguments = parser.parse_args()
    app = build_app(arguments.model, examples=arguments.examples)
    _, address, _ = app.launch(prevent_thread_lock=True, quiet=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        buttons = page.locator("#examples button")
        expect(buttons.nth(5)).to_be_visible(timeout=60_000)
        times = {"another image": time_changes(page, "#heads img", [buttons.nth(i).click for i in range(6)])}
        heads = page.locator('#heads [data-place="0"]')
        times["another head"] = time_changes(page, "#large img", [heads.nth(i).click for i in (1, 2, 3, 1, 2, 3)])
        kinds = page.locator("#kind label")
        times["another kind of map"] = time_changes(page, "#heads img", [kinds.nth(i % 2).click for i in range(1, 7)])
        remove = page.locator("#remove-head")
        methods = page.locator("#filling label")

        def try_another(i: int) -> None:
            methods.nth(i % 3).click()
            remove.click()

        places = [lambda i=i: try_another(i) for i in range(6)]
        times["a region removed"] = time_changes(page, "#removed section:nth-of-type(2) img", places)
        browser.close()
    app.close()
    for name, seconds in times.items():
        verdict = "within" if max(seconds) <= GOAL else "over"
        print(
            f"{name:22} median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s ({verdict} {GOAL:g} s)"
        )


if __name__ == "__main__":
    main()
