"""Appends, upserts and deletes; tables made and widened; changed types refused."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from kframe.errors import SchemaError
from kframe.model import Change
from kframe.sinks.table import drop, write


@pytest.fixture
def store() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"python_enable_replacements": "false"}) as con:
        yield con


def rows_of(store: duckdb.DuckDBPyConnection, table: str = "t") -> list[tuple[Any, ...]]:
    return store.execute(f'FROM "{table}" ORDER BY ALL NULLS FIRST').fetchall()


def test_appends_keep_every_row(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: an append that replaces."""
    assert write(store, Change("t", pa.table({"a": [1]}))) == 1
    write(store, Change("t", pa.table({"a": [1, 2]})))
    assert rows_of(store) == [(1,), (1,), (2,)]


def test_upsert_matches_null_keys(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: `=` for IS NOT DISTINCT FROM."""
    first = pa.table({"k": pa.array([None, "a"]), "v": [1, 2]})
    write(store, Change("t", first, ("k",)))
    write(store, Change("t", pa.table({"k": pa.array([None, "b"], pa.string()), "v": [3, 4]}), ("k",)))
    assert rows_of(store) == [(None, 3), ("a", 2), ("b", 4)]


def test_upsert_clears_columns_the_rows_lack(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a replaced row that keeps an old value."""
    write(store, Change("t", pa.table({"k": [1], "v": [1.5], "w": ["x"]}), ("k",)))
    write(store, Change("t", pa.table({"k": [1], "v": pa.nulls(1), "w": ["y"]}), ("k",)))
    assert rows_of(store) == [(1, None, "y")]


def test_deletes_then_rows(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: deletes that come last, or miss NULL."""
    write(store, Change("t", pa.table({"k": pa.array([None, 1, 2]), "v": [0, 1, 2]}), ("k",)))
    gone = pa.table({"k": pa.array([None, 2, 9], pa.int64())})
    assert write(store, Change("t", pa.table({"k": [2], "v": [5]}), ("k",), gone)) == 3
    assert rows_of(store) == [(1, 1), (2, 5)]


def test_a_key_that_comes_twice_is_refused(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: MERGE inserting both rows of a new key."""
    with pytest.raises(SchemaError, match="twice"):
        write(store, Change("t", pa.table({"k": [1, 1], "v": [1, 2]}), ("k",)))


def test_new_columns_are_added_and_odd_names_quoted(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: unquoted names; columns dropped without a word."""
    write(store, Change('my "t"', pa.table({"select": [1]}), schema="s 1"))
    write(store, Change('my "t"', pa.table({"select": [2], 'a"b': ["x"]}), schema="s 1"))
    assert store.execute('FROM "s 1"."my ""t""" ORDER BY 1').fetchall() == [(1, None), (2, "x")]


def test_untyped_columns_wait_for_a_type(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a column of type null stored as an integer for ever."""
    write(store, Change("t", pa.table({"a": [1], "b": pa.nulls(1)})))
    write(store, Change("t", pa.table({"a": [2], "b": ["x"]})))
    assert rows_of(store) == [(1, None), (2, "x")]
    with pytest.raises(SchemaError, match="no column has a type"):
        write(store, Change("u", pa.table({"b": pa.nulls(1)})))


@pytest.mark.parametrize(
    ("stored", "new", "ok"),
    [
        (pa.array([1.5]), pa.array([2]), True),
        (pa.array([1.5]), pa.array([2**53 + 1]), False),
        (pa.array([1]), pa.array([2.0]), True),
        (pa.array([1]), pa.array([2.5]), False),
        (pa.array([1], pa.int32()), pa.array([2**40]), False),
        (pa.array(["a"]), pa.array([1]), False),
        (pa.array([1]), pa.array(["1"]), False),
        (pa.array([True]), pa.array([1]), False),
        (pa.array([Decimal("1.10")]), pa.array([0.1]), False),
        (pa.array([Decimal("1.10")]), pa.array([Decimal("1.105")]), False),
        (pa.array([0], pa.timestamp("us", "UTC")), pa.array([5], pa.timestamp("ms", "UTC")), True),
        (pa.array([0], pa.timestamp("us", "UTC")), pa.array([5], pa.timestamp("ms")), False),
        (pa.array(["a"]), pa.array(["b"]).dictionary_encode(), True),
    ],
)
def test_a_changed_type_is_cast_exactly_or_refused(
    store: duckdb.DuckDBPyConnection, stored: pa.Array, new: pa.Array, ok: bool
) -> None:
    """Kills: casts that round, wrap or turn numbers into text."""
    write(store, Change("t", pa.table({"a": stored})))
    change = Change("t", pa.table({"a": new}))
    if ok:
        write(store, change)
        return
    with pytest.raises(SchemaError, match="column 'a'"):
        write(store, change)


def test_drop_removes_view_and_state_only_of_that_name(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a prefix match that takes another step's state."""
    for table in ("t", "t:q", "tt"):
        write(store, Change(table, pa.table({"a": [1]}), schema="_state"))
    store.execute("CREATE VIEW t AS SELECT 1")
    drop(store, "t")
    left = store.execute("SELECT table_name FROM information_schema.tables").fetchall()
    assert left == [("tt",)]


def test_upsert_in_any_order_leaves_one_row_a_key(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a join by rowid that pairs rows wrongly."""
    n = 5_000
    write(store, Change("t", pa.table({"k": list(range(n)), "v": [0] * n}), ("k",)))
    keys = [(i * 7919) % (2 * n) for i in range(2 * n)]
    write(store, Change("t", pa.table({"k": keys, "v": [k + 1 for k in keys]}), ("k",)))
    assert rows_of(store) == [(k, k + 1) for k in range(2 * n)]
