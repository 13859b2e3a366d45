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

from kframe.batch import exact, strict
from kframe.batch.fallback import completed
from kframe.errors import SchemaError
from kframe.schema import Field, Schema, Type

Signature = tuple[str | None, ...]
"""The JSON types of a record: of the whole, then of each field of the schema."""

_INTEGERS = frozenset({"BIGINT", "UBIGINT"})
_NUMBERS = _INTEGERS | {"DOUBLE"}
_TEXT = frozenset({"VARCHAR"})
NEW_FIELDS_MAX = 1_000
"""The most unknown fields that one batch may add as columns."""
_ABSENT = frozenset({None, "NULL"})
_ACCEPTED = {
    "int": _INTEGERS,
    "float": _NUMBERS,
    "str": _TEXT,
    "bool": frozenset({"BOOLEAN"}),
    "decimal": _NUMBERS | _TEXT,
    "date": _TEXT,
    "timestamp": _TEXT,
    "json": frozenset({"OBJECT", "ARRAY", "BOOLEAN"}) | _NUMBERS | _TEXT,
    "list": frozenset({"ARRAY"}),
    "struct": frozenset({"OBJECT"}),
}
"""The kinds that can be parsed in bulk, and the JSON types from which."""

_INSIDE = {"int64": _INTEGERS | {"NULL"}, "float64": _NUMBERS | {"HUGEINT", "NULL"}, "str": _TEXT | {"NULL"}}
_INSIDE["bool"] = frozenset({"BOOLEAN", "NULL"})
"""The types inside lists and structs that can be parsed in bulk, and the JSON types from which."""

