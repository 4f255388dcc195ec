# SPDX-License-Identifier: MIT
"""Prompt-CAM for Hugging Face transformers."""
