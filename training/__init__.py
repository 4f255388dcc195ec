# SPDX-License-Identifier: MIT
"""Training recipes and the training program."""
