# SPDX-License-Identifier: MIT
"""Explaining images: the prediction, the scores of all classes, and the ranked traits of the classes asked about."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import ImageSource, find_images, image_name, open_image
from prompt_cam_hf.explanations.class_names import find_classes
from prompt_cam_hf.explanations.figures import MapStyle, Scale, check_head_count, find_scale
from prompt_cam_hf.explanations.maps import Box, MapKind, check_kind, map_box, maps_from_state
from prompt_cam_hf.explanations.ranking import (
    HeadRanking,
    RankingMethod,
    rank_heads_from_state,
    scores_with_first_heads,
)
from prompt_cam_hf.explanations.results import Result, format_table
from prompt_cam_hf.explanations.sheet import Panel, Row, Sheet
from prompt_cam_hf.loading import Classifier, ClassifierLike, as_classifier
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.outputs_prompt_cam import LastLayerState

# So many of the best classes are always listed, as many as transformers' own pipeline returns.
_TOP_CLASSES = 5


@dataclass(frozen=True)
class ClassScore:
    """The score of a class on an image.

    Attributes:
        label: Its name.
        number: Its number in the model.
        rank: 1 for the predicted class.
        logit: Its score before the softmax.
        probability: Its softmax probability, 0 to 1.
    """

    label: str
    number: int
    rank: int
    logit: float
    probability: float


@dataclass(frozen=True)
class ClassTraits(ClassScore):
    """The score, the maps and the ranked heads of a class on an image.

    Attributes:
        maps: (heads, rows, cols), float32, in head order; of the explanation's kind.
        attention_on_patches: For each head, the share of its attention that is on patches, 0 to 1.
        head_order: Heads, the most important first.
        head_scores: For each head, in head order, its score in the ranking; see `HeadRanking`.
        sufficient: The number of heads, taken in order, that keep the class on top when all others are blurred; None
            where the class is not on top even with all heads.
        num_smallest_sets: For the method "exact": the number of sets of that size that keep the class on top.
        scores_with_first_heads: The class's score with the first 0, 1, ... and all heads of `head_order` kept and the
            others blurred; the other classes' scores stay as they are.
    """

    maps: np.ndarray
    attention_on_patches: tuple[float, ...]
    head_order: tuple[int, ...]
    head_scores: tuple[float, ...]
    sufficient: int | None
    num_smallest_sets: int | None
    scores_with_first_heads: tuple[float, ...]

    @property
    def sufficient_heads(self) -> tuple[int, ...]:
        """The heads that keep the class on top when all others are blurred; none where it is not on top."""
        return self.head_order[: self.sufficient or 0]

    @property
    def verdict(self) -> str:
        """The place of the class and its sufficient traits, in words."""
        if self.sufficient is None:
            return f"rank {self.rank}"
        if self.sufficient == 0:
            words = "stays on top with every head blurred"
        elif self.rank > 1:
            words = f"with {_name_heads(self.sufficient_heads)} alone it would be on top"
        elif self.sufficient == len(self.head_order):
            words = "needs all heads"
        else:
            words = f"{_name_heads(self.sufficient_heads)} {'suffices' if self.sufficient == 1 else 'suffice'}"
        if self.num_smallest_sets is not None and self.num_smallest_sets > 1:
            words += f" (one of {self.num_smallest_sets} sets as small)"
        return f"{'predicted' if self.rank == 1 else f'rank {self.rank}'}: {words}"

    @property
    def heading(self) -> str:
        """The title over the class's maps in a figure."""
        return f"{self.label} ({self.probability:.1%}) - {self.verdict}"

    def draw(self, style: MapStyle, heads: Sequence[int]) -> list[Panel]:
        """The image, and the maps of some heads, as panels of a figure."""
        panels = [style.image_panel()]
        for head in heads:
            evidence = [f"sum {self.maps[head].sum():+.2f}"] if style.kind == "evidence" else []
            on_patches = f"{self.attention_on_patches[head]:.0%} on patches"
            panels.append(style.draw(head, self.maps[head], *evidence, on_patches))
        return panels


def _name_heads(heads: Sequence[int]) -> str:
    *first, last = map(str, heads)
    return f"heads {', '.join(first)} and {last}" if first else f"head {last}"


