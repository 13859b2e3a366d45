"""The thread that drains a Kafka consumer into columns, and a bounded queue to the engine."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import confluent_kafka as ck
import numpy as np
import pyarrow as pa

from kframe.errors import Fatal, UnreadableRecord
from kframe.model import RECORDS, Fetched, Limits, OffsetRange, Position, TopicPartition
from kframe.source.drain import Broken, Columns, Drain

_FIRST_ROWS = 5  # while the size of the records is unknown
_CHUNK_ROWS = 5_120  # per conversion to Arrow; 24 of them fill one of DuckDB's row groups
_CHUNK_SHARE = 8  # a chunk holds at most this part of a batch's bytes
_POLL_S = 0.05  # how long the client may wait for more records, and a chunk for more of them
_IDLE_S = 1.0  # without any record, `take` comes back this often
_ENDS_S = 0.5  # between two looks at the ends that the client has seen
_LOST = (ck.KafkaError._AUTO_OFFSET_RESET, ck.KafkaError._LOG_TRUNCATION)


class OffsetOutOfRange(Exception):
    """The log does not have the next offset of a partition."""

    def __init__(self, partition: TopicPartition) -> None:
        super().__init__(str(partition))
        self.partition = partition


class Reader:
    """Reads partitions from given positions until closed, or until every stop is reached.

    Parameters
    ----------
    drain : Drain
        The reader's own from now on.
    positions, stops : mapping
        Where to begin, and where to end (None: nowhere).
    limits : Limits
        Of one batch. As much again may wait here; then the consumer's own queue fills, and fetching stops.
    alive : callable
        Called when records have come.
    """

    def __init__(
        self,
        drain: Drain,
        positions: Mapping[TopicPartition, Position],
        stops: Mapping[TopicPartition, int] | None,
        *,
        limits: Limits,
        alive: Callable[[], None],
    ) -> None:
        self._drain = drain
        self._stops = stops
        self._limits = limits
        self._chunk_rows = math.ceil(limits.rows_max / math.ceil(limits.rows_max / _CHUNK_ROWS))
        self._chunk_bytes = limits.bytes_max // _CHUNK_SHARE
        self._poll_s = min(_POLL_S, limits.interval_s / 4)
        self._alive = alive
        self.ends: Mapping[TopicPartition, int] = {}
        """The log's ends as of the last fetches, replaced as a whole."""
        self._ends_due = 0.0
        self._next = dict(positions)
        self._taken = {tp: p.offset for tp, p in positions.items()}
        self._open = {tp for tp, p in positions.items() if stops is None or p.offset < stops[tp]}
        self._queue: deque[_Chunk] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._to_acknowledge: dict[TopicPartition, Position] = {}
        drain.assign({tp: positions[tp] for tp in self._open})
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="kframe-fetch", daemon=True).start()

    def next_offset(self, tp: TopicPartition) -> int:
        """The offset behind the last record of `tp` that was fetched."""
        return self._next[tp].offset

    def take(self, plan: tuple[OffsetRange, ...], stopped: Callable[[], bool]) -> Fetched:
        """What has been fetched, up to the limits; the ranges tile onto the plan's starts.

        The first record waits for others no longer than the interval; a full batch doesn't wait. Raises what
        ended the fetching, once everything before it has been taken.
        """
        self._check_plan(plan)
        chunks: list[_Chunk] = []
        rows = size = 0
        deadline = time.monotonic() + _IDLE_S
        while not stopped():
            with self._changed:
                while self._queue and _fits(rows, size, self._queue[0], self._limits):
                    chunk = self._queue.popleft()
                    chunks.append(chunk)
                    rows, size = rows + chunk.rows, size + chunk.bytes
                    self._queued_bytes -= chunk.bytes
                self._changed.notify_all()
                if chunks:
                    deadline = chunks[0].since + self._limits.interval_s
                left = deadline - time.monotonic()
                if self._queue or rows >= self._limits.rows_max or left <= 0 or not self._open:
                    break
                if self._failure is not None:
                    if chunks:
                        break
                    raise self._failure
                self._changed.wait(min(left, _POLL_S))
        for chunk in chunks:
            self._taken.update((tp, position.offset) for tp, position in chunk.next.items())
        return _fetched(plan, chunks)

    def _check_plan(self, plan: tuple[OffsetRange, ...]) -> None:
        """A plan that begins elsewhere than the last `take` ended would skip records, or read them twice."""
        for r in plan:
            if self._taken.get(r.tp) != r.start:
                raise Fatal(
                    f"{r.tp} is at {self._taken.get(r.tp)} in the reader, but at {r.start} in the ledger.",
                    kept="Nothing of this batch was committed.",
                    hint="Run again: it begins at the ledger's positions. Please report this defect.",
                )

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Have the fetching thread commit `positions` to the group; a call from here would wait for it."""
        with self._changed:
            self._to_acknowledge |= positions

    def close(self) -> None:
        """End the thread and the consumer."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._ended.wait()  # not join(): interrupted, it would call a live thread dead before Python 3.13
        self._commit_group()
        self._drain.close()

    # ---- the fetching thread ------------------------------------------------------------------------

    def _run(self) -> None:
        drain, consume_rows, since = self._drain, _FIRST_ROWS, 0.0
        try:
            while self._open and self._has_room():
                self._commit_group()
                self._look_at_ends()
                if drain.empty:
                    since = time.monotonic()
                rows, size = drain.rows, drain.bytes
                drain.take(min(consume_rows, self._chunk_rows - rows), self._poll_s)
                rows, size = drain.rows - rows, drain.bytes - size
                if rows:
                    self._alive()
                    consume_rows = min(drain.at_once, 1 + self._chunk_bytes * rows // (size + 1))
                waited = time.monotonic() - since >= self._poll_s
                full = drain.rows == self._chunk_rows or drain.bytes > self._chunk_bytes
                if full or (waited and not drain.empty):
                    self._put(since)
        except BaseException as error:
            self._put(since)
            with self._changed:
                self._failure = error if not isinstance(error, Broken) else self._explained(error)
                self._changed.notify_all()
        finally:
            self._ended.set()

    def _has_room(self) -> bool:
        with self._changed:
            while self._queued_bytes > self._limits.bytes_max and not self._closing:
                self._changed.wait()
            return not self._closing

    def _commit_group(self) -> None:
        with self._changed:
            positions, self._to_acknowledge = self._to_acknowledge, {}
        if positions:
            self._drain.acknowledge(positions)

    def _look_at_ends(self) -> None:
        """Note the ends that came with fetched records; the client keeps them, so no broker is asked."""
        now = time.monotonic()
        if now >= self._ends_due:
            self._ends_due = now + _ENDS_S
            seen = {tp: self._drain.end(tp) for tp in self._open}
            self.ends = {**self.ends, **{tp: end for tp, end in seen.items() if end >= 0}}

    def _put(self, since: float) -> None:
        """Queue what has come as a chunk, without what lies at or beyond the stops."""
        records, behind = _within(self._drain.cut(), self._open, self._stops)
        for tp, position in behind.items():
            if position.leader_epoch < 0:  # behind markers alone: that of the last record still holds
                behind[tp] = Position(position.offset, self._next[tp].leader_epoch)
        chunk = _Chunk(records, behind, since)
        with self._changed:
            self._queue.append(chunk)
            self._queued_bytes += chunk.bytes
            for tp, position in chunk.next.items():
                self._next[tp] = position
                if self._stops is not None and position.offset >= self._stops[tp]:
                    self._open.discard(tp)
            self._changed.notify_all()

    def _explained(self, broken: Broken) -> Exception:
        if broken.error.code() in _LOST:
            return OffsetOutOfRange(broken.tp)
        at = self.next_offset(broken.tp) if broken.tp in self._next else -1
        return UnreadableRecord(
            f"{broken.tp} cannot be read at offset {at}: {broken.error.str()}",
            kept=f"Everything before offset {at} is committed or will be read again; nothing was skipped.",
            hint="If it is larger than the client takes, raise receive.message.max.bytes in kafka_config.",
        )


class _Chunk:
    """Records by topic, the positions behind them, and since when the first of them has waited."""

    __slots__ = ("bytes", "next", "records", "rows", "since")

    def __init__(
        self, records: dict[str, pa.RecordBatch], next_: dict[TopicPartition, Position], since: float
    ) -> None:
        self.since = since
        self.records = records
        self.next = next_
        self.rows = sum(batch.num_rows for batch in records.values())
        self.bytes = sum(batch.nbytes for batch in records.values())


def _within(
    columns: Columns, open_: set[TopicPartition], stops: Mapping[TopicPartition, int] | None
) -> Columns:
    """The columns without what lies at or beyond `stops`, and of `open_` partitions alone."""
    records, next_ = columns
    if stops is not None:
        records = {topic: _before(batch, topic, open_, stops) for topic, batch in records.items()}
    next_ = {
        tp: p if stops is None or p.offset <= stops[tp] else Position(stops[tp], p.leader_epoch)
        for tp, p in next_.items()
        if tp in open_
    }
    return {topic: batch for topic, batch in records.items() if batch.num_rows}, next_


def _before(
    batch: pa.RecordBatch, topic: str, open_: set[TopicPartition], stops: Mapping[TopicPartition, int]
) -> pa.RecordBatch:
    """The records that lie before their partition's stop."""
    partitions = batch.column("partition").to_numpy()
    ends = np.zeros(partitions.max() + 1, np.int64)
    for partition in np.unique(partitions):
        tp = TopicPartition(topic, int(partition))
        ends[partition] = stops[tp] if tp in open_ else -1
    keep = batch.column("offset").to_numpy() < ends[partitions]
    return batch if keep.all() else batch.filter(pa.array(keep))


def _fits(rows: int, size: int, chunk: _Chunk, limits: Limits) -> bool:
    """Whether a batch may take another chunk; the first one always."""
    return rows == 0 or (rows + chunk.rows <= limits.rows_max and size + chunk.bytes <= limits.bytes_max)


def _fetched(plan: tuple[OffsetRange, ...], chunks: list[_Chunk]) -> Fetched:
    """The chunks as one set of ranges that begin where the plan's begin."""
    next_: dict[TopicPartition, Position] = {}
    for chunk in chunks:
        next_.update(chunk.next)
    ranges = tuple(
        OffsetRange(r.topic, r.partition, r.start, next_[r.tp].offset, next_[r.tp].leader_epoch)
        for r in plan
        if r.tp in next_ and next_[r.tp].offset > r.start
    )
    topics = dict.fromkeys(topic for chunk in chunks for topic in chunk.records)
    records = {
        topic: pa.Table.from_batches([c.records[topic] for c in chunks if topic in c.records], RECORDS)
        for topic in topics
    }
    return Fetched(ranges, records)
