# SPDX-License-Identifier: MIT
"""Finding the classes asked for, by name or by number, with hints where a name is nearly right."""

import difflib
from collections.abc import Iterable, Mapping

import torch

from prompt_cam_hf.modeling.outputs_prompt_cam import check_class_numbers

_MAX_HINTS = 3


def find_class(id2label: Mapping[int, str], name: str) -> int:
    """The number of the class with this name.

    The exact name comes first; otherwise case does not matter, and underscores, hyphens and spaces are the same.

    Raises:
        ValueError: no class has this name (the nearest names are suggested), or several do.
    """
    matches = [number for number, label in id2label.items() if label == name]
    if not matches:
        wanted = _plain(name)
        matches = [number for number, label in id2label.items() if _plain(label) == wanted]
    if len(matches) == 1:
        return int(matches[0])
    if matches:
        found = " and ".join(f"{id2label[number]!r} (number {number})" for number in matches)
        raise ValueError(f"The class {name!r} is not clear: it may be {found}.")
    hints = _nearest(id2label.values(), name)
    if hints:
        listed = " or ".join(repr(hint) for hint in hints)
        raise ValueError(f"There is no class {name!r} among the model's {len(id2label)}; did you mean {listed}?")
    examples = ", ".join(repr(label) for label in list(id2label.values())[:_MAX_HINTS])
    raise ValueError(f"There is no class {name!r}; the model knows {len(id2label)} classes, such as {examples}.")


def find_classes(id2label: Mapping[int, str], classes: str | int | Iterable[str | int]) -> list[int]:
    """The numbers of one class or several, in the given order, without repetition. Numbers are checked and kept.

    Raises:
        ValueError: a class does not exist, or `classes` is empty.
    """
    found = []
    for wanted in [classes] if isinstance(classes, str | int) else classes:
        if isinstance(wanted, str):
            found.append(find_class(id2label, wanted))
        elif int(wanted) in id2label:
            found.append(int(wanted))
        else:
            raise ValueError(f"There is no class number {wanted}; the model's go from 0 to {len(id2label) - 1}.")
    if not found:
        raise ValueError("No class was named; give at least one, or None for the predicted one.")
    return list(dict.fromkeys(found))


def check_classes(classes: torch.Tensor, batch: int, num_labels: int) -> torch.Tensor:
    """Bring the class numbers (batch,) or (batch, k) asked about for each image into the shape (batch, k).

    Raises:
        ValueError: `classes` has another shape, or holds a number that is not a class.
    """
    if classes.ndim not in (1, 2) or len(classes) != batch:
        raise ValueError(
            f"classes has the shape {tuple(classes.shape)}; it must be (batch,) or (batch, k), with batch={batch}."
        )
    check_class_numbers(classes, num_labels, "classes")
    return classes.view(batch, -1)


def _plain(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _nearest(labels: Iterable[str], name: str) -> list[str]:
    """Names that hold what was written, shortest first; then names that are spelt alike."""
    by_plain = {_plain(label): label for label in labels}
    wanted = _plain(name)
    holding = sorted((plain for plain in by_plain if wanted and wanted in plain), key=len)
    alike = difflib.get_close_matches(wanted, by_plain, n=_MAX_HINTS, cutoff=0.5)
    return [by_plain[plain] for plain in dict.fromkeys([*holding, *alike])][:_MAX_HINTS]
