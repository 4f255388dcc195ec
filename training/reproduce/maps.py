# SPDX-License-Identifier: MIT
"""The experiments that end in maps: heads blurred one by one, another class's maps, misread and edited images."""

from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from scipy.special import softmax
from scipy.stats import binomtest

from prompt_cam_hf.birds.evaluation import measure_removal, read_birds
from prompt_cam_hf.birds.figures import plot_counterfactuals
from prompt_cam_hf.explanations.compare import compare
from prompt_cam_hf.explanations.explain import Explanation
from prompt_cam_hf.explanations.removal import remove_trait
from prompt_cam_hf.explanations.sheet import Panel, Row, Sheet, draw_sheet
from prompt_cam_hf.progress import follow
from prompt_cam_hf.training.reproduce.tables import Finding
from prompt_cam_hf.training.reproduce.workshop import Trained, Workshop

_CHOSEN = "Images shown: the first one that is read correctly, of classes that lie evenly apart."


def heads(shop: Workshop) -> Finding:
    """Blur head after head, the least important first, until the class is lost (the paper's Fig. 1d)."""
    trained = shop.prompt_cam()
    correct = _correct(shop, trained)
    counts: Counter[int] = Counter()
    for explanation in shop.explain(trained, shop.sample(correct)):
        counts[explanation.classes[0].sufficient or 0] += 1
    total = sum(counts.values())
    rows = [
        (str(count), f"{counts[count] / total:.1%}", f"{sum(counts[n] for n in range(count + 1)) / total:.1%}")
        for count in range(max(counts) + 1)
    ]
    figures = {
        f"heads_{number}.png": draw_blurring(explanation)
        for number, explanation in enumerate(shop.explain(trained, shop.examples(correct)), 1)
    }
    return Finding(
        "How many heads does a class need? Heads are blurred one by one until it is lost",
        ("heads that suffice", "of the images", "so many or fewer"),
        rows,
        (
            f"{total} test images that are read correctly. The order is the paper's greedy ranking; a blurred head "
            "spreads its attention over all tokens, as in the official code. The paper shows single images, no count.",
            _CHOSEN,
        ),
        figures,
    )


def draw_blurring(explanation: Explanation) -> Figure:
    """Draw the steps: each head that could be blurred without losing the class, and then those that it needs."""
    traits = explanation.classes[0]
    others = {score.label: score.logit for score in explanation.scores if score.number != traits.number}
    rival = max(others, key=lambda name: others[name])
    order, needed = traits.head_order[::-1], traits.sufficient or 0
    style = explanation.style(((head, traits.maps[head]) for head in order), False, "map")

    def panel(step: int, head: int) -> Panel:
        kept = len(order) - step
        share = softmax([traits.scores_with_first_heads[kept], *others.values()])[0]
        verdict = "still on top" if kept >= needed else "class lost"
        return style.draw(head, traits.maps[head], f"step {step}: blurred,", f"{share:.0%}, {verdict}")

    spare = len(order) - needed
    steps = [panel(step, head) for step, head in enumerate(order[:spare], 1)]
    rows = [
        Row(
            f"{traits.label} ({traits.probability:.1%}): {len(steps)} heads can be blurred",
            [style.image_panel(), *steps],
        )
    ]
    if needed:
        lost = panel(spare + 1, order[spare])
        kept = [style.draw(head, traits.maps[head], "needed") for head in order[spare + 1 :]]
        title = f"needed: without head {order[spare]} as well it would be {rival}"
        rows.append(Row(title, [style.image_panel(), lost, *kept]))
    note = "Each map is that of the head before it is blurred; the share is the class's probability after the step."
    return draw_sheet(Sheet([row for row in rows if len(row.panels) > 1], [style.colour_bar()], [note]))


def own_and_other(shop: Workshop) -> Finding:
    """An image's own class's maps beside those of the class that is most like it, on the same image (Fig. 1)."""
    trained = shop.prompt_cam()
    correct = _correct(shop, trained)
    shown = set(shop.examples(correct))
    figures: dict[str, Figure] = {}
    rows = []
    scores = shop.read(trained, correct)
    sampled = shop.sample(correct)
    overlaps = []
    for row in follow(sorted({*sampled, *shown}), len({*sampled, *shown}), "Comparing classes", " images"):
        own, other = np.argsort(-scores[np.searchsorted(correct, row)], kind="stable")[:2]
        comparison = compare(trained.classifier, shop.image(row), [int(own), int(other)])
        first = comparison.classes[0].head_order[0]
        if row in sampled:
            overlaps.append(float(comparison.overlap[first]))
        if row in shown:
            explanation = comparison.explanation
            figures[f"own_and_other_{len(figures) + 1}.png"] = _draw_both(explanation)
            labels = [traits.label for traits in explanation.classes]
            rows.append((*labels, f"{comparison.overlap[first]:.0%}"))
    rows.append((f"mean of {len(overlaps)} images", "", f"{np.mean(overlaps):.0%}"))
    return Finding(
        "The maps of an image's own class and of the runner-up on the same image",
        ("own class", "runner-up", "shared part of the first head's maps"),
        rows,
        (
            "The shared part is 100 % where both classes look at the same patches equally, and 0 % where at none "
            "together. The paper shows such maps, without a number.",
            _CHOSEN,
        ),
        figures,
    )


