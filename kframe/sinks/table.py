"""Writing `Change`s to DuckDB tables, inside the caller's transaction."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.types as pt

from kframe.errors import SchemaError
from kframe.model import Change
from kframe.schema import duckdb_type

_ROW = "_kframe_rowid"
_ROW_GROUP = 122_880
"""Rows that DuckDB keeps together. In pieces of this size a batch is written once, by all threads; in smaller
ones by one thread, and again at the checkpoint."""
_KEPT = "Nothing of this batch was written; tables and positions are as before."


def write(cur: duckdb.DuckDBPyConnection, change: Change) -> int:
    """Write one change, making or widening its table first.

    Parameters
    ----------
    cur : DuckDBPyConnection
        A cursor on the store, inside the batch's transaction.
    change : Change
        Without a key its rows are added. With one they replace the rows of the same key, NULL matching NULL;
        columns the rows do not have become NULL. Deletes go first, so a key in both ends up written.

    Returns
    -------
    int
        Rows written and deleted.

    Raises
    ------
    SchemaError
        Rows do not fit the stored types, a key is missing or comes twice. Roll the transaction back.
    """
    change = ensure_table(cur, change)
    deleted = _delete(cur, change)
    if not change.rows.num_rows:
        return deleted
    if change.key:
        places = change.places if change.places is not None else pa.nulls(change.rows.num_rows, pa.int64())
        with _registered(cur, change.rows.append_column(_ROW, places)) as source:
            _check_key(cur, change, source)
            cur.execute(_merge_sql(cur, change, source))
    else:
        row_groups = pa.Table.from_batches(change.rows.combine_chunks().to_batches(_ROW_GROUP))
        with _registered(cur, row_groups) as source:
            cur.execute(f"INSERT INTO {_target(change)} BY NAME SELECT * FROM {source}")
    return deleted + int(change.rows.num_rows)


def as_stored(cur: duckdb.DuckDBPyConnection, change: Change) -> Change:
    """A change with all columns of its table, in the table's types and order; those it lacks are NULL.

    Parameters
    ----------
    cur : DuckDBPyConnection
        In the transaction that has written the change.
    """
    change = ensure_table(cur, change)
    stored = _stored(cur, change) or change.rows.schema
    given = {name.casefold(): change.rows[name] for name in change.rows.column_names}
    columns = [given.get(f.name.casefold(), pa.nulls(change.rows.num_rows, f.type)) for f in stored]
    return replace(change, rows=pa.table(columns, names=stored.names))


def prepare(
    cur: duckdb.DuckDBPyConnection, steps: Iterable[Any], schemas: Mapping[str, pa.Schema] | None = None
) -> None:
    """Make the state tables and views of the steps that have some; run it again at will.

    Parameters
    ----------
    cur : DuckDBPyConnection
        Inside the batch's transaction.
    steps : iterable of Step
        Those with a ``ddl(schemas)`` are asked for their SQL.
    schemas : mapping of str to Schema, optional
        Of the decoded topics, and of tables that steps read. Without it, only the steps that have seen rows
        in this process are prepared.
    """
    for step in steps:
        make = getattr(step, "ddl", None)
        for sql in make(schemas) if make is not None else ():
            cur.execute(sql)


def drop(cur: duckdb.DuckDBPyConnection, name: str) -> None:
    """Remove a step's table, or its view and state, if there are any."""
    tables = "information_schema.tables WHERE table_catalog = current_database()"
    listing = f"SELECT table_name, table_type FROM {tables}"
    shown = cur.execute(f"{listing} AND table_schema = 'main' AND table_name = $1", [name]).fetchall()
    for found, kind in shown:
        cur.execute(f"DROP {'VIEW' if kind == 'VIEW' else 'TABLE'} main.{_quote(found)}")
    mine = "(table_name = $1 OR starts_with(table_name, $1 || ':'))"
    for found, _ in cur.execute(f"{listing} AND table_schema = '_state' AND {mine}", [name]).fetchall():
        cur.execute(f"DROP TABLE _state.{_quote(found)}")


def ensure_table(cur: duckdb.DuckDBPyConnection, change: Change) -> Change:
    """Make the table, or add the columns that are new; the change with its rows in the stored types.

    Columns of Arrow type null have no type yet: they are left out, so stored as NULL. Nothing is made for a
    change without rows and without typed columns.

    Raises
    ------
    SchemaError
        A column changed to a type that cannot be cast without loss, or no column has a type.
    """
    rows = _typed(change)
    stored = _stored(cur, change)
    if stored is None:
        _create(cur, change, rows.schema)
        return replace(change, rows=rows)
    names = {field.name.casefold(): field for field in stored}
    for field in rows.schema:
        if field.name.casefold() not in names:
            cur.execute(f"ALTER TABLE {_target(change)} ADD COLUMN {_column(change, field)}")
    columns = [_cast(change, rows.column(f.name), f, names.get(f.name.casefold())) for f in rows.schema]
    return replace(change, rows=pa.table(columns, names=rows.column_names) if columns else rows)


