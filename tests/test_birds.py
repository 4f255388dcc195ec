# SPDX-License-Identifier: MIT
"""Are the drawn birds what their specs say, pixel for pixel, and the same everywhere?"""

import hashlib
from collections import Counter

import datasets
import numpy as np
import pytest
from conftest import rarely

from prompt_cam_hf import birds
from prompt_cam_hf.birds import BIRD_CLASSES, PARTS, TRAIT_PARTS, BirdSpec, dataset, drawing, raster
from prompt_cam_hf.birds import classes as bird_classes


def pixels(spec, size=96):
    return np.asarray(birds.draw_bird(spec, size)[0])


def natural_values(**traits):
    return {part: traits.get(part) for part in TRAIT_PARTS}


# --- classes ---


def test_classes_differ_in_one_or_two_traits_and_share_most_values():
    names = [bird.name for bird in BIRD_CLASSES]
    assert len(set(names)) == len(names) == 18
    assert names[0] == "red crown, yellow wing-bar"
    traits = [set(bird.traits) for bird in BIRD_CLASSES]
    assert {len(t) for t in traits} == {1, 2}
    assert not any(a < b for a in traits for b in traits), "one class would be a special case of another"
    used = Counter(trait for t in traits for trait in t)
    assert set(used.values()) == {1, 2}
    assert sum(count == 2 for count in used.values()) == 12
    assert {part for part, _ in used} == set(TRAIT_PARTS)


@pytest.mark.parametrize("part", TRAIT_PARTS)
def test_fillers_share_neither_colour_nor_pattern_with_a_class(part):
    fillers = [birds.split_value(value) for value in bird_classes.filler_values(part)]
    classes = [birds.split_value(value) for value in bird_classes.class_values(part)]
    assert {colour for _, colour in fillers}.isdisjoint(colour for _, colour in classes)
    assert ({pattern for pattern, _ in fillers} - {"plain"}).isdisjoint(pattern for pattern, _ in classes)
    assert len(fillers) >= 7


def test_a_bird_carries_its_own_class_traits_and_no_other_class_value():
    rng = np.random.default_rng(0)
    for index in range(900):
        spec = bird_classes.sample_spec(rng, index % 18)
        assert birds.matching_classes(spec.values) == (spec.label,)
        bird = BIRD_CLASSES[spec.label]
        for part in set(TRAIT_PARTS) - set(bird.parts):
            assert spec.values[part] not in bird_classes.class_values(part)


def test_parts_outside_the_class_are_coloured_as_a_rule():
    rng = np.random.default_rng(0)
    specs = [bird_classes.sample_spec(rng, index % 18) for index in range(900)]
    for part in TRAIT_PARTS:
        values = [spec.values[part] for spec in specs if part not in BIRD_CLASSES[spec.label].parts]
        assert 0.6 < np.mean([value is not None for value in values]) < 0.8
        assert {value for value in values if value} == set(bird_classes.filler_values(part))


def test_a_wing_bar_never_has_the_colour_of_its_wing():
    rng = np.random.default_rng(0)
    specs = [bird_classes.sample_spec(rng, index % 18) for index in range(900)]
    specs += [bird_classes.sample_other_spec(rng) for _ in range(900)]
    for spec in specs:
        if spec.values["wing"]:
            assert birds.split_value(spec.values["wing"])[1] != spec.values["wing-bar"]


def test_birds_for_pre_training_have_every_value_but_no_class():
    rng = np.random.default_rng(0)
    specs = [bird_classes.sample_other_spec(rng) for _ in range(4000)]
    assert all(birds.matching_classes(spec.values) == () and spec.label is None for spec in specs)
    alone = {bird.traits[0] for bird in BIRD_CLASSES if len(bird.traits) == 1}
    seen = {(part, value) for spec in specs for part, value in spec.values.items() if value}
    possible = {(part, value) for part in TRAIT_PARTS for value in birds.part_values(part)}
    assert seen == possible - alone


# --- drawing ---


def test_images_are_the_same_everywhere():
    digest = hashlib.sha256()
    for index in range(36):
        for spec in (birds.bird_spec("train", index), dataset.other_bird_spec(index)):
            image, bits = drawing.draw_bits(spec, 96)
            assert image.shape == (96, 96, 3) and image.dtype == np.uint8
            assert bits.shape == (96, 96) and bits.dtype == np.uint16
            digest.update(image.tobytes() + bits.astype("<u2").tobytes())
    assert digest.hexdigest() == "80fe108a796038160f0f7d7ed7b546f034647ac953fec186a0f1f1fe57615253"


