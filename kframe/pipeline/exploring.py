"""Looking without committing: a step's preview, the pipeline's drawing, a batch's records once more."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd
import pyarrow as pa

from kframe.batch.decode import Decoder
from kframe.drawing import Drawing
from kframe.engine import recreated
from kframe.errors import ConfigError, DefinitionError, KframeError, LostRange, interruptible
from kframe.explaining import explained
from kframe.model import Decoded, OffsetRange, show_ranges
from kframe.pipeline.running import Running
from kframe.preview import latest_records, preview, read_ranges
from kframe.source.protocol import Source, TopicInfo
from kframe.taking_over import schema_of
from kframe.transform.frames import to_pandas
from kframe.transform.rows import RowStep, visible
from kframe.transform.step import Step


class Exploring(Running):
    """The part of `Pipeline` that shows what is there, or would be, and changes nothing."""

    @interruptible(lambda: "the preview has ended; previews commit nothing.")
    def preview(self, step: str, n: int = 1000) -> pd.DataFrame:
        """Run one step over the latest records and commit nothing; also while the pipeline runs.

        Parameters
        ----------
        step : str
            The table that the step makes, or the topic of an `output`.
        n : int, records
            Of each of its topics: the latest `n` offsets, dealt evenly to the partitions. Offsets that
            compaction or a transaction's end has left empty give no record.

        Returns
        -------
        DataFrame, shape (n_rows, n_columns)
            The table as it would be if these were all the records; tables that the step reads are as last
            committed. ``attrs``: ``preview`` (that it is one), ``ranges``, and ``dead_letters`` as text.

        Raises
        ------
        StepError
            The function raised. ``frames`` holds what it was called with.
        DefinitionError
            No step makes `step`, or it reads a table that does not exist yet.
        """
        outputs = {o.name: o.step for o in self._definition.outlets.values()}
        found = {s.name: s for s in self._definition.steps}
        steps = {**{name: found[made_by] for name, made_by in outputs.items() if made_by in found}, **found}
        if step not in steps:
            raise DefinitionError(f"No step makes {step!r}.", hint=f"Tables: {', '.join(steps) or 'none'}.")
        if n < 1:
            raise ConfigError(f"preview(n={n!r}): n is at least 1.")
        source = self._source_beside()
        decoders = self._decoders(source, steps[step].topics, source.describe(steps[step].topics))
        batch = latest_records(source, decoders, n)
        ranges = batch.fetched.ranges
        frames = {t: found.frame for t, found in batch.decoded.items()}
        result = to_pandas(preview(self._store, steps[step], frames, ranges))
        result.attrs.update(
            preview=f"step {step!r} over the latest {batch.fetched.rows:,} records; nothing was committed",
            ranges=[str(r) for r in ranges],
            dead_letters=_dead(batch.decoded.values()),
        )
        return result

    def explain(self) -> Drawing:
        """The pipeline drawn: topics, steps, tables and what leaves it; as text on a terminal."""
        return explained(self._definition)

    @interruptible(lambda: "the replay has ended; nothing was changed.")
    def replay(self, batch_id: int) -> pd.DataFrame | dict[str, pd.DataFrame]:
        """The records of one committed batch, read again from the log and decoded by the schema of now.

        Parameters
        ----------
        batch_id : int
            As in `batches`.

        Returns
        -------
        DataFrame, or dict of DataFrames by topic when the batch has records of several
            As a step's function gets them, partition by partition in offset order. ``attrs``: ``batch_id``,
            ``ranges`` and ``dead_letters`` as text. Compaction may have removed records since; a warning
            says how many.

        Raises
        ------
        ConfigError
            The ledger has no such batch, or it read nothing from the log.
        LostRange
            Retention has removed records of it; ``ranges`` names them. Nothing has changed.
        TopicRecreated
            Its offsets mean other records now.
        """
        ranges, rows = self._ledger.batch(batch_id)
        topics = list(dict.fromkeys(r.topic for r in ranges))
        source = self._source_beside()
        infos = source.describe(topics)
        self._check_kept(source, infos, ranges)
        decoders = self._decoders(source, topics, infos)
        batch = read_ranges(source, decoders, ranges)
        if (missing := rows - batch.fetched.rows) > 0:
            warnings.warn(
                f"kframe: compaction has removed {missing:,} of the {rows:,} records of batch {batch_id}.",
                stacklevel=3,  # past the decorator
            )
        frames = {}
        for topic, found in batch.decoded.items():
            frames[topic] = to_pandas(visible(found.frame, self._definition.topics[topic].include))
            shown = [str(r) for r in ranges if r.topic == topic]
            frames[topic].attrs.update(batch_id=batch_id, ranges=shown, dead_letters=_dead([found]))
        return next(iter(frames.values())) if len(frames) == 1 else frames

    # ---- inside -------------------------------------------------------------------------------------

    def _unmade(self) -> dict[str, pa.Schema | None]:
        """The steps' tables that no batch has made yet: their columns, None where only a run can tell."""
        listed = "SELECT lower(table_name) FROM information_schema.tables WHERE table_schema = 'main'"
        made = {name for (name,) in self._store.cursor().execute(listed).fetchall()}
        steps = [s for s in self._definition.steps if s.name.lower() not in made]
        return {s.name: self._columns(s) for s in steps}

    def _columns(self, step: Step) -> pa.Schema | None:
        """A function is not called without rows, so its columns are unknown."""
        if isinstance(step, RowStep):
            return None
        try:
            frames = {t: self._definition.topics[t].decoder(self.schema(t)).empty() for t in step.topics}
            return preview(self._store, step, frames, ()).schema
        except KframeError:
            return None

    def _source_beside(self) -> Source:
        """A source of our own, so that a running batch's is left alone."""
        return self._source.beside() if self._source is not None else self._open_source()

    def _decoders(
        self, source: Source, topics: Iterable[str], infos: Mapping[str, TopicInfo]
    ) -> dict[str, Decoder]:
        """Decoders of the schemas that the next run would use."""
        known = self._ledger.topics()
        declared = {t: self._definition.topic(t) for t in topics}
        return {t: d.decoder(schema_of(source, d, infos[t], known)) for t, d in declared.items()}

    def _check_kept(
        self, source: Source, infos: Mapping[str, TopicInfo], ranges: Sequence[OffsetRange]
    ) -> None:
        """The log must still hold the ranges, and be the one that they were read from."""
        for topic, (topic_id, _) in self._ledger.topics().items():
            if topic in infos and topic_id != infos[topic].topic_id:
                raise recreated(topic, topic_id or "?", infos[topic].topic_id)
        low = source.offsets([r.tp for r in ranges], "earliest")
        lost = [r._replace(stop=min(low[r.tp], r.stop)) for r in ranges if low[r.tp] > r.start]
        if lost:
            raise LostRange(
                f"The log no longer holds {show_ranges(lost)}: retention has removed them.",
                tuple(lost),
                kept="Nothing was changed; the rows made of them stay in the tables.",
                hint="A topic keeps what its retention.ms and retention.bytes allow.",
            )


def _dead(decoded: Iterable[Decoded]) -> list[str]:
    """Undecodable records as text, for a frame's ``attrs``."""
    return [
        f"{d['topic']}[{d['partition']}] offset {d['offset']}: {d['error']}"
        for found in decoded
        for d in found.dead.to_pylist()
    ]
