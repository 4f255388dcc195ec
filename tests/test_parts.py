# SPDX-License-Identifier: MIT
"""The store of resumable runs: what survives, in which order, and what is left alone."""

import multiprocessing
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prompt_cam_hf.files import LOCK_FILE, only_writer, replacing, write_atomically
from prompt_cam_hf.parts import Parts

SCHEMA = pa.schema([("index", pa.int64()), ("words", pa.list_(pa.string()))])
RESULTS = ("table.parquet", "drawing.svg", "index.html")


def store(out, total=7, size=3) -> Parts:
    return Parts(out, "survey", RESULTS, SCHEMA, total, size)


def test_parts_are_made_in_any_order_and_joined_in_theirs(tmp_path):
    parts = store(tmp_path)
    assert [list(parts.places(number)) for number in range(len(parts))] == [[0, 1, 2], [3, 4, 5], [6]]
    parts.open({"seed": 1, "sizes": (2, 3), "names": {0: "a"}}, overwrite=False)
    assert parts.missing() == [0, 1, 2]
    for number in (2, 0):
        parts.add(number, [{"index": place} for place in parts.places(number)])
    again = store(tmp_path)
    again.open({"names": {0: "a"}, "sizes": [2, 3], "seed": 1}, overwrite=False)
    assert again.missing() == [1]
    again.add(1, [{"index": 3, "words": ["x"]}, {"index": 4}, {"index": 5}])
    assert [table.column_names for table in again.tables(["index"])] == [["index"]] * 3
    (tmp_path / "drawing.svg").write_text("of an earlier run")
    (tmp_path / ".table.parquet.123.partial").write_text("of a killed run")
    again.finish("table.parquet", {"drawing.svg": None, "index.html": b"page"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "table.parquet"]
    rows = pq.read_table(tmp_path / "table.parquet").to_pylist()
    assert rows == [{"index": place, "words": ["x"] if place == 3 else None} for place in range(7)]


def test_no_images_make_an_empty_table(tmp_path):
    parts = store(tmp_path, total=0)
    parts.open({}, overwrite=False)
    assert parts.missing() == []
    parts.finish("table.parquet", {"index.html": b"page"})
    assert pq.read_table(tmp_path / "table.parquet").num_rows == 0


def test_overwriting_drops_the_parts_and_the_state_of_other_settings(tmp_path):
    parts = store(tmp_path)
    parts.open({"seed": 1}, overwrite=False)
    parts.add(0, [{"index": 0}])
    parts.state.write_bytes(b"sums")
    with pytest.raises(ValueError, match=r"survey_parts holds an unfinished survey with other settings \(seed\)"):
        parts.open({"seed": 2}, overwrite=False)
    assert parts.missing() == [1, 2] and parts.state.read_bytes() == b"sums"
    parts.open({"seed": 2}, overwrite=True)
    assert parts.missing() == [0, 1, 2] and not parts.state.exists()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_bytes(b"ne")
        assert path.read_bytes() == b"old" and partial.parent == tmp_path
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    with replacing(path) as partial:
        partial.write_bytes(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def hold(folder: Path) -> None:
    with only_writer(folder):
        Path(folder, "held").touch()
        time.sleep(60)


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    folder = tmp_path / "out"
    holder = multiprocessing.get_context("spawn").Process(target=hold, args=(folder,))
    holder.start()
    while not (folder / "held").exists():
        time.sleep(0.01)
    with pytest.raises(FileExistsError, match=f"written to by process {holder.pid} on"), only_writer(folder):
        pass
    holder.kill()
    holder.join()
    assert (folder / LOCK_FILE).exists()
    with only_writer(folder):
        assert (folder / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert sorted(path.name for path in folder.iterdir()) == ["held"]


def test_a_folder_in_which_nothing_was_written_is_removed_again(tmp_path):
    with only_writer(tmp_path / "out"):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
