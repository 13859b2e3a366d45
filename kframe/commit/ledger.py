"""What DuckDB remembers of a pipeline: epoch, positions, batches, dead letters, gaps.

The ledger is the truth; Kafka's group offsets only mirror it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import duckdb
import pyarrow as pa

from kframe.commit.store import Store, registered
from kframe.errors import ConfigError, DefinitionError, Fenced, Restoring
from kframe.model import BatchReport, Defined, OffsetRange, Position, TopicPartition

Cursor = duckdb.DuckDBPyConnection

_ADVANCE = """
UPDATE _kframe.positions AS p SET position = r.stop, leader_epoch = r.leader_epoch
FROM (
    SELECT unnest(?::VARCHAR[]) AS topic, unnest(?::INTEGER[]) AS partition, unnest(?::BIGINT[]) AS start,
           unnest(?::BIGINT[]) AS stop, unnest(?::INTEGER[]) AS leader_epoch
) AS r
WHERE p.pipeline = ? AND p.epoch = ? AND p.topic = r.topic AND p.partition = r.partition
  AND p.position = r.start
"""
"""By the columns of `OffsetRange`: for a few rows as lists a third less than as an Arrow table."""


class Ledger:
    """One pipeline's rows in the ``_kframe`` schema.

    Methods that take a cursor write inside its transaction; the others read in a snapshot of their own.
    """

    def __init__(self, store: Store, pipeline: str) -> None:
        self.store = store
        self.pipeline = pipeline
        self.epoch = -1

    # ---- taking over --------------------------------------------------------------------------------

    def claim(self, cur: Cursor, owner: str, cluster_id: str | None) -> None:
        """Make this run the owner: a new epoch, which fences every earlier one.

        Raises
        ------
        Fatal
            The positions belong to another Kafka cluster.
        """
        row = self._row(cur, "SELECT epoch, cluster_id FROM _kframe.pipelines WHERE name = ?")
        if row is None:
            cur.execute(
                "INSERT INTO _kframe.pipelines VALUES (?, 1, ?, ?, 0)", [self.pipeline, owner, cluster_id]
            )
            self.epoch = 1
        else:
            _check_cluster(self.pipeline, row[1], cluster_id)
            self.epoch = int(row[0]) + 1
            cur.execute(
                "UPDATE _kframe.pipelines SET epoch = ?, owner = ?, cluster_id = coalesce(cluster_id, ?) "
                "WHERE name = ?",
                [self.epoch, owner, cluster_id, self.pipeline],
            )
        cur.execute("UPDATE _kframe.positions SET epoch = ? WHERE pipeline = ?", [self.epoch, self.pipeline])

    def changed(self, cur: Cursor, definitions: Mapping[str, Defined]) -> list[str]:
        """Names of tables whose rows were committed under another definition.

        Raises
        ------
        DefinitionError
            Another pipeline of this file writes a table of that name, or its rows are kept in another form.
        """
        self._check_owner(cur, definitions)
        stored = self._read("SELECT name, fingerprint, form FROM _kframe.tables WHERE pipeline = ?", cur=cur)
        for name, _, form in stored:
            if name in definitions and definitions[name].form != form:
                raise DefinitionError(
                    f"Table {name!r} is stored as {form}; its definition of now keeps "
                    f"{definitions[name].form}. The one cannot be gone on with as the other.",
                    kept="Nothing was changed.",
                    hint=f"pipeline.rebuild({name!r}) computes it anew. Or give it another name.",
                )
        now = {name: definition.fingerprint for name, definition in definitions.items()}
        return [name for name, old, _ in stored if now.get(name, old) != old]

    def define(self, cur: Cursor, definitions: Mapping[str, Defined]) -> None:
        """Store the definitions that this transaction's rows are made by.

        Raises
        ------
        DefinitionError
            Another pipeline of this file writes a table of that name.
        """
        self._check_owner(cur, definitions)
        for name, defined in definitions.items():
            cur.execute("DELETE FROM _kframe.tables WHERE pipeline = ? AND name = ?", [self.pipeline, name])
            cur.execute("INSERT INTO _kframe.tables VALUES (?, ?, ?, ?)", [self.pipeline, name, *defined])

    def _check_owner(self, cur: Cursor, definitions: Mapping[str, Defined]) -> None:
        others = self._read("SELECT name, pipeline FROM _kframe.tables WHERE pipeline <> ?", cur=cur)
        for name, owner in others:
            if name in definitions:
                raise DefinitionError(
                    f"Table {name!r} is written by pipeline {owner!r} in this file.",
                    kept="Nothing was changed.",
                    hint="Give one of the two another name.",
                )

    # ---- topics and positions -----------------------------------------------------------------------

    def topics(self) -> dict[str, tuple[str | None, dict[str, str] | None]]:
        """Each known topic's id in Kafka and pinned schema (None when nothing is pinned)."""
        rows = self._read('SELECT topic, topic_id, "schema" FROM _kframe.topics WHERE pipeline = ?')
        return {topic: (topic_id, json.loads(text) if text else None) for topic, topic_id, text in rows}

    def pin_topic(
        self, cur: Cursor, topic: str, topic_id: str | None, schema: Mapping[str, str] | None
    ) -> None:
        """Remember which topic, by id, and which schema the positions and tables belong to."""
        cur.execute("DELETE FROM _kframe.topics WHERE pipeline = ? AND topic = ?", [self.pipeline, topic])
        text = json.dumps(dict(schema)) if schema is not None else None
        cur.execute("INSERT INTO _kframe.topics VALUES (?, ?, ?, ?)", [self.pipeline, topic, topic_id, text])

    def positions(self, cur: Cursor | None = None) -> dict[TopicPartition, Position]:
        """The next offset to read of every partition seen so far."""
        rows = self._read(
            "SELECT topic, partition, position, leader_epoch FROM _kframe.positions WHERE pipeline = ? "
            "ORDER BY topic, partition",
            cur=cur,
        )
        return {TopicPartition(topic, part): Position(pos, epoch) for topic, part, pos, epoch in rows}

    def first_positions(self) -> dict[TopicPartition, int]:
        """Where the first batch of every partition began; its position when there was none."""
        rows = self._read(
            "SELECT r.topic, r.partition, min(r.start) FROM "
            "(SELECT unnest(ranges) AS r FROM _kframe.batches WHERE pipeline = ?) GROUP BY ALL"
        )
        first = {TopicPartition(topic, partition): start for topic, partition, start in rows}
        return {tp: first.get(tp, p.offset) for tp, p in self.positions().items()}

    def add_positions(self, cur: Cursor, new: Mapping[TopicPartition, Position]) -> None:
        """Begin partitions that the ledger has not seen."""
        for tp, position in new.items():
            cur.execute(
                "INSERT INTO _kframe.positions VALUES (?, ?, ?, ?, ?, ?)",
                [self.pipeline, tp.topic, tp.partition, position.offset, position.leader_epoch, self.epoch],
            )

    def advance(self, cur: Cursor, ranges: Sequence[OffsetRange]) -> None:
        """Move the positions over `ranges`: compare-and-set, the fence against every other writer.

        Raises
        ------
        Fenced
            A position was not at its range's start, or a newer epoch owns it. The caller must roll back.
        """
        if not ranges:
            return
        columns = map(list, zip(*ranges, strict=True))
        try:
            moved = _updated(cur, _ADVANCE, [*columns, self.pipeline, self.epoch])
        except duckdb.TransactionException as error:
            raise self._fenced() from error
        if moved != len(ranges):
            raise self._fenced()

    def skip(
        self, cur: Cursor, lost: Sequence[OffsetRange], positions: Mapping[TopicPartition, Position]
    ) -> None:
        """Move positions over lost ranges, to the side of each where the log still is."""
        for r in lost:
            target = r.stop if positions[r.tp].offset == r.start else r.start
            cur.execute(
                "UPDATE _kframe.positions SET position = ?, leader_epoch = -1 "
                "WHERE pipeline = ? AND epoch = ? AND topic = ? AND partition = ?",
                [target, self.pipeline, self.epoch, r.topic, r.partition],
            )

    def record_batch(self, cur: Cursor, report: BatchReport, tombstones: int) -> None:
        """Write the batch log's row and take its id. The id is dense: no row, no gap.

        Raises
        ------
        Fenced
            Another run took this batch's id.
        """
        taken = _updated(
            cur,
            "UPDATE _kframe.pipelines SET next_batch_id = next_batch_id + 1 "
            "WHERE name = ? AND epoch = ? AND next_batch_id = ?",
            [self.pipeline, self.epoch, report.batch_id],
        )
        if not taken:
            raise self._fenced()
        ranges = [{k: v for k, v in r._asdict().items() if k != "leader_epoch"} for r in report.ranges]
        timings = {k: round(v, 3) for k, v in report.timings_ms.items()}
        cur.execute(
            "INSERT INTO _kframe.batches SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?",
            [
                self.pipeline,
                report.batch_id,
                self.epoch,
                ranges,
                report.rows,
                report.dead_letters,
                tombstones,
                timings,
                report.committed_at,
            ],
        )

    def next_batch_id(self, cur: Cursor | None = None) -> int:
        """The id that the next committed batch gets."""
        rows = self._read("SELECT next_batch_id FROM _kframe.pipelines WHERE name = ?", cur=cur)
        return int(rows[0][0]) if rows else 0

    def check_whole(self, cur: Cursor) -> None:
        """Raise `Restoring` while the tables are being restored from a changelog."""
        if self._read("SELECT 1 FROM _kframe.followed WHERE pipeline = ? AND NOT whole", cur=cur):
            raise Restoring(
                f"The tables of {self.pipeline!r} are being restored from its changelog.",
                kept="Nothing was read.",
                hint="Ask again when it is done, or run again when it was cut short: it goes on from there.",
            )

    def follows(self) -> bool:
        """Whether the tables have been taken from a changelog, or are being."""
        return bool(self._read("SELECT 1 FROM _kframe.followed WHERE pipeline = ?"))

    def follow_nothing(self, cur: Cursor) -> None:
        """Forget the changelog."""
        for table in ("followed", "columns"):
            cur.execute(f"DELETE FROM _kframe.{table} WHERE pipeline = ?", [self.pipeline])

    def last_committed_at(self) -> datetime | None:
        """When the last batch was committed."""
        rows = self._read("SELECT epoch_ms(max(committed_at)) FROM _kframe.batches WHERE pipeline = ?")
        return datetime.fromtimestamp(rows[0][0] / 1000, UTC) if rows[0][0] is not None else None

    def has_batch(self, batch_id: int) -> bool:
        """Whether this epoch's batch is durable in the file."""
        return bool(
            self._read(
                "SELECT 1 FROM _kframe.batches WHERE pipeline = ? AND batch_id = ? AND epoch = ?",
                batch_id,
                self.epoch,
            )
        )

    def batch(self, batch_id: int) -> tuple[tuple[OffsetRange, ...], int]:
        """The ranges of a committed batch, and how many records they held.

        Raises
        ------
        ConfigError
            There is no such batch, or it read nothing from the log.
        """
        found = self._read(
            "SELECT ranges, rows FROM _kframe.batches WHERE pipeline = ? AND batch_id = ?", batch_id
        )
        if not found or not found[0][0]:
            why = (
                "read nothing from the log: it tried dead letters again" if found else "is not in the ledger"
            )
            raise ConfigError(f"Batch {batch_id} {why}.", hint="pipeline.batches() lists the last ones.")
        return tuple(OffsetRange(**r) for r in found[0][0]), int(found[0][1])

    # ---- dead letters and gaps ----------------------------------------------------------------------

    def bury(self, cur: Cursor, batch_id: int, dead: pa.Table) -> None:
        """Write dead letters (columns `DEAD_LETTERS`) into the ledger."""
        if dead.num_rows == 0:
            return
        with registered(cur, "_kframe_dead", dead) as rows:
            cur.execute(
                f'INSERT INTO _kframe.dead_letters SELECT ?, ?, topic, partition, "offset", "timestamp", '
                f'"key", "value", error FROM {rows}',
                [self.pipeline, batch_id],
            )

    def dead_letters(self, cur: Cursor | None = None) -> pa.Table:
        """The pipeline's dead letters: batch_id, topic, partition, offset, timestamp, key, value, error."""
        query = (
            "SELECT * EXCLUDE (pipeline) FROM _kframe.dead_letters WHERE pipeline = $1 "
            'ORDER BY topic, partition, "offset"'
        )
        return (cur or self.store.cursor()).sql(query, params=[self.pipeline]).to_arrow_table()

    def exhume(self, cur: Cursor) -> pa.Table:
        """Remove the pipeline's dead letters, and return them; those that fail again are buried anew."""
        exhumed = self.dead_letters(cur)
        cur.execute("DELETE FROM _kframe.dead_letters WHERE pipeline = ?", [self.pipeline])
        return exhumed

    def record_gaps(self, cur: Cursor, ranges: Iterable[OffsetRange], reason: str) -> None:
        """Name offsets that were never read, and why. Told once for each range."""
        for r in ranges:
            key = [self.pipeline, r.topic, r.partition, r.start, r.stop, reason]
            known = cur.execute(
                "SELECT 1 FROM _kframe.gaps WHERE pipeline = ? AND topic = ? AND partition = ? "
                "AND start = ? AND stop = ? AND reason = ?",
                key,
            ).fetchall()
            if not known:
                cur.execute("INSERT INTO _kframe.gaps VALUES (?, ?, ?, ?, ?, ?, ?)", [*key, now()])

    # ---- tables -------------------------------------------------------------------------------------

    def side_tables(self) -> list[str]:
        """Names of the tables that the user has stored beside the steps'."""
        rows = self._read("SELECT name FROM _kframe.tables WHERE pipeline = ? AND fingerprint = 'side'")
        return [name for (name,) in rows]

    def forget(self, cur: Cursor) -> list[str]:
        """Remove all but side tables and gaps, under a new epoch; the names of the steps' tables to drop."""
        told = "SELECT name FROM _kframe.tables WHERE pipeline = $1 AND fingerprint <> 'side'"
        names = self._read(f"{told} UNION SELECT table_name FROM _kframe.columns WHERE pipeline = $1")
        for table in ("positions", "topics", "batches", "dead_letters", "columns"):
            cur.execute(f"DELETE FROM _kframe.{table} WHERE pipeline = ?", [self.pipeline])
        cur.execute(
            "DELETE FROM _kframe.tables WHERE pipeline = ? AND fingerprint <> 'side'", [self.pipeline]
        )
        cur.execute(
            "UPDATE _kframe.pipelines SET epoch = epoch + 1, next_batch_id = 0, cluster_id = NULL "
            "WHERE name = ?",
            [self.pipeline],
        )
        return [name for (name,) in names]

    # ---- reading ------------------------------------------------------------------------------------

    def _read(self, query: str, *values: object, cur: Cursor | None = None) -> list[tuple[Any, ...]]:
        return (cur or self.store.cursor()).execute(query, [self.pipeline, *values]).fetchall()

    def _row(self, cur: Cursor, query: str) -> tuple[Any, ...] | None:
        return cur.execute(query, [self.pipeline]).fetchone()

    def _fenced(self) -> Fenced:
        return Fenced(
            f"Pipeline {self.pipeline!r}: another run has taken over (this one is epoch {self.epoch}).",
            kept="This batch was rolled back; the other run's results and positions stand.",
            hint="Use the newer run, or start this one again: it goes on from the stored positions.",
        )


def _updated(cur: Cursor, update: str, values: Sequence[object]) -> int:
    """Run an UPDATE; how many rows it changed."""
    ((rows,),) = cur.execute(update, values).fetchall()
    return int(rows)


def now() -> datetime:
    """The current time, with zone."""
    return datetime.now(UTC)


def _check_cluster(pipeline: str, stored: str | None, seen: str | None) -> None:
    if stored and seen and stored != seen:
        raise Fenced(
            f"Pipeline {pipeline!r} has positions of Kafka cluster {stored}, but these brokers are {seen}.",
            kept="Nothing was changed.",
            hint="Use the brokers of that cluster, another file or name=, or pipeline.rewind('earliest').",
        )
