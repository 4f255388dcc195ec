# SPDX-License-Identifier: MIT
"""60 damaged checkpoints: `prompt-cam predict` refuses them, or answers as if nothing had happened."""

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults.conftest import SEED
from faults.processes import prompt_cam, run

KIND = "checkpoints"
WEIGHTS, PROCESSOR = "model.safetensors", "preprocessor_config.json"
Tensors = dict[str, torch.Tensor]


def on_tensors(change: Callable[[Tensors], Tensors | None]) -> Callable[[Path], None]:
    """A change of the weights' content."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        save_file(change(tensors) or tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def on_bytes(change: Callable[[bytes], bytes], name: str = WEIGHTS) -> Callable[[Path], None]:
    """A change of a file as it lies on the disk."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def on_processor(**fields) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / PROCESSOR
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def named(tensors: Tensors, part: str) -> list[str]:
    found = [name for name in tensors if part in name]
    assert found, part
    return found


def without(part: str):
    return on_tensors(lambda tensors: {name: t for name, t in tensors.items() if name not in named(tensors, part)})


def filled(part: str, value: float):
    def change(tensors: Tensors) -> None:
        tensors[named(tensors, part)[0]].view(-1)[0] = value

    return on_tensors(change)


def reshaped(part: str, change: Callable[[torch.Tensor], torch.Tensor]):
    return on_tensors(
        lambda tensors: {**tensors, named(tensors, part)[0]: change(tensors[named(tensors, part)[0]]).contiguous()}
    )


def typed(dtype: torch.dtype):
    return on_tensors(lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})


def with_more(**more: torch.Tensor):
    return on_tensors(lambda tensors: {**tensors, **{name.replace("__", "."): t for name, t in more.items()}})


def flipped(seed: int) -> Callable[[Path], None]:
    """One bit of the header is another; in the numbers themselves nothing could tell."""

    def change(content: bytes) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        drawn, changed = random.Random(seed), bytearray(content)
        changed[drawn.randrange(8 + length)] ^= 1 << drawn.randrange(8)
        return bytes(changed)

    return on_bytes(change)


