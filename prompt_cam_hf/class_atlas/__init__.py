# SPDX-License-Identifier: MIT
"""Where do the prompts of all classes look, over a whole data set? Tables, and one page to leaf through.

`images` says which images and labels, `collect` what is recorded of each, `store` how it survives being killed,
`summary` what it says about classes, `page` what is shown, and `build` puts them together.
"""

from prompt_cam_hf.class_atlas.build import Atlas, atlas

__all__ = ["Atlas", "atlas"]
