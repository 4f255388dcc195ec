# SPDX-License-Identifier: MIT
"""`atlas`: runs the model on all images part by part, sums up by class, and writes two tables and a page."""

import io
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import datasets
import numpy as np
import pyarrow.parquet as pq
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.class_atlas.collect import ROW_SCHEMA, MapSums, Options, collect
from prompt_cam_hf.class_atlas.page import NUM_CONFUSION_EXAMPLES, NUM_CONFUSIONS, write_page
from prompt_cam_hf.class_atlas.summary import Summary, class_table, summarize
from prompt_cam_hf.data.image_processors import input_size
from prompt_cam_hf.data.labelled_images import LabelledImages, Split, read_labelled_images
from prompt_cam_hf.data.trained_on import count_trained_on, warn_of_training_images
from prompt_cam_hf.explanations.ranking import check_ranking
from prompt_cam_hf.files import only_writer, write_atomically
from prompt_cam_hf.loading import Classifier, ClassifierLike, as_classifier, model_name, weights_digest
from prompt_cam_hf.parts import Parts
from prompt_cam_hf.progress import progress

logger = logging.getLogger(__name__)

PART_SIZE = 256  # images
IMAGES, CLASSES, FACTS, PAGE = "images.parquet", "classes.parquet", "atlas.json", "index.html"


class Atlas(NamedTuple):
    """A finished atlas: its files, and the numbers in them, except for the mean maps."""

    page: Path
    images: Path
    classes: Path
    facts: Path
    summary: Summary


