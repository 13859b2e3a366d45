"""Arrow rows to PostgreSQL's COPY, in bulk: what type each column has there, and its values as text."""

from __future__ import annotations

import io
from typing import Any

import duckdb
import psycopg
import pyarrow as pa
import pyarrow.csv
import pyarrow.types as pt
from psycopg import sql

from kframe.commit.store import quote
from kframe.sinks.encode import as_json

_TYPES = {
    pa.bool_(): "boolean",
    pa.int8(): "smallint",
    pa.uint8(): "smallint",
    pa.int16(): "smallint",
    pa.uint16(): "integer",
    pa.int32(): "integer",
    pa.uint32(): "bigint",
    pa.int64(): "bigint",
    pa.uint64(): "numeric(20,0)",
    pa.float32(): "real",
    pa.float64(): "double precision",
    pa.date32(): "date",
}


def columns_of(schema: pa.Schema) -> dict[str, str]:
    """Each column's PostgreSQL type; columns that have no type yet are left out."""
    return {f.name: _type(f.type) for f in schema if not pt.is_null(f.type)}


def copy_rows(cur: psycopg.Cursor[Any], table: sql.Composable, rows: pa.Table) -> None:
    """COPY rows into columns of the same names.

    Parameters
    ----------
    rows : Table
        Times keep microseconds; lists and structs become JSON.
    """
    names = list(columns_of(rows.schema))
    target = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT csv)").format(
        table, sql.SQL(", ").join(map(sql.Identifier, names))
    )
    with cur.copy(target) as copy:
        copy.write(_csv(rows.select(names)))


def _csv(rows: pa.Table) -> bytes:
    """Text that tells NULL (nothing) from empty text (a pair of quotes)."""
    columns = ", ".join(f"{_text(quote(f.name), f.type)} AS {quote(f.name)}" for f in rows.schema)
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.register("_kframe_rows", rows)
        text = con.sql(f"SELECT {columns} FROM _kframe_rows").to_arrow_table()
    sink = io.BytesIO()
    options = pa.csv.WriteOptions(include_header=False, quoting_style="needed")
    pa.csv.write_csv(text, sink, options)
    return sink.getvalue()


def _type(type_: pa.DataType) -> str:
    if pt.is_dictionary(type_):
        return _type(type_.value_type)
    if pt.is_decimal(type_):
        return f"numeric({type_.precision},{type_.scale})"
    if pt.is_timestamp(type_):
        return "timestamptz" if type_.tz else "timestamp"
    if pt.is_time(type_):
        return "time"
    if pt.is_duration(type_) or pt.is_interval(type_):
        return "interval"
    if pt.is_nested(type_):
        return "jsonb"
    if pt.is_binary(type_) or pt.is_large_binary(type_):
        return "bytea"
    return _TYPES.get(type_, "text")


def _text(x: str, type_: pa.DataType) -> str:
    if pt.is_binary(type_) or pt.is_large_binary(type_):
        return f"'\\x' || lower(hex({x}))"
    value = f"to_json({as_json(x, type_)})" if pt.is_nested(type_) else x
    return f"CAST({value} AS VARCHAR)"
