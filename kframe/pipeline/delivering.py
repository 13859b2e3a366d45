"""Declaring what leaves a pipeline: output topics and published tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from kframe.commit.outbox import Outbox
from kframe.config import Options
from kframe.definition import as_columns
from kframe.deliver.kafka import NAME as KAFKA
from kframe.deliver.kafka import IdempotentTopics, TransactionalTopics
from kframe.deliver.parquet import ParquetFolder
from kframe.deliver.producing import prepare_topics
from kframe.deliver.target import Target
from kframe.errors import ConfigError, DefinitionError
from kframe.model import Outlet
from kframe.pipeline.declaring import Declaring, Function
from kframe.source.settings import Settings
from kframe.transform.output import Output, shown_key
from kframe.transform.rows import row_step


class Delivering(Declaring):
    """The part of `Pipeline` that declares where rows go after the commit."""

    _options: Options
    _settings: Settings | None

    def output(
        self,
        topic: str,
        *,
        key: str | Sequence[str] | None = None,
        inputs: Sequence[str] | None = None,
        lookup: Mapping[str, str] | None = None,
    ) -> Callable[[Function], Function]:
        """Send what the decorated function returns for each batch to a topic.

        The rows are committed with the batch and delivered after it: exactly once, or at least once, as
        ``processing_guarantee`` says. Values are JSON objects of all columns: missing values null, times ISO
        8601 text, decimals text, bytes Base64.

        Parameters
        ----------
        topic : str
            Made when missing, with the broker's default partitions.
        key : str or sequence of str, optional
            The column whose value, as text, is the record's key; several: a JSON object. Records of one key
            arrive in order. The rows may carry a boolean column ``_tombstone``: True sends a null value.
        inputs, lookup
            As in `table`.

        Returns
        -------
        callable
            The decorator. The function itself stays as it was.

        Raises
        ------
        DefinitionError
            The pipeline has no brokers, or runs and has no such output yet.
        """
        outlet = Outlet(f"output:{topic}", KAFKA, topic, as_columns(key))

        def define(function: Function) -> Function:
            self._check_outlet(outlet, "output()")
            step = row_step(
                outlet.step,
                function,
                topics={t.name: t.include for t in self._definition.topics.values()},
                tables=[t for t in self._definition.tables if t not in self._definition.topics],
                key=(),
                inputs=inputs,
                lookup=lookup or {},
            )
            self._define(Output(**vars(step), record_key=outlet.key))
            self._definition.outlets[KAFKA, topic] = outlet
            return function

        return define

    def publish(
        self, table: str, *, topic: str | None = None, key: str | Sequence[str] | None = None
    ) -> None:
        """Send a table's changed rows of each batch to a topic.

        A keyed table or an aggregate goes to a compacted topic: its rows as upserts, removed keys as
        tombstones, so that the last record of each key is the table. A table without a key sends the rows
        that are added. What the table holds when it is first published is sent first.

        Parameters
        ----------
        table : str
        topic : str, optional
            Default: the table's name. Made when missing, compacted for keyed tables.
        key : str or sequence of str, optional
            For tables without a key of their own: the columns that key the records.

        Raises
        ------
        DefinitionError
            No step makes `table`, its key is another one, or an aggregate does not show its group columns.
        """
        own = self._key_of(table)
        given = as_columns(key)
        if own and given not in ((), own):
            raise DefinitionError(
                f"publish({table!r}): the table's key is {', '.join(own)}, not {', '.join(given)}.",
                hint="Leave key= out.",
            )
        outlet = Outlet(table, KAFKA, topic or table, own or given, null_keys=not own)
        self._check_outlet(outlet, "publish()")
        self._definition.outlets[KAFKA, outlet.name] = outlet

    def connect(
        self,
        to: str | os.PathLike[str] | Target,
        *,
        tables: Sequence[str],
        mode: str = "transaction",
        schema: str = "public",
    ) -> None:
        """Carry tables to a store outside: their rows of now first, then every batch's changes.

        Parameters
        ----------
        to : str, path or Target
            ``"postgresql://user@host/database"`` (the extra ``[postgres]``; PostgreSQL 15 or newer), a folder
            for Parquet files, or a connector of your own.
        tables : sequence of str
            Tables that steps make; keyed ones and aggregates arrive as upserts and deletes.
        mode : "transaction" or "idempotent"
            PostgreSQL: the position in the transaction of the rows, or the id of each key's last change
            beside it, so that replays and deliverers out of order do no harm.
        schema : str
            PostgreSQL: where the tables are.

        Raises
        ------
        DefinitionError
            No step makes a table, or an aggregate does not show its group columns.
        ConfigError
            The connection string or the mode is not usable.
        """
        if self._options.standby:
            raise DefinitionError(
                "connect(): rows for another store wait in one instance's file alone (standby=True).",
                hint="publish() the table, and connect a pipeline of its own that reads that topic.",
            )
        target = connector(to, self.name, mode=mode, schema=schema)
        outlets = [Outlet(t, target.name, t, self._key_of(t), records=False) for t in tables]
        for outlet in outlets:
            self._check_outlet(outlet, "connect()")
        self._definition.targets[target.name] = target
        self._definition.outlets.update({(o.target, o.name): o for o in outlets})

    # ---- inside -------------------------------------------------------------------------------------

    def _key_of(self, table: str) -> tuple[str, ...]:
        """The key of a step's table as users see it."""
        steps = {s.name: s for s in self._definition.steps if s.name in self._definition.tables}
        if table not in steps:
            raise DefinitionError(
                f"No step makes the table {table!r}.", hint=f"Tables: {', '.join(steps) or 'none'}."
            )
        return shown_key(steps[table])

    def _check_outlet(self, outlet: Outlet, what: str) -> None:
        if outlet.target == KAFKA and self._settings is None:
            raise DefinitionError(
                f"{what} sends to Kafka, and this pipeline has no brokers.",
                hint='Give brokers= instead of source=: Pipeline(..., brokers="localhost:9092").',
            )
        old = self._definition.outlets.get((outlet.target, outlet.name))
        if old != outlet:
            self._check_quiet(what)
        if old is not None and old.step != outlet.step:
            raise DefinitionError(
                f"{what}: {outlet.name!r} gets the rows of {old.step!r} already.",
                hint="Give one of the two another topic=.",
            )

    def _outlets(self) -> tuple[Outlet, ...]:
        """The outlets, their topics made and looked at."""
        outlets = tuple(self._definition.outlets.values())
        records = [o for o in outlets if o.target == KAFKA]
        if not records or self._settings is None:
            return outlets
        compacted = prepare_topics(self._settings, records)
        return tuple(replace(o, null_keys=False) if o.name in compacted and o.records else o for o in outlets)

    def _targets(self) -> list[Target]:
        """Where rows go: of the outlets of now, and of those that were and have left rows behind."""
        connected = list(self._definition.targets.values())
        wanted = {target for target, _ in self._definition.outlets}
        left = Outbox(self._store, self.name).undelivered(KAFKA)
        if self._settings is None or not (KAFKA in wanted or left or self._options.standby):
            return connected
        if self._options.processing_guarantee == "exactly_once":
            return [TransactionalTopics(self._settings, self.name), *connected]
        return [IdempotentTopics(self._settings), *connected]


