# SPDX-License-Identifier: MIT
"""What does a ranking of heads cost beside one run of the network? `make bench` runs this.

ViT-B/16 at 224 pixels, float32, random weights, 200 classes. In each round everything is run in turn, and the medians
of the rounds' ratios are reported: single times say little on a machine that others use too. The official way runs
the whole network for every set of blurred heads that greedy blurring looks at, 78 times for 12 heads.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from bench_model import build, report, seconds
from straightforward import StraightforwardPromptCAM
from transformers import AttentionInterface

from prompt_cam_hf import PromptCAMForImageClassification
from prompt_cam_hf.explanations.ranking import rank_heads

NUM_CLASSES = 200
METHODS = ("greedy", "exact", "shapley")


class OfficialRanking:
    """Greedy blurring as the official code does it: explicit attention, one run of the network for each candidate."""

    def __init__(self, model: PromptCAMForImageClassification):
        AttentionInterface.register("blurring", self._attention)
        self.network = StraightforwardPromptCAM(model, "blurring")
        self.last_attention = model.backbone.layers[-1].attention
        self.num_heads = model.config.backbone_config.num_attention_heads
        self.classes: torch.Tensor | None = None
        self.blurred: torch.Tensor | None = None
        self.runs = 0

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        scaling: float,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = query @ key.transpose(2, 3) * scaling
        if module is self.last_attention:
            images, heads = self.blurred.nonzero(as_tuple=True)
            scores[images, heads, self.classes[images]] = 0  # uniform after the softmax
        weights = scores.softmax(dim=-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    def __call__(self, pixel_values: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        """The heads (batch, heads) for these classes (batch,), most important first."""
        images = torch.arange(len(classes))
        self.classes, self.runs = classes, 0
        self.blurred = torch.zeros(len(classes), self.num_heads, dtype=torch.bool)
        removed = []
        for number_left in range(self.num_heads, 0, -1):
            candidates = (~self.blurred).nonzero()[:, 1].view(len(classes), number_left)
            left = []
            for heads in candidates.T:
                self.blurred[images, heads] = True
                left.append(self.network(pixel_values)[images, classes])
                self.blurred[images, heads] = False
                self.runs += 1
            best = candidates[images, torch.stack(left, dim=-1).argmax(dim=-1)]
            self.blurred[images, best] = True
            removed.append(best)
        return torch.stack(removed[::-1], dim=-1)


@torch.inference_mode()
def bench(batch: int, rounds: int, official_rounds: int) -> None:
    """All figures for one batch size."""
    images = torch.randn(batch, 3, 224, 224)
    model, official = build(NUM_CLASSES), OfficialRanking(build(NUM_CLASSES))
    classes = model(images).logits.argmax(dim=-1)
    ways: dict[str, Callable[[], object]] = {"forward": lambda: model(images)}
    ways |= {method: partial(rank_heads, model, images, classes, method) for method in METHODS}
    for way in ways.values():
        way()
    times: dict[str, list[float]] = {name: [] for name in (*ways, "official")}
    for number in range(rounds):
        for name, way in ways.items():
            times[name].append(seconds(way))
        if number < official_rounds:
            times["official"].append(seconds(lambda: official(images, classes)))
    print(f"\nbatch {batch}: a forward takes {1000 * statistics.median(times['forward']):.0f} ms")
    for method in METHODS:
        report(f"{method} ranking / a forward", _ratios(times[method], times["forward"]))
    if official_rounds:
        report("the official way / a forward", _ratios(times["official"], times["forward"]))
        report("the official way / our greedy ranking", _ratios(times["official"], times["greedy"]))
        same = (rank_heads(model, images, classes).order == official(images, classes)).float().mean().item()
        print(
            f"  {official.runs} runs of the network in the official way; {same:.0%} of the places in both orders agree"
        )


def _ratios(first: list[float], second: list[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=False)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="*", default=(1, 8))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--official-rounds", type=int, default=1, help="rounds that run the official way too")
    arguments = parser.parse_args()
    print(
        f"Ranking of heads: ViT-B/16, 224 px, {NUM_CLASSES} classes, float32, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; medians of the ratios"
    )
    for batch in arguments.batch:
        bench(batch, arguments.rounds, arguments.official_rounds)


if __name__ == "__main__":
    main()