@pytest.mark.parametrize("size", [64, rarely(96), rarely(160)])
def test_repainting_a_part_changes_exactly_its_mask(size):
    for index in range(6):
        spec = birds.bird_spec("test", index)
        for part in TRAIT_PARTS:
            white, black = (birds.counterfactual(spec, part, colour) for colour in ("white", "black"))
            changed = (pixels(white, size) != pixels(black, size)).any(axis=-1)
            np.testing.assert_array_equal(changed, birds.draw_bird(spec, size)[1][part])


def test_every_part_is_seen_in_every_bird():
    smallest = dict.fromkeys(PARTS, 96 * 96)
    for index in range(180):
        for part, mask in birds.draw_bird(birds.bird_spec("train", index))[1].items():
            smallest[part] = min(smallest[part], int(mask.sum()))
    assert smallest["eye"] >= 8
    # Five per cent of a patch of 8 x 8 pixels, several times over.
    assert all(smallest[part] >= 20 for part in TRAIT_PARTS)


def test_a_part_shows_the_colour_of_its_value():
    for index in range(6):
        spec = birds.bird_spec("test", index)
        for colour in ("red", "blue", "yellow"):
            changed = birds.counterfactual(spec, "wing", colour)
            image, masks = birds.draw_bird(changed)
            shown = np.median(np.asarray(image)[masks["wing"]], axis=0)
            palette = np.array(list(birds.COLOURS.values()))
            nearest = list(birds.COLOURS)[int(((palette - shown) ** 2).sum(axis=1).argmin())]
            assert nearest == colour, shown


def test_patterns_differ_from_each_other_and_from_the_plain_colour():
    spec = birds.bird_spec("test", 0)
    plain, spotted, barred = (
        pixels(birds.counterfactual(spec, "wing", value)) for value in ("white", "spotted white", "barred white")
    )
    mask = birds.draw_bird(spec)[1]["wing"]
    for a, b in ((plain, spotted), (plain, barred), (spotted, barred)):
        assert 0.15 < (a != b).any(axis=-1)[mask].mean() < 0.9


def test_size_changes_the_resolution_and_nothing_else():
    small, large = (birds.draw_bird(birds.bird_spec("train", 3), size) for size in (96, 192))
    assert large[0].size == (192, 192)
    for part in PARTS:
        a, b = small[1][part].mean(), large[1][part].mean()
        assert abs(a - b) < 0.3 * a
    reduced = np.asarray(large[0].reduce(2), float)
    assert np.abs(reduced - np.asarray(small[0])).mean() < 8


def test_fill_covers_the_area_of_the_polygon():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        points = 40 + rng.uniform(15, 35, 9)[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        x, y = points.T
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        patch = raster.fill(points, 80)
        assert abs(patch.alpha.sum() - area) < 0.03 * area + 4
    square = raster.fill(np.array([(2.0, 3.0), (6.0, 3.0), (6.0, 5.0), (2.0, 5.0)]), 10)
    assert (square.top, square.left) == (3, 2)
    np.testing.assert_array_equal(square.alpha, np.ones((2, 4)))
    assert raster.fill(np.array([(12.0, 3.0), (16.0, 3.0), (16.0, 5.0)]), 10) is None


# --- counterfactuals ---


def test_taking_a_trait_away_changes_only_its_part_and_the_label():
    for index in range(18):
        spec = birds.bird_spec("test", index)
        image, masks = birds.draw_bird(spec)
        for part in BIRD_CLASSES[spec.label].parts:
            without = birds.counterfactual(spec, part)
            assert without.label is None and without.values[part] is None and without.seed == spec.seed
            changed = (pixels(without) != np.asarray(image)).any(axis=-1)
            assert not (changed & ~masks[part]).any()
            assert changed.sum() > 0.6 * masks[part].sum()


def test_a_changed_trait_can_make_another_class():
    spec = birds.bird_spec("test", 0)  # red crown, yellow wing-bar
    both = birds.counterfactual(spec, "breast", "spotted white")
    assert birds.matching_classes(both.values) == (0, 1) and both.label is None
    assert birds.counterfactual(both, "crown").label == 1
    assert birds.counterfactual(spec, "wing-bar", "white").label == 11


# --- data set ---


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("birds")


def test_data_set_rows_can_be_checked_and_drawn_again(cache_dir):
    data = birds.birds_dataset("validation", per_class=2, size=64, num_proc=1, cache_dir=cache_dir)
    assert data.features["label"].names == [bird.name for bird in BIRD_CLASSES]
    assert data["label"] == [*range(18), *range(18)]
    for index in (0, 17, 35):
        row = data[index]
        spec = birds.row_spec(row)
        assert spec == birds.bird_spec("validation", index)
        image, masks = birds.draw_bird(spec, 64)
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(image))
        assert row["image"].mode == "RGB"
        for part, mask in birds.unpack_masks(row["masks"]).items():
            np.testing.assert_array_equal(mask, masks[part])
        expected = np.any([masks[part] for part in BIRD_CLASSES[spec.label].parts], axis=0)
        np.testing.assert_array_equal(np.asarray(row["discriminative_mask"]), expected)


