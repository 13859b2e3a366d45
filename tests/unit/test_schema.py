"""Column types: what is read, what is refused, and what holds them."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa
import pytest

from kframe.errors import DefinitionError, SchemaError
from kframe.schema import Schema, duckdb_type, parse_type

ACCEPTED = {
    "str": (pa.string(), "VARCHAR"),
    "bool": (pa.bool_(), "BOOLEAN"),
    "date": (pa.date32(), "DATE"),
    "bytes": (pa.binary(), "BLOB"),
    "json": (pa.string(), "JSON"),
    "float32": (pa.float32(), "FLOAT"),
    "float64": (pa.float64(), "DOUBLE"),
    "int8": (pa.int8(), "TINYINT"),
    "int16": (pa.int16(), "SMALLINT"),
    "int32": (pa.int32(), "INTEGER"),
    "int64": (pa.int64(), "BIGINT"),
    "uint8": (pa.uint8(), "UTINYINT"),
    "uint16": (pa.uint16(), "USMALLINT"),
    "uint32": (pa.uint32(), "UINTEGER"),
    "uint64": (pa.uint64(), "UBIGINT"),
    "decimal(12,2)": (pa.decimal128(12, 2), "DECIMAL(12,2)"),
    "decimal(38,38)": (pa.decimal128(38, 38), "DECIMAL(38,38)"),
    "timestamp[s]": (pa.timestamp("s"), "TIMESTAMP_S"),
    "timestamp[ms]": (pa.timestamp("ms"), "TIMESTAMP_MS"),
    "timestamp[us]": (pa.timestamp("us"), "TIMESTAMP"),
    "timestamp[ms, UTC]": (pa.timestamp("ms", "UTC"), "TIMESTAMPTZ"),
    "list<int64>": (pa.list_(pa.int64()), "BIGINT[]"),
    "struct<a: int64, b: list<str>>": (
        pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]),
        'STRUCT("a" BIGINT, "b" VARCHAR[])',
    ),
}


@pytest.mark.parametrize("text", ACCEPTED)
def test_each_type_has_an_arrow_and_a_duckdb_type(text: str) -> None:
    """Kills: a type that maps to another width or sign."""
    type_ = parse_type(text)
    assert (type_.arrow, type_.duckdb) == ACCEPTED[text]
    assert parse_type(str(type_)) == type_
    duckdb.connect().execute(f"CREATE TABLE t (a {duckdb_type(type_.arrow)})")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" int64 ", "int64"),
        ("decimal( 12 , 2 )", "decimal(12,2)"),
        ("timestamp[ ms,UTC ]", "timestamp[ms, UTC]"),
        (
            "struct<a:int64,b:struct<c:decimal(3,1),d:str>>",
            "struct<a: int64, b: struct<c: decimal(3,1), d: str>>",
        ),
        ("list< list<str> >", "list<list<str>>"),
    ],
)
def test_spelling_is_normalised(text: str, normal: str) -> None:
    """Kills: splitting a struct at a comma inside of brackets."""
    assert parse_type(text).text == normal


@pytest.mark.parametrize(
    "text",
    [
        *("", "int", "INT64", "int65", "string", "uint", "float", "datetime", "decimal", "decimal(0,0)"),
        *("decimal(39,2)", "decimal(5,6)", "decimal(5,-1)", "decimal(5)", "timestamp", "timestamp[ns]"),
        *("timestamp[ms, CET]", "list", "list<>", "list<int>", "struct<>", "struct<a>", "struct<a: int>"),
        *(
            "struct<: int64>",
            "struct<a: int64, a: str>",
            "struct<a: int64, A: str>",
            "list<int64",
            "map<str, str>",
        ),
    ],
)
def test_other_types_are_refused(text: str) -> None:
    """Kills: taking members that a table cannot tell apart; letting DuckDB fail later."""
    with pytest.raises(DefinitionError):
        parse_type(text)


def test_unknown_type_names_the_column_and_the_nearest_type() -> None:
    """Kills: an error without a place or a way on."""
    with pytest.raises(DefinitionError, match=r"'qty'.*'int46'") as caught:
        Schema.parse({"qty": "int46"})
    assert "Did you mean 'int64'?" in str(caught.value.hint)


@pytest.mark.parametrize(
    "columns",
    [
        *(
            {},
            {"": "str"},
            {1: "str"},
            {"a": "str", "A": "str"},
            {"Ä": "str", "ä": "str"},
            {"a": 1},
            {"a": None},
        ),
        *(
            {name: "str"}
            for name in ("_partition", "_OFFSET", "_timestamp", "_key", "_headers", "_tombstone")
        ),
    ],
)
def test_unusable_columns_are_refused(columns: Any) -> None:
    """Kills: names that shadow kframe's own columns, or differ only in case."""
    with pytest.raises(DefinitionError):
        Schema.parse(columns)


