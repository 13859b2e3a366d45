"""Instances of a pipeline that are killed, stopped and woken: another takes over, nothing is lost or doubled.

By both of Kafka's group protocols. Kafka's own console consumer is a judge beside ours.

Kills: a batch that is published by two instances; outputs and tables that part at a take-over; an instance
that wakes and goes on publishing; batches that the dead one had committed and not published, kept beside
their recomputation.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import pandas as pd
import pytest

import kframe as kf
from kframe.testing import STANDBY_EDGES, Fault, Faults
from tests.broker.test_delivery_kills import console_consumer

pytestmark = pytest.mark.broker

STRIKES = {"classic": 30, "consumer": 30}
if "KFRAME_TAKEOVERS" in os.environ:
    STRIKES = dict.fromkeys(STRIKES, int(os.environ["KFRAME_TAKEOVERS"]))
FILES = "abc"
SERVING = (
    *("delivering", "delivered", "committed", "acknowledged"),
    *("fetched", "transformed", "rows_written", "positions_written"),
)
EDGES = (*STANDBY_EDGES, *SERVING)
KEYS = 20
PROTOCOLS: dict[str, dict[str, Any]] = {
    "classic": {"session.timeout.ms": 1000, "heartbeat.interval.ms": 300},
    "consumer": {"group.protocol": "consumer"},  # the session is the broker's
}
SCHEMA = {"sku": "str", "n": "int64"}

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["kframe.testing", "pytest"])  # forked warm, before any thread exists

# ---- the process that is killed ---------------------------------------------------------------------


def pipeline(
    path: str,
    brokers: str,
    topic: str,
    config: dict[str, Any],
    at_edge: Callable[[str], None] | None = None,
) -> kf.Pipeline:
    shop = kf.Pipeline(
        path,
        brokers=brokers,
        name=topic,
        standby=True,
        commit_interval_ms=20,
        batch_rows_max=500,
        kafka_config=config,
        at_edge=at_edge,
    )
    shop.topic(topic, schema=SCHEMA, include=["partition", "offset"])
    shop.land(topic, table="landed")
    shop.aggregate("sold", source=topic, by="sku", n=("n", "count"), total=("n", "sum"))
    shop.publish("landed", topic=f"{topic}-out", key="sku")
    return shop


def serve(told: Any, fault: list[Fault], path: str, *where: Any) -> None:
    faulthandler.register(signal.SIGUSR1)
    shop = pipeline(path, *where, Faults(*fault))
    signal.signal(signal.SIGTERM, lambda *_: shop._run and shop._run.stop())
    shop.start()
    shown = None
    while not shop._run.ended.wait(0.02):  # type: ignore[union-attr]
        status = shop.status()
        at_now = sum(status.positions.values()) if status.state == "running" else 0
        if (now := (status.state, at_now)) != shown:
            told.send(now)
            shown = now
    shop.wait()
    shop.close()


# ---- the test ---------------------------------------------------------------------------------------


class Instance:
    """A process that serves one file, and what it said last."""

    def __init__(
        self,
        file: Path,
        where: tuple[Any, ...],
        edge: str = "",
        at: int = 0,
        process: Callable[..., None] = serve,
    ) -> None:
        self.file = file
        self.edge = edge
        self.said = ("", 0)
        self._heard, told = _processes.Pipe(duplex=False)
        fault = [Fault(edge, "kill", at)] if edge else []
        self.process = _processes.Process(target=process, args=(told, fault, str(file), *where))
        self.process.start()
        told.close()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                self.said = self._heard.recv()
        except (EOFError, OSError):
            return

    def __repr__(self) -> str:
        if self.process.exitcode is None:
            self.send(signal.SIGUSR1)  # its threads' stacks
        return f"<{self.file.name} {self.said}, exit {self.process.exitcode}, {self.edge or 'any'}>"

    def send(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def kill(self) -> None:
        self.edge = ""
        self.process.kill()
        self.process.join(30)

    @property
    def active(self) -> bool:
        return self.process.exitcode is None and self.said[0] == "running"


@pytest.fixture(scope="module")
def kafka() -> Iterator[Any]:
    """A broker that takes short sessions, so that a dead instance is noticed in a second."""
    config = {
        "group.min.session.timeout.ms": 500,
        "group.consumer.min.session.timeout.ms": 500,
        "group.consumer.session.timeout.ms": 1000,
        "group.consumer.min.heartbeat.interval.ms": 100,
        "group.consumer.heartbeat.interval.ms": 300,
    }
    with kf.local_kafka(config=config, progress=False) as broker:
        yield broker


class Feeder(threading.Thread):
    """Writes records until told to stop; numbers rise within a key, which stays in its partition."""

    def __init__(self, kafka: kf.LocalKafka, topic: str) -> None:
        super().__init__(daemon=True)
        self._producer = ck.Producer(
            {"bootstrap.servers": kafka.brokers, "enable.idempotence": True, "log_level": 0}
        )
        self._topic = topic
        self._enough = threading.Event()
        self.written = 0

    def run(self) -> None:
        while not self._enough.wait(0.02):
            for _ in range(10):
                sku = f"s{self.written % KEYS}"
                self._producer.produce(self._topic, json.dumps({"sku": sku, "n": self.written}), sku)
                self.written += 1
            self._producer.poll(0)

    def end(self) -> int:
        self._enough.set()
        self.join()
        assert self._producer.flush(30) == 0
        return self.written


def until(condition: Callable[[], bool], otherwise: Callable[[], str], seconds: float = 60) -> None:
    """Wait for a condition, in bounded time."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        pause.wait(0.02)


