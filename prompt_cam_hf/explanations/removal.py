# SPDX-License-Identifier: MIT
"""Removing a trait from an image, and comparing the predictions before and after.

The paper does it by hand (section 4: the red spot on a blackbird's wing). Here a region is filled from around it, and
as a control a region of the same shape elsewhere.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image, ImageFilter
from scipy.fft import irfft2, rfft2
from scipy.sparse.linalg import cg
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.images import ImageSource, image_name, open_image
from prompt_cam_hf.explanations.explain import ClassScore, Explanation, explain_each
from prompt_cam_hf.explanations.figures import Scale, check_head_count
from prompt_cam_hf.explanations.holes import hole_system, solve_exactly
from prompt_cam_hf.explanations.maps import Box, MapKind, strong_region
from prompt_cam_hf.explanations.results import Result, format_table
from prompt_cam_hf.explanations.sheet import Row, Sheet
from prompt_cam_hf.loading import ClassifierLike, as_classifier

RemovalMethod = Literal["blur", "mean", "inpaint"]
Region = tuple[int, int, int, int] | np.ndarray | int | Literal["top head"]
# A larger share of the image holds several traits, and what its removal does says little about any of them.
LARGE_REGION = 0.2
# Of a class's log odds: the odds change by less than a tenth.
_SMALL_FALL = 0.1
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


def head_region(explanation: Explanation, head: int | None = None) -> np.ndarray:
    """Find where the map of a head has at least a quarter of its highest value.

    Args:
        explanation: Its first class is the one whose map is read.
        head: The head; None: the most important one for the class.

    Returns:
        (height, width) of the image, bool; its mean is the region's share of the image.

    Raises:
        ValueError: the head does not exist, or its region is the whole image or empty.
    """
    traits = explanation.classes[0]
    head = traits.head_order[0] if head is None else head
    if not 0 <= head < len(traits.maps):
        raise ValueError(f"There is no head {head}; the model has heads 0 to {len(traits.maps) - 1}.")
    mask = strong_region(traits.maps[head], explanation.image.size, explanation.box)
    if mask.all():
        raise ValueError(f"The map of head {head} covers the whole image; give a box or a mask.")
    return mask


def control_region(mask: np.ndarray, box: Box | None = None) -> np.ndarray:
    """Find a region of the same shape elsewhere on the image, for comparison with what a region's removal does.

    Of all places it is the one that overlaps least with the region; of those that overlap equally little, one where
    the shape is not cut at an edge and goes on at the opposite one; of those, the one nearest the middle of the image,
    where its subject usually is.

    Args:
        mask: (height, width), bool; the region.
        box: The part of the image that the model sees, from `map_box`; the control region lies inside it, but for
            what of the region lies outside, which stays. None: the whole image.

    Returns:
        (height, width), bool, with as many pixels as `mask`.
    """
    left, top, right, bottom = (0, 0, *mask.shape[::-1]) if box is None else (max(round(side), 0) for side in box)
    control = mask.copy()
    seen = control[top:bottom, left:right]
    if not seen.any():
        return control
    # The overlap with itself, moved by each number of rows and columns.
    overlap = np.rint(irfft2(np.abs(rfft2(seen.astype(np.float64))) ** 2, s=seen.shape))
    places = overlap == overlap.min()
    whole, distances = zip(*(_move_line(seen.any(axis=axis)) for axis in (1, 0)), strict=True)
    uncut = np.logical_and.outer(*whole)
    if (places & uncut).any():
        places &= uncut
    distance = np.add.outer(*distances)
    shift = np.unravel_index(np.where(places, distance, np.inf).argmin(), places.shape)
    control[top:bottom, left:right] = np.roll(seen, shift, axis=(0, 1))
    return control


def _move_line(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each shift of a line of pixels in a circle: whether its filled part stays whole, and the square of the
    distance of that part's middle from the line's.
    """
    filled = np.flatnonzero(line)
    first = (filled[0] + np.arange(len(line))) % len(line)
    length = filled[-1] - filled[0] + 1
    return first + length <= len(line), (first + (length - len(line)) / 2) ** 2


