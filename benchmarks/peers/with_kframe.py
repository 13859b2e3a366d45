"""kframe as its README shows it: strict decoding, dead letters, the ledger, a commit every second."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from importlib.metadata import version

import pandas as pd

import kframe as kf
from benchmarks import marks
from benchmarks.data import SCHEMA, Sums
from benchmarks.peers import Run, program, run_of
from benchmarks.verify import sums_of_database
from kframe.errors import Restoring
from kframe.standby.standing import changelog_topic

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

    def group(self, run: Run) -> str:
        """The consumer group of its instances."""
        return f"kframe.{run.topic}.standby"

    def changelog(self, run: Run) -> str:
        """The topic from which its tables are restored."""
        return changelog_topic(run.topic)

    def sums(self, run: Run, said: str) -> Sums:
        return sums_of_database(run.database, run.job)


def main(run: Run) -> None:
    """One pipeline with one step."""
    if run.job == "restart":
        stand_by(run)
        return
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


def stand_by(run: Run) -> None:
    """One instance of several; done once its tables hold every record, whoever has read them."""
    with kf.Pipeline(run.database, brokers=run.brokers, name=run.topic, standby=True) as shop:
        shop.topic(run.topic, schema=SCHEMA)
        shop.sql_table("totals", TOTALS.format(topic=run.topic))
        marks.consuming()
        began = time.monotonic()
        shop.start()
        _wait_for(shop, 1)
        restoring_s = time.monotonic() - began
        ((rows,),) = shop.sql("SELECT count(*) FROM totals").fetchall()
        _wait_for(shop, run.records)
        marks.done(json.dumps({"rows": rows, "restoring_s": restoring_s}))


def _wait_for(shop: kf.Pipeline, records: int) -> None:
    """Until the tables hold so many; raises what has ended the pipeline."""
    while _counted(shop) < records:
        with contextlib.suppress(TimeoutError):
            shop.wait(0.1)  # asking more often would take part in what is measured


def _counted(shop: kf.Pipeline) -> int:
    """Records that the tables hold; none while they are being restored."""
    try:
        return int(shop.sql("SELECT coalesce(sum(position), 0) FROM _kframe.positions").fetchall()[0][0])
    except Restoring:
        return 0


def totals(orders: pd.DataFrame) -> pd.DataFrame:
    """A batch's sums, appended; whoever reads the table adds them up."""
    orders["revenue"] = orders.qty * orders.price
    grouped = orders.groupby("sku")
    return grouped.agg(n=("sku", "size"), qty=("qty", "sum"), revenue=("revenue", "sum"))


if __name__ == "__main__":
    main(run_of(sys.argv))
