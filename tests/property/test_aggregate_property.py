"""Tables after any cut of the log == one pandas pass == one DuckDB pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kframe.sinks.table import prepare, write
from kframe.transform.aggregate import Aggregate
from kframe.transform.sql import sql_step

Rows = list[tuple[Any, ...]]
SCHEMA = pa.schema(
    [
        ("sku", pa.string()),
        ("day", pa.int64()),
        ("qty", pa.int64()),
        ("amount", pa.decimal128(12, 2)),
        ("price", pa.float64()),
        ("_partition", pa.int32()),
        ("_offset", pa.int64()),
        ("_timestamp", pa.timestamp("ms", "UTC")),
    ]
)
MEASURES = {
    "rows_": ("sku", "size"),
    "n": ("qty", "count"),
    "qty_sum": ("qty", "sum"),
    "qty_mean": ("qty", "mean"),
    "amount_sum": ("amount", "sum"),
    "amount_min": ("amount", "min"),
    "price_sum": ("price", "sum"),
    "price_max": ("price", "max"),
    "price_mean": ("price", "mean"),
    "price_var": ("price", "var"),
    "qty_std": ("qty", "std"),
    "qty_first": ("qty", "first"),
    "price_last": ("price", "last"),
    "qty_kinds": ("qty", "nunique"),
    "price_kinds": ("price", "nunique"),
}
SQL = """
    SELECT sku, count(*) AS n, sum(qty) AS total, sum(amount) AS money, avg(price) AS mean,
        stddev(price) AS sd, min(qty) FILTER (WHERE day > 0) AS least, count(DISTINCT qty) AS kinds,
        sum(qty) / count(qty) AS ratio, bool_or(qty > 5) AS any_big,
        arg_max(qty, price) AS at_peak, count_if(qty < 0) AS negative
    FROM orders WHERE day IS NOT NULL GROUP BY ALL HAVING count(*) > 1
"""
ROW = st.tuples(
    st.sampled_from(["a", "b", "B", "", None]),
    st.one_of(st.none(), st.integers(-1, 2)),
    st.one_of(st.none(), st.integers(-9, 9), st.integers(-(2**50), 2**50)),
    st.none() | st.integers(-(10**11), 10**11).map(lambda i: Decimal(i).scaleb(-2)),
    st.one_of(st.none(), st.floats(-1e6, 1e6), st.floats(1e6, 1e6 + 1)),
    st.integers(0, 2),
    st.integers(0, 3),
)
NAN_ROW = ROW.map(lambda row: (*row[:4], math.nan if row[4] is None else row[4], *row[5:]))
CUTS = st.lists(st.integers(0, 40), max_size=6)


def frame_of(rows: Rows) -> pa.Table:
    """Rows with offsets dense by partition, timestamps out of order and with ties."""
    offsets: dict[int, int] = {}
    columns: list[list[Any]] = [[] for _ in SCHEMA]
    for *values, partition, at in rows:
        offset = offsets[partition] = offsets.get(partition, -1) + 1
        for column, value in zip(columns, [*values, partition, offset, at], strict=True):
            column.append(value)
    return pa.table(
        [pa.array(c, type=f.type, from_pandas=False) for c, f in zip(columns, SCHEMA, strict=True)],
        schema=SCHEMA,
    )


def batches(frame: pa.Table, cuts: list[int]) -> Iterator[pa.Table]:
    edges = [0, *sorted(min(cut, frame.num_rows) for cut in cuts), frame.num_rows]
    for start, stop in pairwise(edges):
        yield frame.slice(start, stop - start)


def run(step: Any, frame: pa.Table, cuts: list[int], pieces: int) -> list[dict[str, Any]]:
    """Each batch in `pieces` partials, combined, merged and written."""
    with duckdb.connect(config={"python_enable_replacements": "false"}) as store, duckdb.connect() as con:
        prepare(store, [step], {"orders": frame.schema})
        for batch in batches(frame, cuts):
            parts = [step.partial(con, {"orders": part}) for part in parts_of(batch, pieces)]
            partial = step.combine(con, parts)
            for change in step.merge(store.cursor(), partial):
                write(store, change)
        return list(store.sql(f'SELECT * FROM "{step.name}"').to_arrow_table().to_pylist())


def parts_of(batch: pa.Table, pieces: int) -> list[pa.Table]:
    return list(batches(batch, [batch.num_rows * i // pieces for i in range(1, pieces)]))


def same(left: Any, right: Any) -> bool:
    if left is None or right is None or left is pd.NaT:
        return bool(pd.isna(left) and pd.isna(right))
    if isinstance(left, float) or isinstance(right, float):
        if pd.isna(left) or pd.isna(right):
            return bool(pd.isna(left) and pd.isna(right))
        return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-4)
    return bool(left == right)


def assert_same(ours: list[dict[str, Any]], expected: list[dict[str, Any]], key: list[str]) -> None:
    def by_key(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], dict[str, Any]]:
        found = {tuple(None if pd.isna(row[k]) else row[k] for k in key): row for row in rows}
        assert len(found) == len(rows)
        return found

    left, right = by_key(ours), by_key(expected)
    assert left.keys() == right.keys()
    for k, row in right.items():
        wrong = {c: (left[k][c], v) for c, v in row.items() if not same(left[k][c], v)}
        assert not wrong, f"{k}: {wrong}"


def one_pandas_pass(frame: pa.Table) -> list[dict[str, Any]]:
    """Exact types: nullable integers; decimals as objects, summed by Python."""
    df = frame.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    df = df.sort_values(["_timestamp", "_partition", "_offset"], kind="stable")
    plain = {name: spec for name, spec in MEASURES.items() if spec[0] != "amount"}
    groups = df.groupby(["sku", "day"], dropna=False)
    result = groups.agg(**plain)
    amounts = groups["amount"].agg(list)
    kept = [[a for a in values if a is not None] for values in amounts]
    result["amount_sum"] = [sum(values, Decimal(0)) for values in kept]
    result["amount_min"] = [min(values, default=None) for values in kept]
    return list(result.reset_index().astype(object).to_dict("records"))


def one_duckdb_pass(frame: pa.Table, query: str) -> list[dict[str, Any]]:
    with duckdb.connect() as con:
        con.register("orders", frame)
        return list(con.sql(query).to_arrow_table().to_pylist())


PANDAS_IN_SQL = """
    SELECT sku, day, count(*) AS rows_, count(qty) AS n, coalesce(sum(qty), 0)::BIGINT AS qty_sum,
        avg(qty) AS qty_mean, coalesce(sum(amount), 0) AS amount_sum, min(amount) AS amount_min,
        coalesce(sum(price), 0) AS price_sum, max(price) AS price_max, avg(price) AS price_mean,
        var_samp(price) AS price_var, stddev_samp(qty) AS qty_std,
        first(qty ORDER BY _timestamp, _partition, _offset) FILTER (qty IS NOT NULL) AS qty_first,
        last(price ORDER BY _timestamp, _partition, _offset) FILTER (price IS NOT NULL) AS price_last,
        count(DISTINCT qty) AS qty_kinds, count(DISTINCT price) AS price_kinds
    FROM (SELECT * REPLACE (CASE WHEN isnan(price) THEN NULL ELSE price END AS price) FROM orders)
    GROUP BY ALL