def connector(to: str | os.PathLike[str] | Target, pipeline: str, *, mode: str, schema: str) -> Target:
    """The target that `to` names. Raises `ConfigError` when it names none."""
    if mode not in ("transaction", "idempotent"):
        raise ConfigError(f"connect(mode={mode!r}): the mode is 'transaction' or 'idempotent'.")
    if not isinstance(to, str | os.PathLike):
        if to.name == KAFKA:
            raise ConfigError(f"connect(): the name {KAFKA!r} is that of the output topics.")
        return to
    text = os.fspath(to)
    if not text.startswith(("postgresql://", "postgres://")):
        if "://" in text:
            raise ConfigError(
                f"connect(): there is no connector for {text.split('://')[0]}://.",
                hint="There are postgresql:// and folders; docs/connectors.md shows how to write one.",
            )
        return ParquetFolder(text, pipeline)
    try:
        from kframe.deliver.postgres import PostgresTables
    except ImportError:
        raise ConfigError(
            "connect() to PostgreSQL needs psycopg.", hint="pip install 'kframe-duckdb[postgres]'"
        ) from None
    try:
        return PostgresTables(text, pipeline, schema=schema, idempotent=mode == "idempotent")
    except ValueError as error:
        raise ConfigError(f"connect(): {error}.") from None
