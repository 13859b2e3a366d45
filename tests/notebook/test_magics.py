"""The magics, and what is shown where there are no widgets, in real kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from tests.notebook.test_kernel import DEFINE, Kernel, kernel, run

__all__ = ["kernel"]  # a fixture


def test_magics_list_steer_and_query(kernel: Kernel, tmp_path: Path) -> None:
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")) + "report = shop.run()\n%load_ext kframe")
    told, _ = run(kernel, "listed = %kframe\nprint(listed.to_dict('records'))")
    assert "'pipeline': 'p', 'state': 'stopped', 'rows': 10" in told
    assert str(tmp_path / "p.duckdb") in told
    assert run(kernel, "%%kframe p\nSELECT count(*) AS many FROM rows")[1] == ""
    told, _ = run(kernel, "%%kframe p found\nSELECT count(*) AS many FROM rows WHERE n > 4")
    assert told == ""
    assert run(kernel, "print(type(found).__name__, found.many[0])") == ("DataFrame 5\n", "")
    run(kernel, "shop.start()")
    told, _ = run(kernel, "%kframe stop p\nprint(shop.status().state)")
    assert told == "stopped\n"


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("%kframe stop q", "There is no pipeline 'q' in this process. Pipelines: p."),
        ("%kframe begin p", "%kframe pause|resume|stop NAME"),
        ("%%kframe\nSELECT 1", "%%kframe NAME [variable]"),
        ("%%kframe p 1x\nSELECT 1", "%%kframe NAME [variable]"),
    ],
)
def test_magics_that_are_not_understood_say_how(kernel: Kernel, tmp_path: Path, cell: str, told: str) -> None:
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")) + "%load_ext kframe")
    client = kernel[1]
    said: list[str] = []
    client.execute_interactive(
        cell, timeout=60, output_hook=lambda message: said.append(json.dumps(message["content"]))
    )
    assert told in " ".join(said)


def test_a_notebook_that_is_executed_without_a_browser_keeps_static_pages(tmp_path: Path) -> None:
    """Kills: widgets alone in what nbclient and nbconvert leave."""
    define = DEFINE.format(path=str(tmp_path / "p.duckdb"))
    rows = "while shop.status().rows < 10: threading.Event().wait(0.01)"
    cells = [define, "shop.start()\nshop", rows, "shop.stop()"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(book, timeout=60).execute()
    kinds = [set(output["data"]) for output in book.cells[1].outputs]
    assert kinds[0] == {"text/plain", "text/html"}
    assert "stopped: 10 rows" in book.cells[1].outputs[0]["data"]["text/plain"]
    html, _ = HTMLExporter().from_notebook_node(book)
    assert "stopped" in html
    assert kinds[1:] == [{"text/plain"}]


def test_a_terminal_shows_text(tmp_path: Path) -> None:
    """Kills: HTML or widgets written to a terminal."""
    script = (
        DEFINE.format(path=str(tmp_path / "p.duckdb"))
        + "report = shop.run()\nshop\nshop.start()\nshop\nshop.stop()\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor"],
        input=script,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={"IPYTHONDIR": str(tmp_path / "ipython"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.stdout.count("<Pipeline 'p'") == 2
    assert "<Pipeline 'p', stopped: 10 rows in 1 batches" in done.stdout
    assert "<div" not in done.stdout
    assert "VBox" not in done.stdout
