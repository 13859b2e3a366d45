"""What a pipeline publishes of itself with every batch, so that another machine can go on from there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
_DEFINED = {
    "topics": ("pipeline", "topic"),
    "tables": ("pipeline", "name"),
    "outlets": ("pipeline", "target", "name"),
    "gaps": (*_POSITION, "start", "stop", "reason"),
}
"""Tables of the ledger that change seldom, and their keys."""
_COLUMN = ("pipeline", "schema_name", "table_name", "column_name")
_NEW_COLUMNS = f"""
INSERT INTO {LEDGER}.{COLUMNS}
SELECT $1, schema_name, table_name, column_name, data_type FROM duckdb_columns()
WHERE database_name = current_database() AND schema_name = $2 AND table_name = $3
AND column_name NOT IN (SELECT unnest($4)) ORDER BY column_index RETURNING *"""


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
        self._told: dict[str, object] = {}
        self._columns_told: dict[tuple[str, str], set[str]] = {}

    def open(self, cur: duckdb.DuckDBPyConnection, tables: Iterable[Change]) -> None:
        """A run has taken over: the ledger, and all rows of `tables` when the changelog is a new one."""
        for column in self._ledger_rows(cur, COLUMNS, _COLUMN).rows.to_pylist():
            table = self._columns_told.setdefault((column["schema_name"], column["table_name"]), set())
            table.add(column["column_name"])
        last = self._ledger.next_batch_id(cur) - 1
        changes = [
            self._ledger_rows(cur, "pipelines", ("name",)),
            self._ledger_rows(cur, "positions", _POSITION),
        ]
        if self._outbox.enrol(cur, self._target, self._topic):
            changes += [self._ledger_rows(cur, "batches", ("pipeline", "batch_id"))]
            changes += [self._ledger_rows(cur, "dead_letters", (*_POSITION, "offset"))]
            changes += [c for c in (_whole(cur, table) for table in tables) if c is not None]
        self._post(cur, changes, last)

    def batch(
        self,
        cur: duckdb.DuckDBPyConnection,
        report: BatchReport,
        changes: Sequence[Change],
        exhumed: pa.Table | None,
    ) -> None:
        """A batch has been written: its rows, its part of the ledger, and where it ends.

        Parameters
        ----------
        changes : sequence of Change
            As they were written.
        exhumed : Table or None
            Dead letters that were removed.
        """
        mine = f"AND batch_id = {report.batch_id}"
        dead = self._ledger_rows(cur, "dead_letters", (*_POSITION, "offset"), mine)
        gone = None
        if exhumed is not None:
            keys = exhumed.select(["topic", "partition", "offset"])
            gone = keys.add_column(0, "pipeline", pa.array([self._ledger.pipeline] * len(keys), pa.string()))
        ledger = [
            self._ledger_rows(cur, "pipelines", ("name",)),
            self._ledger_rows(cur, "batches", ("pipeline", "batch_id"), mine),
            replace(dead, deletes=gone),
            self._positions(report),
        ]
        self._post(cur, [*(c for c in changes if c.schema != OUTPUT), *ledger], report.batch_id)

    # ---- its parts ----------------------------------------------------------------------------------

    def _post(self, cur: duckdb.DuckDBPyConnection, changes: Iterable[Change], batch_id: int) -> None:
        records = [RECORD.empty_table()]
        for change in [*changes, *self._definitions(cur)]:
            typed = ensure_table(cur, change)
            records += [self._columns(cur, typed), changelog.of_change(cur, typed, batch_id)]
        records += self._views(cur)
        rows = pa.concat_tables(records)
        delivered = self._outbox.end(self._target, cur) + rows.num_rows + 1
        commit = Commit(batch_id, self._ledger.epoch, delivered, self._ledger.store.id)
        rows = pa.concat_tables([rows, changelog.of_commit(commit)])
        self._outbox.post(cur, batch_id, self._target, self._topic, rows)

    def _columns(self, cur: duckdb.DuckDBPyConnection, change: Change) -> pa.Table:
        """The records for columns of the change's table that no batch has had before."""
        told = self._columns_told.setdefault((change.schema, change.table), set())
        if change.schema == LEDGER or (told and told.issuperset(change.rows.column_names)):
            return RECORD.empty_table()
        asked = [self._ledger.pipeline, change.schema, change.table, list(told)]
        new = cur.sql(_NEW_COLUMNS, params=asked).to_arrow_table()
        told.update(new["column_name"].to_pylist())
        return changelog.of_change(cur, Change(COLUMNS, new, _COLUMN, schema=LEDGER), 0)

    def _views(self, cur: duckdb.DuckDBPyConnection) -> list[pa.Table]:
        views = cur.execute(
            "SELECT view_name, sql FROM duckdb_views() JOIN _kframe.tables t ON t.name = view_name "
            "WHERE schema_name = 'main' AND t.pipeline = ?",
            [self._ledger.pipeline],
        ).fetchall()
        return [changelog.of_view(name, sql) for name, sql in views if self._is_news(f"view {name}", sql)]

    def _definitions(self, cur: duckdb.DuckDBPyConnection) -> list[Change]:
        found = [self._ledger_rows(cur, name, key) for name, key in _DEFINED.items()]
        return [c for c in found if self._is_news(f"ledger {c.table}", c.rows)]

    def _is_news(self, what: str, told: object) -> bool:
        """Whether it has not been said in this run, or was another. A run that fails says all of it again."""
        news = self._told.get(what) != told
        self._told[what] = told
        return news

    def _ledger_rows(
        self, cur: duckdb.DuckDBPyConnection, name: str, key: tuple[str, ...], more: str = ""
    ) -> Change:
        """The pipeline's rows in a table of the ledger. Side tables are the user's, on each machine."""
        of = "name" if name == "pipelines" else "pipeline"
        own = "AND fingerprint <> 'side'" if name == "tables" else more
        query = f"SELECT * FROM _kframe.{name} WHERE {of} = $1 {own}"
        rows = cur.sql(query, params=[self._ledger.pipeline]).to_arrow_table()
        return Change(name, rows, key, schema=LEDGER)

    def _positions(self, report: BatchReport) -> Change:
        rows = [
            {
                "pipeline": self._ledger.pipeline,
                "topic": r.topic,
                "partition": r.partition,
                "position": r.stop,
                "leader_epoch": r.leader_epoch,
                "epoch": self._ledger.epoch,
            }
            for r in report.ranges
        ]
        return Change("positions", pa.Table.from_pylist(rows), _POSITION, schema=LEDGER)


def _whole(cur: duckdb.DuckDBPyConnection, table: Change) -> Change | None:
    """All rows that a table holds; None when it has not been made."""
    try:
        rows = cur.sql(f"FROM {quote(table.schema)}.{quote(table.table)}").to_arrow_table()
    except duckdb.CatalogException:
        return None
    return replace(table, rows=rows)
