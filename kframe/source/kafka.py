"""Apache Kafka as a source, with the client's hazards kept in this module."""

from __future__ import annotations

import contextlib
import difflib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import confluent_kafka as ck
import numpy as np
import pyarrow as pa
from confluent_kafka.admin import AdminClient, OffsetSpec

from kframe.errors import BrokerUnavailable, ConfigError, KframeError, LostRange, UnreadableRecord
from kframe.model import RECORDS, Fetched, Limits, OffsetRange, Position, TopicPartition
from kframe.source.protocol import Start, TopicInfo
from kframe.source.settings import Settings
from kframe.source.start import to_epoch_ms

_CONSUME_ROWS = 500  # per call; longer lists of records cost more in the garbage collector than they save
_POLL_TIMEOUT_S = 0.25
_ADMIN_TIMEOUT_S = 10.0
_TRANSPORT = {ck.KafkaError._TRANSPORT, ck.KafkaError._ALL_BROKERS_DOWN, ck.KafkaError._TIMED_OUT}


class KafkaSource:
    """Reads a Kafka cluster's topics from given positions; nobody's group decides where.

    Parameters
    ----------
    settings : Settings
    group_id : str
        Where `acknowledge` commits, for dashboards.
    queue_bytes : int, bytes
        How much fetched data may wait for the engine.
    headers : collection of str
        Topics whose records' headers are wanted.
    """

    def __init__(
        self, settings: Settings, *, group_id: str, queue_bytes: int = 64 << 20, headers: Iterable[str] = ()
    ) -> None:
        self._settings = settings
        self._group_id = group_id
        self._queue_bytes = queue_bytes
        self._headers = frozenset(headers)
        self._trouble: str | None = None
        self._reader: _Reader | None = None
        with _redacted(settings):
            self._admin = AdminClient({**settings.admin(), "error_cb": self._on_error})

    def __repr__(self) -> str:
        return f"<KafkaSource {self._settings!r}>"

    # ---- metadata -----------------------------------------------------------------------------------

    def cluster_id(self) -> str | None:
        """The cluster's id."""
        described = self._ask(lambda: self._admin.describe_cluster(request_timeout=_ADMIN_TIMEOUT_S).result())
        return str(described.cluster_id) if described.cluster_id else None

    def describe(self, topics: Iterable[str]) -> dict[str, TopicInfo]:
        """Ids and partition counts of `topics`."""
        futures = self._ask(
            lambda: self._admin.describe_topics(
                ck.TopicCollection(list(topics)), request_timeout=_ADMIN_TIMEOUT_S
            )
        )
        found = {}
        for topic, future in futures.items():
            try:
                described = self._ask(future.result)
            except ck.KafkaException as error:
                if error.args[0].code() == ck.KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise self._no_such_topic(topic) from None
                raise
            found[topic] = TopicInfo(str(described.topic_id), len(described.partitions))
        return found

    def offsets(
        self, partitions: Iterable[TopicPartition], at: Start, *, committed: bool = True
    ) -> dict[TopicPartition, int]:
        """Offsets at a point of the log. The end is the read_committed end, unless ``committed=False``."""
        tps = list(partitions)
        if isinstance(at, Mapping):
            return {tp: int(at[tp.partition]) for tp in tps}
        isolation = ck.IsolationLevel.READ_COMMITTED if committed else ck.IsolationLevel.READ_UNCOMMITTED
        spec = _offset_spec(at)
        futures = self._ask(
            lambda: self._admin.list_offsets(
                {ck.TopicPartition(tp.topic, tp.partition): spec for tp in tps},
                isolation_level=isolation,
                request_timeout=_ADMIN_TIMEOUT_S,
            )
        )
        found = {
            TopicPartition(tp.topic, tp.partition): int(self._ask(future.result).offset)
            for tp, future in futures.items()
        }
        after_all = [tp for tp, offset in found.items() if offset < 0]  # no record at or after that time
        return {**found, **self.offsets(after_all, "latest")} if after_all else found

    # ---- reading ------------------------------------------------------------------------------------

    def start(
        self, positions: Mapping[TopicPartition, Position], stops: Mapping[TopicPartition, int] | None
    ) -> None:
        """Begin to read at `positions`, as far as `stops`."""
        self.close()
        self._check_not_lost(positions)
        with _redacted(self._settings):
            consumer = ck.Consumer({**self._settings.consumer(self._group_id), "error_cb": self._on_error})
        self._reader = _Reader(consumer, positions, stops, self._queue_bytes, self._headers, self._recovered)

    def fetch(self, plan: tuple[OffsetRange, ...], limits: Limits, stopped: Callable[[], bool]) -> Fetched:
        """The records that have arrived since the last call, waiting for them as `limits` allow."""
        assert self._reader is not None, "start() first"
        try:
            return self._reader.take(plan, limits, stopped)
        except _OffsetOutOfRange as error:
            raise self._lost_at(error.partition) from None

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Mirror `positions` into Kafka's group offsets, without waiting."""
        if self._reader is not None:
            self._reader.acknowledge(positions)

    def trouble(self) -> str | None:
        """The client's last complaint, until a record arrives again."""
        return self._trouble

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # ---- trouble ------------------------------------------------------------------------------------

    def _on_error(self, error: Any) -> None:
        if error.code() in _TRANSPORT or error.fatal():
            self._trouble = self._settings.redact(error.str())

    def _recovered(self) -> None:
        self._trouble = None

    def _ask(self, call: Callable[[], Any]) -> Any:
        """A call to the cluster; `BrokerUnavailable` when nobody answers."""
        try:
            answer = call()
        except ck.KafkaException as error:
            if error.args[0].code() in _TRANSPORT:
                raise BrokerUnavailable(
                    f"No answer from the brokers: {self._settings.redact(error.args[0].str())}",
                    kept="Tables and positions are as they were.",
                    hint="Check brokers= and the network, or start one with kf.local_kafka().",
                ) from None
            raise
        self._recovered()
        return answer

    def _no_such_topic(self, topic: str) -> ConfigError:
        names = list(self._ask(lambda: self._admin.list_topics(timeout=_ADMIN_TIMEOUT_S)).topics)
        near = difflib.get_close_matches(topic, names, n=1)
        return ConfigError(
            f"Topic {topic!r} does not exist on these brokers.",
            kept="Nothing was changed.",
            hint=f"Did you mean {near[0]!r}?" if near else "Create it, or check the name and brokers=.",
        )

    def _check_not_lost(self, positions: Mapping[TopicPartition, Position]) -> None:
        low = self.offsets(positions, "earliest")
        high = self.offsets(positions, "latest", committed=False)
        lost = [
            OffsetRange(tp.topic, tp.partition, p.offset, low[tp])
            for tp, p in positions.items()
            if p.offset < low[tp]
        ]
        ahead = [
            OffsetRange(tp.topic, tp.partition, high[tp], p.offset)
            for tp, p in positions.items()
            if p.offset > high[tp]
        ]
        if lost or ahead:
            raise LostRange.of(lost, ahead)

    def _lost_at(self, tp: TopicPartition) -> LostRange:
        assert self._reader is not None
        at = self._reader.next_offset(tp)
        low = self.offsets([tp], "earliest")[tp]
        if low > at:
            return LostRange.of([OffsetRange(tp.topic, tp.partition, at, low)], [])
        end = self.offsets([tp], "latest", committed=False)[tp]
        return LostRange.of([], [OffsetRange(tp.topic, tp.partition, end, at)])


