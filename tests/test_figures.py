# SPDX-License-Identifier: MIT
"""Figures: the maps lie where they belong, on one scale, and no text is cut or overlaps another."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import tiny_model
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import findSystemFonts, fontManager, get_font
from PIL import Image

from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations import fonts
from prompt_cam_hf.explanations.compare import Comparison, compare
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.explanations.figures import MapStyle, overlay, plot_trait_maps
from prompt_cam_hf.explanations.fonts import keep_order
from prompt_cam_hf.explanations.removal import remove_trait
from prompt_cam_hf.explanations.sheet import text_width, wrap_text
from prompt_cam_hf.loading import Classifier

GREY = Image.new("RGB", (80, 40), (120, 120, 120))
LONG = "Lampornis amethystinus margaritae (amethyst-throated mountain-gem, subspecies of the Sierra Madre del Sur)"


@pytest.fixture(scope="module")
def classifier():
    model = tiny_model(
        backbone_fields={"hidden_size": 48, "num_attention_heads": 12},
        id2label={0: LONG, 1: "W" * 90, 2: "Jay", 3: "a class", 4: "another"},
    )
    return Classifier(model, build_image_processor(32))


def axes_with_images(figure):
    """All but the colour bars."""
    return [axis for axis in figure.axes if axis.images and not axis.axison]


def texts_of(figure):
    """Titles of rows and labels of colour bars."""
    return [text for part in figure.subfigs for text in part.texts]


def test_overlay_is_brightest_where_the_map_is():
    trait_map = np.zeros((4, 8))
    trait_map[1, 6] = 0.5
    image = overlay(GREY, trait_map, vmax=0.5).astype(int)
    assert image.shape == (40, 80, 3)
    row, column = np.unravel_index(image.sum(-1).argmax(), (40, 80))
    assert row // 10 == 1 and column // 10 == 6


@pytest.mark.parametrize(
    ("value", "signed", "opacity", "colour"),
    [
        (0.0, False, 0.25, (0.00, 0.00, 0.01)),  # the ends of matplotlib's inferno, and its middle
        (0.4, False, 0.55, (0.74, 0.21, 0.33)),
        (0.8, False, 0.85, (0.99, 1.00, 0.64)),
        (0.0, True, 0.0, (0.87, 0.87, 0.87)),
        (0.8, True, 0.9, (0.71, 0.02, 0.15)),  # the ends of coolwarm
        (-0.8, True, 0.9, (0.23, 0.30, 0.75)),
    ],
)
def test_the_stronger_a_value_the_more_its_colour_covers(value, signed, opacity, colour):
    drawn = overlay(GREY, np.full((2, 2), value), vmax=0.8, signed=signed)
    expected = [(1 - opacity) * 120 + opacity * 255 * part for part in colour]
    assert drawn.reshape(-1, 3).tolist() == [pytest.approx(expected, abs=2)] * (80 * 40)


def test_signs_have_colours():
    trait_map = np.array([[0.4, 0.0, -0.4]])
    image = overlay(Image.new("RGB", (90, 30), (120, 120, 120)), trait_map, vmax=0.4, signed=True).astype(int)
    red, grey, blue = image[15, 15], image[15, 45], image[15, 75]
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 100
    assert np.abs(grey - 120).max() <= 5


def test_what_was_not_seen_turns_pale():
    image = overlay(GREY, np.ones((2, 2)), vmax=1, box=(20, 0, 60, 40))
    assert (image[:, :20] == image[0, 0]).all() and (image[:, 60:] == image[0, 0]).all()
    assert image[0, 0].min() > 180
    assert np.array_equal(image[:, 20:60], overlay(GREY, np.ones((2, 2)), vmax=1)[:, 20:60])


def bar_texts(figure):
    """The texts of the last colour bar's ticks."""
    *_, bar = [axis for axis in figure.axes if axis.axison]
    return [label.get_text() for label in bar.get_xticklabels()]


def all_text(figure):
    return " ".join(" ".join(text.get_text() for text in texts_of(figure)).split())


