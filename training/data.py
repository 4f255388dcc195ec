# SPDX-License-Identifier: MIT
"""Images as training reads them: the augmentation of the official recipe, the data set, and the epochs of both.

The official recipe resizes to 240 x 240 for a crop of 224, crops at random and flips half of the images.
"""

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.image_processing_utils import BaseImageProcessor

from prompt_cam_hf.data.image_processors import output_size
from prompt_cam_hf.data.images import ImageSource, open_image, upright_size

# The official recipe resizes to 240 for a crop of 224; other sizes keep the proportion.
RESIZE_MARGIN = 240 / 224
# Of DETR's augmentation: the shorter side in the end, before a crop, and the sides of a crop.
_DETR_SIDES = tuple(range(480, 801, 32))
_DETR_SIDES_BEFORE_CROP = (400, 500, 600)
_DETR_CROP = (384, 600)

# A JPEG is decoded at a smaller size as long as each side stays this many times what it is resized to. On photos,
# resized pixels then differ from those of the whole image by 0.5 to 1.7 of 255 on average (PSNR 39 to 46 dB).
_DRAFT_MARGIN = 2


class Preprocessing:
    """An image processor in two halves: to bytes, which is slow and never changes, and on to what a model reads.

    Together they give what the image processor gives, to the bit.

    Args:
        image_processor: That of evaluation.
        least_side: Of what is decoded of large JPEGs, as `open_image` takes it.
        **options: Settings that win over the image processor's own, such as `size`.
    """

    def __init__(self, image_processor: BaseImageProcessor, least_side: int | None = None, **options: Any):
        self._least_side = least_side
        self.image_processor = image_processor
        self._options = options
        self._to_bytes = {**options, "do_rescale": False, "do_normalize": False}
        settings = {**image_processor.to_dict(), **options}
        # For Pillow itself, which is faster than the image processor around it.
        self._squash: tuple[tuple[int, int], int] | None = None
        values = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
        table = self._process(values, {**options, "do_resize": False, "do_center_crop": False})
        # (3, 256): what becomes of each byte of red, green and blue.
        self._table: np.ndarray | None = table.reshape(3, 256)
        # Whether this is all that the processor does depends on its kind and on the library it runs on: try.
        trial = Image.fromarray(np.random.default_rng(0).integers(0, 256, (91, 73, 3), dtype=np.uint8))
        resized = self.resize(trial)
        if resized.dtype != np.uint8 or not np.array_equal(self.finish(resized), self._process(trial, options)):
            # DINOv3's rescales before it resizes: there are no bytes in between.
            self._table, self._to_bytes = None, options
        elif {"height", "width"} == settings["size"].keys() and not settings.get("do_center_crop"):
            self._squash = (settings["size"]["width"], settings["size"]["height"]), settings["resample"]
            if not np.array_equal(self.resize(trial), resized):
                self._squash = None

    def _process(self, image: Image.Image, options: dict[str, Any]) -> np.ndarray:
        return np.asarray(self.image_processor(image, return_tensors="np", **options)["pixel_values"][0])

    @property
    def dtype(self) -> type:
        """Of the first half's result."""
        return np.float32 if self._table is None else np.uint8

    def read(self, source: ImageSource) -> np.ndarray:
        """Open an image and resize it."""
        return self.resize(open_image(source, self._least_side))

    def read_size(self, source: ImageSource) -> tuple[int, int]:
        """Width and height of what is opened, before it is resized."""
        return upright_size(source, self._least_side)

    def resize(self, image: Image.Image) -> np.ndarray:
        """The first half: (3, rows, cols), uint8 (float32 where the processor has no bytes in between)."""
        if self._squash is None:
            return self._process(image, self._to_bytes)
        return np.asarray(image.resize(*self._squash)).transpose(2, 0, 1)

    def finish(self, resized: np.ndarray) -> np.ndarray:
        """The second half, on all or a part of the first half's rows and columns, in any order: float32."""
        if self._table is None:
            return np.array(resized, order="C")
        pixel_values = np.empty(resized.shape, np.float32)
        for values, channel, out in zip(self._table, resized, pixel_values, strict=True):
            np.take(values, channel, out=out, mode="clip")  # the mode that needs no buffer; no byte is out of range
        return pixel_values

    def view(self, resized: np.ndarray, epoch: int, index: int) -> torch.Tensor:
        """Give what evaluation sees, (3, rows, cols), float32: the same in every epoch."""
        return torch.from_numpy(self.finish(resized))