def _typed(change: Change) -> pa.Table:
    """The rows without columns of type null."""
    rows = change.rows
    seen: set[str] = set()
    for name in rows.column_names:
        if name.casefold() in seen:
            raise SchemaError(
                f"table {change.table!r} would have two columns named {name!r}",
                kept=_KEPT,
                hint="Rename one; DuckDB does not tell upper from lower case.",
            )
        seen.add(name.casefold())
    untyped = [field.name for field in rows.schema if pt.is_null(field.type)]
    if not untyped:
        return rows
    if rows.num_rows and (len(untyped) == rows.num_columns):
        raise SchemaError(
            f"table {change.table!r}: no column has a type, all values are missing",
            kept=_KEPT,
            hint='Give the columns a dtype, as in df.astype({"amount": "float64"}).',
        )
    return rows.drop_columns(untyped)


def _stored(cur: duckdb.DuckDBPyConnection, change: Change) -> pa.Schema | None:
    """The table's schema; None when there is no such table."""
    try:
        return cur.sql(f"SELECT * FROM {_target(change)} LIMIT 0").to_arrow_table().schema
    except (
        duckdb.CatalogException,
        duckdb.PermissionException,
    ):  # the latter for "orders.csv": no file is read
        return None


def _create(cur: duckdb.DuckDBPyConnection, change: Change, schema: pa.Schema) -> None:
    if not len(schema):
        return
    columns = ", ".join(_column(change, field) for field in schema)
    cur.execute(f"CREATE SCHEMA IF NOT EXISTS {_quote(change.schema)}")
    cur.execute(f"CREATE TABLE {_target(change)} ({columns})")


def _column(change: Change, field: pa.Field) -> str:
    try:
        return f"{_quote(field.name)} {duckdb_type(field.type)}"
    except SchemaError as error:
        what = f"table {change.table!r}, column {field.name!r}: {error.what}"
        raise SchemaError(what, kept=_KEPT, hint=error.hint) from None


def _cast(
    change: Change, column: pa.ChunkedArray, field: pa.Field, stored: pa.Field | None
) -> pa.ChunkedArray:
    """A column in its stored type. Raises `SchemaError` where that would lose something."""
    if stored is None or _alike(field.type, stored.type):
        return column
    try:
        if not _castable(field.type, stored.type):
            raise pa.ArrowInvalid("these types are not of one kind")
        return column.cast(stored.type, safe=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SchemaError(
            f"table {change.table!r}, column {field.name!r}: stored as {duckdb_type(stored.type)}, "
            f"the rows have {duckdb_type(field.type)} ({error})",
            kept=_KEPT,
            hint=f"Cast it to the stored type in the step, or rebuild({change.table!r}) with the new one.",
        ) from error


def _alike(new: pa.DataType, stored: pa.DataType) -> bool:
    """Whether DuckDB takes the one for the other as it is."""
    return new == stored or (_is_text(new) and _is_text(stored)) or (_is_binary(new) and _is_binary(stored))


def _castable(new: pa.DataType, stored: pa.DataType) -> bool:
    """Whether a checked cast loses nothing: kinds never change silently."""
    if pt.is_dictionary(new):
        return _alike(new.value_type, stored) or _castable(new.value_type, stored)
    if pt.is_integer(new):
        return bool(pt.is_integer(stored) or pt.is_floating(stored) or pt.is_decimal(stored))
    if pt.is_floating(new):
        return bool(pt.is_floating(stored) or pt.is_integer(stored))
    if pt.is_decimal(new):
        return bool(pt.is_decimal(stored) or pt.is_integer(stored))
    if pt.is_timestamp(new) and pt.is_timestamp(stored):
        return (new.tz is None) == (stored.tz is None)
    if pt.is_date(new):
        return bool(pt.is_date(stored) or (pt.is_timestamp(stored) and stored.tz is None))
    if pt.is_time(new) or pt.is_duration(new):
        return bool(pt.is_time(stored) or pt.is_duration(stored) or pt.is_interval(stored))
    return bool(pt.is_nested(new) and pt.is_nested(stored) and _castable_nested(new, stored))


def _castable_nested(new: pa.DataType, stored: pa.DataType) -> bool:
    if new.num_fields != stored.num_fields or pt.is_struct(new) != pt.is_struct(stored):
        return False
    pairs = [(new.field(i), stored.field(i)) for i in range(new.num_fields)]
    if pt.is_struct(new) and any(a.name != b.name for a, b in pairs):
        return False
    return all(pt.is_null(a.type) or _alike(a.type, b.type) or _castable(a.type, b.type) for a, b in pairs)


def _is_text(type_: pa.DataType) -> bool:
    return bool(pt.is_string(type_) or pt.is_large_string(type_) or pt.is_string_view(type_))


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pt.is_binary(type_) or pt.is_large_binary(type_) or pt.is_binary_view(type_))


