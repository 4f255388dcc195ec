# SPDX-License-Identifier: MIT
"""The forms in which an evaluation is shown: JSON, tables, and a page with curves, the best and the worst images."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from PIL import Image

from prompt_cam_hf.data.ground_truth import mask_as_seen
from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.data.labelled_images import LabelledImages
from prompt_cam_hf.evaluation.curves import COLOURS, MARKER_PATHS, charts, lines
from prompt_cam_hf.evaluation.measure import FAITHFULNESS, LOCALISATION, LOST_MASS, SPECIFICITY
from prompt_cam_hf.evaluation.subjects import Subject, explainer
from prompt_cam_hf.evaluation.summary import Evaluation, Mean, as_text
from prompt_cam_hf.html import Drawn, DrawnMap, EmbeddedImage, embed_map, embed_thumbnail, render_page
from prompt_cam_hf.metrics.faithfulness import changed_parts
from prompt_cam_hf.version import __version__

EVALUATION, MEASUREMENTS, CURVES, PAGE = "evaluation.json", "measurements.parquet", "curves.svg", "index.html"
# What the best and the worst images are chosen by, if it was measured.
_GAP = "insertion minus deletion"
_NUM_EXAMPLES = 4
_PHOTO_SIDE, _PHOTO_BYTES = 480, 24_000
# Which values of a metric are good; of those that are missing, neither high nor low is good by itself.
_HIGH = (
    *LOCALISATION[:-1],
    LOST_MASS,
    "accuracy",
    "insertion",
    "road",
    "stability under noise",
    "stability under a flip",
)
_NEAR_ZERO = ("left after randomising the prompts or classifier", "left after randomising everything")
_DIRECTIONS = {
    **dict.fromkeys(_HIGH, "↑ high is good"),
    **dict.fromkeys(("deletion", "like a random class's map"), "↓ low is good"),
    **dict.fromkeys(_NEAR_ZERO, "→ 0 is good"),
}


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


def best_rows(table: Table) -> list[set[int]]:
    """The rows with the best value of each column, as it is shown; none where there is nothing to compare."""
    best = []
    for place, column in enumerate(table.columns):
        shown = [(number, row[place]) for number, (_, row) in enumerate(table.rows)]
        known = {n: float(as_text(mean.value)) for n, mean in shown if mean is not None and not math.isnan(mean.value)}
        if column in _NEAR_ZERO:
            known = {number: -abs(value) for number, value in known.items()}
        elif column not in _HIGH:
            known = {number: -value for number, value in known.items()}
        compared = column in _DIRECTIONS and len(known) > 1
        best.append({number for number, value in known.items() if compared and value == max(known.values())})
    return best


def render_report(
    found: Evaluation,
    measurements: Iterable[pa.Table],
    subjects: Sequence[Subject],
    images: LabelledImages,
    true_mask: Callable[[int, str, Image.Image], np.ndarray | None] | None = None,
) -> str:
    """Render the page as HTML. The images that it shows are opened and run through the network again.

    They are shown with the first of the models; `measurements` are rows with the columns of `ROW_SCHEMA`. `true_mask`
    is that of `prompt_cam_hf.evaluation.build.GroundTruth`.
    """
    subject = subjects[0]
    judged_by, good, bad = _best_and_worst(measurements, subject)
    # The other metrics that images are chosen by always ask for the true class.
    of_prediction = judged_by == _GAP and found.protocol.classes == "predicted"
    shown = [
        [
            _draw(subject, images, index, f"{judged_by} {as_text(score, 2)}", of_prediction, true_mask)
            for index, score in some
        ]
        for some in (good, bad)
    ]
    return render_page(
        "evaluation.html.j2",
        found=found,
        names=[subject.name for subject in subjects],
        tables=[(table, best_rows(table)) for table in tables(found.means)],
        protocol_of=lambda metric: found.protocol.of(metric, found.ground_truth),
        directions=_DIRECTIONS,
        lines=list(lines(found).values()),
        charts=charts(found) if found.curves else [],
        colours=COLOURS,
        markers=MARKER_PATHS,
        judged_by=judged_by,
        map_name=subject.maps[0] if subject.maps else "",
        best=shown[0],
        worst=shown[1],
        version=__version__,
    )


# (index of an image, what its map scores)
_Judged = list[tuple[int, float]]


def _best_and_worst(measurements: Iterable[pa.Table], subject: Subject) -> tuple[str, _Judged, _Judged]:
    """The metric that a model's first map is judged by, its best images (best first) and its worst (worst first).

    Images that the model misread are not among the best, whatever their maps are like.
    """
    if not subject.maps:
        return "", [], []
    scores: dict[str, dict[int, float]] = {}
    misread = set()
    for table in measurements:
        for row in table.select(["index", "model", "map", "metric", "value"]).to_pylist():
            if (row["model"], row["map"]) == (subject.name, subject.maps[0]) and not math.isnan(row["value"]):
                scores.setdefault(row["metric"], {})[row["index"]] = row["value"]
            if (row["model"], row["metric"], row["value"]) == (subject.name, "accuracy", 0):
                misread.add(row["index"])
    if "insertion" in scores:
        scores[_GAP] = {index: value - scores["deletion"][index] for index, value in scores["insertion"].items()}
    for name in (_GAP, "pointing game", "distance to runner-up"):
        if name in scores:
            judged = sorted(scores[name].items(), key=lambda pair: (-pair[1], pair[0]))
            half = min(_NUM_EXAMPLES, len(judged) // 2)
            worst = judged[len(judged) - half :][::-1]
            return name, [one for one in judged if one not in worst and one[0] not in misread][:_NUM_EXAMPLES], worst
    return "", [], []


def _draw(
    subject: Subject,
    images: LabelledImages,
    index: int,
    score: str,
    of_prediction: bool,
    true_mask: Callable[[int, str, Image.Image], np.ndarray | None] | None,
) -> Drawn:
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
    weights = one_map.relu().detach().cpu().numpy()
    names = subject.config.id2label
    caption = f"map of {names[asked]}, taken for {names[predicted]}"
    if label is not None:
        caption += f", labelled {names[label]}"
    if asked == predicted == label:
        caption = f"map of {names[asked]}, read rightly"
    embedded = embed_thumbnail(as_seen, _PHOTO_SIDE, _PHOTO_BYTES)
    mask = None if true_mask is None else true_mask(index, images.name(index), image)
    outline = "" if mask is None else _outline(mask_as_seen(mask, subject.image_processor), embedded)
    title = f"map {subject.maps[0]}"
    drawn = DrawnMap(embed_map(weights), title, f"{weights.max():.2g}", f"{title} of {images.name(index)}")
    return Drawn(images.name(index), embedded, [drawn], f"{caption}; {score}", (0, 0, 1, 1), outline)


def _outline(mask: np.ndarray, image: EmbeddedImage) -> str:
    """The border of a mask (height, width) as an SVG path in pixels of an embedded image of the same view."""
    height, width = mask.shape
    if not mask.any():
        return ""
    (found,) = Figure().add_subplot().contour(np.pad(mask.astype(float), 1), [0.5]).get_paths()
    borders = found.to_polygons(closed_only=False)
    scale = (image.width / width, image.height / height)
    # The middle of a pixel is half a pixel from its edge, and there is one more pixel around the mask.
    paths = [np.round((np.asarray(border) - 0.5) * scale, 1).tolist() for border in borders]
    return "".join("M" + "L".join(f"{x:g} {y:g}" for x, y in path) for path in paths)