def with_index(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {name: weight_map[""] for name in names}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return damage


class _Touch:
    """What a pickle may do when it is read."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Touch(folder / "executed")))


def as_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


HUGE_HEADER = struct.pack("<Q", 1 << 62)
BOMB = b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4]}}'
PARTS = ("class_prompts", "agnostic_prompts", "classifier", "backbone.layernorm", "layer.1.", "patch_embeddings")

# (name, which checkpoint, damage)
REFUSED = [
    *((f"cut to {share:.1%}", "model", on_bytes(lambda c, s=share: c[: int(len(c) * s)]))
      for share in (0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999)),
    ("one byte too long", "model", on_bytes(lambda content: content + b"\0")),
    ("zeros", "model", on_bytes(lambda content: bytes(len(content)))),
    ("text", "model", on_bytes(lambda content: b"version https://git-lfs.github.com/spec/v1\nsize 1\n")),
    ("header of 4 exabytes", "model", on_bytes(lambda content: HUGE_HEADER + content[8:])),
    ("tensor of 4 exabytes", "model", on_bytes(lambda content: struct.pack("<Q", len(BOMB)) + BOMB + bytes(4))),
    ("no file", "model", lambda folder: (folder / WEIGHTS).unlink()),
    ("a folder", "model", as_folder),
    ("a pickle", "model", pickled),
    ("an index of what is not there", "model", with_index({"": "nowhere.safetensors"})),
    ("an index that leads outside", "model", with_index({"": "../../../../../../etc/passwd"})),
    *((f"no {part}", "model", without(part)) for part in PARTS),
    ("no tensors", "model", on_tensors(lambda tensors: {"nothing": torch.zeros(1)})),
    *((f"{value} in {part}", "model", filled(part, value))
      for value in (float("nan"), float("inf")) for part in ("class_prompts", "classifier", "layer.2.")),
    *((f"{part} {what}", "model", reshaped(part, change))
      for part in ("class_prompts", "classifier.weight", "backbone.layernorm.weight")
      for what, change in (("longer", lambda t: torch.cat([t, t])), ("with one axis more", lambda t: t[None]),
                           ("empty", lambda t: t[:0]))),
    ("whole numbers", "model", typed(torch.int64)),
    ("truth values", "model", typed(torch.bool)),
    ("NaN in class prompts", "prompts", filled("class_prompts", float("nan"))),
    ("no classifier", "prompts", without("classifier")),
    ("cut to a half", "prompts", on_bytes(lambda content: content[: len(content) // 2])),
    ("a backbone's norm of its own", "prompts", with_more(backbone__layernorm__weight=torch.zeros(32))),
    ("a backbone's bias of its own", "prompts", with_more(backbone__layernorm__bias=torch.ones(32))),
    ("an unknown tensor", "prompts", with_more(stranger=torch.zeros(3))),
    ("a deviation of nothing", "model", on_processor(image_std=[0, 0, 0])),
    ("a mean that is no number", "model", on_processor(image_mean=[float("nan")] * 3)),
    ("two channels", "model", on_processor(image_mean=[0.5, 0.5])),
    ("a million pixels a side", "model", on_processor(size={"height": 10**6, "width": 10**6})),
    ("a size below nothing", "model", on_processor(size={"height": -1, "width": -1})),
    ("a factor in words", "model", on_processor(rescale_factor="x")),
    ("another processor", "model", on_processor(image_processor_type="NothingImageProcessor")),
    ("no processor", "model", lambda folder: (folder / PROCESSOR).unlink()),
    ("half a processor", "model", on_bytes(lambda content: content[: len(content) // 2], PROCESSOR)),
]  # fmt: skip
HARMLESS = [
    ("half precision", "model", typed(torch.float16)),
    ("double precision", "model", typed(torch.float64)),
    ("an unknown tensor", "model", with_more(stranger=torch.zeros(3))),
]
FLIPPED = [(f"bit {seed} of the header", "model", flipped(SEED + seed)) for seed in range(8)]
SHORT = ("cut to 50.0%", "no class_prompts", "a backbone's norm of its own")


def params(rows: list) -> list:
    return [
        pytest.param(*row, id=f"{row[1]}: {row[0]}", marks=[pytest.mark.short] if row[0] in SHORT else [])
        for row in rows
    ]


def predict(model: Path, world):
    photos = [world.photos / "test" / name / "0.png" for name in ("red", "green", "blue")]
    return run(prompt_cam, "predict", model, *photos, "--format", "json", "--top-k", 3, "--device", "cpu", seconds=30)


def scores(ran) -> list[dict[str, float]]:
    return [{row["label"]: row["score"] for row in image["predictions"]} for image in json.loads(ran.out)]


@pytest.fixture(scope="module", name="whole")
def fixture_whole(world):
    ran = predict(world.model, world)
    assert ran.code == 0, ran
    found = scores(ran)
    assert found == [pytest.approx(row, abs=1e-6) for row in scores(predict(world.prompts, world))]
    return found


@pytest.mark.parametrize(("name", "kind", "damage"), params(REFUSED))
def test_a_damaged_checkpoint_is_refused(world, tmp_path, refused, name, kind, damage):
    folder = shutil.copytree(getattr(world, kind), tmp_path / "model")
    damage(folder)
    ran = predict(folder, world)
    assert not (folder / "executed").exists(), "a pickle was run"
    assert ran.refused_well() and not ran.out, ran
    refused()


@pytest.mark.parametrize(("name", "kind", "damage"), params(HARMLESS + FLIPPED))
def test_what_changes_nothing_may_be_answered(world, whole, tmp_path, refused, name, kind, damage):
    folder = shutil.copytree(getattr(world, kind), tmp_path / "model")
    damage(folder)
    ran = predict(folder, world)
    if ran.code == 0:
        assert scores(ran) == [pytest.approx(row, abs=5e-3) for row in whole]
    else:
        assert ran.refused_well() and not ran.out, ran
        refused()
