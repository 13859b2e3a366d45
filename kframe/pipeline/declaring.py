"""Declaring what a pipeline is made of: its topics and its tables."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd
import pyarrow as pa

from kframe.commit.ledger import Ledger
from kframe.commit.store import Store, quote, registered
from kframe.commit.transaction import interrupts_deferred, transaction
from kframe.definition import Definition, Topic, as_columns, check_name
from kframe.errors import ConfigError, DefinitionError, interruptible
from kframe.model import Defined
from kframe.run import Run
from kframe.schema import Schema
from kframe.transform.aggregate import Aggregate
from kframe.transform.frames import from_pandas
from kframe.transform.rows import Land, row_step
from kframe.transform.sql import sql_step

Function = TypeVar("Function", bound=Callable[..., Any])


class Declaring:
    """The part of `Pipeline` that declares topics and steps."""

    name: str
    _definition: Definition
    _ledger: Ledger
    _store: Store
    _run: Run | None

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

        Raises
        ------
        KeyboardInterrupt
            Its note says whether the new rows are stored or the old ones.
        """
        check_name(name)
        if name in self._definition.topics or name in [s.name for s in self._definition.steps]:
            raise DefinitionError(f"The name {name!r} is taken by a topic or a step of this pipeline.")
        columns = as_columns(key)
        if columns and frame.duplicated(list(columns)).any():
            raise DefinitionError(f"side_table({name!r}): {', '.join(columns)} is not unique.")
        stored = threading.Event()
        with interruptible(
            lambda: f"the table {name!r} {'holds the new rows' if stored.is_set() else 'was not changed'}."
        ):
            self._store_side_table(name, from_pandas(frame, name), stored)

    def _store_side_table(self, name: str, rows: pa.Table, stored: threading.Event) -> None:
        """Ctrl-C waits until it is committed, and known to the definition."""
        with interrupts_deferred():
            with (
                transaction(self._store, lambda: False) as cur,
                registered(cur, "_kframe_side", rows) as data,
            ):
                self._ledger.define(cur, {name: Defined("side", "rows")})
                cur.execute(f"CREATE OR REPLACE TABLE main.{quote(name)} AS SELECT * FROM {data}")
            stored.set()
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


def _fixed_schema(format: str) -> Schema | None:
    """The schema of formats that have only one."""
    return {"text": Schema.parse({"value": "str"}), "bytes": Schema.parse({"value": "bytes"})}.get(format)
