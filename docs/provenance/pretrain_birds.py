# SPDX-License-Identifier: MIT
"""The script that made the embedded backbone: a tiny ViT, pre-trained on drawn birds that belong to no class.

    python docs/provenance/pretrain_birds.py OUTPUT_DIR

Three tasks, all on birds of `other_birds_dataset`. They ask for attributes, never for classes:

- every patch, before the last layer: which parts are in it, and their colour and pattern;
- CLS: the colour and pattern of every part;
- one query for each (part, colour) and (part, pattern), which enters the last layer only: is it on this bird? All
  queries share one scoring vector, so they can answer only by where they look, as the prompts of a Prompt-CAM do.

OUTPUT_DIR gets the backbone for `ViTModel.from_pretrained`, its image processor, log.jsonl and summary.json. An
interrupted run goes on where its last checkpoint was when it is started again. With glibc, a few per cent of the time
are saved by MALLOC_TRIM_THRESHOLD_=-1 MALLOC_MMAP_THRESHOLD_=4294967296 in the environment, which keeps freed memory.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset
from transformers import (
    AttentionInterface,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTModel,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from prompt_cam_hf.birds import (
    BIRD_CLASSES,
    COLOURS,
    PARTS,
    PATTERNS,
    TRAIT_PARTS,
    birds_dataset,
    matching_classes,
    other_birds_dataset,
    part_values,
    split_value,
)
from prompt_cam_hf.data.images import build_image_processor
from prompt_cam_hf.modeling import PromptCAMForImageClassification
from prompt_cam_hf.modeling.backbone_prompt_cam import (
    backbone_layers,
    embed,
    final_norm,
    fingerprint_backbone,
    run_layer,
)

# Number 0 is the natural tint.
_COLOURS = ("natural", *COLOURS)
# A part is in a patch from this share of its pixels; the demonstration counts hits the same way.
_PART_SHARE = 0.05


def _fp32_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """Fused attention in float32 whatever the autocast: on processors its backward pass in bfloat16 is slower."""
    with torch.autocast(query.device.type, enabled=False):
        context = nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    return context.to(value.dtype).transpose(1, 2), None


AttentionInterface.register("fp32_attention", _fp32_attention)


@dataclass
class PretrainArguments:
    """Settings of a run; the defaults made the embedded backbone. Sides are in pixels."""

    output_dir: str
    num_birds: int = 36_000
    num_steps: int = 4_500
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.05
    num_layers: int = 5
    hidden_size: int = 144
    num_heads: int = 6
    image_size: int = 96
    patch_size: int = 8
    save_steps: int = 500
    bf16: bool = True
    seed: int = 0


class OtherBirds(Dataset):
    """Drawn birds in memory, and after them their mirror images, with labels for every patch and the whole bird."""

    def __init__(self, birds: datasets.Dataset, patch_size: int) -> None:
        """Decode `birds` (from `other_birds_dataset`) once; raises ValueError where one belongs to a class."""
        size = np.asarray(birds[0]["masks"]).shape[0]
        rows = size // patch_size
        self.images = np.empty((len(birds), size, size, 3), np.uint8)
        self.presence = np.empty((len(birds), rows, rows), np.uint16)
        self.colours = np.zeros((len(birds), len(TRAIT_PARTS)), np.int64)
        self.patterns = np.zeros((len(birds), len(TRAIT_PARTS)), np.int64)
        for index, row in enumerate(birds):
            if matching_classes(row["values"]):
                raise ValueError(f"Bird {index} belongs to a class; birds for pre-training must not.")
            self.images[index] = row["image"]
            self.presence[index] = patch_presence(np.asarray(row["masks"], np.uint16), patch_size)
            for part, value in enumerate(row["values"][name] for name in TRAIT_PARTS):
                pattern, colour = split_value(value) if value else ("plain", "natural")
                self.colours[index, part] = _COLOURS.index(colour)
                self.patterns[index, part] = PATTERNS.index(pattern)

    def __len__(self) -> int:
        """Count the birds and their mirror images."""
        return 2 * len(self.images)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """A batch, as the keyword arguments of `AttributeReader.forward`."""
        chosen = torch.tensor(indices)
        birds = (chosen % len(self.images)).numpy()
        images, presence = torch.from_numpy(self.images[birds]), self.presence[birds]
        parts = torch.from_numpy((presence[..., None] >> np.arange(len(PARTS)) & 1).astype(np.float32))
        flip = (chosen >= len(self.images))[:, None, None, None]
        return {
            "images": torch.where(flip, images.flip(2), images).permute(0, 3, 1, 2),
            "presence": torch.where(flip, parts.flip(2), parts).flatten(1, 2),
            "colours": torch.from_numpy(self.colours[birds]),
            "patterns": torch.from_numpy(self.patterns[birds]),
        }


def _normalised(images: torch.Tensor) -> torch.Tensor:
    """Pixels from 0..255 to -1..1, as the backbone's image processor does."""
    return images.float() / 127.5 - 1


