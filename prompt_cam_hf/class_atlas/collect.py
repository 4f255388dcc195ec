# SPDX-License-Identifier: MIT
"""What is recorded about an image? A row of numbers, and its trait maps, which are added to those of its class."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import UnreadableImageError, open_image
from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.explanations.ranking import rank_heads_from_state
from prompt_cam_hf.loading import Classifier

# Batches whose images are opened while the model is busy with the one before them.
_BATCHES_AHEAD = 2

_NUMBERS = pa.list_(pa.float32())
# The columns of images.parquet; docs/traits/atlas.md says what each holds.
ROW_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("image", pa.string()),
        ("label", pa.string()),
        ("prediction", pa.string()),
        ("correct", pa.bool_()),
        ("score", pa.float32()),
        ("probability", pa.float32()),
        ("runner_up", pa.string()),
        ("runner_up_score", pa.float32()),
        ("runner_up_probability", pa.float32()),
        ("label_score", pa.float32()),
        ("label_probability", pa.float32()),
        ("head_order", pa.list_(pa.int32())),
        ("head_scores", _NUMBERS),
        ("sufficient", pa.int32()),
        ("attention_on_patches", _NUMBERS),
        ("concentration", _NUMBERS),
        ("clearness", pa.float32()),
        ("unreadable", pa.string()),
    ]
)


@dataclass(frozen=True)
class Options:
    """How images are looked at; part of what a resumed atlas must agree on.

    Attributes:
        top_heads: So many of an image's most important heads count as the top ones.
        method: How heads are ranked; see `rank_heads`.
        blur: As in `rank_heads`.
    """

    top_heads: int = 3
    method: Literal["greedy", "exact", "shapley"] = "greedy"
    blur: Literal["tokens", "patches"] = "tokens"


@dataclass
class MapSums:
    """Sums of the trait maps of each class, over the images that its statistics rest on.

    Attributes:
        sums: (classes, heads, rows, cols), float64.
        counts: (classes,), the number of images in each sum.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def zeros(cls, num_classes: int, heads: int, grid: tuple[int, int]) -> "MapSums":
        """Nothing yet."""
        return cls(np.zeros((num_classes, heads, *grid)), np.zeros(num_classes, np.int64))

    def add(self, number: int, maps: np.ndarray) -> None:
        """Add the maps (heads, rows, cols) of an image to those of a class."""
        self.sums[number] += maps
        self.counts[number] += 1

    def mean(self, number: int) -> np.ndarray:
        """The mean maps of a class, (heads, rows, cols), float32; 0 where it has no image."""
        return (self.sums[number] / max(self.counts[number], 1)).astype(np.float32)


def concentration(maps: np.ndarray) -> np.ndarray:
    """How little of the image a map is spread over: 1 - H / log(patches), 0 for an even map, 1 for a single patch.

    H is the entropy of the map (..., rows, cols) after its sum is made 1; what fell on other tokens does not count.
    """
    flat = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    shares = flat / np.maximum(flat.sum(axis=-1, keepdims=True), tiny)
    entropy = -(shares * np.log(np.maximum(shares, tiny))).sum(axis=-1)
    return np.clip(1 - entropy / np.log(max(flat.shape[-1], 2)), 0, 1)


def clearness(
    probability: float, runner_up_probability: float, on_patches: np.ndarray, concentrated: np.ndarray
) -> float:
    """How good an example an image is of the class it was taken for, 0 to 1.

    The lead in probability over the next class, times the mean over the top heads of the share of attention that is
    on patches times the concentration of the map there. `on_patches` and `concentrated` are of the top heads.
    """
    return float((probability - runner_up_probability) * (on_patches * concentrated).mean())


def opened(
    images: LabelledImages, image_processor: BaseImageProcessor, indices: Iterable[list[int]]
) -> Iterator[list[tuple[int, Image.Image | str, torch.Tensor | None]]]:
    """Open batches of images in threads, a little ahead of their use: (index, image or reason, pixel values)."""

    def load(index: int) -> tuple[int, Image.Image | str, torch.Tensor | None]:
        try:
            image = open_image(images.source(index))
        except (UnreadableImageError, OSError) as error:
            return index, str(error), None
        return index, image, image_processor(image, return_tensors="pt")["pixel_values"]

    with ThreadPoolExecutor() as pool:
        waiting: deque[list[Future]] = deque()
        for batch in indices:
            waiting.append([pool.submit(load, index) for index in batch])
            if len(waiting) > _BATCHES_AHEAD:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]


