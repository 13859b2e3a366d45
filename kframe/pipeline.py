"""`Pipeline`: what users touch. Definitions, running, reading."""

from __future__ import annotations

import atexit
import difflib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kframe.commit.ledger import Ledger
from kframe.commit.store import Store, open_store, quote, registered
from kframe.commit.transaction import transaction
from kframe.config import Options, options_of
from kframe.definition import Definition, Topic, as_columns, check_name
from kframe.errors import ConfigError, DefinitionError, Fenced, KframeError
from kframe.executors.local import Executor
from kframe.model import RECORDS, Fetched, RunReport
from kframe.reading import Result, query
from kframe.rebuild import rebuild
from kframe.run import Run, stop_on_sigterm
from kframe.schema import Schema
from kframe.sinks.table import drop
from kframe.source.kafka import KafkaSource
from kframe.source.protocol import Source
from kframe.source.settings import Settings
from kframe.status import Status, batches_frame, lag_frame, status_of
from kframe.transform.aggregate import Aggregate
from kframe.transform.frames import from_pandas
from kframe.transform.rows import Land, row_step
from kframe.transform.sql import sql_step
from kframe.worker import AtEdge

Function = TypeVar("Function", bound=Callable[..., Any])

_pipelines: dict[tuple[str, str], Pipeline] = {}


