# SPDX-License-Identifier: MIT
"""A page in the browser that asks a model about an image: `prompt-cam app`, and the Spaces of the Hub."""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradio import Blocks


def build_app(
    model: str | os.PathLike, *, examples: str | os.PathLike | None = None, device: str | None = None
) -> "Blocks":
    """Build the page for a model, which is loaded once; `.launch()` of what is returned serves it.

    Visitors see nothing of each other: what they upload and ask stays in their own session.

    Args:
        model: A folder or Hub id of a trained Prompt-CAM.
        examples: A folder of images to choose from, in folders named after their classes or all in one.
        device: cpu, cuda, cuda:1, mps ...; None: the best there is.

    Raises:
        ModuleNotFoundError: Gradio is not installed.
        ValueError: it is no Prompt-CAM, it is damaged or incomplete, or the folder holds no images.
        OSError: the model or the folder cannot be found.

    Example:
        >>> from prompt_cam_hf.app import build_app
        >>> build_app("my_model", examples="photos/test").launch()
    """
    if find_spec("gradio") is None:
        raise ModuleNotFoundError('The app needs Gradio, which is not installed: pip install "prompt_cam_hf[app]".')
    from prompt_cam_hf.app.examples import Examples
    from prompt_cam_hf.app.page import build_page
    from prompt_cam_hf.app.session import AskedModel

    chosen = Examples(examples)
    return build_page(AskedModel(model, device), chosen)


__all__ = ["build_app"]
