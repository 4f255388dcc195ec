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
from prompt_cam_hf.data.images import open_image

# The official recipe resizes to 240 for a crop of 224; other sizes keep the proportion.
RESIZE_MARGIN = 240 / 224
# Of DETR's augmentation: the shorter side in the end, before a crop, and the sides of a crop.
_DETR_SIDES = tuple(range(480, 801, 32))
_DETR_SIDES_BEFORE_CROP = (400, 500, 600)
_DETR_CROP = (384, 600)


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

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
        """Give the view (3, rows, cols), float32, of an RGB image in an epoch; epochs and images count from 0."""
        random = np.random.default_rng((self.seed, epoch, index))
        inputs = self.image_processor(image, size=self.resize_size, do_center_crop=False, return_tensors="pt")
        resized = inputs["pixel_values"][0]
        rows, cols = self.crop_size
        top = random.integers(resized.shape[1] - rows + 1)
        left = random.integers(resized.shape[2] - cols + 1)
        # Rescaling and normalising work pixel by pixel: cropping and flipping after them changes nothing.
        view = resized[:, top : top + rows, left : left + cols]
        return (view.flip(-1) if random.random() < 0.5 else view).contiguous()


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

    def __call__(self, image: Image.Image, epoch: int, index: int) -> torch.Tensor:
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

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.dataset[index]
        image = open_image(row["image"])
        if isinstance(self.transform, Augmentation):
            pixel_values = self.transform(image, epoch=int(self._epoch), index=index)
        else:
            pixel_values = self.transform(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": row["label"]}


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