"""
COMMON = settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])


@COMMON
@given(st.lists(st.one_of(ROW, NAN_ROW), max_size=40), CUTS, st.integers(1, 3))
def test_any_cut_equals_one_duckdb_pass(rows: Rows, cuts: list[int], pieces: int) -> None:
    """Kills: `=` for IS NOT DISTINCT FROM; M2 without the means' distance; first by arrival."""
    frame = frame_of(rows)
    step = Aggregate("t", source="orders", by=["sku", "day"], measures=MEASURES)
    assert_same(run(step, frame, cuts, pieces), one_duckdb_pass(frame, PANDAS_IN_SQL), ["sku", "day"])


@COMMON
@given(st.lists(st.one_of(ROW, NAN_ROW), min_size=1, max_size=40), CUTS, st.integers(1, 3))
def test_any_cut_equals_one_pandas_pass(rows: Rows, cuts: list[int], pieces: int) -> None:
    """Kills: NaN counted as a value; the sum of nothing as NULL; NULL groups dropped; n for n - 1."""
    frame = frame_of(rows)
    step = Aggregate("t", source="orders", by=["sku", "day"], measures=MEASURES)
    assert_same(run(step, frame, cuts, pieces), one_pandas_pass(frame), ["sku", "day"])


@COMMON
@given(st.lists(ROW, max_size=40), CUTS, st.integers(1, 3))
def test_any_cut_of_sql_equals_one_pass(rows: Rows, cuts: list[int], pieces: int) -> None:
    """Kills: the sum of nothing as 0; HAVING per batch; a ratio of batches; WHERE or FILTER lost."""
    frame = frame_of(rows)
    step = sql_step("t", SQL, ["orders"])
    query = SQL.replace("arg_max(qty, price)", "arg_max(qty, price ORDER BY _timestamp, _partition, _offset)")
    assert_same(run(step, frame, cuts, pieces), one_duckdb_pass(frame, query), ["sku"])


@COMMON
@given(st.lists(ROW, max_size=20), CUTS)
def test_without_groups_there_is_always_one_row(rows: Rows, cuts: list[int]) -> None:
    """Kills: no row before the first record; a row for each batch."""
    frame = frame_of(rows)
    query = "SELECT count(*) AS n, sum(qty) AS total, max(price) AS peak FROM orders WHERE qty > 0"
    ours = run(sql_step("t", query, ["orders"]), frame, cuts, 1)
    assert_same(
        [{"k": 0, **row} for row in ours], [{"k": 0, **r} for r in one_duckdb_pass(frame, query)], ["k"]
    )
