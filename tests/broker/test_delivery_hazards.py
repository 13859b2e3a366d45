"""What the network and the client do to a transactional producer, by a proxy that knows Kafka's requests."""

from __future__ import annotations

import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import confluent_kafka as ck
import pandas as pd
import pyarrow as pa
import pytest
from confluent_kafka.admin import AdminClient, OffsetSpec

import kframe as kf
import kframe.deliver.kafka as kafka_target
from kframe.deliver.kafka import TransactionalTopics
from kframe.deliver.producing import prepare_topics, topic_configs
from kframe.errors import DeliveryDelayed, Fenced
from kframe.model import Entry, Outlet
from kframe.source.settings import Settings
from tests.broker.proxy import (
    ADD_OFFSETS,
    ADD_PARTITIONS,
    END_TXN,
    INIT_PRODUCER_ID,
    PRODUCE,
    TXN_OFFSET_COMMIT,
    Proxy,
)

pytestmark = pytest.mark.broker
N = 20


@pytest.fixture(scope="module")
def proxied() -> Iterator[tuple[kf.LocalKafka, Proxy]]:
    """A broker of this module's own, which every client reaches through the proxy."""
    ports = [_free_port(), _free_port()]
    proxy = Proxy(ports[0], ("127.0.0.1", ports[1]))
    config = {
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports[0]}",
        "transaction.abort.timed.out.transaction.cleanup.interval.ms": 200,
    }
    with kf.local_kafka(port=ports[1], config=config, progress=False) as kafka:
        yield kafka, proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _quiet(proxied: tuple[kf.LocalKafka, Proxy]) -> Iterator[None]:
    yield
    proxied[1].rule = lambda _key: 0.0


_names = itertools.count()


class Scene:
    """One topic, and targets that deliver to it under one name."""

    def __init__(self, kafka: kf.LocalKafka, **config: object) -> None:
        self.topic = f"out{next(_names)}"
        named = {name.replace("_", "."): value for name, value in config.items()}
        self.settings = Settings(kafka.brokers, named)
        prepare_topics(self.settings, [Outlet("step", "kafka", self.topic)])

    def target(self) -> TransactionalTopics:
        return TransactionalTopics(self.settings, self.topic)

    def entries(self, first: int, count: int = N) -> list[Entry]:
        numbers = [str(i).encode() for i in range(first, first + count)]
        records = pa.table({"key": numbers, "value": numbers})
        return [Entry(first, first + count, 0, self.topic, "append", (), records)]

    def deliver(self, target: TransactionalTopics, first: int) -> None:
        target.send(self.entries(first))
        target.commit(first + N)

    def visible(self) -> Counter[int]:
        """How often read_committed readers see each number."""
        config = {**self.settings.consumer("reader"), "auto.offset.reset": "error"}
        consumer = ck.Consumer(config)
        consumer.assign([ck.TopicPartition(self.topic, 0, 0)])
        seen: Counter[int] = Counter()
        while True:
            message = consumer.poll(20)
            assert message is not None, "the topic's end did not come"
            if message.error():
                consumer.close()
                return seen
            seen[int(message.value())] += 1

    def ends(self) -> list[int]:
        """The read_committed end and the log's."""
        admin = AdminClient(self.settings.admin())
        told = []
        for isolation in (ck.IsolationLevel.READ_COMMITTED, ck.IsolationLevel.READ_UNCOMMITTED):
            asked = {ck.TopicPartition(self.topic, 0): OffsetSpec.latest()}
            futures = admin.list_offsets(asked, isolation_level=isolation)
            told += [int(future.result(10).offset) for future in futures.values()]
        return told


