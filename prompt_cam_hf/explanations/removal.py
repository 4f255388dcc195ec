# SPDX-License-Identifier: MIT
"""Removing a trait from an image, and comparing the predictions before and after.

The paper does it by hand (section 4: the red spot on a blackbird's wing). Here a region is filled from around it.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageFilter
from scipy.sparse.linalg import cg
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import ImageSource, image_name, open_image
from prompt_cam_hf.explanations.explain import ClassScore, Explanation, explain_each
from prompt_cam_hf.explanations.figures import Scale, check_head_count
from prompt_cam_hf.explanations.holes import hole_system, solve_exactly
from prompt_cam_hf.explanations.maps import MapKind, strong_region
from prompt_cam_hf.explanations.results import Result, format_table
from prompt_cam_hf.explanations.sheet import Row, draw_rows
from prompt_cam_hf.loading import ClassifierLike, as_classifier

RemovalMethod = Literal["blur", "mean", "inpaint"]
# A direct solution takes a fraction of a second up to here; a larger region starts from a coarser solution.
_MAX_DIRECT_PIXELS = 20_000
# Laplace's equation on a grid: each pixel is the mean of the four beside it.
_LAPLACE = {(-1, 0): 1.0, (1, 0): 1.0, (0, -1): 1.0, (0, 1): 1.0}


def remove_region(image: Image.Image, mask: np.ndarray, method: RemovalMethod = "inpaint") -> Image.Image:
    """Remove a region from an image by filling it; pixels outside it, and the size, do not change.

    - "blur": a Gaussian blur whose standard deviation is half the root of the region's area. It spreads the region's
      colours and does not remove them.
    - "mean": the mean colour of the rest of the image.
    - "inpaint": the smoothest continuation of the border (Laplace's equation, solved for each channel).

    Args:
        image: The image, upright as `open_image` gives it.
        mask: (height, width), bool; True where the image is filled.
        method: See above.

    Raises:
        ValueError: the mask has another shape or type or holds no pixel or all pixels, or `method` is unknown.
    """
    if method not in get_args(RemovalMethod):
        raise ValueError(f'method={method!r} is not known; use "blur", "mean" or "inpaint".')
    mask = np.asarray(mask)
    if mask.shape != (image.height, image.width) or mask.dtype != bool:
        raise ValueError(
            f"The mask is {mask.dtype} of shape {mask.shape}; it must be bool of the image's (height, width), "
            f"{(image.height, image.width)}."
        )
    if mask.all() or not mask.any():
        raise ValueError(f"The mask holds {'all' if mask.all() else 'no'} pixels; it must hold a part of the image.")
    pixels = np.array(image.convert("RGB"))
    if method == "blur":
        blurred = image.convert("RGB").filter(ImageFilter.GaussianBlur(float(np.sqrt(mask.sum())) / 2))
        pixels[mask] = np.asarray(blurred)[mask]
    elif method == "mean":
        pixels[mask] = np.rint(pixels[~mask].mean(axis=0)).astype(np.uint8)
    else:
        pixels[mask] = np.clip(np.rint(_fill_smoothly(pixels.astype(np.float64), mask)[mask]), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


def _fill_smoothly(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Solve Laplace's equation in the mask, with the pixels around it as border."""
    rows, cols = (slice(max(line.min() - 1, 0), line.max() + 2) for line in np.nonzero(mask))
    filled = pixels.copy()
    filled[rows, cols] = _solve(pixels[rows, cols], mask[rows, cols])
    return filled


def _solve(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    if not mask.any():  # a coarse image of a thin region
        return pixels
    matrix, border = hole_system(pixels, mask, _LAPLACE)
    filled = pixels.copy()
    if len(border) <= _MAX_DIRECT_PIXELS:
        filled[mask] = solve_exactly(matrix, border)
    else:
        # A coarse solution is wrong in fine detail at the border only, which few iterations correct.
        start = _coarse_solution(pixels, mask)[mask]
        solved = [cg(matrix, border[:, c], start[:, c], rtol=1e-4, maxiter=100)[0] for c in range(3)]
        filled[mask] = np.stack(solved, axis=-1)
    return filled


def _coarse_solution(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Solve the image at half the size, and enlarge the solution."""
    height, width = mask.shape
    half = ((width + 1) // 2, (height + 1) // 2)

    def resize(channel: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
        return np.array(Image.fromarray(channel.astype(np.float32)).resize(size, how), dtype=np.float64)

    # A coarse pixel is the mean of its known pixels, and unknown where there are none.
    weight = resize(~mask, half, Image.Resampling.BOX)
    sums = np.stack([resize(pixels[..., c] * ~mask, half, Image.Resampling.BOX) for c in range(3)], axis=-1)
    coarse = _solve(sums / np.maximum(weight, 1e-6)[..., None], weight == 0)
    return np.stack([resize(coarse[..., c], mask.shape[::-1], Image.Resampling.BILINEAR) for c in range(3)], axis=-1)


def box_mask(size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """A rectangle (left, top, right, bottom, as Pillow's `crop` takes it) as a mask, bool (height, width).

    Raises:
        ValueError: the box is empty, or a part of it lies outside the image, whose `size` is (width, height).
    """
    if len(box) != 4 or not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        raise ValueError(
            f"The box {tuple(box)} does not lie in the image of {size[0]}x{size[1]} pixels; give left, top, right, "
            "bottom, with right and bottom excluded."
        )
    left, top, right, bottom = map(int, box)
    mask = np.zeros((size[1], size[0]), bool)
    mask[top:bottom, left:right] = True
    return mask


@dataclass(frozen=True, repr=False)
class Removal(Result):
    """A prediction before and after a region was removed from the image.

    Attributes:
        before: The explanation of the image as it was, of one class.
        after: The explanation of the changed image, of the same class; its `image` is that image.
        mask: (height, width), bool; the region.
        method: How it was filled.
    """

    before: Explanation
    after: Explanation
    mask: np.ndarray
    method: RemovalMethod

    def scores(self) -> list[tuple[ClassScore, ClassScore]]:
        """Scores before and after, of the class asked about and of the five best classes before and after."""
        label = self.before.classes[0].label
        after = {score.label: score for score in self.after.scores}
        wanted = {label, *(score.label for score in (*self.before.top, *self.after.top))}
        return [(score, after[score.label]) for score in self.before.scores if score.label in wanted]

    def __repr__(self) -> str:
        before, after = self.before.prediction, self.after.prediction
        return (
            f"<Removal from {self.before.source or 'an image'}: {before.label} ({before.probability:.1%}) became "
            f"{after.label} ({after.probability:.1%})>"
        )

    def __str__(self) -> str:
        before, after = self.before.prediction, self.after.prediction
        change = "stays" if before.label == after.label else "becomes"
        rows = [
            (
                old.label,
                f"{old.probability:.1%}",
                f"{new.probability:.1%}",
                f"{old.logit:.2f}",
                f"{new.logit:.2f}",
                f"{new.logit - old.logit:+.2f}",
            )
            for old, new in self.scores()
        ]
        columns = ("class", "probability before", "after", "score before", "after", "change")
        return (
            f"{self.before.source or 'image'}: {before.label} ({before.probability:.1%}) {change} "
            f"{after.label} ({after.probability:.1%}) without {self.mask.mean():.1%} of the image ({self.method})\n"
            + format_table(columns, rows)
        )

    def to_dict(self) -> dict[str, Any]:
        """Both explanations, and the region as runs: first pixel and length, in row-major order."""
        edges = np.flatnonzero(np.diff(np.pad(self.mask.ravel(), 1).astype(np.int8))).reshape(-1, 2)
        runs = [[int(start), int(end - start)] for start, end in edges]
        return {
            "method": self.method,
            "mask_runs": runs,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each class of `scores`."""
        return [
            {
                "image": self.before.source,
                "class": old.label,
                "rank_before": old.rank,
                "rank_after": new.rank,
                "probability_before": old.probability,
                "probability_after": new.probability,
                "score_before": old.logit,
                "score_after": new.logit,
            }
            for old, new in self.scores()
        ]

    def figure(self, heads: int | None = None, outline: bool = False, scale: Scale = "figure") -> Figure:
        """Draw both images beside the maps of the heads that mattered most before; see `Result.figure`."""
        before, after = self.before.classes[0], self.after.classes[0]
        order = before.head_order[: check_head_count(heads, len(before.maps))]
        style = self.before.style([traits.maps[head] for traits in (before, after) for head in order], outline, scale)
        rows = []
        for when, done, explanation in (
            ("before", "region outlined", self.before),
            ("after", "region filled", self.after),
        ):
            traits, best = explanation.classes[0], explanation.prediction
            verdict = "predicted" if traits.rank == 1 else f"predicted: {best.label} ({best.probability:.1%})"
            first, *panels = traits.draw(replace(style, image=explanation.image), order)
            first = replace(first, title=done, outline=self.mask.astype(np.float32))
            rows.append(Row(f"{when}: {traits.label} ({traits.probability:.1%}), {verdict}", [first, *panels]))
        return draw_rows(rows, [style.colour_bar()])


def remove_trait(
    model: ClassifierLike,
    image: ImageSource,
    region: tuple[int, int, int, int] | np.ndarray | Literal["top head"] = "top head",
    class_name: str | int | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    method: RemovalMethod = "inpaint",
    kind: MapKind = "attention",
    interpolate_pos_encoding: bool = False,
) -> Removal:
    """Remove a region from an image, and compare the model's predictions before and after.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model with `image_processor`.
        image: The image.
        region: A box (left, top, right, bottom) in pixels of the upright image; a mask (height, width), bool; or
            "top head": where the map of the class's most important head has at least a quarter of its highest value.
        class_name: The name or number of the class whose traits are shown; None: the one predicted before.
        image_processor: For a loaded model.
        method: How the region is filled; see `remove_region`.
        kind, interpolate_pos_encoding: As in `explain`.

    Raises:
        ValueError: the region does not fit the image, or `explain` refuses an argument.
        OSError: the image or the model cannot be found.

    Example:
        >>> from prompt_cam_hf import remove_trait
        >>> removal = remove_trait("my_model", "bird.jpg", region=(10, 5, 30, 25), method="mean")
        >>> print(removal)
        >>> removal.after.prediction.label
        >>> removal.save("before_and_after.png")
    """
    classifier = as_classifier(model, image_processor)
    opened = open_image(image)
    options: dict[str, Any] = {"kind": kind, "interpolate_pos_encoding": interpolate_pos_encoding}
    before = replace(next(explain_each(classifier, [opened], class_name, **options)), source=image_name(image))
    mask = _region_mask(before, region)
    changed = remove_region(opened, mask, method)
    after = next(explain_each(classifier, [changed], before.classes[0].number, **options))
    return Removal(before, replace(after, source=before.source), mask, method)


def _region_mask(
    explanation: Explanation, region: tuple[int, int, int, int] | np.ndarray | Literal["top head"]
) -> np.ndarray:
    size = explanation.image.size
    if isinstance(region, np.ndarray):
        return region
    if isinstance(region, str):
        if region != "top head":
            raise ValueError(f'region={region!r} is not known; give a box, a mask or "top head".')
        traits = explanation.classes[0]
        head = traits.head_order[0]
        mask = strong_region(traits.maps[head], size, explanation.box)
        if mask.all():
            raise ValueError(f"The map of the top head, {head}, covers the whole image; give a box or a mask.")
        return mask
    return box_mask(size, region)
