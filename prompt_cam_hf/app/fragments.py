# SPDX-License-Identifier: MIT
"""The pieces of the page that show results, as HTML; text from models and visitors is escaped.

Images are embedded: no file of a visitor's is written, and nothing is fetched.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image, ImageColor
from scipy.ndimage import binary_erosion

from prompt_cam_hf.app.session import Visit, with_first_heads
from prompt_cam_hf.explanations.explain import ClassScore, Explanation
from prompt_cam_hf.explanations.figures import MapStyle, Scale, overlay
from prompt_cam_hf.explanations.maps import resize_map
from prompt_cam_hf.explanations.removal import Removal
from prompt_cam_hf.explanations.sheet import OUTLINE_COLOUR, Panel
from prompt_cam_hf.html import EmbeddedImage, embed_pixels, embed_thumbnail
from prompt_cam_hf.messages import printable

# Pixels of the longer side.
_SMALL, _LARGE = 168, 640
_SMALL_BYTES, _LARGE_BYTES = 12_000, 160_000


def escape(text: str) -> str:
    """Text that shows as it is in HTML, without what would hide in it or turn it around."""
    return str(Markup.escape(printable(text)))


def _fill(template: str, **values: Any) -> Markup:
    shown = {name: printable(value) if type(value) is str else value for name, value in values.items()}
    return Markup(template).format(**shown)


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _img(image: EmbeddedImage, alt: str) -> Markup:
    template = '<img src="{uri}" width="{width}" height="{height}" alt="{alt}" draggable="false">'
    return _fill(template, uri=image.uri, width=image.width, height=image.height, alt=alt)


def _shrink(explanation: Explanation, side: int) -> Explanation:
    """The same with a smaller image, for drawing on."""
    image = explanation.image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    across, down = image.width / explanation.image.width, image.height / explanation.image.height
    left, top, right, bottom = explanation.box
    return replace(explanation, image=image, box=(left * across, top * down, right * across, bottom * down))


def _style(explanation: Explanation, scale: Scale) -> MapStyle:
    """How the maps of all heads and classes are drawn."""
    maps = ((head, trait_map) for traits in explanation.classes for head, trait_map in enumerate(traits.maps))
    return explanation.style(maps, False, scale)


def show_model(name: str, num_classes: int, num_heads: int) -> str:
    """The head of the page."""
    return str(
        _fill(
            "<h1>Which traits decide?</h1><p>Ask <b>{name}</b> about an image. It knows {classes} classes; for each, "
            "its {heads} heads look for traits, and the maps show where.</p>",
            name=name,
            classes=num_classes,
            heads=num_heads,
        )
    )


def show_refusal(words: str) -> str:
    """A sentence about an image that was refused."""
    return str(_fill('<p role="alert" class="pc-warning">{words}</p>', words=words))


def show_examples(shown: Sequence[tuple[int, str, EmbeddedImage]]) -> str:
    """Thumbnails to choose from."""
    template = '<button type="button" data-example="{number}">{image}<span>{name}</span></button>'
    buttons = [_fill(template, number=number, image=_img(image, ""), name=name) for number, name, image in shown]
    return str(
        _fill('<div class="pc-strip" role="group" aria-label="Examples">{buttons}</div>', buttons=_join(buttons))
    )


def _table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[Markup | str]]) -> Markup:
    head = _join(_fill('<th scope="col">{name}</th>', name=name) for name in columns)
    body = _join(
        _fill("<tr>{cells}</tr>", cells=_join(_fill("<td>{cell}</td>", cell=cell) for cell in row)) for row in rows
    )
    return _fill(
        '<div class="pc-scroll" tabindex="0" role="region" aria-label="{caption}"><table><caption>{caption}</caption>'
        "<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>",
        caption=caption,
        head=head,
        body=body,
    )


def _bar(probability: float) -> Markup:
    template = '<span class="pc-bar"><span style="width:{share:.1%}"></span></span>{probability}'
    return _fill(template, share=probability, probability=f"{probability:.1%}")


def _score_rows(scores: Iterable[ClassScore]) -> list[list[Markup | str]]:
    return [[str(score.rank), score.label, _bar(score.probability), f"{score.logit:.2f}"] for score in scores]


_SCORE_COLUMNS = ("rank", "class", "probability", "score")


def show_answer(visit: Visit) -> str:
    """The prediction, the five best classes, and the path through the tree."""
    best = visit.explanation.prediction
    asked = [score for score in visit.explanation.classes if score.rank > len(visit.explanation.top)]
    scores = [*visit.explanation.top, *sorted(asked, key=lambda score: score.rank)]
    path = Markup("")
    if visit.path is not None:
        steps = [
            _fill(
                "<li>{level}: <b>{label}</b> ({share}){conflict}</li>",
                level=level,
                label=told.prediction.label,
                share=f"{told.prediction.probability:.1%}",
                conflict=f", which {visit.path.conflicts[level]}" if level in visit.path.conflicts else "",
            )
            for level, told in visit.path.explanations.items()
        ]
        words = "The path through the tree of classes" if visit.path.consistent else "No path of the tree"
        path = _fill("<p>{words}:</p><ol>{steps}</ol>", words=words, steps=_join(steps))
    return str(
        _fill(
            '<p class="pc-best" role="status"><b>{label}</b> <span>{share}</span></p>{table}{path}',
            label=best.label,
            share=f"{best.probability:.1%}",
            table=_table("Best classes", _SCORE_COLUMNS, _score_rows(scores)),
            path=path,
        )
    )


def show_heads(visit: Visit, scale: Scale = "map") -> str:
    """For each class its verdict, and its heads' maps as buttons, the most important first."""
    small = _shrink(visit.explanation, _SMALL)
    style = _style(small, scale)
    rows = []
    for place, (traits, combined) in enumerate(zip(small.classes, visit.combined, strict=True)):
        panels = dict(zip(traits.head_order, traits.draw(style, traits.head_order)[1:], strict=True))
        buttons = [_head_button(visit, place, head, panel) for head, panel in panels.items()]
        all_heads = replace(style, scale="map").draw(0, combined)
        buttons.append(_head_button(visit, place, None, replace(all_heads, title="all heads: combined")))
        rows.append(
            _fill(
                '<section><h3>{label} <span>{share}</span></h3><p>{verdict}</p><div class="pc-strip" role="group" '
                'aria-label="Heads of {label}">{buttons}</div></section>',
                label=traits.label,
                share=f"{traits.probability:.1%}",
                verdict=traits.verdict,
                buttons=_join(buttons),
            )
        )
    return str(_join([*rows, _colour_bar(style)]))


