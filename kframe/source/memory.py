"""A log in memory with Kafka's offsets, gaps, tombstones and expiry: for tests, users' own included."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa

from kframe.errors import ConfigError, LostRange
from kframe.model import RECORDS, Fetched, Limits, OffsetRange, Position, TopicPartition
from kframe.source.protocol import Start, TopicInfo
from kframe.source.start import offset_at, to_epoch_ms


@dataclass
class _Log:
    """One partition: records in offset order, not necessarily dense; ``end`` may lie behind a gap."""

    records: list[dict[str, Any]] = field(default_factory=list)
    low: int = 0
    end: int = 0


class MemorySource:
    """A `Source` whose topics are lists.

    Parameters
    ----------
    topics : mapping of str to sequence of records, optional
        Records of partition 0 to begin with; see `append`.

    Examples
    --------
    >>> log = MemorySource({"orders": [{"sku": "a", "qty": 1}]})
    >>> log.append("orders", {"sku": "b", "qty": 2}, key="b")
    """

    def __init__(self, topics: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._logs: dict[str, list[_Log]] = {}
        self._ids: dict[str, int] = {}
        self._stops: Mapping[TopicPartition, int] | None = None
        self._limits = Limits(rows_max=1, bytes_max=1, interval_s=0)
        self._changed = threading.Condition()
        for topic, values in (topics or {}).items():
            self.create(topic)
            for value in values:
                self.append(topic, value)

    def __repr__(self) -> str:
        sizes = {t: sum(len(log.records) for log in logs) for t, logs in self._logs.items()}
        return f"<MemorySource {sizes}>"

    # ---- the log's other side -----------------------------------------------------------------------

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic, or make it again: a new id and no records."""
        self._logs[topic] = [_Log() for _ in range(partitions)]
        self._ids[topic] = self._ids.get(topic, 0) + 1

    def add_partitions(self, topic: str, count: int) -> None:
        """More partitions, empty."""
        self._logs[topic] += [_Log() for _ in range(count)]

    def append(
        self,
        topic: str,
        value: Any,
        *,
        key: str | bytes | None = None,
        partition: int = 0,
        timestamp_ms: int | None = None,
        headers: Sequence[tuple[str, bytes]] | None = None,
        gap: int = 0,
    ) -> int:
        """Append one record; its offset.

        Parameters
        ----------
        value : object
            Bytes go in as they are, None is a tombstone, anything else is written as JSON.
        gap : int, offsets
            Offsets left out before the record, as compaction and transaction markers do.
        """
        if topic not in self._logs:
            self.create(topic)
        log = self._logs[topic][partition]
        offset = log.end + gap
        raw = value if isinstance(value, bytes) or value is None else json.dumps(value, default=str).encode()
        log.records.append(
            {
                "partition": partition,
                "offset": offset,
                "timestamp": offset if timestamp_ms is None else timestamp_ms,
                "key": key.encode() if isinstance(key, str) else key,
                "value": raw,
                "headers": [{"key": k, "value": v} for k, v in headers] if headers else None,
            }
        )
        with self._changed:
            log.end = offset + 1
            self._changed.notify_all()
        return offset

    def skip(self, topic: str, count: int, *, partition: int = 0) -> None:
        """Move the end without a record, as a transaction marker does."""
        self._logs[topic][partition].end += count

    def expire(self, topic: str, before: int, *, partition: int = 0) -> None:
        """Drop every record below an offset, as retention does."""
        log = self._logs[topic][partition]
        log.records = [r for r in log.records if r["offset"] >= before]
        log.low = before
        log.end = max(log.end, before)

    # ---- the Source protocol ------------------------------------------------------------------------

    def cluster_id(self) -> str | None:
        """None: memory is no cluster."""
        return None

    def describe(self, topics: Iterable[str]) -> dict[str, TopicInfo]:
        """Ids and partition counts."""
        topics = list(topics)
        for topic in topics:
            if topic not in self._logs:
                raise ConfigError(
                    f"Topic {topic!r} does not exist.", hint="MemorySource.create(topic) first."
                )
        return {t: TopicInfo(f"{t}-{self._ids[t]}", len(self._logs[t])) for t in topics}

    def offsets(self, partitions: Iterable[TopicPartition], at: Start) -> dict[TopicPartition, int]:
        """Offsets at a point of the log."""
        return {tp: self._offset(tp, at) for tp in partitions}

    def start(
        self,
        positions: Mapping[TopicPartition, Position],
        stops: Mapping[TopicPartition, int] | None,
        limits: Limits,
    ) -> None:
        """Begin at `positions`."""
        logs = {tp: self._logs[tp.topic][tp.partition] for tp in positions}
        expired = [
            OffsetRange(*tp, positions[tp].offset, log.low)
            for tp, log in logs.items()
            if positions[tp].offset < log.low
        ]
        ahead = [
            OffsetRange(*tp, log.end, positions[tp].offset)
            for tp, log in logs.items()
            if positions[tp].offset > log.end
        ]
        if expired or ahead:
            raise LostRange.of(expired, ahead)
        self._stops = stops
        self._limits = limits

    def fetch(self, plan: tuple[OffsetRange, ...], stopped: Callable[[], bool]) -> Fetched:
        """The next records, at most ``limits.rows_max`` in all, partition by partition."""
        if self._stops is None:
            with self._changed:
                self._changed.wait_for(lambda: stopped() or self._has_more(plan), self._limits.interval_s)
        ranges: list[OffsetRange] = []
        rows: dict[str, list[dict[str, Any]]] = {}
        room = self._limits.rows_max
        for r in plan:
            log = self._logs[r.topic][r.partition]
            start, stop = r.start, min(log.end, r.stop)
            taken = [x for x in log.records if start <= x["offset"] < stop]
            if len(taken) > room:
                stop = taken[room]["offset"]
                taken = taken[:room]
            if stop > start:
                ranges.append(OffsetRange(r.topic, r.partition, start, stop, 0))
                rows.setdefault(r.topic, []).extend(taken)
                room -= len(taken)
        return Fetched(
            tuple(ranges), {t: pa.Table.from_pylist(part, RECORDS) for t, part in rows.items() if part}
        )

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Nobody watches."""

    def ends(self) -> dict[TopicPartition, int]:
        """The ends of all partitions."""
        return {
            TopicPartition(t, p): log.end
            for t, logs in list(self._logs.items())
            for p, log in enumerate(logs)
        }

    def trouble(self) -> str | None:
        """Memory never complains."""
        return None

    def close(self) -> None:
        """Nothing to close."""

    def beside(self) -> MemorySource:
        """The same logs, with stops and limits of its own."""
        return copy.copy(self)

    def _has_more(self, plan: tuple[OffsetRange, ...]) -> bool:
        return any(self._logs[r.topic][r.partition].end > r.start for r in plan)

    def _offset(self, tp: TopicPartition, at: Start) -> int:
        log = self._logs[tp.topic][tp.partition]
        if isinstance(at, Mapping):
            return offset_at(at, tp)
        if at == "earliest":
            return log.low
        if at == "latest":
            return log.end
        if isinstance(at, (str, int, datetime)):
            moment = to_epoch_ms(at)
            return next((int(r["offset"]) for r in log.records if r["timestamp"] >= moment), log.end)
        raise ConfigError(f"{at!r} is not a point in the log.")
