"""The pure part of a batch: its records, and every step that reads records alone."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence

import duckdb
import pyarrow as pa

from kframe.ahead import Plan, Prepared
from kframe.batch.decode import Decoder, private_connection
from kframe.errors import KframeError, StepError, is_interrupt
from kframe.model import DEAD_LETTERS, OffsetRange, Partial, show_ranges
from kframe.transform.rows import RowStep
from kframe.transform.step import Step

AtEdge = Callable[[str], None]


class Worker:
    """A task: from offset ranges to a `Partial`. It writes nothing, so it can run again.

    Parameters
    ----------
    read : callable
        Offset ranges to their records, fetched and decoded.
    decoders : mapping of str to Decoder
        By topic.
    steps : sequence of Step
    """

    def __init__(
        self, read: Callable[[Plan], Prepared], decoders: Mapping[str, Decoder], steps: Sequence[Step]
    ) -> None:
        self._read = read
        self._decoders = decoders
        self.steps = steps
        self.con = private_connection()

    def __call__(self, plan: Plan) -> Partial:
        """Read `plan`, then run the steps that need no table."""
        return self.transform(self._read(plan))

    def transform(self, batch: Prepared) -> Partial:
        """Run the steps that need no table over decoded records."""
        frames = {topic: decoded.frame for topic, decoded in batch.decoded.items()}
        ranges = batch.fetched.ranges
        with batch.timings.stage("steps"):
            results = {
                step.name: run_step(step, self.con, complete(step, frames, self._decoders), {}, ranges)
                for step in self.steps
                if not step.tables and touched(step, frames)
            }
        needed = {topic for step in self.steps if step.tables for topic in step.topics}
        return Partial(
            ranges,
            batch.fetched.rows,
            results,
            {t: complete_frame(t, frames, self._decoders) for t in needed},
            pa.concat_tables([DEAD_LETTERS.empty_table(), *(d.dead for d in batch.decoded.values())]),
            sum(d.tombstones for d in batch.decoded.values()),
            batch.new_fields,
            batch.timings,
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
        where = _where(error)
        told = "\n  {}, line {}: {}".format(*where) if where else ""
        failed = StepError(
            f"Step {step.name!r} raised {type(error).__name__}: {error}{told}\n"
            f"while it ran over {show_ranges(ranges)}.",
            kept="The batch was rolled back: tables and positions are as they were.",
            hint="failed_batch() returns the DataFrame; define the step again and run again.",
        )
        if isinstance(step, RowStep):
            failed.frames = step.frames(frames, tables)
        failed.step = step.name
        failed.where = where
        failed.ranges = tuple(ranges)
        raise failed from error


def _where(error: Exception) -> tuple[str, int, str] | None:
    """File, line and source line of the user's code, behind kframe's own frames."""
    outside = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in outside if "/kframe/transform/" not in f.filename.replace("\\", "/")]
    frame = next(iter(own), None)
    return (frame.filename, frame.lineno or 0, frame.line or "") if frame else None
