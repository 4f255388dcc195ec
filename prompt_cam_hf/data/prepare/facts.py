# SPDX-License-Identifier: MIT
"""What is published about the paper's thirteen data sets: where they are, their licences, and their numbers of classes
and images. This is the one place for these numbers.

`docs/datasets.md` says where each fact is from. What could not be established is left out, never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class DatasetFacts:
    """One data set as its authors describe it.

    Attributes:
        title: Its name.
        page: Where it is described.
        licence: In the words of its source, or that none could be found.
        num_classes: None where no exact number is published.
        num_images: By split, the numbers that a complete copy may have; nothing where no exact number is published.
        hub_id: The data set on the Hub that training reads as it is, where there is one.
    """

    title: str
    page: str
    licence: str
    num_classes: int | None = None
    num_images: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    hub_id: str | None = None


_NO_LICENCE = "none could be established; read the terms on the page of the data set"
_INATURALIST = (
    "non-commercial research and education only; the images must not be passed on (terms of the competition)"
)
_INATURALIST_PAGE = "https://github.com/visipedia/inat_comp/tree/master/2021"

FACTS: Mapping[str, DatasetFacts] = {
    "cub": DatasetFacts(
        title="CUB-200-2011",
        page="https://www.vision.caltech.edu/datasets/cub_200_2011/",
        licence=_NO_LICENCE,
        num_classes=200,
        num_images={"train": (5_994,), "test": (5_794,)},
    ),
    "birds525": DatasetFacts(
        title="Birds-525",
        page="https://www.kaggle.com/datasets/gpiosenka/100-bird-species",
        licence="none could be established: the page is gone, and copies of the data contradict each other",
        num_classes=525,
        num_images={"train": (84_635,), "validation": (2_625,), "test": (2_625,)},
    ),
    "dogs": DatasetFacts(
        title="Stanford Dogs",
        page="http://vision.stanford.edu/aditya86/ImageNetDogs/main.html",
        licence=f"{_NO_LICENCE}, and those of ImageNet, where the images are from",
        num_classes=120,
        num_images={"train": (12_000,), "test": (8_580,)},
    ),
    "pet": DatasetFacts(
        title="Oxford-IIIT Pet",
        page="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        licence="CC BY-SA 4.0, as cards of copies on the Hub report it",
        num_classes=37,
        num_images={"train": (3_680,), "test": (3_669,)},
    ),
    "cars": DatasetFacts(
        title="Stanford Cars",
        page="https://ai.stanford.edu/~jkrause/cars/car_dataset.html",
        licence="none could be established: the page of the data set is gone",
        num_classes=196,
        num_images={"train": (8_144,), "test": (8_041,)},
    ),
    "moths": DatasetFacts(title="iNaturalist-2021 Moths", page=_INATURALIST_PAGE, licence=_INATURALIST),
    "fungi": DatasetFacts(
        title="iNaturalist-2021 Fungi",
        page=_INATURALIST_PAGE,
        licence=_INATURALIST,
        num_classes=341,
        num_images={"train": (90_048, 17_050), "test": (3_410,)},
    ),
    "fish_vista": DatasetFacts(
        title="Fish-Vista",
        page="https://huggingface.co/datasets/imageomics/fish-vista",
        licence="CC BY-NC 4.0 for the data set; each image has a licence of its own (column `license`)",
    ),
    "rare_species": DatasetFacts(
        title="Rare Species",
        page="https://huggingface.co/datasets/imageomics/rare-species",
        licence="CC0 for the compilation; each image has a licence of its own (metadata/licenses.csv)",
        num_classes=400,
        num_images={"train": (11_983,)},
        hub_id="imageomics/rare-species",
    ),
    "insects2": DatasetFacts(
        title="Insects-2 (IP102)",
        page="https://github.com/xpwu95/IP102",
        licence="free for academic use; for other purposes ask the authors",
        num_classes=102,
        num_images={"train": (45_095,), "validation": (7_508,), "test": (22_619,)},
    ),
    "flowers": DatasetFacts(
        title="Oxford Flowers-102",
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        licence=_NO_LICENCE,
        num_classes=102,
        num_images={"train": (1_020,), "validation": (1_020,), "test": (6_149,)},
    ),
    "medicinal_leaf": DatasetFacts(
        title="Medicinal Leaf",
        page="https://data.mendeley.com/datasets/nnytj2v3n5/1",
        licence=_NO_LICENCE,
        num_classes=30,
    ),
    "food101": DatasetFacts(
        title="Food-101",
        page="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        licence="none: any use beyond scientific fair use must be negotiated with the owners of the images",
        num_classes=101,
        num_images={"train": (75_750,), "test": (25_250,)},
    ),
}
