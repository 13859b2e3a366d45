"""The live panel in a real JupyterLab in a real Chromium: what is on the page, and in the saved file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.notebook.conftest import Book, Lab

DEFINE = """
import kframe as kf
from kframe.testing import MemorySource
log = MemorySource()
log.create("orders", 3)
def add(n, partition=0):
    for i in range(n):
        log.append("orders", {{"sku": "abc"[i % 3], "amount": i}}, partition=partition)
add(100)
shop = kf.Pipeline({path!r}, source=log, commit_interval_ms=20)
shop.topic("orders", schema={{"sku": "str", "amount": "int64"}})
shop.land("orders")
shop.aggregate("by_sku", source="orders", by="sku", n=("sku", "count"), total=("amount", "sum"))
"""
START = "shop.start()\nshop"
STATE = "shop.status().state"
ADD = "add(40, partition=1)"
BREAK = """@shop.table("broken")
def broken(orders):
    return orders[orders.amont > 3]
import threading
while shop.status().state == "running":
    add(1, partition=2)
    threading.Event().wait(0.02)"""
STOP = "shop.stop()"

Open = Callable[..., Book]


@pytest.fixture
def page(chromium: Browser) -> Iterator[Page]:
    context = chromium.new_context(viewport={"width": 1000, "height": 900})
    yield context.new_page()
    context.close()


@pytest.fixture
def open_book(lab: Lab, page: Page, request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """``open_book(cell, ...)``: a notebook of the definition and these cells, open and with a kernel."""

    def open_(*cells: str) -> Book:
        name = request.node.originalname.removeprefix("test_")[:40]
        lab.notebook(name, [DEFINE.format(path=str(tmp_path / "shop.duckdb")), *cells])
        book = Book(page, lab, name)
        assert book.told(0) == ""
        return book

    return open_


def outputs(saved: dict[str, Any], cell: int) -> list[dict[str, Any]]:
    """What the file holds as a cell's outputs, by MIME type."""
    return [
        {kind: "".join(part) if isinstance(part, list) else part for kind, part in output["data"].items()}
        for output in saved["cells"][cell]["outputs"]
    ]


def test_numbers_move_and_buttons_act(open_book: Open) -> None:
    """Kills: a panel drawn once; buttons without a handler; a stop that leaves a widget in the file."""
    book = open_book(START, ADD, STATE)
    book.run(1)
    panel = book.cell(1)
    expect(panel).to_contain_text("running")
    expect(panel).to_contain_text("100 % of what has arrived")
    expect(panel.locator(".kf-n:visible", has_text="100").first).to_be_visible()
    expect(panel.locator(".kf:visible")).to_have_count(1)  # the static page is hidden
    book.run(2)
    expect(panel).to_contain_text("140")
    expect(panel.get_by_role("img", name="The last minute: processed")).to_be_visible()
    expect(panel.get_by_role("progressbar", name="processed of what has arrived")).to_be_visible()

    panel.get_by_role("button", name="Pause").click()
    expect(panel).to_contain_text("paused")
    assert "'paused'" in book.told(3)
    book.run(2)
    expect(panel).to_contain_text("offsets behind")
    expect(panel.get_by_role("button", name="Pause")).to_be_disabled()

    panel.get_by_role("button", name="Resume").press("Enter")  # by keyboard
    expect(panel).to_contain_text("180")
    assert "'running'" in book.told(3)

    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("stopped")
    expect(panel.get_by_role("button")).to_have_count(0)
    assert "'stopped'" in book.told(3)
    assert outputs(book.save(), 2) == []  # the panel's thread put nothing into another cell


def test_notebook_7_shows_it_too(lab: Lab, page: Page, tmp_path: Path) -> None:
    """The other front end, on the same server. Kills: a panel that only JupyterLab can draw."""
    lab.notebook("seven", [DEFINE.format(path=str(tmp_path / "shop.duckdb")), START, ADD])
    book = Book(page, lab, "seven", "notebooks")
    expect(page.locator("#jp-NotebookLogo")).to_be_visible()
    assert book.told(0) == ""
    book.run(1)
    panel = book.cell(1)
    expect(panel.locator(".kf:visible")).to_have_count(1)
    expect(panel).to_contain_text("running")
    book.run(2)
    expect(panel).to_contain_text("140")
    panel.get_by_role("button", name="Stop").click()
    expect(panel).to_contain_text("stopped")
    expect(panel.get_by_role("button")).to_have_count(0)


