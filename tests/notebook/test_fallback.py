"""What a front end without widgets, or without a browser, gets of a pipeline that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, expect

from tests.notebook.test_kernel import DEFINE, Kernel, kernel, run

__all__ = ["kernel"]  # a fixture
ROOT = Path(__file__).parents[2]
WIDGET = "application/vnd.jupyter.widget-view+json"


def shown(kernel: Kernel, code: str) -> list[dict[str, Any]]:
    """Run a cell; the data of each of its outputs, by MIME type."""
    found: list[dict[str, Any]] = []

    def see(message: dict[str, Any]) -> None:
        if message["msg_type"] in ("display_data", "execute_result"):
            found.append(message["content"]["data"])

    kernel[1].execute_interactive(code, timeout=60, output_hook=see)
    return found


def test_beside_its_widget_a_running_pipeline_shows_html_and_text(kernel: Kernel, tmp_path: Path) -> None:
    """As VS Code has it without its widgets: every output by the richest type that it knows.

    Kills: a live panel alone; a widget whose ``text/plain`` is its class.
    """
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    rows = "while shop.status().rows < 10: threading.Event().wait(0.01)\n"
    page, live = shown(kernel, f"shop.start()\n{rows}shop")
    assert set(page) == {"text/plain", "text/html"}
    assert "<Pipeline 'p', running: 10 rows" in page["text/plain"]
    assert "p: running; 10 rows in 1 batches" in page["text/plain"]
    words = Words(page["text/html"]).told
    assert "running" in words
    assert "10" in words
    assert set(live) == {"text/plain", WIDGET}
    assert live["text/plain"] == ""  # nothing beside the page where widgets are unknown
    run(kernel, "shop.stop()")
    assert [set(output) for output in shown(kernel, "shop")] == [{"text/plain", "text/html"}]


class Words(HTMLParser):
    """The texts between a page's tags, but for styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.told: list[str] = []
        self._style = False
        self.feed(html)

    def handle_starttag(self, tag: str, _attrs: object) -> None:
        self._style = tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._style and data.strip():
            self.told.append(data.strip())


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``nbconvert --to html --execute`` makes of a notebook that ends while its pipeline runs."""
    folder = tmp_path_factory.mktemp("converted")
    rows = "while shop.status().rows < 10: threading.Event().wait(0.01)"
    cells = [DEFINE.format(path=str(folder / "p.duckdb")), f"shop.start()\n{rows}", "shop"]
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(book, folder / "book.ipynb")
    convert = [sys.executable, "-m", "nbconvert", "--to", "html", "--execute", str(folder / "book.ipynb")]
    subprocess.run(convert, check=True, capture_output=True, timeout=120)
    return folder / "book.html"


def test_nbconvert_executes_a_notebook_into_a_page_that_shows_the_pipeline(converted: Path) -> None:
    """Kills: a widget alone; a page that was never brought up to date."""
    html = converted.read_text()
    words = Words(html).told
    assert "running" in words
    assert any(told.startswith("batch 0 committed") for told in words)
    assert json.loads(html.split(f'type="{WIDGET}">')[1].split("</script>")[0])["model_id"]


def test_that_page_is_to_be_seen_where_widgets_cannot_be_loaded(converted: Path, chromium: Browser) -> None:
    """Kills: a static page that is hidden whether its widget is there or not."""
    context = chromium.new_context(offline=True)
    page = context.new_page()
    page.goto(converted.as_uri())
    expect(page.locator(".kf:visible")).to_have_count(1)
    expect(page.locator(".kf")).to_contain_text("running")
    context.close()


def test_without_a_browser_the_tests_of_the_page_are_skipped_by_name(tmp_path: Path) -> None:
    """Kills: a browser's absence that fails the tests, or leaves them out in silence."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/notebook/test_panel.py"]
    env = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "no chromium on this machine (apt-get install chromium)" in told
    assert " passed" not in told.splitlines()[-1]
    assert " skipped" in told.splitlines()[-1]
