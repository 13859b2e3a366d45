"""A batch's changes to the outbox: which rows leave, and in which form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import duckdb
import pyarrow as pa

from kframe.commit.outbox import Outbox
from kframe.commit.store import quote
from kframe.model import OUTPUT, Change, Outlet
from kframe.sinks.encode import TOMBSTONE, records
from kframe.sinks.table import as_stored

Part = tuple[str, tuple[str, ...], pa.Table]
"""Kind, key and rows of one entry."""


def post(
    cur: duckdb.DuckDBPyConnection,
    outbox: Outbox,
    outlets: Sequence[Outlet],
    changes: Iterable[Change],
    batch_id: int,
) -> None:
    """Put what `changes` send through `outlets` into the outbox, in the order of the changes.

    Parameters
    ----------
    cur : DuckDBPyConnection
        Inside the batch's transaction, after the tables are written.
    changes : iterable of Change
        In users' terms: rows as the table shows them.

    Raises
    ------
    SchemaError
        A record cannot have the key that its outlet needs. Roll the transaction back.
    """
    for change in changes:
        wanted = [outlet for outlet in outlets if outlet.step == change.table]
        if wanted and change.schema != OUTPUT and change.rows.num_rows:
            change = as_stored(cur, change)
        for outlet in wanted:
            for kind, key, rows in _encoded(cur, outlet, change) if outlet.records else _plain(change):
                outbox.post(cur, batch_id, outlet.target, outlet.name, rows, kind=kind, key=key)


def enrol(cur: duckdb.DuckDBPyConnection, outbox: Outbox, outlets: Sequence[Outlet], batch_id: int) -> None:
    """Begin outlets that the file has not seen: what their tables hold by now leaves first."""
    for outlet in outlets:
        if not outbox.enrol(cur, outlet.target, outlet.name):
            continue
        found = cur.execute(
            "SELECT 1 FROM information_schema.tables WHERE table_schema = 'main' AND table_name = ?",
            [outlet.step],
        ).fetchall()
        if found:
            rows = cur.sql(f"FROM main.{quote(outlet.step)}").to_arrow_table()
            post(cur, outbox, [outlet], [Change(outlet.step, rows, outlet.key)], batch_id)


def _encoded(cur: duckdb.DuckDBPyConnection, outlet: Outlet, change: Change) -> list[Part]:
    rows = [change.rows] if change.rows.num_rows else []
    if change.deletes is not None and change.deletes.num_rows:
        gone = pa.repeat(pa.scalar(True), change.deletes.num_rows)
        rows.insert(0, change.deletes.append_column(TOMBSTONE, gone))  # as in the table: deletes go first
    return [
        ("append", (), records(cur, part, outlet.key, name=outlet.name, null_keys=outlet.null_keys))
        for part in rows
    ]


def _plain(change: Change) -> list[Part]:
    parts: list[Part] = [(change.kind, change.key, change.rows)]
    if change.deletes is not None:
        parts.insert(0, ("delete", change.key, change.deletes))
    return parts
