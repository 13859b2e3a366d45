"""What a pipeline tells about itself: status, batches, lag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import pandas as pd

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.model import TopicPartition
from kframe.run import Run
from kframe.source.kafka import KafkaSource
from kframe.source.protocol import Source

_SIDES = {
    "fetch": "waiting for records from Kafka",
    "decode": "decoding",
    "steps": "your functions",
    "write": "writing to DuckDB",
}


@dataclass(frozen=True)
class Status:
    """A pipeline's state at one moment. Counts are of the running or last run, positions of the ledger."""

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

    def __repr__(self) -> str:
        lines = [
            f"{self.pipeline}: {self.state}; {self.rows:,} rows in {self.batches:,} batches"
            f" ({self.rows_per_s:,.0f} rows/s), {self.dead_letters:,} dead letters"
        ]
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
        return f"<pre>{escape(repr(self))}</pre>"


def status_of(name: str, run: Run | None, ledger: Ledger) -> Status:
    """A pipeline's status from its run (None: none yet in this process) and its ledger."""
    report = run.report() if run else None
    seconds = report.seconds if report else 0.0
    return Status(
        name,
        run.state if run else "new",
        report.batches if report else 0,
        report.rows if report else 0,
        report.dead_letters if report else 0,
        report.rows / seconds if report and seconds > 0 else 0.0,
        limited_by(run.last.timings_ms) if run and run.last else None,
        {tp: p.offset for tp, p in ledger.positions().items()},
        (run.trouble or run.delivery_trouble) if run else None,
        str(run.error).splitlines()[0] if run and run.error and str(run.error) else None,
        Outbox(ledger.store, ledger.pipeline).undelivered(),
    )


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