def _head_button(visit: Visit, place: int, head: int | None, panel: Panel) -> Markup:
    name, _, caption = panel.title.replace("\n", ", ").partition(": ")
    image = embed_thumbnail(Image.fromarray(panel.pixels), _SMALL, _SMALL_BYTES)
    return _fill(
        '<button type="button" data-place="{place}" data-head="{head}" aria-pressed="{pressed}">{image}'
        "<span><b>{name}</b> {caption}</span></button>",
        place=place,
        head="" if head is None else head,
        pressed="true" if (place, head) == (visit.place, visit.head) else "false",
        image=_img(image, f"Map of {name} for {visit.explanation.classes[place].label}"),
        name=name,
        caption=caption,
    )


def _colour_bar(style: MapStyle) -> Markup:
    bar = style.colour_bar()
    ticks = _join(_fill("<span>{text}</span>", text=text) for _, text in bar.ticks)
    image = embed_pixels(np.ascontiguousarray(bar.colours))
    return _fill(
        '<figure class="pc-legend"><img src="{uri}" alt=""><div>{ticks}</div><figcaption>{label}</figcaption>'
        "</figure>",
        uri=image.uri,
        ticks=ticks,
        label=bar.label,
    )


def blend(style: MapStyle, trait_map: np.ndarray, vmax: float, opacity: float, threshold: float) -> Image.Image:
    """The image with a map over it, as figures draw it, where the map reaches a threshold.

    Args:
        style: The image, its box, and whether there are values below 0.
        trait_map: (rows, cols).
        vmax: The value of the brightest colour.
        opacity: 0 shows the image alone, 1 the map as in figures.
        threshold: A share of `vmax`; what is below shows the image alone.
    """
    drawn = overlay(style.image, trait_map, vmax, signed=style.signed, box=style.box).astype(np.float32)
    image = np.asarray(style.image.convert("RGB"), np.float32)
    strength = np.abs(resize_map(trait_map, style.image.size, style.box)) / max(vmax, np.finfo(np.float32).tiny)
    weight = np.where(strength >= threshold, opacity, 0)[..., None]
    return Image.fromarray(np.rint(image + weight * (drawn - image)).astype(np.uint8))


def show_large(visit: Visit, scale: Scale = "map", opacity: float = 1, threshold: float = 0) -> str:
    """The map that is looked at, large; with a second class also its map, what both share, and the difference."""
    large = _shrink(visit.explanation, _LARGE)
    traits, head, hint = visit.traits, visit.head, ""
    if head is None:
        style, trait_map = _style(large, "map"), visit.combined[visit.place]
        panels = [(f"{traits.label}: all heads, combined", trait_map, style)]
        hint = "" if visit.comparison is None else "Click one head to see it beside the second class."
    elif visit.comparison is None:
        style, trait_map = _style(large, scale), traits.maps[head]
        panels = [(f"{traits.label}: head {head}", trait_map, style)]
    else:
        compared = visit.comparison
        first, second = compared.classes
        # What is compared has one scale.
        style = _style(replace(large, classes=compared.classes), "head" if scale == "map" else scale)
        trait_map = first.maps[head]
        panels = [
            (f"A: {first.label}: head {head}", trait_map, style),
            (f"B: {second.label}: head {head}", second.maps[head], style),
            (f"shared by A and B: {compared.overlap[head]:.0%}", compared.shared[head], style),
            ("A - B", compared.own[0][head], replace(style, difference=True)),
        ]
    vmax = float(np.abs(trait_map).max()) if head is None or style.scale == "map" else style.vmax[head]
    figures = [
        _fill(
            "<figure>{image}<figcaption>{title}</figcaption></figure>",
            image=_img(
                embed_thumbnail(blend(drawn, values, vmax, opacity, threshold), _LARGE, _LARGE_BYTES), f"Map: {title}"
            ),
            title=title,
        )
        for title, values, drawn in panels
    ]
    bars = [_colour_bar(panel[2]) for panel in (panels[0], *panels[3:])]
    return str(
        _fill(
            '<p>{hint}</p><div class="pc-panels pc-{count}">{figures}</div>{bars}',
            hint=hint,
            count=len(figures),
            figures=_join(figures),
            bars=_join(bars),
        )
    )


