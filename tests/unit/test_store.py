"""The one file: who owns it, what SQL may reach, and what a damaged one says."""

# ruff: noqa: PT012 - what is raised inside of a transaction is what these tests are about

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pandas as pd
import pytest

import kframe as kf
from kframe.commit.store import open_store
from kframe.commit.transaction import transaction
from kframe.errors import ConfigError, Fenced, KframeError, StoreDamaged, StoreLocked
from kframe.testing import MemorySource

OPEN = "import sys, kframe as kf\nfrom kframe.testing import MemorySource\n"
OPEN += "shop = kf.Pipeline(sys.argv[1], source=MemorySource())\n"


def pipeline(path: Path, log: MemorySource | None = None, **options: object) -> kf.Pipeline:
    shop = kf.Pipeline(path, source=log or MemorySource({"orders": [{"i": 1}]}), **options)  # type: ignore[arg-type]
    shop.topic("orders", schema={"i": "int64"})
    shop.land("orders")
    return shop


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[kf.Pipeline]:
    with pipeline(tmp_path / "shop.duckdb") as shop:
        shop.run(progress=False)
        yield shop


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


# ---- who owns it ------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_owns_the_file(shop: kf.Pipeline, tmp_path: Path) -> None:
    """Kills: no sidecar lock (DuckDB's own error would come), an owner without its PID."""
    code = "from kframe.errors import StoreLocked\n" + OPEN.replace("shop =", "try:\n  shop =")
    told = python(code + "except StoreLocked as error: print(error)\n", tmp_path / "shop.duckdb").stdout
    assert f"PID {os.getpid()}" in told
    assert "shop.duckdb is in use by" in told
    assert "snapshot_to" in told


def test_a_second_process_cannot_read_it_either(shop: kf.Pipeline, tmp_path: Path) -> None:
    told = python("import duckdb, sys\nduckdb.connect(sys.argv[1], read_only=True)", tmp_path / "shop.duckdb")
    assert "lock" in told.stderr
    shop.run(progress=False)  # and the owner's lock is as it was


def test_the_lock_ends_with_its_owner(tmp_path: Path) -> None:
    """Kills: a lock file that is believed because it exists."""
    path = tmp_path / "shop.duckdb"
    killed = python(OPEN + "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", path)
    assert killed.returncode == -signal.SIGKILL
    owner = json.loads(Path(f"{path}.lock").read_text())
    assert owner["pid"] != os.getpid()
    pipeline(path).close()


def test_a_fork_is_told_to_open_its_own(shop: kf.Pipeline) -> None:
    """Kills: no check of getpid() (parent and child would write one file)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            shop._store.cursor()
            os.write(write, b"no error")
        except StoreLocked as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        told = file.read()
    os.waitpid(pid, 0)
    assert f"belongs to process {os.getpid()}" in told
    assert shop.run(progress=False).rows == 0


def test_a_pipeline_made_again_stops_the_old_one(tmp_path: Path) -> None:
    """Kills: two runs of one pipeline side by side; an old object that goes on."""
    log = MemorySource({"orders": [{"i": 1}]})
    path = tmp_path / "shop.duckdb"
    running = threading.Event()
    old = pipeline(path, log, at_edge=lambda edge: running.set() if edge == "acknowledged" else None)
    old.start()
    assert running.wait(30)
    with pipeline(path, log) as new:
        assert old.wait(0).rows == 1
        with pytest.raises(Fenced, match="made again"):
            old.run(progress=False)
        log.append("orders", {"i": 2})
        assert new.run(progress=False).rows == 1
        assert sorted(new.read("orders")["i"]) == [1, 2]


# ---- copies for others ------------------------------------------------------------------------------


def test_a_snapshot_is_readable_by_another_process_while_the_writer_runs(tmp_path: Path) -> None:
    """Kills: a copy of the file's bytes; a snapshot written in place."""
    copy = tmp_path / "copy.duckdb"
    log = MemorySource({"orders": [{"i": i} for i in range(3)]})
    acknowledged = threading.Event()

    def at_edge(edge: str) -> None:
        if edge == "planned" and copy.exists():
            acknowledged.set()

    with pipeline(tmp_path / "shop.duckdb", log, snapshot_to=str(copy), at_edge=at_edge) as shop:
        shop.start()
        assert acknowledged.wait(30)
        code = "import duckdb, sys\ncon = duckdb.connect(sys.argv[1], read_only=True)\n"
        code += "print(con.sql(sys.argv[2]).fetchall())"
        got = python(code, copy, "SELECT sum(i)::INT, (SELECT position FROM _kframe.positions) FROM orders")
        assert got.stdout.strip() == "[(3, 3)]", got.stderr
        assert shop.status().state == "running"


