# SPDX-License-Identifier: MIT
"""How is an evaluation run? Measure all images part by part, on any number of processes, then sum up and report."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm
from transformers import Pipeline

from prompt_cam_hf.data.ground_truth import mask_as_seen
from prompt_cam_hf.data.images import UnreadableImageError, open_image
from prompt_cam_hf.data.labelled_images import LabelledImages, Split, read_labelled_images
from prompt_cam_hf.evaluation.measure import SANITY_IMAGES, Batch, Protocol, measure
from prompt_cam_hf.evaluation.parts import PART_SIZE, Parts
from prompt_cam_hf.evaluation.report import CURVES, EVALUATION, MEASUREMENTS, PAGE, draw_curves, render_report, to_json
from prompt_cam_hf.evaluation.subjects import Subject, check_same_classes, load_subject
from prompt_cam_hf.evaluation.summary import Key, Mean, summarize
from prompt_cam_hf.explanations.results import write_atomically
from prompt_cam_hf.loading import weights_digest
from prompt_cam_hf.version import __version__

logger = logging.getLogger(__name__)

_RESULTS = (PAGE, EVALUATION, MEASUREMENTS, CURVES)
# Processes wait for the slowest one, which may have a part of slow images left.
_LONGEST_WAIT = timedelta(days=7)


class GroundTruth(NamedTuple):
    """Where the traits of an image's class are.

    Attributes:
        name: What the masks are, in words; a run goes on only with masks of the same name.
        mask: From an image's index, its name and the image itself to a boolean mask (height, width) of its pixels;
            None: not known.
    """

    name: str
    mask: Callable[[int, str, Image.Image], np.ndarray | None]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        means: Each metric of each model and map, with its confidence interval.
        curves: The mean curves of insertion and deletion, by (model, map, metric).
        protocol: What was measured, and how.
        ground_truth: What maps were localised against, in words; None: nothing.
        origin: Where the images come from, in words.
        num_images: Images that could be read.
        num_unreadable: Images that could not.
        folder: Where evaluation.json, measurements.parquet and index.html are.
    """

    means: list[Mean]
    curves: dict[Key, np.ndarray]
    protocol: Protocol
    ground_truth: str | None
    origin: str
    num_images: int
    num_unreadable: int
    folder: Path


