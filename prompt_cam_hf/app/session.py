# SPDX-License-Identifier: MIT
"""What the page computes: for each thing that a visitor does, a call of a public function. Nothing here knows Gradio.

A model is loaded once and does not change; what a visitor has asked is a `Visit`, which does not change either.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlencode

import numpy as np
import torch
from PIL import Image, ImageDraw

from prompt_cam_hf.app.zero_gpu import on_gpu
from prompt_cam_hf.data.images import ImageSource, UnreadableImageError, open_image
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.aggregate import DEFAULT_AGGREGATION, Aggregation, aggregate_maps
from prompt_cam_hf.explanations.class_names import find_class
from prompt_cam_hf.explanations.compare import Comparison, compare
from prompt_cam_hf.explanations.explain import ClassScore, ClassTraits, Explanation, explain
from prompt_cam_hf.explanations.maps import MapKind
from prompt_cam_hf.explanations.ranking import RankingMethod, check_ranking
from prompt_cam_hf.explanations.removal import Region, Removal, RemovalMethod, remove_trait
from prompt_cam_hf.explanations.results import Result
from prompt_cam_hf.explanations.taxonomy_path import TaxonomyPath, explain_path, find_taxonomy
from prompt_cam_hf.loading import Classifier, check_prompt_cam, load_model_type, load_pipeline

# Every visitor's image stays in memory while the page is open.
MAX_PIXELS = 50_000_000
# Painted by hand, a region has a few hundred points.
_MAX_POINTS = 100_000


@dataclass(frozen=True)
class Question:
    """What is asked about an image.

    Attributes:
        prompts: The name of the prompt set.
        classes: The numbers of the classes asked about; none for the predicted class.
        kind, method: As in `explain`.
    """

    prompts: str
    classes: tuple[int, ...] = ()
    kind: MapKind = "attention"
    method: RankingMethod = "greedy"


@dataclass(frozen=True)
class Visit:
    """What one visitor has on the page.

    Attributes:
        name: The image's file name.
        question: What was asked.
        explanation: The answer.
        combined: For each class of the explanation, the map of all heads combined, (classes, rows, cols).
        path: The path through the tree of classes, where the model has one.
        place: Which of the explanation's classes is looked at.
        head: The head that is looked at; None: all heads combined.
        comparison: The class that is looked at beside another one.
        removal: What became of the image without a region.
        region: That region, as `remove_trait` takes it.
    """

    name: str
    question: Question
    explanation: Explanation
    combined: np.ndarray
    path: TaxonomyPath | None = None
    place: int = 0
    head: int | None = None
    comparison: Comparison | None = None
    removal: Removal | None = None
    region: Region | None = None

    @property
    def traits(self) -> ClassTraits:
        """The class that is looked at."""
        return self.explanation.classes[self.place]

    @property
    def results(self) -> dict[str, Result]:
        """What can be taken along, by its name."""
        found = {
            "explanation": self.explanation,
            "comparison": self.comparison,
            "removal": self.removal,
            "path": self.path,
        }
        return {name: result for name, result in found.items() if result is not None}


class AskedModel:
    """A model that is loaded once and asked by all visitors, several at once.

    Args:
        model: A folder or a Hub id.
        device: As for `load_pipeline`.

    Raises:
        ValueError, OSError: as in `load_pipeline`.
    """

    def __init__(self, model: str | os.PathLike, device: str | None = None):
        self.name = os.fspath(model)
        for computing in ("ask", "compare", "remove"):
            setattr(self, computing, on_gpu(getattr(self, computing)))
        check_prompt_cam(load_model_type(self.name), self.name)
        pipeline = load_pipeline(model, device)
        self._whole = Classifier(pipeline.model, pipeline.image_processor)
        self.prompts_in_use: str = pipeline.model.prompts_in_use
        self._classifiers = {
            name: Classifier(pipeline.model.only_prompts(name), pipeline.image_processor)
            for name in pipeline.model.prompt_sets
        }
        self.num_heads: int = pipeline.model.config.backbone_config.num_attention_heads
        self._taxonomy = self._read_taxonomy()

    def _read_taxonomy(self) -> Taxonomy | None:
        """The tree of classes, where one was saved with the model and prompt sets are its levels."""
        if len(self._classifiers) < 2:
            return None
        try:
            tree = read_taxonomy(find_taxonomy(self.name))
        except OSError:  # most models have none
            return None
        return tree if self._classifiers.keys() & set(tree.levels) else None

    @property
    def prompt_sets(self) -> list[str]:
        """The names of the prompt sets."""
        return list(self._classifiers)

    @property
    def methods(self) -> list[RankingMethod]:
        """How heads can be ranked: with many heads, only greedily."""
        found: list[RankingMethod] = []
        for method in get_args(RankingMethod):
            try:
                check_ranking(self._whole.model, method, "tokens")
            except ValueError:
                continue
            found.append(method)
        return found

    def classes(self, prompts: str) -> dict[int, str]:
        """The names of a prompt set's classes, by their numbers.

        Raises:
            ValueError: there is no such prompt set.
        """
        return self._classifier(prompts).model.config.id2label

    def _classifier(self, prompts: str) -> Classifier:
        if prompts not in self._classifiers:
            raise ValueError(
                f"There is no prompt set {prompts!r}; there are {', '.join(map(repr, self.prompt_sets))}."
            )
        return self._classifiers[prompts]

    def open(self, source: ImageSource) -> Image.Image:
        """Open an image as `open_image` does.

        Raises:
            UnreadableImageError: it cannot be read, or has more than `MAX_PIXELS` pixels.
        """
        image = open_image(source)
        if image.width * image.height > MAX_PIXELS:
            raise UnreadableImageError(
                f"The image has {image.width * image.height:,} pixels, and this page takes up to {MAX_PIXELS:,}; make "
                "it smaller."
            )
        return image

    def ask(self, image: Image.Image, name: str, question: Question, before: Visit | None = None) -> Visit:
        """Explain an image.

        Args:
            image: The image, from `open`.
            name: Its file name.
            question: What is asked.
            before: The visit so far, where it is of the same image.

        Raises:
            ValueError: the question has no answer, such as a class that does not exist.
        """
        classifier = self._classifier(question.prompts)
        explanation = explain(
            classifier, image, list(question.classes) or None, kind=question.kind, method=question.method
        )
        assert isinstance(explanation, Explanation)
        combined = self._combine(classifier, replace(explanation, source=name))
        path = before.path if before is not None else self._follow(image, name)
        return Visit(name, question, replace(explanation, source=name), combined, path, head=_first_head(explanation))

    def _combine(self, classifier: Classifier, explanation: Explanation) -> np.ndarray:
        """The maps of all heads as one: attention as is best by measurement, evidence summed."""
        how: Aggregation = "evidence_sum" if explanation.kind == "evidence" else DEFAULT_AGGREGATION
        pixel_values = classifier.image_processor(explanation.image, return_tensors="pt")["pixel_values"]
        classes = torch.tensor([[traits.number for traits in explanation.classes]])
        device = classifier.model.device
        return aggregate_maps(classifier.model, pixel_values.to(device), classes.to(device), how)[0].cpu().numpy()

    def _follow(self, image: Image.Image, name: str) -> TaxonomyPath | None:
        if self._taxonomy is None:
            return None
        path = explain_path(self._whole, image, self._taxonomy)
        return replace(path, source=name)

    def compare(self, visit: Visit, other: int | None) -> Visit:
        """Put another class beside the one that is looked at; None: none.

        Raises:
            ValueError: there is no such class, or it is the one that is looked at.
        """
        if other is None:
            return replace(visit, comparison=None)
        question, explanation = visit.question, visit.explanation
        comparison = compare(
            self._classifier(question.prompts),
            explanation.image,
            [visit.traits.number, other],
            kind=question.kind,
            method=question.method,
        )
        named = replace(comparison.explanation, source=visit.name)
        return replace(visit, comparison=replace(comparison, explanation=named))

    def remove(self, visit: Visit, region: Region, method: RemovalMethod) -> Visit:
        """Remove a region, and as a control another of its size, and explain what is left.

        Raises:
            ValueError: the region is empty, is all of the image, or does not fit it.
        """
        removal = remove_trait(
            self._classifier(visit.question.prompts),
            visit.explanation.image,
            region,
            visit.traits.number,
            method=method,
            kind=visit.question.kind,
        )
        told = {name: replace(getattr(removal, name), source=visit.name) for name in ("before", "after", "control")}
        return replace(visit, removal=replace(removal, **told), region=region)

    def read_query(self, query: Mapping[str, str]) -> Question:
        """The question of a link that `write_query` made; what the model does not know of it is left out."""
        prompts = query.get("prompts", self.prompts_in_use)
        prompts = prompts if prompts in self._classifiers else self.prompts_in_use
        kind = query["kind"] if query.get("kind") in get_args(MapKind) else "attention"
        method = query["method"] if query.get("method") in self.methods else "greedy"
        numbers = []
        for key, name in query.items():
            if key.startswith("class"):
                with suppress(ValueError):
                    numbers.append(find_class(self.classes(prompts), name))
        return Question(prompts, tuple(numbers), kind, method)  # type: ignore[arg-type]

    def write_query(self, question: Question) -> str:
        """A question as the part of a link after the question mark."""
        id2label = self.classes(question.prompts)
        query = {"prompts": question.prompts} if len(self._classifiers) > 1 else {}
        # Each key stands once: Gradio hands on a plain dictionary.
        query |= {f"class{place}": id2label[number] for place, number in enumerate(question.classes, 1)}
        return urlencode({**query, "kind": question.kind, "method": question.method})


def _first_head(explanation: Explanation) -> int:
    return explanation.classes[0].head_order[0]


def look(visit: Visit, place: int, head: int | None) -> Visit:
    """Look at another head, or at all heads combined (None), of one of the explanation's classes.

    Raises:
        ValueError: there is no such class or head.
    """
    if not 0 <= place < len(visit.explanation.classes):
        raise ValueError(f"There is no class {place} on the page; it shows {len(visit.explanation.classes)}.")
    if head is not None and not 0 <= head < len(visit.explanation.classes[place].maps):
        raise ValueError(f"There is no head {head}; the model has {len(visit.traits.maps)}.")
    kept = visit.comparison if place == visit.place else None
    return replace(visit, place=place, head=head, comparison=kept)


def with_first_heads(visit: Visit, count: int) -> tuple[ClassScore, ...]:
    """All classes, the best first, when the class looked at keeps its first heads and the others are blurred.

    Raises:
        ValueError: there are not as many heads.
    """
    scores = visit.traits.scores_with_first_heads
    if not 0 <= count < len(scores):
        raise ValueError(f"The first {count} heads were asked for; there are {len(scores) - 1}.")
    changed = {score.number: score.logit for score in visit.explanation.scores} | {visit.traits.number: scores[count]}
    logits = torch.tensor(list(changed.values()))
    probabilities = dict(zip(changed, logits.softmax(dim=0).tolist(), strict=True))
    order = sorted(visit.explanation.scores, key=lambda score: -changed[score.number])
    return tuple(
        ClassScore(score.label, score.number, rank, changed[score.number], probabilities[score.number])
        for rank, score in enumerate(order, 1)
    )


def read_region(size: tuple[int, int], shapes: Sequence[Mapping[str, Any]]) -> Region:
    """What was painted on an image, as a region for `remove_trait`.

    Args:
        size: The image's (width, height) in pixels.
        shapes: Each has a `tool`, "box" or "brush"; `points`, pairs of x and y as shares of width and height; and for
            the brush its `width`, a share of the image's width.

    Returns:
        The box, where one box is all there is; else a mask (height, width), bool.

    Raises:
        ValueError: nothing was painted, or it is not made of such shapes.
    """
    if not shapes:
        raise ValueError("Nothing is painted on the image yet; paint or box a region, or take that of a head.")
    if sum(len(shape["points"]) for shape in shapes) > _MAX_POINTS:
        raise ValueError("The painted region is made of too many lines; clear it, and paint a simpler one.")
    boxes = [_read_box(size, shape["points"]) for shape in shapes if shape["tool"] == "box"]
    if len(boxes) == len(shapes) == 1:
        return boxes[0]
    mask = Image.new("1", size)
    draw = ImageDraw.Draw(mask)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), fill=1)
    for shape in shapes:
        if shape["tool"] == "brush":
            _draw_stroke(draw, size, shape)
    return np.array(mask)


def _read_box(size: tuple[int, int], points: Sequence[Sequence[float]]) -> tuple[int, int, int, int]:
    """At least one pixel, and inside the image."""
    sides = []
    for axis, length in enumerate(size):
        first, last = sorted(min(max(float(point[axis]), 0.0), 1.0) for point in (points[0], points[-1]))
        low = min(round(first * length), length - 1)
        sides.append((low, max(round(last * length), low + 1)))
    (left, right), (top, bottom) = sides
    return left, top, right, bottom


def _draw_stroke(draw: ImageDraw.ImageDraw, size: tuple[int, int], shape: Mapping[str, Any]) -> None:
    points = [(float(x) * size[0], float(y) * size[1]) for x, y in shape["points"]]
    radius = max(min(float(shape["width"]), 1.0) * size[0] / 2, 0.5)
    draw.line(points, fill=1, width=max(round(2 * radius), 1))
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def save_result(visit: Visit, what: str, ending: str, folder: Path) -> Path:
    """Write a result into a folder; its name is the image's, with what it is.

    Args:
        visit: The visit.
        what: One of `visit.results`.
        ending: png, pdf, svg, json or csv; "region": the mask of a removal, as a black and white PNG.
        folder: Where to.

    Raises:
        ValueError: there is no such result yet, or the ending is unknown.
    """
    if what not in visit.results:
        raise ValueError(f"There is no {what} yet.")
    if ending == "region":
        if visit.removal is None:
            raise ValueError("There is no region yet: remove one first.")
        path = folder / "region.png"
        Image.fromarray(visit.removal.mask).save(path)
        return path
    # A file's name has 255 bytes at most, and a character up to four.
    path = folder / f"{Path(visit.name or 'image').stem[:50]}.{what}.{ending}"
    visit.results[what].save(path)
    return path