def show_canvas(visit: Visit) -> str:
    """The image to paint on, and the tools."""
    image = embed_thumbnail(visit.explanation.image, _LARGE, _LARGE_BYTES)
    return str(
        _fill(
            '<div class="pc-tools" role="group" aria-label="Tools">'
            '<label><input type="radio" name="pc-tool" value="box" checked> box</label>'
            '<label><input type="radio" name="pc-tool" value="brush"> brush</label>'
            '<label>width <input type="range" name="pc-width" min="2" max="25" value="8" aria-label="brush width">'
            '</label><button type="button" data-clear>clear</button></div>'
            '<div class="pc-paint" tabindex="0" role="application" aria-label="The image to paint on. Arrow keys move '
            'a box, with Shift they change its size, Enter takes it, Escape clears.">{image}<canvas></canvas></div>',
            image=_img(image, "The image"),
        )
    )


def _outline(image: Image.Image, region: np.ndarray) -> np.ndarray:
    """An image with the edge of a region, (height, width) of the image before it was shrunk."""
    inside = np.asarray(Image.fromarray(region).resize(image.size))
    pixels = np.array(image)
    pixels[inside & ~binary_erosion(inside, iterations=2)] = ImageColor.getrgb(OUTLINE_COLOUR)
    return pixels


_TOLD = {"before": "before", "after": "without the region", "control": "without the control region"}


def show_removal(removal: Removal | None) -> str:
    """What became of the prediction, in words, as a table, and as the maps of the heads that mattered most before."""
    if removal is None:
        return "<p>What becomes of the prediction without a region is shown here.</p>"
    told = [getattr(removal, name) for name in _TOLD]
    rows = [
        [
            scores[0].label,
            *(f"{score.probability:.1%}" for score in scores),
            *(f"{score.logit:.2f}" for score in scores),
        ]
        for scores in removal.scores()
    ]
    order = removal.before.classes[0].head_order[:3]
    # Each head has one scale before and after.
    maps = [(head, explanation.classes[0].maps[head]) for explanation in told for head in order]
    strips = []
    regions = (removal.mask, removal.mask, removal.control_mask)
    for words, explanation, region in zip(_TOLD.values(), told, regions, strict=True):
        small = _shrink(explanation, _SMALL)
        style, best = small.style(maps, False, "head"), explanation.prediction
        panels = small.classes[0].draw(style, order)[1:]
        drawn = [("region outlined", _outline(small.image, region))]
        drawn += [(panel.title.replace("\n", ", "), panel.pixels) for panel in panels]
        figures = [
            _fill(
                "<figure>{image}<figcaption>{name}</figcaption></figure>",
                image=_img(embed_thumbnail(Image.fromarray(pixels), _SMALL, _SMALL_BYTES), f"{words}: {name}"),
                name=name,
            )
            for name, pixels in drawn
        ]
        strips.append(
            _fill(
                '<section><h4>{words}: <b>{label}</b> ({share})</h4><div class="pc-strip">{figures}</div></section>',
                words=words,
                label=best.label,
                share=f"{best.probability:.1%}",
                figures=_join(figures),
            )
        )
    columns = ("class", "probability", "without", "control", "score", "without", "control")
    warnings = _join(_fill('<p class="pc-warning">{words}</p>', words=words) for words in removal.warnings)
    return str(
        _fill(
            '<p role="status"><b>{verdict}</b></p>{warnings}{strips}{table}',
            verdict=removal.verdict,
            warnings=warnings,
            strips=_join(strips),
            table=_table("Scores before and after", columns, rows),
        )
    )


def show_kept(visit: Visit, count: int) -> str:
    """The scores when the class that is looked at keeps its first heads only."""
    traits, scores = visit.traits, with_first_heads(visit, count)
    kept = ", ".join(map(str, traits.head_order[:count])) or "none"
    own = next(score for score in scores if score.number == traits.number)
    top = scores[:5] if own in scores[:5] else (*scores[:5], own)
    words = f"{traits.label} with {count} of {len(traits.maps)} heads ({kept}): score {own.logit:.2f}, rank {own.rank}"
    return str(
        _fill(
            '<p role="status">{words}</p>{table}',
            words=words,
            table=_table("Scores with these heads", _SCORE_COLUMNS, _score_rows(top)),
        )
    )
