"""A schema from first records: narrow, but every record fits."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kframe.batch.infer import infer_schema
from kframe.errors import ConfigError, DefinitionError


def of(*values: Any) -> str:
    """The type inferred for a field with these values; a text starting with ``=`` is raw JSON."""
    raw = [v[1:] if isinstance(v, str) and v.startswith("=") else json.dumps(v) for v in values]
    return infer_schema([b'{"a": %s}' % r.encode() for r in raw]).to_dict()["a"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, -2, None], "int64"),
        ([2**63 - 1, -(2**63)], "int64"),
        ([1, 2.5], "float64"),
        (["=1e3"], "float64"),
        (["=1.0"], "float64"),
        ([True, None, False], "bool"),
        ([True, 1], "json"),
        (["x", ""], "str"),
        (["x", 1], "json"),
        ([None, None], "json"),
        (["=NaN"], "json"),
        (["=NaN", 1], "json"),
        (["2024-01-01", "2024-02-29"], "date"),
        (["2024-01-01", "x"], "str"),
        (["2024-02-30"], "str"),
        (["0000-01-01"], "str"),
        (["2024-01-01T10:00:00", "2024-01-01 10:00:00.5"], "timestamp[us]"),
        (["2024-01-01T10:00:00Z", "2024-01-01T10:00:00+02:00"], "timestamp[us, UTC]"),
        (["2024-01-01T10:00:00Z", "2024-01-01T10:00:00"], "str"),
        (["2024-01-01T10:00:00Z", "2024-01-01"], "str"),
        (["2024-01-01T10:00:00.1234567Z"], "str"),
        (["2024-01-01T24:00:00"], "str"),
        (["2024-W01-1T10:00:00"], "str"),
        (["20240101"], "str"),
        ([[1, None], [], [2]], "list<int64>"),
        ([[1], [2.5]], "list<float64>"),
        ([[1], ["x"]], "list<json>"),
        ([[]], "list<json>"),
        ([[1], 1], "json"),
        ([[["x"]]], "list<list<str>>"),
        ([{"b": 1}, {"c": "x", "b": None}], "struct<b: int64, c: str>"),
        ([[{"b": [1]}]], "list<struct<b: list<int64>>>"),
        ([{}], "json"),
        ([{"b.c": 1}], "json"),
        ([{"b": 1, "B": 2}], "json"),
    ],
)
def test_type(values: list[Any], expected: str) -> None:
    """Kills: the first value's type; a date or time that is none; conflicts guessed away."""
    assert of(*values) == expected


@pytest.mark.parametrize(
    "numeral", ["9223372036854775808", "-9223372036854775809", "9" * 400, "1e999", "9" * 5000]
)
def test_numbers_beyond_int64_do_not_fail(numeral: str) -> None:
    """Kills: int64 for what does not fit, and Python's limit on digits."""
    assert of("=" + numeral) in ("float64", "json")
    assert of("=" + numeral, 1) in ("float64", "json")


def test_columns_keep_their_order_and_clashes_go_to_the_first() -> None:
    """Kills: sorted columns; names that a table cannot tell apart."""
    values = [b'{"z": 1, "b": 2, "Z": "x"}', b'{"a": 1, "B": 1, "_x": 1, "": 1}']
    assert infer_schema(values).to_dict() == {"z": "int64", "b": "int64", "a": "int64"}


def test_what_is_no_object_is_passed_over() -> None:
    """Kills: one bad first record stopping a pipeline."""
    values = [b"", b"{", b"1", b"[]", b"null", b"\xff", b"[" * 5000 + b"]" * 5000, b'{"a": 1}', b"{}"]
    assert infer_schema(values).to_dict() == {"a": "int64"}


@pytest.mark.parametrize("depth", [50, 300, 900])
def test_deep_values_do_not_fail(depth: int) -> None:
    """Kills: a RecursionError out of inference."""
    infer_schema([b'{"a": 1}', b'{"a": 1, "b": ' + b"[" * depth + b"]" * depth + b"}"])


@pytest.mark.parametrize("values", [[], [b"{}"], [b"1"], [b'{"_a": 1}'], [b'{"": 1}']])
def test_nothing_to_infer_from(values: list[bytes]) -> None:
    """Kills: a schema without columns."""
    with pytest.raises(ConfigError):
        infer_schema(values)


def test_other_formats() -> None:
    """Kills: guessing a CSV's columns."""
    assert infer_schema([b"x"], "text").to_dict() == {"value": "str"}
    assert infer_schema([b"x"], "bytes").to_dict() == {"value": "bytes"}
    with pytest.raises(DefinitionError):
        infer_schema([b"x"], "csv")
