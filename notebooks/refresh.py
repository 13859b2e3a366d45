"""Executes the notebooks beside this file and saves them with their outputs.

    python notebooks/refresh.py [NAME ...]

Each runs in a kernel and a temporary folder of its own; an assertion in it that fails is an error here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
BOOKS = sorted(HERE.glob("*.ipynb"))


def executed(path: Path) -> nbformat.NotebookNode:
    """A notebook with the outputs of this moment, without times and widget states."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            book, timeout=120, resources={"metadata": {"path": folder}}, record_timing=False
        ).execute()
    book.metadata.pop("widgets", None)
    for cell in book.cells:
        if cell.cell_type == "code":  # the client's notes that a broker has ended
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return book


if __name__ == "__main__":
    for path in [HERE / name for name in sys.argv[1:]] or BOOKS:
        print(path.name, flush=True)
        nbformat.write(executed(path), path)
