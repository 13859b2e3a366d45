"""A batch's changes to the outbox: which rows leave, and in which form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import duckdb
import pyarrow as pa

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.commit.store import quote, registered
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
        if outbox.enrol(cur, outlet.target, outlet.name) and (rows := _shown(cur, outlet.step)) is not None:
            post(cur, outbox, [outlet], [Change(outlet.step, rows, outlet.key)], batch_id)


@contextmanager
def resent(
    cur: duckdb.DuckDBPyConnection, ledger: Ledger, outlets: Iterable[Outlet], table: str
) -> Iterator[None]:
    """Around making a table anew, or removing it: what it shows differently afterwards leaves.

    Rows that were only ever added cannot be taken back: of a table without key nothing leaves.
    """
    outbox = Outbox(ledger.store, ledger.pipeline)
    keyed = [o for o in outlets if o.step == table and o.key and not (o.records and o.null_keys)]
    known = [o for o in keyed if outbox.enrolled(o.target, o.name, cur)]
    before = _shown(cur, table) if known else None
    yield
    if before is not None:
        now = _shown(cur, table)
        change = _difference(cur, table, known[0].key, before, before[:0] if now is None else now)
        post(cur, outbox, known, [change], ledger.next_batch_id(cur))


def _shown(cur: duckdb.DuckDBPyConnection, table: str) -> pa.Table | None:
    try:
        return cur.sql(f"FROM main.{quote(table)}").to_arrow_table()
    except (duckdb.CatalogException, duckdb.PermissionException):  # the latter for a name like a file's
        return None


def _difference(
    cur: duckdb.DuckDBPyConnection, table: str, key: tuple[str, ...], before: pa.Table, now: pa.Table
) -> Change:
    """What makes the one the other. NULL is equal to NULL, as EXCEPT has it."""
    keys = ", ".join(map(quote, key))
    rows, deletes = now, None
    with registered(cur, "_kframe_before", before) as old, registered(cur, "_kframe_now", now) as new:
        if before.schema.equals(now.schema):
            rows = cur.sql(f"FROM {new} EXCEPT FROM {old}").to_arrow_table()
        if set(key) <= set(before.column_names):
            gone = f"SELECT {keys} FROM {old} EXCEPT SELECT {keys} FROM {new}"
            deletes = cur.sql(gone).to_arrow_table()
    return Change(table, rows, key, deletes)


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
