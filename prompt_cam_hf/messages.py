# SPDX-License-Identifier: MIT
"""Text from elsewhere - names of files and classes, what libraries raise - made fit for a line of a terminal."""

import os
import traceback

# Set in the environment, it shows the traceback of every error.
DEBUG_VARIABLE = "PROMPT_CAM_DEBUG"

# What torch and safetensors say in errors of their own when a disk is full.
_DISK_ERRORS = ("No space left on device", "File too large", "quota exceeded", "failed writing file", "unexpected pos")


def printable(text: str) -> str:
    """Write characters that would break the line, move the cursor or turn the text around as escapes, `\\x1b`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(error: object) -> str:
    """Put what an error says on one printable line."""
    return printable(" ".join(str(error).split()))


def tell_error(error: BaseException, documented: tuple[type[BaseException], ...] = (OSError, ValueError)) -> str:
    """Say in a sentence what went wrong; print the traceback where the environment asks for it.

    Args:
        error: What was raised.
        documented: Kinds whose message is made for users. To any other one a request to report it is added.
    """
    if os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"):
        traceback.print_exception(error)
    if isinstance(error, documented):
        return one_line(error)
    if any(words in str(error) for words in _DISK_ERRORS):
        return f"A file cannot be written ({one_line(error)[:300]}); is the disk full?"
    reason = f"{type(error).__name__}: {one_line(error)[:300]}"
    return (
        f"something went wrong that should not ({reason}); please report it with the traceback, which "
        f"{DEBUG_VARIABLE}=1 shows."
    )
