# SPDX-License-Identifier: MIT
"""Runs notebooks and keeps what they put out, without what differs from run to run.

    python docs/notebooks/execute.py [NOTEBOOK ...]    # by default all of this folder, in place

Each runs in a new folder, without a network.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder; raises nbclient's CellExecutionError where a cell fails.

    Progress bars and warnings, which are written to the error stream, are not kept, nor a second format of an image,
    and nothing of a cell with the tag "remove_output".
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            kept = [] if "remove_output" in cell.metadata.get("tags", ()) else cell.outputs
            cell.outputs = [output for output in kept if output.get("name") != "stderr"]
            for output in cell.outputs:
                if "image/jpeg" in output.get("data", {}):
                    output.data.pop("image/png", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    return notebook


def main() -> None:
    """Run from the command line."""
    for path in map(Path, sys.argv[1:] or sorted(FOLDER.glob("*.ipynb"))):
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(execute(path, Path(folder)), path)
        print(f"{path}: {path.stat().st_size / 1000:,.0f} kB")


if __name__ == "__main__":
    main()
