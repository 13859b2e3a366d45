"""Decoding a batch == decoding every record alone == the record-by-record meaning of every type."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kframe.batch import exact, json_columns, native_json
from kframe.batch.csv_columns import CsvColumns
from kframe.batch.decode import Decoder, private_connection
from kframe.batch.infer import infer_schema
from kframe.batch.json_columns import JsonColumns
from kframe.batch.native_json import NativeJson
from kframe.errors import ConfigError
from kframe.model import RECORDS, Decoded
from kframe.schema import Schema

SCHEMAS = [
    {"a": "int64", "b": "str", "c": "float64", "d": "bool"},
    {"a": "int8", "b": "uint8", "c": "int16", "d": "uint64"},
    {"a": "int32 not null", "b": "uint16", "c": "uint32", "d": "float32"},
    {"a": "decimal(12,2)", "b": "decimal(38,10)", "c": "decimal(18,12)", "d": "decimal(4,0) not null"},
    {"a": "date", "b": "timestamp[s]", "c": "timestamp[ms]", "d": "timestamp[us]"},
    {"a": "timestamp[ms, UTC]", "b": "timestamp[s, UTC] not null", "c": "timestamp[us, UTC]", "d": "str"},
    {"a": "json", "b": "int64", "c": "bytes", "d": "decimal(9,3)"},
    {"a": "list<int64>", "b": "list<str>", "c": "list<float64>", "d": "int64"},
    {
        "a": "struct<a: int64, b: str>",
        "b": "list<struct<c: float64>>",
        "c": "struct<d: list<bool>>",
        "d": "json",
    },
    {"a": "list<decimal(9,2)>", "b": "struct<t: timestamp[ms]>", "c": "list<list<int64>>", "d": "str"},
]
NUMERALS = [
    *("0", "-0", "-0.0", "1.0", "1.5", "1.10", "1e3", "1E-2", "127", "128", "-129", "255", "256", "65535"),
    *("4294967296", "9007199254740993", "9223372036854775807", "9223372036854775808", "-9223372036854775809"),
    *("18446744073709551615", "18446744073709551616", "1e999", "-1e999", "1e-400", "NaN", "-Infinity", "inf"),
    *("3.4028235e38", "3.4028236e38", "9007199254740993e-12", "9007.199254740993", "0.1000000000000000055"),
    *("12345678901234567890.12", "1704103200123", "9223372036854776", "10000000000", "1.005", "100000e-5"),
]
STRINGS = [
    *("", "1", "+1", ".5", "1_000", " 1.0", "nan", "1e2", "1.005", "AA==", "A", "é", "\x00", "\U0001f600"),
    *("2024-01-01", "2024-02-30", "0000-01-01", "9999-12-31", "2024-01-01T10:00:00", "2024-01-01 10:00:00.5"),
    *(
        "2024-01-01T10:00:00Z",
        "2024-01-01T10:00:00.123+02:00",
        "2024-01-01T10:00:00.1234",
        "2024-01-01T24:00:00",
    ),
    *(
        "2016-12-31T23:59:60Z",
        "9999-12-31T23:59:59-14:00",
        "0001-01-01T00:00:00+14:00",
        "2024-01-01T10:00:00+0200",
    ),
]
SCALARS = (
    st.sampled_from(NUMERALS)
    | st.sampled_from(STRINGS).map(json.dumps)
    | st.sampled_from(STRINGS).map(lambda s: json.dumps(s, ensure_ascii=False))
    | st.sampled_from(["null", "true", "false"])
    | st.integers(-(2**70), 2**70).map(str)
    | st.floats().map(json.dumps)
    | st.text(max_size=5).map(json.dumps)
)
KEYS = st.sampled_from(["a", "b", "c", "d", "t", "A", "x"]).map(json.dumps)


def _object(members: Sequence[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{k}: {v}" for k, v in members) + "}"


VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda xs: f"[{','.join(xs)}]")
        | st.lists(st.tuples(KEYS, inner), max_size=3).map(_object)
    ),
    max_leaves=4,
)
OBJECTS = st.lists(st.tuples(KEYS, VALUES), max_size=5).map(_object)


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A document with one character dropped, doubled or replaced."""
    text = draw(OBJECTS)
    at = draw(st.integers(0, len(text)))
    return (
        text[:at] + draw(st.sampled_from(["", ",", '"', "]", "}", "\\", "0", "\n", "\x00"])) + text[at + 1 :]
    )


