"""When the next batch is fetched: in advance under load, late when records come slower than batches."""

from __future__ import annotations

import pyarrow as pa
import pytest

from kframe.ahead import Ahead, Plan, Prepared
from kframe.batch.plan import NO_END, following
from kframe.model import RECORDS, Fetched, Limits, OffsetRange
from kframe.timings import Timings

LIMITS = Limits(rows_max=10, bytes_max=10_000, interval_s=0.01)
START = (OffsetRange("orders", 0, 0, NO_END),)


def records(rows: int, size: int) -> pa.Table:
    row = dict.fromkeys(RECORDS.names) | {"partition": 0, "offset": 0, "value": b"x" * size}
    return pa.Table.from_pylist([row] * rows, RECORDS)


@pytest.mark.parametrize(
    ("rows", "size", "in_advance"),
    [(10, 1, True), (5, 1, True), (4, 1, False), (1, 5_000, True), (0, 0, False)],
)
def test_a_batch_is_prepared_in_advance_while_records_wait(rows: int, size: int, in_advance: bool) -> None:
    """Kills: a small batch fetched early, which waits for its turn while records arrive behind it."""
    asked: list[Plan] = []

    def prepare(plan: Plan) -> Prepared:
        asked.append(plan)
        (first,) = plan
        ranges = (OffsetRange("orders", 0, first.start, first.start + max(1, rows)),)
        prepared = Prepared(Fetched(ranges, {}), {}, Timings())  # nothing to decode
        prepared.fetched = Fetched(ranges, {"orders": records(rows, size)})
        return prepared

    ahead = Ahead(prepare, LIMITS, enabled=True)
    first = ahead.take(START)
    then = following(START, first.fetched.ranges)
    ahead.drop()  # waits for what is in preparation
    assert asked == ([START, then] if in_advance else [START])
    ahead.close()
