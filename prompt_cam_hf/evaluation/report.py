# SPDX-License-Identifier: MIT
"""The forms in which an evaluation is shown: JSON, tables, curves, and a page with the best and the worst images."""

import base64
import io
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.evaluation.measure import FAITHFULNESS, LOCALISATION, SPECIFICITY
from prompt_cam_hf.evaluation.subjects import Subject, explainer
from prompt_cam_hf.evaluation.summary import Evaluation, Mean
from prompt_cam_hf.explanations.figures import overlay
from prompt_cam_hf.html import EmbeddedImage, embed_thumbnail, render_page
from prompt_cam_hf.metrics.faithfulness import changed_parts
from prompt_cam_hf.version import __version__

EVALUATION, MEASUREMENTS, CURVES, PAGE = "evaluation.json", "measurements.parquet", "curves.svg", "index.html"
# What the best and the worst images are chosen by, if it was measured.
_GAP = "insertion minus deletion"
_NUM_EXAMPLES = 4
_THUMBNAIL_SIDE, _THUMBNAIL_BYTES = 200, 12_000
# They can be told apart without colours.
_LINE_STYLES = ("-", "--", "-.", ":")


class Table(NamedTuple):
    """A table: a row for each model, or model and map, with the mean of each metric; None: not measured."""

    title: str
    row_heading: str
    columns: list[str]
    rows: list[tuple[str, list[Mean | None]]]


