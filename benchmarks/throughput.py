"""Records per second from Kafka to committed results: every peer on the same topic, one after another."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from confluent_kafka.admin import AdminClient

import kframe as kf
from benchmarks.data import expected, write_orders
from benchmarks.measure import ProgramFailed, measure
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
JOBS = {
    "read": "read every record, do nothing with it",
    "copy": "read, and copy the value",
    "land": "land every decoded record",
    "aggregate": "count and two sums per sku (1,000)",
    "pandas": "the same through a pandas function",
}


@dataclass(frozen=True)
class Row:
    """One peer at one job; `problem` says why there are no figures."""

    peer: str
    version: str
    guarantee: str
    settings: str
    job: str
    problem: str = ""
    rate: float = 0.0
    rate_from_start: float = 0.0
    cpu_s: float = 0.0
    memory_mb: float = 0.0


def run(
    kafka: kf.LocalKafka, records: int, peers: Sequence[Peer] = PEERS, scratch: Path = WORK
) -> Iterator[dict[str, object]]:
    """Measure and check every job of every peer; a row as soon as it is known."""
    topic = orders_topic(kafka, records)
    for peer in peers:
        try:
            version = peer.set_up()
        except NotInstalled as error:
            for job in peer.jobs:
                yield asdict(
                    Row(peer.name, "", peer.guarantee, peer.settings, job, f"not installed: {error}")
                )
            continue
        for job in peer.jobs:
            row = Row(peer.name, version, peer.guarantee, peer.settings, job)
            yield asdict(_measured(row, peer, kafka, topic, records, scratch))


def _measured(row: Row, peer: Peer, kafka: kf.LocalKafka, topic: str, records: int, scratch: Path) -> Row:
    """`row` with its figures. What the peer has written is checked, then removed."""
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    before = set(admin.list_topics().topics)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=scratch))
    job = Run(row.job, kafka.brokers, topic, records, folder)
    try:
        got = measure(peer.command(job), folder)
        found, wanted = peer.sums(job, got.said), expected(records)
        if found != wanted._replace(orders=wanted.orders if found.orders is not None else None):
            return replace(row, problem=f"wrong result: {found} instead of {wanted}")
    except ProgramFailed as error:
        return replace(row, problem=str(error))
    finally:
        shutil.rmtree(folder)
        for future in admin.delete_topics(made).values() if (made := _new(admin, before)) else ():
            future.result()
    return replace(
        row,
        rate=round(records / got.consume_s),
        rate_from_start=round(records / got.total_s),
        cpu_s=round(got.cpu_s, 2),
        memory_mb=round(got.memory_mb),
    )


def _new(admin: AdminClient, before: set[str]) -> list[str]:
    """Topics that a peer has made, without Kafka's own."""
    return [t for t in admin.list_topics().topics if t not in before and not t.startswith("__")]


def orders_topic(kafka: kf.LocalKafka, records: int) -> str:
    """The topic with so many orders; written once, and found again by later runs on the same broker."""
    topic = f"orders_{records}"
    if topic not in AdminClient({"bootstrap.servers": kafka.brokers}).list_topics().topics:
        write_orders(kafka, topic, records)
    return topic
