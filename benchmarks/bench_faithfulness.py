# SPDX-License-Identifier: MIT
"""What do insertion and deletion of one image cost beside the plain forwards that they need? `make bench` runs this.

ViT-B/16 at 224 pixels, float32, random weights. Each round times one metric, and then exactly as many images, in
the same batches, through the plain backbone. The steps are coarser than those of any preset, so that a round is short:
more steps are more of the same, while what is done once an image (blur, order of the pixels) weighs more here.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
from transformers import ViTConfig, ViTForImageClassification

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.metrics.faithfulness import deletion, insertion

SIDE = 224


def seconds(function: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bench(name: str, model: torch.nn.Module, plain: torch.nn.Module, cells: int, batch: int, rounds: int) -> None:
    """The ratios for one model, in turn with the plain forwards."""
    image, one_map = torch.randn(1, 3, SIDE, SIDE), torch.rand(1, cells, cells)
    # One evaluation for each step and one before the first, and one to find the predicted class.
    evaluations = cells * cells + 1
    batches = [1] + [min(batch, evaluations - start) for start in range(0, evaluations, batch)]
    images = [torch.randn(size, 3, SIDE, SIDE) for size in batches]

    def forwards() -> None:
        with torch.inference_mode():
            for pixel_values in images:
                plain(pixel_values)

    metrics = {
        metric.__name__: lambda metric=metric: metric(model, image, one_map, preset="fast", batch_size=batch)
        for metric in (insertion, deletion)
    }
    forwards()
    for metric, function in metrics.items():
        function()
        ratios = [seconds(function) / seconds(forwards) for _ in range(rounds)]
        label = f"{metric}, {name} / {sum(batches)} plain forwards"
        spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds"
        print(f"  {label:62s} {statistics.median(ratios):5.2f}   ({spread})", flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=10, help="Of the model, at most; a square number plus one.")
    parser.add_argument("--classes", type=int, default=200)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    classifier = ViTForImageClassification(ViTConfig(num_labels=arguments.classes)).eval()
    prompt_cam = PromptCAMForImageClassification(
        PromptCAMConfig(backbone_config=ViTConfig(), num_labels=arguments.classes)
    ).eval()
    print(
        f"ViT-B/16, {SIDE} px, float32, batch {arguments.batch}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of the ratios"
    )
    cells = math.isqrt(arguments.evaluations - 1)
    for name, model in {
        "linear classifier": classifier,
        f"Prompt-CAM with {arguments.classes} classes": prompt_cam,
    }.items():
        bench(name, model, classifier, cells, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
