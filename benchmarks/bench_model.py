# SPDX-License-Identifier: MIT
"""How fast is the model, and how much memory does a training step take? `make bench` runs this.

Everything is measured against something else in the same run, in turn, and reported as the median of the ratios:
single times say little on a machine that others use too. ViT-B/16 at 224 pixels, float32, random weights.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from straightforward import StraightforwardPromptCAM
from transformers import ViTConfig

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification

CLASSES = (37, 200, 525)
# Without agnostic prompts, as nobody would have so many of them.
MANY_CLASSES = (1_000, 10_000)
# The straightforward computation: with explicit attention, as the official code does it, and with fused attention.
BASELINES = {"eager": "the official way", "sdpa": "the long way, fused"}


def build(num_classes: int) -> PromptCAMForImageClassification:
    """A ViT-B/16 with prompts."""
    torch.manual_seed(0)
    agnostic = 0 if num_classes in MANY_CLASSES else None
    config = PromptCAMConfig(backbone_config=ViTConfig(), num_labels=num_classes, num_agnostic_prompts=agnostic)
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


def training_step(model: torch.nn.Module, *inputs: torch.Tensor, **keywords: torch.Tensor) -> None:
    """Forward, backward, and the gradients thrown away."""
    output = model(*inputs, **keywords)
    (output if isinstance(output, torch.Tensor) else output.loss).backward()
    model.zero_grad(set_to_none=True)


def peak_memory(kind: str, num_classes: int, batch: int) -> dict[str, float]:
    """Megabytes of a process that does two training steps: its peak, and what it held before the first."""
    command = [sys.executable, __file__, "--memory-of", kind, "--classes", str(num_classes), "--batch", str(batch)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_own_memory(kind: str, num_classes: int, batch: int) -> None:
    """The other end of `peak_memory`."""
    model: torch.nn.Module = build(num_classes).train()
    if kind != "ours":
        model = StraightforwardPromptCAM(model, kind)
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    before = peak_megabytes()
    for _ in range(2):
        training_step(model, images, labels=labels)
    print(json.dumps({"peak": peak_megabytes(), "before": before}))


def peak_megabytes() -> float:
    """Most memory that this process has held so far (Linux; getrusage would count the parent's too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024


def report(name: str, values: list[float]) -> None:
    """One line of the table."""
    spread = f"{min(values):.2f} to {max(values):.2f} in {len(values)} rounds"
    print(f"  {name:62s} {statistics.median(values):5.2f}   ({spread})", flush=True)


def bench_one_image(ours: PromptCAMForImageClassification, image: torch.Tensor, rounds: int) -> None:
    """One image at a time, as the pipeline and the explanations ask for; many rounds, since they are short."""
    expected = ours(image).logits
    plain = lambda: ours.backbone(image)  # noqa: E731
    report("forward of one image, ours / plain backbone", ratios(lambda: ours(image), plain, 5 * rounds))
    with ours.prepared():
        difference = (ours(image).logits - expected).abs().max().item()
        assert difference < 1e-5, f"prepared prompts give other scores: {difference}"
        name = "forward of one image, ours prepared / plain backbone"
        report(name, ratios(lambda: ours(image), plain, 5 * rounds))


def bench_many(num_classes: int, batch: int, rounds: int) -> None:
    """Thousands of classes, beside the backbone alone on the same images; training is on cached features."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    ours = build(num_classes)
    plain = torch.no_grad()(lambda: ours.backbone(images))
    print(f"\n{num_classes} classes without agnostic prompts")
    with torch.no_grad():
        features = ours.encode_prefix(images)
        report("forward, ours / plain backbone", ratios(lambda: ours(images), plain, rounds))
        with ours.prepared():
            report("forward, ours prepared / plain backbone", ratios(lambda: ours(images), plain, rounds))
    print(f"  {'peak memory of the process so far':62s} {peak_megabytes():5.0f} MB")
    ours.train()
    step = partial(training_step, ours, labels=labels, prefix_hidden_states=features)
    report("training step on cached features, ours / plain forward", ratios(step, plain, rounds))
    print(f"  {'peak memory of the process so far':62s} {peak_megabytes():5.0f} MB")


def bench(num_classes: int, batch: int, rounds: int) -> None:
    """All figures for one number of classes."""
    images, labels = torch.randn(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)
    ours = build(num_classes)
    others = {BASELINES[kind]: StraightforwardPromptCAM(build(num_classes), kind) for kind in BASELINES}
    print(f"\n{num_classes} classes")
    with torch.inference_mode():
        report("forward, ours / plain backbone", ratios(lambda: ours(images), lambda: ours.backbone(images), rounds))
        bench_one_image(ours, images[:1], rounds)
        for name, other in others.items():
            difference = (ours(images).logits - other(images)).abs().max().item()
            assert difference < 1e-4, f"the two compute different scores: {difference}"
            report(f"forward, {name} / ours", ratios(lambda: other(images), lambda: ours(images), rounds))  # noqa: B023
    ours.train()
    for name, other in others.items():
        other.train()
        slow = lambda: training_step(other, images, labels=labels)  # noqa: B023, E731
        report(
            f"training step, {name} / ours", ratios(slow, lambda: training_step(ours, images, labels=labels), rounds)
        )
    mine = peak_memory("ours", num_classes, batch)
    for kind, name in BASELINES.items():
        theirs = peak_memory(kind, num_classes, batch)
        added = [values["peak"] - values["before"] for values in (mine, theirs)]
        print(
            f"  {f'memory that a training step adds, ours / {name}':62s} {added[0] / added[1]:5.2f}   "
            f"({added[0]:.0f} / {added[1]:.0f} MB)"
        )
        print(
            f"  {f'peak memory of the whole process, ours / {name}':62s} {mine['peak'] / theirs['peak']:5.2f}   "
            f"({mine['peak']:.0f} / {theirs['peak']:.0f} MB)"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="*", default=CLASSES + MANY_CLASSES)
    parser.add_argument("--memory-of", choices=("ours", *BASELINES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        measure_own_memory(arguments.memory_of, arguments.classes[0], arguments.batch)
        return
    print(
        f"ViT-B/16, 224 px, float32, batch {arguments.batch}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of the ratios"
    )
    for num_classes in arguments.classes:
        measure = bench_many if num_classes in MANY_CLASSES else bench
        measure(num_classes, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