@pytest.fixture
def lab_without_widgets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A front end that knows the kernel's widgets by name alone, as VS Code may."""
    root, home = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("home")
    running = Lab(root, home, "@jupyter-widgets/jupyterlab-manager")
    try:
        running.wait()
        yield running
    finally:
        running.stop()


def test_without_widgets_it_is_a_page(lab_without_widgets: Lab, page: Page, tmp_path: Path) -> None:
    """Kills: nothing, a class name or "Loading widget" where the panel would be."""
    lab = lab_without_widgets
    lab.notebook("bare", [DEFINE.format(path=str(tmp_path / "shop.duckdb")), START, ADD, STOP, "shop"])
    book = Book(page, lab, "bare")
    assert book.told(0) == ""
    book.run(1)
    panel = book.cell(1)
    expect(panel.locator(".kf:visible")).to_have_count(1)
    expect(panel).to_contain_text("running")
    expect(panel.get_by_role("button")).to_have_count(0)
    assert "widget" not in panel.inner_text().lower()
    book.run(2)
    book.run(3)
    told = book.told(4)
    assert "stopped" in told
    assert "140" in told


def test_a_page_that_is_loaded_again_goes_on(open_book: Open, page: Page, lab: Lab) -> None:
    """Kills: a panel that lives in one page's memory alone; one that never hears of the end."""
    book = open_book(START, ADD, STOP)
    book.run(1)
    expect(book.cell(1)).to_contain_text("rows100", use_inner_text=False)
    book.save()
    again = Book(page, lab, book.name)
    panel = again.cell(1).locator(".jupyter-widgets .kf")
    expect(panel).to_contain_text("running")
    again.run(2)
    expect(panel).to_contain_text("140")
    again.run(3)
    expect(panel).to_contain_text("stopped")
    expect(again.cell(1).get_by_role("button", name="Stop")).to_be_disabled()


def test_stop_leaves_a_static_page_in_the_file(open_book: Open, lab: Lab, page: Page) -> None:
    """Kills: widget state that is gone when the file is opened again; a page that needs trust."""
    book = open_book(START, STOP)
    book.run(1)
    expect(book.cell(1).get_by_role("img")).to_be_visible()
    book.run(2)
    expect(book.cell(1)).to_contain_text("stopped")
    saved = book.save()
    shown = outputs(saved, 1)
    assert not any("widget" in kind for output in shown for kind in output)
    assert "stopped" in shown[0]["text/html"]
    assert "<script" not in shown[0]["text/html"]
    assert "stopped: 100 rows" in shown[0]["text/plain"]

    for cell in saved["cells"]:  # another one's notebook: not signed here, so not trusted
        cell["metadata"] = {}
    saved["cells"][1]["outputs"][0]["data"]["text/html"] = shown[0]["text/html"] + "<!-- changed -->"
    name = f"{book.name}_untrusted"
    (lab.root / f"{name}.ipynb").write_text(json.dumps(saved))
    again = Book(page, lab, name)
    expect(again.cell(1).get_by_text("stopped")).to_be_visible()
    expect(again.cell(1).get_by_text("100", exact=True)).to_be_visible()
    expect(again.cell(1).get_by_role("img")).to_be_visible()
    assert again.cell(1).locator("style").count() == 0  # it was not trusted indeed
    picture = again.cell(1).get_by_role("img").evaluate("image => image.naturalWidth")
    assert picture > 0


def test_an_error_shows_where_it_happened_and_what_was_kept(open_book: Open) -> None:
    """Kills: an error that only wait() tells."""
    book = open_book(START, BREAK, STATE)
    book.run(1)
    panel = book.cell(1)
    expect(panel).to_contain_text("100")
    book.run(2)
    expect(panel).to_contain_text("failed")
    expect(panel).to_contain_text("StepError: Step 'broken' raised AttributeError")
    expect(panel).to_contain_text("Cell In[3], line 3: return orders[orders.amont > 3]")
    expect(panel).to_contain_text("Rolled back: orders[2] offsets [")
    expect(panel).to_contain_text("tables and positions are as they were")
    traceback = panel.get_by_text("Traceback (most recent call last)")
    expect(traceback).not_to_be_visible()
    panel.locator("summary", has_text="Traceback").press("Enter")
    expect(traceback).to_be_visible()
    assert "failed" in book.told(3)
    assert "StepError" in outputs(book.save(), 1)[0]["text/html"]


