# SPDX-License-Identifier: MIT
"""`collect`: runs the model on images and records a row of numbers for each; trait maps are added up by class."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.image_processors import input_size
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
    """How heads are ranked (see `rank_heads`) and counted; a resumed atlas must have the same options."""

    top_heads: int = 3
    method: Literal["greedy", "exact", "shapley"] = "greedy"
    blur: Literal["tokens", "patches"] = "tokens"


@dataclass
class MapSums:
    """Sums (classes, heads, rows, cols) of the trait maps of each class, over `counts` images (its `used` ones)."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def zeros(cls, num_classes: int, heads: int, grid: tuple[int, int]) -> "MapSums":
        """Sums over no images."""
        return cls(np.zeros((num_classes, heads, *grid)), np.zeros(num_classes, np.int64))

    def add(self, number: int, maps: np.ndarray) -> None:
        """Add the maps (heads, rows, cols) of an image to those of a class."""
        self.sums[number] += maps
        self.counts[number] += 1

    def mean(self, number: int) -> np.ndarray:
        """The mean maps of a class, (heads, rows, cols), float32; 0 where it has no image."""
        return (self.sums[number] / max(self.counts[number], 1)).astype(np.float32)


def concentration(maps: np.ndarray) -> np.ndarray:
    """How few patches a map is concentrated on: 1 - H / log(patches), where H is the entropy of the map.

    From 0 for a map that is the same everywhere to 1 for a map on a single patch. Maps (..., rows, cols), at least 0,
    are first divided by their sums, so attention to tokens that are not patches does not count.
    """
    flat = maps.reshape(*maps.shape[:-2], -1).astype(np.float64)
    tiny = np.finfo(np.float64).tiny
    shares = flat / np.maximum(flat.sum(axis=-1, keepdims=True), tiny)
    entropy = -(shares * np.log(np.maximum(shares, tiny))).sum(axis=-1)
    return np.clip(1 - entropy / np.log(max(flat.shape[-1], 2)), 0, 1)


def clearness(
    probability: float, runner_up_probability: float, on_patches: np.ndarray, concentrated: np.ndarray
) -> float:
    """How good an example an image is of its predicted class, 0 to 1.

    The difference of the two best probabilities, times the mean over the top heads of `on_patches * concentrated`.
    """
    return float((probability - runner_up_probability) * (on_patches * concentrated).mean())


def opened(
    images: LabelledImages, image_processor: BaseImageProcessor, indices: Iterable[list[int]]
) -> Iterator[list[tuple[int, Image.Image | str, torch.Tensor | None]]]:
    """Open the images of each batch in threads, a few batches ahead of their use.

    Yields:
        A batch, as (index, image, pixel values) of each image. For an image that cannot be read, the image is replaced
        by the reason and the pixel values are None.
    """

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
    classifier: Classifier, images: LabelledImages, places: range, options: Options, batch_size: int, sums: MapSums
) -> Iterator[list[dict[str, Any]]]:
    """Run the model on the images at some places and record what `ROW_SCHEMA` lists.

    The maps and the ranking of an image are those of its predicted class. The maps of each image whose prediction is
    its label, or that has no label, are added to `sums`.

    Yields:
        The rows of a batch. Columns that are null in a row are missing from it.

    Raises:
        ValueError: the image processor gives images of different sizes.
    """
    names = classifier.model.config.id2label
    size = input_size(classifier.image_processor)
    batches = (list(places[first : first + batch_size]) for first in range(0, len(places), batch_size))
    prepared = classifier.model.prepared()
    for batch in opened(images, classifier.image_processor, batches):
        rows = [{"index": index, "image": images.name(index)} for index, *_ in batch]
        readable = []
        for row, (index, image, values) in zip(rows, batch, strict=True):
            label = images.labels[index]
            row["label"] = None if label is None else names[label]
            if values is None:
                row["unreadable"] = image
            else:
                readable.append((row, label, values))
        if readable:
            pixel_values = _stack([values for *_, values in readable], size).to(classifier.model.device)
            found = _look(classifier, prepared, pixel_values, [label for _, label, _ in readable], options)
            for (row, label, _), (prediction, maps, columns) in zip(readable, found, strict=True):
                row |= columns
                if label in (None, prediction):
                    sums.add(prediction, maps)
        yield rows


def _stack(pixel_values: list[torch.Tensor], size: tuple[int, int]) -> torch.Tensor:
    """Images (1, channels, height, width) as one batch; raises ValueError where one has another size."""
    for values in pixel_values:
        if tuple(values.shape[-2:]) != size:
            raise ValueError(
                "The image processor gives images of different sizes ({}x{} and {}x{}); an atlas needs one that "
                "resizes or crops to a fixed height and width.".format(*size, *values.shape[-2:])
            )
    return torch.cat(pixel_values)


@torch.inference_mode()
def _look(
    classifier: Classifier,
    prepared: AbstractContextManager,
    pixel_values: torch.Tensor,
    labels: Sequence[int | None],
    options: Options,
) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
    """Predicted class, maps (heads, rows, cols) and columns of each image, from one run of the network."""
    model = classifier.model
    names = model.config.id2label
    with prepared:
        state = model.last_layer_state(pixel_values)
    logits = model.last_layer_logits(state).float()
    best = logits.topk(2, dim=-1).indices
    predicted = best[:, :1]
    maps = model.trait_maps(state, predicted)[:, 0].cpu().numpy()
    ranking = rank_heads_from_state(model, state, logits, predicted, options.method, options.blur)
    order, head_scores = ranking.order[:, 0].cpu().numpy(), ranking.scores[:, 0].float().cpu().numpy()
    on_patches, concentrated = maps.sum(axis=(-2, -1), dtype=np.float64), concentration(maps)
    scores, probabilities = logits.cpu().numpy(), logits.softmax(dim=-1).cpu().numpy()
    for i, (prediction, runner_up) in enumerate(best.tolist()):
        probability, runner_up_probability = probabilities[i, prediction], probabilities[i, runner_up]
        top = order[i, : options.top_heads]
        columns = {
            "prediction": names[prediction],
            "score": scores[i, prediction],
            "probability": probability,
            "runner_up": names[runner_up],
            "runner_up_score": scores[i, runner_up],
            "runner_up_probability": runner_up_probability,
            "head_order": order[i],
            "head_scores": head_scores[i],
            "sufficient": int(ranking.sufficient[i, 0]),
            "attention_on_patches": on_patches[i],
            "concentration": concentrated[i],
            "clearness": clearness(probability, runner_up_probability, on_patches[i, top], concentrated[i, top]),
        }
        label = labels[i]
        if label is not None:
            columns["correct"] = label == prediction
            columns["label_score"] = scores[i, label]
            columns["label_probability"] = probabilities[i, label]
        yield prediction, maps[i], columns
