# SPDX-License-Identifier: MIT
"""`write_page`: the HTML page of an atlas, within bounds of its size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from prompt_cam_hf.class_atlas.collect import MapSums, Options, opened
from prompt_cam_hf.class_atlas.summary import ClassSummary, Confusion, Example, Summary
from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.explanations.figures import overlay
from prompt_cam_hf.explanations.maps import map_box
from prompt_cam_hf.explanations.ranking import rank_heads_from_state
from prompt_cam_hf.html import EmbeddedImage, embed_pixels, embed_thumbnail, render_page
from prompt_cam_hf.loading import Classifier
from prompt_cam_hf.version import __version__

# Bounds of the page's size: 2,600 images of 5 kB are 17.3 MB in base64. All else is a few kB a class.
MAX_IMAGES, MAX_IMAGE_BYTES = 2600, 5000
MAX_CLASSES = 1000
_THUMBNAIL_SIDE = 160  # pixels
_MAX_HEADS_SHOWN = 4
_MAX_MISTAKES_SHOWN = 3
_HEADS_PER_CONFUSED_CLASS = 2
NUM_CONFUSIONS, NUM_CONFUSION_EXAMPLES = 20, 2


@dataclass(frozen=True)
class ShownMap:
    """A map with its title, and what it shows in words."""

    image: EmbeddedImage
    title: str
    alt: str


@dataclass(frozen=True)
class Drawn:
    """An image beside some of its maps."""

    name: str
    image: EmbeddedImage
    maps: list[ShownMap]
    caption: str


def write_page(
    classifier: Classifier,
    images: LabelledImages,
    summary: Summary,
    sums: MapSums,
    options: Options,
    model_name: str,
    batch_size: int,
) -> str:
    """Render the page as HTML. The images that it shows are opened and run through the network again.

    Raises:
        OSError: an image that is to be shown can no longer be read.
    """
    names = classifier.model.config.id2label
    shown = sorted(
        sorted(summary.classes, key=lambda found: (-found.labelled - found.predicted, found.number))[:MAX_CLASSES],
        key=lambda found: found.number,
    )
    heads_shown = min(options.top_heads, _MAX_HEADS_SHOWN)
    chosen = _choose_examples(shown, summary.confusions, heads_shown)
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
        model_name=model_name,
        origin=images.origin,
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
    shown: list[ClassSummary], confusions: list[Confusion], heads_shown: int
) -> list[tuple[ClassSummary, list[Example]]]:
    """The examples that the page has room for: equally many of each class, or one of each of the largest classes."""
    room = MAX_IMAGES - sum((1 + 2 * _HEADS_PER_CONFUSED_CLASS) * len(confusion.examples) for confusion in confusions)
    room //= 1 + heads_shown
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
    tasks = iter(tqdm(wanted, desc="Drawing examples", unit="img", disable=None))
    for batch in opened(images, classifier.image_processor, batches):
        for _, image, values in batch:
            example, classes = next(tasks)
            if values is None or isinstance(image, str):
                raise OSError(f"{example.name} could be read before, but no longer: {image}")
            maps, orders = _look_again(classifier, values, classes, options)
            small = image.copy()
            small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
            if len(classes) == 1:
                panels = [(0, head, f"head {head}") for head in orders[0, :heads_shown].tolist()]
                caption = f"{example.name} (clearness {example.clearness:.2f})"
            else:
                panels = [
                    (k, head, f"{names[number]}: head {head}")
                    for k, number in enumerate(classes)
                    for head in orders[k, :_HEADS_PER_CONFUSED_CLASS].tolist()
                ]
                caption = f"{example.name}: top maps of the class that it was taken for, and of its own"
            vmax = max(maps[k, head].max() for k, head, _ in panels)
            box = map_box(classifier.model, classifier.image_processor, small)
            yield Drawn(
                example.name,
                _embed(small),
                [
                    ShownMap(
                        _embed(Image.fromarray(overlay(small, maps[k, head], vmax, box=box))),
                        f"{title}, {maps[k, head].sum():.0%} on patches",
                        f"{title}, strongest {strongest_place(maps[k, head])}",
                    )
                    for k, head, title in panels
                ],
                caption,
            )


def _embed(image: Image.Image) -> EmbeddedImage:
    return embed_thumbnail(image, _THUMBNAIL_SIDE, MAX_IMAGE_BYTES)


@torch.inference_mode()
def _look_again(
    classifier: Classifier, pixel_values: torch.Tensor, classes: tuple[int, ...], options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Maps (k, heads, rows, cols) and orders (k, heads) of k classes on one image."""
    model = classifier.model
    state = model.last_layer_state(pixel_values.to(model.device))
    asked = torch.tensor([classes], device=model.device)
    ranking = rank_heads_from_state(model, state, model.last_layer_logits(state), asked, options.method, options.blur)
    return model.trait_maps(state, asked)[0].cpu().numpy(), ranking.order[0].cpu().numpy()


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
    vmax = max(max((mean[head].max() for head in found.heads[:heads_shown]), default=0), np.finfo(np.float32).tiny)
    mistaken = sorted(found.mistaken.items(), key=lambda item: (-item[1], item[0]))[:_MAX_MISTAKES_SHOWN]
    return {
        "found": found,
        "drawn": drawn,
        "mistaken": mistaken,
        "mean_maps": [
            ShownMap(
                embed_pixels(np.rint(255 * mpl.colormaps["inferno"](mean[head] / vmax)[..., :3]).astype(np.uint8)),
                f"head {head}, among the top {top_heads} in {in_top[head]:.0%}",
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
