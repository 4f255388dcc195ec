# SPDX-License-Identifier: MIT
"""Tiny backbones of every family, and no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Several test processes share the cores, and tiny models gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import set_client_factory
from huggingface_hub.utils import _http
from transformers import (
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMSNConfig,
)

from prompt_cam_hf import PromptCAMConfig, PromptCAMForImageClassification
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.hub.patience import limit_waiting

IMAGE_SIZE = 32
NUM_CLASSES = 5
ID2LABEL = {index: f"class {index}" for index in range(NUM_CLASSES)}

# How near two computations in float32 from equal weights and images must come. Weights mapped from a file lie at
# another alignment than those made in memory, and each processor has kernels of its own: they add in another order.
# A wrong weight, layer or image moves numbers of order 1 by far more.
COMPUTED = {"atol": 1e-5, "rtol": 1e-4}

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
_MLP = {"intermediate_size": 48}
_SCALE = {"layerscale_value": 0.7}
FAMILIES = {
    "vit": lambda: ViTConfig(**_SIZES, **_MLP),
    "vit_mae": lambda: ViTMAEConfig(**_SIZES, **_MLP),
    "vit_msn": lambda: ViTMSNConfig(**_SIZES, **_MLP),
    "ijepa": lambda: IJepaConfig(**_SIZES, **_MLP),
    "deit": lambda: DeiTConfig(**_SIZES, **_MLP),
    "dinov2": lambda: Dinov2Config(**_SIZES, **_SCALE),
    "dinov2_swiglu": lambda: Dinov2Config(**_SIZES, **_SCALE, use_swiglu_ffn=True),
    "dinov2_with_registers": lambda: Dinov2WithRegistersConfig(**_SIZES, **_SCALE, num_register_tokens=3),
    "dinov3_vit": lambda: DINOv3ViTConfig(**_SIZES, **_MLP, **_SCALE, num_register_tokens=2),
    "dinov3_vit_gated": lambda: DINOv3ViTConfig(**_SIZES, **_MLP, **_SCALE, use_gated_mlp=True),
    "clip_vision_model": lambda: CLIPVisionConfig(**_SIZES, **_MLP),
    "siglip_vision_model": lambda: SiglipVisionConfig(**_SIZES, **_MLP, vision_use_head=False),
}


def rarely(*values: Any, **options: Any) -> Any:
    """Make a case of a parametrised test one that `make test-long` runs and `make test` leaves out."""
    return pytest.param(*values, marks=(pytest.mark.slow, pytest.mark.long), **options)


def tiny_backbone_config(family: str = "vit", **fields) -> PreTrainedConfig:
    config = FAMILIES[family]()
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def tiny_model(family: str = "vit", backbone_fields: dict | None = None, **fields) -> PromptCAMForImageClassification:
    """A random model, always the same one, whose every parameter matters (no zero biases, no unit scales)."""
    backbone_config = tiny_backbone_config(family, **(backbone_fields or {}))
    config = PromptCAMConfig(backbone_config=backbone_config, **{"id2label": ID2LABEL, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PromptCAMForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def assert_computed(actual: Any, expected: Any) -> None:
    """Two computations of the same numbers (tensors, or nested lists, tuples and dictionaries of them) agree."""
    torch.testing.assert_close(actual, expected, **COMPUTED)


def assert_stored(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Two models hold the same weights, to the bit; those that lie on the disk meanwhile are not looked at."""
    weights, others = actual.state_dict(), expected.state_dict()
    assert weights.keys() == others.keys()
    assert not [name for name in weights if not (weights[name].is_meta or torch.equal(weights[name], others[name]))]


def random_images(batch: int = 2, height: int = IMAGE_SIZE, width: int = IMAGE_SIZE) -> torch.Tensor:
    return torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(2))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--misalign", type=int, help="Have the weights of loaded models start this many bytes past a multiple of 64."
    )


@pytest.fixture(scope="session", autouse=True)
def _misaligned_weights(pytestconfig):
    """With `--misalign`: provoke the kernels that processors choose for weights at an odd place."""
    offset = pytestconfig.getoption("--misalign")
    from_pretrained = PreTrainedModel.from_pretrained.__func__

    def misaligned(cls, *args, **kwargs):
        loaded = from_pretrained(cls, *args, **kwargs)
        for tensor in (loaded[0] if isinstance(loaded, tuple) else loaded).state_dict(keep_vars=True).values():
            if tensor.device.type == "cpu" and tensor.is_contiguous() and not offset % tensor.itemsize:
                room = torch.empty(tensor.nbytes + offset, dtype=torch.uint8)
                assert not room.data_ptr() % 64
                tensor.data = room[offset:].view(tensor.dtype).view(tensor.shape).copy_(tensor.data)
        return loaded

    with pytest.MonkeyPatch.context() as patch:
        if offset is not None:
            patch.setattr(PreTrainedModel, "from_pretrained", classmethod(misaligned))
        yield


@pytest.fixture
def model_folder(tmp_path) -> Path:
    """A saved model with its image processor."""
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    build_image_processor(IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_hub_client():
    """A command that a test calls in this process bounds all waiting for the Hub, and remembers failures: undo it."""
    factory = _http._GLOBAL_CLIENT_FACTORY
    yield
    if _http._GLOBAL_CLIENT_FACTORY is not factory:
        set_client_factory(factory)
        limit_waiting.cache_clear()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param
