"""Apache Kafka as a source, with the client's hazards kept in this module."""

from __future__ import annotations

import contextlib
import difflib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient, OffsetSpec

from kframe.errors import BrokerUnavailable, ConfigError, LostRange
from kframe.model import Fetched, Limits, OffsetRange, Position, TopicPartition
from kframe.source.drain import TRANSPORT, Drain, ObjectDrain
from kframe.source.native import NativeDrain, takes
from kframe.source.protocol import Start, TopicInfo
from kframe.source.reader import OffsetOutOfRange, Reader
from kframe.source.settings import Settings
from kframe.source.start import offset_at, to_epoch_ms

_ADMIN_TIMEOUT_S = 10.0
_BOUNDED_WAIT_MS = 20
_NOT_KNOWN_YET = ck.KafkaError.OFFSET_NOT_AVAILABLE
_LEADERLESS = {
    ck.KafkaError.NOT_LEADER_FOR_PARTITION,
    ck.KafkaError.LEADER_NOT_AVAILABLE,
    ck.KafkaError.REPLICA_NOT_AVAILABLE,
    ck.KafkaError.FENCED_LEADER_EPOCH,  # the client knows the leader by an earlier term
    ck.KafkaError.UNKNOWN_LEADER_EPOCH,  # the broker does not know yet that it leads again
    _NOT_KNOWN_YET,
    ck.KafkaError._NOENT,  # the client's own word for a partition without a leader
}
T = TypeVar("T")


class KafkaSource:
    """Reads a Kafka cluster's topics from given positions; nobody's group decides where.

    Parameters
    ----------
    settings : Settings
    group_id : str
        Where `acknowledge` commits, for dashboards.
    headers : collection of str
        Topics whose records' headers are wanted.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        group_id: str,
        headers: Iterable[str] = (),
    ) -> None:
        self._settings = settings
        self._group_id = group_id
        self._headers = frozenset(headers)
        self._trouble: str | None = None
        self._met: set[str] = set()
        self._reader: Reader | None = None
        self._ends: Mapping[TopicPartition, int] = {}
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
        self._met.update(found)
        return found

    def offsets(
        self, partitions: Iterable[TopicPartition], at: Start, *, committed: bool = True
    ) -> dict[TopicPartition, int]:
        """Offsets at a point of the log. The end is the read_committed end, unless ``committed=False``."""
        tps = list(partitions)
        if isinstance(at, Mapping):
            return {tp: offset_at(at, tp) for tp in tps}
        if strangers := {tp.topic for tp in tps} - self._met:
            self.describe(strangers)  # else one client in fifteen overlooks who leads, and asks again in 3 s
        isolation = ck.IsolationLevel.READ_COMMITTED if committed else ck.IsolationLevel.READ_UNCOMMITTED
        found = self._patiently(lambda: self._listed(tps, at, isolation))
        after_all = [tp for tp, offset in found.items() if offset < 0]  # no record at or after that time
        return {**found, **self.offsets(after_all, "latest")} if after_all else found

    def _listed(
        self, tps: list[TopicPartition], at: Start, isolation: ck.IsolationLevel
    ) -> dict[TopicPartition, int]:
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
        if at in ("earliest", "latest") and any(offset < 0 for offset in found.values()):
            raise ck.KafkaException(ck.KafkaError(_NOT_KNOWN_YET))  # its leader is a new one
        return found

    # ---- reading ------------------------------------------------------------------------------------

    def start(
        self,
        positions: Mapping[TopicPartition, Position],
        stops: Mapping[TopicPartition, int] | None,
        limits: Limits,
    ) -> None:
        """Begin to read at `positions`, as far as `stops`."""
        self.close()
        self._check_not_lost(positions)
        drain = self._drain({tp.topic for tp in positions}, bounded=stops is not None)
        self._reader = Reader(drain, positions, stops, limits=limits, alive=self._recovered)

    def _drain(self, topics: set[str], *, bounded: bool) -> Drain:
        config = self._settings.consumer(self._group_id)
        if bounded:  # where a log ends with a transaction's marker, only an empty fetch says that it ends
            config.setdefault("fetch.wait.max.ms", _BOUNDED_WAIT_MS)
        with _redacted(self._settings):
            if takes(config) and not self._headers:
                return NativeDrain(config, self._on_error)
            return ObjectDrain(config, topics, self._headers, self._on_error)

    def fetch(self, plan: tuple[OffsetRange, ...], stopped: Callable[[], bool]) -> Fetched:
        """The records that have arrived since the last call, waiting for them as the limits allow."""
        assert self._reader is not None, "start() first"
        try:
            return self._reader.take(plan, stopped)
        except OffsetOutOfRange as error:
            raise self._lost_at(error.partition) from None

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        """Mirror `positions` into Kafka's group offsets, without waiting."""
        if self._reader is not None:
            self._reader.acknowledge(positions)

    def ends(self) -> Mapping[TopicPartition, int]:
        """The log's ends that came with the last fetches; what open transactions hold is before them."""
        reader = self._reader
        return {**self._ends, **reader.ends} if reader is not None else self._ends

    def trouble(self) -> str | None:
        """The client's last complaint, until a record arrives again."""
        return self._trouble

    def close(self) -> None:
        """Stop reading."""
        if self._reader is not None:
            self._reader.close()
            self._ends = self.ends()
            self._reader = None

    def beside(self) -> KafkaSource:
        """A source with clients of its own."""
        return KafkaSource(self._settings, group_id=self._group_id, headers=self._headers)

    # ---- trouble ------------------------------------------------------------------------------------

    def _on_error(self, error: Any) -> None:
        if error.code() in TRANSPORT or error.fatal():
            self._trouble = self._settings.redact(error.str())

    def _recovered(self) -> None:
        self._trouble = None

    def _ask(self, call: Callable[[], Any]) -> Any:
        """A call to the cluster; `BrokerUnavailable` when nobody answers."""
        try:
            answer = call()
        except ck.KafkaException as error:
            if error.args[0].code() in TRANSPORT:
                raise self._no_answer(error) from None
            raise
        self._recovered()
        return answer

    def _patiently(self, call: Callable[[], T]) -> T:
        """Call again while partitions have no leader: new ones, and all for a moment when a broker ends.

        The client would go on asking for the leader of an earlier term until its metadata is old.
        """
        until, pause = time.monotonic() + _ADMIN_TIMEOUT_S, threading.Event()
        while True:
            try:
                return call()
            except ck.KafkaException as error:
                if error.args[0].code() not in _LEADERLESS:
                    raise
                if time.monotonic() > until:
                    raise self._no_answer(error) from None
            pause.wait(0.1)
            self._ask(lambda: self._admin.list_topics(timeout=_ADMIN_TIMEOUT_S))

    def _no_answer(self, error: ck.KafkaException) -> BrokerUnavailable:
        return BrokerUnavailable(
            f"No answer from {self._settings.brokers}: {self._settings.redact(error.args[0].str())}",
            kept="Tables and positions are as they were.",
            hint="Check brokers= and the network, or start one with kf.local_kafka().",
        )

    def _no_such_topic(self, topic: str) -> ConfigError:
        names = list(self._ask(lambda: self._admin.list_topics(timeout=_ADMIN_TIMEOUT_S)).topics)
        near = difflib.get_close_matches(topic, names, n=1)
        return ConfigError(
            f"Topic {topic!r} does not exist on these brokers.",
            kept="Nothing was changed.",
            hint=f"Did you mean {near[0]!r}?" if near else "Check name and brokers=; kf.write makes topics.",
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
