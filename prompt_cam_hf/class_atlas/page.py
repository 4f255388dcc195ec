# SPDX-License-Identifier: MIT
"""`write_page`: the HTML page of an atlas, within bounds of its size."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import torch

from prompt_cam_hf.class_atlas.collect import MapSums, Options, opened
from prompt_cam_hf.class_atlas.summary import ClassSummary, Confusion, Example, Summary
from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.explanations.maps import map_box
from prompt_cam_hf.explanations.ranking import rank_heads_from_state
from prompt_cam_hf.html import (
    Drawn,
    DrawnMap,
    EmbeddedImage,
    embed_map,
    embed_pixels,
    embed_thumbnail,
    percent,
    render_page,
    share_of,
)
from prompt_cam_hf.loading import Classifier
from prompt_cam_hf.progress import follow
from prompt_cam_hf.version import __version__

# Bounds of the page's size: 640 photos of 10 kB and 2,560 maps of 3 kB are 19 MB in base64.
MAX_PHOTOS, MAX_PHOTO_BYTES, _PHOTO_SIDE = 640, 10_000, 320
# A page of fewer photos has room for better ones.
_FEW_PHOTOS, _BETTER_PHOTO_BYTES, _BETTER_PHOTO_SIDE = 300, 24_000, 480
MAX_CLASSES = 1000
_MAX_HEADS_SHOWN = 4
_MAX_MISTAKES_SHOWN = 3
_HEADS_PER_CONFUSED_CLASS = 2
NUM_CONFUSIONS, NUM_CONFUSION_EXAMPLES = 20, 2


def write_page(
    classifier: Classifier,
    images: LabelledImages,
    summary: Summary,
    sums: MapSums,
    options: Options,
    facts: Mapping[str, Any],
    batch_size: int,
) -> str:
    """Render the page as HTML. The images that it shows are opened and run through the network again.

    `facts` is what atlas.json holds.

    Raises:
        OSError: an image that is to be shown can no longer be read.
    """
    names = classifier.model.config.id2label
    shown = sorted(
        sorted(summary.classes, key=lambda found: (-found.labelled - found.predicted, found.number))[:MAX_CLASSES],
        key=lambda found: found.number,
    )
    heads_shown = min(options.top_heads, _MAX_HEADS_SHOWN)
    chosen = _choose_examples(shown, summary.confusions)
    # Each image that is shown, with the classes whose maps are drawn beside it.
    wanted = [(example, (found.number,)) for found, examples in chosen for example in examples] + [
        (example, (confusion.prediction, confusion.label))
        for confusion in summary.confusions
        for example in confusion.examples
    ]
    drawn = dict(zip(wanted, _draw(classifier, images, wanted, heads_shown, options, batch_size), strict=True))
    entries = [
        _entry(found, [drawn[example, (found.number,)] for example in examples], sums, heads_shown, options.top_heads)
        for found, examples in chosen
    ]
    confusions = [
        {
            "label": confusion.label,
            "prediction": confusion.prediction,
            "count": confusion.count,
            "labelled": summary.classes[confusion.label].labelled,
            "drawn": [drawn[example, (confusion.prediction, confusion.label)] for example in confusion.examples],
        }
        for confusion in summary.confusions
    ]
    return render_page(
        "atlas.html.j2",
        facts=facts,
        names=names,
        on_page={found.number for found in shown},
        summary=summary,
        options=options,
        entries=entries,
        confusions=confusions,
        left_out_classes=len(summary.classes) - len(shown),
        fewer_examples=any(len(examples) < len(found.examples) for found, examples in chosen),
        version=__version__,
    )


def _choose_examples(
    shown: list[ClassSummary], confusions: list[Confusion]
) -> list[tuple[ClassSummary, list[Example]]]:
    """The examples that the page has room for: equally many of each class, or one of each of the largest classes."""
    room = MAX_PHOTOS - sum(len(confusion.examples) for confusion in confusions)
    count = max((len(found.examples) for found in shown), default=0)
    while count > 1 and sum(min(len(found.examples), count) for found in shown) > room:
        count -= 1
    largest = sorted((f for f in shown if f.examples), key=lambda found: (-found.used, found.number))
    with_room = {found.number for found in (largest[:room] if count == 1 else largest)}
    return [(found, found.examples[:count] if found.number in with_room else []) for found in shown]


def _draw(
    classifier: Classifier,
    images: LabelledImages,
    wanted: Sequence[tuple[Example, tuple[int, ...]]],
    heads_shown: int,
    options: Options,
    batch_size: int,
) -> Iterator[Drawn]:
    """Draw each image beside the top maps of its classes: more maps for one class, fewer of each for two."""
    names = classifier.model.config.id2label
    order = [example.index for example, _ in wanted]
    batches = (order[first : first + batch_size] for first in range(0, len(order), batch_size))
    photo = (_BETTER_PHOTO_SIDE, _BETTER_PHOTO_BYTES) if len(wanted) <= _FEW_PHOTOS else (_PHOTO_SIDE, MAX_PHOTO_BYTES)
    tasks = iter(follow(wanted, len(wanted), "Drawing examples", " images"))
    for batch in opened(images, classifier.image_processor, batches):
        for _, image, values in batch:
            example, classes = next(tasks)
            if values is None or isinstance(image, str):
                raise OSError(f"{example.name} could be read before, but no longer: {image}")
            probabilities, maps, orders = _look_again(classifier, values, classes, options)
            if len(classes) == 1:
                panels = [(0, head, f"head {head}") for head in orders[0, :heads_shown].tolist()]
                caption = f"probability {percent(probabilities[classes[0]])}"
                if len(names) > 1:
                    next_best = int(np.argsort(-probabilities, kind="stable")[1])
                    caption += f"; next {names[next_best]}, {percent(probabilities[next_best])}"
            else:
                panels = [
                    (k, head, f"{names[number]}: head {head}")
                    for k, number in enumerate(classes)
                    for head in orders[k, :_HEADS_PER_CONFUSED_CLASS].tolist()
                ]
                taken, own = classes
                caption = (
                    f"taken for {names[taken]} with {percent(probabilities[taken])}; its own class {names[own]} has "
                    f"{percent(probabilities[own])}"
                )
            yield Drawn(
                example.name,
                embed_thumbnail(image, *photo),
                [draw_map(maps[k, head], title) for k, head, title in panels],
                caption,
                share_of(map_box(classifier.model, classifier.image_processor, image), image.size),
            )


def draw_map(trait_map: np.ndarray, title: str) -> DrawnMap:
    """Draw the attention of a head, (rows, cols), on its own scale."""
    return DrawnMap(
        embed_map(trait_map),
        title,
        percent(float(trait_map.max())),
        f"{title}, strongest {strongest_place(trait_map)}",
    )


@torch.inference_mode()
def _look_again(
    classifier: Classifier, pixel_values: torch.Tensor, classes: tuple[int, ...], options: Options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probabilities (classes,), maps (k, heads, rows, cols) and orders (k, heads) of k classes on one image."""
    model = classifier.model
    state = model.last_layer_state(pixel_values.to(model.device))
    asked = torch.tensor([classes], device=model.device)
    logits = model.last_layer_logits(state).float()
    ranking = rank_heads_from_state(model, state, logits, asked, options.method, options.blur)
    found = (logits[0].softmax(dim=-1), model.trait_maps(state, asked)[0], ranking.order[0])
    probabilities, maps, orders = (one.cpu().numpy() for one in found)
    return probabilities, maps, orders


