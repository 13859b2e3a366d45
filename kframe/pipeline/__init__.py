"""`Pipeline`: what users touch."""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kframe.commit.store import quote
from kframe.commit.transaction import transaction
from kframe.errors import ConfigError, DefinitionError, interruptible
from kframe.model import RECORDS, Fetched, RunReport
from kframe.pipeline.showing import Showing
from kframe.rebuild import rebuild
from kframe.sinks.outbox import resent
from kframe.sinks.table import drop
from kframe.standby.standing import leave
from kframe.status import batches_frame, lag_frame


class Pipeline(Showing):
    """Kafka topics to DuckDB tables: results and positions in one transaction, every record once.

    Making a pipeline again under the same file and name (a notebook cell that runs again) stops the old
    one's run and takes its place.

    Parameters
    ----------
    path : path
        The DuckDB file; made when missing. It belongs to this process while the pipeline is open.
    brokers : str, optional
        ``host:port,...``. Not needed with `source`.
    name : str, optional
        Default: the file's stem. Several pipelines may share one file.
    kafka_config : mapping, optional
        Settings under Kafka's own dotted names (SASL, TLS, fetch sizes).
    start_from : "earliest", "latest", time or {partition: offset}
        Where the first run begins; later runs go on from the stored positions. A time is ``"-1h"``, an ISO
        text, a datetime or epoch milliseconds.
    commit_interval_ms : int, milliseconds
        How long a batch may wait for more records: latency against throughput. Full batches don't wait.
    batch_rows_max, batch_bytes_max : int, records, bytes
        What one batch may hold; memory is bounded by a small multiple.
    processing_guarantee : "exactly_once" or "at_least_once"
        How outputs leave DuckDB. Tables are exactly once under both.
    dead_letters_max_ratio : float
        Of a run's records (at least 100 are counted); more undecodable ones stop the run.
    on_lost_range : "stop" or "skip"
        When Kafka no longer has records that were still to be read. Either way ``_kframe.gaps`` names them.
    on_definition_change : "warn" or "stop"
        When a table's definition is not the one of the last run. One that keeps its rows in another form
        (key, groups, sums) always stops; `rebuild` computes the table anew.
    snapshot_to : path, optional
        A copy of the file for other processes, replaced atomically after commits (at most once a second,
        and seldom enough to cost less than a tenth of the time), and at the end of a run.
    memory_limit : str
        What DuckDB may hold in memory; larger queries spill to disk. Set by the first pipeline of a file.
    standby : bool
        Publish every batch's changes and positions to a compacted changelog topic, and join the group of this
        pipeline's instances: one is active, the others follow it and take over. Each has a file of its own,
        which is run so ever after: the changelog would lack what it commits alone.
    source : Source, optional
        Another log than Kafka, such as `kframe.testing.MemorySource`.
    executor : Executor, optional
        Where the pure part of a batch runs. Default: this process.
    at_edge : callable, optional
        Told each edge of the batch protocol (`kframe.testing.EDGES`), for fault tests.

    Raises
    ------
    StoreLocked
        Another process has the file; the message names it.
    ConfigError
        An option is not usable.
    """

    # ---- reading ------------------------------------------------------------------------------------

    def read(self, table: str) -> pd.DataFrame:
        """A whole table as a DataFrame; ``attrs`` holds the batch and positions it is as of."""
        return self.sql(f"FROM {quote(table)}").df()

    def dead_letters(self) -> pd.DataFrame:
        """Undecodable records: batch_id, topic, partition, offset, timestamp, key, value, error."""
        frame: pd.DataFrame = self._ledger.dead_letters().to_pandas()
        return frame

    def batches(self, last: int = 20) -> pd.DataFrame:
        """The last committed batches: ranges, rows, dead letters, milliseconds by stage."""
        return batches_frame(self._ledger, last)

    def lag(self) -> pd.DataFrame:
        """Per partition: position, end offset, lag in offsets, and where an open transaction holds it.

        Raises
        ------
        BrokerUnavailable
            No broker answered.
        """
        return lag_frame(self._ledger, self._open_source())

    def failed_batch(self) -> pd.DataFrame | dict[str, pd.DataFrame] | None:
        """What the function that raised last was called with.

        Returns
        -------
        DataFrame, or dict of DataFrames by parameter when it has several, or None when nothing failed.
        """
        frames = getattr(self._run.error, "frames", None) if self._run else None
        if not frames:
            return None
        return next(iter(frames.values())) if len(frames) == 1 else dict(frames)

    # ---- mending ------------------------------------------------------------------------------------

    def retry_dead_letters(self) -> RunReport:
        """Decode the dead letters again, with the schema as it is now, in one transaction.

        Those that decode go through every step and leave the dead letters; the others stay.
        """
        run = self._new_run(until_end=True, progress=False)
        dead = self._ledger.dead_letters()
        kept = dead.filter(pc.is_valid(dead["value"]))
        topics = kept["topic"].unique().to_pylist()
        records = {t: _as_records(kept.filter(pc.equal(kept["topic"], t))) for t in topics}
        before = self._ledger.next_batch_id()

        def outcome() -> str:
            done = self._ledger.next_batch_id() > before
            return f"the retry {'had committed' if done else 'was rolled back'}."

        with interruptible(outcome):
            return run.retry(Fetched((), records))

    def rebuild(self, table: str, *, progress: bool = True) -> int:
        """Compute one table anew from the retained log, under its definition of now, and swap it in at once.

        The log is read up to the stored positions, which stay; so do the other tables. Where a keyed table is
        published or connected, what it shows differently is delivered by the next run.

        Parameters
        ----------
        table : str
        progress : bool
            A bar over the records, on a terminal or in a notebook.

        Returns
        -------
        int
            Records read.

        Raises
        ------
        DefinitionError
            No step makes `table`, or it reads another step's table, whose past is not kept.
        LostRange
            The log no longer goes back to the first record. Nothing has changed.
        KeyboardInterrupt
            Its note says whether the new table is in place or the old one.
        """
        self._check_alone("rebuild()")
        self.stop()
        steps = {s.name: s for s in self._definition.steps if s.name in self._definition.tables}
        if table not in steps:
            raise DefinitionError(f"No step makes {table!r}.", hint=f"Tables: {', '.join(steps) or 'none'}.")
        step = steps[table]
        return rebuild(
            self._store,
            self._ledger,
            self._open_source(),
            step,
            {t: self._definition.topics[t].decoder(self.schema(t)) for t in step.topics},
            self._options.limits,
            list(steps),
            list(self._definition.outlets.values()),
            progress,
        )

    def rewind(self, to: str = "earliest") -> None:
        """Move results, state and positions back together, to before the first record.

        Parameters
        ----------
        to : "earliest"
            All tables of this pipeline (side tables apart) and its positions are removed in one transaction;
            the next run begins at `start_from`. Keyed tables that are published or connected are emptied
            there.

        Raises
        ------
        ConfigError
            Any other point: aggregates and upserts cannot be undone in part.
        KeyboardInterrupt
            Its note says whether everything has been moved back, or nothing.
        """
        if to != "earliest":
            raise ConfigError(
                f"rewind(to={to!r}): tables cannot be moved back in part.",
                kept="Nothing was changed.",
                hint='rewind("earliest") computes everything anew from the retained log.',
            )
        self._check_alone("rewind()")
        done = threading.Event()  # as the transaction's last act: Ctrl-C waits until it is committed
        with interruptible(lambda: _rewound(done.is_set())):
            self.stop()
            with transaction(self._store, lambda: False) as cur:
                outlets = self._definition.outlets.values()
                with ExitStack() as stack:
                    for table in {outlet.step for outlet in outlets}:
                        stack.enter_context(resent(cur, self._ledger, outlets, table))
                    for name in self._ledger.forget(cur):
                        drop(cur, name)
                done.set()

    def _check_alone(self, what: str) -> None:
        if self._options.standby:
            raise ConfigError(
                f"{what} changes this file alone, and other instances follow its changelog (standby=True).",
                kept="Nothing was changed.",
                hint="Compute anew under another name=, with files of their own.",
            )
        leave(self._settings, self._ledger, what)

    def compact(self) -> tuple[int, int]:
        """Stop, and write the file anew without the space that updates and deletes have left in it.

        Returns
        -------
        before, after : int, bytes
            The file's size.

        Raises
        ------
        ConfigError
            Another pipeline or query of this process uses the file. Nothing has changed.
        KeyboardInterrupt
            Its note says whether the file is the new one or the old one; both hold the same.
        """
        old = os.stat(self._store.path).st_ino

        def outcome() -> str:
            new = os.stat(self._store.path).st_ino != old
            return f"the file {'has been written anew' if new else 'is as it was'}."

        with interruptible(outcome):
            self.stop()
            return self._store.compact()


def _rewound(done: bool) -> str:
    told = (
        "has been moved back to before the first record" if done else "is where it was; nothing was rewound"
    )
    return f"everything {told}."


def _as_records(dead: pa.Table) -> pa.Table:
    """Dead letters as the records they were; headers are not kept."""
    names = [n for n in RECORDS.names if n != "headers"]
    return (
        dead.select(names)
        .append_column("headers", pa.nulls(len(dead), RECORDS.field("headers").type))
        .cast(RECORDS)
    )
