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
    import kframe as kf
    from kframe.testing import Fault, Faults

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
        told = "".join(self.told[-12:])
        return f"<{self.file.name} {self.said}, exit {self.process.poll()}, {self.edge or 'any'}> {told}"

    @property
    def active(self) -> bool:
        return self.process.poll() is None and self.said[0] == "running"

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


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


def strike(victim: Instance, others: list[Instance], dice: random.Random) -> str:
    """Take the active instance's work away from it in one of several ways; which."""
    pause = threading.Event()
    if victim.edge:
        until(lambda: victim.process.poll() is not None, lambda: f"the fault never fired: {victim}")
    elif dice.random() < 0.25:
        victim.process.send_signal(signal.SIGSTOP)
        until(lambda: any(i.active for i in others), lambda: f"nobody took over: {others}")
        pause.wait(dice.random())
        victim.process.send_signal(signal.SIGCONT)
        until(lambda: not victim.active, lambda: f"the one that woke went on: {victim}")
        return "stopped and woken"
    else:
        pause.wait(dice.random() * 0.4)
        victim.process.kill()
    assert victim.process.wait(30) == -signal.SIGKILL, victim
    return victim.edge or "at a random moment"


def test_take_overs(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    dice = random.Random(11)
    topic = kafka.create_topic("orders", 3)
    kafka.create_topic("orders-out", 3)
    feeder = Feeder(kafka, topic)
    feeder.start()
    edges, struck, began = cycle(EDGES), Counter[str](), time.monotonic()
    instances = [Instance(tmp_path / f"{name}.duckdb", kafka, topic) for name in FILES]
    try:
        while sum(struck.values()) < STRIKES:
            until(lambda: any(i.active for i in instances), lambda: f"nobody is active: {instances}")
            victim = next(i for i in instances if i.active)
            struck[strike(victim, [i for i in instances if i is not victim], dice)] += 1
            if victim.process.poll() is not None:
                edge, at = (next(edges), dice.randrange(1, 4)) if dice.random() < 0.6 else ("", 0)
                instances[instances.index(victim)] = Instance(victim.file, kafka, topic, edge, at)
        records = feeder.end()
        for instance in [i for i in instances if i.edge]:
            instance.process.kill()
            instance.process.wait(30)
            instances[instances.index(instance)] = Instance(instance.file, kafka, topic)
        until(
            lambda: any(i.active and int(i.said[1]) == records for i in instances),
            lambda: f"not all of {records} was read: {instances}",
        )
        for instance in instances:
            instance.end()
    finally:
        feeder.end()
        for instance in instances:
            instance.process.kill()
            instance.process.wait(30)
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
