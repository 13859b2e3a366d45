"""A machine is lost: how long until another one commits new records, beside Kafka Streams.

The job is the throughput benchmark's aggregate with up to a million skus, each sku always in one partition.
Both systems read the same topic and are watched in the same way: a committed order is one whose sku a
read_committed consumer has seen in the system's changelog topic.

restore     everything is processed and the instance stopped; new orders come in; an instance starts in an
            empty folder. The time from its process' start to the first commit of new orders.
takeover    two instances, one of them standing by with a whole copy, and orders all the while; the active
            one is killed. The time from SIGKILL until orders of every partition are committed again that were
            produced after it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Protocol

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient

import kframe as kf
from benchmarks.data import PARTITIONS, expected, order, put
from benchmarks.measure import Program
from benchmarks.peers import WORK, NotInstalled, Peer, Run
from benchmarks.peers.kafka_streams import KafkaStreams
from benchmarks.peers.with_kframe import Kframe

KEYS_MAX = 1_000_000
ROUNDS = 3
RATE = 1_000
"""Orders a second while instances are killed."""
STEADY_S = 5.0
"""Seconds with orders before a kill."""
SESSION_S = 6
"""Of both systems: how long the group waits for a silent member."""
NEW = 1_000
"""Orders that wait for an instance in an empty folder."""
TIMEOUT_S = 300.0


class Restartable(Peer, Protocol):
    """A peer with a job ``restart``: one of several instances, told apart by their folders."""

    def group(self, run: Run) -> str:
        """The consumer group of its instances."""
        ...

    def changelog(self, run: Run) -> str:
        """The topic that holds its state; its records' keys name the skus."""
        ...


PEERS: tuple[Restartable, ...] = (Kframe(), KafkaStreams())


@dataclass(frozen=True)
class Row:
    """One system; `problem` says why there are no figures. Lists have an entry a round."""

    peer: str
    version: str
    problem: str = ""
    rows: int = 0
    restoring_s: float = 0.0
    rate: float = 0.0
    restore_s: float = 0.0
    takeover_s: float = 0.0
    memory_mb: float = 0.0
    restores_s: list[float] = field(default_factory=list)
    takeovers_s: list[float] = field(default_factory=list)


def run(
    kafka: kf.LocalKafka,
    records: int,
    peers: Sequence[Restartable] = PEERS,
    *,
    scratch: Path = WORK,
    rounds: int = ROUNDS,
    rate: int = RATE,
) -> Iterator[dict[str, object]]:
    """A row for every system. `records` orders come first, of as many skus, up to `KEYS_MAX`."""
    orders = Orders(kafka, f"restart_{time.time_ns()}", min(records, KEYS_MAX))
    orders.put(records)
    for peer in peers:
        row = Row(peer.name, "")
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
        try:
            row = replace(row, version=peer.set_up())
            job = Run("restart", kafka.brokers, orders.topic, orders.sent, folder)
            row = Restart(peer, job, orders, rounds, rate).measured(row)
        except NotInstalled as error:
            row = replace(row, problem=f"not installed: {error}")
        except Exception as error:  # the system's row tells it; the other is measured all the same
            row = replace(row, problem=f"{type(error).__name__}: {error}")
        finally:
            shutil.rmtree(folder)
        yield asdict(row)


class Orders:
    """The topic, and how many orders it has: one a partition in turn, so that a sku keeps its partition."""

    def __init__(self, kafka: kf.LocalKafka, topic: str, skus: int) -> None:
        self.topic = kafka.create_topic(topic, PARTITIONS)
        self.skus = skus - skus % PARTITIONS
        self.sent = 0
        self._producer = ck.Producer(
            {
                "bootstrap.servers": kafka.brokers,
                "compression.type": "lz4",
                "linger.ms": 5,
                "queue.buffering.max.messages": 500_000,
            }
        )

    def put(self, count: int) -> range:
        """Produce so many more orders; which."""
        new = range(self.sent, self.sent + count)
        for i in new:
            put(self._producer, self.topic, order(i, self.skus), i % PARTITIONS)
            self.sent = i + 1
        self._producer.flush()
        return new

    @contextlib.contextmanager
    def flowing(self, rate: int) -> Iterator[None]:
        """So many orders a second, on a thread of its own, until the block ends."""
        ended = threading.Event()

        def work() -> None:
            began, first = time.monotonic(), self.sent
            while not ended.wait(0.01):
                self.put(int((time.monotonic() - began) * rate) - (self.sent - first))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


