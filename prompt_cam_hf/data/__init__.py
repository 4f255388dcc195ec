# SPDX-License-Identifier: MIT
"""Images and their labels: where they come from, which are read, how they are split and prepared."""