def test_a_button_that_fails_says_so(open_book: Open) -> None:
    """Kills: an exception in a callback, which ipykernel shows nowhere."""
    book = open_book("def fail(): raise RuntimeError('<b>no</b>')\nshop.pause = fail\n" + START)
    book.run(1)
    book.cell(1).get_by_role("button", name="Pause").click()
    expect(book.cell(1).get_by_role("alert")).to_have_text("Pause: RuntimeError: <b>no</b>")


def test_several_panels_a_cell_that_runs_again_and_another_kernel(open_book: Open, page: Page) -> None:
    """Kills: a panel that takes another one's place; a thread for each run of a cell; a page that dies with
    its kernel."""
    threads = "import threading\nsum(t.name == 'kframe-panel' for t in threading.enumerate())"
    book = open_book(START, "shop", threads, STATE)
    book.run(1)
    book.run(2)
    for cell in (1, 2):
        expect(book.cell(cell)).to_contain_text("running")
    assert book.told(3).strip().endswith("2")
    book.run(2)
    book.run(2)
    expect(book.cell(2)).to_contain_text("running")
    page.wait_for_function("() => true")
    expect(book.cell(2).locator(".kf:visible").first).to_be_visible()
    assert book.told(3).strip().endswith("2")

    expect(book.cell(2)).to_contain_text("100")
    hidden = book.cell(2).locator(".jp-RenderedHTMLCommon .kf", has_text="as of")
    expect(hidden).to_contain_text("rows100", use_inner_text=False)
    assert not hidden.is_visible()
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    expect(hidden).to_be_visible()
    expect(book.cell(2).get_by_role("button")).to_have_count(0)


def test_a_report_follows_commits(open_book: Open) -> None:
    """Kills: rows that stay behind the tables; charts that need the network."""
    query = 'shop.live("SELECT sku, n FROM by_sku ORDER BY sku"'
    report = f'shop.start()\nkf.report({query}), {query}, chart="bar"), title="Shop")'
    book = open_book(report, ADD, STOP)
    book.page.context.set_offline(False)
    book.run(1)
    shown = book.cell(1)
    expect(shown).to_contain_text("3 rows, as of batch 0")
    expect(shown.get_by_role("cell", name="34", exact=True)).to_be_visible()
    expect(shown.get_by_role("img", name="bar chart of SELECT sku, n FROM by_sku")).to_be_visible()
    book.run(2)
    expect(shown.get_by_role("cell", name="48", exact=True)).to_be_visible()
    book.run(3)
    expect(shown.locator(".jp-RenderedHTMLCommon .kf")).to_be_visible()
    assert "48" in outputs(book.save(), 1)[0]["text/html"]


def test_the_dark_theme_is_readable(open_book: Open) -> None:
    """Kills: a colour fixed for light pages. WCAG 2.2, 1.4.3: text at least 4.5:1."""
    book = open_book(START)
    book.run(1)
    panel = book.cell(1)
    expect(panel).to_contain_text("running")
    for theme in ("JupyterLab Light", "JupyterLab Dark"):
        book.command("apputils:change-theme", {"theme": theme})
        book.page.wait_for_function(f"document.body.dataset.jpThemeName === '{theme}'")
        book.page.wait_for_function(_CONTRAST + " >= 4.5")
        assert book.page.evaluate(_CONTRAST) >= 4.5
    book.command("apputils:change-theme", {"theme": "JupyterLab Light"})


_CONTRAST = """(() => {
    const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
    const linear = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const light = c => { const [r, g, b] = rgb(c).map(linear); return .2126 * r + .7152 * g + .0722 * b; };
    const behind = e => {
        for (; e; e = e.parentElement) {
            const c = getComputedStyle(e).backgroundColor;
            if (rgb(c)[3] !== 0) return c;
        }
        return 'rgb(255, 255, 255)';
    };
    const words = e => [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim());
    const seen = [...document.querySelectorAll('.jupyter-widgets .kf *')].filter(
        e => e.offsetParent && !e.ariaHidden && words(e));
    return Math.min(...seen.map(e => {
        const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((x, y) => y - x);
        return (a + .05) / (b + .05);
    }));
})()"""
