"""The rows of a table that a step reads: committed ones, under this batch's earlier changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import duckdb
import pyarrow as pa

from kframe.errors import DefinitionError
from kframe.model import Change
from kframe.transform.rows import RowStep
from kframe.transform.step import Step


def table_rows(
    cur: duckdb.DuckDBPyConnection,
    table: str,
    pending: Sequence[Change],
    step: Step,
    frames: Mapping[str, pa.Table],
) -> pa.Table:
    """A table's rows as a step of this batch sees them.

    Parameters
    ----------
    cur : DuckDBPyConnection
        On the store; nothing is written.
    pending : sequence of Change
        What earlier steps of this batch will write.
    step : Step
        With ``lookup={table: key}``, only rows whose key occurs in its frames are read.

    Raises
    ------
    DefinitionError
        The table does not exist, or has no column of the lookup's name.
    """
    with ExitStack() as names:
        query = _committed(cur, table)
        for i, change in enumerate(c for c in pending if (c.schema, c.table) == ("main", table)):
            query = _overlaid(cur, names, query, change, f"_kframe_pending_{i}")
        key = step.lookup.get(table) if isinstance(step, RowStep) else None
        if key is not None:
            query = _matching(cur, names, query, table, key, frames)
        if not query:
            raise DefinitionError(
                f"Step {step.name!r} reads table {table!r}, which does not exist yet.",
                hint=f"Load it: pipeline.side_table({table!r}, df), or define its step before this one.",
            )
        return cur.sql(query).to_arrow_table()


def table_schema(cur: duckdb.DuckDBPyConnection, table: str) -> pa.Schema:
    """A table's columns; none when it does not exist yet."""
    query = _committed(cur, table)
    return cur.sql(f"{query} LIMIT 0").to_arrow_table().schema if query else pa.schema([])


def _committed(cur: duckdb.DuckDBPyConnection, table: str) -> str:
    found = cur.execute(
        "SELECT 1 FROM information_schema.tables WHERE table_schema = 'main' AND table_name = ?", [table]
    ).fetchall()
    return f"SELECT * FROM main.{_quote(table)}" if found else ""


def _overlaid(cur: duckdb.DuckDBPyConnection, names: ExitStack, query: str, change: Change, name: str) -> str:
    _register(cur, names, name, change.rows)
    if not query:
        return f"SELECT * FROM {name}"
    if change.key:
        query = (
            f"SELECT * FROM ({query}) AS old WHERE NOT EXISTS (FROM {name} AS new WHERE {_same(change.key)})"
        )
        if change.deletes is not None:
            _register(cur, names, name + "_gone", change.deletes)
            query = (
                f"SELECT * FROM ({query}) AS old WHERE NOT EXISTS "
                f"(FROM {name}_gone AS new WHERE {_same(change.key)})"
            )
    return f"SELECT * FROM ({query}) UNION ALL BY NAME SELECT * FROM {name}"


def _matching(
    cur: duckdb.DuckDBPyConnection,
    names: ExitStack,
    query: str,
    table: str,
    key: str,
    frames: Mapping[str, pa.Table],
) -> str:
    wanted = [frame.select([key]) for frame in frames.values() if key in frame.column_names]
    if not wanted:
        raise DefinitionError(
            f"lookup={{{table!r}: {key!r}}}: no topic of the step has a column {key!r}.",
            hint="The lookup's column has the same name in the topic and in the table.",
        )
    _register(cur, names, "_kframe_wanted", pa.concat_tables(wanted))
    return f"SELECT * FROM ({query}) WHERE {_quote(key)} IN (SELECT {_quote(key)} FROM _kframe_wanted)"


def _register(cur: duckdb.DuckDBPyConnection, names: ExitStack, name: str, rows: pa.Table) -> None:
    cur.register(name, rows)
    names.callback(cur.unregister, name)


def _same(key: Sequence[str]) -> str:
    return " AND ".join(f"old.{_quote(k)} IS NOT DISTINCT FROM new.{_quote(k)}" for k in key)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