DOCUMENTS = st.one_of(OBJECTS, OBJECTS, OBJECTS, mutated(), VALUES).map(
    lambda s: s.encode("utf-8", "surrogatepass")
)
RECORD = DOCUMENTS | st.binary(max_size=8) | st.none()
BATCH = st.lists(RECORD, min_size=1, max_size=12)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True, scope="module")
def few_records_in_bulk() -> Iterator[None]:
    """Small logs, decoded as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BULK_ROWS", 0)
        yield


def records(values: Sequence[bytes | None], start: int = 0) -> pa.Table:
    n = len(values)
    return pa.table(
        {
            "partition": pa.array([0] * n, pa.int32()),
            "offset": pa.array(range(start, start + n), pa.int64()),
            "timestamp": pa.array([0] * n, pa.timestamp("ms", "UTC")),
            "key": pa.nulls(n, pa.binary()),
            "value": pa.array(values, pa.binary()),
            "headers": pa.nulls(n, RECORDS.field("headers").type),
        },
        schema=RECORDS,
    )


@cache
def decoder(i: int) -> Decoder:
    return Decoder("t", Schema.parse(SCHEMAS[i]))


@cache
def columns(i: int, bulk: bool) -> JsonColumns:
    made = JsonColumns(Schema.parse(SCHEMAS[i]), private_connection())
    if not bulk:
        made._in_bulk = False  # every record goes to the record-by-record path
    return made


def comparable(table: pa.Table) -> list[str]:
    """Rows that compare by digit and sign; times as counts, since Python's end at the year 9999."""
    counted = pa.schema([pa.field(f.name, _counted(f.type)) for f in table.schema])
    return [repr(row) for row in table.cast(counted).to_pylist()]


def _counted(type_: pa.DataType) -> pa.DataType:
    """The type with 64-bit counts for times."""
    if pa.types.is_list(type_):
        return pa.list_(_counted(type_.value_type))
    if pa.types.is_struct(type_):
        return pa.struct([pa.field(f.name, _counted(f.type)) for f in type_])
    return pa.int64() if pa.types.is_timestamp(type_) else type_


def outcome(decoded: Sequence[Decoded]) -> tuple[list[str], list[Any], int]:
    rows = [r for d in decoded for r in comparable(d.frame)]
    dead = [(r["offset"], r["value"], r["error"]) for d in decoded for r in d.dead.to_pylist()]
    return rows, dead, sum(d.tombstones for d in decoded)


@pytest.mark.parametrize("i", range(len(SCHEMAS)))
@QUICK
@given(values=BATCH, cuts=st.sets(st.integers(1, 11)))
def test_any_cut_of_a_batch_gives_the_same(i: int, values: list[bytes | None], cuts: set[int]) -> None:
    """Kills: a decision for a whole batch (its types, its time spelling) that changes one of its records."""
    edges = [0, *sorted(c for c in cuts if c < len(values)), len(values)]
    parts = [decoder(i).decode(records(values[a:b], a)) for a, b in itertools.pairwise(edges)]
    whole = decoder(i).decode(records(values))
    assert outcome(parts) == outcome([whole])
    assert all(p.frame.schema == whole.frame.schema for p in parts)
    assert whole.frame.num_rows + whole.dead.num_rows + whole.tombstones == len(values)


