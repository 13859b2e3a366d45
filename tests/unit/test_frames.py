"""Arrow to pandas and back: dtypes from the schema alone, and no value lost."""

from __future__ import annotations

import datetime as dt
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from kframe.errors import SchemaError
from kframe.transform.frames import from_pandas, to_pandas

SCHEMA = pa.schema(
    [
        pa.field("i", pa.int64()),
        pa.field("required", pa.int64(), nullable=False),
        pa.field("u", pa.uint64()),
        pa.field("small", pa.int8(), nullable=False),
        pa.field("b", pa.bool_()),
        pa.field("f", pa.float64()),
        pa.field("f32", pa.float32()),
        pa.field("s", pa.string()),
        pa.field("d", pa.decimal128(38, 2)),
        pa.field("day", pa.date32()),
        pa.field("at", pa.timestamp("ms", "UTC")),
        pa.field("naive", pa.timestamp("us")),
        pa.field("raw", pa.binary()),
        pa.field("l", pa.list_(pa.int64())),
        pa.field("st", pa.struct([("a", pa.int64())])),
    ]
)
FULL: dict[str, Any] = {
    "i": 2**53 + 1,
    "required": 2**63 - 1,
    "u": 2**64 - 1,
    "small": -128,
    "b": True,
    "f": 0.1,
    "f32": 0.5,
    "s": "a\x00é",
    "d": Decimal("123456789012345678901234567890123456.78"),
    "day": dt.date(9999, 12, 31),
    "at": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    "naive": dt.datetime(1, 1, 1),
    "raw": b"\xff\x00",
    "l": [2**53 + 1, None],
    "st": {"a": 2**53 + 1},
}
NULLS = dict.fromkeys(FULL) | {"required": 1, "small": 2}


def rows(*given: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(given), schema=SCHEMA)


def test_dtypes_depend_on_the_schema_alone() -> None:
    """Kills: Int64 for batches with a NULL, int64 for others."""
    kinds = [
        to_pandas(t).dtypes.astype(str).to_dict()
        for t in (rows(), rows(FULL), rows(NULLS), rows(FULL, NULLS))
    ]
    assert all(k == kinds[0] for k in kinds)
    assert kinds[0] == {
        **{"i": "Int64", "required": "int64", "u": "UInt64", "small": "int8", "b": "boolean", "f": "float64"},
        **{"f32": "float32", "s": "str", "d": "decimal128(38, 2)[pyarrow]", "day": "date32[day][pyarrow]"},
        **{"at": "datetime64[ms, UTC]", "naive": "datetime64[us]", "raw": "binary[pyarrow]"},
        **{"l": "list<element: int64>[pyarrow]", "st": "struct<a: int64>[pyarrow]"},
    } | {"l": kinds[0]["l"]}


def test_every_value_comes_back() -> None:
    """Kills: integers, decimals or NULLs that pass through float64."""
    there = rows(FULL, NULLS)
    back = from_pandas(to_pandas(there), "s")
    assert back.to_pylist() == there.to_pylist()
    assert [f.type for f in back.schema] == [f.type for f in SCHEMA]


def test_a_table_without_columns_or_rows() -> None:
    """Kills: failing on an empty batch."""
    assert to_pandas(pa.table({})).shape == (0, 0)
    assert from_pandas(pd.DataFrame(), "s").shape == (0, 0)
    assert from_pandas(to_pandas(rows()), "s").num_rows == 0


def test_index_becomes_columns_when_it_is_named() -> None:
    """Kills: dropping a groupby's keys; keeping a RangeIndex."""
    grouped = pd.DataFrame({"k": ["a", "a", "b"], "v": [1, 2, 3]}).groupby("k").sum()
    assert from_pandas(grouped, "s").to_pylist() == [{"k": "a", "v": 3}, {"k": "b", "v": 3}]
    assert from_pandas(grouped.reset_index().set_axis([7, 8]), "s").column_names == ["k", "v"]
    two = pd.DataFrame({"v": [1]}, index=pd.MultiIndex.from_tuples([("a", 1)], names=["x", "y"]))
    assert from_pandas(two, "s").column_names == ["x", "y", "v"]


def test_index_with_the_name_of_a_column_is_refused() -> None:
    """Kills: pandas' bare ValueError out of a step."""
    with pytest.raises(SchemaError, match=r"'totals'.*index"):
        from_pandas(pd.DataFrame({"a": [1]}, index=pd.Index([1], name="a")), "totals")


@pytest.mark.parametrize(
    ("column", "arrow", "values"),
    [
        ([1.5, float("nan")], pa.float64(), [1.5, None]),
        (pd.Series([None, None], dtype=object), pa.null(), [None, None]),
        (pd.to_datetime(["2024-01-01", None]), pa.timestamp("us"), [dt.datetime(2024, 1, 1), None]),
        (pd.Categorical(["a", None, "a"]), pa.string(), ["a", None, "a"]),
        (pd.Categorical([3, 1]), pa.int64(), [3, 1]),
        (pd.array([1, None], dtype="Int8"), pa.int8(), [1, None]),
        (pd.Series(["a", None], dtype=object), pa.string(), ["a", None]),
        (pd.Series(["a", None], dtype="string"), pa.string(), ["a", None]),
        (pd.Series([Decimal("1.50"), None], dtype=object), pa.decimal128(3, 2), [Decimal("1.50"), None]),
        (pd.Series([b"a", None], dtype=object), pa.binary(), [b"a", None]),
        (pd.Series([[1], None], dtype=object), pa.list_(pa.int64()), [[1], None]),
        (np.array([1, 2], dtype=np.uint8), pa.uint8(), [1, 2]),
    ],
)
def test_results_become_plain_arrow(column: Any, arrow: pa.DataType, values: list[Any]) -> None:
    """Kills: closed enums from categoricals, NaN instead of NULL, 64-bit string offsets."""
    table = from_pandas(pd.DataFrame({"a": column}), "s")
    assert (table.schema.field("a").type, table["a"].to_pylist()) == (arrow, values)
    assert table.schema.metadata is None


@pytest.mark.parametrize(
    "column",
    [
        *([1, "a"], [True, 1], [b"a", "a"], ["\ud800"], [2**70], [2**63], [1 + 2j], [object()]),
        *([{"a": 1}, {"a": "x"}], [[1], ["a"]], [pd.Timestamp("2024-01-01"), 1]),
    ],
)
def test_columns_of_no_one_type_are_refused(column: list[Any]) -> None:
    """Kills: a bare OverflowError or UnicodeError; silent mixtures of bytes and text, times and counts."""
    with pytest.raises(SchemaError, match="'totals'"):
        from_pandas(pd.DataFrame({"a": pd.Series(column, dtype=object)}), "totals")


@pytest.mark.parametrize(
    "result",
    [
        *(None, 1, pd.Series([1]), {"a": [1]}, pd.DataFrame({0: [1]}), pd.DataFrame({"": [1]})),
        *(pd.DataFrame([[1, 2]], columns=["a", "a"]), pd.DataFrame([[1, 2]], columns=["a", "A"])),
        pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")])),
    ],
)
def test_results_that_are_no_table_are_refused(result: Any) -> None:
    """Kills: columns that a table cannot tell apart."""
    with pytest.raises(SchemaError, match="'totals'"):
        from_pandas(result, "totals")