class Pipeline:
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
        When a table's definition is not the one of the last run.
    snapshot_to : path, optional
        A copy of the file for other processes, replaced atomically after commits (at most once a second,
        and seldom enough to cost less than a tenth of the time), and at the end of a run.
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

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        brokers: str | None = None,
        name: str | None = None,
        kafka_config: Mapping[str, Any] | None = None,
        source: Source | None = None,
        executor: Executor | None = None,
        at_edge: AtEdge | None = None,
        **options: Any,
    ) -> None:
        self.name = name or Path(path).stem
        self._options = _options(options, kafka_config)
        self._settings = Settings(brokers, kafka_config) if brokers is not None else None
        if (source is None) == (self._settings is None):
            raise ConfigError("Give either brokers= or source=.", hint='brokers="localhost:9092"')
        self._source = source
        self._executor = executor
        self._at_edge = at_edge or (lambda _edge: None)
        self._definition = Definition(self.name)
        self._run: Run | None = None
        self._thread: threading.Thread | None = None
        self._replaced = False
        self._store = _take_over(self, path)
        self._ledger = Ledger(self._store, self.name)
        self._definition.side_tables = self._ledger.side_tables()

    def __repr__(self) -> str:
        state = self._run.state if self._run else "new"
        tables = ", ".join(self._definition.tables) or "none"
        topics = ", ".join(self._definition.topics) or "none"
        return f"<Pipeline {self.name!r}, {state}; topics: {topics}; tables: {tables}>"

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- definitions --------------------------------------------------------------------------------

    def topic(
        self,
        name: str,
        *,
        schema: Mapping[str, str] | None = None,
        format: str = "json",
        include: Sequence[str] = (),
        on_new_field: str = "ignore",
        record_bytes_max: int = 64 << 20,
        **options: Any,
    ) -> None:
        """Declare an input topic.

        Parameters
        ----------
        name : str
        schema : mapping of column to type, optional
            ``{"sku": "str", "qty": "int64 not null", "price": "decimal(12,2)", "ts": "timestamp[ms, UTC]"}``.
            Without one, it is inferred from the first 1,000 records and pinned in the ledger; see `schema`.
        format : "json", "text", "bytes" or "csv"
        include : sequence of "key", "headers", "timestamp", "partition", "offset", "tombstone"
            Extra columns ``_key``, ``_headers``, ...; ``"tombstone"`` also keeps records without a value.
        on_new_field : "ignore" or "add"
            What an unknown JSON field does; ``"add"`` makes it a column in the batch that brings it.
        record_bytes_max : int, bytes
            A longer record is a dead letter, unread.

        Raises
        ------
        DefinitionError
            The schema or an option is not usable. Nothing has changed.
        """
        self._check_quiet("topic()")
        parsed = Schema.parse(schema) if schema is not None else _fixed_schema(format)
        topic = Topic(name, parsed, format, tuple(include), on_new_field, record_bytes_max, options)
        if parsed is not None:
            topic.decoder(parsed)  # refuses unusable options now rather than in a run
        self._definition.add_topic(topic)

    def land(self, topic: str, *, table: str | None = None) -> None:
        """Append every decoded record of `topic` to a table, by default of the topic's name."""
        self._definition.topic(topic)
        self._define(Land(table or topic, topic, self._definition.topics[topic].include))

    def table(
        self,
        name: str,
        *,
        key: str | Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
        lookup: Mapping[str, str] | None = None,
    ) -> Callable[[Function], Function]:
        """Make a table of what the decorated function returns for each batch.

        Parameters
        ----------
        name : str
        key : str or sequence of str, optional
            Rows replace those of the same key (the last one of a batch wins); without a key they are added.
            A keyed result may carry a boolean column ``_tombstone``: True removes the key's row.
        inputs : sequence of str, optional
            Topics and tables for the function's parameters in order, when names can't match.
        lookup : mapping of table to column, optional
            Pass only the table's rows whose column occurs in this batch.

        Returns
        -------
        callable
            The decorator. The function itself stays as it was, to be called and tested without Kafka.
        """

        def define(function: Function) -> Function:
            step = row_step(
                name,
                function,
                topics={t.name: t.include for t in self._definition.topics.values()},
                tables=[t for t in self._definition.tables if t != name and t not in self._definition.topics],
                key=as_columns(key),
                inputs=inputs,
                lookup=lookup or {},
            )
            self._define(step)
            return function

        return define

    def aggregate(
        self, name: str, *, source: str, by: str | Sequence[str], **measures: tuple[str, str]
    ) -> None:
        """Keep pandas' named aggregation of a topic up to date: ``total=("amount", "sum")``.

        Parameters
        ----------
        name : str
        source : str
            A topic.
        by : str or sequence of str
            Group columns; NULL is a group of its own.
        **measures : (column, function)
            count, size, sum, min, max, mean, var, std, first, last, nunique. NULLs are skipped, as in pandas.
        """
        self._definition.topic(source)
        self._define(Aggregate(name, by=as_columns(by), measures=measures, source=source))

    def sql_table(self, name: str, query: str) -> None:
        """Keep a SELECT over a topic up to date.

        With GROUP BY over decomposable aggregates it is kept incrementally; a SELECT of single rows is
        appended batch by batch. What would be wrong batch by batch is refused, with the reason.

        Raises
        ------
        DefinitionError
            The SELECT cannot be kept incrementally; the message says why and what to do instead.
        """
        self._define(sql_step(name, query, list(self._definition.topics), self._definition.tables))

    def side_table(self, name: str, frame: pd.DataFrame, *, key: str | Sequence[str] | None = None) -> None:
        """Store a DataFrame as a table that steps can read, replacing the one before it.

        Parameters
        ----------
        name : str
        frame : DataFrame
        key : str or sequence of str, optional
            Checked to be unique.
        """
        check_name(name)
        if name in self._definition.topics or name in [s.name for s in self._definition.steps]:
            raise DefinitionError(f"The name {name!r} is taken by a topic or a step of this pipeline.")
        columns = as_columns(key)
        if columns and frame.duplicated(list(columns)).any():
            raise DefinitionError(f"side_table({name!r}): {', '.join(columns)} is not unique.")
        rows = from_pandas(frame, name)
        with transaction(self._store, lambda: False) as cur, registered(cur, "_kframe_side", rows) as data:
            self._ledger.define(cur, {name: "side"})
            cur.execute(f"CREATE OR REPLACE TABLE main.{quote(name)} AS SELECT * FROM {data}")
        if name not in self._definition.side_tables:
            self._definition.side_tables.append(name)

    def schema(self, topic: str) -> Schema:
        """A topic's schema: as declared, or as inferred and pinned by the first run."""
        declared = self._definition.topic(topic).schema
        pinned = self._ledger.topics().get(topic, (None, None))[1]
        if pinned is not None:
            return Schema.parse(pinned)
        if declared is not None:
            return declared
        raise ConfigError(
            f"The schema of {topic!r} is inferred by the first run.", hint="kf.peek() shows it."
        )

    # ---- running ------------------------------------------------------------------------------------

    def run(self, until: str | None = "end", *, progress: bool = True) -> RunReport:
        """Run on this thread: to the end offsets seen now, or for ever.

        Parameters
        ----------
        until : "end" or None
            None follows the topics until SIGTERM or `stop` (the running batch is finished), or Ctrl-C (it is
            rolled back and KeyboardInterrupt raised).
        progress : bool
            A bar over the records to the end, on a terminal or in a notebook.

        Returns
        -------
        RunReport

        Raises
        ------
        KframeError
            Every error says what was kept. Committed batches stand, in every case.
        """
        if until not in ("end", None):
            raise ConfigError(f"run(until={until!r}): until is 'end' or None.")
        run = self._new_run(until_end=until == "end", progress=progress)
        with stop_on_sigterm(run):
            return run.execute()

    def start(self) -> None:
        """Run in the background, until `stop`. Errors show in `status` and are raised by `wait`."""
        run = self._new_run(until_end=False, progress=False)

        def work() -> None:
            try:
                run.execute()
            except BaseException:
                return

        self._thread = threading.Thread(target=work, name=f"kframe-{self.name}", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Hold the background run after its running batch."""
        self._current("pause()").pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._current("resume()").resume()

    def stop(self) -> None:
        """End the run after its running batch, and wait for that. Nothing to do is no error."""
        run = self._run
        if run is None:
            return
        run.stop()
        if self._thread is not None:
            run.ended.wait()
            self._thread = None

    def wait(self, timeout: float | None = None) -> RunReport:
        """Wait for the background run to end.

        Raises
        ------
        TimeoutError
            It still runs after `timeout` seconds.
        KframeError
            What ended it.
        """
        run = self._current("wait()")
        if not run.ended.wait(timeout):
            raise TimeoutError(f"Pipeline {self.name!r} still runs after {timeout} s.")
        if run.error is not None:
            raise run.error
        return run.report()

    def close(self) -> None:
        """Stop, and give up the file, unless another pipeline of this process uses it."""
        self.stop()
        self._store.release(self)
        key = (self._store.path, self.name)
        if _pipelines.get(key) is self:
            del _pipelines[key]

    # ---- reading ------------------------------------------------------------------------------------

    def sql(self, query_text: str, parameters: object = None) -> Result:
        """Run one read-only query, from any thread, also while the pipeline runs.

        Returns
        -------
        Result
            ``.df()``, ``.arrow()``; all rows are of one snapshot, whose positions it names.
        """
        return query(self._ledger, query_text, parameters)

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

    def status(self) -> Status:
        """What the pipeline is doing; asks no broker."""
        return status_of(self.name, self._run, self._ledger)

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
        return run.retry(Fetched((), records))

    def rebuild(self, table: str) -> int:
        """Compute one table anew from the retained log, under its definition of now, and swap it in at once.

        The log is read up to the stored positions, which stay; so do the other tables.

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
        """
        self.stop()
        steps = {s.name: s for s in self._definition.steps}
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
        )

    def rewind(self, to: str = "earliest") -> None:
        """Move results, state and positions back together, to before the first record.

        Parameters
        ----------
        to : "earliest"
            All tables of this pipeline (side tables apart) and its positions are removed in one transaction;
            the next run begins at `start_from`.

        Raises
        ------
        ConfigError
            Any other point: aggregates and upserts cannot be undone in part.
        """
        if to != "earliest":
            raise ConfigError(
                f"rewind(to={to!r}): tables cannot be moved back in part.",
                kept="Nothing was changed.",
                hint='rewind("earliest") computes everything anew from the retained log.',
            )
        self.stop()
        with transaction(self._store, lambda: False) as cur:
            for name in self._ledger.forget(cur):
                drop(cur, name)

    # ---- inside -------------------------------------------------------------------------------------

    def _define(self, step: Any) -> None:
        if self._run is not None and not self._run.ended.is_set():
            unread = [t for t in step.topics if t not in self._definition.read_topics()]
            if unread:
                self._check_quiet(f"reading topic {unread[0]!r}")
        self._definition.add_step(step)

    def _check_quiet(self, what: str) -> None:
        if self._run is not None and not self._run.ended.is_set():
            raise DefinitionError(f"{what} needs a stopped pipeline.", hint="Call stop() first.")

    def _new_run(self, *, until_end: bool, progress: bool) -> Run:
        if self._replaced:
            raise Fenced(
                f"Pipeline {self.name!r} was made again; this object is the old one.",
                kept="Nothing was changed.",
                hint="Use the newer object.",
            )
        self.stop()
        self._run = Run(
            definition=self._definition,
            options=self._options,
            store=self._store,
            ledger=self._ledger,
            source=self._open_source(),
            executor=self._executor,
            until_end=until_end,
            progress=progress,
            at_edge=self._at_edge,
        )
        return self._run

    def _open_source(self) -> Source:
        if self._source is not None:
            return self._source
        assert self._settings is not None
        return KafkaSource(
            self._settings,
            group_id=f"kframe.{self.name}",
            rows_max=self._options.batch_rows_max,
            queue_bytes=self._options.batch_bytes_max,
            headers=[t.name for t in self._definition.topics.values() if "headers" in t.include],
        )

    def _current(self, what: str) -> Run:
        if self._run is None:
            raise KframeError(f"{what}: pipeline {self.name!r} has not been started.", hint="start() first.")
        return self._run


def _take_over(pipeline: Pipeline, path: str | os.PathLike[str]) -> Store:
    """Open the file for `pipeline`; an older object of the same name in this process gives way."""
    key = (os.path.realpath(os.fspath(path)), pipeline.name)
    older = _pipelines.get(key)
    if older is not None and older._store.pid == os.getpid():
        older.stop()
        older._replaced = True
    store = open_store(path)
    store.use(pipeline)
    if older is not None:
        store.release(older)
    _pipelines[key] = pipeline
    return store


@atexit.register
def _stop_all() -> None:
    for pipeline in list(_pipelines.values()):
        if pipeline._store.pid == os.getpid():
            pipeline.stop()


def _options(given: Mapping[str, Any], kafka_config: Mapping[str, Any] | None) -> Options:
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"Pipeline() has no option {name!r}.",
                hint=f"Did you mean {near[0]}?" if near else ", ".join(known),
            )
    return options_of(given, kafka_config)


def _fixed_schema(format: str) -> Schema | None:
    """The schema of formats that have only one."""
    return {"text": Schema.parse({"value": "str"}), "bytes": Schema.parse({"value": "bytes"})}.get(format)


def _as_records(dead: pa.Table) -> pa.Table:
    """Dead letters as the records they were; headers are not kept."""
    names = [n for n in RECORDS.names if n != "headers"]
    return (
        dead.select(names)
        .append_column("headers", pa.nulls(len(dead), RECORDS.field("headers").type))
        .cast(RECORDS)
    )
