# SPDX-License-Identifier: MIT
"""Prompt-CAM for Hugging Face transformers: class prompts whose attention shows the traits of each class.

    from prompt_cam_hf import explain

    print(explain("my_model", "bird.jpg"))

Importing the package registers the model with transformers' Auto classes, and `pipeline("image-classification")`
answers `trait_maps=True`. The names below are imported from their modules when they are first used.
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prompt_cam_hf.version import __version__

if TYPE_CHECKING:
    from prompt_cam_hf.class_atlas import atlas
    from prompt_cam_hf.evaluation import evaluate
    from prompt_cam_hf.explanations.compare import compare
    from prompt_cam_hf.explanations.explain import explain
    from prompt_cam_hf.explanations.maps import trait_maps
    from prompt_cam_hf.explanations.ranking import rank_heads
    from prompt_cam_hf.explanations.removal import remove_trait
    from prompt_cam_hf.explanations.taxonomy_path import explain_path
    from prompt_cam_hf.hub.convert import convert_official_checkpoint
    from prompt_cam_hf.hub.publish import publish
    from prompt_cam_hf.hub.space import publish_space, write_space
    from prompt_cam_hf.modeling import (
        PromptCAMConfig,
        PromptCAMForImageClassification,
        PromptCAMImageClassificationPipeline,
        PromptCAMOutput,
    )
    from prompt_cam_hf.training.recipe import load_recipe
    from prompt_cam_hf.training.reproduce import reproduce
    from prompt_cam_hf.training.train import train

# Where each public name is defined.
_MODULES = {
    "PromptCAMConfig": "modeling",
    "PromptCAMForImageClassification": "modeling",
    "PromptCAMImageClassificationPipeline": "modeling",
    "PromptCAMOutput": "modeling",
    "atlas": "class_atlas",
    "compare": "explanations.compare",
    "convert_official_checkpoint": "hub.convert",
    "evaluate": "evaluation",
    "explain": "explanations.explain",
    "explain_path": "explanations.taxonomy_path",
    "load_recipe": "training.recipe",
    "publish": "hub.publish",
    "publish_space": "hub.space",
    "rank_heads": "explanations.ranking",
    "remove_trait": "explanations.removal",
    "reproduce": "training.reproduce",
    "train": "training.train",
    "trait_maps": "explanations.maps",
    "write_space": "hub.space",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def _is_the_command() -> bool:
    """Whether this process was started as `prompt-cam` or `python -m prompt_cam_hf`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # Python is still looking for the module.
        program = sys.orig_argv[-len(sys.argv)]
    return os.path.splitext(os.path.basename(program))[0] in ("prompt-cam", "prompt_cam_hf")


# The command registers the model once it imports it, so that its --help need not wait for torch.
if not _is_the_command():
    import_module("prompt_cam_hf.modeling")

__all__ = [
    "PromptCAMConfig",
    "PromptCAMForImageClassification",
    "PromptCAMImageClassificationPipeline",
    "PromptCAMOutput",
    "__version__",
    "atlas",
    "compare",
    "convert_official_checkpoint",
    "evaluate",
    "explain",
    "explain_path",
    "load_recipe",
    "publish",
    "publish_space",
    "rank_heads",
    "remove_trait",
    "reproduce",
    "train",
    "trait_maps",
    "write_space",
]