def to_json(found: Evaluation, names: Sequence[str]) -> str:
    """Write all means as JSON; `names` are those of the models, in the order in which they were given.

    "metrics" are those of the first model and its first map, which a model card shows; "all" are those of all.
    """
    first_map = next((mean.map for mean in found.means if mean.model == names[0] and mean.map), "")
    main = [mean for mean in found.means if mean.model == names[0] and mean.map in ("", first_map)]
    content = {
        "model": names[0],
        "map": first_map,
        "protocol": f"map {first_map or 'none'}, 95 % bootstrap intervals of the mean over images",
        "data": found.origin,
        "num_images": found.num_images,
        "num_unreadable": found.num_unreadable,
        "metrics": {mean.metric: _numbers(mean, found) for mean in main},
        "all": [
            {"model": mean.model, "map": mean.map, "metric": mean.metric, **_numbers(mean, found)}
            for mean in found.means
        ],
        "curves": [
            {
                "model": model,
                "map": map_name,
                "metric": metric,
                "part": [round(part, 5) for part in changed_parts(found.protocol.preset, len(curve) - 1).tolist()],
                "curve": [round(float(point), 5) for point in curve],
            }
            for (model, map_name, metric), curve in found.curves.items()
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _numbers(mean: Mean, found: Evaluation) -> dict[str, Any]:
    """A mean as JSON, which has null in place of NaN."""
    numbers = {name: getattr(mean, name) for name in ("value", "low", "high")}
    known = {name: None if np.isnan(number) else number for name, number in numbers.items()}
    return {**known, "num_images": mean.num_images, "protocol": found.protocol.of(mean.metric, found.ground_truth)}


def tables(means: Iterable[Mean]) -> list[Table]:
    """The paper's Tables 1 (accuracy of models) and 2 (faithfulness of maps), and one of each other metric group."""
    means = list(means)
    of_models = [mean for mean in means if not mean.map]
    of_maps = [mean for mean in means if mean.map]
    groups = {"Faithfulness": (*FAITHFULNESS, "road"), "Localisation": LOCALISATION, "Specificity": SPECIFICITY}
    found = [_table("Accuracy", "model", of_models)]
    for title, metrics in groups.items():
        found.append(_table(title, "model and map", [mean for mean in of_maps if mean.metric in metrics]))
    known = {metric for metrics in groups.values() for metric in metrics}
    title = "Sanity: rank correlation of a map with itself, -1 to 1"
    found.append(_table(title, "model and map", [mean for mean in of_maps if mean.metric not in known]))
    return [table for table in found if table.rows]


def _table(title: str, row_heading: str, means: Sequence[Mean]) -> Table:
    columns = list(dict.fromkeys(_column(mean.metric) for mean in means))
    by_row: dict[str, dict[str, Mean]] = {}
    for mean in means:
        by_row.setdefault(f"{mean.model}: {mean.map}" if mean.map else mean.model, {})[_column(mean.metric)] = mean
    return Table(
        title, row_heading, columns, [(name, [row.get(column) for column in columns]) for name, row in by_row.items()]
    )


def _column(metric: str) -> str:
    """The column of a metric: the first stage of randomisation is named differently in each kind of model."""
    is_last_stage = metric == "left after randomising everything"
    if metric.startswith("left after randomising") and not is_last_stage:
        return "left after randomising the prompts or classifier"
    return metric


def draw_curves(found: Evaluation) -> bytes:
    """Draw the mean curves of insertion and deletion side by side, as SVG."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    keys = list(dict.fromkeys((model, map_name) for model, map_name, _ in found.curves))
    for axis, metric in zip(axes, ("insertion", "deletion"), strict=True):
        for place, (model, map_name) in enumerate(keys):
            curve = found.curves[model, map_name, metric]
            style = _LINE_STYLES[place // 10 % len(_LINE_STYLES)]
            axis.plot(
                changed_parts(found.protocol.preset, len(curve) - 1),
                curve,
                style,
                label=f"{model}: {map_name}",
                linewidth=1.4,
            )
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("part of the pixels that is " + ("shown" if metric == "insertion" else "taken away"))
        axis.set_xlim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mean probability of the class")
    axes[0].set_ylim(0, None)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    buffer = io.BytesIO()
    # Without it, the identifiers inside are random.
    with rc_context({"svg.hashsalt": "prompt_cam_hf"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def render_report(
    found: Evaluation, measurements: Iterable[pa.Table], subjects: Sequence[Subject], images: LabelledImages
) -> str:
    """Render the page as HTML. The images that it shows are opened and run through the network again.

    They are shown with the first of the models; `measurements` are rows with the columns of `ROW_SCHEMA`.
    """
    subject = subjects[0]
    judged_by, good, bad = _best_and_worst(measurements, subject)
    # The other metrics that images are chosen by always ask for the true class.
    of_prediction = judged_by == _GAP and found.protocol.classes == "predicted"
    curves = None
    if found.curves:
        curves = "data:image/svg+xml;base64," + base64.b64encode(draw_curves(found)).decode()
    return render_page(
        "evaluation.html.j2",
        found=found,
        names=[subject.name for subject in subjects],
        tables=tables(found.means),
        protocol_of=lambda metric: found.protocol.of(metric, found.ground_truth),
        curves=curves,
        judged_by=judged_by,
        map_name=subject.maps[0] if subject.maps else "",
        best=[_draw(subject, images, index, score, of_prediction) for index, score in good],
        worst=[_draw(subject, images, index, score, of_prediction) for index, score in bad],
        version=__version__,
    )


# (index of an image, what its map scores)
_Judged = list[tuple[int, float]]


def _best_and_worst(measurements: Iterable[pa.Table], subject: Subject) -> tuple[str, _Judged, _Judged]:
    """The metric that a model's first map is judged by, its best images (best first) and its worst (worst first)."""
    if not subject.maps:
        return "", [], []
    scores: dict[str, dict[int, float]] = {}
    for table in measurements:
        for row in table.select(["index", "model", "map", "metric", "value"]).to_pylist():
            if (row["model"], row["map"]) == (subject.name, subject.maps[0]) and not math.isnan(row["value"]):
                scores.setdefault(row["metric"], {})[row["index"]] = row["value"]
    if "insertion" in scores:
        scores[_GAP] = {index: value - scores["deletion"][index] for index, value in scores["insertion"].items()}
    for name in (_GAP, "pointing game", "distance to runner-up"):
        if name in scores:
            judged = sorted(scores[name].items(), key=lambda pair: (-pair[1], pair[0]))
            half = min(_NUM_EXAMPLES, len(judged) // 2)
            return name, judged[:half], judged[::-1][:half]
    return "", [], []


class Shown(NamedTuple):
    """An image and its map, side by side."""

    name: str
    caption: str
    image: EmbeddedImage
    overlay: EmbeddedImage


def _draw(subject: Subject, images: LabelledImages, index: int, score: float, of_prediction: bool) -> Shown:
    """Draw an image as the model sees it, squashed or cropped: the map covers exactly that."""
    image = open_image(images.source(index))
    values = subject.image_processor(image, return_tensors="pt")["pixel_values"].to(subject.model.device)
    seen = subject.image_processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
    as_seen = Image.fromarray(np.clip(np.rint(seen), 0, 255).astype(np.uint8).transpose(1, 2, 0))
    with torch.no_grad():
        predicted = int(subject.model(values).logits[0].argmax())
    label = images.labels[index]
    asked = predicted if of_prediction or label is None else label
    one_map = explainer(subject.maps[0])(subject.model, values, torch.tensor([asked], device=values.device))[0]
    drawn = overlay(as_seen, one_map.relu().detach().cpu().numpy(), float(one_map.max()))
    names = subject.config.id2label
    caption = f"map of {names[asked]}, taken for {names[predicted]}"
    if label is not None and label != predicted:
        caption += f", labelled {names[label]}"
    return Shown(
        images.name(index),
        f"{caption}: {score:.2f}",
        embed_thumbnail(as_seen, _THUMBNAIL_SIDE, _THUMBNAIL_BYTES),
        embed_thumbnail(Image.fromarray(drawn), _THUMBNAIL_SIDE, _THUMBNAIL_BYTES),
    )
