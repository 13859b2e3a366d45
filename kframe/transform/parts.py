"""The parts of an aggregate: how each is computed from rows, merged, stored and finalised."""

from __future__ import annotations

from dataclasses import dataclass

INTEGERS = {f"{sign}{size}INT" for sign in ("", "U") for size in ("TINY", "SMALL", "BIG", "HUGE")} | {
    "INTEGER",
    "UINTEGER",
}
FLOATS = {"FLOAT", "DOUBLE"}
NUMERIC_ONLY = {"sum", "mean", "var", "std", "var_pop", "std_pop"}


def quote(name: str) -> str:
    """`name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Part:
    """One column of the state.

    ``partial`` aggregates rows, ``merge`` aggregates values of this column; ``wide`` is the type they are
    added up in, ``wire`` the type of a partial, ``stored`` the type in the state table ("": as it comes).
    """

    column: str
    partial: str
    merge: str
    wide: str = ""
    wire: str = ""
    stored: str = ""

    def select(self, expression: str, type_: str) -> str:
        cast = f"CAST({expression} AS {type_})" if type_ else expression
        return f"{cast} AS {quote(self.column)}"


@dataclass(frozen=True)
class Measure:
    """One aggregate function over an argument column (``label``); ``size`` has none."""

    function: str
    label: str = ""
    by: str = ""
    """Only ``arg_min`` and ``arg_max``: the label of the column that decides."""

    @property
    def slot(self) -> str:
        if self.function == "size":
            return ":size"
        return ":".join(part for part in (self.label, self.by, self.function) if part)


def _sum_part(label: str, x: str, type_: str, *, wide: bool) -> Part:
    column = f"{label}:{'total' if wide else 'sum'}"
    merge = f"sum({quote(column)})"
    if type_ in INTEGERS or type_ == "BOOLEAN":
        stored = "DECIMAL(38,0)" if wide else "BIGINT"
        return Part(column, f"sum(CAST({x} AS HUGEINT))", merge, "HUGEINT", "DECIMAL(38,0)", stored)
    return Part(column, f"sum({x})", merge)


def _variance_parts(label: str, x: str) -> list[Part]:
    """Count, mean and M2, merged two at a time (Chan, Golub and LeVeque, 1983)."""
    n, mean, m2 = (quote(f"{label}:{part}") for part in ("count", "mean", "m2"))
    x = f"CAST({x} AS DOUBLE)"
    return [
        _count_part(label, x),
        Part(f"{label}:mean", f"favg({x})", f"sum({n} * {mean}) / sum({n})", stored="DOUBLE"),
        Part(
            f"{label}:m2",
            f"var_pop({x}) * count({x})",
            f"sum({m2}) + pow(max({mean}) - min({mean}), 2) * "
            f"(CAST(min({n}) AS DOUBLE) * max({n}) / sum({n}))",
            stored="DOUBLE",
        ),
    ]


def _count_part(label: str, x: str) -> Part:
    column = f"{label}:count"
    return Part(column, f"count({x})", f"sum({quote(column)})", "BIGINT", "BIGINT", "BIGINT")


def size_part() -> Part:
    return Part(":size", "count(*)", 'sum(":size")', "BIGINT", "BIGINT", "BIGINT")


def _pick_parts(measure: Measure, x: str) -> list[Part]:
    """The value at the least or greatest place, and the place: results don't depend on how the log is cut."""
    largest = measure.function in ("last", "last_row", "arg_max")
    value, at = measure.slot, f"{measure.slot}_at"
    order, some = '":order"', f"{x} IS NOT NULL"
    if measure.by:
        y = quote(f":{measure.by}")
        order = f"{{'y': {y}, 'at': {quote(':descending') if largest else order}}}"
        some = f"{x} IS NOT NULL AND {y} IS NOT NULL"
    elif measure.function.endswith("_row"):
        some = "true"
    ends = "max" if largest else "min"
    return [
        Part(
            value,
            f"arg_{ends}_null({x}, {order}) FILTER (WHERE {some})",
            f"arg_{ends}_null({quote(value)}, {quote(at)})",
        ),
        Part(at, f"{ends}({order}) FILTER (WHERE {some})", f"{ends}({quote(at)})"),
    ]


def parts_of(measure: Measure, type_: str) -> list[Part]:
    """The parts that a measure needs, for an argument of DuckDB type `type_`."""
    label, function = measure.label, measure.function
    x = quote(f":{label}")
    if function == "size":
        return [size_part()]
    if function == "count":
        return [_count_part(label, x)]
    if function == "sum":
        return [_sum_part(label, x, type_, wide=False)]
    if function == "mean":
        return [_sum_part(label, x, type_, wide=True), _count_part(label, x)]
    if function in ("min", "max"):
        column = f"{label}:{function}"
        return [Part(column, f"{function}({x})", f"{function}({quote(column)})")]
    if function in ("var", "std", "var_pop", "std_pop"):
        return _variance_parts(label, x)
    if function == "nunique":
        column = f"{label}:nunique"
        return [Part(column, "", f"sum({quote(column)})", "BIGINT", "", "BIGINT")]
    return _pick_parts(measure, x)


def final_of(measure: Measure, *, empty_sum_is_zero: bool) -> str:
    """The expression over the state's columns that users see."""
    label, function = measure.label, measure.function
    n, m2, total = (quote(f"{label}:{part}") for part in ("count", "m2", "total"))
    spread = {
        "var": f"CASE WHEN {n} > 1 THEN {m2} / ({n} - 1) END",
        "var_pop": f"CASE WHEN {n} > 0 THEN {m2} / {n} END",
    }
    if function == "size":
        return 'coalesce(":size", 0)'
    if function == "mean":
        return f"CASE WHEN {n} > 0 THEN CAST({total} AS DOUBLE) / {n} END"
    if function in spread:
        return spread[function]
    if function in ("std", "std_pop"):
        return f"sqrt({spread[function.replace('std', 'var')]})"
    if function in ("count", "nunique") or (function == "sum" and empty_sum_is_zero):
        return f"coalesce({quote(measure.slot)}, 0)"
    return quote(measure.slot)
