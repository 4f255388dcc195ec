# SPDX-License-Identifier: MIT
"""What Prompt-CAM is compared with: other classifiers on the same backbone, and other maps on any of them.

Importing the package registers VPT and INTR with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForImageClassification

from .attention import attention_rollout, raw_attention
from .cams import CAM_METHODS, cam_maps
from .intr import INTRForImageClassification
from .intr_config import INTRConfig
from .linear_probe import LinearProbe, build_linear_probe
from .vpt import VPTConfig, VPTForImageClassification

for config_class, model_class in (
    (VPTConfig, VPTForImageClassification),
    (INTRConfig, INTRForImageClassification),
):
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModelForImageClassification.register(config_class, model_class, exist_ok=True)

__all__ = [
    "CAM_METHODS",
    "INTRConfig",
    "INTRForImageClassification",
    "LinearProbe",
    "VPTConfig",
    "VPTForImageClassification",
    "attention_rollout",
    "build_linear_probe",
    "cam_maps",
    "raw_attention",
]
