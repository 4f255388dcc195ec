# SPDX-License-Identifier: MIT
"""The notebooks in docs/notebooks: as they are committed, and run again."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_as_run_from_top_to_bottom(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds and kinds <= {"stream", "display_data", "execute_result"}
    assert not re.search(r"/(?:home|root|tmp|work|Users)/", text)
    assert len(text) < 600_000
    assert f"]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")
    in_colab = (
        rf"https://colab\.research\.google\.com/github/[\w-]+/prompt_cam_hf/blob/main/docs/notebooks/{path.name}"
    )
    assert re.search(rf"\]\({in_colab}\)", notebook.cells[0].source)
    for cell in notebook.cells:
        # Colab has the notebook alone: links to other pages are whole.
        assert "](../" not in cell.source
        for target in re.findall(r"\]\(https://github\.com/[\w-]+/prompt_cam_hf/blob/main/([^)#]+)", cell.source):
            assert (FOLDER.parents[1] / target).exists(), target


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_again(path, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    sys.modules.pop("execute", None)
    from execute import execute

    notebook = execute(path, tmp_path)
    said = [bool(cell.outputs) for cell in code_cells(notebook)]
    assert said == [bool(cell.outputs) for cell in code_cells(nbformat.read(path, as_version=4))]
