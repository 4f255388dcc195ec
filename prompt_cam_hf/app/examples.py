# SPDX-License-Identifier: MIT
"""The examples that a visitor may choose from: a folder of images, by class."""

import os
from functools import lru_cache
from pathlib import Path

from prompt_cam_hf.data.images import UnreadableImageError, find_images, open_image
from prompt_cam_hf.html import EmbeddedImage, embed_thumbnail

# Shown at once; more would make the page slow to load.
MAX_SHOWN = 24
_SIDE, _BYTES = 112, 6_000


class Examples:
    """Images of a folder, by the folders that they lie in.

    Args:
        folder: None for no examples.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no images.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self.files = [] if folder is None else find_images([folder])
        root = Path(folder or "")
        self._classes = [
            str(file.relative_to(root).parent) if file.parent != root and root.is_dir() else "" for file in self.files
        ]

    @property
    def classes(self) -> list[str]:
        """The names of the folders; empty where all images lie in one."""
        names = sorted(set(self._classes))
        return names if len(names) > 1 else []

    def shown(self, name: str | None = None) -> list[tuple[int, str, EmbeddedImage]]:
        """The number, name and thumbnail of the first images of a class; None: of one image of each class.

        Images that cannot be read are left out.
        """
        chosen = [number for number, other in enumerate(self._classes) if name in (None, other)]
        if name is None and self.classes:
            chosen = list({self._classes[number]: number for number in reversed(chosen)}.values())[::-1]
        thumbnails = ((number, _thumbnail(self.files[number])) for number in chosen[:MAX_SHOWN])
        return [(number, self.files[number].stem, small) for number, small in thumbnails if small is not None]


@lru_cache(maxsize=2048)
def _thumbnail(file: Path) -> EmbeddedImage | None:
    try:
        return embed_thumbnail(open_image(file), _SIDE, _BYTES)
    except (UnreadableImageError, OSError):
        return None
