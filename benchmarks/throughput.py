"""Records per second from Kafka to committed results: every peer on the same topic, one after another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from confluent_kafka.admin import AdminClient

import kframe as kf
from benchmarks.data import expected, write_orders
from benchmarks.measure import measure
from benchmarks.peers import WORK, NotInstalled, Peer, Run
from benchmarks.peers.by_hand import ByHand
from benchmarks.peers.kafka_streams import KafkaStreams
from benchmarks.peers.limit import Limit
from benchmarks.peers.quix import Quix
from benchmarks.peers.spark import Spark
from benchmarks.peers.with_kframe import Kframe

PEERS: tuple[Peer, ...] = (
    Limit(), Kframe(), ByHand(tuned=False), ByHand(tuned=True), KafkaStreams(), Spark(), Quix()
)  # fmt: skip
ROUNDS, SHORT_S = 3, 20.0
"""Runs shorter than so many seconds vary most: they are made so many times."""


@dataclass(frozen=True)
class Row:
    """One peer at one job; `problem` says why there are no figures."""

    peer: str
    version: str
    guarantee: str
    settings: str
    job: str
    problem: str = ""
    seconds: float = 0.0
    rate: float = 0.0
    rate_from_start: float = 0.0
    cpu_s: float = 0.0
    memory_mb: float = 0.0


def run(
    kafka: kf.LocalKafka,
    records: int,
    peers: Sequence[Peer] = PEERS,
    *,
    scratch: Path = WORK,
    rounds: int = ROUNDS,
) -> Iterator[dict[str, object]]:
    """Measure and check every job of every peer; a row as soon as it is known."""
    topic = orders_topic(kafka, records)
    for peer in peers:
        version, problem = "", ""
        try:
            version = peer.set_up()
        except NotInstalled as error:
            problem = f"not installed: {error}"
        for job in peer.jobs:
            row = Row(peer.name, version, peer.guarantee, peer.settings, job, problem)
            once = partial(_once, row, peer, kafka, topic, records, scratch)
            yield asdict(row if problem else _median(once, rounds))


def _median(once: Callable[[], Row], rounds: int) -> Row:
    """The middle one of several runs, if they are short; or the first that has a problem."""
    found = [once()]
    while len(found) < rounds and not found[-1].problem and found[0].seconds < SHORT_S:
        found.append(once())
    return found[-1] if found[-1].problem else sorted(found, key=lambda row: row.rate)[len(found) // 2]


def _once(row: Row, peer: Peer, kafka: kf.LocalKafka, topic: str, records: int, scratch: Path) -> Row:
    """`row` with the figures of one run. What the peer has written is checked, then removed."""
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    before = set(admin.list_topics().topics)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    job = Run(row.job, kafka.brokers, topic, records, folder)
    try:
        got = measure(peer.command(job), folder)
        found, wanted = peer.sums(job, got.said), expected(records)
    except Exception as error:  # the peer's row tells it; the other peers are measured all the same
        return replace(row, problem=f"{type(error).__name__}: {error}")
    finally:
        shutil.rmtree(folder)
        _remove_topics(admin, before)
    if found != wanted._replace(orders=wanted.orders if found.orders is not None else None):
        return replace(row, problem=f"wrong result: {found} instead of {wanted}")
    return replace(
        row,
        seconds=round(got.consume_s, 3),
        rate=round(records / got.consume_s),
        rate_from_start=round(records / got.total_s),
        cpu_s=round(got.cpu_s, 2),
        memory_mb=round(got.memory_mb),
    )


def _remove_topics(admin: AdminClient, keep: set[str]) -> None:
    """Delete what a peer has made, apart from Kafka's own topics."""
    made = [t for t in admin.list_topics().topics if t not in keep and not t.startswith("__")]
    for future in admin.delete_topics(made).values() if made else ():
        future.result()


def orders_topic(kafka: kf.LocalKafka, records: int) -> str:
    """The topic with so many orders; written once, and found again by later runs on the same broker."""
    topic = f"orders_{records}"
    if topic not in AdminClient({"bootstrap.servers": kafka.brokers}).list_topics().topics:
        write_orders(kafka, topic, records)
    return topic
