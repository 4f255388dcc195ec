# SPDX-License-Identifier: MIT
"""The Hub: publishing a model with its card, and reading checkpoints of the official implementation."""
