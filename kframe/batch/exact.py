"""SQL from texts to typed values where that is exact, and NULL where it might not be."""

from __future__ import annotations

from kframe.schema import Type

BULK_ROWS = 128
"""With fewer records, planning queries costs more than deciding each (50 of JSON: 1.5 ms instead of 3)."""

_DATE = r"[1-9]\d{3}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])"
_CLOCK = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d"
_FRACTION = {"s": "", "ms": r"(\.\d{1,3}0{0,3})?", "us": r"(\.\d{1,6})?"}
_ZONE = r"(Z|[+-](0\d|1[0-4]):[0-5]\d)?"
_FEW_DIGITS = {
    "int": r"-?(0|[1-9]\d{0,17})",
    "float": r"0|-?[1-9]\d{0,14}|-?(0|[1-9]\d{0,14})\.\d{1,15}",  # not -0: a whole number has one zero
}


def from_text(type_: Type, text: str) -> str | None:
    """SQL for a decimal, date or time from the SQL expression `text`; None: another type."""
    if type_.kind == "decimal":
        scale = type_.arrow.scale
        whole = max(type_.arrow.precision - scale, 1)
        fraction = rf"(\.\d{{1,{scale}}}0*)?" if scale else ""
        return _if_matches(rf"-?\d{{1,{whole}}}{fraction}", type_.duckdb, text)
    if type_.kind == "date":
        return _if_matches(_DATE, "DATE", text)
    if type_.kind == "timestamp":
        zone, sql_type = (_ZONE, "TIMESTAMPTZ") if type_.arrow.tz else ("", "TIMESTAMP")
        return _if_matches(f"{_DATE}[T ]{_CLOCK}{_FRACTION[type_.arrow.unit]}{zone}", sql_type, text)
    return None


def from_cell(type_: Type, text: str) -> str | None:
    """As `from_text`, of every type whose values CSV can hold as they are; None: no such type."""
    if type_.kind == "str":
        return text
    if type_.kind == "bool":
        return f"CASE lower({text}) WHEN 'true' THEN true WHEN 'false' THEN false END"
    if type_.kind == "int" or type_.text == "float64":
        return _if_matches(_FEW_DIGITS[type_.kind], type_.duckdb, text)
    return from_text(type_, text)


def _if_matches(pattern: str, sql_type: str, text: str) -> str:
    return f"CASE WHEN regexp_full_match({text}, {literal(pattern)}) THEN TRY_CAST({text} AS {sql_type}) END"


def literal(text: str) -> str:
    """A SQL string."""
    return "'" + text.replace("'", "''") + "'"