@pytest.mark.parametrize("i", range(len(SCHEMAS)))
@QUICK
@given(texts=st.lists(DOCUMENTS, min_size=1, max_size=12))
def test_bulk_equals_record_by_record(i: int, texts: list[bytes]) -> None:
    """Kills: coercion, rounding, or another duplicate, infinity or zero in the bulk parser."""
    given_texts = pa.chunked_array([[t.decode("utf-8", "replace") for t in texts]], pa.string())
    rows, good, errors = columns(i, True).decode(given_texts)
    strict_rows, strict_good, strict_errors = columns(i, False).decode(given_texts)
    assert good.tolist() == strict_good.tolist()
    assert comparable(rows) == comparable(strict_rows)
    assert errors == strict_errors
    assert rows.schema.types == strict_rows.schema.types


@pytest.mark.parametrize("i", range(len(SCHEMAS)))
def test_every_odd_value_in_every_field(i: int) -> None:
    """Kills: one numeral or text at an edge that the bulk parser takes for another."""
    odd = [*NUMERALS, *map(json.dumps, STRINGS)]
    odd += [f"[{v}]" for v in odd] + [f'{{"{key}": {v}}}' for v in odd for key in "abct"]
    required = "".join(f', "{f.name}": "1", "{f.name}": 1' for f in columns(i, True).schema if f.required)
    texts = [f'{{"{name}": {v}{required}}}' for name in "abcd" for v in odd]
    given_texts = pa.chunked_array([texts], pa.string())
    rows, good, errors = columns(i, True).decode(given_texts)
    strict_rows, strict_good, strict_errors = columns(i, False).decode(given_texts)
    assert (good.tolist(), errors) == (strict_good.tolist(), strict_errors)
    assert comparable(rows) == comparable(strict_rows)