class _OffsetOutOfRange(Exception):
    def __init__(self, partition: TopicPartition) -> None:
        super().__init__(str(partition))
        self.partition = partition


class _Chunk:
    """What one ``consume`` call brought: records by topic, and the next offsets behind them."""

    __slots__ = ("bytes", "next", "records", "rows")

    def __init__(self, records: dict[str, pa.RecordBatch], next_: dict[TopicPartition, Position]) -> None:
        self.records = records
        self.next = next_
        self.rows = sum(batch.num_rows for batch in records.values())
        self.bytes = sum(batch.nbytes for batch in records.values())


class _Reader:
    """A consumer, the thread that drains it into columns, and a queue of bounded size between the two."""

    def __init__(
        self,
        consumer: Any,
        positions: Mapping[TopicPartition, Position],
        stops: Mapping[TopicPartition, int] | None,
        queue_bytes: int,
        headers: frozenset[str],
        alive: Callable[[], None],
    ) -> None:
        self.consumer = consumer
        self._stops = stops
        self._queue_bytes = queue_bytes
        self._headers = headers
        self._alive = alive
        self._fetched = {tp: p.offset for tp, p in positions.items()}
        self._open = {tp for tp in positions if stops is None or self._fetched[tp] < stops[tp]}
        self._queue: deque[_Chunk] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._failure: BaseException | None = None
        self._to_acknowledge: dict[TopicPartition, Position] = {}
        consumer.assign([_assignment(tp, positions[tp]) for tp in self._open])
        self._thread = threading.Thread(target=self._run, name="kframe-fetch", daemon=True)
        self._thread.start()

    def next_offset(self, tp: TopicPartition) -> int:
        """The offset behind the last record of `tp` that was fetched."""
        return self._fetched[tp]

    def take(self, plan: tuple[OffsetRange, ...], limits: Limits, stopped: Callable[[], bool]) -> Fetched:
        """Chunks up to the limits; the ranges tile onto the plan's starts."""
        chunks: list[_Chunk] = []
        rows = size = 0
        deadline = time.monotonic() + limits.interval_s
        while not stopped():
            with self._changed:
                while self._queue and rows < limits.rows_max and size < limits.bytes_max:
                    if chunks and rows + self._queue[0].rows > limits.rows_max:
                        break
                    chunk = self._queue.popleft()
                    chunks.append(chunk)
                    rows, size = rows + chunk.rows, size + chunk.bytes
                    self._queued_bytes -= chunk.bytes
                self._changed.notify_all()
                full = bool(self._queue) or rows >= limits.rows_max or size >= limits.bytes_max
                left = deadline - time.monotonic()
                if full or not self._open or left <= 0:
                    break
                if self._failure is not None:
                    if chunks:
                        break  # what came before the failure is good; it is raised by the next call
                    raise self._failure
                self._changed.wait(min(left, _POLL_TIMEOUT_S))
        return _fetched(plan, chunks)

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Have `positions` committed to the group: by the fetching thread, for a call from here would wait."""
        with self._changed:
            self._to_acknowledge |= positions

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._commit_group()
        self.consumer.close()

    # ---- the fetching thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._open and self._has_room():
                self._commit_group()
                messages = self.consumer.consume(_CONSUME_ROWS, timeout=_POLL_TIMEOUT_S)
                if messages:
                    self._put(self._chunk(messages))
                    self._alive()
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _commit_group(self) -> None:
        with self._changed:
            positions, self._to_acknowledge = self._to_acknowledge, {}
        if positions:
            offsets = [ck.TopicPartition(tp.topic, tp.partition, p.offset) for tp, p in positions.items()]
            with contextlib.suppress(ck.KafkaException, RuntimeError):
                self.consumer.commit(offsets=offsets, asynchronous=True)

    def _has_room(self) -> bool:
        with self._changed:
            while self._queued_bytes > self._queue_bytes and not self._closing:
                self._changed.wait()
            return not self._closing

    def _put(self, chunk: _Chunk) -> None:
        with self._changed:
            self._queue.append(chunk)
            self._queued_bytes += chunk.bytes
            for tp, position in chunk.next.items():
                self._fetched[tp] = position.offset
                if self._stops is not None and position.offset >= self._stops[tp]:
                    self._open.discard(tp)
            self._changed.notify_all()

    def _chunk(self, messages: list[Any]) -> _Chunk:
        if any([m.error() for m in messages]):
            ends, messages = self._split_errors(messages)
        else:
            ends = {}
        records: dict[str, pa.RecordBatch] = {}
        next_: dict[TopicPartition, Position] = {}
        for topic, of_topic in _by_topic(messages):
            batch, positions = self._columns(topic, of_topic)
            if batch.num_rows:
                records[topic] = batch
            next_.update(positions)
        for tp, end in ends.items():
            if tp in self._open:
                reached = next_.get(tp, Position(self._fetched[tp]))
                stop = self._stops[tp] if self._stops is not None else end
                next_[tp] = Position(max(min(end, stop), reached.offset), reached.leader_epoch)
        return _Chunk(records, next_)

    def _split_errors(self, messages: list[Any]) -> tuple[dict[TopicPartition, int], list[Any]]:
        """Ends of partitions, and the records; any real error is raised."""
        ends: dict[TopicPartition, int] = {}
        good = []
        for message in messages:
            error = message.error()
            if error is None:
                good.append(message)
                continue
            tp = TopicPartition(message.topic() or "", message.partition())
            if error.code() == ck.KafkaError._PARTITION_EOF:
                ends[tp] = message.offset()
            elif error.code() in (ck.KafkaError._AUTO_OFFSET_RESET, ck.KafkaError._LOG_TRUNCATION):
                raise _OffsetOutOfRange(tp)
            elif error.code() not in _TRANSPORT and not error.retriable():
                raise self._unreadable(tp, error)
        return ends, good

    def _unreadable(self, tp: TopicPartition, error: Any) -> KframeError:
        at = self._fetched.get(tp, -1)
        return UnreadableRecord(
            f"{tp} cannot be read at offset {at}: {error.str()}",
            kept=f"Everything before offset {at} can still be committed; positions are as they were.",
            hint="A batch larger than the client allows: raise receive.message.max.bytes in kafka_config.",
        )

    def _columns(
        self, topic: str, messages: list[Any]
    ) -> tuple[pa.RecordBatch, dict[TopicPartition, Position]]:
        partitions = np.fromiter((m.partition() for m in messages), np.int32, len(messages))
        offsets = np.fromiter((m.offset() for m in messages), np.int64, len(messages))
        batch = pa.RecordBatch.from_arrays(
            [
                pa.array(partitions),
                pa.array(offsets),
                pa.array(
                    np.fromiter((m.timestamp()[1] for m in messages), np.int64, len(messages)),
                    type=pa.int64(),
                ).cast(RECORDS.field("timestamp").type),
                pa.array([m.key() for m in messages], pa.binary()),
                pa.array([m.value() for m in messages], pa.binary()),
                self._header_column(topic, messages),
            ],
            schema=RECORDS,
        )
        return self._within(topic, batch, partitions, offsets, messages)

    def _header_column(self, topic: str, messages: list[Any]) -> pa.Array:
        type_ = RECORDS.field("headers").type
        if topic not in self._headers:
            return pa.nulls(len(messages), type_)
        return pa.array([[{"key": k, "value": v} for k, v in m.headers() or ()] for m in messages], type_)

    def _within(
        self, topic: str, batch: pa.RecordBatch, partitions: Any, offsets: Any, messages: list[Any]
    ) -> tuple[pa.RecordBatch, dict[TopicPartition, Position]]:
        """Drop records at or beyond the stops; the positions behind the rest."""
        keep = np.ones(len(offsets), bool)
        positions = {}
        for partition in np.unique(partitions):
            tp = TopicPartition(topic, int(partition))
            here = np.flatnonzero(partitions == partition)
            last = offsets[here[-1]]
            stop = self._stops[tp] if self._stops is not None else None
            if tp not in self._open:
                keep[here] = False
                continue
            if stop is not None and last >= stop:
                keep[here[offsets[here] >= stop]] = False
                positions[tp] = Position(stop, _leader_epoch(messages, here[offsets[here] < stop]))
            else:
                positions[tp] = Position(int(last) + 1, _leader_epoch(messages, here))
        return (batch if keep.all() else batch.filter(pa.array(keep))), positions


def _leader_epoch(messages: list[Any], rows: Any) -> int:
    epoch = messages[rows[-1]].leader_epoch() if len(rows) else None
    return -1 if epoch is None else int(epoch)


def _by_topic(messages: list[Any]) -> Iterable[tuple[str, list[Any]]]:
    if not messages:
        return []
    topics = [m.topic() for m in messages]
    names = dict.fromkeys(topics)
    if len(names) == 1:
        return [(topics[0], messages)]
    return [(name, [m for m, t in zip(messages, topics, strict=True) if t == name]) for name in names]


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


def _assignment(tp: TopicPartition, position: Position) -> Any:
    if position.leader_epoch >= 0:
        return ck.TopicPartition(tp.topic, tp.partition, position.offset, leader_epoch=position.leader_epoch)
    return ck.TopicPartition(tp.topic, tp.partition, position.offset)


def _offset_spec(at: Start) -> Any:
    if at == "earliest":
        return OffsetSpec.earliest()
    if at == "latest":
        return OffsetSpec.latest()
    return OffsetSpec.for_timestamp(to_epoch_ms(at))


@contextlib.contextmanager
def _redacted(settings: Settings) -> Any:
    """The client echoes wrong values in its errors; pass them on without the values."""
    try:
        yield
    except ck.KafkaException as error:
        raise ConfigError(
            f"Kafka's client refuses the configuration: {settings.redact(str(error.args[0].str()))}",
            hint="Check the names and values in kafka_config (values are not shown here).",
        ) from None
