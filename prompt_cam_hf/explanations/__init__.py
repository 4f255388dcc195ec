# SPDX-License-Identifier: MIT
"""Explanations: which traits decide, what classes share, and what becomes of an image without a trait."""
