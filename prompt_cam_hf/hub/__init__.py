# SPDX-License-Identifier: MIT
"""The Hugging Face Hub: publishing a model with its card and a Space, and converting official checkpoints.

`publish` uploads a model, `card` writes its card, `space` puts the page of the app beside it, `convert` reads official
checkpoints, and `official` holds what is known about those.
"""