def test_each_map_has_its_own_scale_or_all_have_one():
    maps = np.stack([np.full((2, 2), 0.2), np.full((2, 2), 0.05)])
    figure = plot_trait_maps(GREY, maps, heads=[1, 0], title="Blue Jay")
    axes = axes_with_images(figure)
    images = [axis.images[0].get_array() for axis in axes]
    assert np.array_equal(images[0], np.asarray(GREY))
    assert np.array_equal(images[1], overlay(GREY, maps[1], vmax=0.05))
    assert np.array_equal(images[2], overlay(GREY, maps[0], vmax=0.2))
    titles = ["image", "head 1: peak 5.0%\n20% on patches", "head 0: peak 20%\n80% on patches"]
    assert [axis.get_title() for axis in axes] == titles
    assert texts_of(figure)[0].get_text() == "Blue Jay"
    assert "each map on a scale of its own" in all_text(figure) and bar_texts(figure) == ["0", "half", "peak"]

    one = plot_trait_maps(GREY, maps, heads=[1, 0], scale="figure")
    assert np.array_equal(axes_with_images(one)[1].images[0].get_array(), overlay(GREY, maps[1], vmax=0.2))
    assert [axis.get_title() for axis in axes_with_images(one)] == titles
    assert "one scale for all maps" in all_text(one) and bar_texts(one) == ["0", "10%", "20%"]


def test_a_given_scale_is_kept():
    figure = plot_trait_maps(GREY, np.full((1, 2, 2), 0.2), vmax=0.8)
    drawn = axes_with_images(figure)[1].images[0].get_array()
    assert np.array_equal(drawn, overlay(GREY, np.full((2, 2), 0.2), vmax=0.8))


