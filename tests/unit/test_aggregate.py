"""`Aggregate`: definitions refused, overflow, order of first and last, distinct values."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import duckdb
import pyarrow as pa
import pytest

from kframe.errors import DefinitionError, SchemaError
from kframe.sinks.table import prepare, write
from kframe.transform.aggregate import Aggregate


@pytest.fixture
def store() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect(config={"python_enable_replacements": "false"}) as con:
        yield con


def orders(
    sku: list[Any], qty: list[Any], *, at: list[int] | None = None, start: int = 0, **more: Any
) -> pa.Table:
    n = len(sku)
    return pa.table(
        {
            "sku": pa.array(sku, pa.string()),
            "qty": pa.array(qty) if qty and isinstance(qty[0], Decimal) else pa.array(qty, pa.int64()),
            **more,
            "_partition": pa.array([0] * n, pa.int32()),
            "_offset": pa.array(range(start, start + n), pa.int64()),
            "_timestamp": pa.array(at or [0] * n, pa.timestamp("ms", "UTC")),
        }
    )


def feed(store: duckdb.DuckDBPyConnection, step: Any, *batches: pa.Table) -> list[tuple[Any, ...]]:
    prepare(store, [step], {"orders": batches[0].schema})
    with duckdb.connect() as con:
        for batch in batches:
            for change in step.merge(store.cursor(), step.partial(con, {"orders": batch})):
                write(store, change)
    return store.execute(f'FROM "{step.name}" ORDER BY ALL').fetchall()


def test_the_view_has_keys_then_measures_in_order(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: columns in the order of the state."""
    step = Aggregate("t", source="orders", by="sku", measures={"b": ("qty", "sum"), "a": ("qty", "count")})
    assert feed(store, step, orders(["x", "x"], [1, 2])) == [("x", 3, 2)]
    assert [c[0] for c in store.execute("FROM t").description or []] == ["sku", "b", "a"]


def test_first_and_last_go_by_the_log_not_by_arrival(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: first of the first batch; last of the last batch."""
    step = Aggregate("t", source="orders", by="sku", measures={"f": ("qty", "first"), "l": ("qty", "last")})
    late = orders(["x", "x"], [5, None], at=[10, 0], start=0)
    early = orders(["x", "x"], [7, 8], at=[3, 10], start=2)
    assert feed(store, step, late, early) == [("x", 7, 8)]


def test_overflow_fails_the_batch_and_keeps_the_state(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a sum that wraps, or turns into a float."""
    step = Aggregate("t", source="orders", by="sku", measures={"s": ("qty", "sum")})
    assert feed(store, step, orders(["x"], [2**63 - 1])) == [("x", 2**63 - 1)]
    with pytest.raises(SchemaError, match="no longer fits"):
        feed(store, step, orders(["x"], [1]))
    assert store.execute("FROM t").fetchall() == [("x", 2**63 - 1)]


def test_the_mean_outlives_the_sum(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: a mean kept as a 64-bit sum."""
    step = Aggregate("t", source="orders", by="sku", measures={"m": ("qty", "mean")})
    big = orders(["x"], [2**62])
    assert feed(store, step, big, big, big) == [("x", float(2**62))]


def test_decimals_stay_exact(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: decimals through floats."""
    step = Aggregate("t", source="orders", by="sku", measures={"s": ("qty", "sum")})
    cents = orders(["x"] * 3, [Decimal("0.10")] * 3)
    assert feed(store, step, cents, cents) == [("x", Decimal("0.60"))]


def test_variance_far_from_zero_is_stable(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: variance from sums of squares."""
    step = Aggregate("t", source="orders", by="sku", measures={"v": ("qty", "var")})
    far = [10**9 + i for i in (4, 7, 13, 16)]
    rows = feed(store, step, orders(["x"] * 2, far[:2]), orders(["x"] * 2, far[2:]))
    assert rows[0][1] == pytest.approx(30.0, rel=1e-9)


def test_distinct_values_are_counted_once_across_batches(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: counts of batches added up."""
    step = Aggregate("t", source="orders", by="sku", measures={"u": ("qty", "nunique")})
    rows = feed(store, step, orders(["x", "x", None], [1, 2, 1]), orders(["x", "x", None], [2, 3, 1]))
    assert rows == [("x", 3), (None, 1)]
    assert store.execute('SELECT count(*) FROM _state."t:qty"').fetchall() == [(4,)]


def test_ddl_again_changes_nothing(store: duckdb.DuckDBPyConnection) -> None:
    """Kills: state tables replaced at each start."""
    step = Aggregate("t", source="orders", by="sku", measures={"n": ("qty", "count")})
    feed(store, step, orders(["x"], [1]))
    assert feed(store, step, orders(["x"], [1])) == [("x", 2)]


def test_a_definition_travels_to_other_processes() -> None:
    """Kills: a definition that holds a connection."""
    step = Aggregate("t", source="orders", by="sku", measures={"n": ("qty", "count")})
    copy = pickle.loads(pickle.dumps(step))
    assert copy.fingerprint() == step.fingerprint()
    other = Aggregate("t", source="orders", by="sku", measures={"n": ("qty", "sum")})
    assert other.fingerprint() != step.fingerprint()


def test_partial_leaves_no_name_behind() -> None:
    """Kills: frames kept registered, so alive."""
    step = Aggregate("t", source="orders", by="sku", measures={"n": ("qty", "count")})
    with duckdb.connect() as con:
        step.partial(con, {"orders": orders(["x"], [1])})
        assert con.execute("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]


@pytest.mark.parametrize(
    ("by", "measures", "message"),
    [
        ("sku", {"m": ("qty", "median")}, "Functions: count"),
        ("sku", {"m": "sum"}, "pair"),
        ("sku", {}, "no measure"),
        ([], {"n": ("qty", "sum")}, "no group column"),
        ("sku", {"SKU": ("qty", "sum")}, "two columns"),
        (["sku", "sku"], {"n": ("qty", "sum")}, "two columns"),
    ],
)
def test_definitions_refused(by: Any, measures: Any, message: str) -> None:
    """Kills: a definition that fails in the first batch only."""
    with pytest.raises(DefinitionError, match=message):
        Aggregate("t", source="orders", by=by, measures=measures)


@pytest.mark.parametrize("pair", [("sku", "sum"), ("nothing", "count")])
def test_definitions_that_do_not_fit_the_schema_are_refused(pair: tuple[str, str]) -> None:
    """Kills: a raw DuckDB error."""
    step = Aggregate("t", source="orders", by="sku", measures={"m": pair})
    with pytest.raises(DefinitionError):
        step.ddl({"orders": orders([], []).schema})