def patch_presence(bits: np.ndarray, patch_size: int) -> np.ndarray:
    """Find which parts are in each patch, as bits: a mask image (rows, cols; uint16) to its patches."""
    rows, cols = bits.shape[0] // patch_size, bits.shape[1] // patch_size
    blocks = bits.reshape(rows, patch_size, cols, patch_size)
    present = np.zeros((rows, cols), np.uint16)
    for index in range(len(PARTS)):
        share = (blocks >> index & 1).mean(axis=(1, 3))
        present |= (share >= _PART_SHARE).astype(np.uint16) << index
    return present


def attribute_queries() -> list[tuple[int, str]]:
    """List every (index in TRAIT_PARTS, colour or pattern) that a pre-training bird can have."""
    queries = []
    for index, part in enumerate(TRAIT_PARTS):
        values = [split_value(value) for value in part_values(part) if not _makes_a_class(part, value)]
        queries += [(index, colour) for colour in COLOURS if any(c == colour for _, c in values)]
        queries += [(index, pattern) for pattern in PATTERNS[1:] if any(p == pattern for p, _ in values)]
    return queries


def _makes_a_class(part: str, value: str) -> bool:
    """Whether this one value already makes a class, so that no pre-training bird has it."""
    return bool(matching_classes({name: value if name == part else None for name in TRAIT_PARTS}))


