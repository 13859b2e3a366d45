"""Records to columns: what fits a type, what does not, and what becomes of each record."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from kframe.batch import exact, strict
from kframe.batch.decode import Decoder
from kframe.errors import DefinitionError
from kframe.model import DEAD_LETTERS, PROVENANCE, RECORDS, Decoded
from kframe.schema import Schema

UTC = dt.UTC


@pytest.fixture(autouse=True, scope="module", params=[0, exact.BULK_ROWS], ids=["bulk", "few"])
def few_records_in_bulk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here goes both ways: in bulk, and record by record."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "BULK_ROWS", request.param)
        yield


def records(values: Sequence[bytes | None], partitions: int = 2) -> pa.Table:
    """Records over some partitions; offsets, times and keys differ in each."""
    return pa.Table.from_pylist(
        [
            {
                "partition": i % partitions,
                "offset": 1000 + 7 * i,
                "timestamp": dt.datetime.fromtimestamp(i, UTC),
                "key": b"k%d" % i if i % 3 else None,
                "value": value,
                "headers": [{"key": "n", "value": b"%d" % i}],
            }
            for i, value in enumerate(values)
        ],
        schema=RECORDS,
    )


def decode(columns: dict[str, str], values: Sequence[bytes | None], **options: Any) -> Decoded:
    return Decoder("orders", Schema.parse(columns), **options).decode(records(values))


def one(type_: str, value: str) -> Any:
    """A field's decoded value; a text about what does not fit is wrapped in Misfit."""
    done = decode({"a": type_}, [b'{"a": %s}' % value.encode()])
    if done.dead.num_rows:
        return strict.Misfit(done.dead["error"][0].as_py())
    column = done.frame["a"]
    return (column.cast(pa.int64()) if pa.types.is_timestamp(column.type) else column)[0].as_py()


INT_RANGES = {
    **{f"int{b}": (-(2 ** (b - 1)), 2 ** (b - 1) - 1) for b in (8, 16, 32, 64)},
    **{f"uint{b}": (0, 2**b - 1) for b in (8, 16, 32, 64)},
}


@pytest.mark.parametrize("type_", INT_RANGES)
def test_integers_at_and_beyond_their_bounds(type_: str) -> None:
    """Kills: wrapping around, and NULL for what is out of range."""
    low, high = INT_RANGES[type_]
    assert [one(type_, str(n)) for n in (low, high, 0)] == [low, high, 0]
    for n in (low - 1, high + 1, 2**64, -(2**64), 2**127, 10**50):
        assert "out of range" in str(one(type_, str(n))), n


