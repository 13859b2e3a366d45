"""Reading an exact set of offsets through any source, and nothing else."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing

import pyarrow as pa

from kframe.batch.plan import plan_batch
from kframe.model import RECORDS, Fetched, Limits, Position, TopicPartition
from kframe.source.protocol import Source

_LIMITS = Limits(rows_max=245_760, bytes_max=64 << 20, interval_s=1.0)


def batches_between(
    source: Source,
    positions: Mapping[TopicPartition, Position],
    stops: Mapping[TopicPartition, int],
    limits: Limits = _LIMITS,
) -> Generator[Fetched, None, None]:
    """The records of ``[position, stop)`` of every partition, batch after batch, to the end.

    Close it: an error's traceback would keep it, and the source's thread, alive.
    """
    at = dict(positions)
    source.start(at, stops, limits)
    try:
        while plan := plan_batch(at, stops):
            fetched = source.fetch(plan, lambda: False)
            at |= {r.tp: Position(r.stop, r.leader_epoch) for r in fetched.ranges}
            yield fetched
    finally:
        source.close()


def read_bounded(
    source: Source, positions: Mapping[TopicPartition, Position], stops: Mapping[TopicPartition, int]
) -> dict[str, pa.Table]:
    """The records of ``[position, stop)`` of every partition, by topic."""
    parts: dict[str, list[pa.Table]] = {}
    with closing(batches_between(source, positions, stops)) as batches:
        for fetched in batches:
            for topic, records in fetched.records.items():
                parts.setdefault(topic, []).append(records)
    return {topic: pa.concat_tables([RECORDS.empty_table(), *tables]) for topic, tables in parts.items()}
