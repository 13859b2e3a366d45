"""JSON records to columns in bulk, with strict types.

A batch has few distinct type signatures. Records whose signature fits the schema are parsed by DuckDB all at
once; the values that DuckDB would coerce or round are checked column by column. Whatever is not shown to fit
goes to `kframe.batch.strict`, record by record, which decides and words the dead letter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kframe.batch import strict
from kframe.schema import Field, Schema, Type

Signature = tuple[str | None, ...]
"""The JSON types of a record: of the whole, then of each field of the schema."""

_INTEGERS = frozenset({"BIGINT", "UBIGINT"})
_NUMBERS = _INTEGERS | {"DOUBLE"}
_TEXT = frozenset({"VARCHAR"})
_ABSENT = frozenset({None, "NULL"})
_ACCEPTED = {
    "int": _INTEGERS,
    "float": _NUMBERS,
    "str": _TEXT,
    "bool": frozenset({"BOOLEAN"}),
    "decimal": _NUMBERS | _TEXT,
    "date": _TEXT,
    "timestamp": _TEXT,
}
"""The kinds that can be parsed in bulk, and the JSON types from which."""

_LONG_NUMERAL = "[0-9.]{17}"  # more digits than a double keeps: only the strict path can tell
_DATE = r"[1-9]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d"
_FRACTION = {"s": "", "ms": r"(\.\d{1,3}0{0,3})?", "us": r"(\.\d{1,6})?"}
_ZONE = r"(Z|[+-](0\d|1[0-4]):[0-5]\d)?"


@dataclass(frozen=True)
class _Group:
    """Records that can be parsed together: their signatures, and the time columns written as integers."""

    counts: Mapping[Signature, int]
    epochs: frozenset[str]

    def present(self, i: int) -> int:
        """How many records have a value in the schema's field `i`."""
        return sum(count for signature, count in self.counts.items() if signature[i + 1] not in _ABSENT)


