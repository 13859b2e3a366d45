"""Brokers that are killed while a pipeline with an output stands by: nothing is lost or doubled.

Kills: a run, a delivery or an election that ends with its broker; offsets asked of a leader by its earlier
term, or of a dead node, which the client does for minutes; rows sent again without asking what was
delivered; a transaction that is taken for aborted when its coordinator is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import kframe as kf
import kframe.deliver.kafka as kafka_target
from kframe.model import TopicPartition
from kframe.source.kafka import KafkaSource
from kframe.source.settings import Settings
from tests.broker.cluster import Cluster
from tests.broker.test_takeover import (
    PROTOCOLS,
    Feeder,
    aborted,
    check_output,
    check_tables,
    pipeline,
    until,
)

pytestmark = pytest.mark.broker

QUICK = {"group.min.session.timeout.ms": 500}
FILES = "ab"
ENOUGH_S = 150  # a transaction that nobody ends is ended by the broker after a minute


class Pair:
    """Two instances of a pipeline, in this process, that are fed."""

    def __init__(self, kafka: Any, folder: Path, at_edge: Callable[[str], None]) -> None:
        topic = kafka.create_topic("orders", 3)
        kafka.create_topic(f"{topic}-out", 3)
        self.where = (kafka.brokers, topic, PROTOCOLS["classic"])
        self._files = [folder / f"{name}.duckdb" for name in FILES]
        self._members = [pipeline(str(file), *self.where, at_edge) for file in self._files]
        self._kafka = kafka
        self.feeder = Feeder(kafka, topic)

    @contextmanager
    def running(self) -> Iterator[Pair]:
        """Fed and read; at the end of the block all that was written is read, and both instances end."""
        self.feeder.start()
        for member in self._members:
            member.start()
        try:
            yield self
            records = self.feeder.end()
            until(lambda: self.read() == records, self.__repr__)
            for member in self._members:
                member.stop()
        finally:
            self.feeder.end()
            for member in self._members:
                member.close()

    def read(self) -> int:
        """How many records the active instance has read."""
        told = [member.status() for member in self._members]
        return max(sum(status.positions.values()) if status.state == "running" else 0 for status in told)

    def __repr__(self) -> str:
        return f"{self.read():,} of {self.feeder.written:,}: " + ", ".join(
            f"{member!r} {member._run and member._run.error!r}" for member in self._members
        )

    def goes_on(self) -> None:
        """Wait until some hundred records more than by now are read."""
        enough = self.feeder.written + 300
        until(lambda: self.read() >= enough, self.__repr__, ENOUGH_S)

    def check(self) -> None:
        records = self.feeder.written
        for file in self._files:
            check_tables(file, records, *self.where)
        check_output(self._kafka, f"{self.where[1]}-out", records)


def test_the_broker_killed_and_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With rows sent and not committed, right after their commit, and at no special moment."""
    monkeypatch.setattr(kafka_target, "_WATCHDOG_S", 3.0)
    armed: list[str] = []

    def at_edge(edge: str) -> None:
        if edge in armed:
            armed.remove(edge)
            kafka.kill()
            kafka.restart()

    with kf.local_kafka(tmp_path / "kafka", config=QUICK, progress=False) as kafka:
        pair = Pair(kafka, tmp_path, at_edge)
        with pair.running():
            for edge in ("delivering", "delivered"):
                pair.goes_on()
                armed.append(edge)
                until(lambda: not armed, lambda: f"no batch has come to {armed}")
            pair.goes_on()
            kafka.kill()
            kafka.restart()
            pair.goes_on()
        pair.check()
        assert aborted(kafka, "orders-out") > 0, "no kill hit an open transaction"


def test_one_of_three_brokers_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator of transactions, with one open; two replicas of three suffice."""
    monkeypatch.setattr(kafka_target, "_WATCHDOG_S", 3.0)
    armed: list[int] = []
    with Cluster(tmp_path / "kafka", **QUICK) as kafka:

        def at_edge(edge: str) -> None:
            if edge == "delivering" and armed:
                kafka.kill(armed.pop())

        pair = Pair(kafka, tmp_path, at_edge)
        with pair.running():
            pair.goes_on()
            until(kafka.in_sync, lambda: "a replica stays behind")
            sources = [KafkaSource(Settings(kafka.brokers), group_id="asks") for _ in range(8)]
            assert all(source.describe(["orders"]) for source in sources)
            armed.append(kafka.leader("__transaction_state"))
            until(lambda: not armed, lambda: "no batch has come to its delivery")
            began = time.monotonic()
            pair.goes_on()
            print(f"\n300 records more {time.monotonic() - began:.1f} s after a node was killed")
            assert all(source.describe(["orders"]) for source in sources), "some ask the dead node"
        pair.check()


def test_offsets_after_a_restart(tmp_path: Path) -> None:
    """A leader's earlier term, which the client remembers, is no reason to be refused."""
    with kf.local_kafka(tmp_path, progress=False) as kafka:
        topic = kafka.create_topic("orders", 1)
        source = KafkaSource(Settings(kafka.brokers), group_id="asks")
        asked = [TopicPartition(topic, 0)]
        assert source.offsets(asked, "latest") == {asked[0]: 0}
        kafka.kill()
        kafka.restart()
        kf.write(pd.DataFrame({"n": range(3)}), topic, brokers=kafka.brokers, progress=False)
        assert source.offsets(asked, "latest") == {asked[0]: 3}
