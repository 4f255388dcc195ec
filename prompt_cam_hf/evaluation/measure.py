# SPDX-License-Identifier: MIT
"""`measure`: measures a model and its maps on a batch of images; `Protocol` says what is measured, and how."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from prompt_cam_hf.evaluation.subjects import Subject, explainer
from prompt_cam_hf.metrics import localization
from prompt_cam_hf.metrics.faithfulness import PRESETS, deletion, insertion
from prompt_cam_hf.metrics.road import road
from prompt_cam_hf.metrics.sanity import map_stability, parameter_randomisation, random_class_similarity
from prompt_cam_hf.metrics.scoring import Explainer
from prompt_cam_hf.metrics.specificity import class_specificity

METRIC_GROUPS = ("faithfulness", "localisation", "specificity", "sanity", "road")
# Sanity copies the model and runs it once for each layer, which is expensive; a few images are enough.
SANITY_IMAGES = 32

# The columns of measurements.parquet; docs/evaluation.md says what they hold.
ROW_SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("image", pa.string()),
        ("label", pa.string()),
        ("model", pa.string()),
        ("map", pa.string()),
        ("metric", pa.string()),
        ("value", pa.float64()),
        ("curve", pa.list_(pa.float32())),
    ]
)

FAITHFULNESS = ("insertion", "deletion")
LOCALISATION = ("pointing game", "relevance mass", "relevance rank", "region IoU", "chance of pointing")
LOST_MASS = "mass lost to runner-up"
SPECIFICITY = ("distance to runner-up", "distance to random class", LOST_MASS)

# (metric, value of each image, curve of each image or None)
Measured = tuple[str, Any, Any]


@dataclass(frozen=True)
class Protocol:
    """What is measured, and how.

    Attributes:
        metrics: Names of `METRIC_GROUPS`. Accuracy is always measured.
        preset: The settings of insertion and deletion; see `prompt_cam_hf.metrics.faithfulness.PRESETS`.
        classes: The class whose map and probability are used for faithfulness, ROAD and sanity: the predicted one, or
            the true one if it is known. Localisation and specificity always use the true one, because the ground truth
            shows its traits.
        limit: The number of images, drawn at random, on which maps are measured; accuracy is measured on all. None:
            all images.
        seed: The seed of the order of images and of everything else that is drawn at random.
        batch_size: Images that go through a network at once.
    """

    metrics: tuple[str, ...] = ("faithfulness", "localisation", "specificity", "sanity")
    preset: str = "rise"
    classes: Literal["predicted", "true"] = "predicted"
    limit: int | None = None
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse, with a ValueError, what is unknown or out of range."""
        if unknown := [name for name in self.metrics if name not in METRIC_GROUPS]:
            raise ValueError(f"There are no metrics {unknown[0]!r}; choose among {', '.join(METRIC_GROUPS)}.")
        if self.preset not in PRESETS:
            raise ValueError(f"There is no preset {self.preset!r}; choose one of {', '.join(PRESETS)}.")
        if self.classes not in ("predicted", "true"):
            raise ValueError(f'classes={self.classes!r} is not known; use "predicted" or "true".')
        if self.batch_size < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"limit is {self.limit} and batch_size {self.batch_size}; at least 1 is needed.")

    def of(self, metric: str, ground_truth: str | None) -> str:
        """The protocol of one metric in a few words, to be shown beside its numbers; `ground_truth` says what the
        masks are.
        """
        if metric == "accuracy":
            return "top-1"
        if metric in LOCALISATION:
            return f"{ground_truth}, true class"
        if metric in SPECIFICITY:
            return "true class" if metric != LOST_MASS else f"{ground_truth}, true class"
        asked = f"{self.classes} class"
        return f"{self.preset}, {asked}" if metric in FAITHFULNESS else asked


@dataclass(frozen=True)
class Batch:
    """Images (batch, channels, height, width) as a model sees them.

    Attributes:
        labels: (batch,), -1 for an image without label.
        masks: (batch, height, width), boolean: where the traits of the true class are; all False for an image without
            ground truth. None: no image has ground truth.
        for_maps: (batch,), boolean: the images whose maps are measured.
        for_sanity: (batch,), boolean: the images whose maps are tested for sanity.
    """

    pixel_values: torch.Tensor
    labels: torch.Tensor
    masks: np.ndarray | None
    for_maps: torch.Tensor
    for_sanity: torch.Tensor


def measure(subject: Subject, batch: Batch, protocol: Protocol) -> Iterator[tuple[int, str, Measured]]:
    """Measure a model and its maps on a batch of images.

    Yields:
        (place in the batch, name of the map or "" for the model itself, (metric, value, curve or None)).
    """
    with torch.no_grad():
        predictions = subject.model(batch.pixel_values).logits.argmax(dim=-1)
    known = batch.labels >= 0
    correct = (predictions.cpu() == batch.labels).double()
    yield from _rows("", _places(known), [("accuracy", correct[known], None)])
    for name in subject.maps:
        explain = explainer(name)
        for group, rows, run in _measurements(batch, protocol):
            if group in protocol.metrics and rows.any():
                chosen = _select(batch, rows)
                asked = predictions[rows.to(predictions.device)]
                if protocol.classes == "true":
                    asked = torch.where(chosen.labels.to(asked.device) >= 0, chosen.labels.to(asked.device), asked)
                yield from _rows(name, _places(rows), run(subject, chosen, explain, asked, protocol))


