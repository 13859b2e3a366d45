"""What a pipeline publishes of itself with every batch, so that another machine can go on from there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import duckdb
import pyarrow as pa

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.commit.store import quote
from kframe.model import OUTPUT, BatchReport, Change
from kframe.sinks.table import ensure_table
from kframe.standby import changelog
from kframe.standby.changelog import COLUMNS, LEDGER, RECORD, Commit

_POSITION = ("pipeline", "topic", "partition")
_KEYS = {
    "pipelines": ("name",),
    "positions": _POSITION,
    "batches": ("pipeline", "batch_id"),
    "dead_letters": (*_POSITION, "offset"),
    "topics": ("pipeline", "topic"),
    "tables": ("pipeline", "name"),
    "outlets": ("pipeline", "target", "name"),
    "gaps": (*_POSITION, "start", "stop", "reason"),
}
_ALL = {name: f"{'name' if name == 'pipelines' else 'pipeline'} = $1" for name in _KEYS}
_ALL["tables"] += " AND fingerprint <> 'side'"  # side tables are the user's, on each machine
_DEFINED = {name: _ALL[name] for name in ("topics", "tables", "outlets", "gaps")}
_TAKEN_OVER = {name: _ALL[name] for name in ("pipelines", "positions")} | _DEFINED
_COLUMN = ("pipeline", "schema_name", "table_name", "column_name")
_NEW_COLUMNS = f"""
INSERT INTO {LEDGER}.{COLUMNS} SELECT $1, schema_name, table_name, column_name, data_type
FROM duckdb_columns() SEMI JOIN duckdb_tables() USING (database_name, schema_name, table_name)
WHERE database_name = current_database() AND EXISTS (
    FROM {LEDGER}.tables AS t WHERE t.pipeline = $1 AND t.fingerprint <> 'side' AND (
        schema_name = 'main' AND table_name = t.name
        OR schema_name = '_state' AND (table_name = t.name OR starts_with(table_name, t.name || ':'))))
AND (schema_name, table_name, column_name) NOT IN (
    SELECT (schema_name, table_name, column_name) FROM {LEDGER}.{COLUMNS} WHERE pipeline = $1)
