"""The pure part of a batch: fetch, decode, and every step that reads records alone."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from kframe.batch.decode import Decoder, private_connection
from kframe.errors import KframeError, StepError, is_interrupt
from kframe.model import DEAD_LETTERS, Fetched, OffsetRange, Partial, show_ranges
from kframe.transform.rows import RowStep
from kframe.transform.step import Step

AtEdge = Callable[[str], None]


class Timings(dict[str, float]):
    """Milliseconds by stage; `stage` adds to them."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under a stage's name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + (time.perf_counter() - began) * 1000


class Worker:
    """A task: from offset ranges to a `Partial`. It writes nothing, so it can run again.

    Parameters
    ----------
    fetch : callable
        Offset ranges to records.
    decoders : mapping of str to Decoder
        By topic.
    steps : sequence of Step
    at_edge : callable
        Told each edge's name as it is passed; a test may raise there.
    """

    def __init__(
        self,
        fetch: Callable[[tuple[OffsetRange, ...]], Fetched],
        decoders: Mapping[str, Decoder],
        steps: Sequence[Step],
        at_edge: AtEdge,
    ) -> None:
        self._fetch = fetch
        self._decoders = decoders
        self.steps = steps
        self._at_edge = at_edge
        self.con = private_connection()

    def __call__(self, plan: tuple[OffsetRange, ...]) -> Partial:
        """Fetch and decode `plan`, then run the steps that need no table."""
        timings = Timings()
        with timings.stage("fetch"):
            fetched = self._fetch(plan)
        self._at_edge("fetched")
        return self.transform(fetched, timings)

    def transform(self, fetched: Fetched, timings: Timings) -> Partial:
        """Decode records and run the steps that need no table."""
        with timings.stage("decode"):
            decoded = {t: self._decoders[t].decode(records) for t, records in fetched.records.items()}
            new_fields = {t: d.new_fields for t, d in decoded.items() if d.new_fields}
            for topic in new_fields:
                wider = self._decoders[topic].with_fields(new_fields[topic])
                decoded[topic] = wider.decode(fetched.records[topic])
        self._at_edge("decoded")
        frames = {topic: d.frame for topic, d in decoded.items()}
        with timings.stage("steps"):
            results = {
                step.name: run_step(
                    step, self.con, complete(step, frames, self._decoders), {}, fetched.ranges
                )
                for step in self.steps
                if not step.tables and touched(step, frames)
            }
        needed = {topic for step in self.steps if step.tables for topic in step.topics}
        return Partial(
            fetched.ranges,
            fetched.rows,
            results,
            {t: complete_frame(t, frames, self._decoders) for t in needed} if needed else {},
            pa.concat_tables([DEAD_LETTERS.empty_table(), *(d.dead for d in decoded.values())]),
            sum(d.tombstones for d in decoded.values()),
            new_fields,
            timings,
        )


def touched(step: Step, frames: Mapping[str, pa.Table]) -> bool:
    """Whether this batch holds a row that the step reads."""
    return any(t in frames and frames[t].num_rows for t in step.topics)


def complete(
    step: Step, frames: Mapping[str, pa.Table], decoders: Mapping[str, Decoder]
) -> dict[str, pa.Table]:
    """The step's topics, each with a frame: an empty one where the batch has no record."""
    return {t: complete_frame(t, frames, decoders) for t in step.topics}


def complete_frame(topic: str, frames: Mapping[str, pa.Table], decoders: Mapping[str, Decoder]) -> pa.Table:
    """A topic's rows in this batch, maybe none."""
    return frames[topic] if topic in frames else decoders[topic].empty()


def run_step(
    step: Step,
    con: duckdb.DuckDBPyConnection,
    frames: Mapping[str, pa.Table],
    tables: Mapping[str, pa.Table],
    ranges: Iterable[OffsetRange],
) -> pa.Table:
    """A step's partial; what its function raises comes out as a `StepError` that says where."""
    try:
        return step.partial(con, frames, tables)
    except KframeError:
        raise
    except Exception as error:
        if is_interrupt(error):
            raise
        ranges = [r for r in ranges if r.topic in step.topics]
        failed = StepError(
            f"Step {step.name!r} raised {type(error).__name__}: {error}{_where(error)}\n"
            f"while it ran over {show_ranges(ranges)}.",
            kept="The batch was rolled back: tables and positions are as they were.",
            hint="failed_batch() returns the DataFrame; define the step again and run again.",
        )
        if isinstance(step, RowStep):
            failed.frames = step.frames(frames, tables)
        failed.step = step.name
        failed.ranges = tuple(ranges)
        raise failed from error


def _where(error: Exception) -> str:
    """File, line and source line of the user's code, behind kframe's own frames."""
    outside = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in outside if "/kframe/transform/" not in f.filename.replace("\\", "/")]
    frame = next(iter(own), None)
    return f"\n  {frame.filename}, line {frame.lineno}: {frame.line}" if frame else ""
