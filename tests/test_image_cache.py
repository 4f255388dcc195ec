# SPDX-License-Identifier: MIT
"""Cached images: the same items and the same training as without, to the bit, and no file read twice."""

from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from small_runs import assert_same_weights, fixture_backbone, fixture_photos, fixture_recipe  # noqa: F401
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

import prompt_cam_hf.training.cache_files as cache_files
import prompt_cam_hf.training.data as data
from prompt_cam_hf.data.images import UnreadableImageError, build_image_processor
from prompt_cam_hf.training.data import ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.image_cache import cache_images
from prompt_cam_hf.training.train import train

SIZES = [(64, 40), (40, 64), (64, 40), (51, 51), (33, 90), (301, 517), (517, 301)]


class RescalesFirst(ViTImageProcessorPil):
    """Resizes numbers from 0 to 1, as DINOv3's image processor does: there are no bytes in between."""

    def _preprocess(self, images, **settings):
        images = [image.astype(np.float32) / 255 for image in images]
        return super()._preprocess(images, **{**settings, "do_rescale": False})


def shortest_edge() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


PROCESSORS = {
    "squash": lambda: build_image_processor((28, 32)),
    "crop": shortest_edge,
    "rescales first": lambda: RescalesFirst(**build_image_processor(32).to_dict()),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photos of different shapes and modes, every other one turned by its EXIF orientation."""
    random = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if number % 2 else 1
        # Two large JPEGs, which training decodes at a smaller size.
        kind = "JPEG" if number > 4 else "PNG"
        image.convert("L" if number == 3 else "RGB").save(tmp_path / f"{number}.png", kind, exif=exif)
    return tmp_path


def images(folder: Path, processor, seed: int | None = 3) -> ImageDataset:
    paths = [str(folder / f"{number}.png") for number in range(len(SIZES))]
    rows = datasets.Dataset.from_dict({"image": paths, "label": list(range(len(SIZES)))})
    transform = processor if seed is None else TrainingAugmentation(processor, seed)
    return ImageDataset(rows.cast_column("image", datasets.Image()), transform)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_items_are_those_of_the_image_processor(folder, name, seed):
    """Whatever shortcut is taken from bytes to numbers."""
    processor = PROCESSORS[name]()
    plain = images(folder, processor, seed)
    with Image.open(folder / "1.png") as image:
        upright = image.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    if seed is None:
        expected = processor(upright, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(plain[1]["pixel_values"], expected)
        return
    size = plain.transform.resize_size
    whole = processor(upright, size=size, do_center_crop=False, return_tensors="pt")["pixel_values"][0]
    rows, cols = plain.transform.crop_size
    for epoch in range(4):
        plain.set_epoch(epoch)
        view = plain[1]["pixel_values"]
        places = [(top, left) for top in range(whole.shape[1] - rows + 1) for left in range(whole.shape[2] - cols + 1)]
        crops = [whole[:, top : top + rows, left : left + cols] for top, left in places]
        assert sum(torch.equal(view, crop) or torch.equal(view, crop.flip(-1)) for crop in crops) == 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("name", PROCESSORS)
def test_cached_items_are_the_same(folder, tmp_path, name, seed, workers):
    plain = images(folder, PROCESSORS[name](), seed)
    cached = cache_images(images(folder, PROCESSORS[name](), seed), tmp_path / "cache", num_workers=workers)
    loader = DataLoader(cached, batch_size=None, num_workers=workers, persistent_workers=workers > 0)
    for epoch in range(3):
        plain.set_epoch(epoch)
        cached.set_epoch(epoch)
        seen = list(loader)
        assert len(seen) == len(SIZES)
        for index, item in enumerate(seen):
            assert item["labels"] == index
            assert torch.equal(item["pixel_values"], plain[index]["pixel_values"])


@pytest.mark.parametrize("workers", [0, 2])
def test_same_training_as_without(recipe, tmp_path, workers):
    """Deep, which cached features cannot help."""
    settings = {"num_train_epochs": 3, "dataloader_num_workers": workers}
    plain = train(recipe(**settings))
    cached = train(
        recipe(**settings, cache_images=True, cache_dir=str(tmp_path / "cache"), output_dir=str(tmp_path / "cached"))
    )
    assert_same_weights(plain.output_dir, cached.output_dir)
    assert cached.metrics == plain.metrics
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2  # train and validation


def test_no_image_is_opened_again(folder, tmp_path, monkeypatch):
    first = cache_images(images(folder, build_image_processor(32)), tmp_path / "cache")

    def forbidden(*arguments):
        raise AssertionError("the pixels are there already")

    monkeypatch.setattr(data, "open_image", forbidden)
    # What is drawn anew is not in the file, so another seed reads the same.
    second = cache_images(images(folder, build_image_processor(32), seed=4), tmp_path / "cache")
    assert second.file.path == first.file.path
    assert not torch.equal(second[0]["pixel_values"], first[0]["pixel_values"])
    with pytest.raises(AssertionError, match="there already"):
        cache_images(images(folder, build_image_processor(24)), tmp_path / "cache")
    Image.new("RGB", (64, 40)).save(folder / "2.png")
    with pytest.raises(AssertionError, match="there already"):
        cache_images(images(folder, build_image_processor(32)), tmp_path / "cache")


def test_a_damaged_file_is_made_again(folder, tmp_path):
    processor = build_image_processor(32)
    path = Path(cache_images(images(folder, processor), tmp_path / "cache").file.path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-300] + bytes(200) + whole[-100:])
    cache_images(images(folder, processor), tmp_path / "cache")
    assert path.read_bytes() == whole


def test_what_goes_wrong_leaves_no_file(folder, tmp_path, monkeypatch):
    processor, cache = build_image_processor(32), tmp_path / "cache"
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patched:
        patched.setattr(cache_files.shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(OSError, match=r"^The cached images need 0\.0 GB in .*; set cache_dir to a folder"):
            cache_images(images(folder, processor), cache)
    (folder / "4.png").write_bytes((folder / "4.png").read_bytes()[:-2000])
    for workers in (0, 1):
        with pytest.raises(UnreadableImageError, match=r"Cannot read the image .*4\.png: "):
            cache_images(images(folder, processor), cache, num_workers=workers)
    assert not list(cache.glob("*.npy"))
