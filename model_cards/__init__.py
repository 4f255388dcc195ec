# SPDX-License-Identifier: MIT
"""Model card templates and finished cards."""
