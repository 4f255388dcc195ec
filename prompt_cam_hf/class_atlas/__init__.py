# SPDX-License-Identifier: MIT
"""The atlas of a model: which heads each class rests on and where they look, over a whole data set.

`collect` records numbers and maps of each image, `summary` sums them up by class, `page` renders the HTML page, and
`build` has the function `atlas`, which does all of it.
"""

from prompt_cam_hf.class_atlas.build import Atlas, atlas

__all__ = ["Atlas", "atlas"]
