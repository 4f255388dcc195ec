# SPDX-License-Identifier: MIT
"""ZeroGPU, hardware of the Hub on which Spaces share GPUs: a function that computes asks for one."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def on_gpu(function: F) -> F:
    """Let a function compute on a GPU of ZeroGPU, where the Hub has installed its package `spaces`.

    There, arguments and results go from process to process, and the package has to be imported before a model is
    loaded: call this first. On other hardware the function stays as it is.
    """
    try:
        from spaces import GPU
    except ImportError:
        return function
    return GPU(function)
