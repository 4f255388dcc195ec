# SPDX-License-Identifier: MIT
"""Explaining an image at every level of a taxonomy, from the root to the leaf.

A tree is a CSV file: its first column is the class, the next ones the levels above it, and the header names them. One
prompt set for each level, all on the same frozen backbone, reads the path from the root to the leaf (Prompt-CAM,
Chowdhury et al., CVPR 2025, figure 9).
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import cached_file

from prompt_cam_hf.data.images import ImageSource, image_name, open_image
from prompt_cam_hf.data.taxonomy_tree import Taxonomy, read_taxonomy
from prompt_cam_hf.explanations.explain import ClassTraits, Explanation, read_state
from prompt_cam_hf.explanations.figures import Scale
from prompt_cam_hf.explanations.maps import MapKind, check_kind, map_box
from prompt_cam_hf.explanations.ranking import RankingMethod
from prompt_cam_hf.explanations.results import Result
from prompt_cam_hf.explanations.sheet import Sheet
from prompt_cam_hf.loading import ClassifierLike, as_classifier, check_prompt_cam
from prompt_cam_hf.modeling.checkpoint_prompt_cam import explained_load_errors

# Beside the model, in a folder or a Hub repository.
TAXONOMY_FILE = "taxonomy.csv"


@dataclass(frozen=True, repr=False)
class TaxonomyPath(Result):
    """A model's predictions on an image at every level, with the maps of the predicted nodes.

    Attributes:
        source: The image's path, or an empty string.
        taxonomy: The tree.
        explanations: For each level, from the root to the leaf, the `Explanation` of the node predicted there.
    """

    source: str
    taxonomy: Taxonomy
    explanations: dict[str, Explanation]

    @property
    def nodes(self) -> dict[str, str]:
        """The predicted node of each level, from the root to the leaf."""
        return {level: explanation.prediction.label for level, explanation in self.explanations.items()}

    @property
    def conflicts(self) -> dict[str, str]:
        """For each level whose node does not belong to the one predicted above it, the node that it belongs to."""
        return self.taxonomy.conflicts(self.nodes)

    @property
    def consistent(self) -> bool:
        """Whether the predictions are a path of the tree."""
        return not self.conflicts

    def __str__(self) -> str:
        lines = [f"{self.source or 'image'}: {'a path of the tree' if self.consistent else 'no path of the tree'}"]
        for level, explanation in self.explanations.items():
            conflict = f", which {self.conflicts[level]}" if level in self.conflicts else ""
            best = explanation.prediction
            lines.append(f"  {level}: {best.label} ({best.probability:.1%}){conflict}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the image, in the types of JSON; `path` has an entry for each level, the root first."""
        path = []
        for level, explanation in self.explanations.items():
            told = explanation.to_dict()
            path.append({"level": level, "conflict": self.conflicts.get(level), **told["classes"][0]})
            common = {key: value for key, value in told.items() if key not in ("classes", "top")}
        return {**common, "image": self.source, "consistent": self.consistent, "path": path}

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each level and head, the most important head first."""
        return [
            {**row, "image": self.source, "level": level, "consistent": self.consistent}
            for level, explanation in self.explanations.items()
            for row in explanation.to_rows()
        ]

    def sheet(self, heads: int | None, outline: bool, scale: Scale) -> Sheet:
        """The image beside the most important heads' maps, one row a level."""
        first = next(iter(self.explanations.values()))
        rows = tuple(self._row(level, explanation.classes[0]) for level, explanation in self.explanations.items())
        return replace(first, classes=rows).sheet(heads, outline, scale)

    def _row(self, level: str, traits: ClassTraits) -> ClassTraits:
        conflict = f" [{self.conflicts[level]}]" if level in self.conflicts else ""
        return replace(traits, label=f"{level}: {traits.label}{conflict}")


def explain_path(
    model: ClassifierLike,
    image: ImageSource,
    taxonomy: Taxonomy | str | os.PathLike | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    kind: MapKind = "attention",
    method: RankingMethod = "greedy",
    blur: Literal["tokens", "patches"] = "tokens",
    interpolate_pos_encoding: bool = False,
) -> TaxonomyPath:
    """Explain the predictions of a model with a prompt set for each level of a taxonomy, from the root to the leaf.

    The layers that the levels share run once; see `forward_sets` of the model.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model (in evaluation mode) with `image_processor`.
        image: An image: a path, bytes or a PIL image, of any size and shape.
        taxonomy: The tree, or its file; None: the one that was saved with the model.
        image_processor: For a loaded model.
        kind, method, blur, interpolate_pos_encoding: As in `explain`.

    Raises:
        ValueError: the model's prompt sets are not levels of the tree, or `explain` refuses an argument.
        OSError: the image, the model or the tree cannot be found.

    Example:
        >>> from prompt_cam_hf import explain_path
        >>> path = explain_path("birds", "bird.jpg")
        >>> print(path)
        >>> path.nodes, path.consistent
        >>> path.save("path.png")
    """
    classifier = as_classifier(model, image_processor)
    network = classifier.model
    check_prompt_cam(network.config.model_type, network.name_or_path or "The model")
    if not isinstance(taxonomy, Taxonomy):
        taxonomy = read_taxonomy(taxonomy or find_taxonomy(network.name_or_path))
    check_kind(kind)
    levels = _levels_of(network.prompt_sets, taxonomy)
    models = {level: network.only_prompts(level) for level in levels}
    for level in levels:
        _check_nodes(taxonomy, level, models[level].config.id2label)
    opened, source = open_image(image), image_name(image)
    box = map_box(network, classifier.image_processor, opened)
    pixel_values = classifier.image_processor(opened, return_tensors="pt")["pixel_values"].to(network.device)
    with torch.no_grad():
        states = network.last_layer_states(pixel_values, levels, interpolate_pos_encoding)
    explanations = {}
    for level, state in states.items():
        ((scores, traits),) = read_state(models[level], state, None, kind, method, blur)
        explanations[level] = Explanation(opened, source, box, kind, method, scores, traits)
    return TaxonomyPath(source, taxonomy, explanations)


def find_taxonomy(model: str) -> str:
    """Find the file of the tree that was saved with a model, in its folder or Hub repository.

    Raises:
        FileNotFoundError: no tree was saved with the model.
        OSError: the Hub cannot be reached.
    """
    file = None
    if model:
        with explained_load_errors(model):
            file = cached_file(model, TAXONOMY_FILE, _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise FileNotFoundError(f"{model or 'The model'} has no {TAXONOMY_FILE}; give the tree.")
    return file


def _levels_of(prompt_sets: Iterable[str], taxonomy: Taxonomy) -> list[str]:
    """The levels that have a prompt set, from the root to the leaf."""
    levels = [level for level in reversed(taxonomy.levels) if level in prompt_sets]
    if not levels:
        raise ValueError(
            f"The model has the prompt sets {', '.join(map(repr, prompt_sets))}, and none of them is a level of the "
            f"taxonomy: {', '.join(map(repr, taxonomy.levels))}."
        )
    return levels


def _check_nodes(taxonomy: Taxonomy, level: str, id2label: Mapping[int, str]) -> None:
    for label in id2label.values():
        if label not in taxonomy.nodes(level):
            raise ValueError(f"The prompt set {level!r} has a class {label!r}, and the taxonomy has no such {level}.")
