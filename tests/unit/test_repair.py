"""A damaged write-ahead log: refused, mended, and consumed again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import kframe as kf
from kframe.commit.repair import repair
from kframe.errors import ConfigError, StoreDamaged
from kframe.testing import MemorySource

N = 300


def pipeline(path: Path, at_edge: object = None) -> kf.Pipeline:
    log = MemorySource({"orders": [{"n": i} for i in range(N)]})
    made = kf.Pipeline(path, source=log, batch_rows_max=10, at_edge=at_edge)  # type: ignore[arg-type]
    made.topic("orders", schema={"n": "int64"})
    made.land("orders", table="rows")
    return made


def killed_with_a_log(path: Path) -> Path:
    """A file whose writer was killed, so that its write-ahead log remains."""
    child = subprocess.run([sys.executable, __file__, str(path)], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL
    return path.with_name(path.name + ".wal")


def run_until_killed(path: Path) -> None:
    """The writer: it ends itself after its twentieth batch."""
    passed: list[str] = []

    def at_edge(edge: str) -> None:
        passed.append(edge)
        if passed.count("acknowledged") == 20:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline(path, at_edge).run(progress=False)


def damage(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at : at + 8] = bytes(b ^ 0xFF for b in data[at : at + 8])
    file.write_bytes(data)


def test_a_damaged_log_is_refused_then_cut_off_and_consumed_again(tmp_path: Path) -> None:
    """Kills: truncating without a backup, or a repair after which rows and positions disagree."""
    path = tmp_path / "p.duckdb"
    wal = killed_with_a_log(path)
    damage(wal, wal.stat().st_size // 2)
    damaged = wal.read_bytes()
    with pytest.raises(StoreDamaged, match="kframe repair"):
        pipeline(path)
    told = repair(path)
    assert "p: orders[0] at " in told
    assert (tmp_path / "p.duckdb.wal.damaged-1").read_bytes() == damaged
    with pipeline(path) as mended:
        (position,) = mended.status().positions.values()
        assert 0 < position < N
        assert sorted(mended.read("rows")["n"]) == list(range(position))
        mended.run(progress=False)
        assert sorted(mended.read("rows")["n"]) == list(range(N))


def test_a_deleted_log_is_an_older_consistent_state(tmp_path: Path) -> None:
    path = tmp_path / "p.duckdb"
    killed_with_a_log(path).unlink()
    with pipeline(path) as older:
        older.run(progress=False)
        assert sorted(older.read("rows")["n"]) == list(range(N))


def test_nothing_to_repair(tmp_path: Path) -> None:
    path = tmp_path / "p.duckdb"
    pipeline(path).close()
    with pytest.raises(ConfigError, match="nothing to repair"):
        repair(path)
    with pytest.raises(ConfigError, match="no file"):
        repair(tmp_path / "missing.duckdb")


def test_damage_outside_of_the_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.duckdb"
    path.write_bytes(b"this is no database" * 1000)
    with pytest.raises(StoreDamaged):
        repair(path)
    assert path.read_bytes() == b"this is no database" * 1000


if __name__ == "__main__":
    run_until_killed(Path(sys.argv[1]))
