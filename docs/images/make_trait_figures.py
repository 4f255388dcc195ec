# SPDX-License-Identifier: MIT
"""Make the images of docs/traits on drawn birds: python docs/images/make_trait_figures.py MODEL_FOLDER

MODEL_FOLDER holds a Prompt-CAM of the classes of `prompt_cam_hf.birds`. The birds are the first of the test split that
serve the purpose (read rightly, or misread), drawn at 480 pixels.
"""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from prompt_cam_hf.birds import BIRD_CLASSES, bird_spec, draw_bird
from prompt_cam_hf.explanations.compare import compare
from prompt_cam_hf.explanations.explain import explain
from prompt_cam_hf.explanations.removal import remove_trait
from prompt_cam_hf.explanations.results import Result
from prompt_cam_hf.loading import Classifier, as_classifier

FOLDER = Path(__file__).parent
SIZE = 480
NAMES = [bird.name for bird in BIRD_CLASSES]
# They share the wing-bar.
CROWN_AND_BAR, BREAST_AND_BAR = 0, 1
ONE_TRAIT = NAMES.index("turquoise crown")


def birds(label: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """Names and images of the test split's birds, of one class or of all."""
    start, step = (0, 1) if label is None else (label, len(NAMES))
    for index in range(start, 20 * len(NAMES), step):
        yield NAMES[index % len(NAMES)], draw_bird(bird_spec("test", index), SIZE)[0]


def first_bird(classifier: Classifier, label: int | None = None, right: bool = True) -> tuple[str, Image.Image]:
    """The first bird that the model reads rightly, or wrongly."""
    found = (
        (name, image) for name, image in birds(label) if (explain(classifier, image).prediction.label == name) == right
    )
    return next(found)


def save(result: Result, name: str, heads: int, **options: bool) -> None:
    """Write an image, and print what the result says."""
    drawn = io.BytesIO()
    result.figure(heads=heads, **options).savefig(drawn, dpi=100)
    # A third of the size; Pillow's other ways change the small bright parts.
    Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1).save(
        FOLDER / name, optimize=True
    )
    print(name, result, sep="\n", end="\n\n")


def main(model: str) -> None:
    """Make all images."""
    classifier = as_classifier(model)
    _, bird = first_bird(classifier, CROWN_AND_BAR)
    save(explain(classifier, bird), "explain.png", heads=4)
    save(explain(classifier, bird, [NAMES[CROWN_AND_BAR], NAMES[ONE_TRAIT]]), "classes.png", heads=3)
    save(explain(classifier, bird, kind="evidence"), "evidence.png", heads=4)
    save(compare(classifier, bird, [NAMES[CROWN_AND_BAR], NAMES[BREAST_AND_BAR]]), "comparison.png", heads=3)
    _, crown = first_bird(classifier, ONE_TRAIT)
    save(remove_trait(classifier, crown), "removal.png", heads=3)
    name, misread = first_bird(classifier, right=False)
    save(compare(classifier, misread, true=name), "misread.png", heads=3)


if __name__ == "__main__":
    main(*sys.argv[1:])
