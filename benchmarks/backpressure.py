"""A function ten times slower than the rest: nothing is lost, and memory does not grow.

First the pipeline runs over the topic with a function that only copies; then with one that takes ten times
as long a row as the whole pipeline did. Resident memory is noted twice a second.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

import kframe as kf
from benchmarks import marks
from benchmarks.data import SCHEMA, expected
from benchmarks.measure import measure, resident_mb
from benchmarks.peers import WORK, Run, program, run_of
from benchmarks.verify import sums_of_database

SLOWER, SAMPLE_S = 10, 0.5


def run(kafka: kf.LocalKafka, topic: str, records: int) -> Iterator[dict[str, object]]:
    """A row for the quick function and one for the slow one; ``wrong`` says what its table lacks."""
    seconds_a_row = 0.0
    for name in ("quick", "slow"):
        with tempfile.TemporaryDirectory(prefix="run-", dir=WORK) as folder:
            job = Run(name, kafka.brokers, topic, records, Path(folder))
            got = measure(program("benchmarks.backpressure", job, str(seconds_a_row)), job.folder)
            found, wanted = sums_of_database(job.database, "land"), expected(records)
        seconds_a_row = SLOWER * got.consume_s / records
        yield {
            "function": name,
            "records": records,
            "rate": round(records / got.consume_s),
            "wrong": "" if found == wanted else f"{found} instead of {wanted}",
            "memory_mb": round(got.memory_mb),
            "memory_over_time_mb": json.loads(got.said),
        }


def main(run: Run, seconds_a_row: float) -> None:
    """Land the topic through a function that takes `seconds_a_row`, and tell the memory over time."""
    samples: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_S):
            samples.append(round(resident_mb()))

    with kf.Pipeline(run.database, brokers=run.brokers) as shop:
        shop.topic(run.topic, schema=SCHEMA)

        @shop.table("orders", inputs=[run.topic])
        def orders(batch: pd.DataFrame) -> pd.DataFrame:
            time.sleep(len(batch) * seconds_a_row)
            return batch

        marks.consuming()
        watch = threading.Thread(target=sample)
        watch.start()
        try:
            shop.run(progress=False)
        finally:
            ended.set()
            watch.join()
    marks.done(json.dumps(samples))


if __name__ == "__main__":
    main(run_of(sys.argv), float(sys.argv[6]))
