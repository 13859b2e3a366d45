"""From produce to committed, at a steady rate, against the commit interval.

Every record carries the time just before it was given to the producer; a batch's time is taken right after
its COMMIT has returned. The first seconds are left out: connections and first batches are start-up.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import confluent_kafka as ck
import duckdb
import numpy as np
import numpy.typing as npt
import pandas as pd

import kframe as kf
from benchmarks import marks
from benchmarks.data import PARTITIONS, put
from benchmarks.measure import measure
from benchmarks.peers import WORK, Run, program, run_of
from benchmarks.peers.by_hand import TUNED

RATE, SECONDS, WARM_UP_S, WARM_UPS = 5_000, 15, 3, 2
CASES = (("kframe", 10), ("kframe", 100), ("kframe", 1000), ("by hand", 100))
"""The system and its commit interval in ms."""

Samples = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""When each record was sent (epoch, us), and how long it took from then to its commit (ms)."""


def run(kafka: kf.LocalKafka) -> Iterator[dict[str, object]]:
    """One row for every case; a broker that has just started is made warm by the first."""
    for _ in range(WARM_UPS):
        _case(kafka, *CASES[0])
    for system, interval_ms in CASES:
        figures = _case(kafka, system, interval_ms)
        yield {"system": system, "commit_interval_ms": interval_ms, "rate": RATE, **figures}


def _case(kafka: kf.LocalKafka, system: str, interval_ms: int) -> dict[str, object]:
    topic = kafka.create_topic(f"latency_{time.time_ns()}", PARTITIONS)
    with tempfile.TemporaryDirectory(prefix="run-", dir=WORK) as folder:
        job = Run(system, kafka.brokers, topic, RATE * SECONDS, Path(folder))
        got = measure(
            program("benchmarks.latency", job, str(interval_ms)),
            job.folder,
            meanwhile=partial(produce, kafka.brokers, topic),
        )
    return dict(json.loads(got.said))


def produce(brokers: str, topic: str) -> None:
    """`RATE` records a second for `SECONDS`, each with the time at which it was sent."""
    producer = ck.Producer({"bootstrap.servers": brokers, "linger.ms": 1})
    began, sent = time.perf_counter(), 0
    while sent < RATE * SECONDS:
        due = min(RATE * SECONDS, int((time.perf_counter() - began) * RATE))
        for i in range(sent, due):
            value = f'{{"sent_us":{time.time_ns() // 1000},"sku":"sku-{i % 1000:04d}","qty":{i % 9 + 1}}}'
            put(producer, topic, value, i % PARTITIONS)
        sent = due
        producer.poll(0)
        time.sleep(0.001)
    producer.flush()


def main(run: Run, interval_ms: int) -> None:
    """Land the records of `run` and tell the figures."""
    cpu, began = time.process_time(), time.perf_counter()
    sent_us, waited_ms = (with_kframe if run.job == "kframe" else by_hand)(run, interval_ms)
    share = (time.process_time() - cpu) / (time.perf_counter() - began)
    assert len(sent_us) == run.records, f"{len(sent_us)} records instead of {run.records}"
    steady = waited_ms[sent_us > sent_us.min() + WARM_UP_S * 1e6]
    p50, p99, most = np.percentile(steady, [50, 99, 100]).round(1).tolist()
    figures = {"p50_ms": p50, "p99_ms": p99, "max_ms": most, "cpu_share": round(share, 2)}
    marks.done(json.dumps(figures))


def with_kframe(run: Run, interval_ms: int) -> Samples:
    """A background run that lands the records; how long each waited."""
    commits: list[float] = []

    def at_edge(edge: str) -> None:
        if edge == "committed":
            commits.append(time.time())

    with kf.Pipeline(
        run.database, brokers=run.brokers, commit_interval_ms=interval_ms, at_edge=at_edge
    ) as shop:
        schema = {"sent_us": "int64", "sku": "str", "qty": "int64"}
        shop.topic(run.topic, schema=schema, include=["partition", "offset"])
        shop.land(run.topic, table="orders")
        shop.start()
        marks.consuming()
        time.sleep(SECONDS)  # looking on would cost what is measured
        while shop.status().rows < run.records:
            time.sleep(0.25)
        shop.stop()
        times = pd.DataFrame({"batch_id": range(len(commits)), "at_us": np.array(commits) * 1e6})
        rows = shop.sql(
            "SELECT o.sent_us, b.batch_id FROM orders AS o JOIN "
            "(SELECT batch_id, unnest(ranges) AS r FROM _kframe.batches) AS b "
            'ON o."_partition" = b.r.partition AND o."_offset" >= b.r.start AND o."_offset" < b.r.stop'
        ).df()
    rows = rows.merge(times, on="batch_id")
    return rows.sent_us.to_numpy(), ((rows.at_us - rows.sent_us) / 1000).to_numpy()


def by_hand(run: Run, interval_ms: int) -> Samples:
    """The script of `benchmarks.peers.by_hand`, committing every `interval_ms`."""
    con = duckdb.connect(run.database)
    con.execute("CREATE TABLE positions (p INTEGER PRIMARY KEY, position BIGINT)")
    con.execute("CREATE TABLE orders (sent_us BIGINT, sku VARCHAR, qty BIGINT)")
    consumer = ck.Consumer(
        {"bootstrap.servers": run.brokers, "group.id": "by-hand", "enable.auto.commit": False, **TUNED}
    )
    consumer.assign([ck.TopicPartition(run.topic, p, 0) for p in range(PARTITIONS)])
    marks.consuming()
    sent: list[npt.NDArray[np.int64]] = []
    waited: list[npt.NDArray[np.float64]] = []
    left = run.records
    while left:
        records = consumer.consume(100_000, interval_ms / 1000)
        if not records:
            continue
        frame = pd.DataFrame([json.loads(record.value()) for record in records])
        con.execute("BEGIN")
        con.execute("INSERT INTO orders BY NAME SELECT * FROM frame")
        for p, position in {record.partition(): record.offset() + 1 for record in records}.items():
            con.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", [p, position])
        con.execute("COMMIT")
        sent.append(frame.sent_us.to_numpy())
        waited.append((time.time() * 1e6 - sent[-1]) / 1000)
        left -= len(records)
    return np.concatenate(sent), np.concatenate(waited)


if __name__ == "__main__":
    main(run_of(sys.argv), int(sys.argv[6]))
