"""json_rows.c reads what anybody may have written: it stays inside of its memory, whatever the bytes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("json_rows_fuzz.c")
BATCHES = 300_000


def test_mutated_records_under_the_sanitizers(tmp_path: Path) -> None:
    """Kills: reading behind a text's end (a word or an escape that is cut off), or an overflow."""
    compiler, program = shutil.which("cc"), tmp_path / "fuzz"
    if compiler is None:
        pytest.skip("no C compiler, so that kframe runs without json_rows.c, too")
    flags = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [compiler, *flags, str(HARNESS), "-o", str(program), "-lm"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        pytest.skip(f"this compiler has no sanitizers: {built.stderr[:200]}")
    ran = subprocess.run([program, str(BATCHES)], capture_output=True, text=True, check=False, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) > BATCHES / 4  # else it was the refusal that was tried, not the taking
