"""What a pipeline tells about itself: status, batches, lag."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import duckdb
import pandas as pd

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.errors import AbortBatch, StoreLocked
from kframe.model import BatchReport, OffsetRange, TopicPartition
from kframe.run import Run
from kframe.source.kafka import KafkaSource
from kframe.source.protocol import Source

_TRACEBACK_CHARS = 20_000
_SIDES = {
    "fetch": "waiting for records from Kafka",
    "decode": "decoding",
    "steps": "your functions",
    "write": "writing to DuckDB",
}


@dataclass(frozen=True)
class Failure:
    """What ended a run, in parts; configured secrets are taken out."""

    kind: str
    what: str
    """The first line."""
    kept: str
    hint: str
    step: str
    where: str
    """The line of the user's code: ``Cell In[3], line 2: return orders.amont``."""
    ranges: tuple[OffsetRange, ...]
    """The offset ranges of the batch that was rolled back, as far as they are known."""
    traceback: str


@dataclass(frozen=True)
class Status:
    """A pipeline's state at one moment; no broker was asked for it.

    Counts and rates are of the running or last run. ``rows_per_s`` is the whole run's average,
    ``processed_per_s`` and ``arriving_per_s`` are in offsets and of the last seconds, ``records_per_s`` is
    what of them was processed in records (transactions and compaction leave offsets without any), ``history``
    holds (seconds, processed, arriving) of the last minute, in offsets. ``lag`` is in offsets, against the
    log's ends that came with the last fetches: what open transactions hold counts (`Pipeline.lag` asks Kafka
    and tells it apart). ``catch_up_s`` is None where the pipeline does not catch up or has nothing to;
    ``progress`` is the share that is done of what lay before this run.
    """

    pipeline: str
    state: str
    batches: int
    rows: int
    dead_letters: int
    rows_per_s: float
    limited_by: str | None
    positions: Mapping[TopicPartition, int]
    trouble: str | None
    error: str | None
    undelivered: int = 0
    """Committed rows that have not reached their targets yet."""
    lag: Mapping[TopicPartition, int] = field(default_factory=dict)
    processed_per_s: float = 0.0
    arriving_per_s: float = 0.0
    records_per_s: float = 0.0
    catch_up_s: float | None = None
    progress: float | None = None
    history: tuple[tuple[float, float, float], ...] = ()
    last: BatchReport | None = None
    bounded: bool = False
    """Whether the run ends at the end offsets seen at its start."""
    failure: Failure | None = None

    def __repr__(self) -> str:
        lines = [
            f"{self.pipeline}: {self.state}; {self.rows:,} rows in {self.batches:,} batches"
            f" ({self.rows_per_s:,.0f} rows/s), {self.dead_letters:,} dead letters"
        ]
        if self.lag:
            behind = f"lag {sum(self.lag.values()):,}"
            lines.append(
                f"  {behind}, caught up in {self.catch_up_s:.0f} s" if self.catch_up_s else f"  {behind}"
            )
        if self.limited_by:
            lines.append(f"  the pace is set by {self.limited_by}")
        if self.undelivered:
            lines.append(f"  {self.undelivered:,} committed rows are still to be delivered")
        if self.trouble:
            lines.append(f"  trouble: {self.trouble}")
        if self.error:
            lines.append(f"  error: {self.error}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from kframe.notebook.page import page  # it draws what is defined here

        return page(self)


def status_of(
    name: str, run: Run | None, ledger: Ledger, redact: Callable[[str], str] = lambda text: text
) -> Status:
    """A pipeline's status from its run (None: none yet in this process), else from its ledger.

    Parameters
    ----------
    redact : callable
        Takes what is secret out of a text.
    """
    if run is None:
        return Status(name, "new", 0, 0, 0, 0.0, None, _stored(ledger), None, None)
    run.observe()
    report, failure = run.report(), failure_of(run.error, redact)
    trouble = run.trouble or run.delivery_trouble
    positions = _stored(ledger) if run.ended.is_set() or run.engine is None else report.positions
    ends = dict(run.ends())
    lag = {tp: max(0, ends[tp] - at) for tp, at in positions.items() if tp in ends}
    processed, arriving, records = run.meter.rates()
    gain = processed - arriving
    behind = sum(lag.values())
    return Status(
        name,
        run.state,
        report.batches,
        report.rows,
        report.dead_letters,
        report.rows / report.seconds if report.seconds > 0 else 0.0,
        limited_by(run.last.timings_ms) if run.last else None,
        positions,
        redact(trouble) if trouble else None,
        failure.what if failure else None,
        _undelivered(ledger),
        lag,
        processed,
        arriving,
        records,
        behind / gain if behind and gain > 0 else None,
        run.meter.progress(positions, ends),
        run.meter.history(),
        run.last,
        run.bounded,
        failure,
    )


def failure_of(error: BaseException | None, redact: Callable[[str], str]) -> Failure | None:
    """An error in the parts that a reader looks for."""
    if error is None:
        return None
    what = redact(getattr(error, "what", "") or str(error) or type(error).__name__).splitlines()[0]
    return Failure(
        type(error).__name__,
        what,
        redact(getattr(error, "kept", "")),
        redact(getattr(error, "hint", "")),
        getattr(error, "step", ""),
        redact(_where(getattr(error, "where", None))),
        tuple(error.ranges) if isinstance(error, AbortBatch) else (),
        redact("".join(traceback.format_exception(error))[-_TRACEBACK_CHARS:]),
    )


def _where(line: tuple[str, int, str] | None) -> str:
    """A line of code; a notebook's cell by its number."""
    if line is None:
        return ""
    file, number, source = line
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    cell = shell.compile.format_code_name(file) if shell is not None else None
    return f"{' '.join(cell) if cell else file}, line {number}: {source}"


def _stored(ledger: Ledger) -> dict[TopicPartition, int]:
    """The ledger's positions; none when its file has been closed."""
    try:
        return {tp: p.offset for tp, p in ledger.positions().items()}
    except (duckdb.Error, StoreLocked):
        return {}


def _undelivered(ledger: Ledger) -> int:
    """Rows in the outbox; none when the file has been closed."""
    try:
        return Outbox(ledger.store, ledger.pipeline).undelivered()
    except (duckdb.Error, StoreLocked):
        return 0


def batches_frame(ledger: Ledger, last: int) -> pd.DataFrame:
    """The last batches, newest first: batch_id, rows, dead_letters, ranges, ms by stage, committed_at."""
    rows = ledger.store.cursor().sql(
        "SELECT batch_id, rows, dead_letters, tombstones, ranges, timings_ms, committed_at "
        "FROM _kframe.batches WHERE pipeline = $1 ORDER BY batch_id DESC LIMIT $2",
        params=[ledger.pipeline, last],
    )
    frame: pd.DataFrame = rows.to_arrow_table().to_pandas(maps_as_pydicts="strict")
    for stage in _SIDES:
        frame[f"{stage}_ms"] = [timings.get(stage, 0.0) for timings in frame["timings_ms"]]
    frame["ranges"] = [
        ", ".join(f"{r['topic']}[{r['partition']}] [{r['start']}, {r['stop']})" for r in ranges)
        for ranges in frame["ranges"]
    ]
    return frame.drop(columns="timings_ms")


def lag_frame(ledger: Ledger, source: Source) -> pd.DataFrame:
    """Per partition, in offsets: position, end_offset (read_committed), lag, open_transaction.

    ``open_transaction`` is how many offsets lie behind the first transaction that has not ended; a number
    that stays says that a producer hangs.
    """
    positions = ledger.positions()
    ends = source.offsets(positions, "latest") if positions else {}
    log_ends = (
        source.offsets(positions, "latest", committed=False)
        if positions and isinstance(source, KafkaSource)
        else ends
    )
    return pd.DataFrame(
        [
            {
                "topic": tp.topic,
                "partition": tp.partition,
                "position": p.offset,
                "end_offset": ends[tp],
                "lag": ends[tp] - p.offset,
                "open_transaction": log_ends[tp] - ends[tp],
            }
            for tp, p in positions.items()
        ],
        columns=["topic", "partition", "position", "end_offset", "lag", "open_transaction"],
    )


def limited_by(timings_ms: Mapping[str, float]) -> str:
    """The stage that decides how long a batch takes.

    The next batch is fetched and decoded while this one is computed and written, so the slower of these two
    halves decides, and in it the longer stage.
    """
    halves = ("fetch", "decode"), ("steps", "write")
    slower = max(halves, key=lambda half: sum(timings_ms.get(stage, 0.0) for stage in half))
    return _SIDES[max(slower, key=lambda stage: timings_ms.get(stage, 0.0))]
