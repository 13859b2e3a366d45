"""From Kafka's client to columns: the interface, and the drain that goes by the client's Python objects."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import confluent_kafka as ck
import pyarrow as pa

from kframe.model import RECORDS, Position, TopicPartition

Columns = tuple[dict[str, pa.RecordBatch], dict[TopicPartition, Position]]
"""Records by topic (columns `RECORDS`), and the positions behind them."""

TRANSPORT = {ck.KafkaError._TRANSPORT, ck.KafkaError._ALL_BROKERS_DOWN, ck.KafkaError._TIMED_OUT}
"""The codes of trouble that passes when a broker is back."""


class Broken(Exception):
    """The client reports an error for a partition that does not pass."""

    def __init__(self, tp: TopicPartition, error: Any) -> None:
        super().__init__(str(tp))
        self.tp = tp
        self.error = error


class Drain(Protocol):
    """A consumer with assigned partitions, and the records that it has delivered since the last `cut`.

    One thread uses it.

    Attributes
    ----------
    rows, bytes : int
        Of these records: how many, and the size of their keys and values.
    empty : bool
        Neither a record nor the end of a partition has come.
    at_once : int
        Records that one `take` should ask for.
    """

    rows: int
    bytes: int
    at_once: int

    @property
    def empty(self) -> bool: ...

    def assign(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Begin to fetch at `positions`."""

    def take(self, rows_max: int, timeout_s: float) -> None:
        """Take up to `rows_max` more records, waiting for the first. Raises `Broken` behind the good ones."""

    def cut(self) -> Columns:
        """Hand over the records so far, and begin anew."""

    def end(self, tp: TopicPartition) -> int:
        """The log's end that came with the last fetch, negative while there was none. Asks no broker."""

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Commit positions to the group without waiting; what goes wrong is nobody's concern."""

    def close(self) -> None:
        """Leave."""


class ObjectDrain:
    """Takes confluent_kafka's ``Message`` objects apart into lists.

    Parameters
    ----------
    config : mapping
        The consumer's.
    topics : set of str
        That will be assigned.
    headers : frozenset of str
        Topics whose headers are wanted.
    on_error : callable
        Gets a KafkaError that concerns the whole client.
    """

    at_once = 500  # longer lists of the client's objects cost more in the garbage collector

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: set[str],
        headers: frozenset[str],
        on_error: Callable[[Any], None],
    ) -> None:
        self._consumer = ck.Consumer({**config, "error_cb": on_error})
        self._only_topic = next(iter(topics)) if len(topics) == 1 else None
        self._headers = headers
        self._begin()

    def _begin(self) -> None:
        self.rows = self.bytes = 0
        self._lists: dict[str, tuple[list[Any], ...]] = {}
        self._next: dict[TopicPartition, Position] = {}

    @property
    def empty(self) -> bool:
        return not self._next

    def assign(self, positions: Mapping[TopicPartition, Position]) -> None:
        self._consumer.assign([_assignment(tp, position) for tp, position in positions.items()])

    def take(self, rows_max: int, timeout_s: float) -> None:
        messages = self._consumer.consume(rows_max, timeout=timeout_s)
        if messages:
            self._take(messages)

    def cut(self) -> Columns:
        records = {topic: self._batch(topic, lists) for topic, lists in self._lists.items()}
        next_ = self._next
        self._begin()
        return records, next_

    def end(self, tp: TopicPartition) -> int:
        return int(self._consumer.get_watermark_offsets(ck.TopicPartition(*tp), cached=True)[1])

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        offsets = [ck.TopicPartition(tp.topic, tp.partition, p.offset) for tp, p in positions.items()]
        with contextlib.suppress(ck.KafkaException, RuntimeError):
            self._consumer.commit(offsets=offsets, asynchronous=True)

    def close(self) -> None:
        self._consumer.close()

    def _take(self, messages: list[Any]) -> None:
        if any([m.error() for m in messages]):  # noqa: C419 - a list is quicker than a generator
            messages = self._without_errors(messages)
        if self._only_topic is not None:
            self._add(self._only_topic, messages)
            return
        by_topic: dict[str, list[Any]] = {}
        for topic, message in zip([m.topic() for m in messages], messages, strict=True):
            by_topic.setdefault(topic, []).append(message)
        for topic, of_topic in by_topic.items():
            self._add(topic, of_topic)

    def _add(self, topic: str, messages: list[Any]) -> None:
        if not messages:
            return
        columns = self._lists.setdefault(topic, ([], [], [], [], [], []))
        partitions = [m.partition() for m in messages]
        columns[0].extend(partitions)
        columns[1].extend([m.offset() for m in messages])
        columns[2].extend([m.timestamp()[1] for m in messages])
        columns[3].extend([m.key() for m in messages])
        columns[4].extend([m.value() for m in messages])
        if topic in self._headers:
            columns[5].extend([[{"key": k, "value": v} for k, v in m.headers() or ()] for m in messages])
        self.rows += len(messages)
        self.bytes += sum(map(len, messages))
        for partition in set(partitions):
            last = messages[len(partitions) - 1 - partitions[::-1].index(partition)]
            self._next[TopicPartition(topic, partition)] = Position(last.offset() + 1, _leader_epoch(last))

    def _without_errors(self, messages: list[Any]) -> list[Any]:
        """The records alone. An end of a partition is where its position is, behind markers and gaps."""
        good: list[Any] = []
        for message in messages:
            error = message.error()
            if error is None:
                good.append(message)
                continue
            self._take(good)
            good = []
            tp = TopicPartition(message.topic() or "", message.partition())
            if is_end(tp, error):
                self._next[tp] = Position(message.offset(), self._next.get(tp, Position(0)).leader_epoch)
        return good

    def _batch(self, topic: str, lists: tuple[list[Any], ...]) -> pa.RecordBatch:
        partitions, offsets, timestamps, keys, values, headers = lists
        headers_type = RECORDS.field("headers").type
        return pa.RecordBatch.from_arrays(
            [
                pa.array(partitions, pa.int32()),
                pa.array(offsets, pa.int64()),
                pa.array(timestamps, pa.int64()).cast(RECORDS.field("timestamp").type),
                pa.array(keys, pa.binary()),
                pa.array(values, pa.binary()),
                pa.array(headers, headers_type)
                if topic in self._headers
                else pa.nulls(len(values), headers_type),
            ],
            schema=RECORDS,
        )


def is_end(tp: TopicPartition, error: Any) -> bool:
    """Whether an error among the records says that a partition's end is reached; `Broken` if it is final."""
    if error.code() == ck.KafkaError._PARTITION_EOF:
        return True
    if error.code() in TRANSPORT or error.retriable():
        return False
    raise Broken(tp, error)


def _leader_epoch(message: Any) -> int:
    epoch = message.leader_epoch()
    return -1 if epoch is None else int(epoch)


def _assignment(tp: TopicPartition, position: Position) -> Any:
    if position.leader_epoch >= 0:
        return ck.TopicPartition(tp.topic, tp.partition, position.offset, leader_epoch=position.leader_epoch)
    return ck.TopicPartition(tp.topic, tp.partition, position.offset)