class TrainingAugmentation:
    """The official training recipe: resize a little too large, crop at random, flip half of the images.

    Resizing, rescaling and normalising are the image processor's own, so only the enlarged size, the place of the crop
    and the flip differ from evaluation. Where a processor crops the centre, the crop is taken at random instead, and
    the size is enlarged only as far as the crop needs: that of DINOv2 (256 for a crop of 224) stays, that of CLIP
    (224 for 224) becomes 240.

    The draws depend on (`seed`, epoch, index) and on nothing else: training is the same on one process or several,
    with any number of data loader workers, and after a resume.

    Args:
        image_processor: That of evaluation.
        seed: Draws places and flips.
        resize_margin: The resized side over the cropped side, 1 or more.

    Raises:
        ValueError: the margin is below 1, or the processor gives images of different sizes.
    """

    def __init__(self, image_processor: BaseImageProcessor, seed: int = 0, resize_margin: float = RESIZE_MARGIN):
        if resize_margin < 1:
            raise ValueError(f"resize_margin is {resize_margin}; a crop needs a margin of at least 1 (no margin).")
        self.image_processor = image_processor
        self.seed = seed
        self.crop_size = output_size(image_processor)
        size = dict(image_processor.to_dict()["size"])
        sides = (size.get(name) or size["shortest_edge"] for name in ("height", "width"))
        room = min(side / cropped for side, cropped in zip(sides, self.crop_size, strict=True))
        self.resize_size = {name: round(side * max(1, resize_margin / room)) for name, side in size.items()}
        least_side = _DRAFT_MARGIN * max(self.resize_size.values())
        self.preprocessing = Preprocessing(image_processor, least_side, size=self.resize_size, do_center_crop=False)

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        """Give the view (3, rows, cols), float32, of an RGB image in an epoch; epochs and images count from 0."""
        return self.view(self.preprocessing.resize(image), epoch, index)

    def read(self, source: ImageSource) -> np.ndarray:
        """Open an image and resize it."""
        return self.preprocessing.read(source)

    def view(self, resized: np.ndarray, epoch: int, index: int) -> torch.Tensor:
        """Give the view of an image that has been read."""
        random = np.random.default_rng((self.seed, epoch, index))
        rows, cols = self.crop_size
        top = random.integers(resized.shape[1] - rows + 1)
        left = random.integers(resized.shape[2] - cols + 1)
        view = resized[:, top : top + rows, left : left + cols]
        flipped = view[..., ::-1] if random.random() < 0.5 else view
        # Pixel by pixel, so only those that are seen.
        return torch.from_numpy(self.preprocessing.finish(flipped))


class DetrAugmentation:
    """The training augmentation of DETR, which INTR takes over: sizes at random, and flips.

    Half of the images are flipped. Half are resized to a shorter side of 400, 500 or 600 pixels and cropped at random
    to sides of 384 to 600. All end with a shorter side of 480 to 800, and the longer one within the processor's limit.

    Args:
        image_processor: That of evaluation, from `build_detr_image_processor`.
        seed: Draws all of this, with epoch and index, as in `TrainingAugmentation`.
    """

    def __init__(self, image_processor: BaseImageProcessor, seed: int = 0):
        self.image_processor = image_processor
        self.seed = seed

    def read(self, source: ImageSource) -> Image.Image:
        """Open an image."""
        return open_image(source)

    def view(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        """Give the view (3, rows, cols), float32, of an RGB image in an epoch; epochs and images count from 0."""
        random = np.random.default_rng((self.seed, epoch, index))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        if random.random() < 0.5:
            scale = random.choice(_DETR_SIDES_BEFORE_CROP) / min(image.size)
            image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
            width, height = (int(random.integers(_DETR_CROP[0], min(side, _DETR_CROP[1]) + 1)) for side in image.size)
            left, top = (int(random.integers(room + 1)) for room in (image.width - width, image.height - height))
            image = image.crop((left, top, left + width, top + height))
        size = {**self.image_processor.to_dict()["size"], "shortest_edge": int(random.choice(_DETR_SIDES))}
        return self.image_processor(image, size=size, return_tensors="pt")["pixel_values"][0]


# What draws another view of an image in each epoch.
Augmentation = TrainingAugmentation | DetrAugmentation


class EpochDataset(Dataset):
    """A data set whose items depend on the epoch, which data loader workers that outlive an epoch hear of too."""

    def __init__(self) -> None:
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Give the items of another epoch, from 0, from now on, in running workers too."""
        self._epoch.fill_(epoch)


class ImageDataset(EpochDataset):
    """Labelled images as model inputs: a map-style, picklable torch data set.

    It reads the columns `image` and `label`, through an image processor (for evaluation) or an augmentation.
    Item `i` is `{"pixel_values": float32 of (3, rows, cols), "labels": int}`; errors are those of `open_image`.
    """

    def __init__(self, dataset: datasets.Dataset, transform: BaseImageProcessor | Augmentation):
        super().__init__()
        if isinstance(dataset.features["image"], datasets.Image):
            dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.dataset = dataset
        self.transform = transform
        self._views = transform if isinstance(transform, Augmentation) else Preprocessing(transform)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        return {"pixel_values": self.view(self._views.read(row["image"]), index), "labels": row["label"]}

    def view(self, resized: Any, index: int) -> torch.Tensor:
        """Give the epoch's view of an image of that number that has been read."""
        return self._views.view(resized, int(self._epoch), index)

    @property
    def preprocessing(self) -> Preprocessing:
        """What is the same in every epoch.

        Raises:
            ValueError: nothing is, since sizes are drawn at random.
        """
        if isinstance(self._views, DetrAugmentation):
            raise ValueError("With resizing: detr images have another size in each epoch, which cannot be cached.")
        return self._views if isinstance(self._views, Preprocessing) else self._views.preprocessing


class SetEpochCallback(TrainerCallback):
    """Tell the training data which epoch begins, so that its augmentation draws new views in each.

    Trainer and accelerate do so in the plainest case only: with several processes, and in an epoch that is resumed in
    its middle, accelerate tells the sampler and not the data, which would go on with the views of another epoch.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the number of the epoch to the training data, where they have `set_epoch`; called by Trainer."""
        dataset = kwargs["train_dataloader"].dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(int(state.epoch or 0))
