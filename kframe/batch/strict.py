"""One record's values against the schema, in Python: what fits, and what exactly does not.

This is the meaning of every type. The bulk path in `kframe.batch.json_columns` takes only records for
which it can show that this module would give the same.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import re
from decimal import Context, Decimal, InvalidOperation
from typing import Any

import pyarrow as pa

from kframe.schema import Schema, Type

_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000}
_MOMENT = re.compile(
    r"(\d{4}-\d\d-\d\d)[T ]((?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d)(?:[.,](\d+))?"
    r"(Z|[+-](?:[01]\d|2[0-3]):?[0-5]\d)?",
    re.ASCII,
)
_OUTSIDE_TEXT = re.compile(
    r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])|(-?\b(?:nan|inf(?:inity)?)\b)', re.ASCII | re.IGNORECASE
)
_EXACT = Context(prec=100)
_FLOAT32_MAX = 3.4028235677973366e38  # from here on, rounding gives infinity
DEPTH_MAX = 500
"""Brackets inside each other; a record of more is a dead letter."""

_NUMERAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_INTEGER = re.compile(r"[+-]?\d+", re.ASCII)
_INT64 = (-(2**63), 2**63 - 1)
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


class Misfit(Exception):
    """A value does not fit its column; the text says which and why."""


class Number(str):
    """A JSON number as it was written."""

    __slots__ = ()


class Constant(str):
    """``NaN`` or ``Infinity``, which some writers put where JSON allows no such thing."""

    __slots__ = ()


def load(text: str) -> Any:
    """Parse JSON without losing a digit: numbers stay text, and the first of repeated keys wins.

    Reads what the bulk path's parser reads: trailing commas, ``NaN`` and ``Infinity`` too.

    Raises
    ------
    ValueError
        The text is not JSON.
    Misfit
        It is nested deeper than `DEPTH_MAX`.
    """
    if text.count("[") + text.count("{") > DEPTH_MAX:
        _check_depth(text)
    try:
        return _load(text)
    except ValueError:
        return _load(_OUTSIDE_TEXT.sub(_standard, text))


def _standard(match: re.Match[str]) -> str:
    """What stands for a piece of lenient JSON in standard JSON; Python reads ``NaN`` by itself."""
    if match[1] is not None:
        return match[1]
    return "NaN" if match[2] else ""


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", re.sub(r'"(?:[^"\\]|\\.)*"', "", text)):
        depth += 1 if bracket in "[{" else -1
        if depth > DEPTH_MAX:
            raise Misfit(f"nested deeper than {DEPTH_MAX} levels")


def _load(text: str) -> Any:
    return json.loads(
        text,
        strict=False,
        parse_int=Number,
        parse_float=Number,
        parse_constant=Constant,
        object_pairs_hook=_first_wins,
    )


def row(schema: Schema, document: Any) -> dict[str, Any]:
    """A parsed JSON object's values by column, as pyarrow takes them.

    Raises
    ------
    Misfit
        The document is no object, a required field is missing, or a value does not fit.
    """
    if not isinstance(document, dict):
        raise Misfit(f"expected a JSON object, got {_show(document)}")
    return {f.name: _field(document, f.name, f.type, f.required) for f in schema}


def cell(type_: Type, text: str) -> Any:
    """A CSV cell's value.

    Raises
    ------
    Misfit
        The text is no value of the type.
    """
    if type_.kind in ("int", "float"):
        return value(type_, Number(text) if _NUMERAL.fullmatch(text) else text)
    if type_.kind == "bool":
        return value(type_, {"true": True, "false": False}.get(text.lower(), text))
    if type_.kind == "timestamp" and _INTEGER.fullmatch(text):
        return value(type_, Number(text))
    if type_.kind == "json":
        try:
            return _dump(load(text))
        except ValueError:
            raise _expected(type_, text) from None
    return value(type_, text)


def value(type_: Type, given: Any) -> Any:
    """One JSON value as its column's type.

    Raises
    ------
    Misfit
        It is of another type, out of range, or would have to be rounded.
    """
    return _CONVERT[type_.kind](type_, given)


def _field(members: dict[str, Any], name: str, type_: Type, required: bool) -> Any:
    given = members.get(name)
    if given is None:
        if required:
            raise Misfit(f"{name}: required, but {'null' if name in members else 'missing'}")
        return None
    try:
        return value(type_, given)
    except Misfit as error:
        raise Misfit(f"{name}: {error}") from None


def _integer(type_: Type, given: Any) -> int:
    if not isinstance(given, Number) or not _INTEGER.fullmatch(given):
        raise _expected(type_, given)
    number = int(given) if len(given) <= 40 else 2**200
    bits = type_.arrow.bit_width
    low, high = (0, 2**bits) if type_.text.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    if not low <= number < high:
        raise Misfit(f"{given} is out of range for {type_}")
    return number


def _float(type_: Type, given: Any) -> float:
    if not isinstance(given, Number):
        raise _expected(type_, given)
    number = float(given)
    if given == "-0":  # a whole number, and those have one zero
        number = 0.0
    if not math.isfinite(number) or (type_.text == "float32" and abs(number) >= _FLOAT32_MAX):
        raise Misfit(f"{_show(given)} is out of range for {type_}")
    return number


def _text(type_: Type, given: Any) -> str:
    if not isinstance(given, str) or isinstance(given, (Number, Constant)):
        raise _expected(type_, given)
    return str(given)


def _bool(type_: Type, given: Any) -> bool:
    if not isinstance(given, bool):
        raise _expected(type_, given)
    return given


def _decimal(type_: Type, given: Any) -> Decimal:
    if not isinstance(given, str) or isinstance(given, Constant) or not _NUMERAL.fullmatch(given):
        raise _expected(type_, given)
    try:
        number = Decimal(given)
        exact = number.quantize(Decimal(1).scaleb(-type_.arrow.scale), context=_EXACT)
    except InvalidOperation:
        raise Misfit(f"{_show(given)} is out of range for {type_}") from None
    if exact != number:
        raise Misfit(f"{_show(given)} would have to be rounded for {type_}")
    if exact.adjusted() >= type_.arrow.precision - type_.arrow.scale and exact != 0:
        raise Misfit(f"{_show(given)} is out of range for {type_}")
    return exact


def _timestamp(type_: Type, given: Any) -> int:
    """The count of the type's units since the Unix epoch."""
    unit = type_.arrow.unit
    if isinstance(given, Number) and _INTEGER.fullmatch(given):
        count = int(given) if len(given) <= 20 else 2**64
        if not _INT64[0] <= count * (1_000_000 // _PER_SECOND[unit]) <= _INT64[1]:
            raise Misfit(f"{given} is out of range for {type_}")
        return count
    match = _MOMENT.fullmatch(_text(type_, given))
    if match is None:
        raise _expected(type_, given)
    digits = (match[3] or "").rstrip("0")
    if 10 ** min(len(digits), 7) > _PER_SECOND[unit]:
        raise Misfit(f"{_show(given)} would have to be rounded for {type_}")
    seconds: int = (_moment(type_, given, match) - _EPOCH) // dt.timedelta(seconds=1)
    part = digits.ljust(6, "0")[:6]
    return seconds * _PER_SECOND[unit] + int(part) * _PER_SECOND[unit] // 1_000_000


def _moment(type_: Type, given: str, match: re.Match[str]) -> dt.datetime:
    """The whole second."""
    day, clock, _, offset = match.groups()
    if offset and type_.arrow.tz is None:
        raise Misfit(f"{_show(given)} has an offset, {type_} has no zone")
    try:
        return dt.datetime.fromisoformat(f"{day}T{clock}{offset or 'Z'}")
    except ValueError:
        raise _expected(type_, given) from None


def _date(type_: Type, given: Any) -> dt.date:
    text = _text(type_, given)
    try:
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
            raise ValueError
        return dt.date.fromisoformat(text)
    except ValueError:
        raise _expected(type_, given) from None


def _bytes(type_: Type, given: Any) -> bytes:
    try:
        return base64.b64decode(_text(type_, given), validate=True)
    except ValueError:
        raise _expected(type_, given) from None


def _list(type_: Type, given: Any) -> list[Any]:
    if not isinstance(given, list):
        raise _expected(type_, given)
    ((_, item),) = type_.members
    return [_field({f"[{i}]": x}, f"[{i}]", item, False) for i, x in enumerate(given)]


def _struct(type_: Type, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise _expected(type_, given)
    return {name: _field(given, name, member, False) for name, member in type_.members}


_CONVERT = {
    "int": _integer,
    "float": _float,
    "str": _text,
    "bool": _bool,
    "decimal": _decimal,
    "timestamp": _timestamp,
    "date": _date,
    "bytes": _bytes,
    "json": lambda _type, given: _dump(given),
    "list": _list,
    "struct": _struct,
}


def to_arrow(rows: list[dict[str, Any]], schema: Schema) -> pa.Table:
    """Checked rows as a table of the schema's Arrow types."""
    columns = [_array([r[f.name] for r in rows], f.type) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema.arrow)


def _array(values: list[Any], type_: Type) -> pa.Array:
    if type_.kind == "timestamp":
        return pa.array(values, pa.int64()).cast(type_.arrow)
    return pa.array(values, type_.arrow)


def _first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, given in pairs:
        members.setdefault(name, given)
    return members


def _dump(given: Any) -> str:
    """A parsed JSON value as compact text, its numbers as they were written."""
    if isinstance(given, (Number, Constant)):
        return str(given)
    if isinstance(given, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_dump(v)}" for k, v in given.items()) + "}"
    if isinstance(given, list):
        return "[" + ",".join(map(_dump, given)) + "]"
    return json.dumps(given)


def _show(given: Any) -> str:
    kind = (
        "number"
        if isinstance(given, (Number, Constant))
        else {dict: "object", list: "array", str: "string", bool: "boolean", type(None): ""}[type(given)]
    )
    text = _dump(given)
    return f"{kind} {text if len(text) <= 80 else text[:77] + '...'}".strip()


def _expected(type_: Type, given: Any) -> Misfit:
    return Misfit(f"expected {type_}, got {_show(given)}")
