"""Instances of a pipeline that are killed, stopped and woken: another takes over, nothing is lost or doubled.

Kills: a batch that is published by two instances; outputs and tables that part at a take-over; an instance
that wakes and goes on publishing; batches that the dead one had committed and not published, kept beside
their recomputation.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

STRIKES = int(os.environ.get("KFRAME_TAKEOVERS", "30"))
FILES = "abc"
EDGES = (
    *("fetched", "transformed", "rows_written", "positions_written"),
    *("committed", "acknowledged", "delivering", "delivered"),
)
KEYS = 20
QUICK = {"session.timeout.ms": 1000, "heartbeat.interval.ms": 300}

# ---- the process that is killed ---------------------------------------------------------------------


def serve(path: str, brokers: str, topic: str, edge: str, at: str) -> None:
    import faulthandler

    import kframe as kf
    from kframe.testing import Fault, Faults

    faulthandler.register(signal.SIGUSR1)
    faults = Faults(*([Fault(edge, "kill", int(at))] if edge else []))
    shop = kf.Pipeline(
        path,
        brokers=brokers,
        name=topic,
        standby=True,
        commit_interval_ms=20,
        batch_rows_max=500,
        kafka_config=QUICK,
        at_edge=faults,
    )
    shop.topic(topic, schema={"sku": "str", "n": "int64"}, include=["partition", "offset"])
    shop.land(topic, table="landed")
    shop.aggregate("sold", source=topic, by="sku", n=("n", "count"), total=("n", "sum"))
    shop.publish("landed", topic=f"{topic}-out", key="sku")
    signal.signal(signal.SIGTERM, lambda *_: shop._run and shop._run.stop())
    shop.start()
    shown = ""
    while not shop._run.ended.wait(0.02):  # type: ignore[union-attr]
        status = shop.status()
        at_now = sum(status.positions.values()) if status.state == "running" else 0
        if (now := f"{status.state} {at_now}") != shown:
            print(now, flush=True)
            shown = now
    shop.wait()
    shop.close()


if __name__ == "__main__":
    serve(*sys.argv[1:])
    sys.exit()

# ---- the test ---------------------------------------------------------------------------------------

import confluent_kafka as ck  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402

import kframe as kf  # noqa: E402

pytestmark = pytest.mark.broker


class Instance:
    """A process that serves one file, and what it said last."""

    def __init__(self, file: Path, kafka: kf.LocalKafka, topic: str, edge: str = "", at: int = 0) -> None:
        self.file = file
        self.edge = edge
        command = [sys.executable, __file__, str(file), kafka.brokers, topic, edge, str(at)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = ["", "0"]
        self.told: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(("running", "standby")):
                self.said = line.split()
            elif "nanobind" not in line and "leaked" not in line:
                self.told.append(line)

    def __repr__(self) -> str:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGUSR1)  # its threads' stacks
            threading.Event().wait(1)
        told = "".join(self.told[-120:])
        return f"<{self.file.name} {self.said}, exit {self.process.poll()}, {self.edge or 'any'}> {told}"

    @property
    def active(self) -> bool:
        return self.process.poll() is None and self.said[0] == "running"


@pytest.fixture(scope="module")
def kafka() -> Iterator[Any]:
    """A broker that takes short sessions, so that a dead instance is noticed in a second."""
    config = {"group.min.session.timeout.ms": 500, "group.initial.rebalance.delay.ms": 0}
    with kf.local_kafka(config=config, progress=False) as broker:
        yield broker


class Feeder(threading.Thread):
    """Writes records until told to stop; numbers rise within a key, which stays in its partition."""

    def __init__(self, kafka: kf.LocalKafka, topic: str) -> None:
        super().__init__(daemon=True)
        self._producer = ck.Producer({"bootstrap.servers": kafka.brokers, "enable.idempotence": True})
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


def until(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    """Wait for a condition, in bounded time."""
    pause, deadline = threading.Event(), time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        pause.wait(0.02)


def aborted(kafka: kf.LocalKafka, topic: str) -> int:
    """Records that only a reader of uncommitted ones sees."""
    schema = {"sku": "str", "n": "int64"}
    seen = kf.read(topic, brokers=kafka.brokers, schema=schema, progress=False)
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

    def __init__(self, folder: Path, kafka: kf.LocalKafka, topic: str, dice: random.Random) -> None:
        self._kafka, self._topic, self._dice = kafka, topic, dice
        self._edges = cycle(EDGES)
        self.struck = Counter[str]()
        self.members = [Instance(folder / f"{name}.duckdb", kafka, topic) for name in FILES]

    def revive(self) -> None:
        for i, member in enumerate(self.members):
            if member.process.poll() is not None:
                assert member.process.poll() == -signal.SIGKILL, member
                self.struck[member.edge or "at a random moment"] += 1
                edge, at = "", 0
                if self._dice.random() < 0.6 and sum(self.struck.values()) < STRIKES:
                    edge, at = next(self._edges), self._dice.randrange(1, 4)
                self.members[i] = Instance(member.file, self._kafka, self._topic, edge, at)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        def met() -> bool:
            self.revive()
            return condition()

        until(met, lambda: f"{what}: {self.members}")

    def active(self, *, but: Instance | None = None) -> bool:
        return any(member.active for member in self.members if member is not but)

    def strike(self) -> None:
        """Take the active instance's work away from it in one of several ways."""
        pause = threading.Event()
        self.wait(self.active, "nobody is active")
        victim = next((m for m in self.members if m.active), self.members[0])
        if victim.edge:
            self.wait(lambda: victim not in self.members, f"{victim.edge} was never passed")
        elif self._dice.random() < 0.25:
            victim.process.send_signal(signal.SIGSTOP)
            self.wait(lambda: self.active(but=victim), "nobody took over from the stopped one")
            pause.wait(self._dice.random())
            victim.process.send_signal(signal.SIGCONT)
            self.wait(lambda: not victim.active, "the one that woke went on")
            self.struck["stopped and woken"] += 1
        else:
            pause.wait(self._dice.random() * 0.4)
            victim.process.kill()
            victim.process.wait(30)

    def end(self) -> None:
        for member in self.members:
            member.process.kill()
            member.process.wait(30)