# ---- what SQL may reach -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query",
    [
        "SELECT * FROM read_csv('{folder}/secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'",
        'SELECT * FROM "{folder}/secret.csv"',
        "COPY orders TO '{folder}/out.csv'",
        "ATTACH '{folder}/other.duckdb'",
        "SELECT * FROM read_text('/etc/passwd')",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "INSERT INTO orders VALUES (1)",
        "DROP TABLE orders",
    ],
)
def test_sql_reaches_no_file_and_changes_nothing(shop: kf.Pipeline, tmp_path: Path, query: str) -> None:
    """Kills: enable_external_access or lock_configuration left out; a query that is not read-only."""
    (tmp_path / "secret.csv").write_text("a\n1\n")
    with pytest.raises((duckdb.Error, KframeError)):
        shop.sql(query.format(folder=tmp_path))
    assert not (tmp_path / "out.csv").exists()
    assert not (tmp_path / "other.duckdb").exists()
    assert list(shop.read("orders")["i"]) == [1]


def test_python_variables_are_not_tables(shop: kf.Pipeline) -> None:
    """Kills: python_enable_replacements left on."""
    local = pd.DataFrame({"i": [99]})
    with pytest.raises(duckdb.CatalogException, match="local"):
        shop.sql("FROM local")
    assert len(local) == 1


@pytest.mark.parametrize("name", ['a "quoted" name', "orders.csv", "select", "né; DROP TABLE orders", "a.b"])
def test_any_name_is_quoted(tmp_path: Path, name: str) -> None:
    """Kills: a name put into SQL as it is."""
    log = MemorySource({"orders": [{name: 1}, {name: None}]})
    with kf.Pipeline(tmp_path / "shop.duckdb", source=log) as shop:
        shop.topic("orders", schema={name: "int64"})
        shop.land("orders", table=name)
        shop.aggregate("sums", source="orders", by=name, n=(name, "size"))
        shop.run(progress=False)
        assert len(shop.read(name)) == len(shop.read("sums")) == 2


# ---- damage -----------------------------------------------------------------------------------------


def test_a_damaged_file_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    path.write_bytes(b"this is no database " * 1000)
    before = path.read_bytes()
    with pytest.raises(StoreDamaged, match="kframe repair"):
        pipeline(path)
    assert path.read_bytes() == before
    path.unlink()
    pipeline(path).close()  # the lock was given up


def test_a_damaged_wal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "shop.duckdb"
    code = OPEN + (
        "shop._store.cursor().execute('CREATE TABLE t AS SELECT range AS i FROM range(20000)')\n"
        "import os; os._exit(0)"
    )
    assert python(code, path).returncode == 0
    wal = Path(f"{path}.wal")
    raw = bytearray(wal.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 64] = bytes(64)
    wal.write_bytes(raw)
    with pytest.raises(StoreDamaged, match=r"shop\.duckdb"):
        pipeline(path)


