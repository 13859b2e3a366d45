"""The lag and the rates that a status shows are those of the broker, though it asks none."""

from __future__ import annotations

from pathlib import Path

import pytest

import kframe as kf
from kframe.model import TopicPartition
from kframe.source.kafka import KafkaSource
from tests.broker.test_hazards import MakeTopic, pipeline, produce, transactional, until

pytestmark = pytest.mark.broker


@pytest.mark.parametrize("include", [[], ["headers"]], ids=["drained in C", "by the client's objects"])
def test_the_shown_lag_is_the_brokers(
    kafka: kf.LocalKafka,
    make_topic: MakeTopic,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    include: list[str],
) -> None:
    """Kills: ends that are looked at once, or looked up when they are shown."""
    topic = make_topic(2)
    tps = [TopicPartition(topic, p) for p in (0, 1)]
    produce(kafka, topic, range(30), partition=0)
    with pipeline(kafka, tmp_path, topic, commit_interval_ms=50) as made:
        made.topic(topic, schema={"n": "int64"}, include=include)
        made.start()
        until(lambda: made.status().rows == 30)
        until(lambda: made.status().lag == {tps[0]: 0, tps[1]: 0})
        made.pause()
        until(lambda: made.status().state == "paused")
        asked: list[object] = []
        monkeypatch.setattr(KafkaSource, "_ask", lambda _self, call: asked.append(call))
        produce(kafka, topic, range(7), partition=1)
        until(lambda: made.status().lag == {tps[0]: 0, tps[1]: 7})
        open_ = transactional(kafka, f"{topic}-open")
        open_.begin_transaction()
        open_.produce(topic, b'{"n": 1}', partition=1)
        assert open_.flush(30) == 0
        produce(kafka, topic, range(3), partition=0)
        until(lambda: made.status().lag == {tps[0]: 3, tps[1]: 8})  # what an open transaction holds counts
        assert asked == []
        monkeypatch.undo()
        open_.abort_transaction(30)
        made.resume()
        until(lambda: made.status().rows == 40)
        until(lambda: sum(made.status().lag.values()) == 0)
        assert made.lag()["lag"].sum() == 0
        assert made.status().progress == 1.0
