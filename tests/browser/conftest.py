# SPDX-License-Identifier: MIT
"""A browser, and pages in it that report what goes wrong."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

WIDE, NARROW = 1400, 420
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """The program that PROMPT_CAM_BROWSER names, else a Chromium or Chrome on the path, else Playwright's own."""
    return os.environ.get("PROMPT_CAM_BROWSER") or next(filter(None, map(shutil.which, _NAMES)), None)


# Not for the whole session: while Playwright runs, its thread has an event loop, and other tests start their own.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """Chromium. Tests are skipped where there is none; where PROMPT_CAM_BROWSER_REQUIRED is set, they fail."""
    with sync_playwright() as playwright:
        program = find_browser()
        if program is None and not Path(playwright.chromium.executable_path).exists():
            reason = "no Chromium or Chrome: install one, or let PROMPT_CAM_BROWSER name it"
            if os.environ.get("PROMPT_CAM_BROWSER_REQUIRED"):
                pytest.fail(reason, pytrace=False)
            pytest.skip(reason)
        # Without a sandbox, for it cannot be had by root in a container; the pages are our own.
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """Errors of the console, exceptions, and requests to other hosts, of all pages of a test.

    A test that leaves any fails. One that provokes errors looks at them and empties the list.
    """
    found: list[str] = []
    yield found
    assert not found


@pytest.fixture
def open_page(browser: Browser, problems: list[str]) -> Iterator[Callable[..., Page]]:
    """Open a file or an address as a new user would: `open_page(path, width=NARROW, dark=True)`.

    Other keywords are those of Playwright's `Browser.new_context`.
    """
    contexts = []

    def open_page(address: str | Path, width: int = WIDE, dark: bool = False, **options) -> Page:
        url = address.as_uri() if isinstance(address, Path) else address
        options = {"viewport": {"width": width, "height": 900}, **options}
        context = browser.new_context(color_scheme="dark" if dark else "light", **options)
        contexts.append(context)
        page = context.new_page()

        def note(where: str) -> None:
            host = urlsplit(where).hostname
            if host not in (None, urlsplit(url).hostname):
                problems.append(f"asked another host: {where}")

        page.on("request", lambda request: note(request.url))
        page.on("websocket", lambda socket: note(socket.url))
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
