"""The two drains, in C and by the client's objects, hand over the same."""

from __future__ import annotations

import random
from collections.abc import Callable

import confluent_kafka as ck
import pyarrow as pa
import pytest

import kframe as kf
from kframe.model import RECORDS, Position, TopicPartition
from kframe.source import native
from kframe.source.drain import Broken, Columns, Drain, ObjectDrain
from kframe.source.settings import Settings

MakeTopic = Callable[..., str]
needs_native = pytest.mark.skipif(
    native._libraries() is None, reason="drain.c was not compiled: no C compiler when kframe was installed"
)
pytestmark = [pytest.mark.broker, needs_native]


def drains(kafka: kf.LocalKafka, topics: set[str]) -> list[Drain]:
    config = Settings(kafka.brokers).consumer("drains")
    assert native.takes(config)
    return [
        native.NativeDrain(config, lambda error: None),
        ObjectDrain(config, topics, frozenset(), lambda error: None),
    ]


def drained(drain: Drain, starts: dict[TopicPartition, int], ends: dict[TopicPartition, int]) -> Columns:
    """Everything from `starts` until every partition's `ends`, in pieces of random length."""
    drain.assign({tp: Position(offset) for tp, offset in starts.items()})
    chunks: dict[str, list[pa.RecordBatch]] = {}
    positions: dict[TopicPartition, Position] = {}
    lengths = random.Random(7)
    while any(positions.get(tp, Position(-1)).offset < end for tp, end in ends.items()):
        for _ in range(lengths.randrange(3)):
            drain.take(lengths.randrange(1, 60), 0.2)
        records, behind = drain.cut()
        assert drain.empty
        assert (drain.rows, drain.bytes) == (0, 0)
        positions |= behind
        for topic, batch in records.items():
            chunks.setdefault(topic, []).append(batch)
    drain.close()
    order = [("partition", "ascending"), ("offset", "ascending")]
    return {t: pa.Table.from_batches(b, RECORDS).sort_by(order) for t, b in chunks.items()}, positions  # type: ignore[misc]


def taken(drain: Drain, rows: int) -> None:
    """Wait until `drain` holds that many."""
    while drain.rows < rows:
        drain.take(10, 0.2)


def written(kafka: kf.LocalKafka, topics: list[str]) -> None:
    """Null, empty, repeated and large keys and values, odd timestamps, and an aborted transaction."""
    dice = random.Random(3)
    blobs = [None, b"", b"\0", b"x", "é".encode(), b'{"a": 1}', dice.randbytes(70_000)]
    plain = ck.Producer({"bootstrap.servers": kafka.brokers})
    for _ in range(900):
        plain.produce(
            dice.choice(topics),
            dice.choice(blobs),
            dice.choice(blobs[:6]),
            partition=dice.randrange(2),
            timestamp=dice.choice([1, 1_700_000_000_000, 1_500_000_000_000]),
        )
        plain.poll(0)
    assert plain.flush(30) == 0
    writer = ck.Producer({"bootstrap.servers": kafka.brokers, "transactional.id": topics[0]})
    writer.init_transactions(30)
    for end in (writer.abort_transaction, writer.commit_transaction):
        writer.begin_transaction()
        for topic in topics:
            writer.produce(topic, b"in a transaction", partition=1)
        end(30)


def test_both_hand_over_the_same(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """Kills: null for empty, an offset or epoch of another row, a topic's rows under another, lost ends."""
    topics = [make_topic(2), make_topic(2)]
    written(kafka, topics)
    raw = ck.Consumer({"bootstrap.servers": kafka.brokers, "group.id": "ends"})
    tps = [TopicPartition(t, p) for t in topics for p in range(2)]
    ends = {tp: raw.get_watermark_offsets(ck.TopicPartition(*tp), timeout=10)[1] for tp in tps}
    raw.close()
    one, other = (drained(d, dict.fromkeys(tps, 0), ends) for d in drains(kafka, set(topics)))
    assert one[0].keys() == other[0].keys() == set(topics)
    assert sum(len(t) for t in one[0].values()) == 902
    for topic in topics:
        assert one[0][topic].equals(other[0][topic])
        assert one[0][topic]["value"].null_count > 0
        assert one[0][topic]["key"].null_count > 0
    for positions in (one[1], other[1]):
        assert {tp: p.offset for tp, p in positions.items()} == ends
        assert {p.leader_epoch for p in positions.values()} <= {0, -1}  # -1: an end that came alone


def test_good_records_come_before_an_error(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """Kills: an error that takes the records before it along, or is swallowed."""
    topic = make_topic()
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    for n in range(3):
        producer.produce(topic, b"%d" % n)
    assert producer.flush(30) == 0
    tp = TopicPartition(topic, 0)
    for drain in drains(kafka, {topic}):
        drain.assign({tp: Position(99)})
        with pytest.raises(Broken) as broken:
            taken(drain, 1)
        assert broken.value.tp == tp
        assert broken.value.error.code() == ck.KafkaError._AUTO_OFFSET_RESET
        drain.assign({tp: Position(1)})
        taken(drain, 2)
        assert drain.cut()[0][topic]["value"].to_pylist() == [b"1", b"2"]
        drain.close()


def test_a_wrong_setting_is_refused_alike(kafka: kf.LocalKafka) -> None:
    config = {"bootstrap.servers": kafka.brokers, "group.id": "g", "no.such.setting": "x"}
    told = []
    for make in (
        lambda: native.NativeDrain(config, lambda error: None),
        lambda: ObjectDrain(config, set(), frozenset(), lambda error: None),
    ):
        with pytest.raises(ck.KafkaException) as refused:
            make()
        told.append((refused.value.args[0].code(), refused.value.args[0].str()))
    assert told[0] == told[1]


def test_callables_are_left_to_the_clients_own_binding() -> None:
    assert not native.takes({"bootstrap.servers": "b:1", "oauth_cb": print})
