"""Tables compared as sets of rows: exact, floats to a tolerance; and what differs, as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

_SHOWN = 5


def difference(got: pd.DataFrame, expected: pd.DataFrame | Iterable[Mapping[str, Any]]) -> str:
    """What two tables differ in; empty when they hold the same rows, in any order.

    Parameters
    ----------
    got : DataFrame
    expected : DataFrame, or sequence of rows as mappings
        Missing values (None, NaN, NaT, NA) are equal to each other. Numbers compare by value, floats to a
        relative 1e-9.

    Returns
    -------
    str
        The first few rows of either side that the other does not have.
    """
    theirs = expected if isinstance(expected, pd.DataFrame) else pd.DataFrame(list(expected))
    if theirs.empty and got.empty:
        return ""
    if set(got.columns) != set(theirs.columns):
        return f"columns {sorted(map(str, got.columns))}, expected {sorted(map(str, theirs.columns))}"
    columns = list(theirs.columns)
    left, right = _rows(got, columns), _rows(theirs, columns)
    missing, surplus = _unmatched(right, left), _unmatched(left, right)
    if not missing and not surplus:
        return ""
    told = [f"{len(left)} rows, expected {len(right)}"]
    for what, rows in (("missing", missing), ("surplus", surplus)):
        told += [f"  {what}: {dict(zip(columns, row, strict=True))}" for row in rows[:_SHOWN]]
        if len(rows) > _SHOWN:
            told.append(f"  and {len(rows) - _SHOWN} more {what}")
    return "\n".join(told)


def _rows(frame: pd.DataFrame, columns: Sequence[Any]) -> list[tuple[Any, ...]]:
    plain = frame[columns].astype(object)
    rows = [tuple(_plain(v) for v in row) for row in plain.itertuples(index=False, name=None)]
    return sorted(rows, key=_order)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
        if isinstance(value, list):
            return value
    return None if value is pd.NA or value is pd.NaT or value != value else value


def _order(row: tuple[Any, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple(_place(v) for v in row)


def _place(value: Any) -> tuple[str, Any]:
    if value is None:
        return ("", 0)
    if isinstance(value, float):
        return ("number", float(f"{value:.6g}") if math.isfinite(value) else value)
    if isinstance(value, (int, bool)) or type(value).__name__ == "Decimal":
        return ("number", value)
    return (type(value).__name__, str(value))


def _unmatched(rows: list[tuple[Any, ...]], others: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows without a partner in `others`; exact partners first, then those within the tolerance."""
    left: dict[str, int] = {}
    for other in others:
        left[repr(other)] = left.get(repr(other), 0) + 1
    single = []
    for row in rows:
        if left.get(repr(row), 0):
            left[repr(row)] -= 1
        else:
            single.append(row)
    free = []
    for other in others:
        if left.get(repr(other), 0):
            left[repr(other)] -= 1
            free.append(other)
    unmatched = []
    for row in single:
        partner = next((i for i, other in enumerate(free) if _same_row(row, other)), None)
        if partner is None:
            unmatched.append(row)
        else:
            del free[partner]
    return unmatched


def _same_row(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return all(_same(a, b) for a, b in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    if isinstance(a, float) or isinstance(b, float):
        try:
            return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
        except TypeError:
            return False
    return bool(a == b)
