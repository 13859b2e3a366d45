"""Tables carried to a real PostgreSQL, which is killed too."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import multiprocessing
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import kframe as kf
from kframe.deliver.postgres import PostgresTables
from kframe.errors import ConfigError, DeliveryDelayed, DeliveryRefused, Fenced
from kframe.model import Entry
from kframe.testing import Fault, Faults, InjectedFault, MemorySource
from tests.connectors.conftest import Postgres

MODES = pytest.mark.parametrize("mode", ["transaction", "idempotent"])
_names = itertools.count()


@pytest.fixture
def schema(postgres: Postgres) -> Iterator[str]:
    name = f'my "schema" {next(_names)}'
    yield name
    quoted = name.replace('"', '""')
    postgres.rows(f'DROP SCHEMA IF EXISTS "{quoted}" CASCADE')


def q(schema: str, table: str) -> str:
    return ".".join('"' + name.replace('"', '""') + '"' for name in (schema, table))


def shop(
    source: MemorySource, folder: Path, postgres: Postgres, schema: str, mode: str, **options: Any
) -> kf.Pipeline:
    made = kf.Pipeline(folder / "shop.duckdb", source=source, batch_rows_max=10, **options)
    made.topic("orders", schema={"sku": "str", "qty": "int64", "price": "decimal(12,2)"}, include=["offset"])
    made.land("orders")
    made.aggregate("sold", source="orders", by="sku", n=("qty", "count"), total=("price", "sum"))

    @made.table("latest", key="sku")
    def latest(orders: pd.DataFrame) -> pd.DataFrame:
        return orders.assign(_tombstone=orders.qty % 5 == 4)

    made.connect(postgres.conninfo, tables=["orders", "sold", "latest"], schema=schema, mode=mode)
    return made


def add(source: MemorySource, n: int, first: int = 0) -> None:
    for i in range(first, first + n):
        row = {"sku": None if i % 7 == 0 else f"s{i % 6}", "qty": i, "price": f"{i}.25"}
        source.append("orders", row)


def equal(made: kf.Pipeline, postgres: Postgres, schema: str) -> None:
    """Every table holds the same rows on both sides."""
    for table in ("orders", "sold", "latest"):
        columns = ", ".join(made.read(table).columns)
        here = made.sql(f"SELECT {columns} FROM {table}").fetchall()
        there = postgres.rows(f"SELECT {columns} FROM {q(schema, table)}")
        assert sorted(here, key=repr) == sorted(there, key=repr)
        assert here


@MODES
def test_tables_are_equal_on_both_sides(mode: str, postgres: Postgres, schema: str, tmp_path: Path) -> None:
    """Appended, upserted, deleted, NULL keys, aggregates; names with quotes. Kills: identifiers unquoted;
    NULL keys inserted twice; deletes left out."""
    source = MemorySource()
    add(source, 95)
    with shop(source, tmp_path, postgres, schema, mode) as made:
        made.run(progress=False)
        equal(made, postgres, schema)
        add(source, 30, first=95)
        made.run(progress=False)
        made.run(progress=False)
        equal(made, postgres, schema)
        assert made.status().undelivered == 0
        assert (
            "secret-word" not in made.sql("SELECT string_agg(target) FROM _kframe.outlets").fetchall()[0][0]
        )


@MODES
@pytest.mark.parametrize("edge", ["delivering", "delivered"])
def test_a_fall_at_each_edge_doubles_nothing(
    mode: str, edge: str, postgres: Postgres, schema: str, tmp_path: Path
) -> None:
    """Kills: the position committed apart from the rows; appended rows without an id."""
    source, faults = MemorySource(), Faults()
    for i in range(3):
        add(source, 20, first=20 * i)
        faults.arm(Fault(edge))
        with (
            shop(source, tmp_path, postgres, schema, mode, at_edge=faults) as made,
            pytest.raises(InjectedFault),
        ):
            made.run(progress=False)
    with shop(source, tmp_path, postgres, schema, mode) as made:
        made.run(progress=False)
        equal(made, postgres, schema)


@MODES
def test_postgres_killed_in_the_middle(mode: str, postgres: Postgres, schema: str, tmp_path: Path) -> None:
    """SIGKILL with a transaction open, and right after a COMMIT. Kills: rows lost with the connection."""
    source = MemorySource()
    add(source, 200)
    kills = {"delivering": 2, "delivered": 1}

    def at_edge(edge: str) -> None:
        if kills.get(edge):
            kills[edge] -= 1
            postgres.kill()
            postgres.start()

    with shop(source, tmp_path, postgres, schema, mode, at_edge=at_edge) as made:
        made.run(progress=False)
        add(source, 50, first=200)
        made.run(progress=False)
        assert set(kills.values()) == {0}
        equal(made, postgres, schema)


def run_until_killed(mode: str, edge: str, records: int, folder: Path, told: Any, schema: str) -> None:
    """In a process of its own: a topic that its file has read in part already."""
    source = MemorySource()
    add(source, records)
    with shop(source, folder, told, schema, mode, at_edge=Faults(Fault(edge, "kill"))) as made:
        made.run(progress=False)


@MODES
def test_the_delivering_process_killed(mode: str, postgres: Postgres, schema: str, tmp_path: Path) -> None:
    """SIGKILL with PostgreSQL's transaction open, and when its COMMIT is not known to the file yet.
    Kills: rows marked as delivered before they are; delivering on from the file's position alone."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["kframe.testing", "psycopg", "pytest"])
    told = SimpleNamespace(conninfo=postgres.conninfo)
    for n in range(10):
        edge = ("delivering", "delivered")[n % 2]
        arguments = (mode, edge, 50 * (n + 1), tmp_path, told, schema)
        process = processes.Process(target=run_until_killed, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, f"kill {n} has not hit: {process.exitcode}"
    source = MemorySource()
    add(source, 550)
    with shop(source, tmp_path, postgres, schema, mode) as made:
        made.run(progress=False)
        equal(made, postgres, schema)


def test_a_table_that_grows_a_column(postgres: Postgres, schema: str, tmp_path: Path) -> None:
    source = MemorySource()
    source.append("orders", {"sku": "a"})
    with kf.Pipeline(tmp_path / "p.duckdb", source=source) as made:
        made.topic("orders", schema={"sku": "str"}, on_new_field="add")
        made.land("orders")
        made.connect(postgres.conninfo, tables=["orders"], schema=schema)
        made.run(progress=False)
        source.append("orders", {"sku": "b", 'new "column"': 1.5})
        made.run(progress=False)
    assert postgres.rows(f'SELECT sku, "new ""column""" FROM {q(schema, "orders")} ORDER BY sku') == [
        ("a", None),
        ("b", 1.5),
    ]


def test_a_table_connected_later_arrives_whole(postgres: Postgres, schema: str, tmp_path: Path) -> None:
    source = MemorySource()
    add(source, 20)
    with kf.Pipeline(tmp_path / "p.duckdb", source=source) as made:
        made.topic("orders", schema={"sku": "str", "qty": "int64"})
        made.land("orders")
        made.run(progress=False)
        made.connect(postgres.conninfo, tables=["orders"], schema=schema)
        made.run(progress=False)
    assert postgres.rows(f"SELECT count(*) FROM {q(schema, 'orders')}") == [(20,)]


TIMES = [dt.datetime(2026, 1, 2, 3, 4, 5, 6, dt.UTC), None]


@pytest.mark.parametrize(
    ("column", "type_", "expected"),
    [
        (pa.array([1, None], pa.int8()), "smallint", [1, None]),
        (pa.array([2**64 - 1], pa.uint64()), "numeric", [2**64 - 1]),
        (pa.array([0.1, None, math.inf]), "double precision", [0.1, None, math.inf]),
        (pa.array([0.5], pa.float32()), "real", [0.5]),
        (pa.array([Decimal("1.50"), None]), "numeric", [Decimal("1.50"), None]),
        (pa.array([True, False, None]), "boolean", [True, False, None]),
        (pa.array(['a,"b"\n\\', "", None, "NULL"]), "text", ['a,"b"\n\\', "", None, "NULL"]),
        (pa.array([b"\x00\xff", b"", None]), "bytea", [b"\x00\xff", b"", None]),
        (pa.array(TIMES, pa.timestamp("us", "UTC")), "timestamp with time zone", TIMES),
        (pa.array([dt.datetime(2026, 1, 2)]), "timestamp without time zone", [dt.datetime(2026, 1, 2)]),
        (pa.array([dt.date(2026, 1, 2)]), "date", [dt.date(2026, 1, 2)]),
        (pa.array([dt.time(1, 2, 3)]), "time without time zone", [dt.time(1, 2, 3)]),
        (pa.array([1500], pa.duration("ms")), "interval", [dt.timedelta(seconds=1.5)]),
        (pa.array([[1, None], None]), "jsonb", [[1, None], None]),
        (pa.array([{"a": "x"}]), "jsonb", [{"a": "x"}]),
        (pa.array(["a"]).dictionary_encode(), "text", ["a"]),
    ],
    ids=lambda x: str(x.type) if isinstance(x, pa.Array) else "",
)
def test_each_type(
    column: pa.Array, type_: str, expected: list[Any], postgres: Postgres, schema: str
) -> None:
    """Kills: NULL and empty text taken for each other; floats through text that rounds."""
    target = PostgresTables(postgres.conninfo, "p", schema=schema, idempotent=False)
    target.open(0)
    target.send([entry("append", 0, {"i": pa.array(range(len(column))), "x": column})])
    target.commit(len(column))
    target.close()
    assert [x for (x,) in postgres.rows(f"SELECT x FROM {q(schema, 'rows')} ORDER BY i")] == expected
    told = postgres.rows(
        f"SELECT data_type FROM information_schema.columns WHERE table_schema = '{schema}' "
        "AND table_name = 'rows' AND column_name = 'x'"
    )
    assert told == [(type_,)]


def entry(kind: str, first: int, columns: dict[str, Any], key: tuple[str, ...] = ()) -> Entry:
    rows = pa.table(columns)
    return Entry(first, first + rows.num_rows, 0, "rows", kind, key, rows)


def test_older_changes_are_ignored(postgres: Postgres, schema: str) -> None:
    """In any order of delivery the newest change of a key wins, deletes too. Kills: a guard left out of the
    update, of the delete, or of an insert behind a delete; appended rows doubled by a replay."""
    changes = [
        entry("upsert", 0, {"k": ["a", "b", None], "v": [1, 1, 1]}, ("k",)),
        entry("upsert", 3, {"k": ["a", None], "v": [2, 2]}, ("k",)),
        entry("delete", 5, {"k": ["b", None]}, ("k",)),
        entry("upsert", 7, {"k": ["c", "b"], "v": [3, 4]}, ("k",)),
        entry("delete", 9, {"k": ["c"]}, ("k",)),
    ]
    for order in itertools.islice(itertools.permutations(changes), 0, None, 7):
        postgres.rows(f'DROP SCHEMA IF EXISTS "{schema.replace(chr(34), chr(34) * 2)}" CASCADE')
        target = PostgresTables(postgres.conninfo, "p", schema=schema, idempotent=True)
        target.open(0)
        for change in (*order, order[0]):
            target.send([change])
            target.commit(change.stop_id)
        target.close()
        assert sorted(postgres.rows(f"SELECT k, v FROM {q(schema, 'rows')}")) == [("a", 2), ("b", 4)]


def test_a_newer_owner_fences_the_older(postgres: Postgres, schema: str) -> None:
    """Kills: two deliverers that both append."""
    older, newer = (PostgresTables(postgres.conninfo, "p", schema=schema, idempotent=False) for _ in "ab")
    rows = entry("append", 0, {"n": [1, 2]})
    assert older.open(0) is None
    older.send([rows])
    assert newer.open(0) is None
    with pytest.raises(Fenced):
        older.commit(2)
    older.close()
    newer.send([rows])
    newer.commit(2)
    newer.close()
    assert postgres.rows(f"SELECT count(*) FROM {q(schema, 'rows')}") == [(2,)]


def test_what_postgres_refuses_is_told(postgres: Postgres, schema: str, tmp_path: Path) -> None:
    """Kills: retrying for ever what will never fit."""
    source = MemorySource()
    source.append("orders", {"sku": "nul \u0000"})
    with kf.Pipeline(tmp_path / "p.duckdb", source=source) as made:
        made.topic("orders", schema={"sku": "str"})
        made.land("orders")
        made.connect(postgres.conninfo, tables=["orders"], schema=schema)
        with pytest.raises(DeliveryRefused, match="invalid byte sequence"):
            made.run(progress=False)
        assert len(made.read("orders")) == 1
        assert made.status().undelivered == 1


def test_nobody_listening_is_a_delay_without_secrets(tmp_path: Path) -> None:
    target = PostgresTables("postgresql://u:secret-word@127.0.0.1:1/db", "p", idempotent=False)
    with pytest.raises(DeliveryDelayed) as told:
        target.open(0)
    assert "secret-word" not in f"{told.value}{target!r}{target.name}"
    with kf.Pipeline(tmp_path / "p.duckdb", source=MemorySource()) as made:
        made.topic("orders", schema={"sku": "str"})
        made.land("orders")
        with pytest.raises(ConfigError, match="not shown"):
            made.connect("postgresql://u:secret-word@h:x y/=", tables=["orders"])
        with pytest.raises(ConfigError, match="no connector for mysql"):
            made.connect("mysql://h/db", tables=["orders"])
        with pytest.raises(ConfigError, match="the mode is"):
            made.connect("postgresql://h/db", tables=["orders"], mode="none")