NOT = "not"
FLOATS: list[tuple[str, str, Any]] = [
    ("int64", "1.0", NOT),
    ("int64", "1e3", NOT),
    ("int64", '"1"', NOT),
    ("int64", "true", NOT),
    ("int64", "NaN", NOT),
    ("int64", "[1]", NOT),
    ("int64", "null", None),
    ("float64", "1", 1.0),
    ("float64", "1e3", 1000.0),
    ("float64", "9007199254740993", 9007199254740992.0),
    ("float64", "18446744073709551616", 2.0**64),
    ("float64", "0.1000000000000000055", 0.1),
    ("float64", "1e-400", 0.0),
    ("float64", "1e999", NOT),
    ("float64", "NaN", NOT),
    ("float64", "-Infinity", NOT),
    ("float64", '"1"', NOT),
    ("float64", "true", NOT),
    ("float32", "0.5", 0.5),
    ("float32", "3.4028235e38", 3.4028234663852886e38),
    ("float32", "3.5e38", NOT),
    ("float32", "1e999", NOT),
    ("bool", "true", True),
    ("bool", "false", False),
    ("bool", "1", NOT),
    ("bool", '"true"', NOT),
    ("str", '""', ""),
    ("str", '"\\u0000a\\ud83d\\ude00"', "\x00a\U0001f600"),
    ("str", "1", NOT),
    ("str", "{}", NOT),
    ("str", "true", NOT),
    ("bytes", '"AP8="', b"\x00\xff"),
    ("bytes", '""', b""),
    ("bytes", '"A"', NOT),
    ("bytes", '"AP8=\\n"', NOT),
    ("bytes", "1", NOT),
]
DECIMALS: list[tuple[str, str, Any]] = [
    ("decimal(12,2)", "1", Decimal("1.00")),
    ("decimal(12,2)", "-1.10", Decimal("-1.10")),
    ("decimal(12,2)", "1.100000", Decimal("1.10")),
    ("decimal(12,2)", "1e2", Decimal("100.00")),
    ("decimal(12,2)", "125e-2", Decimal("1.25")),
    ("decimal(12,2)", "9999999999.99", Decimal("9999999999.99")),
    ("decimal(12,2)", "10000000000", NOT),
    ("decimal(12,2)", "1.005", NOT),
    ("decimal(12,2)", "1e-400", NOT),
    ("decimal(12,2)", "1e999", NOT),
    ("decimal(12,2)", "NaN", NOT),
    ("decimal(12,2)", "true", NOT),
    ("decimal(12,2)", "0.1000000000000000055", NOT),
    ("decimal(18,12)", "9007.199254740993", Decimal("9007.199254740993")),
    ("decimal(18,12)", "9007199254740993e-12", Decimal("9007.199254740993")),
    ("decimal(20,1)", "-9223372036854775809", Decimal("-9223372036854775809.0")),
    ("decimal(22,1)", "100000000000000000001", Decimal("100000000000000000001.0")),
    ("decimal(38,0)", "9" * 38, Decimal("9" * 38)),
    ("decimal(38,0)", "9" * 39, NOT),
    ("decimal(38,38)", "0." + "9" * 38, Decimal("0." + "9" * 38)),
    ("decimal(12,2)", '"+1"', Decimal("1.00")),
    ("decimal(12,2)", '".5"', Decimal("0.50")),
    ("decimal(12,2)", '"1.5"', Decimal("1.50")),
    ("decimal(12,2)", '"1e1"', Decimal("10.00")),
    ("decimal(12,2)", '"1_000"', NOT),
    ("decimal(12,2)", '" 1.0"', NOT),
    ("decimal(12,2)", '"1.0 "', NOT),
    ("decimal(12,2)", '"nan"', NOT),
    ("decimal(12,2)", '"Infinity"', NOT),
    ("decimal(12,2)", '"\uff11"', NOT),
    ("decimal(12,2)", '""', NOT),
]


def ms(text: str) -> int:
    return (
        dt.datetime.fromisoformat(text).astimezone(UTC) - dt.datetime(1970, 1, 1, tzinfo=UTC)
    ) // dt.timedelta(milliseconds=1)