def test_outlines_are_at_half_of_the_scale():
    maps = np.zeros((2, 4, 8))
    maps[0, 1, 6], maps[1, 2, 1] = 0.5, 0.2
    outlined = axes_with_images(plot_trait_maps(GREY, maps, outline=True))
    assert [len(axis.collections) for axis in outlined] == [0, 1, 1]
    x, y = outlined[1].collections[0].get_paths()[0].vertices.mean(axis=0)
    assert (x // 10, y // 10) == (6, 1)
    one_scale = axes_with_images(plot_trait_maps(GREY, maps, outline=True, scale="figure"))
    assert [len(axis.collections) for axis in one_scale] == [0, 1, 0]


@pytest.mark.parametrize("scale", [None, "head", "figure"])
def test_explanations_are_drawn_head_by_head(classifier, scale):
    explanation = explain(classifier, GREY, ["Jay", "a class"], kind="evidence")
    figure = explanation.figure(heads=3, scale=scale)
    axes = axes_with_images(figure)
    shown = [(traits, head) for traits in explanation.classes for head in traits.head_order[:3]]
    for row, traits in enumerate(explanation.classes):
        for column, head in enumerate(traits.head_order[:3], 1):
            axis = axes[4 * row + column]
            same = [
                np.abs(other.maps[h]).max()
                for other, h in shown
                if scale == "figure" or (h == head and (scale == "head" or other is traits))
            ]
            expected = overlay(GREY, traits.maps[head], max(same), signed=True, box=explanation.box)
            assert np.array_equal(axis.images[0].get_array(), expected)
            name, of_sum, on_patches = axis.get_title().split("\n")
            values = traits.maps[head].ravel().tolist()
            assert name == f"head {head}: peak {max(values, key=abs):+.2g}"
            assert of_sum == f"sum {sum(values):+.2f}"
            assert on_patches == f"{traits.attention_on_patches[head]:.0%} on patches"
        assert any(
            text.get_text().startswith(f"{traits.label} ({traits.probability:.1%})") for text in texts_of(figure)
        )


def test_comparisons_are_drawn_on_one_scale_a_head(classifier):
    comparison = compare(classifier, GREY, ["Jay", "a class"])
    figure = comparison.figure(heads=2)
    axes = axes_with_images(figure)
    order = comparison.top_heads(2)
    maps = [*(traits.maps for traits in comparison.classes), comparison.shared, comparison.own[0]]
    assert len(axes) == 4 * 3 and bar_texts(figure) == ["-highest peak", "0", "+highest peak"]
    for row, drawn in enumerate(maps):
        for column, head in enumerate(order, 1):
            vmax = max(traits.maps[head].max() for traits in comparison.classes)
            expected = overlay(GREY, drawn[head], vmax, signed=row == 3, box=comparison.explanation.box)
            assert np.array_equal(axes[3 * row + column].images[0].get_array(), expected)


def test_large_images_are_drawn_small_and_in_place():
    """Twelve million pixels would take a gigabyte and seconds; the outline of a region lies where it did."""
    image = Image.new("RGB", (4000, 3000), (120, 120, 120))
    region = np.zeros((3000, 4000), bool)
    region[600:1200, 3000:3600] = True
    trait_map = np.zeros((3, 4))
    trait_map[1, 3] = 0.5
    style = MapStyle(image, (1000.0, 0.0, 4000.0, 3000.0), "attention", {0: 0.5}, False, "head")
    for panel in (style.image_panel("image", region), style.draw(0, trait_map)):
        height, width, _ = panel.pixels.shape
        assert 900_000 < height * width <= 1_001_000 and width / height == pytest.approx(4 / 3, rel=0.01)
    rows, columns = np.nonzero(style.image_panel("image", region).outline)
    assert [rows.min() / height, rows.max() / height] == pytest.approx([0.2, 0.4], abs=0.01)
    assert [columns.min() / width, columns.max() / width] == pytest.approx([0.75, 0.9], abs=0.01)
    brightness = style.draw(0, trait_map).pixels.astype(int).sum(-1)
    brightness[:, : width // 4 + 1] = 0  # pale: not seen
    row, column = np.unravel_index(brightness.argmax(), brightness.shape)
    assert 1 / 3 < row / height < 2 / 3 and column / width > 0.25 + 0.75 * 3 / 4


def check_layout(figure):
    """Nothing reaches over the edge, no two texts overlap, no text lies on an image."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    texts = texts_of(figure)
    for axis in figure.axes:
        texts += [axis.title, *(axis.get_xticklabels() if axis.axison else ())]
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    panels = [axis.get_window_extent(renderer) for axis in figure.axes]
    for number, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, texts[number]
        for other in [*boxes[number + 1 :], *panels]:
            across = min(box.x1, other.x1) - max(box.x0, other.x0)
            down = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert across <= 0.5 or down <= 0.5, (texts[number], other)
    for number, panel in enumerate(panels):
        assert not any(panel.overlaps(other) for other in panels[number + 1 :])


@pytest.mark.parametrize("size", [(64, 64), (400, 30), (20, 300), (2000, 20), (20, 2000)])
def test_nothing_is_cut_and_nothing_overlaps(classifier, size):
    image = Image.new("RGB", size, (90, 120, 150))
    explanation = explain(classifier, image, [0, 1, 2], kind="evidence")
    for heads, outline, scale in ((1, False, "figure"), (4, True, None)):
        figure = explanation.figure(heads=heads, outline=outline, scale=scale)
        check_layout(figure)
        assert figure.get_figwidth() <= 13
        panel = axes_with_images(figure)[0].get_window_extent()
        assert min(panel.width, panel.height) / figure.dpi > 0.35  # inches
        assert ("times as high as they are" in all_text(figure)) == (size[0] > 4 * size[1])
        assert ("times as wide as they are" in all_text(figure)) == (size[1] > 4 * size[0])
    check_layout(replace(explanation, classes=explanation.classes[:1]).figure(heads=12))
    check_layout(Comparison(explanation, LONG).figure(heads=1, outline=True))
    check_layout(remove_trait(classifier, image, (1, 1, 9, 9), 1).figure(heads=2))
    check_layout(plot_trait_maps(image, explanation.classes[0].maps[:2], title="W" * 300, outline=True))


@pytest.mark.parametrize(
    ("columns", "width", "font_size"),
    [(None, 85, None), (3, 85, 8), (None, 175, None), (6, 175, 5), (2, 40, 12), (13, None, None), (2, None, 14)],
)
def test_a_figure_fits_its_page(classifier, columns, width, font_size):
    explanation = explain(classifier, GREY, [2, 3], kind="evidence")
    figure = explanation.figure(5, columns=columns, width=width, font_size=font_size)
    check_layout(figure)
    if width is not None:
        assert figure.get_figwidth() * 25.4 == pytest.approx(width)
    lines = {round(axis.get_window_extent().y0) for axis in axes_with_images(figure)}
    expected = {85: 3, 175: 5}.get(width) if columns is None else min(columns, 6)
    assert len(lines) == 2 * math.ceil(5 / (expected - 1))
    sizes = {axis.title.get_fontsize() for axis in axes_with_images(figure)}
    assert sizes == {font_size} if font_size else 6 <= max(sizes) <= 10 and len(sizes) == 1
    check_layout(Comparison(explanation, LONG).figure(2, width=60, columns=2))
    check_layout(remove_trait(classifier, GREY, (1, 1, 60, 30), 1).figure(2, width=85))


def test_pages_that_cannot_be():
    maps = np.ones((12, 2, 2))
    for options, message in (
        ({"width": 20}, "width=20; it must be from 30 to 1000"),
        ({"columns": 1}, "columns=1; it must be from 2 to 50"),
        ({"font_size": 99}, "font_size=99; it must be from 4 to 40"),
        ({"width": 60, "columns": 10}, "A width of 60 mm is too narrow for 10 columns; ask for fewer"),
        ({"width": math.nan}, "width=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_trait_maps(GREY, maps, **options)


def test_files_have_the_width_that_was_asked_for(classifier, tmp_path):
    explanation = explain(classifier, GREY)
    for suffix in ("png", "pdf", "svg"):
        explanation.save(tmp_path / f"figure.{suffix}", heads=2, width=85)
    image = Image.open(tmp_path / "figure.png")
    assert image.width / 300 * 25.4 == pytest.approx(85, abs=0.1)  # at 300 dots an inch
    assert (
        b"/Type0" in (tmp_path / "figure.pdf").read_bytes() and b"Type3" not in (tmp_path / "figure.pdf").read_bytes()
    )
    (width,) = re.findall(rb"/MediaBox \[ ?0 0 ([0-9.]+) ", (tmp_path / "figure.pdf").read_bytes())
    assert float(width) / 72 * 25.4 == pytest.approx(85, abs=0.1)
    (width,) = re.findall(r'<svg [^>]*?width="([0-9.]+)pt"', (tmp_path / "figure.svg").read_text())
    assert float(width) / 72 * 25.4 == pytest.approx(85, abs=0.1)


NAMES = {
    "Chinese": "红嘴相思鸟",
    "Japanese": "アオサギ",
    "Korean": "왜가리",
    "Arabic": "أبو الحناء",
    "Hebrew": "חוחית",
    "Hindi": "नीलकंठ",
    "LaTeX": r"$\undefined{ and $5",
}


@pytest.fixture
def forgetful(monkeypatch):
    """The fonts are looked for anew, and so is the first warning."""
    monkeypatch.setattr(fonts, "_warned", False)
    fonts._more_families.cache_clear()
    yield
    fonts._more_families.cache_clear()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_any_script_are_drawn_or_their_characters_replaced(name, forgetful, caplog, tmp_path):
    """matplotlib warns of every character that it cannot draw, and warnings are errors here."""
    installed = [
        get_font(path)
        for path in findSystemFonts() + [entry.fname for entry in fontManager.ttflist]
        if "LastResort" not in path
    ]
    figure = plot_trait_maps(GREY, np.ones((1, 2, 2)), title=f"{name} (99%)")
    figure.savefig(tmp_path / "figure.png")
    figure.savefig(tmp_path / "figure.pdf")
    check_layout(figure)
    title = texts_of(figure)[0].get_text().replace("\u200e", "")
    known = [any(font.get_char_index(ord(char)) for font in installed) for char in name]
    assert title == "".join(c if ok else "□" for c, ok in zip(name, known, strict=True)) + " (99%)"
    assert len(caplog.records) == (0 if all(known) else 1)


def test_a_missing_font_is_told_once(forgetful, caplog, monkeypatch):
    monkeypatch.setattr(fonts, "_add_new_fonts", lambda: None)
    monkeypatch.setattr(fonts.fontManager, "ttflist", [e for e in fontManager.ttflist if e.name == "DejaVu Sans"])
    for name in ("红嘴相思鸟", "喜鹊", "아오"):
        figure = plot_trait_maps(GREY, np.ones((1, 2, 2)), title=f"Jay {name}")
        assert texts_of(figure)[0].get_text() == "Jay " + "□" * len(name)
    (record,) = caplog.records
    assert "No installed font has some characters of the names, such as 嘴 思 相 红 鸟;" in record.getMessage()


def test_names_from_right_to_left_do_not_turn_the_line():
    assert keep_order("Jay (99%)") == "Jay (99%)"
    arabic, hebrew = NAMES["Arabic"], NAMES["Hebrew"]
    marked = keep_order(f"level: {arabic} (99%), {hebrew}")
    assert marked == f"level: \u200e{arabic}\u200e (99%), \u200e{hebrew}\u200e"


def test_lines_fit():
    for text in ("one two three four five six seven " * 5, "W" * 200, "中文名字" * 30, "i" * 400):
        lines = wrap_text(text, 2.0, 10)
        assert all(text_width(line, 10) <= 2.0 for line in lines)
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert wrap_text("", 2.0, 10) == [] and wrap_text("short", 2.0, 10) == ["short"]


def test_an_empty_map_is_drawn_and_wrong_input_refused():
    assert np.isfinite(overlay(GREY, np.zeros((2, 2)), vmax=0)).all()
    assert plot_trait_maps(GREY, np.zeros((2, 2, 2)), outline=True).axes
    assert plot_trait_maps(Image.new("L", (30, 30)), np.zeros((2, 2, 2)), heads=[]).axes
    with pytest.raises(ValueError, match=r"must be \(heads, rows, cols\)"):
        plot_trait_maps(GREY, np.zeros((2, 2)))
    with pytest.raises(ValueError, match="heads 0 to 1 only"):
        plot_trait_maps(GREY, np.zeros((2, 2, 2)), heads=[2])
