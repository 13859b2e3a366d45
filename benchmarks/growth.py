"""What a batch costs as something grows: keys, partitions, columns, record size, history.

Each case makes a topic and, where state or history is to be large, a DuckDB file filled with SQL after a
first record has made its tables. Then a fresh process opens the file, resumes, and runs to the topic's end.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import confluent_kafka as ck
import duckdb
import numpy as np
import pandas as pd
from confluent_kafka.admin import AdminClient, OffsetSpec

import kframe as kf
from benchmarks import marks
from benchmarks.data import put
from benchmarks.measure import measure
from benchmarks.peers import WORK, Run, program, run_of

BATCH_ROWS = 10_240  # two of the chunks in which records are fetched
RUN_ROWS = 300  # consecutive records of one partition, so that the producer's batches are of a usual size
TIMEOUT_S = 300
STAGES = ("fetch_ms", "decode_ms", "steps_ms", "write_ms")
SCHEMA = {"k": "str", "v": "int64"}


@dataclass(frozen=True)
class Case:
    """One point of one curve.

    Attributes
    ----------
    axis, step, size
        What grows, which step runs, and how large it is.
    values : callable
        The topic's records, beginning with the one that makes the tables.
    fill : str
        SQL that enlarges the file after that record; empty: nothing.
    """

    axis: str
    step: str
    size: int
    values: Callable[[], Iterable[bytes]]
    fill: str = ""
    partitions: int = 1


def cases() -> list[Case]:
    """Every case, small ones first."""
    return [*_keys(), *_partitions(), *_columns(), *_record_sizes(), *_volume(), *_history()]


def _keys() -> Iterator[Case]:
    """Batches of 10,240 random keys, into ever more keys."""
    more = "INSERT INTO {table} SELECT t.* REPLACE (format('user-{{:09d}}', i) AS k) FROM {table} AS t, "
    for step, table in (("upsert", "result"), ("aggregate", "_state.result")):
        for keys in (10_000, 100_000, 1_000_000, 10_000_000):
            fill = more.format(table=table) + f"range(1, {keys}) AS r(i) ORDER BY hash(i)"
            yield Case("keys", step, keys, partial(_keyed, keys, 30 * BATCH_ROWS), fill)


def _partitions() -> Iterator[Case]:
    """307,200 records over ever more partitions."""
    for partitions in (1, 10, 100, 1000):
        yield Case(
            "partitions", "land", partitions, partial(_keyed, 1000, 30 * BATCH_ROWS), partitions=partitions
        )


def _columns() -> Iterator[Case]:
    """4,000,000 integers, in ever wider records."""
    for columns in (2, 20, 200):
        yield Case("columns", "land", columns, partial(_wide, columns, 4_000_000 // columns))


def _record_sizes() -> Iterator[Case]:
    """1 GB, in ever larger records: memory should not follow."""
    for size in (1_000, 30_000, 1_000_000):
        yield Case("bytes a record", "land", size, partial(_large, size, 1_000_000_000 // size))


def _volume() -> Iterator[Case]:
    """Ever more records of 1 kB: nor should memory follow these."""
    for records in (250_000, 1_000_000, 4_000_000):
        yield Case("records of 1 kB", "land", records, partial(_large, 1_000, records))


def _history() -> Iterator[Case]:
    """A ledger that already has ever more batches."""
    for batches in (1, 1_000, 100_000):
        fill = (
            "INSERT INTO _kframe.batches SELECT b.* REPLACE (i AS batch_id) "
            f"FROM _kframe.batches AS b, range(1, {batches}) AS r(i); "
            f"UPDATE _kframe.pipelines SET next_batch_id = {batches}"
        )
        yield Case("batches in the ledger", "land", batches, partial(_keyed, 1000, 30 * BATCH_ROWS), fill)


def _keyed(keys: int, records: int) -> Iterator[bytes]:
    yield b'{"k":"user-000000000","v":1}'
    for key in np.random.default_rng(1).integers(0, keys, records).tolist():
        yield b'{"k":"user-%09d","v":1}' % key


def _wide(columns: int, records: int) -> Iterator[bytes]:
    for i in range(records + 1):
        yield json.dumps({f"c{c}": i + c for c in range(columns)}).encode()


def _large(size: int, records: int) -> Iterator[bytes]:
    noise = np.random.default_rng(1).integers(97, 123, 16_000_000, np.uint8).tobytes()
    for i in range(records + 1):
        at = i * 7919 % (len(noise) - size)
        yield b'{"k":"%s","v":%d}' % (noise[at : at + size - 20], i)


def run(kafka: kf.LocalKafka, chosen: Iterable[Case] | None = None) -> Iterator[dict[str, object]]:
    """A row for every case."""
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for case in cases() if chosen is None else chosen:
        topic = kafka.create_topic(f"growth_{time.time_ns()}", case.partitions)
        _wait_for_leaders(kafka, topic, case.partitions)
        try:
            with tempfile.TemporaryDirectory(prefix="run-", dir=WORK) as folder:
                yield _place(case) | _measured(case, kafka.brokers, topic, Path(folder))
        except Exception as error:  # the case's row tells it; the others are measured all the same
            yield {**_place(case), "problem": f"{type(error).__name__}: {error}"}
        finally:
            admin.delete_topics([topic])[topic].result()


def _wait_for_leaders(kafka: kf.LocalKafka, topic: str, partitions: int) -> None:
    """A new topic of many partitions is there before each of them answers."""
    asked = {ck.TopicPartition(topic, p): OffsetSpec.latest() for p in range(partitions)}
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        admin = AdminClient({"bootstrap.servers": kafka.brokers})  # an older client may go by older leaders
        answers = admin.list_offsets(asked, request_timeout=5)
        if not any([future.exception() for future in answers.values()]):  # noqa: C419 - waits for every one
            return
        time.sleep(0.1)
    raise TimeoutError(f"{topic}: not every partition has a leader after {TIMEOUT_S} s")


def _place(case: Case) -> dict[str, object]:
    return {"axis": case.axis, "step": case.step, "size": case.size}


def _measured(case: Case, brokers: str, topic: str, folder: Path) -> dict[str, object]:
    producer = ck.Producer(
        {
            "bootstrap.servers": brokers,
            "linger.ms": 20,
            "compression.type": "lz4",
            "message.max.bytes": 1_048_588,  # as much as the broker takes
        }
    )
    values = iter(case.values())
    first = next(values)
    put(producer, topic, first, 0)
    producer.flush()
    job = Run(case.step, brokers, topic, 1, folder)
    columns = list(json.loads(first))
    with _pipeline(job, columns) as shop:
        shop.run(progress=False)
    if case.fill:
        with duckdb.connect(job.database) as con:
            con.execute(case.fill)
    records = 0
    for records, value in enumerate(values, 1):
        put(producer, topic, value, records // RUN_ROWS % case.partitions)
    producer.flush()
    got = measure(program("benchmarks.growth", job, *columns), folder, timeout_s=TIMEOUT_S)
    figures = json.loads(got.said)
    if figures.pop("rows") != records:
        raise AssertionError(f"not {records} rows were committed")
    return {
        "problem": "",
        "records": records,
        "rate": round(records / figures["seconds"]),
        **figures,
        "memory_mb": round(got.memory_mb),
        "file_mb": round(os.path.getsize(job.database) / 2**20),
    }


def main(run: Run, columns: list[str]) -> None:
    """Resume and run to the end; tell how long the one took, and the other in all and a batch."""
    times: dict[str, list[float]] = {"planned": [], "committed": []}

    def at_edge(edge: str) -> None:
        if edge in times:
            times[edge].append(time.perf_counter())

    marks.consuming()
    opened = time.perf_counter()
    with _pipeline(run, columns, at_edge) as shop:
        report = shop.run(progress=False)
        stages = shop.batches(report.batches)[list(STAGES)].median().round(1).to_dict()
    resumed, commits = times["planned"][0], times["committed"]
    figures = {
        "rows": report.rows,
        "seconds": round(commits[-1] - resumed, 3),
        "resume_ms": round(1000 * (resumed - opened)),
        "first_batch_ms": round(1000 * (commits[0] - resumed)),
        "batch_ms": round(1000 * float(np.median(np.diff(commits))), 1),
        "slowest_batch_ms": round(1000 * float(np.max(np.diff(commits))), 1),
        **stages,
    }
    marks.done(json.dumps(figures))


def _pipeline(run: Run, columns: list[str], at_edge: Callable[[str], None] | None = None) -> kf.Pipeline:
    shop = kf.Pipeline(run.database, brokers=run.brokers, batch_rows_max=BATCH_ROWS, at_edge=at_edge)
    shop.topic(run.topic, schema={name: "str" if name == "k" else "int64" for name in columns})
    if run.job == "land":
        shop.land(run.topic, table="result")
    elif run.job == "aggregate":
        shop.aggregate("result", source=run.topic, by="k", n=("v", "count"), total=("v", "sum"))
    else:
        shop.table("result", key="k", inputs=[run.topic])(_as_it_is)
    return shop


def _as_it_is(batch: pd.DataFrame) -> pd.DataFrame:
    return batch


if __name__ == "__main__":
    main(run_of(sys.argv), sys.argv[6:])
