"""Arrow to pandas and back, without losing a value on either way."""

from __future__ import annotations

import datetime as dt
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from kframe.errors import SchemaError

_NULLABLE = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A DataFrame whose dtypes depend on the Arrow schema alone, never on the rows.

    Parameters
    ----------
    table : Table

    Returns
    -------
    DataFrame, shape (n_rows, n_columns), RangeIndex
        Integers and booleans that may be NULL get pandas' nullable dtypes (``Int64``, ``boolean``), those
        that may not, numpy's; floats keep their width (NULL becomes NaN), text is ``str``, times
        ``datetime64``; decimals, dates, bytes, lists and structs keep their Arrow types, so that sums of
        money stay exact.
    """
    return (
        table.to_pandas(types_mapper=_types_of(table.schema))
        if _one_dtype_per_type(table.schema)
        else (pd.concat([_column(table, i) for i in range(table.num_columns)], axis=1))
    )


def from_pandas(frame: pd.DataFrame, step: str) -> pa.Table:
    """A function's result as Arrow.

    Parameters
    ----------
    frame : DataFrame
        A named index becomes columns; an unnamed one is dropped.
    step : str
        Named in the error.

    Returns
    -------
    Table
        NaN and NaT are NULL; categoricals are plain values; an all-None column has Arrow's null type.

    Raises
    ------
    SchemaError
        The result is no DataFrame, or a column mixes types or holds numbers beyond 64 bits, or column
        names repeat or are no text.
    """
    if not isinstance(frame, pd.DataFrame):
        raise SchemaError(
            f"Step {step!r} returned a {type(frame).__name__}, not a DataFrame.",
            hint="Return a DataFrame (or None for no rows); Series.to_frame() makes one.",
        )
    frame = index_as_columns(frame, step)
    _check_columns(frame, step)
    _check_values(frame, step)
    try:
        table = pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowException, UnicodeError, TypeError, ValueError, OverflowError) as error:
        raise SchemaError(
            f"Step {step!r} returned a column that has no one type: {error}",
            hint="Convert it, e.g. frame.astype({...}).",
        ) from error
    return _plain(table.replace_schema_metadata(None))


def _types_of(schema: pa.Schema) -> Any:
    required = {f.type for f in schema if not f.nullable}

    def dtype_of(type_: pa.DataType) -> Any:
        if type_ in _NULLABLE:
            return None if type_ in required else _NULLABLE[type_]
        exact = pa.types.is_decimal(type_) or pa.types.is_date(type_) or pa.types.is_nested(type_)
        return pd.ArrowDtype(type_) if exact or pa.types.is_binary(type_) else None

    return dtype_of


def _one_dtype_per_type(schema: pa.Schema) -> bool:
    """Whether no integer type occurs both as nullable and as required."""
    nullable = {f.type for f in schema if f.nullable and f.type in _NULLABLE}
    return not any(f.type in nullable for f in schema if not f.nullable)


def _column(table: pa.Table, i: int) -> pd.DataFrame:
    one = table.select([i])
    frame: pd.DataFrame = one.to_pandas(types_mapper=_types_of(one.schema))
    return frame


def index_as_columns(frame: pd.DataFrame, step: str) -> pd.DataFrame:
    """A named index as columns; an unnamed one is left. Raises `SchemaError` where a column has its name."""
    if all(name is None for name in frame.index.names):
        return frame
    try:
        return frame.reset_index()
    except ValueError as error:
        raise SchemaError(
            f"Step {step!r} returned an index that cannot become columns: {error}.",
            hint="Rename it, or drop it: frame.reset_index(drop=True).",
        ) from None


def _check_values(frame: pd.DataFrame, step: str) -> None:
    """Refuse the mixtures that Arrow would take for one type."""
    for name, column in frame.items():
        if column.dtype != object:
            continue
        types = set(map(type, column))
        numbers = any(issubclass(t, (int, np.integer)) for t in types)
        if {bytes, str} <= types or (numbers and any(issubclass(t, dt.date) for t in types)):
            told = ", ".join(sorted(t.__name__ for t in types))
            raise SchemaError(
                f"Step {step!r} returned a column that has no one type: {name!r} holds {told}.",
                hint="Convert it, e.g. frame.astype({...}).",
            )


def _check_columns(frame: pd.DataFrame, step: str) -> None:
    names = list(frame.columns)
    odd = [n for n in names if not isinstance(n, str) or not n]
    if odd:
        raise SchemaError(
            f"Step {step!r} returned a column named {odd[0]!r}.",
            hint="Column names are non-empty text: frame.rename(columns={...}).",
        )
    folded: dict[str, str] = {}
    for name in names:
        if name.lower() in folded:
            raise SchemaError(
                f"Step {step!r} returned the columns {folded[name.lower()]!r} and {name!r}.",
                hint="Names in a table must differ by more than case.",
            )
        folded[name.lower()] = name


def _plain(table: pa.Table) -> pa.Table:
    """Without dictionaries and 64-bit string offsets, which would leak pandas' storage into tables."""
    for i, f in enumerate(table.schema):
        type_ = f.type.value_type if pa.types.is_dictionary(f.type) else f.type
        if pa.types.is_large_string(type_) or pa.types.is_string_view(type_):
            type_ = pa.string()
        if type_ != f.type:
            table = table.set_column(i, pa.field(f.name, type_), table.column(i).cast(type_))
    return table
