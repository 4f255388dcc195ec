# SPDX-License-Identifier: MIT
"""Comparing classes on one image: what their maps share, and what sets them apart.

The paper (section 4) lays class B's maps on an image of class A to see which traits they share, and the maps of the
true and of the predicted class side by side to read a mistake. Heads are compared one by one: in the last layer a head
has the same keys and values for all class prompts, so two prompts that attend to the same patch receive the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import ImageSource, image_name, open_image
from prompt_cam_hf.explanations.class_names import find_classes
from prompt_cam_hf.explanations.explain import ClassTraits, Explanation, explain_each
from prompt_cam_hf.explanations.figures import Scale, check_head_count
from prompt_cam_hf.explanations.maps import MapKind
from prompt_cam_hf.explanations.ranking import RankingMethod
from prompt_cam_hf.explanations.results import Result, format_table
from prompt_cam_hf.explanations.sheet import Row, Sheet
from prompt_cam_hf.loading import ClassifierLike, as_classifier


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Two or more classes on one image, head by head.

    With m[c] the map of class c in a head, at a patch:

    - shared: the smallest of the m[c]; for evidence, the m[c] closest to 0 where all have the same sign, and else 0;
    - own[c]: m[c] minus the largest of the other classes' maps: above 0 where c has more than every other class, below
      0 where another class has more. With two classes, own[A] = m[A] - m[B] = -own[B].

    Maps, shared and own have the same unit, and those of a head are drawn on the same scale.

    Attributes:
        explanation: The image, and each class's traits.
        true_label: The true class of a misclassified image; None unless `compare` was called with `true`.
    """

    explanation: Explanation
    true_label: str | None = None
    _scale = "head"

    @property
    def classes(self) -> tuple[ClassTraits, ...]:
        """The compared classes."""
        return self.explanation.classes

    @property
    def letters(self) -> tuple[str, ...]:
        """A short name for each class: A, B, C..."""
        return tuple(f"{chr(ord('A') + index % 26)}{index // 26 or ''}" for index in range(len(self.classes)))

    @property
    def shared(self) -> np.ndarray:
        """What all classes have in common, (heads, rows, cols), float32."""
        maps = self._maps()
        smallest = np.abs(maps).min(axis=0)
        return np.where((maps > 0).all(axis=0), smallest, np.where((maps < 0).all(axis=0), -smallest, np.float32(0)))

    @property
    def own(self) -> np.ndarray:
        """What sets each class apart, (classes, heads, rows, cols), float32, signed."""
        maps = self._maps()
        others = [np.delete(maps, index, axis=0).max(axis=0) for index in range(len(maps))]
        return maps - np.stack(others)

    @property
    def overlap(self) -> np.ndarray:
        """The shared part of each head's maps, (heads,), 0 to 1: the sum of |shared| over that of the largest |m|."""
        largest = np.abs(self._maps()).max(axis=0).sum(axis=(-2, -1))
        return np.abs(self.shared).sum(axis=(-2, -1)) / np.maximum(largest, np.finfo(np.float32).tiny)

    def _maps(self) -> np.ndarray:
        return np.stack([traits.maps for traits in self.classes])

    def top_heads(self, count: int) -> tuple[int, ...]:
        """The most important heads of all classes in turn: the first of each, the second of each, and so on."""
        orders = zip(*(traits.head_order for traits in self.classes), strict=True)
        return tuple(dict.fromkeys(head for heads in orders for head in heads))[:count]

    def __repr__(self) -> str:
        names = " and ".join(traits.label for traits in self.classes)
        return f"<Comparison of {names} on {self.explanation.source or 'an image'}>"

    def __str__(self) -> str:
        """Scores, and for each head its rank for each class and the overlap of their maps."""
        source, prediction = self.explanation.source or "image", self.explanation.prediction
        first = f"{source}: {prediction.label} ({prediction.probability:.1%})"
        if self.true_label is not None:
            first += f", truly {self.true_label}"
        letters, unit = self.letters, "+.2f" if self.explanation.kind == "evidence" else ".0%"
        scores = [(t.label, f"{t.probability:.1%}", f"{t.logit:.2f}", t.verdict) for t in self.classes]
        rows = [
            (
                str(head),
                *(str(traits.head_order.index(head) + 1) for traits in self.classes),
                *(f"{traits.maps[head].sum():{unit}}" for traits in self.classes),
                f"{self.overlap[head]:.0%}",
            )
            for head in self.top_heads(len(self.overlap))
        ]
        columns = ("head", *(f"rank for {a}" for a in letters), *(f"on patches, {a}" for a in letters), "shared")
        return "\n".join(
            (
                first,
                format_table(
                    ("", "class", "probability", "score", ""),
                    [(letter, *cells) for letter, cells in zip(letters, scores, strict=True)],
                ),
                format_table(columns, rows),
            )
        )

    def to_dict(self) -> dict[str, Any]:
        """The explanation, and shared, own and overlap as nested lists."""
        return {
            **self.explanation.to_dict(),
            "true_label": self.true_label,
            "shared": self.shared.tolist(),
            "own": self.own.tolist(),
            "overlap": self.overlap.tolist(),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """The rows of the explanation, with the overlap of each head and what the class has of its own there."""
        overlap, own = self.overlap, {traits.label: own for traits, own in zip(self.classes, self.own, strict=True)}
        return [
            {
                **row,
                "overlap": float(overlap[row["head"]]),
                "own_sum": float(np.maximum(own[row["class"]][row["head"]], 0).sum()),
            }
            for row in self.explanation.to_rows()
        ]

    def sheet(self, heads: int | None, outline: bool, scale: Scale) -> Sheet:
        """A row for each class, for what they share and for what sets them apart; the columns are `top_heads`."""
        letters, classes, shared = self.letters, self.classes, self.shared
        order = self.top_heads(check_head_count(heads, len(shared)))
        drawn = ((head, traits.maps[head]) for traits in classes for head in order)
        style = self.explanation.style(drawn, outline, scale)
        rows = []
        for letter, traits in zip(letters, classes, strict=True):
            truth = ", the true class" if traits.label == self.true_label else ""
            rows.append(Row(f"{letter}: {traits.heading}{truth}", traits.draw(style, order)))
        overlap = self.overlap
        panels = [style.draw(head, shared[head], f"{overlap[head]:.0%} shared") for head in order]
        rows.append(Row(f"shared by {', '.join(letters[:-1])} and {letters[-1]}", [style.image_panel(), *panels]))
        difference = replace(style, difference=True)
        apart = list(zip(letters, self.own, strict=True))
        # Of two classes, the second one's difference is the first one's with the other sign.
        for letter, own in apart[: 1 if len(apart) == 2 else None]:
            others = [other for other in letters if other != letter]
            title = f"{letter} - {others[0]}" if len(others) == 1 else f"{letter} - the most of {', '.join(others)}"
            panels = [difference.draw(head, own[head]) for head in order]
            rows.append(Row(title, [style.image_panel(), *panels]))
        return Sheet(rows, [style.colour_bar(), difference.colour_bar()])


def compare(
    model: ClassifierLike,
    image: ImageSource,
    classes: Iterable[str | int] | None = None,
    *,
    true: str | int | None = None,
    image_processor: BaseImageProcessor | None = None,
    kind: MapKind = "attention",
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
) -> Comparison:
    """Compare classes on one image, or the true class with the predicted one.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model with `image_processor`.
        image: The image.
        classes: Names or numbers of two classes or more.
        true: In place of `classes`: the true class of a misclassified image, which is compared with the predicted one.
        image_processor: For a loaded model.
        kind, method, blur, interpolate_pos_encoding: As in `explain`.

    Raises:
        ValueError: there are fewer than two classes, the prediction is the true class, or `explain` refuses an
            argument.
        OSError: the image or the model cannot be found.

    Example:
        >>> from prompt_cam_hf import compare
        >>> comparison = compare("my_model", "bird.jpg", ["Blue Jay", "Steller Jay"])
        >>> comparison.overlap  # the shared part of each head's maps
        >>> comparison.save("comparison.png")
        >>> print(compare("my_model", "bird.jpg", true="Blue Jay"))  # the true class and the predicted one
    """
    if (classes is None) == (true is None):
        raise ValueError("Give either classes=, two or more, or true=, the true class of a misclassified image.")
    classifier = as_classifier(model, image_processor)
    id2label = classifier.model.config.id2label
    opened = open_image(image)
    options: dict[str, Any] = {
        "kind": kind,
        "method": method,
        "blur": blur,
        "interpolate_pos_encoding": interpolate_pos_encoding,
    }
    if true is None:
        numbers = find_classes(id2label, classes or ())
        if len(numbers) < 2:
            raise ValueError(f"Only the class {id2label[numbers[0]]!r} was named; a comparison needs two.")
    else:
        (true_number,) = find_classes(id2label, [true])
        predicted = next(explain_each(classifier, [opened], **options)).prediction
        if predicted.number == true_number:
            raise ValueError(
                f"{image_name(image) or 'The image'} is classified correctly, as {predicted.label!r}; name two "
                "classes to compare them on it."
            )
        numbers = [true_number, predicted.number]
    explanation = replace(next(explain_each(classifier, [opened], numbers, **options)), source=image_name(image))
    return Comparison(explanation, None if true is None else id2label[numbers[0]])
