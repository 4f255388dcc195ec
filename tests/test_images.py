# SPDX-License-Identifier: MIT
"""Images of every kind open upright as 8-bit RGB, and augmentation is the official recipe, reproducibly."""

import io
import json
import pickle
import struct
import warnings

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from PIL import ExifTags, Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, Trainer, TrainerState, TrainingArguments, ViTImageProcessorPil
from transformers.image_utils import load_image

# Without torchvision, transformers 5.17 has a placeholder at `transformers.AutoImageProcessor`.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf.data.images import (
    UnreadableImageError,
    build_image_processor,
    find_images,
    open_image,
    unreadable_reason,
    upright_size,
)
from prompt_cam_hf.training.data import ImageDataset, SetEpochCallback, TrainingAugmentation


def photo(rows=48, cols=64, seed=0):
    """A smooth random image, so that lossy formats keep it recognisable."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((cols, rows), Image.Resampling.BICUBIC)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def transparent():
    image = photo().convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


ORDINARY = {
    "rgb-jpeg": lambda: encode(photo(), "JPEG"),
    "progressive-jpeg": lambda: encode(photo(), "JPEG", progressive=True),
    "grey-jpeg": lambda: encode(photo().convert("L"), "JPEG"),
    "cmyk-jpeg": lambda: encode(photo().convert("CMYK"), "JPEG"),
    "exif-jpeg": lambda: encode(photo(), "JPEG", exif=rotated_exif()),
    "exif-png": lambda: encode(photo(), "PNG", exif=rotated_exif()),
    "exif-tiff": lambda: encode(photo(), "TIFF", exif=rotated_exif()),
    "bilevel-png": lambda: encode(photo().convert("1"), "PNG"),
    "grey-alpha-png": lambda: encode(photo().convert("LA"), "PNG"),
    "rgba-png": lambda: encode(transparent(), "PNG"),
    "palette-png": lambda: encode(photo().quantize(16), "PNG"),
    "palette-one-transparent": lambda: encode(photo().quantize(16), "PNG", transparency=3),
    "palette-half-transparent": lambda: encode(photo().quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
    "gif": lambda: encode(photo(), "GIF"),
    "webp": lambda: encode(photo(), "WEBP"),
    "bmp": lambda: encode(photo(), "BMP"),
}


@pytest.mark.filterwarnings("error:Palette images")
@pytest.mark.parametrize("kind", ORDINARY)
def test_opens_like_transformers_from_every_kind_of_source(kind, tmp_path):
    content = ORDINARY[kind]()
    path = tmp_path / "image"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(load_image(str(path)))
    assert expected.shape == ((64, 48, 3) if kind.startswith("exif") else (48, 64, 3))
    sources = (path, str(path), content, Image.open(path), {"path": str(path), "bytes": None})
    for source in (*sources, {"path": "elsewhere.jpg", "bytes": content}):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), expected)
        assert unreadable_reason(source) is None


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled_and_not_clipped(kind):
    ramp = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
    opened = np.asarray(open_image(encode(Image.fromarray(ramp), kind)))
    assert opened.dtype == np.uint8
    np.testing.assert_allclose(opened, np.repeat(ramp[..., None] / 257, 3, axis=2), atol=0.5)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64, dtype=np.float32), np.arange(64, dtype=np.int32) * 10**6])
def test_32_bits_are_refused(values):
    content = encode(Image.fromarray(values.reshape(8, 8)), "TIFF")
    with pytest.raises(UnreadableImageError, match="save it with 8 or 16 bits"):
        open_image(content)
    assert "save it with 8 or 16 bits" in unreadable_reason(content)


@pytest.mark.parametrize("kind", ["rgb-jpeg", "progressive-jpeg", "exif-jpeg", "rgba-png", "gif", "webp", "bmp"])
def test_a_cut_image_is_found_wherever_it_is_cut(kind, tmp_path):
    content = ORDINARY[kind]()
    path = tmp_path / "cut.jpg"
    # The last few bytes are an end mark: without it, every pixel is still there.
    for length in np.linspace(0, len(content) - 32, 25, dtype=int):
        path.write_bytes(content[:length])
        assert unreadable_reason(path), f"{length} of {len(content)} bytes"
        with pytest.raises(UnreadableImageError, match=r"Cannot read the image .*cut\.jpg: \w"):
            open_image(path)


def test_images_are_found_at_any_depth_and_through_links(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for name in ("b.png", "a/deep/c.JPG", ".hidden.png", ".hidden/d.png", "__MACOSX/a.png", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    elsewhere.mkdir()
    (elsewhere / "e.png").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    (given := tmp_path / "given.txt").touch()
    # A broken link is listed too: who opens it says so.
    found = [folder / name for name in ("a/deep/c.JPG", "b.png", "gone.png", "linked/e.png")]
    assert find_images([given, folder]) == [given, *found]
    with pytest.raises(ValueError, match="hidden holds no images"):
        (folder / ".hidden" / "d.png").unlink()
        find_images([folder / ".hidden"])
    with pytest.raises(FileNotFoundError, match="There is no file or folder"):
        find_images([tmp_path / "nowhere"])


def test_unreadable_images_are_named_with_the_reason(tmp_path):
    page = tmp_path / "page.jpg"
    page.write_text("<html>404 not found</html>")
    with pytest.raises(UnreadableImageError, match=r"page\.jpg: it is empty or in no image format"):
        open_image(page)
    with pytest.raises(UnreadableImageError, match=r"given as bytes or pixels: it is empty or in no image format"):
        open_image(b"")
    with pytest.raises(UnreadableImageError, match="neither a path nor bytes"):
        open_image({"path": None, "bytes": None})
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jpg"):
        open_image(tmp_path / "nowhere.jpg")
    assert unreadable_reason(tmp_path / "nowhere.jpg") == "No such file or directory"


def test_what_to_do_with_an_image_that_is_too_large(tmp_path, monkeypatch):
    """Large in its header alone. Pillow has a limit of its own, which must neither speak first nor outlast ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    path = tmp_path / "large.jpg"
    Image.new("RGB", (8, 8)).save(path)
    content = path.read_bytes()
    frame = content.index(b"\xff\xc0") + 5
    path.write_bytes(content[:frame] + struct.pack(">HH", 20_000, 20_000) + content[frame + 4 :])
    with pytest.raises(UnreadableImageError) as error:
        open_image(path)
    assert str(error.value) == (
        f"Cannot read the image {path}: it has 400,000,000 pixels, and at most 128,000,000 are read; make it smaller, "
        "or, where memory allows, set PROMPT_CAM_MAX_PIXELS=400000000 in the environment"
    )
    assert unreadable_reason(path) in str(error.value)
    monkeypatch.setenv("PROMPT_CAM_MAX_PIXELS", "400000000")
    assert unreadable_reason(path) is None