@pytest.mark.parametrize("reused", [False, True], ids=["ours", "control: reused"])
def test_a_late_end_of_a_transaction_commits_no_other(
    reused: bool, proxied: tuple[kf.LocalKafka, Proxy]
) -> None:
    """A request that the network delivers after its retry (KIP-890): a producer that is used again lets it
    commit the next transaction, whose rows come twice when that one falls. Kills: reusing the producer."""
    kafka, proxy = proxied
    scene = Scene(kafka)
    target = scene.target()
    if reused:
        target._slow_s = float("inf")
    assert target.open(0) is None
    target.commit(0)
    proxy.arrive.clear()
    proxy.arrived.clear()
    proxy.late.append(END_TXN)
    scene.deliver(target, 0)
    target.send(scene.entries(N))  # an open transaction
    proxy.arrive.set()
    assert proxy.arrived.wait(30)
    restarted = scene.target()  # as after a crash
    position = restarted.open(0)
    assert position == N
    scene.deliver(restarted, N)
    seen = scene.visible()
    doubled = sum(count - 1 for count in seen.values())
    print(f"\n{'reused' if reused else 'ours'}: {doubled} doubled, recycled {target.recycled} times")
    assert set(seen) == set(range(2 * N))
    assert target.recycled == 0 if reused else target.recycled >= 1
    assert doubled == (N if reused else 0)


def test_many_late_ends_in_a_row(proxied: tuple[kf.LocalKafka, Proxy]) -> None:
    """Slow answers recycle, with a producer made in advance; fast ones don't. Kills: recycling always."""
    kafka, proxy = proxied
    scene = Scene(kafka)
    target = scene.target()
    target.open(0)
    target.commit(0)
    warm = target.recycled
    for i in range(5):
        scene.deliver(target, i * N)
    fast = target.recycled - warm
    proxy.rule = lambda key: 0.08 if key == END_TXN else 0.0
    for i in range(5, 10):
        scene.deliver(target, i * N)
    assert fast <= 2  # a busy machine may be slow once or twice
    assert target.recycled - fast - warm == 5
    assert scene.visible() == Counter(range(10 * N))