def atlas(
    model: ClassifierLike,
    data: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    out: str | os.PathLike,
    *,
    image_processor: BaseImageProcessor | None = None,
    split: Split | None = None,
    top_heads: int = 3,
    num_examples: int = 3,
    method: Literal["greedy", "exact", "shapley"] = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    batch_size: int = 8,
    overwrite: bool = False,
    name: str | None = None,
    revision: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
) -> Atlas:
    """Summarise over many images which heads each class rests on, where they look, and which classes are confused.

    Writes four files to `out`: `images.parquet` (one row per image), `classes.parquet` (one row per class),
    `atlas.json` (which images they are, and the numbers over all classes) and `index.html`, a single page that works
    offline. docs/traits/atlas.md describes them. A call that was interrupted can be repeated: it continues where it
    stopped and comes to the same results, byte for byte on the same machine with the same batch size. Images that
    cannot be read are listed and left out. Where the model was trained on the images, as far as that can be known from
    the recipe beside it, a warning says so.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model (in evaluation mode) with `image_processor`.
        data: A folder with one subfolder per class, a folder of images without labels, a CSV or Parquet file, the id
            of a data set on the Hub, or a loaded data set; see `read_labelled_images`.
        out: The folder for the results; it is created.
        image_processor: The image processor of a loaded model.
        split: "train", "validation" or "test". None: the last of these that the data have.
        top_heads: How many of an image's most important heads count as its top heads, from 1 to the number of heads.
        num_examples: How many images are named and shown for each class, at least 0; with very many classes the page
            shows fewer.
        method, blur: How heads are ranked; see `rank_heads`.
        batch_size: Images that go through the network at once.
        overwrite: Replace the results of an earlier run in `out`.
        name, revision: The configuration and the revision of a data set on the Hub.
        image_column, label_column: The columns of images or paths, and of class names or numbers.

    Returns:
        The files, and the numbers in them.

    Raises:
        FileExistsError: `out` holds results, and `overwrite` is not set, or another process writes there.
        FileNotFoundError: the model or the data cannot be found.
        ValueError: an argument is out of range, no image can be read, or `out` holds an unfinished atlas with other
            settings.

    Example:
        >>> from prompt_cam_hf import atlas
        >>> result = atlas("my_model", "photos", "my_atlas")
        >>> result.summary.total  # images
        >>> result.page  # open it in a browser
    """
    classifier = as_classifier(model, image_processor)
    config, heads = classifier.model.config, classifier.model.num_trait_heads
    if not 1 <= top_heads <= heads:
        raise ValueError(
            f"top_heads is {top_heads}; the model's last layer has {heads} heads, so 1 to {heads} can be."
        )
    if num_examples < 0 or batch_size < 1:
        raise ValueError(f"num_examples is {num_examples} and batch_size {batch_size}; at least 0 and 1 are needed.")
    check_ranking(classifier.model, method, blur)
    options = Options(top_heads, method, blur)
    images = read_labelled_images(
        data,
        config.id2label,
        split=split,
        name=name,
        revision=revision,
        image_column=image_column,
        label_column=label_column,
    )
    parts = Parts(Path(out), "atlas", (IMAGES, CLASSES, FACTS, PAGE), ROW_SCHEMA, len(images), PART_SIZE)
    with only_writer(Path(out)):
        parts.open(_settings(classifier, images, options), overwrite)
        sums = _collect_parts(classifier, images, options, batch_size, parts)
        summary = summarize(
            lambda columns: (row for table in parts.tables(columns) for row in table.to_pylist()),
            config.id2label,
            heads,
            top_heads,
            num_examples,
            NUM_CONFUSIONS,
            NUM_CONFUSION_EXAMPLES,
        )
        if summary.num_unreadable == summary.total:
            raise ValueError(f"None of the {summary.total} images can be read: {summary.unreadable[0][1]}")
        if summary.num_unreadable:
            logger.warning("Left out %d images that cannot be read; the page lists them.", summary.num_unreadable)
        facts = _facts(config.name_or_path, data, images, summary)
        if facts["warning"]:
            logger.warning("%s", facts["warning"])
        page = write_page(classifier, images, summary, sums, options, facts, batch_size)
        buffer = io.BytesIO()
        pq.write_table(class_table(summary, sums), buffer)
        written = (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode()
        parts.finish(IMAGES, {CLASSES: buffer.getvalue(), FACTS: written, PAGE: page.encode()})
    return Atlas(parts.out / PAGE, parts.out / IMAGES, parts.out / CLASSES, parts.out / FACTS, summary)


def _facts(model: str, data: Any, images: LabelledImages, summary: Summary) -> dict[str, Any]:
    """What atlas.json holds; docs/traits/atlas.md describes it."""
    trained_on = count_trained_on(model, data, images)
    return {
        "model": model_name(model) or "a Prompt-CAM",
        "data": images.origin,
        "split": images.split,
        "num_trained_on": trained_on,
        "warning": warn_of_training_images(images, trained_on),
        "num_classes": len(summary.classes),
        "num_images": summary.total - summary.num_unreadable,
        "num_unreadable": summary.num_unreadable,
        "num_labelled": summary.labelled,
        "accuracy": summary.accuracy,
        "mean_class_accuracy": summary.mean_class_accuracy,
    }


def _collect_parts(
    classifier: Classifier, images: LabelledImages, options: Options, batch_size: int, parts: Parts
) -> MapSums:
    """Run the model on the images of all unfinished parts, and return the sums of the maps over all images.

    After each part, the sums of the trait maps so far are saved together with the number of finished parts. Only that
    number says which parts are finished: a part that was written after it is made again, and comes out the same.
    """
    model = classifier.model
    grid = model.map_layout(*input_size(classifier.image_processor)).grid
    sums, done = MapSums.zeros(model.config.num_labels, model.num_trait_heads, grid), 0
    if parts.state.exists():
        try:
            with np.load(parts.state) as saved:
                sums, done = MapSums(saved["sums"], saved["counts"]), int(saved["parts"])
        except (BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); all images are looked at again.", parts.state, error)
    with progress(len(images), "Looking at images", " images", initial=min(done * PART_SIZE, len(images))) as shown:
        for number in range(done, len(parts)):
            rows: list[dict[str, Any]] = []
            for batch in collect(classifier, images, parts.places(number), options, batch_size, sums):
                rows += batch
                shown.update(len(batch))
            parts.add(number, rows)
            buffer = io.BytesIO()
            np.savez(buffer, parts=number + 1, sums=sums.sums, counts=sums.counts)
            write_atomically(parts.state, buffer.getvalue())
    return sums


def _settings(classifier: Classifier, images: LabelledImages, options: Options) -> dict[str, Any]:
    """What a run must agree on to go on with the parts of another; see `Parts.open`."""
    config = classifier.model.config
    # Of a Prompt-CAM; another model is told by its weights.
    names = ("class_prompt_layer", "first_prompt_layer", "num_agnostic_prompts")
    layers = [getattr(config, name) for name in names if hasattr(config, name)]
    return {
        "model weights": weights_digest(classifier.model),
        "model settings": [config.id2label, *layers],
        "image processor": classifier.image_processor.to_dict(),
        "images": images.digest(),
        "top heads": options.top_heads,
        "ranking": f"{options.method}, {options.blur}",
        "part size": PART_SIZE,
    }
