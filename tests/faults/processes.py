# SPDX-License-Identifier: MIT
"""Commands and functions in processes of their own, which may be limited, killed and left to hang.

They are forked from a server that has imported everything once, so that one of them costs a tenth of a second.
"""

import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_FORK = multiprocessing.get_context("forkserver")
_FORK.set_forkserver_preload(
    [
        "pytest",
        "transformers.models.vit.modeling_vit",
        "transformers.models.vit.image_processing_vit",
        "prompt_cam_hf.cli",
        "prompt_cam_hf.loading",
        "prompt_cam_hf.training.train_taxonomy",
    ]
)

# Beyond what a process has when it starts.
MEMORY = 2 << 30
SECONDS = 60.0


@dataclasses.dataclass(frozen=True)
class Ran:
    """How a process ended; `code` is None where it had to be stopped, and negative after a signal."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def told(self) -> Any:
        """What the function returned."""
        return json.loads(self.out.splitlines()[-1])

    def refused_well(self) -> bool:
        """Whether it ended with one sentence, which is the last thing it said, and no traceback."""
        said = [line for line in self.err.splitlines() if line.strip()]
        sentences = [line for line in said if line.lower().startswith("error:")]
        usage = self.code == 2 and "Usage:" in self.err
        return (
            self.code in (1, 2)
            and "Traceback" not in self.err
            and (usage or (len(sentences) == 1 and said[-1] == sentences[0] and is_sentence(sentences[0])))
        )

    def __str__(self) -> str:
        ended = "was still running" if self.code is None else f"exit status {self.code}"
        return f"{ended} after {self.seconds:.1f} s\n{self.out[-1500:]}\n{self.err[-3000:]}"


class Running:
    """A process that has been started."""

    def __init__(self, process: BaseProcess, folder: tempfile.TemporaryDirectory):
        self.process = process
        self.started = time.monotonic()
        self._folder = folder

    def kill(self, after: float | None = None) -> Ran:
        """End it with SIGKILL, now or `after` seconds from its start."""
        if after is not None:
            self.process.join(max(0.0, self.started + after - time.monotonic()))
        return self._end()

    def wait(self, seconds: float = SECONDS) -> Ran:
        """Let it run to its end, for at most so many seconds from its start."""
        self.process.join(max(0.0, self.started + seconds - time.monotonic()))
        return self._end()

    def _end(self) -> Ran:
        code = self.process.exitcode
        took = time.monotonic() - self.started
        if code is None:
            for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
                try:
                    kill()
                except ProcessLookupError:
                    continue
            self.process.join()
        out, err = (Path(self._folder.name, name).read_text(errors="replace") for name in ("out", "err"))
        self._folder.cleanup()
        return Ran(code, out, err, took)


def start(
    call: Callable[..., Any],
    *arguments: Any,
    stdin: str = "",
    memory: int | None = MEMORY,
    file_size: int | None = None,
    cwd: str | os.PathLike | None = None,
    environment: dict[str, str] | None = None,
) -> Running:
    """Call in a process; what it returns is printed as JSON.

    Args:
        call: A function that can be pickled.
        *arguments: Its arguments.
        stdin: What it reads.
        memory: Bytes of address space that it may add.
        file_size: Bytes that a file may have.
        cwd: Where it runs; a new empty folder by default.
        environment: Variables to set.
    """
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "in").write_text(stdin)
    Path(folder.name, "cwd").mkdir()
    limits = {resource.RLIMIT_FSIZE: file_size, resource.RLIMIT_AS: memory, resource.RLIMIT_CORE: 0}
    settings = (folder.name, str(cwd or Path(folder.name, "cwd")), environment or {}, limits)
    process = _FORK.Process(target=_enter, args=(settings, call, arguments))
    process.start()
    return Running(process, folder)


def run(call: Callable[..., Any], *arguments: Any, seconds: float = SECONDS, **options: Any) -> Ran:
    """Call in a process, and wait for it; options as in `start`."""
    return start(call, *arguments, **options).wait(seconds)


def _enter(settings: tuple, call: Callable[..., Any], arguments: Sequence[Any]) -> None:
    folder, cwd, environment, limits = settings
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where a shell runs the tests in the background
    os.chdir(cwd)
    os.environ.update(environment)
    for number, name, flags in ((0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)):
        os.dup2(os.open(Path(folder, name), flags | os.O_CREAT), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    for kind, limit in limits.items():
        if limit is not None:
            if kind == resource.RLIMIT_AS:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit += pages * resource.getpagesize()
            resource.setrlimit(kind, (limit, limit))
    answer = call(*arguments)
    if answer is not None:
        print(f"\n{json.dumps(answer)}")
    sys.stdout.flush()


# --- What is run ---


def prompt_cam(*arguments: Any) -> None:
    """The command `prompt-cam`."""
    from prompt_cam_hf.cli import app

    app([str(argument) for argument in arguments], prog_name="prompt-cam")


def train(*arguments: Any) -> None:
    """The program `training/train.py`."""
    from prompt_cam_hf.training.train import main

    main([str(argument) for argument in arguments])


def train_taxonomy(*arguments: Any) -> None:
    """The program `training/taxonomy.py`."""
    from prompt_cam_hf.training.train_taxonomy import main

    main([str(argument) for argument in arguments])


def caught(call: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What a function returns, or how it refuses: the names of the error's classes, and its message."""
    try:
        return {"returned": call(*arguments)}
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        return {"kinds": kinds, "message": str(error)}


def refused_well(told: dict[str, Any]) -> bool:
    """Whether `caught` tells of a documented error, whose message is one sentence."""
    documented = {"ValueError", "OSError"} & set(told.get("kinds", ()))
    return bool(documented) and is_sentence(told["message"])


def is_sentence(message: str) -> bool:
    """Whether a message is one line of readable length, without terminal escapes and without advice for others."""
    return (
        0 < len(message.strip()) < 1500
        and message.isprintable()
        and not any(words in message for words in ("ignore_mismatched_sizes", "Traceback", "trust_remote_code=True"))
    )
