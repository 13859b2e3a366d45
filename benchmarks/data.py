"""The records of the benchmarks: orders of about 110 bytes, the same in every run, and their sums."""

from __future__ import annotations

from typing import NamedTuple

import confluent_kafka as ck
import numpy as np

import kframe as kf

PARTITIONS, SKUS = 4, 1000
REGIONS = ("eu", "us", "apac")
SCHEMA = {
    "order_id": "int64",
    "sku": "str",
    "qty": "int64",
    "price": "float64",
    "ts": "int64",
    "region": "str",
    "user": "str",
}


class Sums(NamedTuple):
    """What a result adds up to; `orders` counts distinct order ids, None where they are not kept."""

    records: int
    orders: int | None
    qty: int
    revenue: float


def expected(records: int) -> Sums:
    """The sums of the first `records` orders."""
    i = np.arange(records)
    qty = i % 9 + 1
    return Sums(records, records, int(qty.sum()), float((qty * (i % 400) / 4).sum()))


def order(i: int, skus: int = SKUS) -> str:
    """Order `i` as JSON. Prices are quarters, so that sums of floats are exact in any order."""
    return (
        f'{{"order_id":{i},"sku":"sku-{i % skus:04d}","qty":{i % 9 + 1},"price":{i % 400 / 4},'
        f'"ts":{1_700_000_000_000 + i},"region":"{REGIONS[i % 3]}","user":"user-{i % 9973:05d}"}}'
    )


def write_orders(kafka: kf.LocalKafka, topic: str, records: int) -> None:
    """Make `topic` and fill it: no keys, 4 partitions in turns of 1,000 records, lz4."""
    kafka.create_topic(topic, PARTITIONS)
    producer = ck.Producer(
        {
            "bootstrap.servers": kafka.brokers,
            "compression.type": "lz4",
            "linger.ms": 50,
            "batch.num.messages": 20_000,
            "queue.buffering.max.messages": 500_000,
        }
    )
    for i in range(records):
        put(producer, topic, order(i), i // 1000 % PARTITIONS)
    producer.flush()


def put(producer: ck.Producer, topic: str, value: str | bytes, partition: int) -> None:
    """Queue one record, waiting while the producer's queue is full."""
    while True:
        try:
            producer.produce(topic, value=value, partition=partition)
            return
        except BufferError:
            producer.poll(0.05)
