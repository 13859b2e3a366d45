"""A real JupyterLab in a real Chromium, for the tests of what notebooks show."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 30_000


class Lab:
    """A running JupyterLab: its address, its folder, its settings, and extensions that it goes without."""

    def __init__(self, root: Path, home: Path, *without: str) -> None:
        self.root = root
        self.port = _free_port()
        disabled = home / "CONFIG" / "labconfig" / "page_config.json"
        disabled.parent.mkdir(parents=True)
        disabled.write_text(json.dumps({"disabledExtensions": dict.fromkeys(without, True)}))
        settings = home / "settings" / "@jupyterlab"
        for name, values in _SETTINGS.items():
            file = settings / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        options = {
            "ServerApp.root_dir": root,
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": True,
            "IdentityProvider.token": "",
            "ServerApp.disable_check_xsrf": True,
            "LabApp.expose_app_in_browser": True,
            "JupyterNotebookApp.expose_app_in_browser": True,
            "LabApp.user_settings_dir": home / "settings",
            "LabApp.workspaces_dir": home / "workspaces",
        }
        own = {f"JUPYTER_{kind}_DIR": str(home / kind) for kind in ("CONFIG", "RUNTIME", "DATA")}
        self.log = home / "lab.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", *(f"--{k}={v}" for k, v in options.items())],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, "IPYTHONDIR": str(home / "ipython")},
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until the server answers."""
        pause = threading.Event()
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            with contextlib.suppress(OSError):
                self.get("status")
                return
            pause.wait(0.1)
        raise AssertionError(f"JupyterLab does not answer:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """End the server, which ends its kernels."""
        self.process.terminate()
        self.process.wait(20)

    def get(self, path: str) -> Any:
        """The server's answer to a REST call."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/{path}", timeout=10) as answer:
            return json.load(answer)

    def notebook(self, name: str, cells: list[str]) -> Path:
        """Write a notebook of code cells."""
        book = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        path = self.root / f"{name}.ipynb"
        nbformat.write(book, path)
        return path


_SETTINGS: dict[str, dict[str, Any]] = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
}


class Book:
    """A notebook open in a browser's page."""

    def __init__(self, page: Page, lab: Lab, name: str, front_end: str = "lab/workspaces/{}/tree") -> None:
        self.page = page
        self.lab = lab
        self.name = name
        page.goto(f"http://127.0.0.1:{lab.port}/{front_end.format(name)}/{name}.ipynb?reset")
        expect(page.locator(".jp-Notebook .jp-Cell").first).to_be_visible(timeout=TIMEOUT_MS)
        page.wait_for_function("window.jupyterapp && window.jupyterapp.shell.currentWidget?.context?.isReady")
        page.wait_for_function(
            "window.jupyterapp.shell.currentWidget.sessionContext?.session?.kernel?.status === 'idle'",
            timeout=TIMEOUT_MS,
        )

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        """Run one of JupyterLab's commands and wait for it."""
        self.page.evaluate("([n, a]) => window.jupyterapp.commands.execute(n, a)", [name, arguments or {}])

    def run(self, number: int) -> None:
        """Run a cell and wait for its end."""
        self.page.evaluate(
            """async n => {
                const book = window.jupyterapp.shell.currentWidget.content;
                book.activeCellIndex = n;
                await window.jupyterapp.commands.execute('notebook:run-cell');
            }""",
            number,
        )

    def cell(self, number: int) -> Any:
        """A cell's output area."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(number).locator(".jp-Cell-outputArea")

    def told(self, number: int) -> str:
        """Run a cell; the text that it puts out."""
        self.run(number)
        return str(self.cell(number).inner_text())

    def save(self) -> dict[str, Any]:
        """Save the notebook; what is in its file."""
        self.command("docmanager:save")
        saved: dict[str, Any] = json.loads((self.lab.root / f"{self.name}.ipynb").read_text())
        return saved


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    root, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    running = Lab(root, home)
    try:
        running.wait()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Debian's Chromium; the tests are skipped by name, with the reason, where there is none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    with sync_playwright() as playwright:
        expect.set_options(timeout=TIMEOUT_MS)
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
