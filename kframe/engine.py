"""The batch protocol, and nothing else.

::

    positions <- ledger
    plan      <- offset ranges
    partials  <- fetch, decode, steps that read records alone      (executor: pure, repeatable)
    changes   <- partials merged with what the store holds
    BEGIN     changes, outbox, dead letters, batch log; positions by compare-and-set     COMMIT
    acknowledge
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import duckdb
import pyarrow as pa

from kframe.ahead import Ahead, Prepared
from kframe.batch.decode import Decoder
from kframe.batch.plan import plan_batch, split, tiled
from kframe.commit.ledger import Ledger, now
from kframe.commit.outbox import Outbox
from kframe.commit.store import Store
from kframe.commit.transaction import transaction
from kframe.errors import AbortBatch, TooManyDeadLetters, TopicRecreated
from kframe.executors.local import Executor
from kframe.model import (
    OUTPUT,
    BatchReport,
    Change,
    Fetched,
    Limits,
    OffsetRange,
    Outlet,
    Partial,
    Position,
    TopicPartition,
)
from kframe.sinks.outbox import post
from kframe.sinks.table import prepare, write
from kframe.source.protocol import Source
from kframe.timings import Timings
from kframe.transform.lookup import table_rows, table_schema
from kframe.transform.output import shown
from kframe.transform.step import Step, defined
from kframe.worker import AtEdge, Worker, complete, run_step, touched

EDGES = (
    "planned",
    "fetched",
    "decoded",
    "transformed",
    "begun",
    "rows_written",
    "positions_written",
    "committed",
    "acknowledged",
)
"""The protocol's edges in order; ``at_edge`` is told each."""

Journal = Callable[[duckdb.DuckDBPyConnection, BatchReport, Sequence[Change], pa.Table | None, bool], None]
"""Told, in the batch's transaction, what it has written, the dead letters that it has removed, and whether
definitions may have changed with it."""