def test_a_call_that_hangs_is_abandoned(
    proxied: tuple[kf.LocalKafka, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: waiting for send_offsets, which may ignore its timeout; going on from a remembered position."""
    kafka, proxy = proxied
    monkeypatch.setattr(kafka_target, "_WATCHDOG_S", 1.0)
    scene = Scene(kafka)
    target = scene.target()
    target.open(0)
    target.commit(0)
    scene.deliver(target, 0)
    target.send(scene.entries(N))
    proxy.rule = lambda key: 5.0 if key == TXN_OFFSET_COMMIT else 0.0
    abandoned = len(kafka_target._abandoned)
    with pytest.raises(DeliveryDelayed, match="did not come back"):
        target.commit(2 * N)
    assert len(kafka_target._abandoned) == abandoned + 1
    proxy.rule = lambda _key: 0.0
    monkeypatch.undo()
    assert target.open(0) == N
    scene.deliver(target, N)
    assert scene.visible() == Counter(range(2 * N))


def test_a_broken_connection_at_each_request_is_survived(proxied: tuple[kf.LocalKafka, Proxy]) -> None:
    """Each kind of request cut once: nothing lost, nothing doubled. Kills: resending without asking."""
    kafka, proxy = proxied
    scene = Scene(kafka)
    target = scene.target()
    target.open(0)
    target.commit(0)
    position = 0
    for key in (PRODUCE, INIT_PRODUCER_ID, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT):
        armed = [key]

        def rule(asked: int, armed: list[int] = armed) -> float | None:
            if asked in armed:
                armed.clear()
                return None
            return 0.0

        proxy.rule = rule
        try:
            scene.deliver(target, position)
            position += N
        except DeliveryDelayed:
            held = target.open(0)
            assert held in (position, position + N)
            position = held
    proxy.rule = lambda _key: 0.0
    assert position
    assert scene.visible() == Counter(range(position))
    assert {PRODUCE, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT} <= proxy.touched.keys()


def test_an_expired_transaction_is_told_from_a_new_owner(proxied: tuple[kf.LocalKafka, Proxy]) -> None:
    """Both are -144. Kills: giving up after an expiry; taking the id back from a newer run."""
    kafka, _ = proxied
    scene = Scene(kafka, transaction_timeout_ms=1000)
    target = scene.target()
    target.open(0)
    target.commit(0)
    scene.deliver(target, 0)
    target.send(scene.entries(N))
    _until(lambda: len(set(scene.ends())) == 1)  # the broker has aborted it
    with pytest.raises(DeliveryDelayed):
        target.commit(2 * N)
    assert target.open(0) == N
    scene.deliver(target, N)
    target.send(scene.entries(2 * N))
    newer = scene.target()
    assert newer.open(0) == 2 * N
    newer.commit(2 * N)
    with pytest.raises(Fenced, match="Another run delivers"):
        target.commit(3 * N)
    target.close()
    scene.deliver(newer, 2 * N)
    assert scene.visible() == Counter(range(3 * N))


def test_a_fenced_producer_asks_before_it_takes_over(
    proxied: tuple[kf.LocalKafka, Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the newer run's transaction open the owner cannot be read. Kills: taking no answer for ours."""
    kafka, _ = proxied
    scene = Scene(kafka)
    older, newer = scene.target(), scene.target()
    older.open(0)
    older.commit(0)
    older.send(scene.entries(0))
    newer.open(0)
    newer.commit(0)
    group = newer._group.consumer_group_metadata()
    newer.send(scene.entries(0))
    marker = ck.TopicPartition("kframe-delivered", 0, N, newer._owner)
    assert newer._sender is not None
    newer._sender.producer.send_offsets_to_transaction([marker], group, 10)
    monkeypatch.setattr(kafka_target, "_TIMEOUT_S", 1.0)
    with pytest.raises(DeliveryDelayed):
        older.commit(N)
    with pytest.raises(DeliveryDelayed):
        older.open(0)
    monkeypatch.undo()
    newer._sender.producer.commit_transaction(10)
    with pytest.raises(Fenced):
        older.open(0)
    assert scene.visible() == Counter(range(N))


def test_a_topic_that_a_broker_does_not_know_yet(proxied: tuple[kf.LocalKafka, Proxy]) -> None:
    """Kills: a first run that ends with "Unknown topic", of a topic that it has just made."""
    kafka, _ = proxied
    made = threading.Timer(0.5, lambda: kafka.create_topic("known-soon", 1))
    made.start()
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    assert topic_configs(admin, ["known-soon"])["known-soon"]["cleanup.policy"].value == "delete"
    made.join()


def test_a_broker_killed_with_a_transaction_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may hang in send_offsets then. Kills: rows lost or sent twice when the broker is back."""
    monkeypatch.setattr(kafka_target, "_WATCHDOG_S", 3.0)
    kills = {"delivering": 1}
    with kf.local_kafka(tmp_path / "kafka", progress=False) as kafka:
        numbers = pd.DataFrame({"n": range(200)})
        kf.write(numbers, "numbers", brokers=kafka.brokers, progress=False)

        def at_edge(edge: str) -> None:
            if kills.get(edge):
                kills[edge] -= 1
                kafka.kill()
                kafka.restart()

        with kf.Pipeline(
            tmp_path / "p.duckdb", brokers=kafka.brokers, batch_rows_max=50, at_edge=at_edge
        ) as made:
            made.topic("numbers", schema={"n": "int64"})
            made.output("out", inputs=["numbers"])(lambda numbers: numbers)
            made.run(progress=False)
            kf.write(numbers + 200, "numbers", brokers=kafka.brokers, progress=False)
            made.run(progress=False)
        assert set(kills.values()) == {0}
        got = kf.read("out", brokers=kafka.brokers, schema={"n": "int64"}, progress=False)
        assert sorted(got["n"]) == list(range(400))


def _until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen in time")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
