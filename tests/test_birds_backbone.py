# SPDX-License-Identifier: MIT
"""Is the backbone that comes with the package whole, small, documented, and good for what it is there for?"""

import hashlib
import json

import pytest
import torch
from conftest import assert_stored

# Without torchvision, transformers 5.17 has a placeholder at `transformers.AutoImageProcessor`.
from transformers import ViTModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf.birds import birds_dataset
from prompt_cam_hf.birds.backbone import BACKBONE, BACKBONE_SHA256
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import fingerprint_backbone


@pytest.fixture(scope="module")
def backbone():
    return ViTModel.from_pretrained(BACKBONE, add_pooling_layer=False).eval()


def test_the_weights_are_those_of_the_card(backbone):
    digest = hashlib.sha256((BACKBONE / "model.safetensors").read_bytes()).hexdigest()
    card = (BACKBONE / "README.md").read_text()
    assert digest == BACKBONE_SHA256
    assert digest in card
    assert fingerprint_backbone(backbone) in card


def test_it_is_small(backbone):
    assert sum(path.stat().st_size for path in BACKBONE.iterdir()) < 6_000_000
    assert backbone.num_parameters() < 3_000_000


def test_every_weight_is_in_the_file():
    _, found = ViTModel.from_pretrained(BACKBONE, add_pooling_layer=False, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_its_image_processor_is_the_one_of_the_recipes():
    processor, built = AutoImageProcessor.from_pretrained(BACKBONE), build_image_processor(96)
    image = torch.randint(256, (3, 80, 120), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    ours, saved = (p(image, return_tensors="pt")["pixel_values"] for p in (built, processor))
    assert ours.shape == (1, 3, 96, 96)
    assert torch.equal(ours, saved)


def test_the_log_ends_where_the_card_says():
    lines = [json.loads(line) for line in (BACKBONE / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert f"{steps[-1]:,} steps" in (BACKBONE / "README.md").read_text()
    assert lines[-1]["query"] < lines[0]["query"] / 5


def test_a_prompt_cam_takes_it_as_it_is(backbone):
    model = PromptCAMForImageClassification.from_backbone(BACKBONE, id2label={0: "a", 1: "b"})
    assert_stored(model.backbone, backbone)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 96, 96), output_trait_maps=True).trait_maps.shape == (2, 1, 6, 12, 12)


def test_its_features_tell_birds_apart(backbone, tmp_path):
    """Unseen birds lie nearest to their own class's mean: 67% of them, and 6% with random weights, as by chance."""
    features, labels = {}, {}
    for split, count in (("train", 4), ("test", 2)):
        birds = birds_dataset(split, count, num_proc=1, cache_dir=tmp_path)
        pixel_values = build_image_processor(96)(birds["image"][:], return_tensors="pt")["pixel_values"]
        labels[split] = torch.tensor(birds["label"][:])
        with torch.no_grad():
            features[split] = backbone(pixel_values).last_hidden_state[:, 0]
    centre = features["train"].mean(0)
    train, test = (torch.nn.functional.normalize(features[split] - centre, dim=-1) for split in ("train", "test"))
    means = torch.stack([train[labels["train"] == number].mean(0) for number in range(18)])
    assert ((test @ means.T).argmax(-1) == labels["test"]).double().mean() > 0.45
