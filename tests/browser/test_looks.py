# SPDX-License-Identifier: MIT
"""The tools of these tests, on pages of which it is known what is wrong with them."""

import pytest

from browser.conftest import NARROW
from browser.looks import faint_text, sticks_out

# Contrasts with white, from WCAG's formula: 4.48, 4.54, 3.54 and 2.85.
GREYS = {"#777777": 4.48, "#767676": 4.54, "#888888": 3.54, "#999999": 2.85}


@pytest.fixture
def show(open_page, tmp_path):
    def show(body: str, **options):
        file = tmp_path / "page.html"
        file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><title>x</title><body style="margin: 0">{body}')
        return open_page(file, **options)

    return show


@pytest.mark.parametrize(
    "style, faint",
    [
        ("color: #777777", "4.48"),
        ("color: #767676", None),
        ("color: #888888; font-size: 24px", None),
        ("color: #999999; font-size: 24px", "2.85"),
        ("color: rgb(0 0 0 / 40%)", "2.85"),
        ("color: #ffffff; background: #767676", None),
        ("color: #767676; background: linear-gradient(to right, #cccccc 50%, transparent 50%)", "2.83"),
        ("color: #ffffff; visibility: hidden", None),
    ],
)
def test_faint_text_is_found(show, style, faint):
    found = faint_text(show(f'<p>clear</p><p style="{style}">text</p>'))
    assert [text.split(",")[0] for text in found] == ([f"text: {faint}"] if faint else [])


def test_the_colours_behind_are_those_of_the_scheme(show):
    page = '<meta name="color-scheme" content="light dark"><p style="color: #eeeeee">text</p>'
    assert len(faint_text(show(page))) == 1
    assert not faint_text(show(page, dark=True))


def test_what_sticks_out_is_named(show):
    assert not sticks_out(show('<p id="a" style="width: 410px">text</p>', width=NARROW))
    assert '<p id="b"' in sticks_out(show('<p id="b" style="width: 430px">text</p>', width=NARROW))[0]
    inside = '<div style="overflow-x: auto"><p style="width: 430px">text</p></div>'
    assert not sticks_out(show(inside, width=NARROW))


def test_problems_are_noted(show, problems):
    show('<img src="http://example.invalid/a.png"><script>console.error("oops"); undefined.x</script>')
    assert "asked another host: http://example.invalid/a.png" in problems and "oops" in problems
    assert any("Cannot read properties of undefined" in problem for problem in problems)
    problems.clear()
