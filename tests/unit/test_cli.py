"""The command line on a file; the commands that need a broker are in tests/broker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kframe as kf
from kframe.cli import main
from kframe.testing import MemorySource


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "shop.duckdb"
    log = MemorySource({"orders": [{"n": 1}, {"n": "two"}, {"n": 3}]})
    with kf.Pipeline(path, source=log) as shop:
        shop.topic("orders", schema={"n": "int64"})
        shop.land("orders", table="rows")
        shop.run(progress=False)
    return str(path)


def test_status_offsets_and_dead_letters(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", file]) == 0
    assert capsys.readouterr().out.split("\n")[1].split()[:2] == ["shop", "1"]
    assert main(["offsets", file, "--pipeline", "shop"]) == 0
    assert capsys.readouterr().out.split("\n")[1].split() == ["shop", "orders", "0", "3"]
    assert main(["offsets", file, "--pipeline", "other"]) == 0
    assert capsys.readouterr().out == "none\n"
    assert main(["dead-letters", file]) == 0
    assert 'n: expected int64, got string "two"' in capsys.readouterr().out


def test_compact(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compact", file]) == 0
    assert "MB after" in capsys.readouterr().out
    assert main(["offsets", file]) == 0
    assert capsys.readouterr().out.split("\n")[1].split() == ["shop", "orders", "0", "3"]


def test_expected_errors_are_one_text_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path / "missing.duckdb")]) == 2
    assert main(["run", "no_such_module:shop"]) == 2
    told = capsys.readouterr().err
    assert "There is no file" in told
    assert "no_such_module" in told
    assert "Traceback" not in told


def test_a_file_in_use_names_its_owner(file: str) -> None:
    with kf.Pipeline(file, source=MemorySource()):
        command = [sys.executable, "-m", "kframe", "status", file]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert f"PID {os.getpid()}" in done.stderr


def test_run_takes_a_pipeline_from_a_module(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(
        "import kframe as kf\n"
        "from kframe.testing import MemorySource\n"
        'shop = kf.Pipeline("jobs.duckdb", source=MemorySource({"orders": [{"n": 1}, {"n": 2}]}))\n'
        'shop.topic("orders")\n'
        'shop.land("orders", table="rows")\n'
    )
    command = [sys.executable, "-m", "kframe", "run", "jobs:shop", "--until", "end"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "<RunReport jobs: 2 rows in 1 batches" in done.stdout
