"""What results add up to, read from where each system has put them: DuckDB, Parquet, a topic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import confluent_kafka as ck
import duckdb
import pyarrow as pa

from benchmarks.data import Sums

LANDED = "SELECT count(*), count(DISTINCT order_id), sum(qty), sum(qty * price) FROM {source}"
TOTALS = "SELECT sum(n), NULL, sum(qty), sum(revenue) FROM {source}"


def sums_of_database(path: str, job: str) -> Sums:
    """Of the table ``orders`` (job ``land``) or ``totals`` in a DuckDB file."""
    with duckdb.connect(path, read_only=True) as con:
        return _sums(con, job, "orders" if job == "land" else "totals")


def sums_of_parquet(pattern: str, job: str) -> Sums:
    """Of Parquet files."""
    with duckdb.connect() as con:
        return _sums(con, job, f"read_parquet('{pattern}')")


def sums_of_topic(brokers: str, topic: str) -> Sums:
    """Of the committed orders in a topic, as JSON."""
    with duckdb.connect() as con:
        con.execute("CREATE TABLE orders (order_id BIGINT, qty BIGINT, price DOUBLE)")
        fields = '{"order_id":"BIGINT","qty":"BIGINT","price":"DOUBLE"}'
        for records in committed(brokers, topic):
            chunk = pa.table({"v": pa.array([r.value() for r in records], pa.binary())})  # noqa: F841
            con.execute(f"INSERT INTO orders SELECT unnest(from_json(decode(v), '{fields}')) FROM chunk")
        return _sums(con, "land", "orders")


def latest_of_topic(brokers: str, topic: str) -> dict[tuple[int, bytes], bytes]:
    """The last committed value of every partition and key, as log compaction keeps it."""
    found = {}
    for records in committed(brokers, topic):
        found.update({(r.partition(), r.key()): r.value() for r in records})
    return {at: value for at, value in found.items() if value is not None}


def committed(brokers: str, topic: str) -> Iterator[list[Any]]:
    """All committed records of a topic, in lists."""
    consumer = ck.Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "verify",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 5,
        }
    )
    try:
        partitions = consumer.list_topics(topic).topics[topic].partitions
        consumer.assign([ck.TopicPartition(topic, p, 0) for p in partitions])
        left = len(partitions)
        while left:
            got = consumer.consume(50_000, 0.2)
            left -= sum(1 for r in got if r.error() and r.error().code() == ck.KafkaError._PARTITION_EOF)
            yield [r for r in got if not r.error()]
    finally:
        consumer.close()


def _sums(con: duckdb.DuckDBPyConnection, job: str, source: str) -> Sums:
    query = LANDED if job == "land" else TOTALS
    row = con.execute(query.format(source=source)).fetchone()
    assert row is not None
    records, orders, qty, revenue = row
    return Sums(int(records), orders, int(qty), float(revenue))