@dataclass(frozen=True, repr=False)
class Removal(Result):
    """A prediction before and after a region was removed from the image, and after a control region was.

    Attributes:
        before: The explanation of the image as it was, of one class.
        after: The explanation of the changed image, of the same class; its `image` is that image.
        mask: (height, width), bool; the region.
        method: How it was filled.
        control: As `after`, with the control region removed in place of the region.
        control_mask: (height, width), bool; the control region, from `control_region`.
    """

    before: Explanation
    after: Explanation
    mask: np.ndarray
    method: RemovalMethod
    control: Explanation
    control_mask: np.ndarray

    @property
    def share(self) -> float:
        """The region's share of the image, 0 to 1."""
        return float(self.mask.mean())

    @property
    def control_overlap(self) -> float:
        """The share of the control region that lies in the region itself, 0 to 1."""
        return float((self.mask & self.control_mask).sum() / self.mask.sum())

    @property
    def warnings(self) -> tuple[str, ...]:
        """What makes the comparison a weak one, a sentence each."""
        found = []
        if self.share > LARGE_REGION:
            found.append(
                f"The region is {self.share:.0%} of the image, larger than any one trait; give a box round the trait."
            )
        if self.control_overlap > 0:
            found.append(f"{self.control_overlap:.0%} of the control region lies in the region itself.")
        return tuple(found)

    @property
    def verdict(self) -> str:
        """What the removal did to the class, beside the control, in words.

        It goes by the class's log odds, for a probability near 1 falls little whatever is removed.
        """
        traits, *changed = (told.classes[0] for told in (self.before, self.after, self.control))
        odds, *left = (_log_odds(told, traits.number) for told in (self.before, self.after, self.control))
        fall, control_fall = (odds - other for other in left)
        if fall < _SMALL_FALL:
            words = "the class does not rest on the region"
        elif fall <= control_fall:
            words = "the region counts no more than another of its size"
        elif fall <= 2 * control_fall:
            words = "the region counts, but taking any region of its size costs more than half as much"
        else:
            words = "the region counts"
        without, without_control = (f"{other.probability:.1%}" for other in changed)
        return (
            f"{traits.label}: {traits.probability:.1%} becomes {without} without the region and {without_control} "
            f"without the control region, so {words}."
        )

    def scores(self) -> list[tuple[ClassScore, ClassScore, ClassScore]]:
        """Scores before, after, and with the control region removed.

        They are those of the class asked about and of the five best classes of each.
        """
        label = self.before.classes[0].label
        after, control = ({score.label: score for score in told.scores} for told in (self.after, self.control))
        wanted = {label, *(score.label for told in (self.before, self.after, self.control) for score in told.top)}
        return [
            (score, after[score.label], control[score.label]) for score in self.before.scores if score.label in wanted
        ]

    def __repr__(self) -> str:
        before, after = self.before.prediction, self.after.prediction
        return (
            f"<Removal from {self.before.source or 'an image'}: {before.label} ({before.probability:.1%}) became "
            f"{after.label} ({after.probability:.1%})>"
        )

    def __str__(self) -> str:
        """The verdict, warnings, and a table of scores."""
        best = self.before.prediction
        lines = [f"{self.before.source or 'image'}: {best.label} ({best.probability:.1%})", self.verdict]
        for what, told in (("the region", self.after), ("the control region", self.control)):
            now = told.prediction
            change = "still" if now.label == best.label else "now"
            lines.append(
                f"  without {what}, {self.share:.1%} of the image ({self.method}): {change} {now.label} "
                f"({now.probability:.1%})"
            )
        lines += [f"Warning: {warning}" for warning in self.warnings]
        rows = [
            (
                old.label,
                *(f"{score.probability:.1%}" for score in (old, new, other)),
                *(f"{score.logit:.2f}" for score in (old, new, other)),
            )
            for old, new, other in self.scores()
        ]
        columns = ("class", "probability", "without", "control", "score", "without", "control")
        return "\n".join((*lines, format_table(columns, rows)))

    def to_dict(self) -> dict[str, Any]:
        """All three explanations, and the regions as runs: first pixel and length, in row-major order."""
        return {
            "method": self.method,
            "share_of_image": self.share,
            "control_overlap": self.control_overlap,
            "verdict": self.verdict,
            "warnings": list(self.warnings),
            "mask_runs": _runs(self.mask),
            "control_mask_runs": _runs(self.control_mask),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "control": self.control.to_dict(),
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each class of `scores`."""
        rows = []
        for scores in self.scores():
            told = list(zip(("before", "after", "control"), scores, strict=True))
            rows.append(
                {
                    "image": self.before.source,
                    "class": scores[0].label,
                    **{f"rank_{when}": score.rank for when, score in told},
                    **{f"probability_{when}": score.probability for when, score in told},
                    **{f"score_{when}": score.logit for when, score in told},
                }
            )
        return rows

    def sheet(self, heads: int | None, outline: bool, scale: Scale) -> Sheet:
        """The three images beside the maps of the heads that mattered most before; the verdict and warnings below."""
        told = (self.before, self.after, self.control)
        order = self.before.classes[0].head_order[: check_head_count(heads, len(self.before.classes[0].maps))]
        drawn = ((head, each.classes[0].maps[head]) for each in told for head in order)
        style = self.before.style(drawn, outline, scale)
        rows = []
        for when, done, mask, explanation in (
            ("before", f"outlined: region, {self.share:.0%} of image", self.mask, self.before),
            ("without the region", "region filled", self.mask, self.after),
            ("without the control region", "control region filled", self.control_mask, self.control),
        ):
            traits, best = explanation.classes[0], explanation.prediction
            verdict = "predicted" if traits.rank == 1 else f"predicted: {best.label} ({best.probability:.1%})"
            own_style = replace(style, image=explanation.image)
            panels = [own_style.image_panel(done, mask), *traits.draw(own_style, order)[1:]]
            rows.append(Row(f"{when}: {traits.label} ({traits.probability:.1%}), {verdict}", panels))
        return Sheet(rows, [style.colour_bar()], [self.verdict, *self.warnings])


def _log_odds(explanation: Explanation, number: int) -> float:
    """The logarithm of p / (1 - p), p being the probability of the class with this number."""
    logits = {score.number: score.logit for score in explanation.scores}
    own = logits.pop(number)
    return float(own - np.logaddexp.reduce(list(logits.values())))


def _runs(mask: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.pad(mask.ravel(), 1).astype(np.int8))).reshape(-1, 2)
    return [[int(start), int(end - start)] for start, end in edges]


def remove_trait(
    model: ClassifierLike,
    image: ImageSource,
    region: Region = "top head",
    class_name: str | int | None = None,
    *,
    image_processor: BaseImageProcessor | None = None,
    method: RemovalMethod = "inpaint",
    kind: MapKind = "attention",
    interpolate_pos_encoding: bool = False,
) -> Removal:
    """Remove a region from an image, and as a control another one, and compare the model's predictions.

    Args:
        model: A folder, a Hub id, a pipeline, or a loaded model with `image_processor`.
        image: The image.
        region: A box (left, top, right, bottom) in pixels of the upright image; a mask (height, width), bool; a head's
            number, for where the map of that head has at least a quarter of its highest value; or "top head", for
            the class's most important head.
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
    opened, source = open_image(image), image_name(image)
    options: dict[str, Any] = {"kind": kind, "interpolate_pos_encoding": interpolate_pos_encoding}
    before = next(explain_each(classifier, [opened], class_name, **options))
    mask = _region_mask(before, region)
    changed = [remove_region(opened, mask, method)]
    control_mask = control_region(mask, before.box)
    changed.append(remove_region(opened, control_mask, method))
    told = explain_each(classifier, changed, before.classes[0].number, **options)
    before, after, control = (replace(each, source=source) for each in (before, *told))
    return Removal(before, after, mask, method, control, control_mask)


def _region_mask(explanation: Explanation, region: Region) -> np.ndarray:
    if isinstance(region, np.ndarray):
        return region
    if isinstance(region, str):
        if region != "top head":
            raise ValueError(f'region={region!r} is not known; give a box, a mask, a head or "top head".')
        return head_region(explanation)
    if isinstance(region, int):
        return head_region(explanation, region)
    return box_mask(explanation.image.size, region)