def evaluate(
    model: str | os.PathLike | Pipeline,
    data: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    out: str | os.PathLike,
    *,
    baselines: Sequence[str | os.PathLike | Pipeline] = (),
    maps: Sequence[str] | None = None,
    baseline_maps: Sequence[str] | None = None,
    protocol: Protocol | None = None,
    ground_truth: GroundTruth | None = None,
    split: Split | None = None,
    image_column: str = "image",
    label_column: str = "label",
    overwrite: bool = False,
    device: str | None = None,
) -> Evaluation:
    """Measure a model, its maps and its rivals on the same images.

    Writes to `out`: `evaluation.json` (all means, which model cards read), `measurements.parquet` (a row for each
    image, model, map and metric), `curves.svg` where there are curves, and `index.html`, one page that needs nothing
    else. docs/evaluation.md describes them. Killed at any moment, the same call goes on where it was. Started by
    `accelerate launch` in several processes, these share the images; all must see the same `out`.

    Args:
        model: A Prompt-CAM (or another classifier that `baselines` may name): a folder, a Hub id, or a pipeline.
        data: As in `prompt_cam_hf.data.labelled_images.read_labelled_images`.
        out: The folder for the results; it is made.
        baselines: Models to compare with, of the same classes: linear probes, VPTs, other Prompt-CAMs.
        maps: Names of `prompt_cam_hf.evaluation.subjects.MAPS` to measure on the model; by default its aggregated map.
        baseline_maps: Likewise of the baselines; by default the usual post-hoc maps.
        protocol: What is measured, and how.
        ground_truth: Where the traits of an image's class are; without it, nothing is localised.
        split: "train", "validation" or "test"; None: the last of these that the data have.
        image_column: Column of images or paths.
        label_column: Column of class names or numbers.
        overwrite: Replace the results of an earlier run in `out`, once there are new ones; drop the parts of an
            unfinished one that has other settings.
        device: Where models are loaded to. None: the best there is, each of several processes its own.

    Raises:
        FileExistsError: `out` holds results, and `overwrite` is not set.
        FileNotFoundError: a model or the data cannot be found.
        ValueError: an argument is wrong, the models differ in their classes, no image can be read, or `out` holds an
            unfinished evaluation with other settings.
    """
    protocol = protocol or Protocol()
    state = PartialState(timeout=_LONGEST_WAIT)
    if device is None and state.num_processes > 1:
        device = str(state.device)
    subjects = [load_subject(model, maps, device), *(load_subject(one, baseline_maps, device) for one in baselines)]
    subjects = _tell_apart(subjects)
    for other in subjects[1:]:
        check_same_classes(
            subjects[0].model.config.id2label, other.model.config.id2label, (subjects[0].name, other.name)
        )
    images = read_labelled_images(
        data, subjects[0].model.config.id2label, split=split, image_column=image_column, label_column=label_column
    )
    out = Path(out)
    order = np.random.default_rng(protocol.seed).permutation(len(images)).tolist()
    parts = Parts(out, -(-len(images) // PART_SIZE))
    if state.is_main_process:
        _check_absent(out, parts, overwrite)
        parts.open(_settings(subjects, images, protocol, ground_truth), overwrite)
    state.wait_for_everyone()
    missing = parts.missing()
    mine = missing[state.process_index :: state.num_processes]
    for number in tqdm(mine, desc="Measuring", unit="part", disable=None if state.is_main_process else True):
        places = range(number * PART_SIZE, min((number + 1) * PART_SIZE, len(order)))
        parts.add(number, _measure_part(subjects, images, places, order, protocol, ground_truth))
    state.wait_for_everyone()
    found = _summarize(parts, images, protocol, ground_truth, out)
    # The first process drops the parts: all must have read them.
    state.wait_for_everyone()
    if state.is_main_process:
        _write(found, parts, subjects, images)
    state.wait_for_everyone()
    return found


def _tell_apart(subjects: list[Subject]) -> list[Subject]:
    """Give models of the same name numbers."""
    names = [subject.name for subject in subjects]
    return [
        subject._replace(name=f"{subject.name} ({names[: index + 1].count(subject.name)})")
        if names.count(subject.name) > 1
        else subject
        for index, subject in enumerate(subjects)
    ]


def _check_absent(out: Path, parts: Parts, overwrite: bool) -> None:
    """The page comes last: where it is, a run has come to its end. Beside parts, other results are their own run's."""
    there = [name for name in ((PAGE,) if parts.are_there() else _RESULTS) if (out / name).exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{out / there[0]} exists already; choose another folder, or set overwrite (--overwrite)."
        )


def _settings(
    subjects: Sequence[Subject], images: LabelledImages, protocol: Protocol, ground_truth: GroundTruth | None
) -> dict[str, Any]:
    """What a run must agree on to go on with another's parts."""
    measured = {key: value for key, value in asdict(protocol).items() if key != "batch_size"}
    settings = {
        "models": [[subject.name, weights_digest(subject.model), list(subject.maps)] for subject in subjects],
        "image processors": [subject.image_processor.to_dict() for subject in subjects],
        "images": images.digest(),
        "ground truth": None if ground_truth is None else ground_truth.name,
        "part size": PART_SIZE,
        "version": __version__,
        **measured,
    }
    # As it will be read back: tuples become lists.
    return json.loads(json.dumps(settings, sort_keys=True, default=str))


def _measure_part(
    subjects: Sequence[Subject],
    images: LabelledImages,
    places: range,
    order: Sequence[int],
    protocol: Protocol,
    ground_truth: GroundTruth | None,
) -> list[dict[str, Any]]:
    """The rows of the images at these places of the order."""
    opened: list[tuple[int, int, Image.Image]] = []
    rows: list[dict[str, Any]] = []
    names = subjects[0].model.config.id2label
    for place in places:
        index = order[place]
        try:
            opened.append((place, index, open_image(images.source(index))))
            status = "readable"
        except (UnreadableImageError, OSError) as error:
            logger.warning("Left out: %s", error)
            status = "unreadable"
        rows.append(_about(images, index, names) | {"model": "", "map": "", "metric": status, "value": 1.0})
    limit = len(order) if protocol.limit is None else protocol.limit
    truths = [
        None if ground_truth is None else ground_truth.mask(index, images.name(index), image)
        for _, index, image in opened
    ]
    for subject in subjects:
        for start in range(0, len(opened), protocol.batch_size):
            chunk = slice(start, start + protocol.batch_size)
            batch = _as_seen(subject, images, opened[chunk], truths[chunk], limit)
            for at, map_name, (metric, value, curve) in measure(subject, batch, protocol):
                measured = {"model": subject.name, "map": map_name, "metric": metric, "value": value, "curve": curve}
                rows.append(_about(images, opened[start + at][1], names) | measured)
    return rows


def _about(images: LabelledImages, index: int, names: Mapping[int, str]) -> dict[str, Any]:
    """The columns that say which image a row is about."""
    label = images.labels[index]
    return {"index": index, "image": images.name(index), "label": None if label is None else names[label]}


def _as_seen(
    subject: Subject,
    images: LabelledImages,
    opened: Sequence[tuple[int, int, Image.Image]],
    truths: Sequence[np.ndarray | None],
    limit: int,
) -> Batch:
    """Images and masks as they go into a model."""
    processor = subject.image_processor
    opened_images = [image for *_, image in opened]
    pixel_values = processor(opened_images, return_tensors="pt")["pixel_values"].to(subject.model.device)
    masks = None
    if any(truth is not None for truth in truths):
        blank = np.zeros(pixel_values.shape[-2:], dtype=bool)
        masks = np.stack([blank if truth is None else mask_as_seen(truth, processor) for truth in truths])
    labels = torch.tensor([-1 if images.labels[index] is None else images.labels[index] for _, index, _ in opened])
    places = torch.tensor([place for place, *_ in opened])
    return Batch(pixel_values, labels, masks, places < limit, places < min(limit, SANITY_IMAGES))


def _summarize(
    parts: Parts, images: LabelledImages, protocol: Protocol, ground_truth: GroundTruth | None, out: Path
) -> Evaluation:
    means, curves = summarize(parts.tables(), protocol.seed)
    counts = {mean.metric: mean.num_images for mean in means if not mean.model}
    if not counts.get("readable"):
        raise ValueError(f"None of the {len(images)} images can be read.")
    return Evaluation(
        [mean for mean in means if mean.model],
        curves,
        protocol,
        None if ground_truth is None else ground_truth.name,
        images.origin,
        counts["readable"],
        counts.get("unreadable", 0),
        out,
    )


def _write(found: Evaluation, parts: Parts, subjects: Sequence[Subject], images: LabelledImages) -> None:
    """Put the results in their places, each as a whole and the page last; then drop the parts."""
    names = [subject.name for subject in subjects]
    write_atomically(found.folder / EVALUATION, to_json(found, names).encode())
    parts.join(found.folder / MEASUREMENTS)
    if found.curves:
        write_atomically(found.folder / CURVES, draw_curves(found))
    else:
        (found.folder / CURVES).unlink(missing_ok=True)
    write_atomically(found.folder / PAGE, render_report(found, parts.tables(), subjects, images).encode())
    for name in _RESULTS:
        for left_behind in found.folder.glob(f".{name}.*partial"):
            left_behind.unlink()
    parts.drop()


__all__ = ["Evaluation", "GroundTruth", "evaluate"]