def test_processes_and_more_birds_do_not_change_the_first_ones(cache_dir):
    few = birds.birds_dataset("train", per_class=1, size=32, num_proc=1, cache_dir=cache_dir)
    more = birds.birds_dataset("train", per_class=2, size=32, num_proc=2, cache_dir=cache_dir)
    assert more["seed"][:18] == few["seed"][:]
    assert more["label"] == [*range(18), *range(18)]
    np.testing.assert_array_equal(np.asarray(more[7]["image"]), np.asarray(few[7]["image"]))


def test_data_set_is_drawn_once(cache_dir, monkeypatch):
    first = birds.birds_dataset("test", per_class=1, size=32, num_proc=1, cache_dir=cache_dir)
    monkeypatch.setattr(dataset, "draw_bits", None)  # drawing now fails
    again = birds.birds_dataset("test", per_class=1, size=32, num_proc=1, cache_dir=cache_dir)
    assert again.cache_files == first.cache_files
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        birds.birds_dataset("test", per_class=1, size=32, seed=1, num_proc=1, cache_dir=cache_dir)


def test_other_birds_have_no_label(cache_dir):
    data = birds.other_birds_dataset(4, size=32, num_proc=1, cache_dir=cache_dir)
    assert set(data.column_names) == {"image", "masks", "seed", "values"}
    assert [birds.row_spec(row) for row in data] == [dataset.other_bird_spec(index) for index in range(4)]


def test_splits_share_no_seed():
    splits = [
        {birds.bird_spec(split, index).seed for index in range(400)} for split in ("train", "validation", "test")
    ]
    splits.append({dataset.other_bird_spec(index).seed for index in range(400)})
    splits.append({birds.bird_spec("train", index, seed=1).seed for index in range(400)})
    assert len(set().union(*splits)) == 400 * len(splits)


# --- errors ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: birds.birds_dataset("dev"), "no split 'dev'; choose train, validation or test"),
        (lambda: birds.bird_spec("dev", 0), "no split 'dev'"),
        (lambda: birds.birds_dataset("train", per_class=0), "0 birds were asked for"),
        (lambda: birds.other_birds_dataset(4, size=16), "size is 16 pixels.*at least 32"),
        (lambda: birds.draw_bird(birds.bird_spec("train", 0), 31), "size is 31 pixels.*at least 32"),
        (lambda: bird_classes.sample_spec(np.random.default_rng(0), 18), "label is 18.*0 to 17"),
        (lambda: birds.counterfactual(birds.bird_spec("train", 0), "belly"), "'belly' is not a part.*crown"),
        (lambda: birds.counterfactual(birds.bird_spec("train", 0), "wing", "mauve"), "'mauve' is not.*turquoise"),
        (
            lambda: birds.counterfactual(birds.bird_spec("train", 0), "beak", "barred red"),
            "beak cannot be 'barred red'",
        ),
        (lambda: birds.part_values("eye"), "'eye' is not a part with traits"),
        (lambda: birds.split_value("plain red"), "'plain red' is not a value"),
        (lambda: BirdSpec(0, {"crown": "red"}), "lack throat, beak"),
        (lambda: BirdSpec(0, natural_values() | {"leg": "red"}), "'leg' is not a part with traits"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
