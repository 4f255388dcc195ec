# SPDX-License-Identifier: MIT
"""How many images a second does one processor core read for training? `make bench` runs this.

The published recipe (resize to 240 x 240, crop 224, flip) on drawn birds, saved as JPEGs of 227 x 227 pixels and, with
a camera's noise, of 12 megapixels: read from files, read from cached images, and, where torchvision is installed, by
its transforms. All are run in turn in each round; the medians of the rates are reported, and of the ratios to the
first. Times are the processor's, so what else runs on the machine matters little.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from PIL import Image

from prompt_cam_hf.birds import birds_dataset
from prompt_cam_hf.data.image_processors import input_size
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.training.data import ImageDataset, TrainingAugmentation
from prompt_cam_hf.training.image_cache import cache_images

_KINDS = {"227 x 227": ((227, 227), 96), "12 megapixels": ((4000, 3000), 12)}


def save_images(folder: Path, size: tuple[int, int], count: int) -> list[str]:
    """JPEGs of birds."""
    birds = birds_dataset("test", -(-count // 18), 256).select(range(count))
    random = np.random.default_rng(0)
    paths = []
    for number, bird in enumerate(birds):
        pixels = np.asarray(bird["image"].convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
        noisy = pixels + random.normal(scale=4, size=(*pixels.shape[:2], 1))
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def ways(paths: list[str], folder: Path) -> dict[str, Callable[[int], object]]:
    """What reads the image of a number, by name."""
    table = datasets.Dataset.from_dict({"image": paths, "label": [0] * len(paths)})
    augmentation = TrainingAugmentation(build_image_processor())
    plain = ImageDataset(table.cast_column("image", datasets.Image()), augmentation)
    found: dict[str, Callable[[int], object]] = {
        "from files": plain.__getitem__,
        "cached images": cache_images(plain, folder).__getitem__,
    }
    try:
        from torchvision import transforms
    except ImportError:
        return found
    transform = transforms.Compose(
        [
            transforms.Resize((240, 240)),
            transforms.RandomCrop(input_size(augmentation.image_processor)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return found | {"torchvision": lambda index: transform(Image.open(paths[index]).convert("RGB"))}


def seconds(read: Callable[[int], object], count: int) -> float:
    """The processor time of an image."""
    start = time.process_time()
    for index in range(count):
        read(index)
    return (time.process_time() - start) / count


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| images a second and core | median | over files |\n| --- | --- | --- |")
    for kind, (size, count) in _KINDS.items():
        with TemporaryDirectory() as folder:
            reading = ways(save_images(Path(folder), size, count), Path(folder))
            rounds = [{name: seconds(read, count) for name, read in reading.items()} for _ in range(arguments.rounds)]
        for name in reading:
            rate = statistics.median(1 / times[name] for times in rounds)
            ratio = statistics.median(times["from files"] / times[name] for times in rounds)
            print(f"| {kind}, {name} | {rate:,.0f} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