_Run = Callable[[Subject, Batch, Explainer, torch.Tensor, Protocol], list[Measured]]


def _measurements(batch: Batch, protocol: Protocol) -> Iterator[tuple[str, torch.Tensor, _Run]]:
    """Each group of metrics with the images that it can be measured on."""
    labelled = batch.for_maps & (batch.labels >= 0)
    yield "faithfulness", batch.for_maps, _measure_faithfulness
    yield "road", batch.for_maps, _measure_road
    if batch.masks is not None:
        has_mask = torch.from_numpy(batch.masks.any(axis=(1, 2)))
        yield "localisation", labelled & has_mask, _measure_localisation
    yield "specificity", labelled, _measure_specificity
    yield "sanity", batch.for_maps & batch.for_sanity, _measure_sanity


def _select(batch: Batch, rows: torch.Tensor) -> Batch:
    masks = None if batch.masks is None else batch.masks[rows.numpy()]
    values = batch.pixel_values[rows.to(batch.pixel_values.device)]
    return Batch(values, batch.labels[rows], masks, batch.for_maps[rows], batch.for_sanity[rows])


def _places(rows: torch.Tensor) -> torch.Tensor:
    """The places at which a boolean vector is true."""
    return rows.nonzero()[:, 0]


def _rows(name: str, places: torch.Tensor, measured: list[Measured]) -> Iterator[tuple[int, str, Measured]]:
    for metric, values, curves in measured:
        for index, place in enumerate(places.tolist()):
            curve = None if curves is None else curves[index].tolist()
            yield place, name, (metric, float(values[index]), curve)


def _measure_faithfulness(
    subject: Subject, batch: Batch, explain: Explainer, asked: torch.Tensor, protocol: Protocol
) -> list[Measured]:
    maps = explain(subject.model, batch.pixel_values, asked)
    arguments = (subject.model, batch.pixel_values, maps, asked, protocol.preset, protocol.batch_size)
    inserted = insertion(*arguments)
    settings = subject.image_processor
    deleted = deletion(*arguments, image_mean=settings.image_mean, image_std=settings.image_std)
    return [(found.metric, found.auc, found.curve) for found in (inserted, deleted)]


def _measure_road(
    subject: Subject, batch: Batch, explain: Explainer, asked: torch.Tensor, protocol: Protocol
) -> list[Measured]:
    maps = explain(subject.model, batch.pixel_values, asked)
    curves = road(subject.model, batch.pixel_values, maps, asked, seed=protocol.seed, batch_size=protocol.batch_size)
    return [("road", curves.combined, None)]


def _measure_localisation(
    subject: Subject, batch: Batch, explain: Explainer, asked: torch.Tensor, protocol: Protocol
) -> list[Measured]:
    maps = explain(subject.model, batch.pixel_values, batch.labels.to(asked.device)).cpu().numpy()
    assert batch.masks is not None  # see `_measurements`
    patches = localization.patch_mask(batch.masks, maps.shape[-2:])
    found = (
        localization.pointing_game(maps, patches),
        localization.relevance_mass_accuracy(maps, patches),
        localization.relevance_rank_accuracy(maps, patches),
        localization.region_iou(maps, patches),
        localization.chance_level(patches),
    )
    return [(name, values, None) for name, values in zip(LOCALISATION, found, strict=True)]


def _measure_specificity(
    subject: Subject, batch: Batch, explain: Explainer, asked: torch.Tensor, protocol: Protocol
) -> list[Measured]:
    if subject.config.num_labels < 3:
        return []
    labels = batch.labels.to(asked.device)
    found = class_specificity(subject.model, batch.pixel_values, explain, labels, batch.masks, seed=protocol.seed)
    measured: list[Measured] = [(name, found.distance[:, place], None) for place, name in enumerate(SPECIFICITY[:2])]
    if found.mass is not None:
        measured.append((LOST_MASS, found.mass[:, 0] - found.mass[:, 1], None))
    return measured


def _measure_sanity(
    subject: Subject, batch: Batch, explain: Explainer, asked: torch.Tensor, protocol: Protocol
) -> list[Measured]:
    model, images = subject.model, batch.pixel_values
    randomised = parameter_randomisation(model, images, explain, asked, protocol.seed)
    stable = map_stability(model, images, explain, subject.image_processor.image_std, asked, seed=protocol.seed)
    measured: list[Measured] = [
        (f"left after randomising {randomised.stages[0]}", randomised.similarity[:, 0], None),
        ("left after randomising everything", randomised.similarity[:, -1], None),
        ("stability under noise", stable.noise, None),
        ("stability under a flip", stable.flip, None),
    ]
    if subject.config.num_labels >= 3:
        similarity = random_class_similarity(model, images, explain, asked, protocol.seed)
        measured.append(("like a random class's map", similarity, None))
    return measured
