"""Rows to Kafka records, in bulk: values as JSON objects, keys as text or JSON."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import duckdb
import pyarrow as pa
import pyarrow.types as pt

from kframe.commit.store import quote
from kframe.errors import SchemaError

TOMBSTONE = "_tombstone"
"""A boolean column of the rows: True makes the record's value null. Never in the value."""
RECORD = pa.schema([("key", pa.binary()), ("value", pa.binary())])
_ISO = "%Y-%m-%dT%H:%M:%S.%f"


def records(
    cur: duckdb.DuckDBPyConnection, rows: pa.Table, key: Sequence[str], *, name: str, null_keys: bool = True
) -> pa.Table:
    """Encode rows as records.

    Parameters
    ----------
    cur : DuckDBPyConnection
        Any; nothing is written.
    rows : Table
        Missing values and floats that are not finite become null, times ISO 8601 text, decimals text (so
        that no reader rounds them), bytes Base64.
    key : sequence of str
        One column: its value as text (bytes as they are), null for none. Several: a JSON object of them.
    name : str
        The topic, for errors.
    null_keys : bool
        Whether a record may have no key.

    Returns
    -------
    Table, shape (n_rows, 2)
        Columns ``key`` and ``value``, binary, in the order of the rows.

    Raises
    ------
    SchemaError
        A key column is missing, or a row has no key.
    """
    missing = [column for column in key if column not in rows.column_names]
    if missing:
        raise SchemaError(
            f"Output {name!r}: the rows have no column {missing[0]!r}, which is the records' key.",
            kept="Nothing of this batch was written or sent.",
            hint=f"Columns: {', '.join(rows.column_names) or 'none'}.",
        )
    view = f"_kframe_{uuid.uuid4().hex}"
    cur.register(view, rows)
    try:
        query = f"SELECT {_key(rows.schema, key)} AS key, {_value(rows.schema)} AS value FROM {view}"
        encoded = cur.sql(query).to_arrow_table().cast(RECORD)
    finally:
        cur.unregister(view)
    if not null_keys and encoded["key"].null_count:
        first = encoded["key"].is_null().index(True).as_py()
        raise SchemaError(
            f"Output {name!r}: a row has no key ({', '.join(key) or 'no key= was given'}), which a compacted "
            f"topic refuses: {_shown(rows.slice(first, 1))}",
            kept="Nothing of this batch was written or sent.",
            hint="Drop such rows, or fill the key column.",
        )
    return encoded


def _value(schema: pa.Schema) -> str:
    fields = [f for f in schema if f.name != TOMBSTONE]
    members = ", ".join(f"{quote(f.name)} := {as_json(quote(f.name), f.type)}" for f in fields)
    value = f"encode(CAST(to_json(struct_pack({members})) AS VARCHAR))" if fields else "encode('{}')"
    if TOMBSTONE not in schema.names:
        return value
    return f"CASE WHEN {quote(TOMBSTONE)} IS NOT TRUE THEN {value} END"


def _key(schema: pa.Schema, key: Sequence[str]) -> str:
    if not key:
        return "CAST(NULL AS BLOB)"
    if len(key) > 1:
        members = ", ".join(f"{quote(k)} := {as_json(quote(k), schema.field(k).type)}" for k in key)
        return f"encode(CAST(to_json(struct_pack({members})) AS VARCHAR))"
    type_, column = schema.field(key[0]).type, quote(key[0])
    if _is_binary(type_):
        return column
    value = as_json(column, type_)
    text = f"to_json({value})" if pt.is_nested(type_) else value
    return f"encode(CAST({text} AS VARCHAR))"


def as_json(x: str, type_: pa.DataType) -> str:
    """`x` as something that ``to_json`` writes without loss."""
    if pt.is_dictionary(type_):
        return as_json(x, type_.value_type)
    if pt.is_floating(type_):
        exact = f"CAST(CAST({x} AS VARCHAR) AS DOUBLE)" if type_ != pa.float64() else x
        return f"CASE WHEN isfinite({x}) THEN {exact} END"
    if pt.is_timestamp(type_):
        return f"strftime({x}, '{_ISO}{'Z' if type_.tz else ''}')"
    if _is_binary(type_):
        return f"to_base64({x})"
    if pt.is_decimal(type_) or pt.is_date(type_) or pt.is_time(type_) or pt.is_duration(type_):
        return f"CAST({x} AS VARCHAR)"
    if pt.is_struct(type_):
        members = ", ".join(f"{quote(f.name)} := {as_json(f'({x}).{quote(f.name)}', f.type)}" for f in type_)
        return f"CASE WHEN {x} IS NOT NULL THEN struct_pack({members}) END"
    if pt.is_list(type_) or pt.is_large_list(type_):
        depth = f"v{x.count('list_transform')}_{len(x)}"
        return f"list_transform({x}, lambda {depth}: {as_json(depth, type_.value_type)})"
    return x


def _shown(row: pa.Table) -> str:
    text = str(row.to_pylist()[0])
    return text if len(text) <= 200 else text[:200] + "..."


def _is_binary(type_: pa.DataType) -> bool:
    return bool(pt.is_binary(type_) or pt.is_large_binary(type_) or pt.is_binary_view(type_))