@dataclass(frozen=True, repr=False)
class Explanation(Result):
    """A model's prediction on an image, with the maps of the classes asked about.

    Attributes:
        image: The image, upright, RGB, in its own size.
        source: Its path, or an empty string.
        box: The part of the image that the maps lie on (left, top, right, bottom in pixels); see `map_box`.
        kind: What the maps show, "attention" or "evidence".
        method: How the heads were ranked, "greedy", "exact" or "shapley".
        scores: All classes, the predicted one first.
        classes: The classes asked about, in the order asked.
    """

    image: Image.Image
    source: str
    box: Box
    kind: MapKind
    method: RankingMethod
    scores: tuple[ClassScore, ...]
    classes: tuple[ClassTraits, ...]

    @property
    def prediction(self) -> ClassScore:
        """The predicted class."""
        return self.scores[0]

    @property
    def top(self) -> tuple[ClassScore, ...]:
        """The five best classes."""
        return self.scores[:_TOP_CLASSES]

    def __repr__(self) -> str:
        asked = ", ".join(traits.label for traits in self.classes)
        return (
            f"<Explanation of {self.source or 'an image'}: {self.prediction.label} "
            f"({self.prediction.probability:.1%}); {self.kind} maps of {asked}>"
        )

    def __str__(self) -> str:
        """The scores, and the ranked heads of each class asked about."""
        asked = [score for score in self.classes if score.rank > len(self.top)]
        parts = [
            f"{self.source or 'image'}: {self.prediction.label} ({self.prediction.probability:.1%})",
            format_table(
                ("rank", "class", "probability", "score"),
                [
                    (str(score.rank), score.label, f"{score.probability:.1%}", f"{score.logit:.2f}")
                    for score in (*self.top, *sorted(asked, key=lambda score: score.rank))
                ],
            ),
        ]
        value = "Shapley value" if self.method == "shapley" else "score when blurred"
        for traits in self.classes:
            parts.append(f"{traits.label} - {traits.verdict} ({self.method} ranking)")
            rows = [
                (
                    str(place),
                    str(head),
                    f"{traits.head_scores[head]:.2f}",
                    f"{traits.attention_on_patches[head]:.0%}",
                    *([f"{traits.maps[head].sum():+.2f}"] if self.kind == "evidence" else []),
                    "{}, {}".format(*self._peak(traits.maps[head])),
                )
                for place, head in enumerate(traits.head_order, 1)
            ]
            evidence = ["evidence"] if self.kind == "evidence" else []
            parts.append(format_table(("", "head", value, "on patches", *evidence, "strongest at x, y"), rows))
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image, in the types of JSON; maps are nested lists (heads, rows, cols)."""
        return {
            "image": self.source,
            "image_size": {"width": self.image.width, "height": self.image.height},
            "map_box": list(self.box),
            "kind": self.kind,
            "method": self.method,
            "top": [vars(score) for score in self.top],
            "classes": [
                {**vars(traits), "maps": traits.maps.tolist(), "sufficient_heads": list(traits.sufficient_heads)}
                for traits in self.classes
            ],
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each class and head, the most important head first."""
        rows = []
        for traits in self.classes:
            for place, head in enumerate(traits.head_order, 1):
                x, y = self._peak(traits.maps[head])
                rows.append(
                    {
                        "image": self.source,
                        "class": traits.label,
                        "class_rank": traits.rank,
                        "probability": traits.probability,
                        "score": traits.logit,
                        "head": head,
                        "head_rank": place,
                        "head_score": traits.head_scores[head],
                        "sufficient": head in traits.sufficient_heads,
                        "attention_on_patches": traits.attention_on_patches[head],
                        f"{self.kind}_sum": float(traits.maps[head].sum()),
                        f"{self.kind}_max": float(traits.maps[head].max()),
                        "max_x": x,
                        "max_y": y,
                    }
                )
        return rows

    def sheet(self, heads: int | None, outline: bool, scale: Scale) -> Sheet:
        """The image beside the most important heads' maps, one row a class."""
        count = check_head_count(heads, len(self.classes[0].maps))
        shown = [(traits, traits.head_order[:count]) for traits in self.classes]
        style = self.style(((head, traits.maps[head]) for traits, order in shown for head in order), outline, scale)
        return Sheet([Row(traits.heading, traits.draw(style, order)) for traits, order in shown], [style.colour_bar()])

    def style(self, drawn: Iterable[tuple[int, np.ndarray]], outline: bool, scale: Scale) -> MapStyle:
        """One style for all heads and maps that will be drawn."""
        return MapStyle(self.image, self.box, self.kind, find_scale(drawn, scale), outline, scale)

    def _peak(self, trait_map: np.ndarray) -> tuple[int, int]:
        """The middle of the strongest patch, x and y in pixels of the image."""
        rows, cols = trait_map.shape
        row, col = np.unravel_index(np.argmax(trait_map), trait_map.shape)
        left, top, right, bottom = self.box
        return round(left + (col + 0.5) / cols * (right - left)), round(top + (row + 0.5) / rows * (bottom - top))


