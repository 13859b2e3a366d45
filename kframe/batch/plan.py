"""Which offsets a micro-batch may read, and whether what came back tiles them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kframe.errors import Fatal
from kframe.model import OffsetRange, Position, TopicPartition, show_ranges

NO_END = 2**63 - 1
"""The stop of a range that follows its partition for ever."""


def plan_batch(
    positions: Mapping[TopicPartition, Position], stops: Mapping[TopicPartition, int] | None
) -> tuple[OffsetRange, ...]:
    """The ranges that the next micro-batch may read, from the ledger's positions.

    Parameters
    ----------
    positions : mapping
        The ledger's.
    stops : mapping of TopicPartition to int, offsets, or None
        Where a bounded run ends; None follows for ever.

    Returns
    -------
    tuple of OffsetRange
        Partitions with nothing left to read are left out.
    """
    ranges = (
        OffsetRange(tp.topic, tp.partition, p.offset, NO_END if stops is None else stops[tp], p.leader_epoch)
        for tp, p in positions.items()
        if stops is None or tp in stops
    )
    return tuple(r for r in ranges if r.start < r.stop)


def following(plan: tuple[OffsetRange, ...], done: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
    """What is left of a plan behind the ranges that have been read of it."""
    stops = {r.tp: r for r in done}
    rest = (
        OffsetRange(r.topic, r.partition, stops[r.tp].stop, r.stop, stops[r.tp].leader_epoch)
        if r.tp in stops
        else r
        for r in plan
    )
    return tuple(r for r in rest if r.start < r.stop)


def split(plan: tuple[OffsetRange, ...], slots: int) -> list[tuple[OffsetRange, ...]]:
    """The plan's ranges dealt out to at most `slots` tasks."""
    return [task for task in (plan[i::slots] for i in range(slots)) if task]


def tiled(plan: Iterable[OffsetRange], done: Iterable[OffsetRange]) -> tuple[OffsetRange, ...]:
    """The ranges that were read, checked against the plan.

    Raises
    ------
    Fatal
        A range was not planned, begins elsewhere, goes beyond its stop, or came twice: committing it would
        lose or double records.
    """
    planned = {r.tp: r for r in plan}
    ranges = tuple(done)
    for r in ranges:
        asked = planned.pop(r.tp, None)
        if asked is None or r.start != asked.start or not r.start < r.stop <= asked.stop:
            raise Fatal(
                f"The batch does not tile its plan at {r}.",
                kept=f"Nothing was committed of {show_ranges(ranges)}.",
                hint="This is a defect of the source or executor; please report it.",
            )
    return ranges
