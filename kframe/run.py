"""One run of a pipeline: take over, find the positions, loop over batches, end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping

from tqdm.auto import tqdm

from kframe.batch.infer import infer_schema
from kframe.commit.ledger import Ledger
from kframe.commit.store import Store
from kframe.commit.transaction import interrupts_deferred, transaction
from kframe.config import Options
from kframe.definition import Definition, Topic
from kframe.engine import Engine, recreated
from kframe.errors import (
    BrokerUnavailable,
    ConfigError,
    DefinitionError,
    LostRange,
    is_interrupt,
)
from kframe.executors.local import Executor, LocalExecutor
from kframe.model import BatchReport, Fetched, Position, RunReport, TopicPartition
from kframe.schema import Schema
from kframe.source.bounded import read_bounded
from kframe.source.protocol import Source, TopicInfo
from kframe.worker import AtEdge

TRANSITIONS = {
    "new": {"running", "failed", "stopped"},
    "running": {"paused", "stopping", "stopped", "failed"},
    "paused": {"running", "stopping"},
    "stopping": {"stopped", "failed"},
    "stopped": set(),
    "failed": set(),
}
"""The states of a run, and which may follow which."""

_INFER_ROWS = 1000
_RETRY_S = 1.0
_METADATA_S = 5.0
_WAL_BYTES = 256 << 20


class Run:
    """One run. `execute` does it on the calling thread; every other method may be called from any thread.

    Parameters
    ----------
    until_end : bool
        Stop at the end offsets seen at the start, or follow the topics for ever.
    progress : bool
        Show a progress bar.
    """

    def __init__(
        self,
        *,
        definition: Definition,
        options: Options,
        store: Store,
        ledger: Ledger,
        source: Source,
        executor: Executor | None,
        until_end: bool,
        progress: bool,
        at_edge: AtEdge,
    ) -> None:
        self.state = "new"
        self.error: BaseException | None = None
        self.trouble: str | None = None
        self.engine: Engine | None = None
        self.last: BatchReport | None = None
        self.ended = threading.Event()
        self.started_at = time.monotonic()
        self._definition = definition
        self._options = options
        self._store = store
        self._ledger = ledger
        self._source = source
        self._executor = executor or LocalExecutor()
        self._until_end = until_end
        self._progress = progress
        self._at_edge = at_edge
        self._stop = threading.Event()
        self._unpaused = threading.Event()
        self._unpaused.set()
        self._snapshot_due = 0.0
        self._stops: dict[TopicPartition, int] | None = None

    # ---- steering -----------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the run to end after the running batch."""
        self._stop.set()
        self._unpaused.set()

    def pause(self) -> None:
        """Hold before the next batch."""
        self._unpaused.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._unpaused.set()

    def execute(self) -> RunReport:
        """Run until the end, a stop, or an error, which is kept in ``error`` and raised."""
        try:
            self._become("running")
            self.engine = self._prepare()
            self._loop(self.engine)
            self._finish()
            self._become("stopped")
            return self.report()
        except BaseException as raised:
            error = KeyboardInterrupt() if is_interrupt(raised) else raised
            self.error = error
            self.state = "failed"
            if isinstance(error, KeyboardInterrupt):
                error.add_note(
                    f"kframe: pipeline {self._definition.pipeline!r} was interrupted. Committed batches "
                    "stand, a running one was rolled back; the next run goes on from the stored positions."
                )
            if error is raised:
                raise
            raise error from None
        finally:
            self._end()

    def retry(self, records: Fetched) -> RunReport:
        """Run dead letters through the steps once more, in one transaction."""
        try:
            self._become("running")
            self.engine = self._prepare()
            self.last = self.engine.retry(records)
            self._become("stopped")
            return self.report()
        except BaseException as error:
            self.error, self.state = error, "failed"
            raise
        finally:
            self._end()

    def _end(self) -> None:
        self._stop.set()
        with interrupts_deferred():  # a second Ctrl-C would leave the source open, and the run without an end
            if self.engine is not None:
                self.engine.close()
            self._source.close()
            self.ended.set()

    def report(self) -> RunReport:
        """What the run has done so far."""
        engine = self.engine
        return RunReport(
            self._definition.pipeline,
            engine.batches if engine else 0,
            engine.rows if engine else 0,
            engine.dead_letters if engine else 0,
            time.monotonic() - self.started_at,
            {tp: p.offset for tp, p in engine.positions.items()} if engine else {},
        )

    # ---- the loop -----------------------------------------------------------------------------------

    def _loop(self, engine: Engine) -> None:
        look_again = time.monotonic() + _METADATA_S
        with self._bar(engine) as advance:
            while not self._stop.is_set() and not engine.done:
                if not self._unpaused.is_set():
                    self._hold()
                    continue
                try:
                    report = engine.run_batch()
                    if not self._until_end and time.monotonic() >= look_again:
                        self._add_partitions(engine)
                        look_again = time.monotonic() + _METADATA_S
                except BrokerUnavailable as error:
                    self._rewind_source(engine, error)
                    continue
                self.trouble = self._source.trouble()
                if report is not None:
                    self.last = report
                    advance(sum(r.stop - r.start for r in report.ranges))
                    self._after_commit()

    def _hold(self) -> None:
        self._become("paused")
        self._unpaused.wait()
        self._become("stopping" if self._stop.is_set() else "running")

    def _rewind_source(self, engine: Engine, error: BrokerUnavailable) -> None:
        """Nobody answered before the commit: wait, then read the batch again from the ledger's positions."""
        while not self._stop.wait(_RETRY_S):
            self.trouble = error.what
            with contextlib.suppress(BrokerUnavailable):
                engine.restart_source()
                return

    def _after_commit(self) -> None:
        with contextlib.suppress(OSError):
            if os.path.getsize(self._store.path + ".wal") > _WAL_BYTES:
                self._store.checkpoint()
        if self._options.snapshot_to and time.monotonic() >= self._snapshot_due:
            self._snapshot()

    def _snapshot(self) -> None:
        began = time.monotonic()
        self._store.snapshot(self._options.snapshot_to or "")
        took = time.monotonic() - began
        self._snapshot_due = began + max(1.0, 10 * took)  # copying stays a small part of the work

    def _finish(self) -> None:
        self._store.checkpoint()
        if self._options.snapshot_to:
            self._snapshot()

    def _become(self, state: str) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state

    @contextlib.contextmanager
    def _bar(self, engine: Engine) -> Iterator[Callable[[int], object]]:
        total = sum(engine.stops[tp] - p.offset for tp, p in engine.positions.items()) if engine.stops else 0
        with tqdm(
            total=total,
            desc=self._definition.pipeline,
            unit=" records",
            unit_scale=True,
            disable=None if self._progress and self._until_end else True,
        ) as bar:
            yield bar.update

    # ---- taking over --------------------------------------------------------------------------------

    def _prepare(self) -> Engine:
        """Claim the pipeline, check its topics, settle schemas and positions, and start the source."""
        self._definition.check_runnable()
        topics = self._definition.read_topics()
        infos = self._source.describe(topics)
        known = self._ledger.topics()
        for topic, (topic_id, _) in known.items():
            if topic in infos and topic_id != infos[topic].topic_id:
                raise recreated(topic, topic_id or "?", infos[topic].topic_id)
        schemas = {t: schema_of(self._source, self._definition.topics[t], infos[t], known) for t in topics}
        missing = self._missing_positions(infos, known)
        cluster_id = self._source.cluster_id()
        with transaction(self._store, lambda: False) as cur:
            self._ledger.claim(cur, _owner(), cluster_id)
            fingerprints = {s.name: s.fingerprint() for s in self._definition.steps}
            self._tell_changes(self._ledger.changed(cur, fingerprints))
            for topic in topics:
                self._ledger.pin_topic(cur, topic, infos[topic].topic_id, schemas[topic].to_dict())
            self._ledger.add_positions(cur, missing)
        positions = {tp: p for tp, p in self._ledger.positions().items() if tp.topic in infos}
        positions = self._start_source(positions)
        return Engine(
            store=self._store,
            ledger=self._ledger,
            source=self._source,
            executor=self._executor,
            decoders={t: self._definition.topics[t].decoder(schemas[t]) for t in topics},
            steps=lambda: self._definition.steps,
            topic_ids={t: infos[t].topic_id for t in topics},
            positions=positions,
            limits=self._options.limits,
            stops=self._stops,
            stopped=self._stopped,
            dead_letters_max_ratio=self._options.dead_letters_max_ratio,
            at_edge=self._at_edge,
        )

    def _stopped(self) -> bool:
        return self._stop.is_set() or not self._unpaused.is_set()

    def _missing_positions(
        self, infos: Mapping[str, TopicInfo], known: Mapping[str, object]
    ) -> dict[TopicPartition, Position]:
        """Where unseen partitions begin: those of a new topic as asked, those of a grown one at its start."""
        stored = self._ledger.positions()
        new = [TopicPartition(t, p) for t, i in infos.items() for p in range(i.partitions)]
        new = [tp for tp in new if tp not in stored]
        first = [tp for tp in new if tp.topic not in known]
        grown = [tp for tp in new if tp.topic in known]
        offsets = self._source.offsets(grown, "earliest") if grown else {}
        if first:
            offsets |= self._source.offsets(first, self._options.start_from)
        return {tp: Position(offset) for tp, offset in offsets.items()}

    def _start_source(self, positions: dict[TopicPartition, Position]) -> dict[TopicPartition, Position]:
        """Start reading at the ledger's positions; what is lost is named, and skipped if asked."""
        self._stops = self._source.offsets(positions, "latest") if self._until_end else None
        try:
            self._source.start(positions, self._stops, self._options.limits)
            return positions
        except LostRange as lost:
            skip = self._options.on_lost_range == "skip"
            with transaction(self._store, lambda: False) as cur:
                self._ledger.record_gaps(cur, lost.ranges, "skipped" if skip else "lost")
                if skip:
                    self._ledger.skip(cur, lost.ranges, positions)
            if not skip:
                raise
        stored = self._ledger.positions()
        positions = {tp: stored[tp] for tp in positions}
        self._source.start(positions, self._stops, self._options.limits)
        return positions

    def _add_partitions(self, engine: Engine) -> None:
        """Start to read partitions that the topics have gained."""
        infos = self._source.describe(self._definition.read_topics())
        missing = self._missing_positions(infos, infos)
        if not missing:
            return
        with transaction(self._store, lambda: False) as cur:
            self._ledger.add_positions(cur, missing)
        engine.positions.update(missing)
        engine.restart_source()

    def _tell_changes(self, changed: list[str]) -> None:
        if not changed:
            return
        names = ", ".join(changed)
        if self._options.on_definition_change == "stop":
            raise DefinitionError(
                f"The definition of {names} has changed since the last run.",
                kept="Nothing was changed.",
                hint='Go on with on_definition_change="warn", or compute anew: pipeline.rebuild(name).',
            )
        warnings.warn(
            f"kframe: the definition of {names} has changed since the last run; rows committed before keep "
            "the old one. To compute them anew: pipeline.rebuild(name).",
            stacklevel=2,
        )


