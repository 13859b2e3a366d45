"""What Kafka and its client really do while a pipeline reads, row by row, on a real broker."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import pandas as pd
import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

import kframe as kf
from kframe.errors import ConfigError, LostRange, TooManyDeadLetters, TopicRecreated, UnreadableRecord
from kframe.source import native
from kframe.source.kafka import KafkaSource
from kframe.source.settings import Settings

pytestmark = pytest.mark.broker

SCHEMA = {"n": "int64"}
MakeTopic = Callable[..., str]

MEASURED_RUN = r"""
import re, sys, threading
import kframe as kf

made = kf.Pipeline(
    sys.argv[1],
    brokers=sys.argv[2],
    batch_bytes_max=8_000_000,
    kafka_config={"queued.max.messages.kbytes": 16_384},
)
made.topic(sys.argv[3], schema={"n": "int64", "x": "str"})

@made.table("rows", inputs=[sys.argv[3]])
def rows(batch):
    threading.Event().wait(0.02)
    return batch[["n"]]

report = made.run(progress=False)
assert sorted(made.read("rows")["n"]) == list(range(400))
peak_kb = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])
print(made.batches(10_000)["rows"].max(), peak_kb // 1024)
"""
"""Runs a pipeline with a slow function; prints the largest batch in rows and the peak memory in MB."""


@pytest.fixture(autouse=True, params=["native", "objects"])
def drain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hazard is met twice: with records drained in C, and by the client's Python objects."""
    if request.param == "objects":
        monkeypatch.setattr(native, "_libraries", lambda: None)
    elif native._libraries() is None:
        pytest.skip("drain.c was not compiled: no C compiler when kframe was installed")


def produce(kafka: kf.LocalKafka, topic: str, numbers: Any, **options: Any) -> None:
    producer = ck.Producer({"bootstrap.servers": kafka.brokers, **options.pop("config", {})})
    for n in numbers:
        producer.produce(topic, json.dumps({"n": n}).encode(), **options)
    assert producer.flush(30) == 0


def transactional(kafka: kf.LocalKafka, name: str) -> Any:
    producer = ck.Producer({"bootstrap.servers": kafka.brokers, "transactional.id": name})
    producer.init_transactions(30)
    return producer


def pipeline(kafka: kf.LocalKafka, folder: Path, topic: str, **options: Any) -> kf.Pipeline:
    made = kf.Pipeline(folder / "p.duckdb", brokers=kafka.brokers, **options)
    made.topic(topic, schema=SCHEMA)
    made.land(topic, table="rows")
    return made


def landed(made: kf.Pipeline) -> list[int]:
    return sorted(made.read("rows")["n"].tolist())


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for `condition`, with a bound."""
    pause = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        pause.wait(0.05)
    raise AssertionError("it did not happen in time")


def admin(kafka: kf.LocalKafka) -> Any:
    return AdminClient({"bootstrap.servers": kafka.brokers})


def expire(kafka: kf.LocalKafka, topic: str, before: int) -> None:
    client = admin(kafka)
    futures = client.delete_records([ck.TopicPartition(topic, 0, before)])
    for future in futures.values():
        future.result(30)


def test_expired_records_stop_the_run_and_are_named(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: auto.offset.reset=earliest."""
    topic = make_topic()
    produce(kafka, topic, range(10))
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
        produce(kafka, topic, range(10, 30))
        expire(kafka, topic, 20)
        with pytest.raises(LostRange, match=rf"{topic}\[0\] offsets \[10, 20\)"):
            made.run(progress=False)
        assert landed(made) == list(range(10))
        gaps = made.sql("SELECT topic, start, stop, reason FROM _kframe.gaps").fetchall()
        assert gaps == [(topic, 10, 20, "lost")]


def test_expired_records_are_skipped_only_when_asked(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic = make_topic()
    produce(kafka, topic, range(10))
    with pipeline(kafka, tmp_path, topic, on_lost_range="skip") as made:
        made.run(progress=False)
        produce(kafka, topic, range(10, 30))
        expire(kafka, topic, 20)
        made.run(progress=False)
        assert landed(made) == [*range(10), *range(20, 30)]
        assert made.sql("SELECT start, stop, reason FROM _kframe.gaps").fetchall() == [(10, 20, "skipped")]


def test_records_that_expire_under_a_live_run_are_named(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """A paused run is overtaken by retention. Kills: swallowing the client's one -140."""
    topic = make_topic()
    produce(kafka, topic, range(10))
    with pipeline(kafka, tmp_path, topic, commit_interval_ms=50) as made:
        made.run(progress=False)
        produce(kafka, topic, range(10, 40))
        expire(kafka, topic, 30)
        made.start()
        with pytest.raises(LostRange, match=r"offsets \[10, 30\)"):
            made.wait(30)


def test_a_position_beyond_the_end_is_no_silent_jump(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic = make_topic()
    produce(kafka, topic, range(10))
    with (
        pipeline(kafka, tmp_path, topic, start_from={0: 50}) as made,
        pytest.raises(LostRange, match="ends at 10"),
    ):
        made.run(progress=False)


class Overheard:
    """An admin client, and what it was asked."""

    def __init__(self, admin: AdminClient) -> None:
        self._admin = admin
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self._admin, name)


def test_offsets_are_asked_when_the_leaders_are_known(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """A new client that is asked for offsets at once misses its own metadata now and then, for 3 seconds."""
    source = KafkaSource(Settings(kafka.brokers), group_id="asks")
    admin = source._admin = Overheard(source._admin)
    tp = kf.model.TopicPartition(make_topic(), 0)
    assert source.offsets([tp], "latest") == source.offsets([tp], "earliest") == {tp: 0}
    assert admin.asked == ["describe_topics", "list_offsets", "list_offsets"]


def test_a_topic_made_again_stops_the_next_run(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: not storing the topic id; the new topic's records would be taken for the old one's."""
    topic = make_topic()
    produce(kafka, topic, range(5))
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
        make_again(kafka, topic)
        produce(kafka, topic, range(100, 120))
        with pytest.raises(TopicRecreated, match="deleted and made again"):
            made.run(progress=False)
        assert landed(made) == list(range(5))


def test_a_topic_made_again_stops_a_live_run(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: checking the topic id at the start alone."""
    topic = make_topic()
    produce(kafka, topic, range(5))
    with pipeline(kafka, tmp_path, topic, commit_interval_ms=50) as made:
        made.start()
        until(lambda: made.status().rows == 5)
        make_again(kafka, topic)
        produce(kafka, topic, range(100, 120))
        with pytest.raises((TopicRecreated, LostRange)):
            made.wait(60)
        assert landed(made) == list(range(5))


def make_again(kafka: kf.LocalKafka, topic: str) -> None:
    client = admin(kafka)
    client.delete_topics([topic], operation_timeout=30)[topic].result(30)
    until(lambda: topic not in client.list_topics(timeout=10).topics)
    kafka.create_topic(topic)


def test_the_leader_epoch_is_stored_and_assigned(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """With it the broker tells a truncated log; without, records are skipped.

    Kills: dropping the epoch, or forgetting it behind transaction markers, which carry none.
    """
    topic = make_topic()
    produce(kafka, topic, range(5))
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
        assert made.sql("SELECT position, leader_epoch FROM _kframe.positions").fetchall() == [(5, 0)]
        writer = transactional(kafka, "aborts")
        writer.begin_transaction()
        writer.produce(topic, b"never")
        writer.flush(30)
        writer.abort_transaction(30)
        made.run(progress=False)
        assert made.sql("SELECT position, leader_epoch FROM _kframe.positions").fetchall() == [(7, 0)]


def test_added_partitions_are_read_from_their_start(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: beginning a grown topic's partitions at start_from="latest"."""
    topic = make_topic()
    with pipeline(kafka, tmp_path, topic, start_from="latest") as made:
        made.run(progress=False)
        client = admin(kafka)
        client.create_partitions([NewPartitions(topic, 3)])[topic].result(30)
        until(lambda: len(client.list_topics(topic, timeout=10).topics[topic].partitions) == 3)
        produce(kafka, topic, range(4), partition=2)
        made.run(progress=False)
        assert landed(made) == [0, 1, 2, 3]


def test_partitions_added_under_a_live_run_are_seen(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic = make_topic()
    with pipeline(kafka, tmp_path, topic, commit_interval_ms=50) as made:
        made.start()
        client = admin(kafka)
        client.create_partitions([NewPartitions(topic, 2)])[topic].result(30)
        until(lambda: len(client.list_topics(topic, timeout=10).topics[topic].partitions) == 2)
        produce(kafka, topic, range(4), partition=1)
        until(lambda: made.status().rows == 4)
        assert landed(made) == [0, 1, 2, 3]


def test_markers_and_aborted_records_are_no_gaps(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: taking last offset + 1 for the position, or waiting for the offset before the end."""
    topic = make_topic()
    writer = transactional(kafka, f"{topic}-tx")
    for n, commit in ((1, True), (2, False), (3, True), (4, False)):
        writer.begin_transaction()
        writer.produce(topic, json.dumps({"n": n}).encode())
        writer.flush(30)
        writer.commit_transaction(30) if commit else writer.abort_transaction(30)
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
        assert landed(made) == [1, 3]
        assert made.lag()["lag"].tolist() == [0]
        assert made.sql("SELECT position FROM _kframe.positions").fetchall() == [(8,)]
        assert made.sql("FROM _kframe.gaps").fetchall() == []


def test_an_open_transaction_holds_the_end_and_shows_in_lag(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: lag or stops from the log's end; the run would wait for ever."""
    topic = make_topic()
    produce(kafka, topic, range(3))
    writer = transactional(kafka, f"{topic}-hangs")
    writer.begin_transaction()
    writer.produce(topic, b'{"n": 99}')
    writer.flush(30)
    produce(kafka, topic, range(10, 12))
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
        assert landed(made) == [0, 1, 2]
        lag = made.lag()
        assert lag[["end_offset", "lag", "open_transaction"]].to_numpy().tolist() == [[3, 0, 3]]
        writer.abort_transaction(30)
        made.run(progress=False)
        assert landed(made) == [0, 1, 2, 10, 11]


def test_a_slow_function_loses_nothing_to_the_poll_interval(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: polling on the thread that runs the function."""
    topic = make_topic()
    produce(kafka, topic, range(3))
    config = {"max.poll.interval.ms": 2000, "session.timeout.ms": 2000}
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers, kafka_config=config) as made:
        made.topic(topic, schema=SCHEMA)

        @made.table("rows", inputs=[topic])
        def rows(batch: pd.DataFrame) -> pd.DataFrame:
            threading.Event().wait(3)
            return batch

        made.run(progress=False)
        assert landed(made) == [0, 1, 2]


def test_a_broker_that_goes_and_comes_back(tmp_path: Path) -> None:
    """Kills: ending a run when the brokers are away, or going on silently without saying so."""
    with kf.local_kafka(tmp_path / "kafka") as kafka:
        kafka.create_topic("t")
        produce(kafka, "t", range(3))
        with pipeline(kafka, tmp_path, "t", commit_interval_ms=50) as made:
            made.start()
            until(lambda: made.status().rows == 3)
            kafka.kill()
            until(lambda: made.status().trouble is not None)
            assert made.status().state == "running"
            kafka.restart()
            produce(kafka, "t", range(3, 6))
            until(lambda: made.status().rows == 6, 60)
            assert landed(made) == [0, 1, 2, 3, 4, 5]
            assert made.status().trouble is None


def test_a_batch_larger_than_the_client_takes_is_an_error_with_its_offset(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: treating -198 as something that passes; the partition would stand still for ever."""
    topic = make_topic(**{"max.message.bytes": "20000000"})
    produce(kafka, topic, range(2))
    producer = ck.Producer(
        {"bootstrap.servers": kafka.brokers, "compression.type": "zstd", "message.max.bytes": 20_000_000}
    )
    producer.produce(topic, b'{"n": 1, "x": "' + b"a" * 8_000_000 + b'"}')
    assert producer.flush(30) == 0
    small = {
        "receive.message.max.bytes": 1_000_512,
        "fetch.max.bytes": 1_000_000,
        "message.max.bytes": 1_000_000,
    }
    with (
        pipeline(kafka, tmp_path, topic, kafka_config=small) as made,
        pytest.raises(UnreadableRecord, match=rf"{topic}\[0\] cannot be read at offset 2"),
    ):
        made.run(progress=False)


def test_an_oversized_record_is_a_dead_letter(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """A decompression bomb. Kills: decoding before looking at the length."""
    topic = make_topic(**{"max.message.bytes": "20000000"})
    producer = ck.Producer(
        {"bootstrap.servers": kafka.brokers, "compression.type": "gzip", "message.max.bytes": 20_000_000}
    )
    producer.produce(topic, b'{"n": 1, "x": "' + b"a" * 8_000_000 + b'"}')
    producer.produce(topic, b'{"n": 2}')
    assert producer.flush(30) == 0
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers) as made:
        made.topic(topic, schema=SCHEMA, record_bytes_max=1_000_000)
        made.land(topic, table="rows")
        made.run(progress=False)
        assert landed(made) == [2]
        (dead,) = made.dead_letters().to_dict("records")
        assert (dead["topic"], dead["partition"], dead["offset"], dead["value"]) == (topic, 0, 0, None)
        assert "record_bytes_max" in dead["error"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_memory_is_bounded_whatever_the_record_size(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """400 records of 1 MB, a batch of 8 MB, a function that dawdles. Kills: a queue bounded in rows alone."""
    topic = make_topic(2, **{"max.message.bytes": "2000000"})
    producer = ck.Producer({"bootstrap.servers": kafka.brokers, "message.max.bytes": 2_000_000})
    for n in range(400):
        producer.produce(topic, b'{"n": %d, "x": "%s"}' % (n, b"a" * 1_000_000), partition=n % 2)
        producer.poll(0.02 if n % 20 == 0 else 0)
    assert producer.flush(60) == 0
    command = [sys.executable, "-c", MEASURED_RUN, str(tmp_path / "p.duckdb"), kafka.brokers, topic]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rows_max, peak_mb = map(int, done.stdout.split())
    assert rows_max <= 9
    assert peak_mb < 420, "as much as the topic holds"


def test_null_and_empty_keys_values_and_headers_stay_apart(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: taking b"" for None, or assuming that time goes forward."""
    topic = make_topic()
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    producer.produce(topic, b"", key=b"", timestamp=5_000, headers=[("a", b""), ("a", None)])
    producer.produce(topic, None, key=b"k", timestamp=1)
    producer.produce(topic, b"x", key=None, timestamp=3_000)
    assert producer.flush(30) == 0
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers) as made:
        made.topic(topic, format="bytes", include=["key", "headers", "timestamp", "offset", "tombstone"])
        made.land(topic, table="rows")
        made.run(progress=False)
        rows = made.sql("SELECT * FROM rows ORDER BY _offset").arrow().to_pylist()
    assert [r["value"] for r in rows] == [b"", None, b"x"]
    assert [r["_key"] for r in rows] == [b"", b"k", None]
    assert [r["_tombstone"] for r in rows] == [False, True, False]
    assert rows[0]["_headers"] == [{"key": "a", "value": b""}, {"key": "a", "value": None}]
    assert [r["_timestamp"].timestamp() for r in rows] == [5.0, 0.001, 3.0]


def test_a_missing_topic_is_an_error_at_once(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic = make_topic()
    with (
        pipeline(kafka, tmp_path, topic + "x") as made,
        pytest.raises(ConfigError, match=f"Did you mean '{topic}'"),
    ):
        made.run(progress=False)


def test_a_topic_of_garbage_stops_the_run(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: draining a topic into the dead letters."""
    topic = make_topic()
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    for _ in range(200):
        producer.produce(topic, b"garbage")
    assert producer.flush(30) == 0
    with pipeline(kafka, tmp_path, topic) as made:
        with pytest.raises(TooManyDeadLetters, match="200 of 200"):
            made.run(progress=False)
        assert made.sql("FROM _kframe.positions").arrow()["position"].to_pylist() == [0]
        assert made.dead_letters().empty


def test_acknowledged_positions_show_in_the_group(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    topic = make_topic()
    produce(kafka, topic, range(7))
    with pipeline(kafka, tmp_path, topic) as made:
        made.run(progress=False)
    group = ck.ConsumerGroupTopicPartitions("kframe.p", [ck.TopicPartition(topic, 0)])
    client = admin(kafka)
    found = client.list_consumer_group_offsets([group])["kframe.p"].result(30)
    assert [tp.offset for tp in found.topic_partitions] == [7]


def test_a_wrong_secret_is_not_shown(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    """The client echoes values in its errors. Kills: passing its text on."""
    secret = "hunter2-very-secret"
    config = {"security.protocol": secret, "sasl.password": secret}
    made = kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers, kafka_config=config)
    made.topic("t", schema=SCHEMA)
    made.land("t")
    with pytest.raises(ConfigError) as caught:
        made.run(progress=False)
    assert secret not in str(caught.value)
    assert secret not in repr(made._settings) + repr(made) + str(made.status())
    made.close()