class Engine:
    """Runs one pipeline's micro-batches, one after the other, on one thread.

    Parameters
    ----------
    store, ledger, source, executor
        Where results go, what is remembered, where records come from, where tasks run.
    decoders : dict of str to Decoder
        By topic; a new field replaces its topic's decoder when the batch that brought it commits.
    steps : callable
        The steps as defined now, in order. Asked once a batch, so definitions may change between batches.
    topic_ids : mapping of str to str
        The topics that the positions belong to.
    stops : mapping or None
        Where a bounded run ends.
    journal : Journal, optional
    dead_letters_max_ratio : float
        Of all records of this run (at least 100 are counted); more stops the run.
    outlets : sequence of Outlet
        Which changed rows leave, through the outbox.
    """

    def __init__(
        self,
        *,
        store: Store,
        ledger: Ledger,
        source: Source,
        executor: Executor,
        decoders: dict[str, Decoder],
        steps: Callable[[], Sequence[Step]],
        topic_ids: Mapping[str, str],
        positions: Mapping[TopicPartition, Position],
        limits: Limits,
        stops: Mapping[TopicPartition, int] | None,
        stopped: Callable[[], bool],
        dead_letters_max_ratio: float,
        at_edge: AtEdge,
        outlets: Sequence[Outlet] = (),
        journal: Journal | None = None,
    ) -> None:
        self.store = store
        self.ledger = ledger
        self.source = source
        self.executor = executor
        self.decoders = decoders
        self.limits = limits
        self.stops = stops
        self.positions = dict(positions)
        self.rows = self.dead_letters = self.batches = 0
        self._batch_id = ledger.next_batch_id()  # the ledger refuses it if another run has taken it
        self._steps = steps
        self._topic_ids = topic_ids
        self._stopped = stopped
        self._dead_letters_max_ratio = dead_letters_max_ratio
        self._at_edge = at_edge
        self._outlets = outlets
        self._journal = journal
        self._outbox = Outbox(store, ledger.pipeline)
        self._defined: Sequence[Step] | None = None
        self._worker: Worker | None = None
        self._ahead = Ahead(self._read, limits, enabled=not any(d.learns for d in decoders.values()))

    # ---- the protocol -------------------------------------------------------------------------------

    def run_batch(self) -> BatchReport | None:
        """One micro-batch; None when nothing has come, or the run is at its end."""
        steps = self._steps()
        plan = plan_batch(self.positions, self.stops)
        if not plan:
            return None
        self._at_edge("planned")
        partials = list(self.executor.run(self._task(steps), split(plan, self.executor.slots())))
        ranges = tiled(plan, (r for p in partials for r in p.ranges))
        if not ranges:
            return None
        try:
            self._check_dead_letters(partials)
            self._check_topics()
            with self.store.steady():
                return self._commit(steps, partials, ranges)
        except AbortBatch as error:
            error.ranges = error.ranges or ranges
            raise

    def retry(self, records: Fetched) -> BatchReport:
        """Run records that are already paid for (dead letters) through the steps, without new positions."""
        steps = self._steps()
        partial = self._task(steps).transform(Prepared(records, self.decoders, Timings()))
        with self.store.steady():
            return self._commit(steps, [partial], (), replaces_dead_letters=True)

    def restart_source(self) -> None:
        """Read on from the ledger's positions: after trouble, or when partitions were added."""
        self._ahead.drop()
        self.source.start(self.positions, self.stops, self.limits)

    def close(self) -> None:
        """End what was begun in advance. The run has been told to stop, so that nothing waits for records."""
        self._ahead.close()

    @property
    def done(self) -> bool:
        """Whether a bounded run has reached its stops."""
        return self.stops is not None and not plan_batch(self.positions, self.stops)

    def _commit(
        self,
        steps: Sequence[Step],
        partials: Sequence[Partial],
        ranges: tuple[OffsetRange, ...],
        *,
        replaces_dead_letters: bool = False,
    ) -> BatchReport:
        if steps is not self._defined:
            self.ledger.changed(self.store.cursor(), defined(steps))  # before a step meets what is stored
        timings = _merged_timings(partials)
        with timings.stage("steps"):
            changes = self._changes(steps, partials, ranges)
        self._at_edge("transformed")
        dead = pa.concat_tables([p.dead for p in partials])
        report = BatchReport(
            self._batch_id, ranges, sum(p.rows for p in partials), dead.num_rows, timings, now()
        )
        with transaction(self.store, lambda: self.ledger.has_batch(report.batch_id)) as cur:
            self._at_edge("begun")
            with timings.stage("write"):
                self._define(cur, steps)
                for change in changes:
                    if change.schema != OUTPUT:
                        write(cur, change)
                if self._outlets:
                    self._post(cur, report.batch_id, steps, changes)
                exhumed = self.ledger.exhume(cur) if replaces_dead_letters else None
                self.ledger.bury(cur, report.batch_id, dead)
                self._pin_new_fields(cur, partials)
            self._at_edge("rows_written")
            self.ledger.record_batch(cur, report, sum(p.tombstones for p in partials))
            self.ledger.advance(cur, ranges)
            if self._journal is not None:
                news = steps is not self._defined or any(p.new_fields for p in partials)
                self._journal(cur, report, changes, exhumed, news)
            self._at_edge("positions_written")
        self._at_edge("committed")
        self._committed(steps, partials, report)
        self.source.acknowledge({r.tp: self.positions[r.tp] for r in ranges})
        self._at_edge("acknowledged")
        return report

    # ---- its parts ----------------------------------------------------------------------------------

    def _task(self, steps: Sequence[Step]) -> Worker:
        if self._worker is None or self._worker.steps is not steps:
            self._worker = Worker(self._ahead.take, self.decoders, steps)
        return self._worker

    def _read(self, plan: tuple[OffsetRange, ...]) -> Prepared:
        timings = Timings()
        with timings.stage("fetch"):
            fetched = self.source.fetch(plan, self._stopped)
        self._at_edge("fetched")
        prepared = Prepared(fetched, self.decoders, timings)
        self._at_edge("decoded")
        return prepared

    def _changes(
        self, steps: Sequence[Step], partials: Sequence[Partial], ranges: tuple[OffsetRange, ...]
    ) -> list[Change]:
        """Every step's changed rows, in the order of definition; later steps see earlier ones' rows."""
        changes: list[Change] = []
        if steps is not self._defined and any(step.tables for step in steps):
            with transaction(self.store, lambda: False) as cur:  # what a step reads must be there
                prepare(cur, steps, self._schemas(cur, steps))
        cur = self.store.cursor()
        con = self._task(steps).con
        for step in steps:
            found = [p.results[step.name] for p in partials if step.name in p.results]
            for p in (p for p in partials if step.tables and touched(step, p.frames)):
                frames = complete(step, p.frames, self.decoders)
                tables = {t: table_rows(cur, t, changes, step, frames) for t in step.tables}
                found.append(run_step(step, con, frames, tables, ranges))
            if found:
                changes += step.merge(cur, step.combine(con, found))
        return changes

    def _post(
        self, cur: duckdb.DuckDBPyConnection, batch_id: int, steps: Sequence[Step], changes: Sequence[Change]
    ) -> None:
        """Put the rows that leave into the outbox."""
        seen = shown(cur, steps, changes, {outlet.step for outlet in self._outlets})
        post(cur, self._outbox, self._outlets, seen, batch_id)

    def _define(self, cur: duckdb.DuckDBPyConnection, steps: Sequence[Step]) -> None:
        """Store new definitions, and make the tables and views that they need."""
        if steps is not self._defined:
            self.ledger.define(cur, defined(steps))
            prepare(cur, steps, self._schemas(cur, steps))

    def _schemas(self, cur: duckdb.DuckDBPyConnection, steps: Sequence[Step]) -> dict[str, pa.Schema]:
        """Columns of every topic and table that the steps read."""
        return {
            **{t: table_schema(cur, t) for step in steps for t in step.tables},
            **{topic: decoder.empty().schema for topic, decoder in self.decoders.items()},
        }

    def _pin_new_fields(self, cur: duckdb.DuckDBPyConnection, partials: Sequence[Partial]) -> None:
        for partial in partials:
            for topic, fields in partial.new_fields.items():
                schema = self.decoders[topic].with_fields(fields).schema
                self.ledger.pin_topic(cur, topic, self._topic_ids[topic], schema.to_dict())

    def _committed(self, steps: Sequence[Step], partials: Sequence[Partial], report: BatchReport) -> None:
        for partial in partials:
            for topic, fields in partial.new_fields.items():
                self.decoders[topic] = self.decoders[topic].with_fields(fields)
        for r in report.ranges:
            self.positions[r.tp] = Position(r.stop, r.leader_epoch)
        self._defined = steps
        self._batch_id += 1
        self.rows += report.rows
        self.dead_letters += report.dead_letters
        self.batches += 1

    def _check_topics(self) -> None:
        """The topics must still be those that the ledger's positions belong to."""
        for topic, info in self.source.describe(self._topic_ids).items():
            if info.topic_id != self._topic_ids[topic]:
                raise recreated(topic, self._topic_ids[topic], info.topic_id)

    def _check_dead_letters(self, partials: Sequence[Partial]) -> None:
        dead = self.dead_letters + sum(p.dead.num_rows for p in partials)
        rows = max(self.rows + sum(p.rows for p in partials), 100)
        if dead > self._dead_letters_max_ratio * rows:
            first = next(p.dead.slice(0, 1).to_pylist()[0] for p in partials if p.dead.num_rows)
            raise TooManyDeadLetters(
                f"{dead:,} of {rows:,} records could not be decoded, more than dead_letters_max_ratio="
                f"{self._dead_letters_max_ratio:g} allows. The first of this batch: "
                f"{first['topic']}[{first['partition']}] offset {first['offset']}: {first['error']}",
                kept="The batch was rolled back; tables and positions are as they were.",
                hint="Correct the topic's schema= or format=, or raise the limit.",
            )


def recreated(topic: str, old: str, new: str) -> TopicRecreated:
    """The error for a topic whose id is another one than the ledger's."""
    return TopicRecreated(
        f"Topic {topic!r} was deleted and made again: the positions belong to id {old}, it is now {new}.",
        kept="Nothing of the new topic was committed; tables and positions are as they were.",
        hint="Use another file or name= for the new topic, or pipeline.rewind('earliest') to begin anew.",
    )


def _merged_timings(partials: Sequence[Partial]) -> Timings:
    merged = Timings()
    for partial in partials:
        for stage, ms in partial.timings_ms.items():
            merged[stage] = merged.get(stage, 0.0) + ms
    return merged