_LONG_WHOLE = "[0-9]{19}"  # may not fit into an int64
_LONG_NUMERAL = "|".join(  # more digits than a double keeps
    [
        r"[0-9]{16}[.eE]",
        "-[0-9]{19}",
        "[eE]-[0-9]{3}",  # or less than a double tells from zero
        "[0-9]{20}",
        *(rf"[0-9]{{{n}}}\.[0-9]{{{16 - n}}}" for n in range(1, 16)),
    ]
)
_NOT_FINITE = f"(?i)nan|inf|e[+]?[0-9]{{3}}|{_LONG_WHOLE}"  # what could have been read as infinity


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
        self._in_bulk = all(_parses_in_bulk(f.type) for f in schema)
        self._nested = [f for f in schema if f.type.members]
        self._signature = _signature_sql(schema)
        self._doubt = _doubt_sql(schema)

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
        return completed(texts, table, bulk, self._one_by_one)

    # ---- in bulk ------------------------------------------------------------------------------------

    def _candidates(self, texts: pa.ChunkedArray) -> tuple[Any, _Group]:
        """Rows whose JSON types fit the schema, and what is common to them."""
        if not self._in_bulk or len(texts) < max(exact.BULK_ROWS, 1):
            return np.zeros(len(texts), bool), _Group({}, frozenset())
        doubt = self._doubt if _longest(texts) <= strict.DEPTH_MAX else f"({self._doubt} OR {_DEEP})"
        counts = self._signatures(texts, doubt)
        epochs = self._written_as_integers(counts)
        good = {s: n for (s, doubtful), n in counts.items() if s and not doubtful and self._fits(s, epochs)}
        group = _Group(good, epochs)
        if len(good) == len(counts):
            return np.ones(len(texts), bool), group
        if not good:
            return np.zeros(len(texts), bool), group
        return self._which(texts, doubt, group), group

    def _signatures(self, texts: pa.ChunkedArray, doubt: str) -> dict[tuple[Signature | None, bool], int]:
        same = "s" if self._nested else "s::VARCHAR"  # grouping by a list is slow; type names need no quotes
        query = (
            f"SELECT any_value(s), {doubt} AS doubt, count(*)"
            f" FROM (SELECT {self._signature} AS s, t FROM texts) GROUP BY {same}, doubt"
        )
        rows = zip(*(column.to_pylist() for column in self._sql(query, texts)), strict=True)
        return {(tuple(s) if s else None, bool(doubtful)): n for s, doubtful, n in rows}

    def _which(self, texts: pa.ChunkedArray, doubt: str, group: _Group) -> Any:
        """The rows of a group. Position by position: there may be many signatures, of few types each."""
        seen = [set(types) for types in zip(*group.counts, strict=True)]
        parameters = {f"p{i}": [t for t in types if t] or [""] for i, types in enumerate(seen)}
        wanted = [
            f"coalesce(list_contains($p{i}, s[{i + 1}]), {'s IS NOT NULL' if None in types else 'false'})"
            for i, types in enumerate(seen)
        ]
        query = (
            f"SELECT coalesce(NOT {doubt} AND {' AND '.join(wanted)}, false)"
            f" FROM (SELECT {self._signature} AS s, t FROM texts)"
        )
        return _bools(self._sql(query, texts, parameters)[0])

    def _written_as_integers(self, counts: Mapping[tuple[Signature | None, bool], int]) -> frozenset[str]:
        """Time columns that most of these records write as integers."""
        found = set()
        for i, f in enumerate(self.schema, start=1):
            if f.type.kind == "timestamp":
                integers = sum(n for (s, _), n in counts.items() if s and s[i] in _INTEGERS)
                if integers > sum(n for (s, _), n in counts.items() if s and s[i] in _TEXT):
                    found.add(f.name)
        return frozenset(found)

    def _fits(self, signature: Signature, epochs: frozenset[str]) -> bool:
        n = len(self.schema.fields) + 1
        return (
            signature[0] == "OBJECT"
            and all(
                not f.required
                if t in _ABSENT
                else t in (_INTEGERS if f.name in epochs else _ACCEPTED[f.type.kind])
                for f, t in zip(self.schema, signature[1:n], strict=True)
            )
            and all(
                t is None or _fits_inside(f.type, json.loads(t))
                for f, t in zip(self._nested, signature[n:], strict=True)
            )
        )

    def _parse(self, texts: pa.ChunkedArray, group: _Group) -> pa.Table:
        """Parse every text once, then convert the columns that DuckDB would coerce or round."""
        structure = {f.name: "BIGINT" if f.name in group.epochs else _parsed_as(f.type) for f in self.schema}
        parsed = self._sql(
            f"SELECT unnest(from_json(t, {exact.literal(json.dumps(structure))})) FROM texts", texts
        )
        columns = [self._converted(f, c, group) for f, c in zip(self.schema, parsed, strict=True)]
        nullable = pa.schema([pa.field(f.name, f.type.arrow) for f in self.schema])
        return pa.Table.from_arrays(columns, schema=nullable)

    def _converted(self, field: Field, column: pa.ChunkedArray, group: _Group) -> pa.ChunkedArray:
        """A parsed column under its own type; NULL where it is not shown to be the same value."""
        type_ = field.type
        if field.name in group.epochs:
            return _storable(column, type_).cast(type_.arrow)
        conversion = exact.from_text(type_, "t")
        if conversion is not None:
            (column,) = self._sql(f"SELECT {conversion} FROM texts", column)
        return column if column.type == type_.arrow else column.cast(type_.arrow)

    def _unchanged(self, table: pa.Table, texts: pa.ChunkedArray, group: _Group) -> Any:
        """Rows of `table` whose every value came through; as many values as the signatures promise."""
        fits = np.ones(table.num_rows, bool)
        for i, (f, column) in enumerate(zip(self.schema, table, strict=True)):
            if any(not pc.all(pc.is_finite(x)).as_py() for x in _floats(column)):
                query = f"SELECT NOT regexp_matches(t, {exact.literal(_NOT_FINITE)}) FROM texts"
                fits &= _bools(
                    pc.fill_null(pc.is_finite(column), True)
                    if not f.type.members
                    else self._sql(query, texts)[0]
                )
            if table.num_rows - column.null_count != group.present(i):
                query = f"SELECT coalesce(json_type(t, {_path(f.name)}), 'NULL') <> 'NULL' FROM texts"
                present = _bools(self._sql(query, texts)[0])
                fits &= ~(present & _bools(column.is_null()))
        return fits

    # ---- record by record ---------------------------------------------------------------------------

    def _one_by_one(self, texts: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        rows, good, errors = [], np.ones(len(texts), bool), {}
        for i, (text, parts) in enumerate(zip(texts.to_pylist(), self._json_parts(texts), strict=True)):
            try:
                rows.append(strict.row(self.schema, _document(text, parts)) | (parts or {}))
            except strict.Misfit as error:
                errors[i] = str(error)
                good[i] = False
        return strict.to_arrow(rows, self.schema), good, errors

    def _json_parts(self, texts: pa.ChunkedArray) -> list[dict[str, str | None] | None]:
        """Each text's ``json`` columns as the bulk path would give them; None: not valid JSON."""
        names = [f.name for f in self.schema if f.type.kind == "json"]
        parts = "".join(f", nullif(json_extract(t, {_path(n)})::VARCHAR, 'null')" for n in names)
        query = (
            f"SELECT t IS NOT NULL{parts} FROM (SELECT CASE WHEN json_valid(t) THEN t END AS t FROM texts)"
        )
        valid, *columns = (column.to_pylist() for column in self._sql(query, texts))
        rows = zip(*columns, strict=True) if columns else ((),) * len(texts)
        return [
            dict(zip(names, row, strict=True)) if ok else None for ok, row in zip(valid, rows, strict=True)
        ]

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
        names = con.execute(
            f"SELECT DISTINCT unnest(json_keys(t)) AS name {objects} ORDER BY name"
        ).fetchall()
        known = {f.name.lower() for f in schema}
        if len(names) > len(known) + NEW_FIELDS_MAX:
            raise SchemaError(
                f"{len(names):,} distinct fields in one batch: their names seem to be data.",
                kept="Nothing was committed of this batch.",
                hint='Keep them out with on_new_field="ignore".',
            )
        found = {}
        for (name,) in names:
            if not name or name.lower() in known or name.startswith("_"):
                continue
            rows = con.execute(f"SELECT DISTINCT json_type(t, {_path(name)}) {objects}").fetchall()
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


def _signature_sql(schema: Schema) -> str:
    """SQL for a record's `Signature`; NULL when it is not JSON. Lists and structs add their inner types."""
    types = f"json_type(t, ['$', {', '.join(_path(f.name) for f in schema)}])"
    inner = ", ".join(_structure_sql(f"json_extract(t, {_path(f.name)})") for f in schema if f.type.members)
    return f"CASE WHEN json_valid(t) THEN {f'list_concat({types}, [{inner}])' if inner else types} END"


def _structure_sql(value: str) -> str:
    """SQL for the types inside a value. DuckDB's function for it is fatal to the database from 128 levels."""
    structure = f"json_structure({value})::VARCHAR"
    cases = f"WHEN strlen(t) < 200 THEN {structure} WHEN {_BRACKETS} < 100 THEN {structure}"
    return f"CASE {cases} ELSE '\"deep\"' END"


def _doubt_sql(schema: Schema) -> str:
    """SQL, over ``s`` and ``t``, for whether a record holds a numeral that parsing might change unnoticed."""
    decimals = [f"s[{i}] = 'DOUBLE'" for i, f in enumerate(schema, start=2) if f.type.kind == "decimal"]
    doubts = []
    if decimals:
        doubts.append(f"WHEN {' OR '.join(decimals)} THEN regexp_matches(t, {exact.literal(_LONG_NUMERAL)})")
    if any("int64" in f.type.text for f in schema if f.type.members):
        doubts.insert(0, f"WHEN regexp_matches(t, '{_LONG_WHOLE}') THEN true")
    return f"(CASE {' '.join(doubts)} ELSE false END)" if doubts else "false"


_BRACKETS = "(strlen(t) - strlen(replace(replace(t, '[', ''), '{', '')))"
_DEEP = f"({_BRACKETS} > {strict.DEPTH_MAX})"


def _longest(texts: pa.ChunkedArray) -> int:
    return pc.max(pc.binary_length(texts)).as_py() or 0


def _parses_in_bulk(type_: Type, inside: bool = False) -> bool:
    if type_.members:
        return all(_parses_in_bulk(t, True) for _, t in type_.members)
    return type_.text in _INSIDE if inside else type_.kind in _ACCEPTED


def _fits_inside(type_: Type, structure: Any) -> bool:
    """Whether every value of a ``json_structure`` is one of the type."""
    if structure == "NULL":
        return True
    if type_.kind == "list":
        return isinstance(structure, list) and _fits_inside(type_.members[0][1], structure[0])
    if type_.kind == "struct":
        return isinstance(structure, dict) and all(
            _fits_inside(t, structure.get(name, "NULL")) for name, t in type_.members
        )
    return isinstance(structure, str) and structure in _INSIDE[type_.text]


def _floats(column: pa.ChunkedArray) -> list[pa.ChunkedArray]:
    """The floats of a column, also those inside of lists and structs."""
    if pa.types.is_floating(column.type):
        return [column]
    if pa.types.is_list(column.type):
        return _floats(pc.list_flatten(column))
    if pa.types.is_struct(column.type):
        return [x for i in range(column.type.num_fields) for x in _floats(pc.struct_field(column, [i]))]
    return []


def _parsed_as(type_: Type) -> Any:
    """The type DuckDB parses a field into; what needs a closer look stays text."""
    if type_.kind == "list":
        return [_parsed_as(type_.members[0][1])]
    if type_.kind == "struct":
        return {name: _parsed_as(t) for name, t in type_.members}
    if type_.kind == "float":
        return "DOUBLE"
    return "VARCHAR" if exact.from_text(type_, "t") is not None else type_.duckdb


def _storable(counts: pa.ChunkedArray, type_: Type) -> pa.ChunkedArray:
    """Epoch counts; NULL where the store's microseconds could not hold them."""
    bound = (2**63 - 1) // {"s": 1_000_000, "ms": 1_000, "us": 1}[type_.arrow.unit]
    inside = pc.and_(pc.greater_equal(counts, -bound), pc.less_equal(counts, bound))
    return pc.if_else(inside, counts, pa.scalar(None, pa.int64()))


def _document(text: str, parts: object) -> object:
    """The parsed text; DuckDB's parser says what is valid, so that both paths agree on syntax."""
    if parts is None:
        raise strict.Misfit(f"not valid JSON: {text[:80]!r}" if text else "not valid JSON: an empty value")
    try:
        return strict.load(text)
    except (ValueError, RecursionError) as error:
        raise strict.Misfit(f"not valid JSON: {error}") from None


def _where(texts: pa.ChunkedArray, mask: Any) -> pa.ChunkedArray:
    return texts if mask.all() else texts.filter(pa.array(mask))


def _bools(column: pa.ChunkedArray) -> Any:
    return np.array(column.to_numpy(), dtype=bool)


def _path(name: str) -> str:
    """SQL for the JSON pointer to a top-level field; unlike a path, it takes ``*`` for a name."""
    return exact.literal("/" + name.replace("~", "~0").replace("/", "~1"))
