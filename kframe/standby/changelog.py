"""A pipeline's changelog: its changed rows, and its ledger's, as records of one compacted topic.

Keys and values are JSON, every value a text, so that each DuckDB type comes back as it was. Columns are rows
of the ledger's table `COLUMNS`, and told once: compaction leaves them before the rows that have them.

    ["row", schema, table, {key column: text}]  -> the row; a tombstone deletes it
    ["added", schema, table, batch_id, n]       -> a row of a table without key
    ["view", name]                              -> its name and SQL
    ["commit"]                                  -> the batch to which everything before it belongs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kframe.commit.store import quote, registered
from kframe.model import Change

RECORD = pa.schema([("key", pa.binary()), ("value", pa.binary())])
LEDGER, COLUMNS = "_kframe", "columns"
_COMMIT = b'["commit"]'
_N = "_kframe_n"
_LOG = "_kframe_log"


@dataclass(frozen=True)
class Commit:
    """The end of a batch in a changelog.

    ``delivered`` is the outbox id behind its last record, ``file`` the id of the file that it comes from.
    """

    batch_id: int
    epoch: int
    delivered: int
    file: str


# ---- to records -------------------------------------------------------------------------------------


def of_change(cur: duckdb.DuckDBPyConnection, change: Change, batch_id: int) -> pa.Table:
    """The records (columns `RECORD`) for a change whose rows have the types of the stored table."""
    parts = [RECORD.empty_table()]
    row_key = _row_key(change.schema, change.table, change.key)
    if change.deletes is not None and change.deletes.num_rows:
        parts.append(_encoded(cur, change.deletes, row_key, "NULL"))
    if change.rows.num_rows:
        value = _object(change.rows.column_names)
        rows = change.rows.append_column(_N, pa.array(range(change.rows.num_rows), pa.int64()))
        key = row_key if change.key else _added_key(change, batch_id)
        parts.append(_encoded(cur, rows, key, value))
    return pa.concat_tables(parts)


def query_of_rows(schema: str, table: str, key: tuple[str, ...], columns: list[str], where: str) -> str:
    """SQL for the records (columns `RECORD`) for stored rows that meet a condition."""
    record = f"encode({_row_key(schema, table, key)}) AS key, encode({_object(columns)}) AS value"
    return f"SELECT {record} FROM {quote(schema)}.{quote(table)} WHERE {where}"


def of_view(name: str, sql: str) -> pa.Table:
    """The record for a view."""
    return _one(["view", name], {"name": name, "sql": sql})


def of_commit(commit: Commit) -> pa.Table:
    """The record that ends a batch."""
    return _one(["commit"], asdict(commit))


def _row_key(schema: str, table: str, key: tuple[str, ...]) -> str:
    prefix = json.dumps(["row", schema, table])[:-1]
    return f"{_literal(prefix + ', ')} || {_object(key)} || ']'"


def _added_key(change: Change, batch_id: int) -> str:
    prefix = json.dumps(["added", change.schema, change.table, batch_id])[:-1]
    return f"{_literal(prefix + ', ')} || {_N} || ']'"


def _object(columns: tuple[str, ...] | list[str]) -> str:
    """SQL for a JSON object of columns as texts."""
    members = ", ".join(f"{quote(c)} := CAST({quote(c)} AS VARCHAR)" for c in columns)
    return f"CAST(to_json(struct_pack({members})) AS VARCHAR)"


def _encoded(cur: duckdb.DuckDBPyConnection, rows: pa.Table, key: str, value: str) -> pa.Table:
    with registered(cur, "_kframe_changed", rows) as view:
        query = f"SELECT encode({key}) AS key, encode({value}) AS value FROM {view}"
        return cur.sql(query).to_arrow_table().cast(RECORD)


def _one(key: list[str], value: Mapping[str, Any]) -> pa.Table:
    row = {"key": json.dumps(key).encode(), "value": json.dumps(value).encode()}
    return pa.Table.from_pylist([row], RECORD)


# ---- from records -----------------------------------------------------------------------------------


def last_commit(records: pa.Table) -> tuple[int, Commit] | None:
    """Index of the last ``commit`` among records, and what it says; None when there is none."""
    found = pc.indices_nonzero(pc.equal(records["key"].combine_chunks(), pa.scalar(_COMMIT, pa.binary())))
    if not len(found):
        return None
    at = found[-1].as_py()
    return at, Commit(**json.loads(records["value"][at].as_py()))


class Log:
    """Records in the order of their offsets, up to a ``commit``: the last of each key counts.

    Parameters
    ----------
    cur : DuckDBPyConnection
        On the follower's store, inside the transaction that will hold the changes.
    records : Table
        Columns `RECORD`.
    """

    def __init__(self, cur: duckdb.DuckDBPyConnection, records: pa.Table) -> None:
        self._cur = cur
        texts = {"k": records["key"].cast(pa.string()), "v": records["value"].cast(pa.string())}
        rows = pa.table({**texts, "i": pa.array(np.arange(records.num_rows))})
        with registered(cur, "_kframe_records", rows) as log:
            cur.execute(
                f"CREATE OR REPLACE TEMP TABLE {_LOG} AS "
                "SELECT k, v, i, path[1] AS kind, path[2] AS schema, path[3] AS name FROM (SELECT *, "
                f"json_extract_string(k, ['$[0]', '$[1]', '$[2]']) AS path FROM {log} "
                f"WHERE i IN (SELECT max(i) FROM {log} GROUP BY k)) ORDER BY i"
            )

    def definitions(self) -> Iterator[str]:
        """SQL that makes the tables and columns, then the views; to be run before `changes`."""
        tables: dict[tuple[str, str], list[str]] = {}
        for told in self._told("row", LEDGER, COLUMNS):
            column = f"{quote(told['column_name'])} {told['data_type']}"
            tables.setdefault((told["schema_name"], told["table_name"]), []).append(column)
        for (schema, name), columns in tables.items():
            table = f"{quote(schema)}.{quote(name)}"
            yield f"CREATE SCHEMA IF NOT EXISTS {quote(schema)}"
            yield f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(columns)})"
            yield from (f"ALTER TABLE {table} ADD COLUMN IF NOT EXISTS {column}" for column in columns)
        for told in self._told("view"):
            yield f"DROP VIEW IF EXISTS main.{quote(told['name'])}"
            yield told["sql"]

    def changes(self, next_batch_id: int) -> Iterator[Change]:
        """The rows, table by table; without those that batches before `next_batch_id` have added."""
        found = self._cur.execute(
            f"SELECT schema, name, kind, any_value(k), bool_or(v IS NULL) FROM {_LOG} "
            "WHERE kind IN ('row', 'added') GROUP BY ALL ORDER BY ALL"
        )
        for schema, name, kind, told, deletes in found.fetchall():
            columns = self._cur.execute(f"DESCRIBE {quote(schema)}.{quote(name)}").fetchall()
            types = {str(column[0]): str(column[1]) for column in columns}
            mine = f"{_LOG} WHERE kind = '{kind}' AND schema = {_literal(schema)} AND name = {_literal(name)}"
            if kind == "added":
                later = f"{mine} AND CAST(k ->> '$[3]' AS BIGINT) >= {next_batch_id}"
                yield Change(name, self._typed("v", types, later), schema=schema)
            else:
                key = {column: types[column] for column in json.loads(told)[3]}
                gone = self._typed("k -> '$[3]'", key, f"{mine} AND v IS NULL") if deletes else None
                rows = self._typed("v", types, f"{mine} AND v IS NOT NULL")
                yield Change(name, rows, tuple(key), gone, schema)

    def _typed(self, source: str, types: Mapping[str, str], where: str) -> pa.Table:
        texts = json.dumps(dict.fromkeys(types, "VARCHAR"))
        casts = ", ".join(f"CAST(x.{quote(c)} AS {t}) AS {quote(c)}" for c, t in types.items())
        parsed = f"SELECT from_json({source}, {_literal(texts)}) AS x, i FROM {where}"
        return self._cur.sql(f"SELECT {casts} FROM ({parsed}) ORDER BY i").to_arrow_table()

    def _told(self, *kind: str) -> list[dict[str, str]]:
        """The values of the records whose keys begin with `kind`."""
        columns = ("kind", "schema", "name")[: len(kind)]
        where = " AND ".join(f"{column} = {_literal(of)}" for column, of in zip(columns, kind, strict=True))
        found = self._cur.execute(f"SELECT v FROM {_LOG} WHERE {where} ORDER BY i").fetchall()
        return [json.loads(value) for (value,) in found]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
