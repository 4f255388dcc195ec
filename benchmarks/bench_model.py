# SPDX-License-Identifier: MIT
"""How fast is the model, and how much memory does a training step take? `make bench` runs this.

Everything is measured against something else in the same run, in turn, and reported as the median of the ratios: single
times say little on a machine that others use too. ViT-B/16 at 224 pixels, float32, random weights.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from straightforward import StraightforwardPromptCAM
from transformers import ViTConfig

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification

CLASSES = (37, 200, 525)


def build(num_classes: int) -> PromptCAMForImageClassification:
    """A ViT-B/16 with prompts."""
    torch.manual_seed(0)
    config = PromptCAMConfig(backbone_config=ViTConfig(), num_labels=num_classes)
    return PromptCAMForImageClassification(config).eval()


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratios(first: Callable[[], object], second: Callable[[], object], rounds: int) -> list[float]:
    """Time of `first` over time of `second`, called in turn."""
    first(), second()
    return [seconds(first) / seconds(second) for _ in range(rounds)]


def training_step(model: torch.nn.Module, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """Forward, backward, and the gradients thrown away."""
    output = model(pixel_values, labels=labels)
    (output if isinstance(output, torch.Tensor) else output.loss).backward()
    model.zero_grad(set_to_none=True)


def peak_memory(kind: str, num_classes: int, batch: int) -> dict[str, float]:
    """Megabytes of a process that does two training steps: its peak, and what it held before the first."""
    command = [sys.executable, __file__, "--memory-of", kind, "--classes", str(num_classes), "--batch", str(batch)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_own_memory(kind: str, num_classes: int, batch: int) -> None:
    """The other end of `peak_memory`."""
    model: torch.nn.Module = build(num_classes).train()
    if kind == "straightforward":
        model = StraightforwardPromptCAM(model)
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    before = peak_megabytes()
    for _ in range(2):
        training_step(model, images, labels)
    print(json.dumps({"peak": peak_megabytes(), "before": before}))


def peak_megabytes() -> float:
    """Most memory that this process has held so far (Linux; getrusage would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def report(name: str, num_classes: int, values: list[float]) -> None:
    """One line of the table."""
    spread = f"{min(values):.2f} to {max(values):.2f}"
    print(f"{name:58s} {num_classes:4d} classes   {statistics.median(values):5.2f}   ({spread}, {len(values)} rounds)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES)
    parser.add_argument("--memory-of", choices=("ours", "straightforward"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_own_memory(arguments.memory_of, arguments.classes[0], arguments.batch)
        return
    print(
        f"ViT-B/16, 224 px, float32, batch {arguments.batch}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    images = torch.randn(arguments.batch, 3, 224, 224)
    labels = torch.zeros(arguments.batch, dtype=torch.long)
    for num_classes in arguments.classes:
        ours = build(num_classes)
        theirs = StraightforwardPromptCAM(ours)
        with torch.inference_mode():
            difference = (ours(images).logits - theirs(images)).abs().max().item()
            forward = ratios(lambda: theirs(images), lambda: ours(images), arguments.rounds)  # noqa: B023
            plain = ratios(lambda: ours(images), lambda: ours.backbone(images), arguments.rounds)  # noqa: B023
        ours.train(), theirs.train()
        step = ratios(
            lambda: training_step(theirs, images, labels),  # noqa: B023
            lambda: training_step(ours, images, labels),  # noqa: B023
            arguments.rounds,
        )
        memory = {kind: peak_memory(kind, num_classes, arguments.batch) for kind in ("ours", "straightforward")}
        print(f"\nlargest difference of the logits: {difference:.1e}")
        report("forward, straightforward / ours", num_classes, forward)
        report("forward, ours / plain backbone", num_classes, plain)
        report("training step, straightforward / ours", num_classes, step)
        used = {kind: values["peak"] - values["before"] for kind, values in memory.items()}
        peak = {kind: values["peak"] for kind, values in memory.items()}
        print(
            f"{'peak memory of the process, ours / straightforward':58s} {num_classes:4d} classes   "
            f"{peak['ours'] / peak['straightforward']:5.2f}   ({peak['ours']:.0f} / {peak['straightforward']:.0f} MB)"
        )
        print(
            f"{'memory that a training step adds, ours / straightforward':58s} {num_classes:4d} classes   "
            f"{used['ours'] / used['straightforward']:5.2f}   ({used['ours']:.0f} / {used['straightforward']:.0f} MB)"
        )


if __name__ == "__main__":
    main()
