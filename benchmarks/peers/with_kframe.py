"""kframe as its README shows it: strict decoding, dead letters, the ledger, a commit every second."""

from __future__ import annotations

import sys
from importlib.metadata import version

import pandas as pd

import kframe as kf
from benchmarks import marks
from benchmarks.data import SCHEMA, Sums
from benchmarks.peers import Run, program, run_of
from benchmarks.verify import sums_of_database

TOTALS = "SELECT sku, count(*) AS n, sum(qty) AS qty, sum(qty * price) AS revenue FROM {topic} GROUP BY sku"


class Kframe:
    """Every default as it is."""

    name = "kframe"
    jobs: tuple[str, ...] = ("land", "aggregate", "pandas")
    guarantee = "exactly once"
    settings = "defaults"

    def set_up(self) -> str:
        return version("kframe-duckdb")

    def command(self, run: Run) -> list[str]:
        return program("benchmarks.peers.with_kframe", run)

    def sums(self, run: Run, said: str) -> Sums:
        return sums_of_database(run.database, run.job)


def main(run: Run) -> None:
    """One pipeline with one step."""
    with kf.Pipeline(run.database, brokers=run.brokers) as shop:
        shop.topic(run.topic, schema=SCHEMA)
        if run.job == "land":
            shop.land(run.topic, table="orders")
        elif run.job == "aggregate":
            shop.sql_table("totals", TOTALS.format(topic=run.topic))
        else:
            shop.table("totals", inputs=[run.topic])(totals)
        marks.consuming()
        shop.run(progress=False)
    marks.done()


def totals(orders: pd.DataFrame) -> pd.DataFrame:
    """A batch's sums, appended; whoever reads the table adds them up."""
    orders["revenue"] = orders.qty * orders.price
    grouped = orders.groupby("sku")
    return grouped.agg(n=("sku", "size"), qty=("qty", "sum"), revenue=("revenue", "sum"))


if __name__ == "__main__":
    main(run_of(sys.argv))