@pytest.mark.parametrize(
    "name", ['a"b', "a.b", "a'b", "a\\b", "größe", "日本", " ", "select", "$", "a b", "_x"]
)
def test_any_other_name_is_taken(name: str) -> None:
    """Kills: restricting names to identifiers."""
    assert [f.name for f in Schema.parse({name: "str"})] == [name]


def test_not_null_makes_a_field_required() -> None:
    """Kills: losing NOT NULL on the way to Arrow or back to text."""
    schema = Schema.parse({"a": "int64 not null", "b": "str", "c": "decimal(3,1)  NOT  NULL"})
    assert [f.required for f in schema] == [True, False, True]
    assert [f.nullable for f in schema.arrow] == [False, True, False]
    assert schema.to_dict() == {"a": "int64 not null", "b": "str", "c": "decimal(3,1) not null"}
    assert Schema.parse(schema.to_dict()) == schema


def test_with_fields_appends_and_keeps_what_is_there() -> None:
    """Kills: putting a new column first, or dropping NOT NULL."""
    schema = Schema.parse({"a": "int64 not null"}).with_fields({"b": "json"})
    assert schema.to_dict() == {"a": "int64 not null", "b": "json"}
    with pytest.raises(DefinitionError):
        schema.with_fields({"B": "str"})


@pytest.mark.parametrize(
    ("arrow", "expected"),
    [
        (pa.large_string(), "VARCHAR"),
        (pa.dictionary(pa.int8(), pa.string()), "VARCHAR"),
        (pa.timestamp("ns"), "TIMESTAMP_NS"),
        (pa.timestamp("ns", "UTC"), "TIMESTAMPTZ_NS"),
        (pa.timestamp("s", "UTC"), "TIMESTAMPTZ"),
        (pa.duration("ms"), "INTERVAL"),
        (pa.large_list(pa.int8()), "TINYINT[]"),
        (pa.struct([('a"b', pa.int8())]), 'STRUCT("a""b" TINYINT)'),
    ],
)
def test_types_of_results_have_a_column_type(arrow: pa.DataType, expected: str) -> None:
    """Kills: a name in a struct that is not quoted; nanoseconds stored as microseconds."""
    assert duckdb_type(arrow) == expected
    duckdb.connect().execute(f"CREATE TABLE t (a {expected})")


@pytest.mark.parametrize(
    "arrow",
    [
        *(pa.float16(), pa.decimal256(40, 2), pa.decimal128(12, -2), pa.decimal128(2, 3), pa.duration("ns")),
        *(pa.month_day_nano_interval(), pa.list_(pa.float16()), pa.struct([("a", pa.duration("ns"))])),
    ],
)
def test_types_that_would_lose_something_are_refused(arrow: pa.DataType) -> None:
    """Kills: a column type that rounds, or that DuckDB does not have."""
    with pytest.raises(SchemaError):
        duckdb_type(arrow)