def aborted(kafka: kf.LocalKafka, topic: str) -> int:
    """Records that only a reader of uncommitted ones sees."""
    seen = kf.read(topic, brokers=kafka.brokers, schema=SCHEMA, progress=False)
    raw = ck.Consumer(
        {
            "bootstrap.servers": kafka.brokers,
            "group.id": "raw",
            "isolation.level": "read_uncommitted",
            "enable.partition.eof": True,
        }
    )
    partitions = raw.list_topics(topic, timeout=10).topics[topic].partitions
    raw.assign([ck.TopicPartition(topic, p, 0) for p in partitions])
    records = ends = 0
    while ends < len(partitions):
        message = raw.poll(10)
        assert message is not None
        if message.error() is None:
            records += 1
        else:
            ends += 1
    raw.close()
    return records - len(seen)


class Group:
    """The instances; one that has died at its edge is replaced, with the same file and another edge."""

    def __init__(self, folder: Path, where: tuple[Any, ...], strikes: int, dice: random.Random) -> None:
        self._where, self._strikes, self._dice = where, strikes, dice
        self._armed = Counter[str]()
        self.struck = Counter[str]()
        self.members = [Instance(folder / f"{name}.duckdb", where) for name in FILES]

    def revive(self) -> None:
        for i, member in enumerate(self.members):
            if member.process.exitcode is not None:
                assert member.process.exitcode == -signal.SIGKILL, member
                self.struck[member.edge or "at a random moment"] += 1
                edge, at = "", 0
                if self._dice.random() < 0.6 and not self.enough():
                    edge = min(EDGES, key=self._armed.__getitem__)
                    self._armed[edge] += 1
                    at = self._dice.randrange(1, 4) if edge in SERVING else 1
                    at += edge == "delivering"  # the first delivery of a turn carries no output
                self.members[i] = Instance(member.file, self._where, edge, at)

    def enough(self) -> bool:
        """Whether it was struck often, at every edge of a take-over and with a transaction open."""
        wanted = {*STANDBY_EDGES, "delivering"}
        return self.struck.total() >= self._strikes and wanted <= set(self.struck)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            self.revive()
            return condition()

        until(met, lambda: f"{what}: {self.members}")

    def active(self, *, but: Instance | None = None) -> bool:
        return any(member.active for member in self.members if member is not but)

    def strike(self) -> None:
        """Take the active instance's work away from it in one of several ways; a follower may die too."""
        pause = threading.Event()
        self.wait(self.active, "nobody is active")
        victim = next((m for m in self.members if m.active), self.members[0])
        unarmed = [m for m in self.members if m is not victim and not m.edge]
        if unarmed and self._dice.random() < 0.8:
            unarmed[0].kill()
        if victim.edge in SERVING:
            self.wait(lambda: victim not in self.members, f"{victim.edge} was never passed")
        elif self._dice.random() < 0.2:
            victim.send(signal.SIGSTOP)
            self.wait(lambda: self.active(but=victim), "nobody took over from the stopped one")
            pause.wait(self._dice.random())
            victim.send(signal.SIGCONT)
            self.wait(lambda: not victim.active, "the one that woke went on")
            self.struck["stopped and woken"] += 1
        else:
            pause.wait(self._dice.random() * 0.4)
            self._armed[victim.edge] -= 1  # it comes again
            victim.kill()

    def end(self) -> None:
        for member in self.members:
            member.kill()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_take_overs(protocol: str, kafka: kf.LocalKafka, tmp_path: Path) -> None:
    topic = kafka.create_topic(f"orders-{protocol}", 3)
    kafka.create_topic(f"{topic}-out", 3)
    feeder = Feeder(kafka, topic)
    feeder.start()
    where = (kafka.brokers, topic, PROTOCOLS[protocol])
    began, group = time.monotonic(), Group(tmp_path, where, STRIKES[protocol], random.Random(11))
    try:
        while not group.enough():
            group.strike()
        records = feeder.end()
        group.wait(lambda: any(m.active and m.said[1] == records for m in group.members), "not all was read")
        for member in group.members:
            member.send(signal.SIGTERM)
        until(lambda: all(m.process.exitcode == 0 for m in group.members), lambda: f"{group.members}")
    finally:
        feeder.end()
        group.end()
    took = time.monotonic() - began
    print(f"\n{group.struck.total()} in {took:.0f} s over {records:,} records: {dict(group.struck)}")
    assert group.enough()
    for name in FILES:
        check_tables(tmp_path / f"{name}.duckdb", records, *where)
    check_output(kafka, f"{topic}-out", records)
    assert aborted(kafka, f"{topic}-out") > 0, "no kill hit an open transaction"