TEN = ms("2024-01-01T10:00:00Z")
TIMES: list[tuple[str, str, Any]] = [
    ("timestamp[ms, UTC]", '"2024-01-01T10:00:00Z"', TEN),
    ("timestamp[ms, UTC]", '"2024-01-01T10:00:00"', TEN),
    ("timestamp[ms, UTC]", '"2024-01-01 10:00:00.000"', TEN),
    ("timestamp[ms, UTC]", '"2024-01-01T12:00:00+02:00"', TEN),
    ("timestamp[ms, UTC]", '"2023-12-31T20:00:00-14:00"', TEN),
    ("timestamp[ms, UTC]", '"2024-01-01T10:00:00.1230000Z"', TEN + 123),
    ("timestamp[ms, UTC]", '"2024-01-01T10:00:00.1234Z"', NOT),
    ("timestamp[ms, UTC]", '"1969-12-31T23:59:59.999Z"', -1),
    ("timestamp[ms, UTC]", '"9999-12-31T23:59:59-14:00"', 253402300799000 + 14 * 3600000),
    ("timestamp[ms, UTC]", '"0000-01-01T00:00:00Z"', NOT),
    ("timestamp[ms, UTC]", '"2024-01-01T24:00:00Z"', NOT),
    ("timestamp[ms, UTC]", '"2016-12-31T23:59:60Z"', NOT),
    ("timestamp[ms, UTC]", '"2024-02-30T00:00:00Z"', NOT),
    ("timestamp[ms, UTC]", '"infinity"', NOT),
    ("timestamp[ms, UTC]", '"2024-01-01T10:00:00Z "', NOT),
    ("timestamp[ms, UTC]", '""', NOT),
    ("timestamp[ms, UTC]", "1704103200123", 1704103200123),
    ("timestamp[ms, UTC]", "-1", -1),
    ("timestamp[ms, UTC]", "1704103200123.5", NOT),
    ("timestamp[ms, UTC]", "1e12", NOT),
    ("timestamp[ms, UTC]", "9223372036854776", NOT),
    ("timestamp[ms, UTC]", "true", NOT),
    ("timestamp[s]", '"2024-01-01T10:00:00"', TEN // 1000),
    ("timestamp[s]", '"2024-01-01T10:00:00.0"', TEN // 1000),
    ("timestamp[s]", '"2024-01-01T10:00:00.5"', NOT),
    ("timestamp[us]", '"2024-01-01T10:00:00.123456"', TEN * 1000 + 123456),
    ("timestamp[us]", '"2024-01-01T10:00:00.1234567"', NOT),
    ("timestamp[us]", '"2024-01-01T10:00:00Z"', NOT),
    ("timestamp[us]", '"2024-01-01T10:00:00+00:00"', NOT),
    ("date", '"2024-02-29"', dt.date(2024, 2, 29)),
    ("date", '"9999-12-31"', dt.date.max),
    ("date", '"0001-01-01"', dt.date.min),
    ("date", '"2023-02-29"', NOT),
    ("date", '"0000-01-01"', NOT),
    ("date", '"2024-1-1"', NOT),
    ("date", '"2024-01-01T00:00:00"', NOT),
    ("date", "19000", NOT),
]
NESTED: list[tuple[str, str, Any]] = [
    ("list<int64>", "[1, null, 3]", [1, None, 3]),
    ("list<int64>", "[]", []),
    ("list<int64>", '[1, "2"]', NOT),
    ("list<int64>", "[1.5]", NOT),
    ("list<int64>", "1", NOT),
    ("list<int64>", "{}", NOT),
    ("list<float64>", "[1, 2.5]", [1.0, 2.5]),
    ("list<float64>", "[NaN]", NOT),
    ("list<list<str>>", '[["a"], [], null]', [["a"], [], None]),
    ("list<decimal(9,2)>", '[1.25, "2"]', [Decimal("1.25"), Decimal("2.00")]),
    ("struct<a: int64, b: str>", '{"b": "x", "c": 1}', {"a": None, "b": "x"}),
    ("struct<a: int64, b: str>", "{}", {"a": None, "b": None}),
    ("struct<a: int64, b: str>", '{"a": 1, "a": 2}', {"a": 1, "b": None}),
    ("struct<a: int64, b: str>", '{"a": "1"}', NOT),
    ("struct<a: int64, b: str>", "[]", NOT),
    ("struct<a: list<bool>>", '{"a": [true, 1]}', NOT),
    ("list<struct<a: int64>>", '[{"a": 1}, null, {}]', [{"a": 1}, None, {"a": None}]),
    ("list<int64>", "null", None),
    ("struct<a: int64>", "null", None),
]


@pytest.mark.parametrize(("type_", "text", "expected"), FLOATS + DECIMALS + TIMES + NESTED)
def test_value(type_: str, text: str, expected: Any) -> None:
    """Kills: coercing 1.5 to 2, true to 1, "5" to 5; rounding; NULL for a value of another type."""
    got = one(type_, text)
    if expected == NOT:
        assert isinstance(got, strict.Misfit)
        assert str(got).startswith("a")
    else:
        assert got == expected
        assert type(got) is type(expected)


@pytest.mark.parametrize(
    "text",
    ['{"b": [1, null, "x"], "a": 2}', "[1, 2]", '"é\\n"', "true", "12345678901234567", "-1.5", "[]", "{}"],
)
def test_json_columns_keep_the_value(text: str) -> None:
    """Kills: storing Python's repr, or another value."""
    assert json.loads(one("json", text)) == json.loads(text)
    assert one("json", "null") is None


def test_mixed_time_spellings_in_one_batch() -> None:
    """Kills: deciding integers or texts for a whole batch, and dropping the minority."""
    texts = ["1704103200123", '"2024-01-01T10:00:00Z"', "1.5", '"2024-01-01T10:00:00.0001Z"', "null", '"x"']
    for order in (texts, texts[::-1], texts[:1] * 3 + texts, texts[1:2] * 3 + texts):
        done = decode({"a": "timestamp[ms, UTC]"}, [b'{"a": %s}' % t.encode() for t in order])
        known = {texts[0]: 1704103200123, texts[1]: TEN, texts[4]: None}
        assert done.frame["a"].cast(pa.int64()).to_pylist() == [known[t] for t in order if t in known]
        assert done.dead.num_rows == 3


DOCUMENTS: dict[bytes, Any] = {
    b'{"a": 1}': 1,
    b' {"a": 1}\n': 1,
    b'{"a": 1,}': 1,
    b'{"a": 1, "x": [1,],}': 1,
    b'{"a": 1, "a": 2}': 1,
    b'{"a": null, "a": 2}': None,
    b'{"A": 2, "a": 1}': 1,
    b'{"A": 2}': None,
    b"{}": None,
    b'{"\\u0061": 1}': 1,
    b'{"a": 1, "x": NaN}': 1,
    b'{"a": 1, "x": ' + b"9" * 5000 + b"}": 1,
    b"": NOT,
    b" ": NOT,
    b"null": NOT,
    b"1": NOT,
    b'"a"': NOT,
    b"[1]": NOT,
    b"NaN": NOT,
    b'{"a": 1}{"a": 2}': NOT,
    b'{"a": 1} x': NOT,
    b'{"a": 1': NOT,
    b"{'a': 1}": NOT,
    b'{"a": 01}': NOT,
    b'{"a": +1}': NOT,
    b'\xef\xbb\xbf{"a": 1}': NOT,
    b'{"a": 1}\x00': NOT,
    b'{"a": 1, "x": "\\ud800"}': NOT,
    b'{"a": 1, "x": "\xed\xa0\x80"}': NOT,
    b'{"a": 1, "x": "\xff"}': NOT,
    b'{"a": 1, "x": ' + b"[" * 5000 + b"]" * 5000 + b"}": NOT,
}


def test_documents_alone_and_together() -> None:
    """Kills: one bad record failing, moving or hiding its neighbours; the last of repeated keys winning."""
    together = decode({"a": "int64"}, list(DOCUMENTS))
    good = [v for v in DOCUMENTS.values() if v != NOT]
    assert together.frame["a"].to_pylist() == good
    assert together.frame["_offset"].to_pylist() == [
        1000 + 7 * i for i, v in enumerate(DOCUMENTS.values()) if v != NOT
    ]
    assert together.dead["value"].to_pylist() != []
    for text, expected in DOCUMENTS.items():
        alone = decode({"a": "int64"}, [text])
        assert (alone.frame["a"].to_pylist() or [NOT]) == [expected], text
        assert alone.dead.num_rows == (expected == NOT)


@pytest.mark.parametrize(
    "name",
    [
        'q"uote',
        "do.t",
        "a'b",
        "back\\slash",
        "größe",
        "日本",
        "*",
        "$",
        "a/b",
        "a~b",
        "~1",
        "[0]",
        "a b",
        "%s",
    ],
)
@pytest.mark.parametrize("type_", ["int64", "decimal(9,2)", "timestamp[ms]", "json", "list<int64>", "bytes"])
def test_names_that_sql_and_paths_treat_specially(name: str, type_: str) -> None:
    """Kills: an unescaped name in a path, a pointer or a struct."""
    value = {
        "int64": 1,
        "decimal(9,2)": 1,
        "timestamp[ms]": 1,
        "json": 1,
        "list<int64>": [1],
        "bytes": "AA==",
    }[type_]
    texts = [{name: value, "b": 2}, {"b": 2}, {name: {}, "b": 2} if type_ != "json" else {"b": 2}]
    done = decode({name: type_, "b": "int64"}, [json.dumps(t).encode() for t in texts])
    assert [v is None for v in done.frame[name].to_pylist()][:2] == [False, True]
    assert done.dead.num_rows == (type_ != "json")
    assert set(done.frame["b"].to_pylist()) == {2}


def test_required_fields() -> None:
    """Kills: NULL in a required column; a schema whose nullability depends on the path taken."""
    schema = {"a": "int64 not null", "s": "str"}
    mixed = decode(schema, [b'{"a":1}', b'{"a":null}', b'{"s":"x"}', b"{}"])
    assert mixed.dead["error"].to_pylist() == [
        "a: required, but null",
        "a: required, but missing",
        "a: required, but missing",
    ]
    bulk, slow = decode(schema, [b'{"a":1}']), decode(schema | {"r": "bytes"}, [b'{"a":1}'])
    nullable = [d.frame.schema.field("a").nullable for d in (mixed, bulk, slow, decode(schema, []))]
    assert nullable == [False] * 4


def test_provenance_follows_each_row() -> None:
    """Kills: strict rows put at the end; offsets of a neighbour."""
    values = [b'{"a": %d}' % i for i in range(100)]
    for i in range(0, 100, 3):
        values[i] = b'{"a": "x"}'
    for i in range(1, 100, 3):
        values[i] = b'{"a": %d.0e0}' % i  # only the record-by-record path can tell
    done = decode(
        {"a": "decimal(20,0)"},
        [v if i % 3 != 1 else b'{"a": %d.00000000000000000}' % i for i, v in enumerate(values)],
    )
    kept = [i for i in range(100) if i % 3]
    assert [int(x) for x in done.frame["a"].to_pylist()] == kept
    assert done.frame["_offset"].to_pylist() == [1000 + 7 * i for i in kept]
    assert done.frame["_partition"].to_pylist() == [i % 2 for i in kept]
    assert done.frame["_timestamp"].to_pylist() == [dt.datetime.fromtimestamp(i, UTC) for i in kept]
    assert done.dead["offset"].to_pylist() == [1000 + 7 * i for i in range(100) if i % 3 == 0]
    assert tuple(done.frame.column_names) == ("a", *PROVENANCE)


def test_dead_letters_carry_the_record() -> None:
    """Kills: a dead letter without its value or its place."""
    done = decode({"a": "int64"}, [b'{"a":1}', b'{"a":"\xff"}', b"{"])
    assert done.dead.schema == DEAD_LETTERS
    rows = done.dead.to_pylist()
    assert [r.pop("error")[:15] for r in rows] == ["not valid UTF-8", "not valid JSON:"]
    assert rows == [
        {
            **{"topic": "orders", "partition": i % 2, "offset": 1000 + 7 * i, "key": b"k%d" % i},
            **{"timestamp": dt.datetime.fromtimestamp(i, UTC), "value": value},
        }
        for i, value in ((1, b'{"a":"\xff"}'), (2, b"{"))
    ]


def test_tombstones_are_not_empty_values() -> None:
    """Kills: taking b'' for a deletion, or None for a dead letter."""
    done = decode({"a": "int64"}, [None, b"", b'{"a":1}', None])
    assert (done.frame.num_rows, done.dead.num_rows, done.tombstones) == (1, 1, 2)
    assert done.dead["value"].to_pylist() == [b""]
    assert decode({"a": "int64"}, [None]).frame.schema == decode({"a": "int64"}, []).frame.schema


def test_included_tombstones_stand_in_their_places() -> None:
    """Kills: tombstones moved behind the rows; a schema that depends on whether there are any."""
    options = {"include": ("tombstone", "key", "headers", "offset")}
    schema = {"a": "int64 not null"}
    done = decode(schema, [None, b'{"a":1}', b"x", None, b'{"a":2}'], **options)
    assert done.frame["_tombstone"].to_pylist() == [True, False, True, False]
    assert done.frame["a"].to_pylist() == [None, 1, None, 2]
    assert done.frame["_key"].to_pylist() == [None, b"k1", None, b"k4"]
    assert [h[0]["value"] for h in done.frame["_headers"].to_pylist()] == [b"0", b"1", b"3", b"4"]
    assert done.frame["_offset"].to_pylist() == [1000, 1007, 1021, 1028]
    without = [decode(schema, values, **options).frame.schema for values in ([b'{"a":1}'], [b"x"], [])]
    assert all(s == done.frame.schema for s in without)


def test_visible_columns() -> None:
    """Kills: showing provenance that nobody asked for."""
    decoder = Decoder("t", Schema.parse({"a": "str"}), include=("offset", "key"))
    assert decoder.visible == ["a", "_key", "_offset"]
    assert decoder.empty().num_rows == 0


def test_over_long_values_are_dead_unread() -> None:
    """Kills: decoding before the check; losing the place of what was too long."""
    values = [b'{"a":1}', b'{"a":1}' + b" " * 100, None, b'{"a":2}']
    done = decode({"a": "int64"}, values, record_bytes_max=20)
    assert done.frame["a"].to_pylist() == [1, 2]
    assert (done.dead["offset"].to_pylist(), done.dead["value"].to_pylist()) == ([1007], [None])
    assert "107 bytes" in done.dead["error"][0].as_py()
    assert decode({"a": "int64"}, [b'{"a":1}'], record_bytes_max=7).frame.num_rows == 1


def test_new_fields_are_reported() -> None:
    """Kills: a type for the first record only; names that clash; reserved names."""
    values = [
        b'{"a":1,"i":1,"f":1,"s":"x","b":true,"j":1,"n":null,"l":[1],"A":1,"_x":1,"":1,"q.\\"":1}',
        b'{"a":1,"i":-2,"f":2.5,"s":"y","b":false,"j":"z","n":null,"l":[2]}',
        b'{"a":"bad","dead":1}',
        b"{",
    ]
    done = decode({"a": "int64"}, values, on_new_field="add")
    assert done.new_fields == {
        **{"i": "int64", "f": "float64", "s": "str", "b": "bool", "j": "json", "l": "json", 'q."': "int64"}
    }
    assert decode({"a": "int64"}, values).new_fields == {}
    wider = Decoder("t", Schema.parse({"a": "int64"}), on_new_field="add").with_fields(done.new_fields)
    assert wider.decode(records(values[:2])).frame["j"].to_pylist() == ["1", '"z"']


CSV = {"a": "int64", "f": "float64", "b": "bool", "s": "str", "at": "timestamp[ms]", "j": "json"}


def test_csv() -> None:
    """Kills: splitting at a quoted delimiter; an empty cell that is not NULL; a short line padded."""
    values = [
        b'1,2.5,true,"a,""b""",2024-01-01 10:00:00,[1]',
        b"-1,1e3,FALSE, x ,1704103200000,\r\n",
        *(
            b",,,,,",
            b"1,2",
            b"",
            b"1.5,,,,,",
            b",nan,,,,",
            b",,yes,,,",
            b'"1,,,,,',
            b",,,,x,",
            b",,,,,{",
            b"\xff,,,,,",
        ),
        b",,,a,,\n,,,b,,",
    ]
    done = decode(CSV, values, format="csv")
    assert done.frame.select(["a", "f", "b", "s", "j"]).to_pylist() == [
        {"a": 1, "f": 2.5, "b": True, "s": 'a,"b"', "j": "[1]"},
        {"a": -1, "f": 1000.0, "b": False, "s": " x ", "j": None},
        dict.fromkeys("afbsj"),
    ]
    assert done.frame["at"].cast(pa.int64()).to_pylist() == [TEN, 1704103200000, None]
    assert done.dead.num_rows == len(values) - 3
    assert decode({"a": "str not null", "b": "str"}, [b";x"], format="csv", delimiter=";").dead.num_rows == 1
    assert decode({"a": "str", "b": "str"}, [b"1;x"], format="csv", delimiter=";").frame["b"].to_pylist() == [
        "x"
    ]


def test_text_and_bytes() -> None:
    """Kills: bytes decoded as text; bad UTF-8 passed on as text."""
    values = [b"a\x00", b"", b"\xff", None]
    text = decode({"value": "str"}, values, format="text")
    assert (text.frame["value"].to_pylist(), text.dead.num_rows, text.tombstones) == (["a\x00", ""], 1, 1)
    raw = decode({"value": "bytes"}, values, format="bytes")
    assert (raw.frame["value"].to_pylist(), raw.dead.num_rows) == ([b"a\x00", b"", b"\xff"], 0)


@pytest.mark.parametrize(
    "options",
    [
        *({"format": "xml"}, {"include": ("keys",)}, {"on_new_field": "drop"}),
        *({"format": "csv", "on_new_field": "add"}, {"format": "csv", "delimiter": "ab"}),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any]) -> None:
    """Kills: finding out at the first record."""
    with pytest.raises(DefinitionError):
        Decoder("t", Schema.parse({"a": "str"}), **options)


def test_deep_nesting_neither_stops_the_decoder_nor_depends_on_the_batch() -> None:
    """Kills: asking the database for the types inside a deep value, which ends its connection for good."""
    decoder = Decoder("orders", Schema.parse({"a": "list<int64>"}))
    for depth in (90, 127, 128, 129, 500, 501, 5_000):
        deep = b'{"a":[1],"z":' + b"[" * depth + b"]" * depth + b"}"
        bad = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        done = decoder.decode(records([b'{"a":[1]}', deep, bad, b'{"a":[2]}']))
        fits = depth < strict.DEPTH_MAX
        assert done.frame["a"].to_pylist() == [[1], *([[1]] if fits else []), [2]]
        assert done.dead.num_rows == (1 if fits else 2)


def test_a_text_of_digits_is_no_time_beside_integers() -> None:
    """Kills: letting texts into the group whose times are parsed as integers, which takes "5" for 5."""
    done = decode({"a": "timestamp[ms]"}, [b'{"a":1}', b'{"a":2}', b'{"a":"5"}'])
    assert done.frame["a"].cast(pa.int64()).to_pylist() == [1, 2]
    assert done.dead["error"].to_pylist() == ['a: expected timestamp[ms], got string "5"']
