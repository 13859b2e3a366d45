"""Column types as users write them, and what they are in Arrow and DuckDB."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from kframe.errors import DefinitionError, SchemaError
from kframe.markup import card, heading, pairs

_SIMPLE: dict[str, tuple[str, pa.DataType]] = {
    "str": ("str", pa.string()),
    "bool": ("bool", pa.bool_()),
    "date": ("date", pa.date32()),
    "bytes": ("bytes", pa.binary()),
    "json": ("json", pa.string()),
    "float32": ("float", pa.float32()),
    "float64": ("float", pa.float64()),
    **{f"{u}int{b}": ("int", getattr(pa, f"{u}int{b}")()) for u in ("", "u") for b in (8, 16, 32, 64)},
}

_DUCKDB: dict[pa.DataType, str] = {
    pa.string(): "VARCHAR",
    pa.large_string(): "VARCHAR",
    pa.string_view(): "VARCHAR",
    pa.bool_(): "BOOLEAN",
    pa.date32(): "DATE",
    pa.binary(): "BLOB",
    pa.large_binary(): "BLOB",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
    pa.int8(): "TINYINT",
    pa.int16(): "SMALLINT",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.uint8(): "UTINYINT",
    pa.uint16(): "USMALLINT",
    pa.uint32(): "UINTEGER",
    pa.uint64(): "UBIGINT",
    pa.time64("us"): "TIME",
    pa.duration("s"): "INTERVAL",
    pa.duration("ms"): "INTERVAL",
    pa.duration("us"): "INTERVAL",
}

_NAIVE = {"s": "TIMESTAMP_S", "ms": "TIMESTAMP_MS", "us": "TIMESTAMP", "ns": "TIMESTAMP_NS"}
_ZONED = {"s": "TIMESTAMPTZ", "ms": "TIMESTAMPTZ", "us": "TIMESTAMPTZ", "ns": "TIMESTAMPTZ_NS"}
_RESERVED = frozenset({"_partition", "_offset", "_timestamp", "_key", "_headers", "_tombstone"})


@dataclass(frozen=True)
class Type:
    """One column type: its kind, its Arrow type, its normalised text, and its members if it is nested."""

    kind: str
    arrow: pa.DataType
    text: str
    members: tuple[tuple[str, Type], ...] = ()

    def __str__(self) -> str:
        return self.text

    @property
    def duckdb(self) -> str:
        """The SQL type of a table's column."""
        return "JSON" if self.kind == "json" else duckdb_type(self.arrow)


@dataclass(frozen=True)
class Field:
    """One column: its name, its type, and whether a record without it is a dead letter."""

    name: str
    type: Type
    required: bool = False


@dataclass(frozen=True)
class Schema:
    """A topic's columns, in order."""

    fields: tuple[Field, ...]

    @classmethod
    def parse(cls, columns: Mapping[str, str]) -> Schema:
        """Read ``{"sku": "str", "qty": "int64 not null", "at": "timestamp[ms, UTC]"}``.

        Raises
        ------
        DefinitionError
            An unknown type, or a name that is empty, reserved, or differs from another only in case.
        """
        if not columns:
            raise DefinitionError("A schema needs at least one column.")
        _check_names(list(columns))
        return cls(tuple(_field(name, text) for name, text in columns.items()))

    def to_dict(self) -> dict[str, str]:
        """The columns as `parse` reads them."""
        return {f.name: f.type.text + (" not null" if f.required else "") for f in self.fields}

    def with_fields(self, new: Mapping[str, str]) -> Schema:
        """This schema with more columns behind its own."""
        return Schema.parse({**self.to_dict(), **new})

    @property
    def arrow(self) -> pa.Schema:
        """The columns' Arrow types; a required one is not nullable."""
        return pa.schema([pa.field(f.name, f.type.arrow, nullable=not f.required) for f in self.fields])

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def __repr__(self) -> str:
        return f"Schema({self.to_dict()})"

    def _repr_html_(self) -> str:
        return card(heading("Schema", f"{len(self.fields)} columns") + pairs(self.to_dict()))


