# SPDX-License-Identifier: MIT
"""The model: the code that travels with a checkpoint to the Hub."""
