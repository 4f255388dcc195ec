# SPDX-License-Identifier: MIT
"""Text from elsewhere - names of files and classes, what libraries raise - made fit for a line of a terminal."""

import errno
import os
import shlex
import shutil
import sys
import traceback

# Set in the environment, it shows the traceback of every error.
DEBUG_VARIABLE = "PROMPT_CAM_DEBUG"

# What torch and safetensors say in errors of their own when a disk is full.
_DISK_ERRORS = ("No space left on device", "File too large", "quota exceeded", "failed writing file")


# What the system says, as a sentence; elsewhere its own words follow the name of the file.
_SYSTEM_ERRORS = {
    errno.ENOENT: "{name} does not exist.",
    errno.EEXIST: "{name} exists already, as a file where a folder is needed; choose another name.",
    errno.ENOTDIR: "{name} is not a folder, or lies in something that is not; choose another name.",
    errno.EISDIR: "{name} is a folder, where a file is needed.",
    errno.EACCES: "{name} may not be read or written by you; change its permissions, or choose another place.",
    errno.EPERM: "{name} may not be read or written by you; change its permissions, or choose another place.",
    errno.EROFS: "{name} cannot be written, for its disk can only be read; choose another place.",
    errno.ENOSPC: "{name} cannot be written, for the disk is full.",
    errno.EDQUOT: "{name} cannot be written, for your share of the disk is used up.",
    errno.ENAMETOOLONG: "The name {name} is too long.",
}


def printable(text: str) -> str:
    """Write characters that would break the line, move the cursor or turn the text around as escapes, `\\x1b`."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def one_line(error: object) -> str:
    """Put what an error says on one printable line, without the number that the system gives to the error."""
    text = str(error)
    if isinstance(error, OSError) and error.errno and text.startswith("[Errno"):
        name = "A file" if error.filename is None else os.fsdecode(error.filename)
        text = _SYSTEM_ERRORS.get(error.errno, f"{{name}}: {error.strerror}.").replace("{name}", name)
    return printable(" ".join(text.split()))


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


def own_command() -> str:
    """How `prompt-cam` was started, as it can be pasted into the same shell: by its name, or by the path to it."""
    called = sys.argv[0]
    if not os.path.basename(called).startswith("prompt-cam"):
        return f"{shlex.quote(sys.executable)} -m prompt_cam_hf"
    found = shutil.which("prompt-cam")
    return "prompt-cam" if found and os.path.samefile(found, called) else shlex.quote(called)
