# SPDX-License-Identifier: MIT
"""`make_study`: images beside the maps of several models, as a form that does not say whose maps they are."""

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import pandas as pd
import torch
from PIL import Image
from transformers import Pipeline

from prompt_cam_hf.baselines.backbone import map_layout
from prompt_cam_hf.data.images import open_image
from prompt_cam_hf.data.labelled_images import Split, read_labelled_images
from prompt_cam_hf.evaluation.subjects import Subject, check_same_classes, explainer, load_subject
from prompt_cam_hf.explanations.class_names import find_class
from prompt_cam_hf.explanations.explain import explain_each
from prompt_cam_hf.explanations.maps import layout_box
from prompt_cam_hf.files import write_atomically
from prompt_cam_hf.html import Drawn, DrawnMap, embed_map, embed_thumbnail, render_page, share_of
from prompt_cam_hf.loading import Classifier, has_trait_maps, weights_digest

FORM, KEY = "study.html", "key.csv"
KEY_COLUMNS = ("study", "picture", "trait", "model", "image", "class")
_IMAGE_SIDE, _IMAGE_BYTES = 480, 24_000


class _Picture(NamedTuple):
    """An image beside a model's maps: the code by which raters know it, and the traits that they are asked for."""

    code: str
    drawn: Drawn
    class_name: str
    traits: Sequence[str]


def make_study(
    models: Sequence[str | os.PathLike | Pipeline],
    data: str | os.PathLike | datasets.Dataset | datasets.DatasetDict,
    traits: Mapping[str, Sequence[str]],
    out: str | os.PathLike,
    *,
    images: int = 20,
    heads: int = 4,
    split: Split | None = None,
    seed: int = 0,
    overwrite: bool = False,
    device: str | None = None,
) -> Path:
    """Make the form of a study: every model's maps of the same images, in a random order, under codes.

    The maps are those of the image's true class. For each of its traits, raters say whether they recognise it in what
    the maps show. The form is one file that works offline, and saves the answers as a CSV file in the browser.

    Args:
        models: Prompt-CAMs or other classifiers of the same classes, as in `evaluate`.
        data: Labelled images, as in `evaluate`.
        traits: By class, its traits in the words of an expert, such as a field guide's. Images of other classes are
            left out.
        out: A folder, which is made. `study.html` is for the raters; `key.csv` says whose maps are whose, and is not.
        images: How many images, drawn at random; each gives a picture a model.
        heads: Of a Prompt-CAM or INTR, how many of the most important heads are drawn; 0 for its one aggregated map.
            Other models always have one map, by which raters may tell them from several heads.
        split: As in `evaluate`.
        seed: Draws images, order and codes.
        overwrite: Replace an earlier form.
        device: Where the models are loaded to.

    Returns:
        The form's path.

    Raises:
        FileExistsError: `out` holds a study, and `overwrite` is not set.
        ValueError: there is no model, no image of a class with traits, an argument is wrong, or the models have other
            classes.
        OSError: a model or the data cannot be found.
    """
    if images < 1 or heads < 0 or not models:
        raise ValueError(f"images is {images}, heads {heads}, with {len(models)} models; 1, 0 and 1 are the least.")
    folder = Path(out)
    if (folder / FORM).exists() and not overwrite:
        raise FileExistsError(f"{folder / FORM} exists already; choose another --out, or add --overwrite.")
    subjects = [load_subject(model, None, device) for model in models]
    for other in subjects[1:]:
        check_same_classes(subjects[0], other)
    names = subjects[0].config.id2label
    wanted = {find_class(names, name): list(dict.fromkeys(listed)) for name, listed in traits.items()}
    found = read_labelled_images(data, names, split=split)
    usable = [index for index, label in enumerate(found.labels) if label is not None and wanted.get(label)]
    if not usable:
        raise ValueError(f"None of the {len(found)} images is of a class that traits are given for.")
    random = np.random.default_rng(seed)
    chosen = random.permutation(usable)[:images].tolist()
    shown = [(number, index) for number in range(len(subjects)) for index in chosen]
    weights = [weights_digest(subject.model) for subject in subjects]
    told = f"{weights} {found.digest()} {sorted(wanted.items())} {shown} {seed} {heads}"
    study = hashlib.sha256(told.encode()).hexdigest()[:8]
    pictures, rows = [], []
    for place, (number, index) in enumerate(random.permutation(shown).tolist(), 1):
        code, label = f"P{place:03d}", found.labels[index]
        assert label is not None  # only labelled images are usable
        drawn = _draw(subjects[number], open_image(found.source(index)), label, heads, code)
        pictures.append(_Picture(code, drawn, names[label], wanted[label]))
        model = f"{number + 1}: {subjects[number].name}"
        rows += [(study, code, trait, model, found.name(index), names[label]) for trait in wanted[label]]
    folder.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([KEY_COLUMNS, *rows])
    write_atomically(folder / KEY, text.getvalue().encode())
    page = render_page("study.html.j2", study=study, pictures=pictures, num_questions=len(rows))
    write_atomically(folder / FORM, page.encode())
    return folder / FORM


def _draw(subject: Subject, image: Image.Image, label: int, heads: int, code: str) -> Drawn:
    """An image beside the maps of its true class; nothing that is written says which image or model it is."""
    maps = [
        DrawnMap(embed_map(values), f"map {number}", "most", f"map {number} of picture {code}")
        for number, values in enumerate(_maps(subject, image, label, heads), 1)
    ]
    layout = partial(map_layout, subject.model)
    box = share_of(layout_box(layout, subject.image_processor, image), image.size)
    return Drawn(f"Picture {code}", embed_thumbnail(image, _IMAGE_SIDE, _IMAGE_BYTES), maps, "image and maps", box)


def _maps(subject: Subject, image: Image.Image, label: int, heads: int) -> Iterator[np.ndarray]:
    if heads and has_trait_maps(subject.config.model_type):
        classifier = Classifier(subject.model, subject.image_processor)
        (explanation,) = explain_each(classifier, [image], label)
        traits = explanation.classes[0]
        yield from (traits.maps[head] for head in traits.head_order[:heads])
    else:
        values = subject.image_processor(image, return_tensors="pt")["pixel_values"].to(subject.model.device)
        asked = torch.tensor([label], device=values.device)
        yield explainer(subject.maps[0])(subject.model, values, asked)[0].relu().detach().cpu().numpy()


def read_traits(path: str | os.PathLike) -> dict[str, list[str]]:
    """Read the traits of classes from a CSV file in UTF-8 with the columns `class` and `trait`, a trait a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the columns are not there, or a cell is empty.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file of traits {os.fspath(path)!r}.")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    if not {"class", "trait"} <= set(table.columns):
        raise ValueError(f"{path} has no columns class and trait in its first line.")
    found: dict[str, list[str]] = {}
    for number, cells in enumerate(zip(table["class"], table["trait"], strict=True), 2):
        name, trait = map(str.strip, cells)
        if not name or not trait:
            raise ValueError(f"{path}, line {number}: class or trait is missing.")
        found.setdefault(name, []).append(trait)
    return found