def schema_of(
    source: Source,
    topic: Topic,
    info: TopicInfo,
    known: Mapping[str, tuple[str | None, dict[str, str] | None]],
) -> Schema:
    """The declared schema, or the one pinned in the ledger, or one inferred from the first records."""
    pinned = known.get(topic.name, (None, None))[1]
    if topic.schema is not None:
        if topic.on_new_field == "add" and pinned is not None:
            return topic.schema.with_fields(
                {k: v for k, v in pinned.items() if k not in topic.schema.to_dict()}
            )
        return topic.schema
    if pinned is not None:
        return Schema.parse(pinned)
    values = first_values(source, topic.name, info)
    if not values:
        raise ConfigError(
            f"Topic {topic.name!r} is empty, so its schema cannot be inferred.",
            kept="Nothing was changed.",
            hint='Give one: topic("...", schema={"column": "type"}), or run again once it holds records.',
        )
    return infer_schema(values, topic.format)


def first_values(source: Source, topic: str, info: TopicInfo) -> list[bytes]:
    """Up to 1,000 values from the beginning of a topic's partitions, tombstones left out."""
    tps = [TopicPartition(topic, p) for p in range(info.partitions)]
    low, high = source.offsets(tps, "earliest"), source.offsets(tps, "latest")
    share = max(1, _INFER_ROWS // len(tps))
    stops = {tp: min(high[tp], low[tp] + share) for tp in tps}
    positions = {tp: Position(low[tp]) for tp in tps if low[tp] < stops[tp]}
    if not positions:
        return []
    records = read_bounded(source, positions, stops).get(topic)
    return [v for v in records["value"].to_pylist() if v is not None] if records is not None else []


def _owner() -> str:
    return f"PID {os.getpid()} on {socket.gethostname()}"


@contextlib.contextmanager
def stop_on_sigterm(run: Run) -> Iterator[None]:
    """Let SIGTERM end `run` after its batch, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
