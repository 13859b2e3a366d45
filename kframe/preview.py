"""What a step would make of some records, worked out beside the store: nothing is committed."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from kframe.ahead import Prepared
from kframe.batch.decode import Decoder, private_connection
from kframe.commit.store import Store, quote
from kframe.errors import StepError
from kframe.model import RECORDS, Fetched, OffsetRange, Position, TopicPartition
from kframe.sinks.table import prepare, write
from kframe.source.bounded import read_bounded
from kframe.source.protocol import Source
from kframe.timings import Timings
from kframe.transform.lookup import table_rows
from kframe.transform.step import Step
from kframe.worker import run_step


def latest_records(source: Source, decoders: Mapping[str, Decoder], n: int) -> Prepared:
    """The decoded records of each topic's latest `n` offsets."""
    ranges: list[OffsetRange] = []
    for topic, info in source.describe(decoders).items():
        tps = [TopicPartition(topic, p) for p in range(info.partitions)]
        low, high = source.offsets(tps, "earliest"), source.offsets(tps, "latest")
        ranges += [OffsetRange(*tp, high[tp] - m, high[tp]) for tp, m in dealt(low, high, n).items() if m]
    return read_ranges(source, decoders, ranges)


def read_ranges(source: Source, decoders: Mapping[str, Decoder], ranges: Sequence[OffsetRange]) -> Prepared:
    """The decoded records of offset ranges, of every topic in partition order."""
    starts = {r.tp: Position(r.start) for r in ranges}
    found = read_bounded(source, starts, {r.tp: r.stop for r in ranges}) if starts else {}
    order = [("partition", "ascending"), ("offset", "ascending")]
    records = {t: found.get(t, RECORDS.empty_table()).sort_by(order) for t in decoders}
    return Prepared(Fetched(tuple(ranges), records), decoders, Timings())


def dealt(
    low: Mapping[TopicPartition, int], high: Mapping[TopicPartition, int], n: int
) -> dict[TopicPartition, int]:
    """How many of `n` offsets each partition gives; what a short one lacks, the longer ones give."""
    shares: dict[TopicPartition, int] = {}
    for i, tp in enumerate(sorted(high, key=lambda tp: high[tp] - low[tp])):
        even = -(-(n - sum(shares.values())) // (len(high) - i))
        shares[tp] = min(high[tp] - low[tp], even)
    return shares


def preview(
    store: Store, step: Step, frames: Mapping[str, pa.Table], ranges: Sequence[OffsetRange]
) -> pa.Table:
    """The table of `step` as it would be if these were all the records; the tables it reads are the store's.

    Parameters
    ----------
    frames : mapping of str to Table
        Decoded rows of each of the step's topics.
    ranges : sequence of OffsetRange
        Where they come from; named when the step's function raises.

    Raises
    ------
    StepError
        The function raised. ``frames`` holds what it was called with.
    """
    tables = _tables(store, step, frames)
    with private_connection() as con:
        try:
            partial = run_step(step, con, frames, tables, ranges)
        except StepError as error:
            raise error.retold(
                kept="It was a preview: tables and positions are as they were.",
                hint="The error's .frames holds what the function was called with.",
            ) from error.__cause__
        prepare(con, [step], {name: rows.schema for name, rows in {**tables, **frames}.items()})
        for change in step.merge(con, partial):
            write(con, change)
        return _result(con, step.name, partial)


def _tables(store: Store, step: Step, frames: Mapping[str, pa.Table]) -> dict[str, pa.Table]:
    """The rows of the tables that the step reads, all of one snapshot."""
    cur = store.cursor()
    cur.execute("BEGIN TRANSACTION")
    try:
        return {table: table_rows(cur, table, [], step, frames) for table in step.tables}
    finally:
        with contextlib.suppress(duckdb.Error, RuntimeError):
            cur.execute("ROLLBACK")
        cur.close()


def _result(con: duckdb.DuckDBPyConnection, table: str, partial: pa.Table) -> pa.Table:
    """The table's rows; where a step without any rows has made none, the columns that it gave."""
    try:
        return con.sql(f"FROM main.{quote(table)}").to_arrow_table()
    except duckdb.CatalogException:
        return partial