def strongest_place(trait_map: np.ndarray) -> str:
    """Where a map (rows, cols) is strongest, in words."""
    rows, cols = trait_map.shape
    row, col = np.unravel_index(np.argmax(trait_map), trait_map.shape)
    vertical = ("upper", "middle", "lower")[int(row) * 3 // rows]
    horizontal = ("left", "centre", "right")[int(col) * 3 // cols]
    return "in the middle" if (vertical, horizontal) == ("middle", "centre") else f"at the {vertical} {horizontal}"


def _entry(found: ClassSummary, drawn: list[Drawn], sums: MapSums, heads_shown: int, top_heads: int) -> dict[str, Any]:
    """What the template needs about a class."""
    in_top, in_sufficient = found.share(found.in_top), found.share(found.in_sufficient)
    on_patches, concentrated = found.share(found.on_patches), found.share(found.concentrated)
    mean = sums.mean(found.number)
    mistaken = sorted(found.mistaken.items(), key=lambda item: (-item[1], item[0]))[:_MAX_MISTAKES_SHOWN]
    return {
        "found": found,
        "drawn": drawn,
        "mistaken": mistaken,
        "mean_maps": [
            DrawnMap(
                _embed_grid(mean[head]),
                f"head {head}, among the top {top_heads} in {in_top[head]:.0%}",
                percent(float(mean[head].max())),
                f"Mean map of head {head}, strongest {strongest_place(mean[head])}",
            )
            for head in found.heads[:heads_shown]
            if found.used
        ],
        "heads": [
            {
                "number": head,
                "in_top": in_top[head],
                "in_sufficient": in_sufficient[head],
                "on_patches": on_patches[head],
                "concentration": concentrated[head],
            }
            for head in found.heads
        ],
    }


def _embed_grid(trait_map: np.ndarray) -> EmbeddedImage:
    """Embed a map patch by patch, in colours whose brightest is its highest value."""
    strength = trait_map / max(trait_map.max(), np.finfo(np.float32).tiny)
    return embed_pixels(np.rint(255 * mpl.colormaps["inferno"](strength)[..., :3]).astype(np.uint8))