class AttributeReader(nn.Module):
    """The backbone with the heads of the three tasks; returns the loss."""

    query_part: torch.Tensor
    query_value: torch.Tensor
    trait_bits: torch.Tensor

    def __init__(self, backbone: ViTModel) -> None:
        """Add untrained heads to a backbone."""
        super().__init__()
        self.backbone = backbone
        width, parts = backbone.config.hidden_size, len(TRAIT_PARTS)
        self.attributes = attribute_queries()
        self.queries = nn.Parameter(torch.randn(len(self.attributes), width) * 0.02)
        self.query_score = nn.Linear(width, 1)
        nn.init.constant_(self.query_score.bias, -2.0)
        self.cls_head = nn.Linear(width, parts * (len(_COLOURS) + len(PATTERNS)))
        self.patch_norm = nn.LayerNorm(width)
        self.presence_head = nn.Linear(width, len(PARTS))
        self.patch_head = nn.Linear(width, parts * (len(_COLOURS) + len(PATTERNS)))
        part, name = zip(*self.attributes, strict=True)
        self.register_buffer("query_part", torch.tensor(part))
        # In the order of _COLOURS, then of PATTERNS without plain.
        self.register_buffer("query_value", torch.tensor([(*_COLOURS, *PATTERNS[1:]).index(n) for n in name]))
        trait_bits = [PARTS.index(name) for name in TRAIT_PARTS]
        self.register_buffer("trait_bits", torch.tensor(trait_bits))
        self.losses: dict[str, float] = {}

    def forward(
        self, images: torch.Tensor, presence: torch.Tensor, colours: torch.Tensor, patterns: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Compute the loss; each task's part of it is kept in `losses`.

        Args:
            images: (batch, 3, rows, cols), uint8.
            presence: (batch, patches, PARTS), 1 where a part is in a patch.
            colours: (batch, TRAIT_PARTS), 0 for natural.
            patterns: (batch, TRAIT_PARTS), 0 for plain.

        Returns:
            `loss`, the sum of the tasks' losses.
        """
        config, layers = self.backbone.config, backbone_layers(self.backbone)
        tokens = embed(self.backbone, _normalised(images), False)
        for layer in layers[:-1]:
            tokens = run_layer(layer, tokens, config).hidden_states
        patches = tokens[:, 1:]
        readers = torch.cat([tokens[:, :1], self.queries.expand(len(images), -1, -1)], dim=1)
        read = run_layer(layers[-1], readers, config, memory=patches).hidden_states
        read = final_norm(self.backbone)(read)
        losses = {
            **self._patch_losses(self.patch_norm(patches), presence, colours, patterns),
            "cls": _attribute_loss(self.cls_head(read[:, 0]), colours, patterns).mean(),
            "query": self._query_loss(self.query_score(read[:, 1:]).squeeze(-1), colours, patterns),
        }
        self.losses = {name: loss.item() for name, loss in losses.items()}
        return {"loss": sum(losses.values(), torch.zeros(()))}

    def _patch_losses(
        self, patches: torch.Tensor, presence: torch.Tensor, colours: torch.Tensor, patterns: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        where = nn.functional.binary_cross_entropy_with_logits(
            self.presence_head(patches).float(), presence, reduction="none"
        )
        # Patches with a part weigh as much as those without, and a small part as much as a large one.
        share = presence.mean(dim=(0, 1)).clamp(min=1e-4)
        weight = torch.where(presence > 0, 0.5 / share, 0.5 / (1 - share))
        seen = presence[..., self.trait_bits]
        count = seen.sum(dim=(0, 1)).clamp(min=1)
        targets = (values[:, None].expand(-1, patches.shape[1], -1) for values in (colours, patterns))
        what = _attribute_loss(self.patch_head(patches), *targets)
        return {"where": (where * weight).mean(), "what": ((what * seen).sum(dim=(0, 1)) / count).mean()}

    def _query_loss(self, scores: torch.Tensor, colours: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
        part, value = self.query_part, self.query_value
        wanted = torch.where(
            value < len(_COLOURS), colours[:, part] == value, patterns[:, part] == value - len(_COLOURS) + 1
        )
        # The mean over a bird's queries would be small: only one of ten says yes.
        return 4 * nn.functional.binary_cross_entropy_with_logits(scores.float(), wanted.float())


def _attribute_loss(logits: torch.Tensor, colours: torch.Tensor, patterns: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each part's colour and pattern: (..., parts * (colours + patterns)) to (..., parts)."""
    logits = logits.float().unflatten(-1, (len(TRAIT_PARTS), -1))
    colour, pattern = logits.split([len(_COLOURS), len(PATTERNS)], dim=-1)
    return _cross_entropy(colour, colours) + _cross_entropy(pattern, patterns)


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).squeeze(-1)