def official_preprocessing(image, size):
    """(3, rows, cols) of -1..1: squashed by PIL, computed without an image processor."""
    pixels = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR), dtype=np.float64)
    return np.moveaxis((pixels / 255 - 0.5) / 0.5, -1, 0)


@pytest.mark.parametrize("image_size", [224, 96, (56, 112)])
def test_processor_is_the_official_preprocessing(image_size):
    processor = build_image_processor(image_size)
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixel_values = processor(photo(), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, *size)
    assert pixel_values.dtype == torch.float32
    # A torchvision processor rounds its resize differently, by one level of 255.
    tolerance = 1e-6 if isinstance(processor, ViTImageProcessorPil) else 2.5 / 255
    np.testing.assert_allclose(pixel_values[0], official_preprocessing(photo(), size), atol=tolerance)


def test_processor_loads_through_auto_classes(tmp_path):
    processor = build_image_processor((64, 32), image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    processor.save_pretrained(tmp_path)
    # The neutral name: AutoImageProcessor takes the PIL or the torchvision class from it, whichever there is.
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ViTImageProcessor"
    for backend in (None, "pil"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert loaded.to_dict() == processor.to_dict()
    expected = processor(photo(), return_tensors="pt")["pixel_values"]
    actual = AutoImageProcessor.from_pretrained(tmp_path)(photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": (224, -1)}, r"image_size is \(224, -1\)"),
        ({"image_size": (224, 224, 3)}, r"image_size is \(224, 224, 3\)"),
        ({"image_size": (0.5, 0.5)}, r"image_size is \(0\.5, 0\.5\)"),
        ({"image_mean": (0.5,)}, "three numbers"),
        ({"image_std": (0.5, 0.5, 0)}, "above 0"),
    ],
)
def test_processor_refuses_nonsense(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_image_processor(**arguments)


def all_views(image, crop, resized):
    """Every crop of the squashed image and its mirror image, by (top, left, flipped)."""
    whole = official_preprocessing(image, resized)
    views = {}
    for top in range(resized[0] - crop[0] + 1):
        for left in range(resized[1] - crop[1] + 1):
            view = whole[:, top : top + crop[0], left : left + crop[1]]
            views[top, left, False], views[top, left, True] = view, view[:, :, ::-1]
    return views


@pytest.mark.parametrize(("crop", "resized"), [((56, 56), (60, 60)), ((28, 56), (30, 60))])
def test_augmentation_draws_every_official_view(crop, resized):
    image = photo()
    augmentation = TrainingAugmentation(ViTImageProcessorPil(**build_image_processor(crop).to_dict()))
    expected = all_views(image, crop, resized)
    seen = []
    for index in range(400):
        view = augmentation(image, epoch=0, index=index)
        assert view.dtype == torch.float32
        assert view.shape == (3, *crop)
        matches = [key for key, official in expected.items() if np.abs(official - view.numpy()).max() < 1e-6]
        assert len(matches) == 1
        seen += matches
    assert set(seen) == set(expected)
    assert 160 < sum(flipped for _, _, flipped in seen) < 240


def test_official_size_is_resized_to_240():
    assert TrainingAugmentation(build_image_processor(224)).resize_size == {"height": 240, "width": 240}


def test_augmentation_depends_on_seed_epoch_and_index_alone():
    image, processor = photo(), build_image_processor(112)
    draw = TrainingAugmentation(processor, seed=1)
    first = draw(image, epoch=2, index=3)
    np.random.seed(0)
    torch.manual_seed(0)
    again = pickle.loads(pickle.dumps(draw))(image, epoch=2, index=3)
    assert torch.equal(first, again)
    others = [draw(image, 3, 3), draw(image, 2, 4), draw(image, 3, 2), TrainingAugmentation(processor)(image, 2, 3)]
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("orientation", [1, 6])
def test_training_decodes_large_jpegs_at_a_smaller_size(tmp_path, orientation):
    """As far as each side stays twice what is needed; evaluation decodes them whole."""
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    image = smooth.resize((900, 600), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "photo.jpg", quality=95, exif=exif)
    turned = orientation == 6
    for least, size in ((None, (900, 600)), (301, (900, 600)), (300, (450, 300)), (76, (225, 150)), (75, (113, 75))):
        opened = open_image(tmp_path / "photo.jpg", least)
        assert opened.size == (size[::-1] if turned else size)
        assert upright_size(tmp_path / "photo.jpg", least) == opened.size
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "photo.jpg")], "label": [0]})
    rows = rows.cast_column("image", datasets.Image())
    processor = build_image_processor(70)
    whole = processor(open_image(tmp_path / "photo.jpg"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(ImageDataset(rows, processor)[0]["pixel_values"], whole)
    augmentation = TrainingAugmentation(processor, resize_margin=1)
    view = ImageDataset(rows, augmentation)[0]["pixel_values"]
    distances = [(view - other).abs().mean() * 127.5 for other in (whole, whole.flip(-1))]
    assert 0 < min(distances) < 1.7 < max(distances)  # of 255


def test_margin_of_one_only_flips():
    image, processor = photo(), build_image_processor(32)
    plain = processor(image, return_tensors="pt")["pixel_values"][0]
    views = [TrainingAugmentation(processor, resize_margin=1)(image, 0, index) for index in range(20)]
    assert all(torch.equal(view, plain) or torch.equal(view, plain.flip(-1)) for view in views)
    assert 0 < sum(torch.equal(view, plain) for view in views) < 20
    with pytest.raises(ValueError, match=r"resize_margin is 0\.9"):
        TrainingAugmentation(processor, resize_margin=0.9)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ({"shortest_edge": 32}, (45, 34)),  # CLIP's way: enlarged, since a square image would leave no room
        ({"shortest_edge": 40}, (53, 40)),  # DINOv2's: as in evaluation, for there is room already
        ({"height": 36, "width": 33}, (34, 37)),  # enlarged until the narrower side is 240/224 of 32
    ],
)
def test_a_processor_that_crops_the_centre_crops_at_random_in_training(size, resized):
    settings = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": Image.Resampling.BILINEAR}
    processor = CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}, **settings)
    augmentation, image = TrainingAugmentation(processor), photo()
    whole = np.asarray(image.resize(resized, Image.Resampling.BILINEAR), np.float64) / 127.5 - 1
    places = [(top, left) for top in range(resized[1] - 31) for left in range(resized[0] - 31)]
    seen = set()
    for index in range(60):
        view = augmentation(image, 0, index).numpy()
        assert view.shape == (3, 32, 32)
        matches = [
            (top, left)
            for top, left in places
            for kind in (view, view[:, :, ::-1])
            if np.abs(whole[top : top + 32, left : left + 32].transpose(2, 0, 1) - kind).max() < 1e-5
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) > 8


