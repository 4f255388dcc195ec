# SPDX-License-Identifier: MIT
"""`evaluate`: measures all images part by part, on one or several processes, then sums up and writes a report."""

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import datasets
import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import Pipeline

from prompt_cam_hf.data.ground_truth import mask_as_seen
from prompt_cam_hf.data.image_processors import input_size
from prompt_cam_hf.data.images import UnreadableImageError, open_image
from prompt_cam_hf.data.labelled_images import LabelledImages, Split, read_labelled_images
from prompt_cam_hf.evaluation.curves import draw_curves
from prompt_cam_hf.evaluation.measure import ROW_SCHEMA, SANITY_IMAGES, Batch, Protocol, count_passes, measure
from prompt_cam_hf.evaluation.report import CURVES, EVALUATION, MEASUREMENTS, PAGE, render_report, to_json
from prompt_cam_hf.evaluation.subjects import Subject, check_same_classes, load_subject
from prompt_cam_hf.evaluation.summary import Evaluation, summarize
from prompt_cam_hf.files import only_writer
from prompt_cam_hf.loading import has_trait_maps, weights_digest
from prompt_cam_hf.parts import Parts
from prompt_cam_hf.progress import Progress, in_words, progress

logger = logging.getLogger(__name__)

PART_SIZE = 16  # images
_TIMED_IMAGES = 8
# How long processes wait for the slowest one.
_LONGEST_WAIT = timedelta(days=7)


class GroundTruth(NamedTuple):
    """Where the traits of an image's class are.

    Attributes:
        name: What the masks are, in words. An interrupted run is resumed only with masks of the same name.
        mask: Takes an image's index, its name and the image itself, and returns a boolean mask (height, width) of its
            pixels, or None if it is not known.
    """

    name: str
    mask: Callable[[int, str, Image.Image], np.ndarray | None]


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
    """Measure a model, its maps and its baselines on the same images.

    Writes to `out`: `evaluation.json` (all means, which model cards show), `measurements.parquet` (one row for each
    image, model, map and metric), `curves.svg` if there are curves, and `index.html`, a page that works offline.
    docs/evaluation.md describes them. A call that was interrupted can be repeated and continues where it stopped.
    Several processes started by `accelerate launch` share the images; all of them must see the same `out`.

    Args:
        model: A Prompt-CAM, or another classifier as in `baselines`: a folder, a Hub id, or a pipeline.
        data: A folder, a file, the id of a data set on the Hub, or a loaded data set; see
            `prompt_cam_hf.data.labelled_images.read_labelled_images`.
        out: The folder for the results; it is created.
        baselines: Models of the same classes to compare with: linear probes, VPTs, other Prompt-CAMs.
        maps: Which maps of the model are measured, of `prompt_cam_hf.evaluation.subjects.MAPS`. None: its aggregated
            map.
        baseline_maps: Which maps of the baselines are measured. None: the usual post-hoc maps.
        protocol: What is measured, and how. None: `Protocol()`.
        ground_truth: Where the traits of an image's class are. None: localisation is not measured.
        split: "train", "validation" or "test". None: the last of these that the data have.
        image_column, label_column: The columns of images or paths, and of class names or numbers.
        overwrite: Replace the results of an earlier run in `out` once there are new ones, and drop the parts of an
            unfinished run with other settings.
        device: Where the models are loaded to. None: the best device there is; of several processes, each takes its
            own.

    Returns:
        The means with their confidence intervals, and the mean curves.

    Raises:
        FileExistsError: `out` holds results, and `overwrite` is not set, or another process writes there.
        FileNotFoundError: a model or the data cannot be found.
        ValueError: an argument is wrong, the models have different classes, no image can be read, or `out` holds an
            unfinished evaluation with other settings.

    Example:
        >>> from prompt_cam_hf import evaluate
        >>> result = evaluate("my_model", "photos", "report")
        >>> for mean in result.means:
        ...     print(mean.model, mean.map, mean.metric, mean, mean.num_images)
    """
    protocol = protocol or Protocol()
    state = PartialState(timeout=_LONGEST_WAIT)
    if device is None and state.num_processes > 1:
        device = str(state.device)
    subjects = [load_subject(model, maps, device), *(load_subject(one, baseline_maps, device) for one in baselines)]
    subjects = _tell_apart(subjects)
    for other in subjects[1:]:
        check_same_classes(subjects[0], other)
    images = read_labelled_images(
        data, subjects[0].config.id2label, split=split, image_column=image_column, label_column=label_column
    )
    order = np.random.default_rng(protocol.seed).permutation(len(images)).tolist()
    results = (EVALUATION, MEASUREMENTS, CURVES, PAGE)
    parts = Parts(Path(out), "evaluation", results, ROW_SCHEMA, len(images), PART_SIZE)
    with only_writer(Path(out)) if state.is_main_process else nullcontext():
        if state.is_main_process:
            parts.open(_settings(subjects, images, protocol, ground_truth), overwrite)
        state.wait_for_everyone()
        missing = parts.missing()
        mine = missing[state.process_index :: state.num_processes]
        places = [parts.places(number) for number in mine]
        with _show_passes(subjects, protocol, places, state.is_main_process) as shown:
            for number, part in zip(mine, places, strict=True):
                parts.add(number, _measure_part(subjects, images, part, order, protocol, ground_truth, shown.update))
        state.wait_for_everyone()
        found = _summarize(parts, images, protocol, ground_truth)
        # The main process removes the parts, so all others must have read them.
        state.wait_for_everyone()
        if state.is_main_process:
            parts.finish(
                MEASUREMENTS,
                {
                    EVALUATION: to_json(found, [subject.name for subject in subjects]).encode(),
                    CURVES: draw_curves(found) if found.curves else None,
                    PAGE: render_report(
                        found, parts.tables(), subjects, images, ground_truth and ground_truth.mask
                    ).encode(),
                },
            )
        state.wait_for_everyone()
    return found


