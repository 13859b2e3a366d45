"""Any log, any cut into batches, any crash: tables == one pandas pass == one DuckDB pass.

Kills these mutants: positions committed in a transaction of their own (rows doubled or lost after a crash);
ROLLBACK left out; ``position = last offset + 1`` across gaps; a batch's rows written twice; decoding that
loses its place at a dead letter; an aggregate that forgets its state; an upsert whose first row wins.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kframe as kf
from kframe.testing import (
    EDGES,
    Fault,
    Faults,
    InjectedFault,
    MemorySource,
    check_batch_equivalence,
    difference,
)

SCHEMA = {"sku": "str", "qty": "int64", "amount": "decimal(12,2)", "price": "float64", "region": "str"}
PRODUCTS = pd.DataFrame({"sku": ["a", "b", "c"], "title": ["Apple", "Bean", None]})
MEASURES = {
    "rows_": ("qty", "size"),
    "n": ("qty", "count"),
    "qty_sum": ("qty", "sum"),
    "qty_min": ("qty", "min"),
    "qty_max": ("qty", "max"),
    "qty_kinds": ("qty", "nunique"),
    "price_mean": ("price", "mean"),
    "price_var": ("price", "var"),
    "price_std": ("price", "std"),
    "price_first": ("price", "first"),
    "price_last": ("price", "last"),
}
BY_REGION = "SELECT region, count(*) AS n, sum(amount) AS total, max(qty) AS most FROM orders GROUP BY region"
DOUBLED = "SELECT sku, qty * 2 AS twice FROM orders WHERE qty > 0"

# ---- logs, cuts, crashes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    partition: int
    gap: int
    at: int
    value: Any


@dataclass(frozen=True)
class Phase:
    """Records arrive, partitions may have been added, and a run meets a fault or none."""

    records: list[Record]
    partitions: int
    fault: Fault | None
    batch_rows_max: int


VALUES = st.fixed_dictionaries(
    {
        "sku": st.sampled_from(["a", "b", "zz", "", None]),
        "qty": st.none() | st.integers(-9, 9) | st.integers(-(2**50), 2**50),
        "amount": st.none() | st.integers(-(10**9), 10**9).map(lambda i: str(Decimal(i).scaleb(-2))),
        "price": st.none() | st.integers(-4000, 4000).map(lambda i: i / 4),
        "region": st.sampled_from(["eu", "us", None]),
    }
)
BROKEN = st.sampled_from(
    [b"{", b"\xff", b"[]", b'{"qty": 1.5}', b'{"qty": 9223372036854775808}', b'{"sku": 1}']
)
TOMBSTONE = st.none()
RECORDS = st.builds(
    Record,
    partition=st.sampled_from([0, 0, 0, 1, 2]),
    gap=st.sampled_from([0, 0, 0, 1, 7]),
    at=st.integers(0, 5),
    value=st.one_of(VALUES, VALUES, VALUES, VALUES, BROKEN, TOMBSTONE),
)
FAULTS = st.builds(
    Fault,
    st.sampled_from([*EDGES, "rows_written", "positions_written", "positions_written"]),
    st.sampled_from(["exception", "interrupt"]),
    st.sampled_from([1, 1, 2, 3]),
)
PHASES = st.lists(
    st.builds(
        Phase,
        records=st.lists(RECORDS, max_size=12),
        partitions=st.integers(1, 3),
        fault=st.one_of(FAULTS, FAULTS, st.none()),
        batch_rows_max=st.sampled_from([1, 2, 3, 5, 8, 1000]),
    ),
    min_size=1,
    max_size=3,
)


@dataclass
class World:
    """The log as it grows, and the decodable records that are in it."""

    source: MemorySource = field(default_factory=MemorySource)
    partitions: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    dead: list[tuple[int, int]] = field(default_factory=list)

    def add(self, phase: Phase) -> None:
        if self.partitions == 0:
            self.source.create("orders", phase.partitions)
        elif phase.partitions > self.partitions:
            self.source.add_partitions("orders", phase.partitions - self.partitions)
        self.partitions = max(self.partitions, phase.partitions)
        for record in phase.records:
            partition = record.partition % self.partitions
            offset = self.source.append(
                "orders", record.value, partition=partition, gap=record.gap, timestamp_ms=record.at
            )
            if isinstance(record.value, dict):
                place = {"_partition": partition, "_offset": offset, "_at": record.at}
                self.rows.append({**record.value, **place})
            elif record.value is not None:
                self.dead.append((partition, offset))
            if record.at == 5:
                self.source.skip("orders", 2, partition=partition)  # as a transaction marker does


def define(shop: kf.Pipeline, **options: Any) -> None:
    shop.topic("orders", schema=SCHEMA, include=["partition", "offset"], **options)
    shop.land("orders")
    shop.side_table("products", PRODUCTS, key="sku")
    shop.table("big")(big)
    shop.table("latest", key=["sku", "_partition"])(latest)
    shop.table("titled", lookup={"products": "sku"})(titled)
    shop.aggregate("stats", source="orders", by="sku", **MEASURES)
    shop.sql_table("by_region", BY_REGION)
    shop.sql_table("doubled", DOUBLED)


def big(orders: pd.DataFrame) -> pd.DataFrame:
    return orders[orders.qty.gt(3).fillna(False)]


def latest(orders: pd.DataFrame) -> pd.DataFrame:
    """The last record per key; a negative quantity removes the key."""
    return orders[["sku", "_partition", "qty", "_offset"]].assign(_tombstone=orders.qty.lt(0).fillna(False))


def titled(orders: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
    return orders.merge(products, on="sku")[["sku", "title", "qty"]]


# ---- running and comparing --------------------------------------------------------------------------


def run(path: str, world: World, *, batch_rows_max: int, fault: Fault | None, **topic: Any) -> kf.Pipeline:
    """One session: a new `Pipeline` object, which a fault may end."""
    faults = Faults(*([fault] if fault else []))
    shop = kf.Pipeline(
        path, source=world.source, batch_rows_max=batch_rows_max, at_edge=faults, dead_letters_max_ratio=1.0
    )
    define(shop, **topic)
    try:
        shop.run(progress=False)
        assert not faults.fired
    except (InjectedFault, KeyboardInterrupt):
        assert faults.fired
    return shop


def same(got: pd.DataFrame, expected: pd.DataFrame, what: str) -> None:
    told = "" if expected.empty and got.empty else difference(got, expected)
    assert not told, f"{what}: {told}"


def one_pandas_pass(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    columns = [*SCHEMA, "_partition", "_offset", "_at"]
    df = pd.DataFrame(rows, columns=columns).astype(
        {"qty": "Int64", "price": "float64", "sku": "str", "region": "str"}
    )
    df["amount"] = [None if a is None else Decimal(a) for a in df["amount"]]
    in_time = df.sort_values(["_at", "_partition", "_offset"])
    last = df.drop_duplicates(["sku", "_partition"], keep="last")
    landed = df.drop(columns="_at")
    return {
        "orders": landed,
        "big": big(landed),
        "latest": last.loc[~last.qty.lt(0).fillna(False), ["sku", "_partition", "qty", "_offset"]],
        "titled": titled(landed, PRODUCTS),
        "stats": in_time.groupby("sku", dropna=False).agg(**MEASURES).reset_index(),
        "doubled": df.assign(twice=2 * df.qty).loc[df.qty.gt(0).fillna(False), ["sku", "twice"]],
    }


def one_duckdb_pass(rows: list[dict[str, Any]]) -> dict[str, pd.DataFrame]:
    """Another implementation of the same tables, so that a common mistake has to be made twice."""
    types = {"qty": pa.int64(), "price": pa.float64(), "amount": pa.decimal128(12, 2)}
    plain = [{**r, "amount": None if r["amount"] is None else Decimal(r["amount"])} for r in rows]
    fields = [(c, types.get(c, pa.string())) for c in SCHEMA]
    schema = pa.schema([*fields, ("_partition", pa.int32()), ("_offset", pa.int64()), ("_at", pa.int64())])
    queries = {
        "by_region": BY_REGION,
        "doubled": DOUBLED,
        "orders": "SELECT * EXCLUDE (_at) FROM orders",
        "stats": """
            SELECT sku, count(*) AS rows_, count(qty) AS n, coalesce(sum(qty), 0) AS qty_sum,
                min(qty) AS qty_min, max(qty) AS qty_max, count(DISTINCT qty) AS qty_kinds,
                avg(price) AS price_mean, var_samp(price) AS price_var, stddev_samp(price) AS price_std,
                first(price ORDER BY _at, _partition, _offset) FILTER (price IS NOT NULL) AS price_first,
                last(price ORDER BY _at, _partition, _offset) FILTER (price IS NOT NULL) AS price_last
            FROM orders GROUP BY sku""",
        "latest": """
            SELECT sku, _partition, qty, _offset FROM orders
            QUALIFY row_number() OVER (PARTITION BY sku, _partition ORDER BY _offset DESC) = 1
                AND coalesce(qty, 0) >= 0""",
    }
    with duckdb.connect() as con:
        con.register("orders", pa.Table.from_pylist(plain, schema))
        return {
            name: con.sql(query).to_arrow_table().to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
            for name, query in queries.items()
        }


def check(shop: kf.Pipeline, world: World) -> None:
    in_file = set(
        shop.sql("SELECT table_name FROM information_schema.tables WHERE table_schema = 'main'")
        .df()
        .table_name
    )
    for how, expected in (("pandas", one_pandas_pass(world.rows)), ("DuckDB", one_duckdb_pass(world.rows))):
        for name, frame in expected.items():
            if name not in in_file:
                assert frame.empty, f"table {name} was never made"
                continue
            same(shop.read(name), frame, f"{name} against one {how} pass")
    dead = shop.dead_letters()
    assert sorted(zip(dead["partition"], dead["offset"], strict=True)) == sorted(world.dead)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(PHASES)
def test_tables_do_not_depend_on_batches_or_crashes(phases: list[Phase]) -> None:
    world = World()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "shop.duckdb")
        for phase in phases:
            world.add(phase)
            run(path, world, batch_rows_max=phase.batch_rows_max, fault=phase.fault).close()
        with run(path, world, batch_rows_max=phases[-1].batch_rows_max, fault=None) as shop:
            check(shop, world)


# ---- new fields -------------------------------------------------------------------------------------

WIDER = st.fixed_dictionaries(
    {"sku": st.sampled_from(["a", "b"])},
    optional={
        "qty": st.integers(0, 9),
        "extra": st.integers(-5, 5) | st.none(),
        "Note it": st.sampled_from(["x", ""]),
    },
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(WIDER, min_size=1, max_size=10), st.sampled_from([1, 2, 3, 100]), st.none() | FAULTS)
def test_new_fields_become_columns_in_the_batch_that_brings_them(
    values: list[dict[str, Any]], batch_rows_max: int, fault: Fault | None
) -> None:
    """Kills: the column added outside of the batch's transaction; rows of later batches without it."""
    log = MemorySource({"orders": values})
    with tempfile.TemporaryDirectory() as folder:
        for faults in (Faults(*([fault] if fault else [])), Faults()):
            path = os.path.join(folder, "shop.duckdb")
            shop = kf.Pipeline(path, source=log, batch_rows_max=batch_rows_max, at_edge=faults)
            shop.topic("orders", schema={"sku": "str", "qty": "int64"}, on_new_field="add")
            shop.land("orders")
            try:
                shop.run(progress=False)
            except (InjectedFault, KeyboardInterrupt):
                assert faults.fired
            got = shop.read("orders") if not faults.fired else None
            shop.close()
    expected = pd.DataFrame(values).dropna(axis="columns", how="all")
    assert got is not None
    same(got.dropna(axis="columns", how="all"), expected, "orders")


# ---- the helper for users' own steps ----------------------------------------------------------------


@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from("ab"), st.none() | st.integers(-9, 9)), min_size=1, max_size=8))
def test_check_batch_equivalence_accepts_a_step_that_reads_rows_alone(
    rows: list[tuple[str, int | None]],
) -> None:
    frame = pd.DataFrame(rows, columns=["sku", "qty"]).astype({"qty": "Int64"})
    cuts = [(), (1,), tuple(range(1, len(rows)))]
    check_batch_equivalence(lambda df: df[df.qty.gt(0).fillna(False)], frame, cuts=cuts)
    check_batch_equivalence(lambda df: df, frame, key="sku", cuts=cuts)
