"""`kf.write`, `kf.read` and `kf.peek` on the real broker."""

from __future__ import annotations

import datetime as dt
import json
import random
from collections.abc import Callable
from decimal import Decimal

import confluent_kafka as ck
import pandas as pd
import pytest

import kframe as kf
from kframe.errors import ConfigError, KframeError
from kframe.model import TopicPartition

MakeTopic = Callable[..., str]
NOON = pd.Timestamp("2026-03-01 12:00", tz="UTC")


def produce_at(kafka: kf.LocalKafka, topic: str, hours: dict[int, int]) -> None:
    """One record a partition and hour: ``{"n": hour}`` at that many hours after noon."""
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    for hour, partition in hours.items():
        at = int((NOON + dt.timedelta(hours=hour)).timestamp() * 1000)
        producer.produce(topic, json.dumps({"n": hour}), partition=partition, timestamp=at)
    assert producer.flush(30) == 0


def numbers(frame: pd.DataFrame) -> list[int]:
    return sorted(frame["n"])


def test_what_is_written_is_read(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """Kills: rounded decimals and big integers, times without zone, missing values as text, lost quotes."""
    topic = make_topic(3)
    frame = pd.DataFrame(
        {
            "sku": ["a", 'b"\n\u2028é', None],
            "id": [2**63 - 1, -(2**63), 0],
            "amount": [Decimal("0.10"), Decimal("99999999999999.99"), None],
            "at": [NOON, pd.NaT, NOON + pd.Timedelta("1us")],
            "tags": [["x", "y"], [], None],
        }
    )
    assert kf.write(frame, topic, brokers=kafka.brokers, key="sku", progress=False) == 3
    schema = {
        "sku": "str",
        "id": "int64",
        "amount": "decimal(18,2)",
        "at": "timestamp[us, UTC]",
        "tags": "list<str>",
    }
    back = kf.read(topic, brokers=kafka.brokers, schema=schema, include=["key"], progress=False)
    back = back.set_index("id").loc[frame["id"]]
    assert back["sku"].tolist()[:2] == frame["sku"].tolist()[:2]
    assert back["_key"].tolist()[:2] == [b"a", 'b"\n\u2028é'.encode()]
    assert back[["sku", "_key"]].isna().to_numpy().tolist() == [[False, False], [False, False], [True, True]]
    assert back["amount"].tolist()[:2] == frame["amount"].tolist()[:2]
    assert back["at"].tolist()[::2] == frame["at"].tolist()[::2]
    assert back["at"].isna().tolist() == [False, True, False]
    assert [list(tags) for tags in back["tags"][:2]] == [["x", "y"], []]


def test_a_range_by_time_or_by_offset(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """Kills: a time taken for an offset, an end that is read, one partition's range used for all."""
    topic = make_topic(2)
    produce_at(kafka, topic, {0: 0, 1: 1, 2: 0, 3: 1, 4: 0})

    def between(start: object, end: object) -> list[int]:
        frame = kf.read(topic, brokers=kafka.brokers, start=start, end=end, progress=False)  # type: ignore[arg-type]
        return numbers(frame)

    hour = dt.timedelta(hours=1)
    assert between("earliest", "latest") == [0, 1, 2, 3, 4]
    assert between(NOON + hour, NOON + 3 * hour) == [1, 2]
    assert between((NOON + 3 * hour).isoformat(), "latest") == [3, 4]
    assert between({0: 1, 1: 0}, {0: 2, 1: 2}) == [1, 2, 3]
    assert between("latest", "latest") == []
    assert between({0: 2, 1: 0}, {0: 99, 1: 99}) == [1, 3, 4]
    assert between({0: 50, 1: 0}, {0: 60, 1: 1}) == [1]
    with pytest.raises(ConfigError, match="partition 1"):
        between({0: 0}, "latest")


def test_a_transaction_is_whole_or_nothing(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    """Kills: a transaction that is committed though a record was refused, or never aborted."""
    topic = make_topic(1, **{"max.message.bytes": 2000})
    rows = pd.DataFrame({"n": range(100), "x": ""})
    rows.loc[99, "x"] = random.Random(1).randbytes(4000).hex()  # also compressed more than the topic takes
    one_by_one = {"batch.num.messages": 1}
    with pytest.raises(KframeError, match="Nothing is visible"):
        kf.write(
            rows, topic, brokers=kafka.brokers, transactional=True, kafka_config=one_by_one, progress=False
        )
    schema = {"n": "int64", "x": "str"}
    tp = TopicPartition(topic, 0)
    assert kf.read(topic, brokers=kafka.brokers, schema=schema, progress=False).empty
    raw = ck.Consumer({"bootstrap.servers": kafka.brokers, "group.id": "raw"})
    assert raw.get_watermark_offsets(ck.TopicPartition(*tp), timeout=10)[1] > 0, "nothing was ever sent"
    raw.close()
    assert kf.write(rows[:99], topic, brokers=kafka.brokers, transactional=True, progress=False) == 99
    assert numbers(kf.read(topic, brokers=kafka.brokers, schema=schema, progress=False)) == list(range(99))


def test_what_cannot_be_decoded_comes_along(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    topic = make_topic()
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    for value in (b'{"n": 1}', b"{", b'{"n": 2.5}', b'{"n": 4}'):
        producer.produce(topic, value)
    assert producer.flush(30) == 0
    frame = kf.read(topic, brokers=kafka.brokers, schema={"n": "int64"}, progress=False)
    assert numbers(frame) == [1, 4]
    assert frame.attrs["dead_letters"]["offset"].tolist() == [1, 2]


def test_a_look_at_a_topic(kafka: kf.LocalKafka, make_topic: MakeTopic) -> None:
    topic = make_topic(2)
    produce_at(kafka, topic, {0: 0, 1: 1, 2: 0, 3: 1})
    seen = kf.peek(topic, brokers=kafka.brokers, n=3)
    assert len(seen.frame) == 3
    assert seen.schema.to_dict() == {"n": "int64"}
    with pytest.raises(ConfigError, match="is empty"):
        kf.peek(make_topic(), brokers=kafka.brokers)


def test_a_key_that_is_no_column(kafka: kf.LocalKafka) -> None:
    with pytest.raises(ConfigError, match="no such column"):
        kf.write(pd.DataFrame({"a": [1]}), "nowhere", brokers=kafka.brokers, key="b")
