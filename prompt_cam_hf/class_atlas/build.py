# SPDX-License-Identifier: MIT
"""How is an atlas made? Look at all images part by part, sum up, write tables and a page."""

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.class_atlas.collect import MapSums, Options, collect, input_size
from prompt_cam_hf.class_atlas.page import NUM_CONFUSION_EXAMPLES, NUM_CONFUSIONS, write_page
from prompt_cam_hf.class_atlas.store import CLASSES, IMAGES, PAGE, PART_SIZE, Store
from prompt_cam_hf.class_atlas.summary import Summary, class_table, summarize
from prompt_cam_hf.data.labelled_images import LabelledImages, Split, read_labelled_images
from prompt_cam_hf.explanations.ranking import check_ranking
from prompt_cam_hf.loading import Classifier, ClassifierLike, as_classifier, weights_digest
from prompt_cam_hf.modeling.backbone_prompt_cam import grid_size

logger = logging.getLogger(__name__)

# Raise it whenever the parts of an older version no longer fit.
_FORMAT = 1


class Atlas(NamedTuple):
    """A finished atlas: its files, and what they say in numbers."""

    page: Path
    images: Path
    classes: Path
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
    """Sum up where the prompts of all classes look, over any number of images.

    Writes to `out`: `images.parquet` (a row an image), `classes.parquet` (a row a class) and `index.html`, one page
    that needs nothing else. docs/traits/atlas.md describes the columns. Killed at any moment, the same call goes on
    where it was, and comes to the same results, byte for byte with the same batch size on the same machine. Images
    that cannot be read are listed and left out.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model (in evaluation mode) with `image_processor`.
        data: A folder of class folders, a folder of images without labels, a CSV or Parquet file, a data set's id on
            the Hub, or a loaded data set; see `read_labelled_images`.
        out: The folder for the results; it is made.
        image_processor: For a loaded model.
        split: "train", "validation" or "test"; None: the last of these that the data have.
        top_heads: So many of an image's most important heads count as the top ones; at most all heads.
        num_examples: Images that are named and shown for each class; on the page fewer with very many classes.
        method: How heads are ranked; see `rank_heads`.
        blur: As in `rank_heads`.
        batch_size: Images that go through the network at once.
        overwrite: Replace the results of an earlier run in `out`.
        name: Configuration of a data set on the Hub.
        revision: Revision of a data set on the Hub.
        image_column: Column of images or paths.
        label_column: Column of class names or numbers.

    Raises:
        FileExistsError: `out` holds results, and `overwrite` is not set.
        FileNotFoundError: the model or the data cannot be found.
        ValueError: an argument is out of range, the data have no images that can be read, or `out` holds an
            unfinished atlas with other settings.
    """
    classifier = as_classifier(model, image_processor)
    config = classifier.model.config
    heads = config.backbone_config.num_attention_heads
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
    store = Store(out, _settings(classifier, images, options), overwrite)
    parts = -(-len(images) // PART_SIZE)
    sums = _collect_parts(classifier, images, options, batch_size, store, parts)
    summary = summarize(
        lambda columns: store.rows(parts, columns),
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
    model_name = Path(config.name_or_path).name or "a Prompt-CAM"
    page = write_page(classifier, images, summary, sums, options, model_name, batch_size)
    store.finish(parts, class_table(summary, sums), page)
    return Atlas(store.out / PAGE, store.out / IMAGES, store.out / CLASSES, summary)


def _collect_parts(
    classifier: Classifier, images: LabelledImages, options: Options, batch_size: int, store: Store, parts: int
) -> MapSums:
    """Look at the images that no finished part holds; the sums over all of them."""
    config = classifier.model.config
    grid = grid_size(config.backbone_config, *input_size(classifier.image_processor))
    empty = MapSums.zeros(config.num_labels, config.backbone_config.num_attention_heads, grid)
    done, sums = store.restore(empty)
    with tqdm(
        total=len(images),
        initial=min(done * PART_SIZE, len(images)),
        desc="Looking at images",
        unit="img",
        disable=None,
    ) as progress:
        for part in range(done, parts):
            start, end = part * PART_SIZE, min((part + 1) * PART_SIZE, len(images))
            rows: list[dict[str, Any]] = []
            for batch in collect(classifier, images, start, end, options, batch_size, sums.add):
                rows += batch
                progress.update(len(batch))
            store.add_part(part, rows, sums)
    return sums


def _settings(classifier: Classifier, images: LabelledImages, options: Options) -> dict[str, Any]:
    """What a run must agree on to go on with another's parts; each entry is named in the message when it does not."""
    config = classifier.model.config
    layers = (config.class_prompt_layer, config.first_prompt_layer, config.num_agnostic_prompts)
    return {
        "format": _FORMAT,
        "model weights": weights_digest(classifier.model),
        "model settings": _digest([config.id2label, *layers]),
        "image processor": _digest(classifier.image_processor.to_dict()),
        "images": images.digest(),
        "top heads": options.top_heads,
        "ranking": f"{options.method}, {options.blur}",
        "part size": PART_SIZE,
    }


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


__all__ = ["Atlas", "atlas"]