def _draw_both(explanation: Explanation) -> Figure:
    sheet = explanation.sheet(None, False, "head")
    whose = ("own class", "another class")
    rows = [Row(f"{who}: {row.title}", row.panels) for who, row in zip(whose, sheet.rows, strict=True)]
    return draw_sheet(sheet._replace(rows=rows))


def disagreements(shop: Workshop) -> Finding:
    """Images that the linear probe reads correctly and Prompt-CAM does not, with both classes' maps (Fig. 5)."""
    trained, probe = shop.prompt_cam(), shop.train("linear_probe", "linear_probe")
    right = shop.read(trained).argmax(axis=1) == shop.labels
    probe_right = shop.read(probe).argmax(axis=1) == shop.labels
    counts = {
        "both right": right & probe_right,
        "probe right, Prompt-CAM wrong": probe_right & ~right,
        "Prompt-CAM right, probe wrong": right & ~probe_right,
        "both wrong": ~right & ~probe_right,
    }
    rows = [(name, str(found.sum()), f"{found.mean():.1%}") for name, found in counts.items()]
    lost, won = (int(counts[name].sum()) for name in list(counts)[1:3])
    notes = ["The paper shows single images: Prompt-CAM's maps then say which trait it missed, or saw in its place."]
    if lost + won:
        p = binomtest(lost, lost + won).pvalue
        notes.append(f"If both were equally good, a difference of this size had p = {p:.2g} (exact McNemar test).")
    chosen = np.flatnonzero(counts["probe right, Prompt-CAM wrong"])
    figures = {}
    for number, row in enumerate(shop.examples(chosen), 1):
        comparison = compare(trained.classifier, shop.image(row), true=int(shop.labels[row]))
        figures[f"disagreement_{number}.png"] = comparison.figure(heads=4)
    if not figures:
        notes.append("There is no such image here, so there is no figure.")
    return Finding("Who is right where the two disagree?", ("test images", "number", "share"), rows, notes, figures)


def manipulation(shop: Workshop) -> Finding:
    """Take the trait out of an image: does the prediction change, and do the maps leave the place (Fig. 8)?"""
    trained = shop.prompt_cam()
    if shop.birds:
        return _redraw_birds(shop, trained)
    correct = _correct(shop, trained)
    sampled, shown = shop.sample(correct), shop.examples(correct)
    flipped: list[tuple[bool, bool]] = []
    figures: dict[str, Figure] = {}
    for row in follow(sorted({*sampled, *shown}), len({*sampled, *shown}), "Removing traits", " images"):
        try:
            removal = remove_trait(trained.classifier, shop.image(row))
        except ValueError:  # the first head looks everywhere
            continue
        before = removal.before.prediction.number
        if row in sampled:
            flipped.append((removal.after.prediction.number != before, removal.control.prediction.number != before))
        if row in shown:
            figures[f"manipulation_{len(figures) + 1}.png"] = removal.figure(heads=3)
    if not flipped:
        raise ValueError("In none of the images does the first head single out a region, so nothing can be removed.")
    shares = np.mean(flipped, axis=0)
    names = ("where the first head looks", "a region of the same shape elsewhere")
    return Finding(
        "What is removed, and how often the prediction changes",
        ("removed", "predictions that change"),
        [(name, f"{share:.1%}") for name, share in zip(names, shares, strict=True)],
        (
            f"{len(flipped)} test images that are read correctly. The paper edits one image by hand; here the region "
            "is filled in from around it.",
            _CHOSEN,
        ),
        figures,
    )


def _redraw_birds(shop: Workshop, trained: Trained) -> Finding:
    assert shop.birds is not None
    rows = shop.sample(np.arange(len(shop.test)))
    birds = shop.birds.select(rows)
    reading = read_birds(trained.classifier.model, trained.image_processor, birds)
    found = measure_removal(trained.classifier.model, trained.image_processor, birds, reading, shop.recipe.seed)
    words = {
        "all_traits": "all traits of the class",
        "one_trait": "one of them",
        "other_part": "another part's colour",
    }
    return Finding(
        "Birds drawn again without a trait: how often does the prediction change?",
        ("taken away", "predictions that change"),
        [(words[name], f"{share:.1%}") for name, share in found["predictions_flipped"].items()],
        (
            f"{int((reading.predictions == reading.labels).sum())} of {len(birds)} test birds, those read correctly. "
            "The paper edits one image by hand, the red spot on a blackbird's wing.",
        ),
        {"manipulation.png": plot_counterfactuals(trained.classifier.model, trained.image_processor, birds, reading)},
    )


def _correct(shop: Workshop, trained: Trained) -> np.ndarray:
    """The test images that are read correctly."""
    rows = np.flatnonzero(shop.read(trained).argmax(axis=1) == shop.labels)
    if not len(rows):
        raise ValueError(f"None of the {len(shop.labels)} test images is read correctly; train for longer.")
    return rows
