# SPDX-License-Identifier: MIT
"""Metrics for the `evaluate` library that need no network."""