def _tell_apart(subjects: list[Subject]) -> list[Subject]:
    """Number the models that have the same name."""
    names = [subject.name for subject in subjects]
    return [
        subject._replace(name=f"{subject.name} ({names[: index + 1].count(subject.name)})")
        if names.count(subject.name) > 1
        else subject
        for index, subject in enumerate(subjects)
    ]


def _settings(
    subjects: Sequence[Subject], images: LabelledImages, protocol: Protocol, ground_truth: GroundTruth | None
) -> dict[str, Any]:
    """What a run must agree on to go on with the parts of another; see `Parts.open`."""
    measured = {key: value for key, value in asdict(protocol).items() if key != "batch_size"}
    return {
        "models": [[subject.name, weights_digest(subject.model), list(subject.maps)] for subject in subjects],
        "image processors": [subject.image_processor.to_dict() for subject in subjects],
        "images": images.digest(),
        "ground truth": None if ground_truth is None else ground_truth.name,
        "part size": PART_SIZE,
        **measured,
    }


def _show_passes(subjects: Sequence[Subject], protocol: Protocol, parts: Sequence[range], show: bool) -> Progress:
    """Show the progress in passes of images through networks, and say before how long all of them will take."""
    passes = [sum(count_passes(subject, protocol, part) for part in parts) for subject in subjects]
    if show and any(passes):
        seconds = sum(number * _time_pass(subject) for number, subject in zip(passes, subjects, strict=True))
        print(
            f"Measuring {sum(map(len, parts)):,} images with {len(subjects)} "
            f"{'model' if len(subjects) == 1 else 'models'}: {sum(passes):,} passes through the networks, about "
            f"{in_words(seconds)}.",
            file=sys.stderr,
        )
    return progress(sum(passes), "Measuring", " passes", show=show)


@torch.no_grad()
def _time_pass(subject: Subject) -> float:
    """How long an image takes through the network, in seconds; the first pass is always a slow one."""
    model = subject.model
    images = torch.zeros((_TIMED_IMAGES, 3, *input_size(subject.image_processor)), device=model.device)
    for _ in range(2):
        start = time.perf_counter()
        model(images).logits.cpu()
    return (time.perf_counter() - start) / len(images)


def _measure_part(
    subjects: Sequence[Subject],
    images: LabelledImages,
    places: range,
    order: Sequence[int],
    protocol: Protocol,
    ground_truth: GroundTruth | None,
    count: Callable[[int], object],
) -> list[dict[str, Any]]:
    """The rows of the images at these places of the order; `count` is that of `measure`."""
    opened: list[tuple[int, int, Image.Image]] = []
    rows: list[dict[str, Any]] = []
    names = subjects[0].config.id2label
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
        explains_itself = has_trait_maps(subject.model.config.model_type)
        prepared = cast(Any, subject.model).prepared() if explains_itself else nullcontext()
        for chunk in _chunks(subject, [image for *_, image in opened], protocol.batch_size):
            batch = _as_seen(subject, images, opened[chunk], truths[chunk], limit)
            with prepared:
                found = list(measure(subject, batch, protocol, count))
            for at, map_name, (metric, value, curve) in found:
                measured = {"model": subject.name, "map": map_name, "metric": metric, "value": value, "curve": curve}
                rows.append(_about(images, opened[chunk][at][1], names) | measured)
    return rows


def _chunks(subject: Subject, images: Sequence[Image.Image], batch_size: int) -> Iterator[slice]:
    """Neighbours that share a batch; where the image processor keeps an image's shape, those of one size."""
    size = subject.image_processor.to_dict().get("size") or {}
    keeps_shape = "longest_edge" in size
    for _, group in groupby(range(len(images)), key=lambda place: images[place].size if keeps_shape else None):
        places = list(group)
        for start in range(places[0], places[-1] + 1, batch_size):
            yield slice(start, min(start + batch_size, places[-1] + 1))


def _about(images: LabelledImages, index: int, names: Mapping[int, str]) -> dict[str, Any]:
    """The columns that identify the image of a row."""
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
    parts: Parts, images: LabelledImages, protocol: Protocol, ground_truth: GroundTruth | None
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
        parts.out,
    )
