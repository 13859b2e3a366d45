"""The law of the layout: imports point down only; and the public names."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kframe as kf
import kframe.testing

ROOT = Path(kf.__file__).parent
LAYERS = [
    {"cli", "__main__", "demo", "magics"},
    {"testing", "carrying"},
    {"pipeline"},
    {
        "run",
        "taking_over",
        "status",
        "standalone",
        "replica",
        "restoring",
        "progress",
        "reading",
        "rebuild",
        "preview",
        "explaining",
        "drawing",
        "definition",
        "config",
        "notebook",
        "meter",
    },
    {"standby"},
    {"engine", "worker", "ahead"},
    {"source", "batch", "transform", "commit", "sinks", "deliver", "executors"},
    {"schema", "model", "errors", "timings", "markup"},
]
"""Top to bottom, as in the note in `kframe`."""
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}
BESIDE = {"broker", "broker_guard", "kafka_jars"}
"""A real broker, beside the library: only commands and the package import it."""
STAGES = LAYERS[6]
MEET = {
    ("source", "batch"),  # reading a bounded set of offsets goes by the plan
    ("commit", "transform"),
    ("sinks", "commit"),  # the outbox is a sink that lives beside the ledger
    ("deliver", "commit"),
    ("deliver", "sinks"),  # one way to write JSON
    ("deliver", "source"),  # one set of client settings
}
"""Stages that import another one."""


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions, but not for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{a.name}" if node.module == "kframe" else node.module for a in node.names
            }
    return found


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def own_room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_has_its_place() -> None:
    assert {own_room(p) for p in FILES} <= RANK.keys() | BESIDE


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path: Path) -> None:
    here = own_room(path)
    for there in {room(m) for m in imports(path) if m.startswith("kframe.")} - {here}:
        if here in BESIDE or there in BESIDE:
            assert there in {"errors", "markup", *BESIDE} or here in LAYERS[0], f"{here} imports {there}"
            continue
        assert RANK[there] >= RANK[here], f"{here} imports {there}, which is above it"
        if here in STAGES and there in STAGES:
            assert (here, there) in MEET, f"siblings: {here} imports {there}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if own_room(p) == "transform" or p.stem == "plan"], ids=str
)
def test_plan_and_transform_know_no_kafka(path: Path) -> None:
    assert not any(m.startswith("confluent_kafka") for m in imports(path))


def test_the_client_stays_in_its_rooms() -> None:
    users = {own_room(p) for p in FILES if any(m.startswith("confluent_kafka") for m in imports(p))}
    assert users <= {"source", "deliver", "standby", "broker", "standalone", "demo", "cli"}


@pytest.mark.parametrize(
    ("package", "module"),
    [("ipywidgets", "notebook/panel.py"), ("matplotlib", "notebook/chart.py")],
)
def test_what_draws_stays_in_its_module_and_is_imported_when_something_is_shown(
    package: str, module: str
) -> None:
    users = {str(p.relative_to(ROOT)) for p in FILES if any(m.split(".")[0] == package for m in imports(p))}
    assert users == {module}
    loaded = f"import sys, kframe; print({package!r} in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", loaded], text=True) == "False\n"


def test_only_the_transaction_begins_and_commits() -> None:
    """Kills: a COMMIT elsewhere. Reading has a snapshot of its own, which it rolls back."""
    found = {str(p.relative_to(ROOT)) for p in FILES if 'execute("COMMIT")' in p.read_text()}
    assert found == {"commit/transaction.py"}


def test_exported_names() -> None:
    assert all(hasattr(kf, name) for name in kf.__all__)
    assert not set(kf.__all__) & {folder.name for folder in ROOT.iterdir() if folder.is_dir()}
    assert {"Pipeline", "RunReport", "errors", "local_kafka", "peek", "read", "write"} <= set(kf.__all__)
    assert all(hasattr(kframe.testing, name) for name in kframe.testing.__all__)
