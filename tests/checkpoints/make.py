# SPDX-License-Identifier: MIT
"""Make the checkpoint of the installed transformers version that test_checkpoint.py loads with every other.

python tests/checkpoints/make.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import Dinov2Config

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import fingerprint_backbone

FOLDER = Path(__file__).parent / transformers.__version__

torch.manual_seed(0)
# The names of DINOv2's inner modules changed most between versions, those of its gated MLP above all.
backbone_config = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8, use_swiglu_ffn=True
)
model = PromptCAMForImageClassification(PromptCAMConfig(backbone_config=backbone_config, num_labels=3)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    pixel_values = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    output = model(pixel_values, trait_classes="all")
model.save_pretrained(FOLDER)
for code in FOLDER.glob("*.py"):
    code.unlink()
answers = {"logits": output.logits.tolist(), "trait_maps": output.trait_maps.tolist()}
answers["fingerprint"] = fingerprint_backbone(model.backbone)
(FOLDER / "answers.json").write_text(json.dumps(answers) + "\n")
