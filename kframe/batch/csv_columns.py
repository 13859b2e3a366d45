"""CSV records, one line each, to columns.

Lines without quotes whose cells are all shown to convert exactly go in bulk; any other is decided cell by
cell by `kframe.batch.strict`, which words the dead letter.
"""

from __future__ import annotations

import re
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from kframe.batch import exact, strict
from kframe.batch.fallback import completed
from kframe.schema import Schema


class CsvColumns:
    """Decodes lines into a table of the schema's columns, and says which did not fit.

    Parameters
    ----------
    schema : Schema
    con : DuckDBPyConnection
        Private and in memory; one thread uses it at a time.
    delimiter : str
        One character.
    """

    def __init__(self, schema: Schema, con: duckdb.DuckDBPyConnection, delimiter: str) -> None:
        self.schema = schema
        self._con = con
        self._delimiter = delimiter
        self._cell = re.compile(rf'"((?:[^"]|"")*)"|([^"\r\n{re.escape(delimiter)}]*)')
        self._query = _bulk_query(schema, delimiter)

    def decode(self, texts: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        """Decode one line a row. See `JsonColumns.decode`."""
        if self._query is None or len(texts) < max(exact.BULK_ROWS, 1):
            return self._line_by_line(texts)
        columns = self._in_bulk(self._query, texts)
        bulk = np.array(columns.column(0).to_numpy(), dtype=bool)
        nullable = pa.schema([pa.field(f.name, f.type.arrow) for f in self.schema])
        table = columns.drop_columns(["fits"]).rename_columns(nullable.names).cast(nullable)
        return completed(texts, table.filter(pa.array(bulk)), bulk, self._line_by_line)

    def _in_bulk(self, query: str, texts: pa.ChunkedArray) -> pa.Table:
        self._con.register("texts", pa.table({"t": texts}))
        try:
            return self._con.sql(query).to_arrow_table()
        finally:
            self._con.unregister("texts")

    def _line_by_line(self, texts: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        rows, good, errors = [], np.ones(len(texts), bool), {}
        for i, text in enumerate(texts.to_pylist()):
            try:
                rows.append(self._row(text))
            except strict.Misfit as error:
                errors[i] = str(error)
                good[i] = False
        return strict.to_arrow(rows, self.schema), good, errors

    def _row(self, text: str) -> dict[str, Any]:
        cells = self._cells(text)
        if len(cells) != len(self.schema.fields):
            raise strict.Misfit(f"expected one line of {len(self.schema.fields)} cells, got {len(cells)}")
        row = {}
        for f, cell in zip(self.schema, cells, strict=True):
            if cell is None and f.required:
                raise strict.Misfit(f"{f.name}: required, but empty")
            try:
                row[f.name] = None if cell is None else strict.cell(f.type, cell)
            except strict.Misfit as error:
                raise strict.Misfit(f"{f.name}: {error}") from None
        return row

    def _cells(self, text: str) -> list[str | None]:
        """The cells of one line; an empty one is None unless it is quoted."""
        text = text.removesuffix("\n").removesuffix("\r")
        cells: list[str | None] = []
        at = 0
        while match := self._cell.match(text, at):
            quoted, bare = match.groups()
            cells.append(bare or None if quoted is None else quoted.replace('""', '"'))
            at = match.end()
            if at == len(text):
                return cells
            if text[at] != self._delimiter:
                raise strict.Misfit(f"not valid CSV: {text[at]!r} after cell {len(cells)}")
            at += 1
        raise AssertionError("an empty cell always matches")


def _bulk_query(schema: Schema, delimiter: str) -> str | None:
    """From ``texts(t)`` to whether a line fits, and its columns; None for a type that needs a closer look."""
    numbers = range(1, len(schema.fields) + 1)
    values = [exact.from_cell(f.type, f"c{i}") for i, f in zip(numbers, schema, strict=True)]
    if None in values:
        return None
    fits = ["cells = " + str(len(values)), "NOT regexp_matches(line, '[\"\\r\\n]')"]
    fits += [
        f"v{i} IS NOT NULL" if f.required else f"(v{i} IS NOT NULL OR c{i} IS NULL)"
        for i, f in zip(numbers, schema, strict=True)
    ]
    texts = _each(numbers, "nullif(c[{i}], '') AS c{i}")
    typed = ", ".join(f"{value} AS v{i}" for i, value in zip(numbers, values, strict=True))
    return f"""
        WITH lines AS (
            SELECT CASE WHEN suffix(t, chr(10)) THEN regexp_replace(t, '\\r?\\n$', '') ELSE t END AS line
            FROM texts),
        split AS (SELECT line, string_split(line, {exact.literal(delimiter)}) AS c FROM lines),
        found AS (SELECT line, len(c) AS cells, {texts} FROM split),
        typed AS (SELECT *, {typed} FROM found)
        SELECT coalesce({" AND ".join(fits)}, false) AS fits, {_each(numbers, "v{i}")} FROM typed"""


def _each(numbers: range, form: str) -> str:
    return ", ".join(form.format(i=i) for i in numbers)
