# SPDX-License-Identifier: MIT
"""CUB's files are read as they are published, drawn birds give their masks, and masks go where their images go."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from prompt_cam_hf.birds import BIRD_CLASSES, bird_spec, birds_dataset, draw_bird, other_birds_dataset
from prompt_cam_hf.data.ground_truth import (
    bird_mask,
    bounding_box_mask,
    mask_as_seen,
    point_mask,
    read_cub,
    read_fish_vista,
    segmentation_mask,
    trait_mask,
)
from prompt_cam_hf.data.images import UnreadableImageError, build_image_processor
from prompt_cam_hf.metrics.localization import pointing_game

FILES = {
    "images.txt": "1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg\n"
    "2 017.Cardinal/Cardinal_0001_17057.jpg\n",
    "bounding_boxes.txt": "1 60.0 27.0 32.0 30.4\n2 2.0 1.0 5.0 3.0\n",
    "parts/parts.txt": "1 back\n2 beak\n7 left eye\n",
    "parts/part_locs.txt": "1 1 0.0 0.0 0\n1 2 62.5 30.0 1\n1 7 70.0 31.25 1\n"
    "2 1 3.5 2.5 1\n2 2 0.0 0.0 0\n2 7 6.5 2.5 1\n",
}
CARDINAL = "Cardinal_0001_17057.jpg"


@pytest.fixture
def cub(tmp_path):
    folder = tmp_path / "CUB_200_2011"
    (folder / "parts").mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def segment(folder):
    file = folder / "segmentations" / "017.Cardinal" / "Cardinal_0001_17057.png"
    file.parent.mkdir(parents=True)
    # Nobody, one, two, ... all five people.
    Image.fromarray(np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)).save(file)


def test_cub_as_published(cub):
    annotations = read_cub(cub)
    assert list(annotations) == ["Black_Footed_Albatross_0046_18.jpg", CARDINAL]
    albatross = annotations["Black_Footed_Albatross_0046_18.jpg"]
    assert albatross.image == "001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg"
    assert albatross.box == (60.0, 27.0, 92.0, 57.4)
    assert albatross.parts == {"beak": (62.5, 30.0), "left eye": (70.0, 31.25)}
    assert annotations[CARDINAL].parts == {"back": (3.5, 2.5), "left eye": (6.5, 2.5)}
    with pytest.raises(
        FileNotFoundError, match=r"no folder segmentations for 017.Cardinal/.* a download of their own"
    ):
        segmentation_mask(annotations[CARDINAL])


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_segmentations_by_majority(cub, place):
    segment(cub if place == "inside" else cub.parent)
    mask = segmentation_mask(read_cub(cub)[CARDINAL])
    assert mask.tolist() == [[False, False, False], [True, True, True]]


def test_boxes_and_points_in_pixels(cub):
    cardinal = read_cub(cub)[CARDINAL]
    box = bounding_box_mask(cardinal, (6, 9))
    assert np.argwhere(box).min(0).tolist() == [1, 2] and np.argwhere(box).max(0).tolist() == [3, 6]
    assert box.sum() == 3 * 5
    # Both points are centres of pixels: of (2, 3) and (2, 6).
    assert np.argwhere(point_mask(cardinal, (6, 9), radius=0.6)).tolist() == [[2, 3], [2, 6]]
    plus = [[1, 3], [2, 2], [2, 3], [2, 4], [3, 3]]
    assert np.argwhere(point_mask(cardinal, (6, 9), ["back", "beak"], radius=1.1)).tolist() == plus
    assert not point_mask(cardinal, (6, 9), ["beak"]).any()
    # A tenth of the side of a square as large as the box.
    albatross = read_cub(cub)["Black_Footed_Albatross_0046_18.jpg"]
    area = point_mask(albatross, (80, 100), ["beak"]).sum()
    assert area == pytest.approx(np.pi * 0.01 * 32 * 30.4, rel=0.1)


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("images.txt", None, FileNotFoundError, "There is no file .*images.txt; .* CUB_200_2011 as it was unpacked"),
        ("parts/parts.txt", None, FileNotFoundError, "There is no file .*parts.txt"),
        ("bounding_boxes.txt", "1 60.0 27.0 32.0\n", ValueError, "bounding_boxes.txt is not in CUB's form"),
        ("bounding_boxes.txt", "1 60.0 27.0 x 30.0\n", ValueError, "not in CUB's form, number x y width height"),
        ("bounding_boxes.txt", "1 60.0 27.0 32.0 30.4\n", ValueError, "no box for image 2"),
        ("bounding_boxes.txt", "", ValueError, "bounding_boxes.txt is not in CUB's form"),
        ("parts/parts.txt", "one back\n", ValueError, "parts.txt is not in CUB's form"),
        ("parts/parts.txt", "1 back\n2 beak\n", ValueError, "has the part 7, which parts.txt does not name"),
        ("images.txt", "1 a/x.jpg\n2 b/x.jpg\n", ValueError, "two images of the name x.jpg"),
    ],
)
def test_broken_annotations_are_named(cub, name, text, error, message):
    if text is None:
        (cub / name).unlink()
    else:
        (cub / name).write_text(text)
    with pytest.raises(error, match=message):
        read_cub(cub)


def test_masks_of_drawn_birds(tmp_path):
    birds = birds_dataset("test", per_class=1, size=32, num_proc=1, cache_dir=tmp_path)
    for index in (0, 12):
        row, spec = birds[index], bird_spec("test", index)
        _, masks = draw_bird(spec, 32)
        traits = np.zeros((32, 32), dtype=bool)
        for part in BIRD_CLASSES[spec.label].parts:
            traits |= masks[part]
        assert traits.any() and np.array_equal(bird_mask(row), traits)
        assert np.array_equal(bird_mask(row, ["wing"]), masks["wing"])
        assert np.array_equal(bird_mask(row, ["wing", "tail"]), masks["wing"] | masks["tail"])
    with pytest.raises(ValueError, match="no part 'ear'; the parts are tail, legs"):
        bird_mask(birds[0], ["ear"])
    with pytest.raises(ValueError, match="of no class, so no parts define it"):
        bird_mask(other_birds_dataset(1, 32, num_proc=1, cache_dir=tmp_path)[0])
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("kind", ["squash", "crop"])
def test_masks_go_where_images_go(kind):
    """A bright square is where its mask is, in a tall image, whether the processor squashes or crops."""
    mask = np.zeros((120, 60), dtype=bool)
    mask[50:70, 30:50] = True
    image = Image.fromarray(np.where(mask[..., None], 255, 0).repeat(3, axis=2).astype(np.uint8))
    if kind == "squash":
        processor, expected = build_image_processor((24, 32)), (slice(10, 14), slice(16, 27))
    else:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
        expected = (slice(10, 20), slice(15, 25))
    seen = mask_as_seen(mask, processor)
    brightness = processor(image, return_tensors="np")["pixel_values"][0].mean(0)
    assert seen.shape == brightness.shape and seen.dtype == bool
    middle = (brightness.max() + brightness.min()) / 2
    assert np.array_equal(seen, brightness >= middle)
    by_hand = np.zeros_like(seen)
    by_hand[expected] = True
    assert np.array_equal(seen, by_hand)


def test_from_a_point_to_a_hit(cub):
    albatross = read_cub(cub)["Black_Footed_Albatross_0046_18.jpg"]
    mask = mask_as_seen(point_mask(albatross, (80, 100), ["left eye"]), build_image_processor(32))
    maps = np.zeros((4, 4))
    maps[1, 2] = 1  # the eye, at 70 of 100 and 31 of 80 pixels
    assert pointing_game(maps, mask) == 1
    assert pointing_game(maps.T, mask) == 0


FISH_TRAITS = {"0": "Background", "1": "Head", "2": "Eye", "3": "Dorsal fin", "8": "Adipose fin", "9": "Barbel"}


@pytest.fixture
def fish(tmp_path):
    """A clone of Fish-Vista's repository, as its card describes it."""
    masks = tmp_path / "fish-vista" / "segmentation_masks"
    (masks / "images").mkdir(parents=True)
    (masks / "seg_id_trait_map.json").write_text(json.dumps(FISH_TRAITS))
    numbers = np.array([[0, 1, 2], [3, 3, 9]], dtype=np.uint8)
    Image.fromarray(numbers).save(masks / "images" / "grey.png")
    coloured = Image.fromarray(numbers).convert("P")
    coloured.putpalette(list(range(255, -1, -1)) * 3)
    coloured.putdata(numbers.ravel().tolist())
    coloured.save(masks / "images" / "coloured.png")
    return tmp_path / "fish-vista"


