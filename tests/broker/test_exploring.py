"""Previews, replays and looks at topics on the real broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import confluent_kafka as ck
import pandas as pd
import pytest
from confluent_kafka.admin import AdminClient

import kframe as kf
from kframe.errors import LostRange

pytestmark = pytest.mark.broker
MakeTopic = Callable[..., str]
SCHEMA = {"n": "int64"}


def write(kafka: kf.LocalKafka, topic: str, rows: range, **options: bool) -> None:
    """By key: without one, all of a batch go to one partition."""
    frame = pd.DataFrame({"n": rows})
    kf.write(frame, topic, brokers=kafka.brokers, key="n", progress=False, **options)  # type: ignore[arg-type]


def delete_before(kafka: kf.LocalKafka, topic: str, offset: int) -> None:
    """What retention does."""
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for future in admin.delete_records([ck.TopicPartition(topic, 0, offset)]).values():
        future.result()


def test_a_preview_beside_a_running_pipeline(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: the run's consumer moved or closed by the preview; a transaction's end taken for a record."""
    topic = make_topic(3)
    write(kafka, topic, range(3000))
    write(kafka, topic, range(3000, 3300), transactional=True)
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers, commit_interval_ms=20) as made:
        made.topic(topic)
        made.land(topic, table="rows")
        seen = made.preview("rows", n=90)
        assert 80 <= len(seen) <= 90
        assert len(seen.attrs["ranges"]) == 3
        made.run(progress=False)
        made.start()
        assert len(made.preview("rows", n=10_000)) == 3300
        write(kafka, topic, range(3300, 3310))
        while sum(made.status().positions.values()) < made.lag()["end_offset"].sum():
            assert made.status().state == "running"
        made.stop()
        assert sorted(made.read("rows")["n"]) == list(range(3310))


def test_a_replay_and_what_retention_has_removed(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: a batch given in part, and LostRange without the offsets that are gone."""
    topic = make_topic()
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers) as made:
        made.topic(topic, schema=SCHEMA)
        made.land(topic, table="rows")
        write(kafka, topic, range(10))
        made.run(progress=False)
        write(kafka, topic, range(10, 25))
        made.run(progress=False)
        again = made.replay(1)
        assert isinstance(again, pd.DataFrame)
        assert again["n"].tolist() == list(range(10, 25))
        delete_before(kafka, topic, 12)
        with pytest.raises(LostRange) as caught:
            made.replay(1)
        assert [(r.start, r.stop) for r in caught.value.ranges] == [(10, 12)]
        assert f"{topic}[0] offsets [10, 12)" in str(caught.value)
        assert len(made.read("rows")) == 25


def test_what_peek_shows_can_be_pasted(kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path) -> None:
    """Kills: a schema that is no Python, names bent by JSON's escapes, a format that is left out."""
    odd, table = make_topic(), make_topic()
    rows = pd.DataFrame(
        {"sku": ["a"], '😀 "x"': [1], "nested": [{"a": [1.5]}], "at": [pd.Timestamp(0, tz="UTC")]}
    )
    kf.write(rows, odd, brokers=kafka.brokers, progress=False)
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    producer.produce(table, b"a,1")
    assert producer.flush(30) == 0
    with kf.Pipeline(tmp_path / "p.duckdb", brokers=kafka.brokers) as made:
        for topic, format_ in ((odd, "json"), (table, "text")):
            seen = kf.peek(topic, brokers=kafka.brokers, format=format_)
            code = repr(seen).split("\n\n")[-1]
            eval(code, {"topic": made.topic})
            made.land(topic)
            assert made.schema(topic).to_dict() == seen.schema.to_dict()
        assert made.run(progress=False).dead_letters == 0
        assert '😀 "x"' in made.read(odd).columns
        assert made.read(table)["value"].tolist() == ["a,1"]