def test_the_bulk_path_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a bulk path that never runs, which would make the law above say nothing."""

    def never(*_: object) -> None:
        raise AssertionError("record by record")

    monkeypatch.setattr(json_columns.strict, "row", never)
    texts = pa.chunked_array([['{"a":1,"b":"x","c":1.5,"d":true}'] * 3])
    assert columns(0, True).decode(texts)[0].num_rows == 3


# ---- in C -------------------------------------------------------------------------------------------

NATIVE = [i for i, s in enumerate(SCHEMAS) if native_json.takes(Schema.parse(s))]
in_c = pytest.mark.skipif(
    native_json._library() is None,
    reason="json_rows.c was not compiled: no C compiler when kframe was installed",
)


@cache
def native(i: int) -> NativeJson:
    return NativeJson(Schema.parse(SCHEMAS[i]))


def taken_as_strict(i: int, texts: list[str]) -> int:
    """Check what is taken in C against the record-by-record path; returns how many were."""
    given_texts = pa.chunked_array([texts[:3], [], texts[3:]], pa.string())
    rows, taken = native(i).decode(given_texts)
    rows.validate(full=True)
    fitting = given_texts.filter(pa.array(taken))
    strict_rows, good, _ = columns(i, False).decode(fitting)
    assert good.all(), fitting.filter(pa.array(~good)).to_pylist()
    assert comparable(rows) == comparable(strict_rows)
    return rows.num_rows


@in_c
@pytest.mark.parametrize("i", NATIVE)
@settings(QUICK, max_examples=150)
@given(texts=st.lists(DOCUMENTS, min_size=1, max_size=12))
def test_what_is_taken_in_c_fits_record_by_record(i: int, texts: list[bytes]) -> None:
    """Kills: the last of two names, a lenient numeral, a value from the row before, a text cut."""
    taken_as_strict(i, [t.decode("utf-8", "replace") for t in texts])


EDGES = [
    *("true", "false", "true", "null", "[]", "{}", "[ 1 , null ]", '[{"c": 1}, null, {"c": 2.5, "x": [3]}]'),
    *(
        '{"d": [true, false, null, true]}',
        '{"b": "x", "a": 7}',
        '{"a": null, "a": 1}',
        "[[1], [], null, [2, 3]]",
    ),
    *(
        '{"x": [0.5, 100.0, 1e0, 1.50, 0.0001, 123456789012345.5]}',
        '{"x": 0.5, "y": [0.001, 10.0]}',
        '"\\u0041"',
    ),
    *(
        '["\\u0041"]',
        '{"x": "a b"}',
        '{ "x" : [ 1 , "a\\/" ] }',
        '{"t": 5, "t": 6}',
        '{"t": "2024-01-01T00:00:00"}',
    ),
    *("01", "1.", ".1", "-", "1e", "1e+", "2e-3", "123456789.123456789", "0.1e1", "0x1p3", "1,", '"12.50"'),
    *(r'"\ud83d\ude00\u00e9\u0041\/\"\\"', r'"\ud83d"', r'"\ude00\ud83d"', r'"\u00"', r'"\x41"', '"\t"'),
    *('"2000-02-29"', '"1900-02-29"', '"2024-13-01"', '"2024-12-00"', '"1000-03-01"', '"0999-12-31"'),
    *('"2024-01-01T10:00:00.5-23:59"', '"2024-01-01T10:00:00.5+2400"', '"2024-01-01T10:00:00.Z"'),
]


@in_c
@pytest.mark.parametrize("i", NATIVE)
def test_every_odd_value_in_c(i: int) -> None:
    """Kills: one numeral, time or escape at an edge that C takes for another."""
    odd = [*NUMERALS, *map(json.dumps, STRINGS), *(json.dumps(s, ensure_ascii=False) for s in STRINGS)]
    odd += EDGES
    odd += [v + " " for v in odd] + [f'1, "z": {v}' for v in odd] + [f'[{v}], "b": 2' for v in odd]
    fields = columns(i, False).schema
    required = "".join(f', "{f.name}": "1", "{f.name}": 1' for f in fields if f.required)
    for name in "abcd":
        rest = required.replace(f', "{name}": "1", "{name}": 1', "")
        taken_as_strict(i, [f'{{"{name}": {v}{r}}}' for v in odd for r in ("", rest)])


ORDINARY = [
    '{"a":1,"b":"x","c":1.5,"d":true}',
    '{"a":-7,"b":200,"c":30000,"d":5}',
    '{ "d" : 1.5 , "a" : 1, "b" : 60000, "c" : 4000000000, "more": [{"x": [1.5e3, null, false]}, "y\\n"] }',
    '{"a":1.25,"b":"1.5","c":0.000001,"d":12}',
    '{"a":"2024-02-29","b":"2024-02-29T23:59:59","c":"1969-12-31 00:00:00.5","d":1700000000000000}',
    '{"a":"2024-02-29T23:59:59.25+02:00","b":"2024-02-29T23:59:59Z","c":1,"d":"\\u00e9\\"\\ud83d\\ude00"}',
    "",  # of a type that C leaves to others
    '{"a":[1,2,null],"b":["x",null,""],"c":[0.5,2],"d":4}',
    '{"a":{"a":1,"b":"x","more":[]},"b":[{"c":1.5},null,{}],"c":{"d":[true,null]},"d":{"x":[1,"y z"]}}',
    '{"a":[1.25,"7"],"b":{"t":"2024-02-29T23:59:59.5"},"c":[[1],[],null],"d":"s"}',
]


@in_c
@pytest.mark.parametrize("i", NATIVE)
def test_ordinary_records_are_taken_in_c(i: int) -> None:
    """Kills: a C path that refuses everything, which would make the laws above say nothing."""
    assert taken_as_strict(i, [ORDINARY[i]] * 5) == 5


@in_c
@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", 'a":1,"b'])
def test_a_name_that_json_escapes(name: str) -> None:
    """Kills: a column's name looked for as it is, which would take what is no JSON."""
    texts = [json.dumps({name: 1}), f'{{"{name}": 2}}']
    decoded = Decoder("t", Schema.parse({name: "int64"})).decode(records([t.encode() for t in texts]))
    assert decoded.frame[name].to_pylist()[0] == 1
    assert 2 not in decoded.frame[name].to_pylist()