def test_take_overs(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    topic = kafka.create_topic("orders", 3)
    kafka.create_topic("orders-out", 3)
    feeder = Feeder(kafka, topic)
    feeder.start()
    began, group = time.monotonic(), Group(tmp_path, kafka, topic, random.Random(11))
    try:
        while sum(group.struck.values()) < STRIKES:
            group.strike()
        records = feeder.end()
        group.wait(
            lambda: any(m.active and int(m.said[1]) == records for m in group.members), "not all was read"
        )
        for member in group.members:
            member.process.send_signal(signal.SIGTERM)
        until(lambda: all(m.process.poll() is not None for m in group.members), lambda: f"{group.members}")
    finally:
        feeder.end()
        group.end()
    struck = group.struck
    print(
        f"{sum(struck.values())} in {time.monotonic() - began:.0f} s over {records:,} records: {dict(struck)}"
    )

    expected = pd.DataFrame({"n": range(records)})
    expected["sku"] = "s" + (expected["n"] % KEYS).astype(str)
    for name in FILES:
        with kf.follow(
            topic, tmp_path / f"copy-{name}.duckdb", brokers=kafka.brokers, progress=False
        ) as copy:
            landed, sold = copy.read("landed"), copy.read("sold").set_index("sku").sort_index()
    assert sorted(landed["n"]) == list(range(records))
    assert not landed.duplicated(["_partition", "_offset"]).any()
    assert (sold["n"] == expected.groupby("sku")["n"].count()).all()
    assert (sold["total"] == expected.groupby("sku")["n"].sum()).all()

    schema = {"sku": "str", "n": "int64"}
    sent = kf.read(f"{topic}-out", brokers=kafka.brokers, schema=schema, include=["offset"], progress=False)
    assert sorted(sent["n"]) == list(range(records)), "lost or doubled on the way out"
    in_order = sent.sort_values("_offset", kind="stable").groupby("sku")["n"]
    assert in_order.apply(lambda n: n.is_monotonic_increasing).all()
    assert aborted(kafka, f"{topic}-out") > 0, "no kill hit an open transaction"