class Changelog:
    """What a system has committed, seen from outside: the skus in its changelog.

    Parameters
    ----------
    begin : int
        ``OFFSET_END`` looks at what is committed from now on, ``OFFSET_BEGINNING`` at everything.
    """

    def __init__(self, brokers: str, topic: str, skus: int, *, begin: int = ck.OFFSET_END) -> None:
        self._skus = skus
        self._seen: set[bytes] = set()
        self._consumer = ck.Consumer(
            {
                "bootstrap.servers": brokers,
                "group.id": "observer",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "fetch.queue.backoff.ms": 5,
                "queued.min.messages": 300_000,
            }
        )
        partitions = [
            ck.TopicPartition(topic, p) for p in self._consumer.list_topics(topic).topics[topic].partitions
        ]
        for at in partitions:  # an assignment to the end itself would be resolved some time later
            low, high = self._consumer.get_watermark_offsets(at)
            at.offset = high if begin == ck.OFFSET_END else low
        self._consumer.assign(partitions)

    def __enter__(self) -> Changelog:
        return self

    def __exit__(self, *_: object) -> None:
        self._consumer.close()

    def until(self, orders: range, timeout_s: float = TIMEOUT_S) -> float:
        """When the last sku of `orders` had been committed."""
        wanted = {b"sku-%04d" % (i % self._skus) for i in orders}
        deadline = time.monotonic() + timeout_s
        while left := len(wanted - self._seen):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{left} of {len(orders)} orders not committed after {timeout_s} s")
            keys = [record.key() or b"" for record in self._consumer.consume(1000, 0.02)]
            self._seen.update(key.removesuffix(b'"}]').rpartition(b'"')[2] for key in keys)
        return time.monotonic()


class Restart:
    """One system's measurements, in the order in which they are made."""

    def __init__(self, peer: Restartable, job: Run, orders: Orders, rounds: int, rate: int) -> None:
        self._peer = peer
        self._job = job
        self._orders = orders
        self._rounds = rounds
        self._rate = rate
        self._admin = AdminClient({"bootstrap.servers": job.brokers})

    def measured(self, row: Row) -> Row:
        """`row` with all figures; sums are checked after the first run, every restore, and the kills."""
        self._fill()
        restores = [self._restored(i) for i in range(self._rounds)]
        takeovers = list(self._takeovers())
        if any(said["rows"] < self._orders.skus for _, said, _ in restores):
            raise AssertionError(f"not every sku was restored: {restores}")
        restoring_s = median(said["restoring_s"] for _, said, _ in restores)
        return replace(
            row,
            rows=self._orders.skus,
            restoring_s=round(restoring_s, 2),
            rate=round(self._orders.skus / restoring_s),
            restore_s=round(median(seconds for seconds, _, _ in restores), 2),
            takeover_s=round(median(takeovers), 2),
            memory_mb=round(max(memory for _, _, memory in restores)),
            restores_s=[round(seconds, 2) for seconds, _, _ in restores],
            takeovers_s=[round(seconds, 2) for seconds in takeovers],
        )

    def _fill(self) -> None:
        job = self._in_folder("first")
        with self._started(job) as program:
            program.wait_for("done")
            with self._changelog(begin=ck.OFFSET_BEGINNING) as changelog:
                changelog.until(range(job.records - PARTITIONS, job.records))
        self._check(job)

    def _restored(self, round_: int) -> tuple[float, dict[str, float], float]:
        """Seconds to the first new commit, what the instance says of its restore, and its memory in MB."""
        self._wait_for_nobody()
        with self._changelog() as changelog:
            new = self._orders.put(NEW)
            job = self._in_folder(f"restored-{round_}")
            with self._started(job) as program:
                seconds = changelog.until(new[:PARTITIONS]) - program.began
                said = json.loads(program.wait_for("done")[1])
                memory_mb = program.usage()[1]
                changelog.until(new)
        self._check(job)
        return seconds, said, memory_mb

    def _takeovers(self) -> Iterator[float]:
        """Seconds from each kill to the first new commit; the killed instance comes back to stand by."""
        self._wait_for_nobody()
        with contextlib.ExitStack() as programs:
            active = programs.enter_context(self._started(self._in_folder("restored-0")))
            active.wait_for("done")
            for round_ in range(self._rounds):
                job = self._in_folder(f"restored-{1 - round_ % 2}")
                standby = programs.enter_context(self._started(job))
                standby.wait_for("done")
                with self._changelog() as changelog:
                    with self._orders.flowing(self._rate):
                        time.sleep(STEADY_S)
                        killed = time.monotonic()
                        active.kill()
                        first = self._orders.sent
                        yield changelog.until(range(first, first + PARTITIONS)) - killed
                    changelog.until(range(self._orders.sent - PARTITIONS, self._orders.sent))
                active = standby
        self._check(replace(job, records=self._orders.sent))

    # ---- its parts ----------------------------------------------------------------------------------

    def _in_folder(self, name: str) -> Run:
        folder = self._job.folder / name
        folder.mkdir(exist_ok=True)
        return replace(self._job, folder=folder, records=self._orders.sent)

    def _started(self, job: Run) -> Program:
        return Program(self._peer.command(job), job.folder, timeout_s=TIMEOUT_S)

    def _changelog(self, begin: int = ck.OFFSET_END) -> Changelog:
        job = self._job
        return Changelog(job.brokers, self._peer.changelog(job), self._orders.skus, begin=begin)

    def _wait_for_nobody(self) -> None:
        """A member that did not say goodbye holds its group up for a session: not what is measured."""
        group = self._peer.group(self._job)
        deadline = time.monotonic() + TIMEOUT_S
        while self._admin.describe_consumer_groups([group])[group].result().members:
            if time.monotonic() > deadline:
                raise TimeoutError(f"group {group} still has members")
            time.sleep(0.1)

    def _check(self, job: Run) -> None:
        found, wanted = self._peer.sums(job, ""), expected(job.records)._replace(orders=None)
        if found != wanted:
            raise AssertionError(f"wrong result: {found} instead of {wanted}")