def test_a_full_disk_rolls_the_batch_back(tmp_path: Path) -> None:
    """Kills: positions that outlive their rows when COMMIT fails for want of room."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("a small file system needs root")
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pipeline(small / "shop.duckdb") as shop:
            shop.run(progress=False)
            with pytest.raises(duckdb.Error), transaction(shop._store, lambda: False) as cur:
                cur.execute("UPDATE _kframe.positions SET position = 99")
                cur.execute("CREATE TABLE big AS SELECT uuid()::VARCHAR AS u FROM range(2000000)")
            assert shop._ledger.positions()["orders", 0].offset == 1  # type: ignore[index]
            grown = ["mount", "-o", "remount,size=256m", str(small)]
            subprocess.run(grown, check=True)
            assert shop.run(progress=False).rows == 0
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_one_store_for_one_file(tmp_path: Path) -> None:
    """Kills: a second connection, whose closing would drop this process's lock."""
    (tmp_path / "link").symlink_to(tmp_path)
    store = open_store(tmp_path / "shop.duckdb")
    assert open_store(tmp_path / "link" / "shop.duckdb") is store
    store.close()
    store.close()


def test_no_checkpoint_moves_rows_while_a_batch_knows_their_places(tmp_path: Path) -> None:
    """Kills: a checkpoint between reading rowids of the state and writing to them."""
    log = MemorySource({"orders": [{"sku": f"s{i % 7}", "qty": i} for i in range(60)]})
    folded = []

    def at_edge(edge: str) -> None:
        if edge in ("transformed", "planned"):
            folded.append((edge, open_store(tmp_path / "p.duckdb").checkpoint()))

    with kf.Pipeline(tmp_path / "p.duckdb", source=log, batch_rows_max=10, at_edge=at_edge) as made:
        made.topic("orders", schema={"sku": "str", "qty": "int64"})
        made.aggregate("totals", source="orders", by="sku", total=("qty", "sum"))
        made.run(progress=False)
        assert dict(made.read("totals").to_numpy()) == {f"s{k}": sum(range(k, 60, 7)) for k in range(7)}
    assert {kept for edge, kept in folded if edge == "transformed"} == {False}
    assert True in {kept for edge, kept in folded if edge == "planned"}


# ---- its size ---------------------------------------------------------------------------------------


def test_a_compacted_file_is_smaller_and_says_the_same(tmp_path: Path) -> None:
    """Kills: a copy without views or ledger, a WAL of the old file replayed into the new one."""
    log = MemorySource({"orders": [{"sku": f"s{i}", "qty": i % 9} for i in range(30_000)]})

    def shop() -> kf.Pipeline:
        made = kf.Pipeline(tmp_path / "p.duckdb", source=log, batch_rows_max=20_000)
        made.topic("orders", schema={"sku": "str", "qty": "int64"})
        made.land("orders")
        made.aggregate("totals", source="orders", by="qty", n=("sku", "count"))
        return made

    filler = pd.DataFrame({"x": [os.urandom(50).hex() for _ in range(60_000)]})
    with shop() as made:
        made.side_table("filler", filler)
        assert open_store(tmp_path / "p.duckdb").checkpoint()
        made.run(progress=False)
        made.side_table("filler", filler[:1])
        expected = made.read("totals").sort_values("qty").to_numpy().tolist()
        before, after = made.compact()
        assert after < before - 2_000_000
        assert made.read("totals").sort_values("qty").to_numpy().tolist() == expected
        log.append("orders", {"sku": "new", "qty": 0})
        assert made.run(progress=False).rows == 1
    with shop() as made:
        assert made.run(progress=False).rows == 0
        assert len(made.read("orders")) == 30_001


def test_a_file_that_others_use_is_not_compacted(shop: kf.Pipeline, tmp_path: Path) -> None:
    other = kf.Pipeline(tmp_path / "shop.duckdb", name="other", source=MemorySource())
    with other, pytest.raises(ConfigError, match="in use"):
        shop.compact()
    assert len(shop.read("orders")) == 1
    shop.compact()
