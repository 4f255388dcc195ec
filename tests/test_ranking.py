# SPDX-License-Identifier: MIT
"""The ranking of heads, against the network really run with blurred heads."""

import itertools

import pytest
import torch
from conftest import FAMILIES, NUM_CLASSES, assert_computed, random_images, tiny_model
from straightforward import run_straightforwardly

from prompt_cam_hf.explanations.ranking import rank_heads, scores_with_first_heads

HEADS = 4
VARIANTS = {"deep": {}, "shallow": {"class_prompt_layer": 0}, "between": {"class_prompt_layer": 1}}


def blurred_logits(model, images, target, heads, blur, monkeypatch):
    """Run the whole network the long way, with the attention of one class made uniform in some heads."""
    last = max((m for m in model.backbone.modules() if isinstance(m, torch.nn.ModuleList)), key=len)[-1]
    attention = next(m for n, m in last.named_modules() if hasattr(m, "q_proj") or hasattr(m, "query"))
    num_patches = 16

    def blurred(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        weights = torch.softmax(query @ key.transpose(2, 3) * query.shape[-1] ** -0.5, dim=-1)
        if module is attention:
            first = 0 if blur == "tokens" else weights.shape[-1] - num_patches
            for head in heads:
                weights[:, head, target] = 0
                weights[:, head, target, first:] = 1 / (weights.shape[-1] - first)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("blurred", blurred)
    model.backbone.config._attn_implementation = "blurred"
    for module in model.backbone.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "blurred"
    with torch.no_grad():
        return run_straightforwardly(model, images).logits


class BruteForce:
    """Scores of every set of sharp heads, each by a run of the whole network."""

    def __init__(self, model, image, target, blur, monkeypatch):
        self.score = {}
        for size in range(HEADS + 1):
            for sharp in itertools.combinations(range(HEADS), size):
                heads = [head for head in range(HEADS) if head not in sharp]
                logits = blurred_logits(model, image, target, heads, blur, monkeypatch)[0]
                self.score[frozenset(sharp)] = logits[target].item()
        self.rival = max(logits[c].item() for c in range(NUM_CLASSES) if c != target)

    def wins(self, sharp):
        return self.score[frozenset(sharp)] > self.rival

    def greedy(self):
        sharp, removed, left = set(range(HEADS)), [], {}
        sufficient = HEADS + (0 if self.wins(sharp) else 1)
        losing = not self.wins(sharp)
        while sharp:
            head = max(sharp, key=lambda h: self.score[frozenset(sharp - {h})])
            sharp = sharp - {head}
            removed.append(head)
            left[head] = self.score[frozenset(sharp)]
            losing = losing or not self.wins(sharp)
            if not losing:
                sufficient = len(sharp)
        return removed[::-1], [left[h] for h in range(HEADS)], sufficient

    def shapley(self):
        values = [0.0] * HEADS
        orders = list(itertools.permutations(range(HEADS)))
        for order in orders:
            for position, head in enumerate(order):
                before = frozenset(order[:position])
                values[head] += (self.score[before | {head}] - self.score[before]) / len(orders)
        return values

    def smallest_sets(self):
        winning = [sharp for sharp in self.score if self.wins(sharp)]
        size = min(map(len, winning), default=None)
        return [sharp for sharp in winning if len(sharp) == size]


@pytest.mark.parametrize("blur", ["tokens", "patches"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family_name", ["vit", "dinov2_with_registers", "dinov3_vit", "siglip_vision_model"])
def test_every_method_equals_brute_force(family_name, variant, blur, monkeypatch):
    images = random_images(2)
    model = tiny_model(family_name, **VARIANTS[variant])
    predicted = model(images).logits.argmax(-1)
    greedy, exact, shapley = (rank_heads(model, images, method=m, blur=blur) for m in ("greedy", "exact", "shapley"))
    for i, target in enumerate(predicted.tolist()):
        brute = BruteForce(tiny_model(family_name, **VARIANTS[variant]), images[i : i + 1], target, blur, monkeypatch)
        order, left, sufficient = brute.greedy()
        assert greedy.order[i].tolist() == order
        assert greedy.scores[i].tolist() == pytest.approx(left, abs=1e-5)
        assert greedy.sufficient[i] == sufficient

        values = brute.shapley()
        assert shapley.scores[i].tolist() == pytest.approx(values, abs=1e-5)
        assert shapley.order[i].tolist() == sorted(range(HEADS), key=lambda h: -values[h])
        total = brute.score[frozenset(range(HEADS))] - brute.score[frozenset()]
        assert shapley.scores[i].sum().item() == pytest.approx(total, abs=1e-5)

        smallest = brute.smallest_sets()
        assert exact.sufficient[i] == len(smallest[0])
        assert exact.num_smallest_sets[i] == len(smallest)
        best = max(smallest, key=brute.score.get)
        assert set(exact.order[i, : len(best)].tolist()) == set(best)
        alone = [brute.score[frozenset(range(HEADS)) - {h}] for h in range(HEADS)]
        assert exact.scores[i].tolist() == pytest.approx(alone, abs=1e-5)


def test_classes_that_are_asked_about():
    model, images = tiny_model(), random_images(3)
    for method in ("greedy", "exact", "shapley"):
        every = rank_heads(model, images, torch.arange(NUM_CLASSES).expand(3, -1), method)
        assert every.order.shape == (3, NUM_CLASSES, HEADS) and every.sufficient.shape == (3, NUM_CLASSES)
        some = rank_heads(model, images, torch.tensor([4, 0, 2]), method)
        assert some.order.shape == (3, HEADS) and some.sufficient.shape == (3,)
        for i, c in enumerate([4, 0, 2]):
            assert torch.equal(some.order[i], every.order[i, c])
            torch.testing.assert_close(some.scores[i], every.scores[i, c])
            assert some.sufficient[i] == every.sufficient[i, c]
        # A class that is not on top cannot be kept there by any number of its heads, unless blurring raises it.
        losing = model(images).logits.argsort(-1)[:, 0]
        if method != "exact":
            assert (rank_heads(model, images, losing, method).sufficient == HEADS + 1).all()
        assert torch.equal(
            rank_heads(model, images, method=method).order,
            rank_heads(model, images, model(images).logits.argmax(-1), method).order,
        )


def test_large_batches_are_cut_into_pieces(monkeypatch):
    from prompt_cam_hf.explanations import ranking as traits

    model, images = tiny_model(), random_images(3)
    whole = rank_heads(model, images, method="shapley")
    monkeypatch.setattr(traits, "_ROWS_AT_ONCE", 7)
    pieces = rank_heads(model, images, method="shapley")
    torch.testing.assert_close(whole.scores, pieces.scores, atol=1e-6, rtol=1e-5)


def test_it_leaves_the_model_alone(family):
    model = tiny_model(family)
    before = model(random_images()).logits
    rank_heads(model, random_images())
    assert_computed(model(random_images()).logits, before)
    assert set(FAMILIES) >= {family}


def test_mistakes_get_one_sentence():
    model, images = tiny_model(), random_images(2)
    with pytest.raises(ValueError, match='use "greedy", "exact" or "shapley"'):
        rank_heads(model, images, method="random")
    with pytest.raises(ValueError, match='use "tokens" or "patches"'):
        rank_heads(model, images, blur="gaussian")
    with pytest.raises(ValueError, match=r"must be \(batch,\) or \(batch, k\), with batch=2"):
        rank_heads(model, images, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="whole numbers from 0 to 4"):
        rank_heads(model, images, torch.tensor([1, 5]))
    many = tiny_model(backbone_fields={"hidden_size": 34, "num_attention_heads": 17})
    with pytest.raises(ValueError, match=r"2\^17 are too many; up to 16"):
        rank_heads(many, images, method="exact")
    assert rank_heads(many, images).order.shape == (2, 17)


@pytest.mark.parametrize("blur", ["tokens", "patches"])
@pytest.mark.parametrize("family_name", ["vit", "dinov3_vit"])
def test_scores_with_the_first_heads_kept_equal_brute_force(family_name, blur, monkeypatch):
    images, classes = random_images(2), torch.tensor([[1, 4], [0, 2]])
    orders = torch.tensor([[[2, 0, 3, 1], [0, 1, 2, 3]], [[3, 2, 1, 0], [1, 3, 0, 2]]])
    model = tiny_model(family_name)
    scores = scores_with_first_heads(model, model.last_layer_state(images), classes, orders, blur)
    assert scores.shape == (2, 2, HEADS + 1)
    for i, k in itertools.product(range(2), range(2)):
        target, order = classes[i, k].item(), orders[i, k].tolist()
        brute = BruteForce(tiny_model(family_name), images[i : i + 1], target, blur, monkeypatch)
        assert_computed(scores[i, k].tolist(), [brute.score[frozenset(order[:n])] for n in range(HEADS + 1)])
