# SPDX-License-Identifier: MIT
"""How fast is the model on a GPU, and how much of its memory does it need? `make bench` runs this.

ViT-B/16 at 224 pixels, bfloat16 autocast, random weights, batches of 64 that lie on the GPU: forward and training step
(forward, backward, AdamW), compiled and not, beside the official way and the long way with fused attention
(`straightforward.py`); a ranking by Shapley values; and images a second of whole training runs on drawn birds, read
from files by worker processes and from cached images. All ways take turns in each round, and medians are reported.

Where there is no GPU nothing is measured; `--device cpu` tries the code, and its times mean nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from bench_loader import save_images
from bench_model import BASELINES, CLASSES, MANY_CLASSES, build
from straightforward import StraightforwardPromptCAM
from transformers import ViTConfig, ViTModel

from prompt_cam_hf import load_recipe, train
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.explanations.ranking import rank_heads


class Way:
    """A model that is run forwards and trained, with its optimiser."""

    def __init__(self, model: torch.nn.Module, device: torch.device, compiled: bool):
        self.device = device
        self.model = model.to(device)
        self.run = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), fused=True)

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16)

    @torch.inference_mode()
    def forward(self, images: torch.Tensor) -> None:
        """Score images."""
        self.model.eval()
        with self._precision():
            self.run(images)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Train on a batch."""
        self.model.train()
        with self._precision():
            output = self.run(images, labels=labels)
        (output if isinstance(output, torch.Tensor) else output.loss).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def milliseconds(function: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    """The time of a call that has ended on the device."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _wait(device)
    return 1000 * (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gigabytes(function: Callable[[], object], device: torch.device) -> float:
    """Most memory on the GPU during a call, what lies there anyway included; NaN of another device."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) / 1e9


def measure(way: Way, kind: str, images: torch.Tensor, labels: torch.Tensor, rounds: int) -> dict[str, list[float]]:
    """Times in milliseconds by name, and the peak of a training step; nothing of what does not fit into memory."""
    calls = {"forward": partial(way.forward, images), "step": partial(way.step, images, labels)}
    try:
        for call in (*calls.values(), *calls.values()):  # compiles, and chooses kernels
            call()
        times = {name: [milliseconds(call, way.device) for _ in range(rounds)] for name, call in calls.items()}
        return times | {"memory": [peak_gigabytes(calls["step"], way.device)]}
    except torch.OutOfMemoryError:
        print(f"{kind}: does not fit into memory")
        return {}


def bench_model(num_classes: int, batch: int, rounds: int, device: torch.device) -> None:
    """A row of the table for each way."""
    images, labels = (
        torch.randn(batch, 3, 224, 224, device=device),
        torch.zeros(batch, dtype=torch.long, device=device),
    )
    kinds: dict[str, Callable[[], torch.nn.Module]] = {"ours": lambda: build(num_classes)}
    if num_classes not in MANY_CLASSES:  # the long way has as many agnostic prompts, in every layer
        kinds |= {
            name: lambda kind=kind: StraightforwardPromptCAM(build(num_classes), kind)
            for kind, name in BASELINES.items()
        }
    found: dict[str, dict[str, list[float]]] = {}
    for name, make in kinds.items():
        for compiled in (False, True):
            torch.compiler.reset()
            kind = f"{name}, compiled" if compiled else name
            found[kind] = measure(Way(make(), device, compiled), kind, images, labels, rounds)
    medians = {kind: {name: statistics.median(values) for name, values in row.items()} for kind, row in found.items()}
    for kind, row in medians.items():
        if row:
            slower = " | ".join(f"{row[name] / medians['ours'][name]:.2f}" for name in ("forward", "step"))
            times = f"{row['forward']:.1f} | {row['step']:.1f} | {1000 * batch / row['step']:,.0f}"
            print(f"| {num_classes} | {kind} | {times} | {slower} | {row['memory']:.1f} |", flush=True)


@torch.inference_mode()
def bench_ranking(batch: int, rounds: int, device: torch.device) -> None:
    """Shapley values of all heads beside a forward pass, 200 classes."""
    model, images = build(200).to(device), torch.randn(batch, 3, 224, 224, device=device)
    classes = model(images).logits.argmax(dim=-1)
    ways = (lambda: model(images), lambda: rank_heads(model, images, classes, "shapley"))
    for way in ways:
        way()
    forward, ranking = zip(*([milliseconds(way, device) for way in ways] for _ in range(rounds)), strict=True)
    ratio = statistics.median(second / first for first, second in zip(forward, ranking, strict=True))
    print(f"\nShapley ranking, float32, 200 classes, batch {batch}: {ratio:.2f} forward passes")


def bench_training(batch: int, count: int, device: torch.device) -> None:
    """Images a second of two epochs of Deep, checkpoints and all, read from files and from cached images."""
    with TemporaryDirectory() as folder:
        backbone, photos = Path(folder, "backbone"), Path(folder, "photos", "train")
        ViTModel(ViTConfig(), add_pooling_layer=False).save_pretrained(backbone)
        build_image_processor().save_pretrained(backbone)
        for name in ("one", "other"):
            (photos / name).mkdir(parents=True)
            save_images(photos / name, (500, 375), count // 2)
        print("\n| whole training, 2 classes | images a second |\n| --- | --- |")
        for cached in (False, True):
            recipe = load_recipe(
                "own_photos", data=photos.parent, backbone=backbone, output_dir=Path(folder, f"run_{cached}"),
                validation_fraction=0, num_train_epochs=2, warmup_epochs=0, train_batch_size=batch,
                cache_images=cached, cache_dir=Path(folder, "cache"), bf16=device.type == "cuda",
            )  # fmt: skip
            start = time.perf_counter()
            train(recipe)
            name = "cached images, filling the cache included" if cached else "from files"
            print(f"| {name} | {2 * count / (time.perf_counter() - start):,.0f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES + MANY_CLASSES)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4096, help="to train on; 0 for no training")
    arguments = parser.parse_args()
    device = arguments.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU, so nothing was measured on one.")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, ViT-B/16, 224 px, bfloat16 autocast, batch {arguments.batch}\n")
    print("| classes | way | forward, ms | step, ms | images a second | forward / ours | step / ours | peak, GB |")
    print("| --- |" + " --- |" * 7)
    for num_classes in arguments.classes:
        bench_model(num_classes, arguments.batch, arguments.rounds, device)
    bench_ranking(arguments.batch, arguments.rounds, device)
    if arguments.images:
        bench_training(arguments.batch, arguments.images, device)


if __name__ == "__main__":
    main()
