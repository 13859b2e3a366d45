"""The script that a careful person writes: json, pandas, and the positions in the results' transaction."""

from __future__ import annotations

import json
import sys
from typing import Any

import confluent_kafka as ck
import duckdb
import pandas as pd

from benchmarks import marks
from benchmarks.data import PARTITIONS, Sums
from benchmarks.peers import Run, program, run_of
from benchmarks.verify import sums_of_database

TUNED = {"fetch.queue.backoff.ms": 5, "queued.min.messages": 300_000}
BATCH_ROWS, BATCH_S = 100_000, 1.0


class ByHand:
    """The script, with the client's defaults or with the one setting that matters most."""

    jobs: tuple[str, ...] = ("land", "aggregate")
    guarantee = "exactly once"

    def __init__(self, *, tuned: bool) -> None:
        self._tuned = tuned
        self.name = "by hand, tuned client" if tuned else "by hand"
        self.settings = "fetch.queue.backoff.ms=5, queued.min.messages=300000" if tuned else "defaults"

    def set_up(self) -> str:
        return f"pandas {pd.__version__}, duckdb {duckdb.__version__}"

    def command(self, run: Run) -> list[str]:
        return program("benchmarks.peers.by_hand", run, "tuned" if self._tuned else "default")

    def sums(self, run: Run, said: str) -> Sums:
        return sums_of_database(run.database, run.job)


def main(run: Run, config: dict[str, Any]) -> None:
    """The script itself."""
    con = duckdb.connect(run.database)
    con.execute("CREATE TABLE positions (p INTEGER PRIMARY KEY, position BIGINT)")
    con.execute(
        "CREATE TABLE orders (order_id BIGINT, sku VARCHAR, qty BIGINT, price DOUBLE, ts BIGINT, "
        'region VARCHAR, "user" VARCHAR)'
        if run.job == "land"
        else "CREATE TABLE totals (sku VARCHAR PRIMARY KEY, n BIGINT, qty BIGINT, revenue DOUBLE)"
    )
    write = land if run.job == "land" else aggregate
    marks.consuming()
    consumer = ck.Consumer(
        {"bootstrap.servers": run.brokers, "group.id": "by-hand", "enable.auto.commit": False, **config}
    )
    consumer.assign([ck.TopicPartition(run.topic, p, 0) for p in range(PARTITIONS)])
    left = run.records
    while left:
        records = consumer.consume(BATCH_ROWS, BATCH_S)
        if not records:
            continue
        frame = pd.DataFrame([json.loads(record.value()) for record in records])
        positions = {record.partition(): record.offset() + 1 for record in records}
        con.execute("BEGIN")
        write(con, frame)
        for p, position in positions.items():
            con.execute("INSERT OR REPLACE INTO positions VALUES (?, ?)", [p, position])
        con.execute("COMMIT")
        left -= len(records)
    con.close()
    marks.done()


def land(con: duckdb.DuckDBPyConnection, frame: pd.DataFrame) -> None:
    con.execute("INSERT INTO orders BY NAME SELECT * FROM frame")


def aggregate(con: duckdb.DuckDBPyConnection, frame: pd.DataFrame) -> None:
    frame["revenue"] = frame.qty * frame.price
    sums = frame.groupby("sku").agg(n=("sku", "size"), qty=("qty", "sum"), revenue=("revenue", "sum"))
    sums = sums.reset_index()
    con.execute(
        "INSERT INTO totals SELECT * FROM sums ON CONFLICT (sku) "
        "DO UPDATE SET n = totals.n + excluded.n, qty = totals.qty + excluded.qty, "
        "revenue = totals.revenue + excluded.revenue"
    )


if __name__ == "__main__":
    main(run_of(sys.argv), TUNED if sys.argv[6] == "tuned" else {})