@in_c
@QUICK
@given(texts=st.lists(st.sampled_from([*ORDINARY, '{"a":1,"a":2}', "x", '{"a":1e400}']), max_size=40))
def test_rows_decided_elsewhere_come_back_in_their_places(texts: list[str]) -> None:
    """Kills: another order, or an error told of another record, where C takes some and leaves some."""
    given_records = records([t.encode() for t in texts])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_json, "takes", lambda _: False)
        without = Decoder("t", Schema.parse(SCHEMAS[0]))
    assert outcome([decoder(0).decode(given_records)]) == outcome([without.decode(given_records)])


@QUICK
@given(values=st.lists(DOCUMENTS, min_size=1, max_size=6))
def test_an_inferred_schema_fits_its_records(values: list[bytes]) -> None:
    """Kills: a type that some of the records it was taken from do not have."""
    probe = JsonColumns(Schema.parse({"zz": "str"}), private_connection())
    texts = [v.decode("utf-8", "replace") for v in values]
    _, valid, _ = probe.decode(pa.chunked_array([texts], pa.string()))
    kept = [t.encode() for t, ok in zip(texts, valid, strict=True) if ok]
    try:
        schema = infer_schema(kept)
    except ConfigError:
        return
    assert Decoder("t", schema).decode(records(kept)).dead["error"].to_pylist() == []


CELLS = {
    "int": st.integers(-200, 200).map(str)
    | st.sampled_from(["-0", "007", "+1", " 1", "1e2", "9" * 18, "9" * 19]),
    "float": st.floats(-1e6, 1e6).map(repr)
    | st.sampled_from(["-0", "-0.0", "1.10", "0.1", "1e400", "9" * 17, ".5"]),
    "decimal": st.decimals(-99, 99, places=2).map(str)
    | st.sampled_from(["1.230", "1.234", "01", "-0", "1e1"]),
    "bool": st.sampled_from(["true", "FALSE", "yes", "1"]),
    "str": st.text("ab; \u2028é", max_size=4) | st.sampled_from(['"q"', '"a""b"', '"a,b"', 'x"', "a\rb"]),
    "date": st.sampled_from(["2024-02-30", "2024-02-29", "0001-01-01", "2024-1-1"]),
    "timestamp": st.sampled_from(
        ["2024-01-01T10:00:00Z", "2024-01-01 10:00:00.123", "2024-02-30 10:00:00", "2024-01-01T24:00:00", "5"]
    ),
}
CSV_SCHEMAS = [
    {"a": "int64", "b": "str", "c": "float64"},
    {"a": "int8", "b": "decimal(9,2)", "c": "bool"},
    {"a": "timestamp[ms, UTC]", "b": "date", "c": "str not null"},
    {"a": "uint16", "b": "timestamp[us]", "c": "int64 not null"},
    {"a": "str"},
]


def lines(schema: Schema) -> st.SearchStrategy[list[str]]:
    """Lines most of whose cells are of their column's kind; some are empty, too few or of another kind."""
    odd = st.just("") | st.one_of(*CELLS.values())
    fitting = st.tuples(*(CELLS[f.type.kind] for f in schema)).map(list)
    line = st.one_of(fitting, fitting, fitting, st.lists(odd, min_size=1, max_size=len(schema.fields) + 1))
    return st.lists(
        st.tuples(line.map(",".join), st.sampled_from(["", "\n", "\r\n"])).map("".join), max_size=20
    )


@pytest.mark.parametrize("i", range(len(CSV_SCHEMAS)))
@settings(QUICK, max_examples=60)
@given(data=st.data())
def test_csv_in_bulk_is_csv_cell_by_cell(i: int, data: st.DataObject) -> None:
    """Kills: a cell that is rounded, coerced or NULL in bulk, rows in another order, a lost error."""
    schema = Schema.parse(CSV_SCHEMAS[i])
    made = CsvColumns(schema, private_connection(), ",")
    texts = pa.chunked_array([pa.array(data.draw(lines(schema)), pa.string())])
    assert made._query is not None
    rows, good, errors = made.decode(texts)
    expected, fits, told = made._line_by_line(texts)
    assert comparable(rows) == comparable(expected.cast(rows.schema))
    assert good.tolist() == fits.tolist()
    assert errors == told
