# SPDX-License-Identifier: MIT
"""From a recipe to a published model, on a backbone in timm's format and on one in open_clip's."""

import json

import pytest
import torch
from conftest import rarely
from hub_server import connect, metadata, serve
from PIL import Image
from small_runs import fixture_backbone, fixture_photos, fixture_recipe  # noqa: F401 - fixtures are found by being here
from test_backbone_formats import BACKBONES, assert_gives_expected_tokens
from test_cli_evaluate import run as run_evaluate
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from prompt_cam_hf import PromptCAMForImageClassification, publish
from prompt_cam_hf.baselines import VPTForImageClassification
from prompt_cam_hf.data.image_processors import backbone_image_processor
from prompt_cam_hf.modeling.checkpoint_prompt_cam import load_backbone
from prompt_cam_hf.training.train import train


def predict(model, folder, image):
    pixel_values = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixel_values).logits


@pytest.mark.parametrize("name", ["open_clip_b", rarely("timm_vit_dino")])
def test_training_evaluation_and_publishing(name, recipe, photos, tmp_path):
    source = BACKBONES[0].parent / name
    image = Image.open(photos / "test" / "003.blue" / "0.png")
    runs = {
        "whole": {},
        "prompts": {"include_backbone": False},
        "linear_probe": {"method": "linear_probe"},
        "vpt": {"method": "vpt"},
    }
    with serve() as hub, connect(hub, tmp_path / "home"):
        hub.add("museum/backbone", {path.name: path.read_bytes() for path in source.iterdir()})
        common = {"backbone": "museum/backbone", "image_size": None, "num_train_epochs": 2}
        results = {run: train(recipe(**common, **keys, output_dir=str(tmp_path / run))) for run, keys in runs.items()}
        for run, result in results.items():
            assert AutoImageProcessor.from_pretrained(tmp_path / run).to_dict() == result.image_processor.to_dict()
            assert result.image_processor.to_dict() == backbone_image_processor(source).to_dict()

        whole, prompts = (
            PromptCAMForImageClassification.from_pretrained(tmp_path / run) for run in ("whole", "prompts")
        )
        vpt = VPTForImageClassification.from_pretrained(tmp_path / "vpt")
        for backbone in (whole.backbone, prompts.backbone, vpt.backbone, load_backbone(tmp_path / "linear_probe")):
            assert_gives_expected_tokens(backbone, source)
        expected = predict(results["whole"].model, tmp_path / "whole", image)
        torch.testing.assert_close(predict(whole, tmp_path / "whole", image), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(predict(prompts, tmp_path / "prompts", image), expected, atol=1e-5, rtol=1e-5)

        baselines = [word for run in ("linear_probe", "vpt") for word in ("--baseline", tmp_path / run)]
        chosen = ("--metrics", "specificity", "--limit", 2, "--out", tmp_path / "report")
        answer = run_evaluate(tmp_path / "prompts", "--data", photos, *baselines, *chosen)
        assert answer.exit_code == 0, answer.output
        found = json.loads((tmp_path / "report" / "evaluation.json").read_text())["metrics"]
        assert found["accuracy"]["value"] == pytest.approx(results["whole"].metrics["test"]["top1"])
        assert all(run in answer.stdout for run in ("linear_probe", "vpt"))

        for run in ("whole", "prompts"):
            publish(tmp_path / run, f"org/{run}", license="mit")
            card = hub.files(f"org/{run}")["README.md"].decode()
            assert metadata(card)["base_model"] == "museum/backbone"
            published = PromptCAMForImageClassification.from_pretrained(f"org/{run}")
            torch.testing.assert_close(predict(published, tmp_path / run, image), expected, atol=1e-5, rtol=1e-5)
