# SPDX-License-Identifier: MIT
"""What a person sees and does: pages in Chromium, light and dark, wide and narrow, by mouse and by keyboard."""