def _merge_sql(cur: duckdb.DuckDBPyConnection, change: Change, source: str) -> str:
    """MERGE without a primary key, which would cost an index; columns that the rows lack become NULL.

    The rows come in the order of the table's own: updates in another order are up to 70 times slower, and
    DuckDB's choice of the join's sides alone decides which it is (100,000 rows: 20 or 800 ms). Finding rows
    by key reads the whole key column (10 million: 110 ms); where the places are known, that is spared.
    """
    given = {name.casefold(): name for name in change.rows.column_names}
    stored = _stored(cur, change) or change.rows.schema
    key = {name.casefold() for name in change.key}
    sets = [
        f"{_quote(name)} = {'s.' + _quote(given[name.casefold()]) if name.casefold() in given else 'NULL'}"
        for name in stored.names
        if name.casefold() not in key
    ]
    columns = change.rows.column_names
    placed = f"FROM {source} AS s"
    if change.places is None:
        found = f"SELECT s.* EXCLUDE ({_quote(_ROW)}), t.rowid AS {_quote(_ROW)} {placed}"
        placed = f"FROM ({found} LEFT JOIN {_target(change)} AS t ON {_same(change.key)})"
    return (
        f"MERGE INTO {_target(change)} AS t USING ({placed} ORDER BY {_quote(_ROW)}) AS s "
        f"ON t.rowid = s.{_quote(_ROW)} "
        f"WHEN MATCHED THEN {'UPDATE SET ' + ', '.join(sets) if sets else 'DO NOTHING'} "
        f"WHEN NOT MATCHED THEN INSERT ({', '.join(map(_quote, columns))}) "
        f"VALUES ({', '.join('s.' + _quote(name) for name in columns)})"
    )


def _check_key(cur: duckdb.DuckDBPyConnection, change: Change, source: str) -> None:
    """Each key column has a type, and each key comes once: MERGE would insert both of a new pair."""
    given = {name.casefold() for name in change.rows.column_names}
    missing = [name for name in change.key if name.casefold() not in given]
    if missing:
        raise SchemaError(
            f"table {change.table!r}: the rows have no key column {missing[0]!r}, or no type for it",
            kept=_KEPT,
            hint=f"Columns: {', '.join(change.rows.column_names) or 'none'}.",
        )
    keys = ", ".join(map(_quote, change.key))
    twice = f"SELECT {keys} FROM {source} GROUP BY {keys} HAVING count(*) > 1 LIMIT 1"
    found = cur.sql(twice).to_arrow_table().to_pylist()
    if found:
        raise SchemaError(
            f"table {change.table!r}: the key {found[0]} comes twice",
            kept=_KEPT,
            hint=f"Keep one row a key: df.drop_duplicates({list(change.key)!r}, keep='last').",
        )


def _delete(cur: duckdb.DuckDBPyConnection, change: Change) -> int:
    if change.deletes is None or not change.deletes.num_rows:
        return 0
    stored = _stored(cur, change)
    if stored is None or any(pt.is_null(field.type) for field in change.deletes.schema):
        return 0
    with _registered(cur, change.deletes) as source:
        condition = _same(tuple(change.deletes.column_names))
        done = cur.execute(
            f"DELETE FROM {_target(change)} AS t USING {source} AS s WHERE {condition}"
        ).fetchone()
    return int(done[0]) if done else 0


def _same(columns: Sequence[str]) -> str:
    return " AND ".join(f"t.{_quote(name)} IS NOT DISTINCT FROM s.{_quote(name)}" for name in columns)


def _target(change: Change) -> str:
    return f"{_quote(change.schema)}.{_quote(change.table)}"


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@contextmanager
def _registered(cur: duckdb.DuckDBPyConnection, rows: pa.Table) -> Iterator[str]:
    """Show rows to the cursor under a private name, yielded quoted."""
    name = f"_kframe_{uuid.uuid4().hex}"
    cur.register(name, rows)
    try:
        yield _quote(name)
    finally:
        with suppress(duckdb.Error):  # an aborted transaction refuses it; its own error matters
            cur.unregister(name)