def check_tables(file: Path, records: int, *where: Any) -> None:
    """What an instance's own file holds, once it has caught up."""
    expected = pd.DataFrame({"n": range(records)})
    by_key = expected.groupby("s" + (expected["n"] % KEYS).astype(str))["n"]
    with pipeline(str(file), *where) as shop:
        assert shop.run(progress=False).rows == 0
        landed, sold = shop.read("landed"), shop.read("sold").set_index("sku").sort_index()
    assert not landed.duplicated(["_partition", "_offset"]).any()
    assert sorted(landed["n"]) == list(range(records))
    assert (sold["n"] == by_key.count()).all()
    assert (sold["total"] == by_key.sum()).all()


def check_output(kafka: kf.LocalKafka, out: str, records: int) -> None:
    """Every number once, rising within a key, as ours and as Kafka's own consumer reads them."""
    sent = kf.read(out, brokers=kafka.brokers, schema=SCHEMA, include=["offset"], progress=False)
    ours = list(sent.sort_values("_offset", kind="stable")[["sku", "n"]].itertuples(index=False, name=None))
    theirs = [(key, value["n"]) for key, value in console_consumer(kafka.brokers, out)]
    for reader, got in (("kframe", ours), ("the console consumer", theirs)):
        assert sorted(n for _, n in got) == list(range(records)), f"lost or doubled on the way out: {reader}"
        for key in range(KEYS):
            of_key = [n for sku, n in got if sku == f"s{key}"]
            assert all(a < b for a, b in pairwise(of_key)), f"s{key} is out of order: {reader}"