class _LogLines(TrainerCallback):
    """Writes what Trainer logs to a file, one JSON object a line, with the tasks' losses of the last batch."""

    def __init__(self, path: Path, model: AttributeReader) -> None:
        self.path, self.model, self.start = path, model, time.time()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        line = {
            "step": state.global_step,
            "seconds": round(time.time() - self.start, 1),
            "processor_seconds": round(time.process_time(), 1),
            **(logs or {}),
            **self.model.losses,
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def prompt_cam_accuracy(
    backbone: ViTModel, image_size: int = 96, per_class: int = 60, epochs: int = 40, seed: int = 0
) -> float:
    """Measure what the backbone is for: how well a Prompt-CAM on it tells birds of the classes apart.

    Class prompts at the last layer of the frozen backbone are trained. This is a yardstick for comparing backbones;
    the demonstration trains its own prompts.

    Args:
        backbone: The backbone.
        image_size: Side of the images in pixels.
        per_class: Birds of each class to train on, with their mirror images.
        epochs: Passes over the birds, mirror images counted apart.
        seed: Of prompts and order.

    Returns:
        The share of held-out birds that are classified correctly, 0 to 1.
    """
    torch.manual_seed(seed)
    model = PromptCAMForImageClassification.from_backbone(
        backbone,
        id2label={label: bird.name for label, bird in enumerate(BIRD_CLASSES)},
        class_prompt_layer=-1,
        num_agnostic_prompts=0,
    )

    def features(split: str, count: int, mirrored: bool = False) -> TensorDataset:
        birds = birds_dataset(split, count, image_size)
        images = torch.from_numpy(np.stack([np.asarray(image) for image in birds["image"]]))
        images = (images.flip(2) if mirrored else images).permute(0, 3, 1, 2)
        encoded = torch.cat([model.encode_prefix(_normalised(batch)) for batch in images.split(64)])
        return TensorDataset(encoded, torch.tensor(birds["label"][:]))

    training_set: ConcatDataset = ConcatDataset(
        [features("train", per_class), features("train", per_class, mirrored=True)]
    )
    loader = DataLoader(training_set, batch_size=64, shuffle=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs // 2 * len(loader))
    model.train()
    for _ in range(epochs // 2):  # an epoch sees every bird twice
        for tokens, labels in loader:
            model(prefix_hidden_states=tokens, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    tokens, labels = features("validation", max(per_class // 3, 1)).tensors
    with torch.no_grad():
        logits = torch.cat([model.eval()(prefix_hidden_states=batch).logits for batch in tokens.split(64)])
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def _as_it_is(batch: Any) -> dict[str, torch.Tensor]:
    """OtherBirds makes whole batches, so there is nothing left to collate."""
    return batch


def pretrain(arguments: PretrainArguments) -> ViTModel:
    """Draw the birds, train, and write the backbone; goes on from the last checkpoint in `output_dir`."""
    output, start = Path(arguments.output_dir), time.time()
    set_seed(arguments.seed)
    birds = other_birds_dataset(arguments.num_birds, arguments.image_size, arguments.seed)
    drawn = time.time()
    config = ViTConfig(
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        intermediate_size=4 * arguments.hidden_size,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        layer_norm_eps=1e-6,
    )
    model = AttributeReader(ViTModel(config, add_pooling_layer=False))
    model.backbone.set_attn_implementation("fp32_attention")
    output.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(output / "checkpoints"),
            max_steps=arguments.num_steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            weight_decay=arguments.weight_decay,
            warmup_steps=min(300, arguments.num_steps // 10),
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            bf16=arguments.bf16,
            save_steps=arguments.save_steps,
            save_total_limit=1,
            logging_steps=50,
            seed=arguments.seed,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=OtherBirds(birds, arguments.patch_size),
        data_collator=_as_it_is,
        callbacks=[_LogLines(output / "log.jsonl", model)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output / "checkpoints")))
    backbone = model.backbone.eval()
    backbone.save_pretrained(output)
    build_image_processor(arguments.image_size).save_pretrained(output)
    summary = {
        "arguments": asdict(arguments),
        "parameters": backbone.num_parameters(),
        "fingerprint": fingerprint_backbone(backbone),
        "prompt_cam_accuracy": prompt_cam_accuracy(backbone, arguments.image_size),
        "seconds_drawing": round(drawn - start),
        "seconds_total": round(time.time() - start),
        "processor_seconds_without_drawing": round(time.process_time()),
        "processors": os.cpu_count(),
        "torch": torch.__version__,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return backbone


if __name__ == "__main__":
    pretrain(PretrainArguments(sys.argv[1]))
