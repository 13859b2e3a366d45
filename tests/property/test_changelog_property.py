"""A changelog, whatever compaction has left of it, makes the tables that it tells of."""

from __future__ import annotations

import random
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kframe.commit.store import _LEDGER
from kframe.model import Change
from kframe.sinks.table import ensure_table, write
from kframe.standby import changelog
from kframe.standby.changelog import RECORD, Commit, Log

TEXT = st.text("ab'\"\\{}[],é\n ", max_size=5)
SCHEMA = pa.schema(
    [
        ("k", pa.string()),
        ("j", pa.int16()),
        ("b", pa.binary()),
        ("d", pa.decimal128(12, 2)),
        ("f", pa.float64()),
        ("g", pa.float32()),
        ("t", pa.timestamp("us", "UTC")),
        ("u", pa.timestamp("ms")),
        ("x", pa.bool_()),
        ("l", pa.list_(pa.string())),
        ("s", pa.struct([("p", pa.int64()), ("q", pa.string())])),
    ]
)
KEY = ("k", "j")


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


ROW = st.fixed_dictionaries(
    {
        "k": maybe(st.sampled_from(["a", "b", "", "NULL", '"', "é"])),
        "j": maybe(st.integers(-2, 2)),
        "b": maybe(st.binary(max_size=4)),
        "d": maybe(st.decimals(-99, 99, places=2).map(Decimal)),
        "f": maybe(st.floats(allow_nan=False)),
        "g": maybe(st.floats(width=32, allow_nan=False)),
        "t": maybe(st.integers(-(10**15), 10**15)),
        "u": maybe(st.integers(-(10**12), 10**12)),
        "x": maybe(st.booleans()),
        "l": maybe(st.lists(maybe(TEXT), max_size=3)),
        "s": maybe(st.fixed_dictionaries({"p": maybe(st.integers(-5, 5)), "q": maybe(TEXT)})),
    }
)
BATCH = st.tuples(st.lists(ROW, max_size=4), st.lists(ROW, max_size=2), st.lists(ROW, max_size=3))
"""Rows upserted, rows whose keys are deleted, and rows added to a table without key."""


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA)


def connection() -> duckdb.DuckDBPyConnection:
    con = duckdb.connect()
    con.execute("SET TimeZone = 'UTC'")
    con.execute(_LEDGER)
    return con


def columns(con: duckdb.DuckDBPyConnection, name: str) -> Change:
    """How a table is stored, as the ledger has it."""
    told = "SELECT 'p' AS pipeline, schema_name, table_name, column_name, data_type FROM duckdb_columns()"
    rows = con.sql(f"{told} WHERE table_name = $1 ORDER BY column_index", params=[name]).to_arrow_table()
    key = ("pipeline", "schema_name", "table_name", "column_name")
    return Change(changelog.COLUMNS, rows, key, schema=changelog.LEDGER)


def contents(con: duckdb.DuckDBPyConnection) -> list[list[str]]:
    query = "SELECT * REPLACE (epoch_us(t) AS t, epoch_us(u) AS u) FROM {} ORDER BY ALL"
    return [
        [repr(row) for row in con.execute(query.format(_quote(t))).fetchall()] for t in ('up "x', "added")
    ]


def compacted(records: pa.Table, dice: random.Random) -> pa.Table:
    """Without some of the records that a later one of the same key replaces."""
    keys = records["key"].to_pylist()
    last = {key: i for i, key in enumerate(keys)}
    return records.take([i for i, key in enumerate(keys) if last[key] == i or dice.random() < 0.5])


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(BATCH, min_size=1, max_size=4), st.integers(0, 4), st.randoms(use_true_random=False))
def test_what_is_restored_is_what_was_there(
    batches: list[tuple[list[Any], ...]], cut: int, dice: random.Random
) -> None:
    """Kills: a value that comes back as another, a tombstone lost, an added row taken twice or dropped."""
    there, here = connection(), connection()
    logs: list[pa.Table] = []
    for batch_id, (upserted, deleted, added) in enumerate(batches):
        unique = {(row["k"], row["j"]): row for row in upserted}
        changes = [
            Change('up "x', table(list(unique.values())), KEY, table(deleted).select(list(KEY))),
            Change("added", table(added)),
        ]
        records = []
        for change in changes:
            typed = ensure_table(there, change)
            if batch_id == 0:
                records.append(changelog.of_change(there, columns(there, change.table), 0))
            records.append(changelog.of_change(there, typed, batch_id))
            write(there, change)
        logs.append(pa.concat_tables([*records, changelog.of_commit(Commit(batch_id, 1, 0, "f"))]))
    cut = min(cut, len(logs))
    whole = pa.concat_tables([RECORD.empty_table(), *logs])
    for part, next_batch_id in ((logs[:cut], 0), (logs, cut)):  # some batches are read a second time
        if part:
            log = Log(here, compacted(pa.concat_tables(part), dice))
            for sql in log.definitions():
                here.execute(sql)
            for change in log.changes(next_batch_id):
                write(here, change)
    assert contents(here) == contents(there)
    found = changelog.last_commit(whole)
    assert found is not None
    assert found == (whole.num_rows - 1, Commit(len(batches) - 1, 1, 0, "f"))


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
