"""The oldest ipykernel that JupyterLab 4 takes, and marimo: in a virtual environment of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
ROOT = Path(__file__).parents[2]
LOWEST = "ipykernel==6.5.0"
KERNEL = "tests/notebook/test_kernel.py"
TESTS = (
    f"{KERNEL}::test_the_stop_button_during_wait_and_sql",
    f"{KERNEL}::test_a_cell_that_runs_again_stops_the_old_run",
    f"{KERNEL}::test_a_background_run_prints_into_no_cell",
    f"{KERNEL}::test_long_work_shows_the_notebooks_bar",
    "tests/notebook/test_fallback.py::test_beside_its_widget_a_running_pipeline_shows_html_and_text",
)
"""Without those that read an exception's notes: IPython 7, which comes with it, does not show them."""
MARIMO = """
import tempfile
import kframe as kf
from kframe.testing import MemorySource
from marimo._output.formatting import try_format

log = MemorySource({"orders": [{"n": 1}]})
shop = kf.Pipeline(tempfile.mkdtemp() + "/p.duckdb", source=log)
shop.topic("orders", schema={"n": "int64"})
shop.land("orders")
report = shop.run()
for shown in (shop, report, shop.status(), shop.live("FROM orders")):
    page = try_format(shown)
    assert (page.mimetype, page.exception) == ("text/html", None), page
shop.start()
assert "running" in try_format(shop).data
shop.stop()
assert "stopped" in try_format(shop).data
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lowest")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    needed = (str(ROOT), LOWEST, "nbclient", "nbconvert", "playwright", "pytest", "marimo")
    subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", *needed], check=True)
    return str(folder / "bin" / "python")


def test_the_lowest_ipykernel_shows_the_panel_and_takes_interrupts(python: str) -> None:
    """Kills: a use of the kernel's newer interfaces."""
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout
    assert " skipped" not in done.stdout.splitlines()[-1]


def test_marimo_shows_the_static_page(python: str, tmp_path: Path) -> None:
    """Kills: a display of IPython's alone."""
    subprocess.run([python, "-c", MARIMO], cwd=tmp_path, check=True, timeout=120)
