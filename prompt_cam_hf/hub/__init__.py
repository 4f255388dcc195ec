# SPDX-License-Identifier: MIT
"""The Hugging Face Hub: publishing a model with its card, and converting checkpoints of the official implementation.

`publish` uploads a model, `card` writes its card, `convert` reads official checkpoints, and `official` holds what is
known about those.
"""
