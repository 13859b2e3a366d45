"""The values the protocol is made of. Frozen; no Kafka client, no database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import pyarrow as pa

from kframe import markup

_POSITIONS_SHOWN = 50

RECORDS = pa.schema(
    [
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("timestamp", pa.timestamp("ms", "UTC")),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("headers", pa.list_(pa.struct([("key", pa.string()), ("value", pa.binary())]))),
    ]
)
"""One topic's fetched records, in partition order of arrival. ``value`` null: a tombstone."""

PROVENANCE = ("_partition", "_offset", "_timestamp")
"""Columns that every decoded frame carries beside its fields, whether or not users asked for them."""

DEAD_LETTERS = pa.schema(
    [
        ("topic", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("timestamp", pa.timestamp("ms", "UTC")),
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("error", pa.string()),
    ]
)


class TopicPartition(NamedTuple):
    """One partition of one topic."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"


class Position(NamedTuple):
    """The next offset to read, and the leader epoch of the record before it (-1: unknown)."""

    offset: int
    leader_epoch: int = -1


class OffsetRange(NamedTuple):
    """Offsets ``[start, stop)`` of one partition; compaction and aborts may leave gaps inside."""

    topic: str
    partition: int
    start: int
    stop: int
    leader_epoch: int = -1
    """Leader epoch of the last record in the range; -1 when unknown."""

    @property
    def tp(self) -> TopicPartition:
        return TopicPartition(self.topic, self.partition)

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}] offsets [{self.start}, {self.stop})"

    def _repr_html_(self) -> str:
        return (
            f"<code>{markup.text(self)}</code> <small>{markup.count(self.stop - self.start)} offsets</small>"
        )


def show_ranges(ranges: Iterable[OffsetRange], most: int = 8) -> str:
    """The ranges as error messages name them; the first `most` of them, and how many follow."""
    shown = [str(r) for r in ranges]
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Fetched:
    """What a source hands over as one micro-batch: ranges, and their records by topic."""

    ranges: tuple[OffsetRange, ...]
    records: Mapping[str, pa.Table]

    @property
    def rows(self) -> int:
        return sum(t.num_rows for t in self.records.values())


@dataclass(frozen=True)
class Decoded:
    """One topic's decoded records.

    ``frame`` holds the schema's fields, then `PROVENANCE`, then what the topic includes; ``dead`` holds
    `DEAD_LETTERS`; ``new_fields`` maps unknown JSON fields to the type they would get.
    """

    frame: pa.Table
    dead: pa.Table
    tombstones: int = 0
    new_fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """Rows that one step wants in one table.

    ``append``: all rows are added. ``upsert``: rows replace those of the same `key` (each key at most once
    in `rows`). ``deletes``: keys to remove, the key columns only. ``places``: for each row of an upsert the
    rowid of the stored row that it replaces, NULL for a new one, where that is known (see `Store.steady`).
    """

    table: str
    rows: pa.Table
    key: tuple[str, ...] = ()
    deletes: pa.Table | None = None
    schema: str = "main"
    places: pa.ChunkedArray | None = None

    @property
    def kind(self) -> str:
        return "upsert" if self.key else "append"


class Defined(NamedTuple):
    """A table's definition, as the ledger keeps it.

    ``fingerprint`` changes when anything of it does; ``form`` says how its rows or groups are kept, and
    changes when those of before cannot be gone on with.
    """

    fingerprint: str
    form: str


OUTPUT = "_output"
"""The schema of a `Change` that is no table's: its rows only leave, through an `Outlet`."""


@dataclass(frozen=True)
class Outlet:
    """Where the changed rows of a step's table, or an output step's rows, go after the commit.

    ``target`` names whose outbox, ``name`` the topic or table there. ``records``: the rows become JSON
    records keyed by the columns `key`; else they go as they are. ``null_keys`` False: a row without a key is
    refused before the commit, as a compacted topic would refuse it after.
    """

    step: str
    target: str
    name: str
    key: tuple[str, ...] = ()
    records: bool = True
    null_keys: bool = True


@dataclass(frozen=True)
class Entry:
    """Rows on their way out: the ids ``[first_id, stop_id)`` of one target's outbox, which has no gaps.

    ``kind`` is ``"append"``, ``"upsert"`` or ``"delete"`` (then `rows` holds the key columns only). Records
    for Kafka are appended: columns ``key`` and ``value``, binary; a null value is a tombstone.
    """

    first_id: int
    stop_id: int
    batch_id: int
    name: str
    kind: str
    key: tuple[str, ...]
    rows: pa.Table


@dataclass(frozen=True)
class Limits:
    """How much one micro-batch may hold, and how long it may wait for more."""

    rows_max: int
    bytes_max: int
    interval_s: float


@dataclass(frozen=True)
class BatchReport:
    """One committed micro-batch, as the batch log keeps it."""

    batch_id: int
    ranges: tuple[OffsetRange, ...]
    rows: int
    dead_letters: int
    timings_ms: Mapping[str, float]
    committed_at: datetime


@dataclass(frozen=True)
class RunReport:
    """What a finished `Pipeline.run` did."""

    pipeline: str
    batches: int
    rows: int
    dead_letters: int
    seconds: float
    positions: Mapping[TopicPartition, int]

    def __repr__(self) -> str:
        rate = f", {self.rows / self.seconds:,.0f} rows/s" if self.seconds > 0 and self.rows else ""
        dead = f", {self.dead_letters:,} dead letters" if self.dead_letters else ""
        return (
            f"<RunReport {self.pipeline}: {self.rows:,} rows in {self.batches} batches{dead}, "
            f"{self.seconds:.1f} s{rate}>"
        )

    def _repr_html_(self) -> str:
        figures = [
            markup.figure(
                "rows", markup.count(self.rows), f"in {markup.counted(self.batches, 'batch', 'batches')}"
            ),
            markup.figure("time", markup.duration(self.seconds)),
        ]
        if self.seconds > 0 and self.rows:
            figures.append(markup.figure("on average", markup.rate(self.rows / self.seconds), "rows"))
        if self.dead_letters:
            figures.append(
                markup.figure("dead letters", markup.count(self.dead_letters), "see dead_letters()")
            )
        shown = list(self.positions.items())[:_POSITIONS_SHOWN]
        positions = markup.pairs((str(tp), markup.count(offset)) for tp, offset in shown)
        rest = len(self.positions) - len(shown)
        more = f"<small>and {rest} more</small>" if rest else ""
        folded = f"<details><summary>positions</summary>{positions}{more}</details>" if shown else ""
        head = markup.heading(self.pipeline, "run finished")
        return markup.card(f"{head}<div>{''.join(figures)}</div>{folded}")


@dataclass(frozen=True)
class Partial:
    """What a task made of its ranges: every step's rows or partial aggregate, and the dead letters.

    ``frames`` holds the decoded records that steps reading tables still need. Nothing in it is committed.
    """

    ranges: tuple[OffsetRange, ...]
    rows: int
    results: Mapping[str, pa.Table]
    frames: Mapping[str, pa.Table]
    dead: pa.Table
    tombstones: int
    new_fields: Mapping[str, Mapping[str, str]]
    timings_ms: Mapping[str, float]