def collect(
    classifier: Classifier,
    images: LabelledImages,
    start: int,
    end: int,
    options: Options,
    batch_size: int,
    add_maps: Callable[[int, np.ndarray], None],
) -> Iterator[list[dict[str, Any]]]:
    """Look at the images from `start` to before `end`, and give the rows of each batch.

    An image's maps and ranking are those of the class that it was taken for. `add_maps` gets the class's number and
    the maps (heads, rows, cols) of each image that was taken for its label, or has none.

    Raises:
        ValueError: the image processor gives images of different sizes.
    """
    names = classifier.model.config.id2label
    size = input_size(classifier.image_processor)
    batches = (list(range(first, min(first + batch_size, end))) for first in range(start, end, batch_size))
    for batch in opened(images, classifier.image_processor, batches):
        readable = [(index, values) for index, _, values in batch if values is not None]
        seen = {}
        if readable:
            pixel_values = _stack([values for _, values in readable], size).to(classifier.model.device)
            seen = dict(zip((index for index, _ in readable), _look(classifier, pixel_values, options), strict=True))
        rows = []
        for index, image, _ in batch:
            label = images.labels[index]
            row = {"index": index, "image": images.name(index), "label": None if label is None else names[label]}
            if index in seen:
                numbers, maps = seen[index]
                row |= _row(numbers, names, label)
                if label in (None, numbers["prediction"]):
                    add_maps(numbers["prediction"], maps)
            else:
                row["unreadable"] = image
            rows.append(row)
        yield rows


def input_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Height and width in pixels of what the image processor makes of an image."""
    height, width = image_processor(Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    return height, width


def _stack(pixel_values: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Images (1, channels, height, width) as one batch.

    Raises:
        ValueError: one has not this size.
    """
    for values in pixel_values:
        if tuple(values.shape[-2:]) != size:
            raise ValueError(
                "The image processor gives images of different sizes ({}x{} and {}x{}); an atlas needs one that "
                "resizes or crops to a fixed height and width.".format(*size, *values.shape[-2:])
            )
    return torch.cat(pixel_values)


@torch.inference_mode()
def _look(
    classifier: Classifier, pixel_values: torch.Tensor, options: Options
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Numbers and maps (heads, rows, cols) of each image, from one run of the network."""
    model = classifier.model
    state = model.last_layer_state(pixel_values)
    logits = model.last_layer_logits(state).float()
    best = logits.topk(2, dim=-1).indices
    predicted = best[:, :1]
    maps = model.trait_maps(state, predicted)[:, 0].cpu().numpy()
    ranking = rank_heads_from_state(model, state, logits, predicted, options.method, options.blur)
    order, head_scores = ranking.order[:, 0].cpu().numpy(), ranking.scores[:, 0].float().cpu().numpy()
    on_patches, concentrated = maps.sum(axis=(-2, -1), dtype=np.float64), concentration(maps)
    logits, probabilities = logits.cpu().numpy(), logits.softmax(dim=-1).cpu().numpy()
    for i, (prediction, runner_up) in enumerate(best.tolist()):
        top = order[i, : options.top_heads]
        numbers = {
            "prediction": prediction,
            "runner_up": runner_up,
            "scores": logits[i],
            "probabilities": probabilities[i],
            "head_order": order[i],
            "head_scores": head_scores[i],
            "sufficient": int(ranking.sufficient[i, 0]),
            "attention_on_patches": on_patches[i],
            "concentration": concentrated[i],
            "clearness": clearness(
                probabilities[i, prediction],
                probabilities[i, runner_up],
                on_patches[i, top],
                concentrated[i, top],
            ),
        }
        yield numbers, maps[i]


def _row(numbers: dict[str, Any], names: Mapping[int, str], label: int | None) -> dict[str, Any]:
    """An image's numbers as columns of the table."""
    scores, probabilities = numbers.pop("scores"), numbers.pop("probabilities")
    row = dict(numbers)
    for column, number in (("prediction", row["prediction"]), ("runner_up", row["runner_up"]), ("label", label)):
        prefix = "" if column == "prediction" else f"{column}_"
        row[column] = None if number is None else names[number]
        row[f"{prefix}score"] = None if number is None else scores[number]
        row[f"{prefix}probability"] = None if number is None else probabilities[number]
    row["correct"] = None if label is None else label == numbers["prediction"]
    return row


__all__ = ["ROW_SCHEMA", "MapSums", "Options", "clearness", "collect", "concentration", "input_size", "opened"]
