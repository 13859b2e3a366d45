"""Fetching and decoding the next batch while the engine is busy with this one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from kframe.batch.decode import Decoder
from kframe.batch.plan import following
from kframe.model import Decoded, Fetched, Limits, OffsetRange
from kframe.timings import Timings

Plan = tuple[OffsetRange, ...]


class Prepared:
    """One batch's records, fetched and decoded."""

    def __init__(self, fetched: Fetched, decoders: Mapping[str, Decoder], timings: Timings) -> None:
        self.fetched = fetched
        self.timings = timings
        self.decoded: dict[str, Decoded] = {}
        self.new_fields: dict[str, Mapping[str, str]] = {}
        with timings.stage("decode"):
            for topic, records in fetched.records.items():
                decoded = decoders[topic].decode(records)
                if decoded.new_fields:
                    self.new_fields[topic] = decoded.new_fields
                    decoded = decoders[topic].with_fields(decoded.new_fields).decode(records)
                self.decoded[topic] = decoded


class Ahead:
    """Prepares batches in order; while records wait, one of them in advance, on a thread of its own.

    A batch that is small for its limits has taken all there was. Then the next one is better fetched late,
    with what arrives until then: in advance it would only lie there.

    Parameters
    ----------
    prepare : callable
        From a plan to its records. While a call runs, nobody else may use the source's `fetch` or the
        decoders.
    limits : Limits
    enabled : bool
        False: nothing in advance. For decoders that learn new fields from each committed batch.
    """

    def __init__(self, prepare: Callable[[Plan], Prepared], limits: Limits, *, enabled: bool) -> None:
        self._prepare = prepare
        self._limits = limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kframe-decode") if enabled else None
        self._next: tuple[Plan, Future[Prepared]] | None = None

    def take(self, plan: Plan) -> Prepared:
        """The batch for `plan`; then begin on the one after it, if that is worth while."""
        planned, self._next = self._next, None
        prepared = planned[1].result() if planned and planned[0] == plan else self._prepare(plan)
        if self._pool is not None and _large(prepared.fetched, self._limits):
            then = following(plan, prepared.fetched.ranges)
            if then:
                with contextlib.suppress(RuntimeError):  # the interpreter ends, so no more threads
                    self._next = (then, self._pool.submit(self._prepare, then))
        return prepared

    def drop(self) -> None:
        """Wait for the batch in preparation and forget it; the source has to start anew."""
        planned, self._next = self._next, None
        if planned is not None:
            planned[1].exception()

    def close(self) -> None:
        """End the thread."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown()


def _large(fetched: Fetched, limits: Limits) -> bool:
    size = sum(records.nbytes for records in fetched.records.values())
    return 2 * fetched.rows >= limits.rows_max or 2 * size >= limits.bytes_max