def test_augmentation_refuses_a_processor_without_a_fixed_size():
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, do_center_crop=False)
    with pytest.raises(ValueError, match="different sizes"):
        TrainingAugmentation(processor)


@pytest.fixture
def labelled(tmp_path):
    paths = []
    for number in range(8):
        paths.append(str(tmp_path / f"{number}.png"))
        photo(seed=number).save(paths[-1])
    return datasets.Dataset.from_dict({"image": paths, "label": [0, 1] * 4}).cast_column("image", datasets.Image())


def test_dataset_gives_model_inputs(labelled):
    processor = build_image_processor(32)
    dataset = ImageDataset(labelled, processor)
    assert len(dataset) == 8
    item = dataset[5]
    assert item["labels"] == 1
    expected = processor(photo(seed=5), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(item["pixel_values"], expected)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[5]["pixel_values"], expected)


def test_dataset_passes_row_and_epoch_to_the_augmentation(labelled):
    augmentation = TrainingAugmentation(build_image_processor(32), seed=4)
    dataset = ImageDataset(labelled, augmentation)
    assert torch.equal(dataset[3]["pixel_values"], augmentation(photo(seed=3), epoch=0, index=3))
    dataset.set_epoch(7)
    assert torch.equal(dataset[3]["pixel_values"], augmentation(photo(seed=3), epoch=7, index=3))


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_views_do_not_depend_on_workers(labelled, workers, persistent):
    dataset = ImageDataset(labelled, TrainingAugmentation(build_image_processor(64)))
    loader = DataLoader(dataset, batch_size=3, num_workers=workers, persistent_workers=persistent)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([batch["pixel_values"] for batch in loader]))
        expected = [dataset.transform(photo(seed=index), epoch, index) for index in range(8)]
        assert torch.equal(epochs[-1], torch.stack(expected))
    assert not torch.equal(epochs[0], epochs[1])


