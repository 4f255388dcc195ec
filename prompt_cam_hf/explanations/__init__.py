# SPDX-License-Identifier: MIT
"""Explanations: the traits that decide, what classes share, and the effect of removing a trait."""
