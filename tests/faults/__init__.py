# SPDX-License-Identifier: MIT
"""A campaign of faults: what goes wrong must be refused in a sentence, or change nothing. See `make test-faults`."""
