"""Records per second from Kafka to committed DuckDB tables: kframe beside a hand-written script.

    python benchmarks/throughput.py [--records 2000000]

Starts a local Kafka, writes JSON records of about 110 bytes (lz4, 4 partitions), then lets every system do
two jobs from an empty state, each in a process of its own:

T1  land every decoded row
T2  keep count, sum(qty), sum(qty * price) per sku

A rate counts from process start to exit. Each result is checked against the expected sums. CPU seconds are
the steadier figure. "read only" is the client alone, tuned as kframe tunes it: what Python could reach.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import duckdb
import pandas as pd

SCHEMA = {
    "order_id": "int64",
    "sku": "str",
    "qty": "int64",
    "price": "float64",
    "ts": "int64",
    "region": "str",
    "user": "str",
}
TOPIC, PARTITIONS, SKUS = "orders", 4, 1000
T2 = "SELECT sku, count(*) AS n, sum(qty) AS qty, sum(qty * price) AS revenue FROM orders GROUP BY sku"
REGIONS = ("eu", "us", "apac")


def order(i: int) -> tuple[int, float]:
    """Quantity and price of order `i`: prices are quarters, so that float sums are exact."""
    return i % 9 + 1, (i % 400) / 4


def produce(brokers: str, records: int) -> None:
    producer = ck.Producer(
        {
            "bootstrap.servers": brokers,
            "compression.type": "lz4",
            "linger.ms": 50,
            "batch.num.messages": 20_000,
            "queue.buffering.max.messages": 500_000,
        }
    )
    for i in range(records):
        qty, price = order(i)
        value = (
            f'{{"order_id":{i},"sku":"sku-{i % SKUS:04d}","qty":{qty},"price":{price},'
            f'"ts":{1_700_000_000_000 + i},"region":"{REGIONS[i % 3]}","user":"user-{i % 9973:05d}"}}'
        )
        while True:
            try:
                producer.produce(TOPIC, value=value, partition=i // 1000 % PARTITIONS)
                break
            except BufferError:
                producer.poll(0.05)
        if i % 10_000 == 0:
            producer.poll(0)
    producer.flush()


def consumer(brokers: str) -> tuple[Any, dict[int, int]]:
    """A consumer on all partitions from the start, with the one setting that matters most; and the ends."""
    reader = ck.Consumer(
        {
            "bootstrap.servers": brokers,
            "group.id": "benchmark",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.queue.backoff.ms": 5,
            "queued.min.messages": 300_000,
        }
    )
    reader.assign([ck.TopicPartition(TOPIC, p, 0) for p in range(PARTITIONS)])
    ends = {p: reader.get_watermark_offsets(ck.TopicPartition(TOPIC, p))[1] for p in range(PARTITIONS)}
    return reader, ends


def read_only(brokers: str, _path: str, _job: str) -> None:
    reader, ends = consumer(brokers)
    left = sum(ends.values())
    while left:
        left -= len([m.value() for m in reader.consume(500, 1.0)])


def by_hand(brokers: str, path: str, job: str) -> None:
    """What a careful person writes: json, pandas, and positions in the same transaction."""
    con = duckdb.connect(path)
    con.execute("CREATE TABLE positions (p INTEGER PRIMARY KEY, position BIGINT)")
    con.execute(
        "CREATE TABLE orders (order_id BIGINT, sku VARCHAR, qty BIGINT, price DOUBLE, ts BIGINT, "
        'region VARCHAR, "user" VARCHAR)'
        if job == "T1"
        else "CREATE TABLE totals (sku VARCHAR PRIMARY KEY, n BIGINT, qty BIGINT, revenue DOUBLE)"
    )
    reader, ends = consumer(brokers)
    left = sum(ends.values())
    while left:
        records = reader.consume(100_000, 0.5)
        if not records:
            continue
        frame = pd.DataFrame([json.loads(m.value()) for m in records])
        positions = {m.partition(): m.offset() + 1 for m in records}
        con.execute("BEGIN")
        if job == "T1":
            con.execute("INSERT INTO orders BY NAME SELECT * FROM frame")
        else:
            frame["revenue"] = frame.qty * frame.price
            sums = frame.groupby("sku").agg(n=("sku", "size"), qty=("qty", "sum"), revenue=("revenue", "sum"))
            sums = sums.reset_index()
            con.execute(
                "INSERT INTO totals SELECT * FROM sums ON CONFLICT (sku) "
                "DO UPDATE SET n = totals.n + excluded.n, qty = totals.qty + excluded.qty, "
                "revenue = totals.revenue + excluded.revenue"
            )
        for p, position in positions.items():
            con.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", [p, position])
        con.execute("COMMIT")
        left -= len(records)
    con.close()


def with_kframe(brokers: str, path: str, job: str) -> None:
    import kframe as kf

    with kf.Pipeline(path, brokers=brokers) as shop:
        shop.topic("orders", schema=SCHEMA)
        if job == "T1":
            shop.land("orders")
        elif job == "T2":
            shop.sql_table("totals", T2)
        else:
            pandas_step(shop)
        shop.run(progress=False)


def pandas_step(shop: Any) -> None:
    """T2 by a pandas function that returns each batch's sums; the reader adds them up."""

    @shop.table("totals")
    def totals(orders: pd.DataFrame) -> pd.DataFrame:
        orders["revenue"] = orders.qty * orders.price
        grouped = orders.groupby("sku")
        return grouped.agg(n=("sku", "size"), qty=("qty", "sum"), revenue=("revenue", "sum"))


SYSTEMS = {"kframe": with_kframe, "by hand": by_hand, "read only": read_only}


def check(path: str, job: str, records: int) -> None:
    """The sums in the tables must be those of the records."""
    con = duckdb.connect(path, read_only=True)
    query = (
        "SELECT count(*), sum(qty), sum(qty * price), count(DISTINCT order_id) FROM orders"
        if job == "T1"
        else f"SELECT sum(n), sum(qty), sum(revenue), {records} FROM totals"
    )
    got = con.execute(query).fetchall()[0]
    want = (
        records,
        sum(order(i)[0] for i in range(records)),
        sum(order(i)[0] * order(i)[1] for i in range(records)),
        records,
    )
    assert tuple(map(float, got)) == tuple(map(float, want)), f"{path}: {got} instead of {want}"


def measure(system: str, job: str, brokers: str, records: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "bench.duckdb")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        command = [sys.executable, __file__, "--child", system, job, brokers, path]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        wall = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if system != "read only":
            check(path, job, records)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"rate": records / wall, "cpu": cpu, "mb": float(done.stdout.split()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=2_000_000)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        system, job, brokers, path = args.child
        SYSTEMS[system](brokers, path, job)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
        return
    import kframe as kf

    with kf.local_kafka() as kafka:
        kafka.create_topic(TOPIC, PARTITIONS)
        print(f"writing {args.records:,} records ...", flush=True)
        produce(kafka.brokers, args.records)
        print(f"{'':22}{'records/s':>12}{'CPU s':>8}{'RSS MB':>8}{'x by hand':>11}")
        for job in ("T1", "T2", "T2 in pandas"):
            hand: float | None = None
            for system in ("by hand", "kframe", "read only"):
                if job == "T2 in pandas" and system != "kframe":
                    continue
                got = measure(system, job, kafka.brokers, args.records)
                hand = got["rate"] if system == "by hand" else hand
                ratio = f"{got['rate'] / hand:.1f}" if hand else ""
                name = f"{job:13} {system}"
                print(
                    f"{name:24}{got['rate']:>10,.0f}{got['cpu']:>8.1f}{got['mb']:>8.0f}{ratio:>11}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