class Recorder(torch.nn.Module):
    """A model that keeps what it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def forward(self, pixel_values, labels):
        if self.training:
            self.seen += list(pixel_values)
        return {"loss": self.weight**2, "logits": torch.zeros(len(labels), 2)}


def train(dataset, folder, resume=None, **arguments):
    model = Recorder()
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        num_train_epochs=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=3,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, callbacks=[SetEpochCallback()])
    trainer.train(resume_from_checkpoint=resume)
    return model.seen


@pytest.mark.parametrize("workers", [0, 2])
def test_trainer_shows_each_image_once_in_each_epochs_view(labelled, tmp_path, workers):
    augmentation = TrainingAugmentation(build_image_processor(64))
    seen = train(ImageDataset(labelled, augmentation), tmp_path, dataloader_num_workers=workers)
    assert len(seen) == 24
    for epoch in range(3):
        expected = [augmentation(photo(seed=index), epoch, index) for index in range(8)]
        of_epoch = seen[8 * epoch : 8 * epoch + 8]
        assert all(sum(torch.equal(view, other) for other in of_epoch) == 1 for view in expected)


def test_a_resumed_run_sees_the_same_views(labelled, tmp_path):
    dataset = ImageDataset(labelled, TrainingAugmentation(build_image_processor(64)))
    whole = train(dataset, tmp_path)
    # Checkpoint 3 lies in the middle of the second epoch.
    resumed = train(dataset, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert torch.equal(torch.stack(resumed), torch.stack(whole[12:]))


def test_callback_reaches_the_data_where_accelerate_stops_at_the_sampler(labelled):
    dataset = ImageDataset(labelled, TrainingAugmentation(build_image_processor(32)))
    loader = prepare_data_loader(
        DataLoader(dataset, batch_size=2, shuffle=True),
        num_processes=2,
        process_index=1,
        put_on_device=False,
        use_seedable_sampler=True,
    )
    state = TrainerState(epoch=4.0)
    SetEpochCallback().on_epoch_begin(None, state, None, train_dataloader=loader)
    list(loader)
    assert int(dataset._epoch) == 4
