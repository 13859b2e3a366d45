"""What each guarantee of delivery costs: records per second through a pipeline with an output topic.

    python benchmarks/delivery.py [--records 300000] [--rounds 3]

Starts a local Kafka, writes JSON records, and lets each system read and land all of them in a process of its
own: without an output, with every record also sent to a topic at least once, and exactly once. Then the same
with small batches, where what a Kafka transaction costs shows. A rate counts from the first call of
``run()`` to its return, delivery drained; the median of the rounds, which take turns. The output is counted.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

import confluent_kafka as ck
import pandas as pd

import kframe as kf

TOPIC = "orders"
SCHEMA = {"order_id": "int64", "sku": "str", "qty": "int64", "price": "float64"}
SYSTEMS = ("no output", "at_least_once", "exactly_once")


def produce(brokers: str, records: int) -> None:
    kf.LocalKafka(brokers).create_topic(TOPIC, 4)
    numbers = pd.RangeIndex(records)
    frame = pd.DataFrame(
        {
            "order_id": numbers,
            "sku": [f"sku-{i % 1000:04d}" for i in numbers],
            "qty": numbers % 9 + 1,
            "price": (numbers % 400) / 4,
        }
    )
    kf.write(frame, TOPIC, brokers=brokers, key="sku", progress=False)


def job(brokers: str, system: str, batch_rows: int, records: int) -> None:
    """One system, once; prints its seconds."""
    out = f"out-{uuid.uuid4().hex[:8]}"
    kf.LocalKafka(brokers).create_topic(out, 4)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"batch_rows_max": batch_rows, "name": out}
        if system != "no output":
            options["processing_guarantee"] = system
        shop = kf.Pipeline(f"{folder}/shop.duckdb", brokers=brokers, **options)
        shop.topic(TOPIC, schema=SCHEMA)
        shop.land(TOPIC)
        if system != "no output":
            shop.output(out, key="sku")(lambda orders: orders)
        began = time.perf_counter()
        report = shop.run(progress=False)
        seconds = time.perf_counter() - began
        shop.close()
    sent = visible(brokers, out)
    assert report.rows == records
    assert sent == (0 if system == "no output" else records), sent
    print(seconds)


def visible(brokers: str, topic: str) -> int:
    """Records that a read_committed reader sees."""
    reader = ck.Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "count",
            "enable.partition.eof": True,
            "enable.auto.commit": False,
        }
    )
    reader.assign([ck.TopicPartition(topic, p, 0) for p in range(4)])
    count, ended = 0, 0
    while ended < 4:
        for message in reader.consume(1000, 1.0):
            ended += message.error() is not None
            count += message.error() is None
    reader.close()
    return count


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--records", type=int, default=300_000)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.job:
        job(given.job[0], given.job[1], int(given.job[2]), given.records)
        return
    with kf.local_kafka(progress=False) as kafka:
        produce(kafka.brokers, given.records)
        print(f"{given.records:,} records, median of {given.rounds} rounds\n")
        print(f"{'batch rows':>10}  {'output':<14} {'records/s':>10} {'ms a batch':>10}")
        for batch_rows in (100_000, 1_000):
            times: dict[str, list[float]] = {system: [] for system in SYSTEMS}
            for _ in range(given.rounds):
                for system in SYSTEMS:
                    command = [sys.executable, __file__, "--records", str(given.records)]
                    command += ["--job", kafka.brokers, system, str(batch_rows)]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    times[system].append(float(done.stdout))
            for system in SYSTEMS:
                seconds = statistics.median(times[system])
                rate, each = given.records / seconds, 1000 * seconds / (given.records / batch_rows)
                print(f"{batch_rows:>10,}  {system:<14} {rate:>10,.0f} {each:>10,.1f}")


if __name__ == "__main__":
    main()