ORDER BY schema_name, table_name, column_index RETURNING *"""


class Journal:
    """Posts changelog records to the outbox. Its methods are called inside the transactions they tell of.

    Parameters
    ----------
    ledger : Ledger
    target, topic : str
        The outbox target that carries the records, and the changelog topic.
    """

    def __init__(self, ledger: Ledger, target: str, topic: str) -> None:
        self._ledger = ledger
        self._outbox = Outbox(ledger.store, ledger.pipeline)
        self._target = target
        self._topic = topic
        self._ledger_columns: dict[str, list[str]] = {}
        self._columns_told: dict[tuple[str, str], set[str]] = defaultdict(set)

    def open(self, cur: duckdb.DuckDBPyConnection, tables: Iterable[Change]) -> None:
        """A run has taken over: the ledger, and all rows of `tables` when the changelog is a new one."""
        known = f"SELECT schema_name, table_name, column_name FROM {LEDGER}.{COLUMNS} WHERE pipeline = ?"
        for schema, name, column in cur.execute(known, [self._ledger.pipeline]).fetchall():
            self._columns_told[schema, name].add(column)
        last = self._ledger.next_batch_id(cur) - 1
        if self._outbox.enrol(cur, self._target, self._topic):
            whole = [c for c in (_whole(cur, table) for table in tables) if c is not None]
            records = [
                *self._changed(cur, whole, last, defined=True),
                *self._views(cur),
                self._ledger_records(cur, _ALL),
            ]
            self._post(cur, records, last)
        else:
            self._post(cur, [self._ledger_records(cur, _TAKEN_OVER)], last)

    def batch(
        self,
        cur: duckdb.DuckDBPyConnection,
        report: BatchReport,
        changes: Sequence[Change],
        exhumed: pa.Table | None,
        defined: bool,
    ) -> None:
        """A batch has been written: its rows, its part of the ledger, and where it ends.

        Parameters
        ----------
        changes : sequence of Change
            As they were written.
        exhumed : Table or None
            Dead letters that were removed.
        defined : bool
            Whether definitions may have changed with it.
        """
        own = [change for change in changes if change.schema != OUTPUT]
        records = self._changed(cur, own, report.batch_id, defined=defined)
        if exhumed is not None:
            records.append(self._exhumed(cur, exhumed))
        records.append(self._ledger_records(cur, _of_batch(report.batch_id) | (_DEFINED if defined else {})))
        if defined:
            records += self._views(cur)
        self._post(cur, records, report.batch_id)

    # ---- its parts ----------------------------------------------------------------------------------

    def _post(self, cur: duckdb.DuckDBPyConnection, records: Sequence[pa.Table], batch_id: int) -> None:
        first = self._outbox.end(self._target, cur)
        delivered = first + sum(part.num_rows for part in records) + 1
        commit = Commit(batch_id, self._ledger.epoch, delivered, self._ledger.store.id)
        rows = pa.concat_tables([*records, changelog.of_commit(commit)])
        self._outbox.post(cur, batch_id, self._target, self._topic, rows)

    def _changed(
        self, cur: duckdb.DuckDBPyConnection, changes: Iterable[Change], batch_id: int, *, defined: bool
    ) -> list[pa.Table]:
        """The records for the rows of the pipeline's own tables, and before them for columns that are new."""
        typed = [ensure_table(cur, change) for change in changes]
        records = [changelog.of_change(cur, change, batch_id) for change in typed]
        if defined or not all(self._knows(change) for change in typed):
            records.insert(0, self._new_columns(cur))
        return records

    def _knows(self, change: Change) -> bool:
        return self._columns_told[change.schema, change.table].issuperset(change.rows.column_names)

    def _new_columns(self, cur: duckdb.DuckDBPyConnection) -> pa.Table:
        new = cur.sql(_NEW_COLUMNS, params=[self._ledger.pipeline]).to_arrow_table()
        for _, schema, table, column, _ in zip(*new.to_pydict().values(), strict=True):
            self._columns_told[schema, table].add(column)
        return changelog.of_change(cur, Change(COLUMNS, new, _COLUMN, schema=LEDGER), 0)

    def _views(self, cur: duckdb.DuckDBPyConnection) -> list[pa.Table]:
        views = cur.execute(
            "SELECT view_name, sql FROM duckdb_views() JOIN _kframe.tables t ON t.name = view_name "
            "WHERE schema_name = 'main' AND t.pipeline = ?",
            [self._ledger.pipeline],
        ).fetchall()
        return [changelog.of_view(name, sql) for name, sql in views]

    def _ledger_records(self, cur: duckdb.DuckDBPyConnection, rows: Mapping[str, str]) -> pa.Table:
        """The records for rows of the ledger: of which tables, and which of each."""
        if not self._ledger_columns:
            found = cur.execute(
                "SELECT table_name, list(column_name) FROM duckdb_columns() "
                "WHERE database_name = current_database() AND schema_name = ? GROUP BY ALL",
                [LEDGER],
            )
            self._ledger_columns = dict(found.fetchall())
        queries = [
            changelog.query_of_rows(LEDGER, name, _KEYS[name], self._ledger_columns[name], where)
            for name, where in rows.items()
        ]
        query = " UNION ALL ".join(queries)
        return cur.sql(query, params=[self._ledger.pipeline]).to_arrow_table().cast(RECORD)

    def _exhumed(self, cur: duckdb.DuckDBPyConnection, dead: pa.Table) -> pa.Table:
        """The tombstones for dead letters."""
        keys = dead.select(["topic", "partition", "offset"])
        gone = keys.add_column(0, "pipeline", pa.array([self._ledger.pipeline] * len(keys), pa.string()))
        change = Change("dead_letters", gone[:0], _KEYS["dead_letters"], gone, LEDGER)
        return changelog.of_change(cur, change, 0)


def _of_batch(batch_id: int) -> dict[str, str]:
    """Which rows of the ledger a batch has written."""
    mine = f"pipeline = $1 AND batch_id = {batch_id}"
    ranges = f"SELECT unnest(ranges) AS r FROM {LEDGER}.batches WHERE {mine}"
    read = f"SELECT (r.topic, r.partition) FROM ({ranges})"
    return {
        "pipelines": _ALL["pipelines"],
        "batches": mine,
        "dead_letters": mine,
        "positions": f"pipeline = $1 AND (topic, partition) IN ({read})",
    }


def _whole(cur: duckdb.DuckDBPyConnection, table: Change) -> Change | None:
    """All rows that a table holds; None when it has not been made."""
    try:
        rows = cur.sql(f"FROM {quote(table.schema)}.{quote(table.table)}").to_arrow_table()
    except duckdb.CatalogException:
        return None
    return replace(table, rows=rows)