def parse_type(text: str) -> Type:
    """A type from its text, such as ``"decimal(12,2)"`` or ``"list<struct<a: int64>>"``.

    Raises
    ------
    DefinitionError
        There is no such type.
    """
    text = text.strip()
    if text in _SIMPLE:
        kind, arrow = _SIMPLE[text]
        return Type(kind, arrow, text)
    if m := re.fullmatch(r"decimal\(\s*(\d+)\s*,\s*(\d+)\s*\)", text):
        return _decimal(int(m[1]), int(m[2]))
    if m := re.fullmatch(r"timestamp\[\s*(s|ms|us)\s*(,\s*UTC\s*)?\]", text):
        zone = "UTC" if m[2] else None
        return Type("timestamp", pa.timestamp(m[1], zone), f"timestamp[{m[1]}{', UTC' if zone else ''}]")
    if m := re.fullmatch(r"list<(.*)>", text, re.DOTALL):
        inner = parse_type(m[1])
        return Type("list", pa.list_(inner.arrow), f"list<{inner}>", (("item", inner),))
    if m := re.fullmatch(r"struct<(.*)>", text, re.DOTALL):
        return _struct(m[1])
    raise _unknown(text)


def duckdb_type(arrow: pa.DataType) -> str:
    """The DuckDB type that holds an Arrow type's values exactly.

    Raises
    ------
    SchemaError
        There is none.
    """
    if arrow in _DUCKDB:
        return _DUCKDB[arrow]
    if pa.types.is_decimal(arrow) and 0 <= arrow.scale <= arrow.precision <= 38 and arrow.bit_width <= 128:
        return f"DECIMAL({arrow.precision},{arrow.scale})"
    if pa.types.is_timestamp(arrow):
        return (_ZONED if arrow.tz else _NAIVE)[arrow.unit]
    if pa.types.is_list(arrow) or pa.types.is_large_list(arrow):
        return duckdb_type(arrow.value_type) + "[]"
    if pa.types.is_struct(arrow):
        members = ", ".join(f"{_quote(f.name)} {duckdb_type(f.type)}" for f in arrow)
        return f"STRUCT({members})"
    if pa.types.is_map(arrow):
        return f"MAP({duckdb_type(arrow.key_type)}, {duckdb_type(arrow.item_type)})"
    if pa.types.is_dictionary(arrow):
        return duckdb_type(arrow.value_type)
    raise SchemaError(f"A column of Arrow type {arrow} cannot be stored.", hint="Convert it to another type.")


def _field(name: str, text: str) -> Field:
    if not isinstance(text, str):
        raise DefinitionError(f"Column {name!r}: its type is a text such as 'int64', not {text!r}.")
    bare = re.sub(r"\s+not\s+null\s*$", "", text, flags=re.IGNORECASE)
    try:
        return Field(name, parse_type(bare), bare != text)
    except DefinitionError as error:
        raise DefinitionError(f"Column {name!r}: {error.what}", hint=error.hint) from None


def _decimal(precision: int, scale: int) -> Type:
    if not (1 <= precision <= 38 and scale <= precision):
        raise DefinitionError(
            f"decimal({precision},{scale}): the precision is 1 to 38, the scale at most the precision."
        )
    return Type("decimal", pa.decimal128(precision, scale), f"decimal({precision},{scale})")


def _struct(inside: str) -> Type:
    members = []
    for part in _split(inside):
        name, colon, text = part.partition(":")
        if not colon:
            raise _unknown(f"struct<{inside}>")
        members.append((name.strip(), parse_type(text)))
    _check_names([name for name, _ in members], reserved=frozenset())
    names = [name.lower() for name, _ in members]
    if "" in names or len(set(names)) < len(names):
        raise DefinitionError(
            f"struct<{inside}>: its members need names that are not empty and differ by more than case."
        )
    arrow = pa.struct([pa.field(n, t.arrow) for n, t in members])
    return Type("struct", arrow, f"struct<{', '.join(f'{n}: {t}' for n, t in members)}>", tuple(members))


def _split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "<([") - (c in ">)]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts


def _check_names(names: list[str], reserved: frozenset[str] = _RESERVED) -> None:
    folded: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str) or not name:
            raise DefinitionError(f"{name!r} cannot name a column.", hint="Use non-empty text.")
        if name.lower() in reserved:
            raise DefinitionError(
                f"The column name {name!r} is kframe's own.", hint="topic(include=[...]) adds that column."
            )
        if name.lower() in folded:
            raise DefinitionError(
                f"The columns {folded[name.lower()]!r} and {name!r} differ only in case, which tables ignore."
            )
        folded[name.lower()] = name


def _unknown(text: str) -> DefinitionError:
    valid = [*_SIMPLE, "decimal(p,s)", "timestamp[ms, UTC]", "list<T>", "struct<a: T>"]
    near = difflib.get_close_matches(text, valid, n=1)
    return DefinitionError(
        f"There is no type {text!r}.",
        hint=(f"Did you mean {near[0]!r}? " if near else "") + f"Types: {', '.join(valid)}.",
    )


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
