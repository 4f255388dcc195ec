# SPDX-License-Identifier: MIT
"""The tiny backbone that comes with the package, its checksum, and a made-up tree of the drawn birds.

A vision transformer of 1.3 million parameters, pre-trained on drawn birds of no class by
`docs/provenance/pretrain_birds.py`. Its model card, tiny_vit/README.md, says how.
"""

from pathlib import Path

# For `ViTModel.from_pretrained` and `PromptCAMForImageClassification.from_backbone`; with its image processor.
BACKBONE = Path(__file__).with_name("tiny_vit")
# Of its model.safetensors.
BACKBONE_SHA256 = "3ae2ef604936419bd91f8c7e7040e731b3f0f317ea7d0406d11476c8753ccd89"
# For `read_taxonomy`: species, genera and families that share a trait; docs/taxonomy.md shows it.
TAXONOMY = Path(__file__).with_name("taxonomy.csv")
