"""Rows to records: every type's JSON, keys, tombstones."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kframe.errors import SchemaError
from kframe.sinks.encode import records

UTC = dt.UTC


@pytest.fixture(scope="module")
def con() -> duckdb.DuckDBPyConnection:
    made = duckdb.connect()
    made.execute("SET TimeZone = 'UTC'")
    return made


def values(con: duckdb.DuckDBPyConnection, column: pa.Array) -> list[Any]:
    encoded = records(con, pa.table({"x": column}), (), name="out")
    return [json.loads(v)["x"] for v in encoded["value"].to_pylist()]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, None], pa.int8()), [1, None]),
        (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
        (pa.array([0.1, None, float("nan"), float("inf"), -0.0]), [0.1, None, None, None, 0.0]),
        (pa.array([0.1], pa.float32()), [0.1]),
        (pa.array([Decimal("1.50"), None]), ["1.50", None]),
        (pa.array([Decimal("12345678901234567890.123456789")]), ["12345678901234567890.123456789"]),
        (pa.array([True, None]), [True, None]),
        (pa.array(['"\n\u0001\u00e9', "", None]), ['"\n\u0001\u00e9', "", None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.array([b"\x00\xff", None]), ["AP8=", None]),
        (pa.array([dt.date(2026, 1, 2)]), ["2026-01-02"]),
        (pa.array([dt.time(1, 2, 3)]), ["01:02:03"]),
        (
            pa.array([dt.datetime(2026, 1, 2, 3, 4, 5, 6, UTC)], pa.timestamp("us", "UTC")),
            ["2026-01-02T03:04:05.000006Z"],
        ),
        (pa.array([dt.datetime(2026, 1, 2)], pa.timestamp("ms")), ["2026-01-02T00:00:00.000000"]),
        (pa.array([None, None], pa.null()), [None, None]),
        (
            pa.array([{"a b": Decimal("1.5"), "l": [1.0, None]}, None]),
            [{"a b": "1.5", "l": [1.0, None]}, None],
        ),
        (
            pa.array([[[Decimal("1.5")], None], None, []]),
            [[["1.5"], None], None, []],
        ),
    ],
    ids=lambda x: str(x.type) if isinstance(x, pa.Array) else "",
)
def test_each_type(con: duckdb.DuckDBPyConnection, column: pa.Array, expected: list[Any]) -> None:
    """Kills: decimals as floats; NaN, which is no JSON; float32 widened to noise."""
    assert values(con, column) == expected


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(), st.floats(allow_nan=False, allow_infinity=False)), max_size=20))
def test_text_and_floats_come_back(rows: list[tuple[str, float]]) -> None:
    con = duckdb.connect()
    table = pa.table(
        {"t": pa.array([t for t, _ in rows], pa.string()), "f": pa.array([f for _, f in rows], pa.float64())}
    )
    got = [json.loads(v) for v in records(con, table, ("t",), name="out")["value"].to_pylist()]
    assert [(g["t"], g["f"]) for g in got] == rows


@pytest.mark.parametrize(
    ("column", "key"),
    [
        (pa.array(["a"]), b"a"),
        (pa.array([7]), b"7"),
        (pa.array([Decimal("1.50")]), b"1.50"),
        (pa.array([b"\x00\x01"]), b"\x00\x01"),
        (pa.array([True]), b"true"),
        (pa.array([{"a": 1}]), b'{"a":1}'),
        (pa.array([None], pa.string()), None),
    ],
)
def test_a_key_is_text(con: duckdb.DuckDBPyConnection, column: pa.Array, key: bytes | None) -> None:
    encoded = records(con, pa.table({"k": column, "v": [1]}), ("k",), name="out")
    assert encoded["key"].to_pylist() == [key]


def test_several_key_columns_are_an_object(con: duckdb.DuckDBPyConnection) -> None:
    table = pa.table({"sku": ["a", None], "day": pa.array([dt.date(2026, 1, 2)] * 2)})
    keys = records(con, table, ("sku", "day"), name="out", null_keys=False)["key"].to_pylist()
    assert [json.loads(k) for k in keys] == [{"sku": s, "day": "2026-01-02"} for s in ("a", None)]


def test_tombstones(con: duckdb.DuckDBPyConnection) -> None:
    table = pa.table({"k": ["a", "b", "c"], "_tombstone": [True, False, None]})
    assert records(con, table, ("k",), name="out").to_pylist() == [
        {"key": b"a", "value": None},
        {"key": b"b", "value": b'{"k":"b"}'},
        {"key": b"c", "value": b'{"k":"c"}'},
    ]


def test_a_row_without_a_key_is_named(con: duckdb.DuckDBPyConnection) -> None:
    """Kills: a null key sent to a compacted topic."""
    table = pa.table({"k": ["a", None], "v": [1, 2]})
    with pytest.raises(SchemaError, match=r"a row has no key \(k\).*'v': 2"):
        records(con, table, ("k",), name="out", null_keys=False)
    with pytest.raises(SchemaError, match="no column 'sku', which is the records' key"):
        records(con, table, ("sku",), name="out")
