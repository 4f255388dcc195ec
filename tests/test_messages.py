# SPDX-License-Identifier: MIT
"""What the system says, as sentences; the command as it can be pasted; progress where there is no terminal."""

import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from prompt_cam_hf import progress as progress_module
from prompt_cam_hf.messages import own_command, tell_error
from prompt_cam_hf.progress import follow, in_words, progress


@pytest.fixture
def note(tmp_path):
    (tmp_path / "note.txt").write_text("dear")
    return tmp_path / "note.txt"


@pytest.mark.parametrize(
    ("provoke", "expected"),
    [
        (lambda note: note.mkdir(exist_ok=True), "{note} exists already, as a file where a folder is needed; choose"),
        (lambda note: (note / "out").mkdir(), "{note}/out is not a folder, or lies in something that is not; choose"),
        (lambda note: (note / "x").read_bytes(), "{note}/x is not a folder, or lies in something that is not; choose"),
        (lambda note: (note.parent / "other").read_bytes(), "{note.parent}/other does not exist."),
        (lambda note: note.parent.read_bytes(), "{note.parent} is a folder, where a file is needed."),
        (lambda note: (note.parent / ("x" * 300)).read_bytes(), "The name {note.parent}/xxx"),
        (lambda note: os.rmdir(note.parent), "{note.parent}: Directory not empty."),
        (lambda note: Path("/dev/full").write_text("x" * 99999), "A file cannot be written, for the disk is full."),
    ],
)
def test_what_the_system_says(note, provoke, expected):
    with pytest.raises(OSError) as raised:
        provoke(note)
    told = tell_error(raised.value)
    assert told.startswith(expected.format(note=note)) and "Errno" not in told


def test_sentences_of_our_own_stay():
    assert tell_error(FileExistsError("out exists already;\nchoose another.")) == "out exists already; choose another."


def test_the_command_can_be_pasted(monkeypatch, tmp_path):
    script = Path(sysconfig.get_path("scripts"), "prompt-cam")
    elsewhere = {**os.environ, "PATH": "/usr/bin:/bin"}
    monkeypatch.setenv("PATH", elsewhere["PATH"])
    for called in (str(script), os.path.relpath(script), "/some/where/pytest"):
        monkeypatch.setattr(sys, "argv", [called, "demo"])
        answer = subprocess.run(f"{own_command()} --help", shell=True, env=elsewhere, capture_output=True, text=True)
        assert answer.returncode == 0 and "predict" in answer.stdout, answer.stderr
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    monkeypatch.setenv("PATH", str(script.parent))
    assert own_command() == "prompt-cam"


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with progress(1000, "Measuring", " images", initial=100) as shown:
        for seconds, done in ((4, 100), (5, 100), (1, 100), (9, 1), (1, 1)):
            now[0] += seconds
            shown.update(done)
        now[0] += 90
    assert capsys.readouterr().err.splitlines() == [
        "Measuring: 400 of 1,000 images, about 20 s left",
        "Measuring: 402 of 1,000 images, about 40 s left",
        "Measuring: 402 of 1,000 images, done after 2 min",
    ]
    with pytest.raises(ZeroDivisionError):
        for _ in follow(range(3), 3, "Looking", " images"):
            now[0] += 10
            1 / 0  # noqa: B018
    assert list(follow("abc", 3, "Quick", " letters")) == ["a", "b", "c"]
    assert list(follow("abc", 3, "Another process", " letters", show=False)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_bar_where_there_is_one(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress(2, "Measuring", " images") as shown:
        assert isinstance(shown, progress_module.tqdm)
        shown.update()
    assert "Measuring" in capsys.readouterr().err


def test_lengths_of_time():
    assert [in_words(seconds) for seconds in (0.2, 59, 90, 3599, 3900, 100_000)] == [
        "1 s", "59 s", "2 min", "1 h 0 min", "1 h 5 min", "27 h 47 min",
    ]  # fmt: skip