@pytest.mark.parametrize("image", ["grey.jpg", "test/Perca/coloured.jpg"])
def test_fish_vista_as_its_card_describes_it(fish, image):
    found = read_fish_vista(fish)
    assert "Background" not in found.traits and found.traits["Dorsal fin"] == 3
    np.testing.assert_array_equal(trait_mask(found, image), [[False, True, True], [True, True, True]])
    np.testing.assert_array_equal(
        trait_mask(found, image, ["dorsal fin", "Barbel"]), [[False, False, False], [True, True, True]]
    )
    assert not trait_mask(found, image, ["Adipose fin"]).any()


def test_fish_vista_of_another_form_is_refused(fish):
    found = read_fish_vista(fish)
    assert trait_mask(found, "another.jpg") is None
    with pytest.raises(ValueError, match="no trait 'Wing'; its traits are Head, Eye, Dorsal fin"):
        trait_mask(found, "grey.jpg", ["Wing"])
    Image.new("RGB", (3, 2)).save(found.files["coloured"])
    with pytest.raises(ValueError, match="pixels of the kind RGB"):
        trait_mask(found, "coloured.jpg")
    found.files["grey"].write_bytes(b"torn")
    with pytest.raises(UnreadableImageError, match=r"grey\.png cannot be read"):
        trait_mask(found, "grey.jpg")
    names = fish / "segmentation_masks" / "seg_id_trait_map.json"
    names.write_text('["Head"]')
    with pytest.raises(ValueError, match="not in Fish-Vista's form"):
        read_fish_vista(fish)
    names.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file segmentation_masks/seg_id_trait_map\.json"):
        read_fish_vista(fish)
