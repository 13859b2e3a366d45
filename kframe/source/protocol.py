"""What the engine asks of a log: topics, offsets, records. Kafka is one; memory is the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from kframe.model import Fetched, Limits, OffsetRange, Position, TopicPartition

Start = str | int | datetime | Mapping[int, int]
"""Where a first run begins: ``"earliest"``, ``"latest"``, a time, ``"-1h"``, or an offset per partition."""


@dataclass(frozen=True)
class TopicInfo:
    """A topic as the cluster describes it: its id (another one when it was made again) and partitions."""

    topic_id: str
    partitions: int


class Source(Protocol):
    """A log that can be read from given positions.

    One thread calls these methods. `fetch` returns contiguous ranges: each begins where the last one of its
    partition stopped.
    """

    def cluster_id(self) -> str | None:
        """An id of the cluster, or None when it has none."""

    def describe(self, topics: Iterable[str]) -> dict[str, TopicInfo]:
        """Ids and partition counts. Raises `ConfigError` for a topic that does not exist."""

    def offsets(self, partitions: Iterable[TopicPartition], at: Start) -> dict[TopicPartition, int]:
        """The offset of each partition at ``"earliest"``, ``"latest"`` (the end offset), or a time."""

    def start(
        self,
        positions: Mapping[TopicPartition, Position],
        stops: Mapping[TopicPartition, int] | None,
        limits: Limits,
    ) -> None:
        """Begin to read at `positions`, as far as `stops` (None: for ever), in batches within `limits`.

        Raises
        ------
        LostRange
            A position is below the log's start or beyond its end; ``ranges`` holds what is lost.
        """

    def fetch(self, plan: tuple[OffsetRange, ...], stopped: Callable[[], bool]) -> Fetched:
        """The records that come next within `plan`: one batch, maybe an empty one when none has come.

        A record waits for others no longer than ``limits.interval_s``.
        """

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Tell the cluster's dashboards how far the ledger is. Advisory; never raises."""

    def ends(self) -> Mapping[TopicPartition, int]:
        """The log's ends that came with the last fetches, where any did. Asks nobody; any thread."""

    def trouble(self) -> str | None:
        """What the log's client complains about at the moment, or None."""

    def close(self) -> None:
        """Stop reading. Idempotent; `start` may follow."""

    def beside(self) -> Source:
        """Another source on the same log, which one more thread may read while this one is in use."""
