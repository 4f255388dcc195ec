# SPDX-License-Identifier: MIT
"""`measure`: measures a model and its maps on a batch of images; `Protocol` says what is measured, and how."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import torch

from prompt_cam_hf.baselines.backbone import map_layout
from prompt_cam_hf.data.image_processors import input_size
from prompt_cam_hf.evaluation.subjects import Reading, Subject
from prompt_cam_hf.metrics import localization
from prompt_cam_hf.metrics.faithfulness import PRESETS, FaithfulnessCurve, changed_pixels, follow_maps
from prompt_cam_hf.metrics.road import PERCENTILES, road
from prompt_cam_hf.metrics.sanity import add_noise, randomise, rank_correlation
from prompt_cam_hf.metrics.specificity import other_classes, specificity_of_maps

METRIC_GROUPS = ("faithfulness", "localisation", "specificity", "sanity", "road")
# Sanity copies and shuffles the model, and reads each image four times again; a few images are enough.
SANITY_IMAGES, _SANITY_READINGS = 32, 4

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
LOCALISATION = (
    "pointing game",
    "relevance mass",
    "mass at matched sharpness",
    "relevance rank",
    "region IoU",
    "chance of pointing",
)
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
    preset: str = "rise-eighth"
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


def measure(
    subject: Subject, batch: Batch, protocol: Protocol, count: Callable[[int], object] = lambda passes: None
) -> Iterator[tuple[int, str, Measured]]:
    """Measure a model and its maps on a batch of images.

    All maps are made from the same runs of the network.

    Args:
        subject: The model, and which of its maps are measured.
        batch: The images.
        protocol: What is measured, and how.
        count: Called with the number of images that went through the network; all calls add up to `count_passes`.

    Yields:
        (place in the batch, name of the map or "" for the model itself, (metric, value, curve or None)).
    """
    names = subject.maps if batch.for_maps.any() else ()
    reading = Reading(subject.model, batch.pixel_values, names)
    count(len(batch.labels))
    known = batch.labels >= 0
    correct = (reading.logits.argmax(dim=-1).cpu() == batch.labels).double()
    yield from _rows("", _places(known), [("accuracy", correct[known], None)])
    if not names:
        return
    places = _places(batch.for_maps)
    if len(places) < len(batch.labels):
        batch = _select(batch, batch.for_maps)
        reading = Reading(subject.model, batch.pixel_values, names)
    for name, rows, measured in _measure_maps(subject, batch, reading, protocol, count):
        yield from _rows(name, places[rows], measured)


def count_passes(subject: Subject, protocol: Protocol, places: range) -> int:
    """How many images will go through the network of a subject, those included that are changed to test a map.

    `places` are those of the images in the order in which all are measured.
    """
    limit = len([place for place in places if protocol.limit is None or place < protocol.limit])
    num_sanity = min(limit, len([place for place in places if place < SANITY_IMAGES]))
    passes, num_maps = len(places), len(subject.maps)
    if num_maps and "faithfulness" in protocol.metrics:
        size = input_size(subject.image_processor)
        points = changed_pixels(protocol.preset, size, map_layout(subject.model, *size).grid)
        # The whole image, the blurred and the empty one are the same for all maps.
        passes += limit * (3 + 2 * (len(points) - 2) * num_maps)
    if num_maps and "road" in protocol.metrics:
        passes += limit * 2 * len(PERCENTILES) * num_maps
    if num_maps and "sanity" in protocol.metrics:
        passes += num_sanity * _SANITY_READINGS
    return passes


def _measure_maps(
    subject: Subject, batch: Batch, reading: Reading, protocol: Protocol, count: Callable[[int], object]
) -> Iterator[tuple[str, torch.Tensor, list[Measured]]]:
    """Measure maps on images of which all are `for_maps`.

    Yields:
        The name of a map, the images (booleans) that a group of metrics was measured on, and what was measured.
    """
    images, labels, seed = batch.pixel_values, batch.labels.to(batch.pixel_values.device), protocol.seed
    groups = _images_of_groups(subject, batch, protocol)
    predicted = reading.logits.argmax(dim=-1)
    true = torch.where(labels >= 0, labels, predicted)
    asked = true if protocol.classes == "true" else predicted
    classes = {"asked": asked, "true": true}
    if "specificity" in groups:
        classes["runner-up"], classes["random"] = other_classes(reading.logits, true, seed)
    if "sanity" in groups and subject.config.num_labels >= 3:
        classes["random beside asked"] = other_classes(reading.logits, asked, seed)[1]
    maps = _maps_of_classes(subject, reading, classes)

    def scorer(pixel_values: torch.Tensor) -> Any:
        count(len(pixel_values))
        return subject.model(pixel_values)

    curves: list[FaithfulnessCurve] = []
    if "faithfulness" in groups:
        statistics = subject.image_processor.image_mean, subject.image_processor.image_std
        of_asked = [maps[name]["asked"] for name in subject.maps]
        curves = follow_maps(scorer, images, of_asked, asked, protocol.preset, protocol.batch_size, *statistics)
    changed: dict[str, dict[str, torch.Tensor]] = {}
    if (rows := groups.get("sanity")) is not None:
        here = rows.to(images.device)
        changed = _maps_after_changes(subject, images[here], asked[here], seed, count)
    for name in subject.maps:
        of_class = maps[name]
        for group, rows in groups.items():
            measured: list[Measured]
            if group == "faithfulness":
                measured = [(curve.metric, curve.auc, curve.curve) for curve in curves[:2]]
                del curves[:2]
            elif group == "road":
                removed = road(scorer, images, of_class["asked"], asked, seed=seed, batch_size=protocol.batch_size)
                measured = [("road", removed.combined, None)]
            elif group == "localisation":
                measured = _localise(of_class["true"][rows], cast(np.ndarray, batch.masks)[rows.numpy()])
            elif group == "specificity":
                three = ("true", "runner-up", "random")
                measured = _compare_classes(
                    torch.stack([classes[which].cpu()[rows] for which in three], dim=1),
                    torch.stack([of_class[which][rows] for which in three], dim=1),
                    None if batch.masks is None else batch.masks[rows.numpy()],
                )
            else:
                others = {metric: of_map[name] for metric, of_map in changed.items()}
                if "random beside asked" in of_class:
                    others["like a random class's map"] = of_class["random beside asked"][rows]
                intact = of_class["asked"][rows]
                measured = [(metric, rank_correlation(intact, other), None) for metric, other in others.items()]
            yield name, rows, measured


def _images_of_groups(subject: Subject, batch: Batch, protocol: Protocol) -> dict[str, torch.Tensor]:
    """The images, (batch,) booleans, that each group of metrics can be measured on, if there are any."""
    labelled = batch.labels >= 0
    has_mask = torch.zeros_like(labelled) if batch.masks is None else torch.from_numpy(batch.masks.any(axis=(1, 2)))
    groups = {
        "faithfulness": torch.ones_like(labelled),
        "road": torch.ones_like(labelled),
        "localisation": labelled & has_mask,
        "specificity": labelled & (subject.config.num_labels >= 3),
        "sanity": batch.for_sanity,
    }
    return {group: rows for group, rows in groups.items() if group in protocol.metrics and rows.any()}


def _maps_of_classes(
    subject: Subject, reading: Reading, classes: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """By the name of the map and the key in `classes`, each (batch,): the maps (batch, rows, cols)."""
    # Where all images of a batch are read correctly, the true class is the one that is asked about.
    distinct, columns = torch.stack(list(classes.values()), dim=1).unique(dim=1, return_inverse=True)
    found = {}
    for name in subject.maps:
        maps = reading.maps(name, distinct)
        found[name] = {which: maps[:, column] for which, column in zip(classes, columns.tolist(), strict=True)}
    return found


def _maps_after_changes(
    subject: Subject, images: torch.Tensor, asked: torch.Tensor, seed: int, count: Callable[[int], object]
) -> dict[str, dict[str, torch.Tensor]]:
    """By the metric and the name of the map: the maps (batch, rows, cols) that are compared with the intact ones."""

    def read(model: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        count(len(images))
        reading = Reading(model, images, subject.maps)
        return {name: reading.maps(name, asked[:, None])[:, 0] for name in subject.maps}

    stages = randomise(subject.model, seed)
    first, model = next(stages)
    changed = {f"left after randomising {first}": read(model, images)}
    for _ in stages:
        pass  # Each stage shuffles more of the same copy.
    changed["left after randomising everything"] = read(model, images)
    changed["stability under noise"] = read(
        subject.model, add_noise(images, subject.image_processor.image_std, seed=seed)
    )
    mirrored = read(subject.model, images.flip(-1))
    changed["stability under a flip"] = {name: maps.flip(-1) for name, maps in mirrored.items()}
    return changed


def _localise(maps: torch.Tensor, masks: np.ndarray) -> list[Measured]:
    patches = localization.patch_mask(masks, (maps.shape[-2], maps.shape[-1]))
    values = maps.numpy()
    found = (
        localization.pointing_game(values, patches),
        localization.relevance_mass_accuracy(values, patches),
        localization.mass_at_matched_sharpness(values, patches),
        localization.relevance_rank_accuracy(values, patches),
        localization.region_iou(values, patches),
        localization.chance_level(patches),
    )
    return [(name, values, None) for name, values in zip(LOCALISATION, found, strict=True)]


def _compare_classes(classes: torch.Tensor, maps: torch.Tensor, masks: np.ndarray | None) -> list[Measured]:
    found = specificity_of_maps(classes, maps, masks)
    measured: list[Measured] = [(name, found.distance[:, place], None) for place, name in enumerate(SPECIFICITY[:2])]
    if found.mass is not None:
        measured.append((LOST_MASS, found.mass[:, 0] - found.mass[:, 1], None))
    return measured


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
