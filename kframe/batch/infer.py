"""A schema from a topic's first records."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from kframe.batch import strict
from kframe.errors import ConfigError, DefinitionError
from kframe.schema import Schema, Type, parse_type

_NUMBERS = [parse_type(text) for text in ("int64", "float64")]
_TIMES = [parse_type(text) for text in ("date", "timestamp[us]", "timestamp[us, UTC]")]


def infer_schema(values: Sequence[bytes], format: str = "json") -> Schema:
    """The narrowest schema that all of `values` fit.

    Parameters
    ----------
    values : sequence of bytes
        The first records of a topic; those that are no JSON objects are passed over.
    format : str

    Returns
    -------
    Schema
        Whole numbers are int64, mixed with others float64; texts that are all times ``timestamp[us]`` (with
        zone when all have one), all dates ``date``; nested values structs and lists; what conflicts or is
        always null, json.

    Raises
    ------
    ConfigError
        No value is a JSON object.
    DefinitionError
        The format needs a declared schema.
    """
    if format in ("text", "bytes"):
        return Schema.parse({"value": "str" if format == "text" else "bytes"})
    if format != "json":
        raise DefinitionError(
            f"A schema cannot be inferred from {format}.", hint='Give one: topic(schema={"column": "type"}).'
        )
    fields: dict[str, list[Any]] = {}
    for document in filter(None, map(_object, values)):
        for name, given in document.items():
            fields.setdefault(name, []).append(given)
    usable = _distinct([name for name in fields if name and not name.startswith("_")])
    if not usable:
        raise ConfigError(
            "None of the first records is a JSON object with fields.",
            hint='Give a format= ("text", "bytes", "csv") or a schema=.',
        )
    return Schema.parse({name: _type(fields[name]) for name in usable})


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        document = strict.load(raw.decode())
    except (ValueError, RecursionError, strict.Misfit):
        return None
    return document if isinstance(document, dict) else None


def _distinct(names: list[str]) -> list[str]:
    """Names that tables can tell apart: the first of those that differ only in case."""
    return list({name.lower(): name for name in reversed(names)}.values())[::-1]


def _type(given: list[Any]) -> str:
    present = [x for x in given if x is not None]
    kinds = {type(x) for x in present}
    if kinds == {bool}:
        return "bool"
    if kinds == {strict.Number}:
        return _number(present)
    if kinds == {str}:
        return _text(present)
    if kinds == {list}:
        inner = _type([x for items in present for x in items])
        return f"list<{inner}>"
    if kinds == {dict}:
        return _struct(present)
    return "json"


def _number(numbers: list[str]) -> str:
    return next((t.text for t in _NUMBERS if all(_fits(t, n) for n in numbers)), "json")


def _text(texts: list[str]) -> str:
    zoned = {bool(re.search(r"(Z|[+-]\d\d:?\d\d)$", t[10:])) for t in texts}
    if zoned == {True}:
        return _TIMES[2].text if all(_fits(_TIMES[2], t) for t in texts) else "str"
    return next((type_.text for type_ in _TIMES[:2] if all(_fits(type_, t) for t in texts)), "str")


def _fits(type_: Type, given: Any) -> bool:
    try:
        strict.value(type_, given)
    except strict.Misfit:
        return False
    return True


def _struct(objects: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for x in objects for name in x))
    if (
        not names
        or any(not re.fullmatch(r"\w+", n) for n in names)
        or len({n.lower() for n in names}) < len(names)
    ):
        return "json"
    return "struct<" + ", ".join(f"{n}: {_type([x.get(n) for x in objects])}" for n in names) + ">"