def explain(
    model: ClassifierLike,
    images: ImageSource | Iterable[ImageSource],
    classes: str | int | Iterable[str | int] | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    kind: MapKind = "attention",
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
    batch_size: int = 8,
) -> Explanation | list[Explanation]:
    """Explain a model's predictions on images: scores, trait maps, and the heads that decide.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model (in evaluation mode) with `image_processor`.
        images: An image (a path, bytes, a PIL image, of any size and shape), a folder that is searched for images,
            or several images.
        classes: Names or numbers of the classes asked about; None: each image's predicted class.
        image_processor: For a loaded model.
        kind: "attention" (the paper's maps) or "evidence" (signed); see `prompt_cam_hf.explanations.maps`.
        method: How heads are ranked; see `rank_heads`.
        blur: As in `rank_heads`.
        interpolate_pos_encoding: As in the model's `forward`.
        batch_size: Images that go through the network at once.

    Returns:
        An `Explanation`; a list of them where several images or a folder were given.

    Raises:
        ValueError: a class does not exist, an image cannot be read, the model is not a Prompt-CAM, or an argument has
            an unknown value.
        OSError: an image or the model cannot be found.

    Example:
        >>> from prompt_cam_hf import explain
        >>> explanation = explain("my_model", "bird.jpg", ["Blue Jay", "Cardinal"])
        >>> print(explanation)
        >>> explanation.prediction.label
        >>> explanation.classes[0].maps.shape  # heads, rows, cols
        >>> explanation.save("traits.png", heads=3)
    """
    single = False
    if isinstance(images, str | os.PathLike) and Path(images).is_dir():
        images = find_images([images])
    elif isinstance(images, str | os.PathLike | bytes | Image.Image | Mapping):
        single, images = True, [images]
    explanations = list(
        explain_each(
            as_classifier(model, image_processor),
            images,
            classes,
            kind=kind,
            method=method,
            blur=blur,
            interpolate_pos_encoding=interpolate_pos_encoding,
            batch_size=batch_size,
        )
    )
    return explanations[0] if single else explanations


def explain_each(
    classifier: Classifier,
    images: Iterable[ImageSource],
    classes: str | int | Iterable[str | int] | None = None,
    *,
    kind: MapKind = "attention",
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
    batch_size: int = 8,
) -> Iterator[Explanation]:
    """Explain images one after another, with at most one batch of them in memory; arguments as in `explain`."""
    check_kind(kind)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it must be at least one image.")
    model = classifier.model
    numbers = None if classes is None else find_classes(model.config.id2label, classes)
    remaining, prepared = iter(images), model.prepared()
    while sources := list(islice(remaining, batch_size)):
        opened = [open_image(source) for source in sources]
        processed = [classifier.image_processor(image, return_tensors="pt")["pixel_values"] for image in opened]
        # Some image processors keep an image's shape, and only images of one shape fit into a batch.
        for _, group in groupby(range(len(opened)), key=lambda index: processed[index].shape):
            members = list(group)
            pixel_values = torch.cat([processed[index] for index in members]).to(model.device)
            with torch.no_grad(), prepared:
                state = model.last_layer_state(pixel_values, interpolate_pos_encoding)
            answers = read_state(model, state, numbers, kind, method, blur)
            for index, (scores, traits) in zip(members, answers, strict=True):
                box = map_box(model, classifier.image_processor, opened[index])
                yield Explanation(opened[index], image_name(sources[index]), box, kind, method, scores, traits)


def read_state(
    model: PromptCAMForImageClassification,
    state: LastLayerState,
    numbers: list[int] | None,
    kind: MapKind,
    method: RankingMethod,
    blur: Literal["tokens", "patches"],
) -> Iterator[tuple[tuple[ClassScore, ...], tuple[ClassTraits, ...]]]:
    """The scores of all classes and the traits of those asked about, for each image of a batch.

    The model uses the prompt set that the state was computed with; for None as `numbers`, the predicted class is read.
    """
    with torch.no_grad():
        logits = model.last_layer_logits(state)
    asked = logits.argmax(dim=-1, keepdim=True)
    if numbers is not None:
        asked = torch.tensor(numbers, device=logits.device).expand(len(logits), -1)
    ranking = rank_heads_from_state(model, state, logits, asked, method, blur)
    with_first_heads = scores_with_first_heads(model, state, asked, ranking.order, blur).cpu()
    attention = maps_from_state(model, state, asked)
    on_patches = attention.sum(dim=(-2, -1)).cpu()
    maps = (attention if kind == "attention" else maps_from_state(model, state, asked, kind)).cpu().numpy()
    for image, classes in enumerate(asked.tolist()):
        scores = _rank_classes(model.config.id2label, logits[image].float().cpu())
        traits = tuple(
            ClassTraits(
                **vars(scores[number]),
                maps=maps[image, row],
                attention_on_patches=tuple(on_patches[image, row].tolist()),
                **_ranking_fields(ranking, image, row),
                scores_with_first_heads=tuple(with_first_heads[image, row].tolist()),
            )
            for row, number in enumerate(classes)
        )
        yield tuple(scores.values()), traits


def _rank_classes(id2label: dict[int, str], logits: torch.Tensor) -> dict[int, ClassScore]:
    """Scores by class number, the best class first."""
    probabilities = logits.softmax(dim=-1).tolist()
    order = logits.argsort(descending=True, stable=True).tolist()
    return {
        number: ClassScore(id2label[number], number, rank, logits[number].item(), probabilities[number])
        for rank, number in enumerate(order, 1)
    }


def _ranking_fields(ranking: HeadRanking, image: int, row: int) -> dict[str, Any]:
    """A class's ranking on an image, as the fields of `ClassTraits`."""
    order, sufficient, sets = ranking.order[image, row].tolist(), ranking.sufficient, ranking.num_smallest_sets
    return {
        "head_order": tuple(order),
        "head_scores": tuple(ranking.scores[image, row].tolist()),
        "sufficient": None if sufficient[image, row] > len(order) else int(sufficient[image, row]),
        "num_smallest_sets": None if sets is None else int(sets[image, row]),
    }