class JsonColumns:
    """Decodes texts into a table of the schema's columns, and says which rows did not fit.

    Parameters
    ----------
    schema : Schema
    con : DuckDBPyConnection
        Private and in memory; one thread uses it at a time.
    """

    def __init__(self, schema: Schema, con: duckdb.DuckDBPyConnection) -> None:
        self.schema = schema
        self._con = con
        self._in_bulk = all(f.type.kind in _ACCEPTED and f.type.text != "float32" for f in schema)
        paths = ", ".join(_literal(p) for p in ("$", *(_path(f.name) for f in schema)))
        self._signature = f"CASE WHEN json_valid(t) THEN json_type(t, [{paths}]) END"
        self._has_decimals = any(f.type.kind == "decimal" for f in schema)

    def decode(self, texts: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        """Decode one text a row.

        Parameters
        ----------
        texts : ChunkedArray of string, shape (n,)
            No nulls.

        Returns
        -------
        rows : Table, shape (n_good, n_columns)
            Rows that fit, in order, under the schema's Arrow types.
        good : bool array, shape (n,)
            Which they are.
        errors : dict of int to str
            Why each other row does not fit, by its index.
        """
        bulk, group = self._candidates(texts)
        taken = _where(texts, bulk)
        table = self._parse(taken, group) if len(taken) else self.schema.arrow.empty_table()
        fits = self._unchanged(table, taken, group)
        if not fits.all():
            table = table.filter(pa.array(fits))
            bulk[np.flatnonzero(bulk)[~fits]] = False
        return (table, bulk, {}) if bulk.all() else self._with_strict(texts, table, bulk)

    # ---- in bulk ------------------------------------------------------------------------------------

    def _candidates(self, texts: pa.ChunkedArray) -> tuple[Any, _Group]:
        """Rows whose JSON types fit the schema, and what is common to them."""
        if not self._in_bulk:
            return np.zeros(len(texts), bool), _Group({}, frozenset())
        counts = self._signatures(texts)
        epochs = self._written_as_integers(counts)
        good = [s for s in counts if s is not None and self._fits(s, epochs)]
        bulk = np.ones(len(texts), bool)
        if len(good) < len(counts):
            query = f"SELECT coalesce(list_contains($good, {self._signature}), false) FROM texts"
            bulk = _bools(self._sql(query, texts, {"good": [list(s) for s in good]})[0]) if good else ~bulk
        if self._has_decimals:
            bulk &= ~_bools(self._sql(f"SELECT regexp_matches(t, '{_LONG_NUMERAL}') FROM texts", texts)[0])
        if not bulk.all():
            counts = self._signatures(_where(texts, bulk))
        return bulk, _Group({s: n for s, n in counts.items() if s is not None}, epochs)

    def _signatures(self, texts: pa.ChunkedArray) -> dict[Signature | None, int]:
        query = f"SELECT s, count(*) FROM (SELECT {self._signature} AS s FROM texts) GROUP BY s"
        signatures, counts = self._sql(query, texts)
        return {
            None if s is None else tuple(s): n
            for s, n in zip(signatures.to_pylist(), counts.to_pylist(), strict=True)
        }

    def _written_as_integers(self, counts: Mapping[Signature | None, int]) -> frozenset[str]:
        """Time columns that most of these records write as integers."""
        found = set()
        for i, f in enumerate(self.schema, start=1):
            if f.type.kind == "timestamp":
                integers = sum(n for s, n in counts.items() if s and s[i] in _INTEGERS)
                if integers > sum(n for s, n in counts.items() if s and s[i] in _TEXT):
                    found.add(f.name)
        return frozenset(found)

    def _fits(self, signature: Signature, epochs: frozenset[str]) -> bool:
        root, *types = signature
        return root == "OBJECT" and all(
            not f.required if t in _ABSENT else t in (_INTEGERS if f.name in epochs else _ACCEPTED[f.type.kind])
            for f, t in zip(self.schema, types, strict=True)
        )

    def _parse(self, texts: pa.ChunkedArray, group: _Group) -> pa.Table:
        """Parse every text once, then convert the columns that DuckDB would coerce or round."""
        structure = json.dumps({f.name: _parsed_as(f, group) for f in self.schema})
        parsed = self._sql(f"SELECT unnest(from_json(t, {_literal(structure)})) FROM texts", texts)
        columns = [self._converted(f, c, group) for f, c in zip(self.schema, parsed, strict=True)]
        nullable = pa.schema([pa.field(f.name, f.type.arrow) for f in self.schema])
        return pa.Table.from_arrays(columns, schema=nullable)

    def _converted(self, field: Field, column: pa.ChunkedArray, group: _Group) -> pa.ChunkedArray:
        """A parsed column under its own type; NULL where it is not shown to be the same value."""
        type_ = field.type
        if field.name in group.epochs:
            return _storable(column, type_).cast(type_.arrow)
        conversion = _conversion(type_)
        if conversion is not None:
            (column,) = self._sql(f"SELECT {conversion} FROM texts", column)
        return column if column.type == type_.arrow else column.cast(type_.arrow)

    def _unchanged(self, table: pa.Table, texts: pa.ChunkedArray, group: _Group) -> Any:
        """Rows of `table` whose every value came through; as many values as the signatures promise."""
        fits = np.ones(table.num_rows, bool)
        for i, (f, column) in enumerate(zip(self.schema, table, strict=True)):
            if f.type.kind == "float" and not pc.all(finite := pc.fill_null(pc.is_finite(column), True)).as_py():
                fits &= _bools(finite)
            if table.num_rows - column.null_count != group.present(i):
                query = f"SELECT coalesce(json_type(t, {_literal(_path(f.name))}), 'NULL') <> 'NULL' FROM texts"
                present = _bools(self._sql(query, texts)[0])
                fits &= ~(present & _bools(column.is_null()))
        return fits

    # ---- record by record ---------------------------------------------------------------------------

    def _with_strict(self, texts: pa.ChunkedArray, table: pa.Table, bulk: Any) -> tuple[pa.Table, Any, dict[int, str]]:
        """Decide the rows outside of `bulk` one by one, and put those that fit in their places."""
        rest = np.flatnonzero(~bulk)
        left = texts.take(pa.array(rest))
        valid, compact = self._sql(
            "SELECT json_valid(t), CASE WHEN json_valid(t) THEN json(t)::VARCHAR END FROM texts", left
        )
        rows, good, errors = [], bulk.copy(), {}
        documents = zip(rest.tolist(), left.to_pylist(), valid.to_pylist(), compact.to_pylist(), strict=True)
        for i, text, is_valid, short in documents:
            try:
                rows.append(strict.row(self.schema, _document(text, is_valid, short)))
                good[i] = True
            except strict.Misfit as error:
                errors[i] = str(error)
        if not rows:
            return table, good, errors
        if not bulk.any():
            return strict.to_arrow(rows, self.schema), good, errors
        merged = pa.concat_tables([table, strict.to_arrow(rows, self.schema).cast(table.schema)])
        order = np.concatenate([np.flatnonzero(bulk), np.flatnonzero(good & ~bulk)]).argsort()
        return merged.take(pa.array(order)), good, errors

    def _sql(
        self, query: str, texts: pa.ChunkedArray, parameters: Mapping[str, object] | None = None
    ) -> list[pa.ChunkedArray]:
        """A query's columns, in row order; the texts are its table ``texts`` with one column ``t``."""
        self._con.register("texts", pa.table({"t": texts}))
        try:
            return list(self._con.sql(query, params=parameters).to_arrow_table().columns)
        finally:
            self._con.unregister("texts")


def unknown_fields(con: duckdb.DuckDBPyConnection, schema: Schema, texts: pa.ChunkedArray) -> dict[str, str]:
    """Top-level fields of valid objects that the schema does not have, and the type each would get.

    Fields that are always null, and names that tables cannot tell apart from a column's, are left out.
    """
    con.register("texts", pa.table({"t": texts}))
    try:
        objects = "FROM texts WHERE CASE WHEN json_valid(t) THEN json_type(t) END = 'OBJECT'"
        names = con.execute(f"SELECT DISTINCT unnest(json_keys(t)) AS name {objects} ORDER BY name").fetchall()
        known = {f.name.lower() for f in schema}
        found = {}
        for (name,) in names:
            if not name or name.lower() in known or name.startswith("_"):
                continue
            rows = con.execute(f"SELECT DISTINCT json_type(t, {_literal(_path(name))}) {objects}").fetchall()
            types = frozenset(t for (t,) in rows) - _ABSENT
            if types:
                found[name] = _inferred(types)
                known.add(name.lower())
        return found
    finally:
        con.unregister("texts")


def _inferred(types: frozenset[str | None]) -> str:
    if types <= _INTEGERS:
        return "int64"
    if types <= _NUMBERS:
        return "float64"
    if types <= _TEXT:
        return "str"
    return "bool" if types <= _ACCEPTED["bool"] else "json"


def _parsed_as(field: Field, group: _Group) -> str:
    """The type DuckDB parses a field into; what needs a closer look stays text."""
    if field.name in group.epochs:
        return "BIGINT"
    return "VARCHAR" if _conversion(field.type) is not None else field.type.duckdb


def _conversion(type_: Type) -> str | None:
    """SQL from the text ``t`` to a type, NULL where that might not be exact; None: nothing to convert."""
    if type_.kind == "decimal":
        scale = type_.arrow.scale
        whole = max(type_.arrow.precision - scale, 1)
        fraction = rf"(\.\d{{1,{scale}}}0*)?" if scale else ""
        return _if_matches(rf"-?\d{{1,{whole}}}{fraction}", type_.duckdb)
    if type_.kind == "date":
        return _if_matches(_DATE, "DATE")
    if type_.kind == "timestamp":
        zone, sql_type = (_ZONE, "TIMESTAMPTZ") if type_.arrow.tz else ("", "TIMESTAMP")
        return _if_matches(f"{_DATE}[T ]{_CLOCK}{_FRACTION[type_.arrow.unit]}{zone}", sql_type)
    return None


def _if_matches(pattern: str, sql_type: str) -> str:
    return f"CASE WHEN regexp_full_match(t, {_literal(pattern)}) THEN TRY_CAST(t AS {sql_type}) END"


def _storable(counts: pa.ChunkedArray, type_: Type) -> pa.ChunkedArray:
    """Epoch counts; NULL where the store's microseconds could not hold them."""
    bound = (2**63 - 1) // {"s": 1_000_000, "ms": 1_000, "us": 1}[type_.arrow.unit]
    inside = pc.and_(pc.greater_equal(counts, -bound), pc.less_equal(counts, bound))
    return pc.if_else(inside, counts, pa.scalar(None, pa.int64()))


def _document(text: str, valid: bool, compact: str | None) -> object:
    """The parsed text; DuckDB's parser says what is valid, so that both paths agree on syntax."""
    if not valid:
        raise strict.Misfit(f"not valid JSON: {text[:80]!r}" if text else "not valid JSON: an empty value")
    for candidate in (text, compact or ""):
        try:
            return strict.load(candidate)
        except ValueError:
            continue
        except RecursionError:
            break
    raise strict.Misfit("not valid JSON: nested too deeply")


def _where(texts: pa.ChunkedArray, mask: Any) -> pa.ChunkedArray:
    return texts if mask.all() else texts.filter(pa.array(mask))


def _bools(column: pa.ChunkedArray) -> Any:
    return np.array(column.to_numpy(), dtype=bool)


def _path(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'$."{escaped}"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
