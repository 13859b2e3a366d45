"""The law of the library, for users' steps: a table does not depend on how the log was cut into batches."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from kframe.errors import SchemaError
from kframe.model import Fetched, OffsetRange
from kframe.pipeline import Pipeline
from kframe.source.memory import MemorySource
from kframe.testing.frames import difference
from kframe.transform.frames import from_pandas

Step = Callable[[pd.DataFrame], pd.DataFrame | None]

_TOPIC, _TABLE = "records", "result"
_MOST_SINGLE_CUTS = 12


def check_batch_equivalence(
    step: Step,
    frame: pd.DataFrame,
    *,
    key: str | Sequence[str] | None = None,
    cuts: Iterable[Sequence[int]] | None = None,
) -> None:
    """Check that a step gives the same table however its input is cut into batches.

    The frame's rows become records of a `MemorySource`; a real pipeline runs the step over them, batch by
    batch, into a temporary DuckDB file, once for each cut and once in a single batch.

    Parameters
    ----------
    step : callable
        A plain pandas function of one DataFrame.
    frame : DataFrame, shape (n_rows, n_columns)
        Its input; the index is not part of it.
    key : str or sequence of str, optional
        As for `Pipeline.table`: rows replace those of the same key.
    cuts : iterable of sequences of int, optional
        Each holds the rows before which a batch ends: ``(2, 5)`` makes batches of rows 0-1, 2-4 and 5 on.
        Default: every row alone, pairs, thirds, up to 12 single cuts, and two random cuts that are the same
        every time.

    Raises
    ------
    AssertionError
        Two cuts gave different tables; the message holds the cut and the rows that differ.

    Examples
    --------
    >>> frame = pd.DataFrame({"sku": ["a", "b", "a"], "qty": [1, 2, 3]})
    >>> check_batch_equivalence(lambda df: df[df.qty > 1], frame)
    >>> check_batch_equivalence(lambda df: df.groupby("sku", as_index=False).qty.sum(), frame, key="sku")
    Traceback (most recent call last):
        ...
    AssertionError: The table depends on the batches. ...
    """
    n_rows = len(frame)
    source_rows, schema = _records(frame)
    with tempfile.TemporaryDirectory(prefix="kframe-equivalence-") as folder:

        def table(i: int, cut: Sequence[int]) -> pd.DataFrame:
            return _run(step, source_rows, schema, key, cut, os.path.join(folder, f"{i}.duckdb"))

        whole = table(0, ())
        for i, cut in enumerate(_cuts(n_rows) if cuts is None else cuts, 1):
            told = difference(table(i, cut), whole)
            if told:
                raise AssertionError(
                    f"The table depends on the batches. Cut at {list(cut)} (rows {_show(cut, n_rows)}), "
                    f"compared with one pass over all {n_rows} rows: {told}"
                )


class _CutLog(MemorySource):
    """A log whose batches end where it is told."""

    def __init__(self, values: Sequence[Any], cut: Sequence[int]) -> None:
        super().__init__({_TOPIC: values})
        self._ends = sorted({c for c in cut if 0 < c < len(values)} | {len(values)})

    def fetch(self, plan: tuple[OffsetRange, ...], stopped: Callable[[], bool]) -> Fetched:
        end = next(e for e in self._ends if e > plan[0].start)
        return super().fetch(tuple(r._replace(stop=min(end, r.stop)) for r in plan), stopped)


def _run(
    step: Step,
    values: Sequence[Any],
    schema: dict[str, str],
    key: str | Sequence[str] | None,
    cut: Sequence[int],
    path: str,
) -> pd.DataFrame:
    with Pipeline(path, source=_CutLog(values, cut), batch_rows_max=max(1, len(values))) as pipeline:
        pipeline.topic(_TOPIC, schema=schema)
        pipeline.table(_TABLE, key=key, inputs=[_TOPIC])(step)
        report = pipeline.run(progress=False)
        assert report.dead_letters == 0, pipeline.dead_letters()["error"].iloc[0]
        found = pipeline.sql("SELECT 1 FROM duckdb_tables() WHERE schema_name = 'main'").df()
        return pd.DataFrame() if found.empty else pipeline.read(_TABLE)


def _cuts(n_rows: int) -> list[tuple[int, ...]]:
    """Cuts that between them show most ways in which a step can depend on its batches."""
    random = np.random.default_rng(0)
    found = [tuple(range(1, n_rows)) if n_rows <= 100 else tuple(range(0, n_rows, n_rows // 100))]
    found += [
        tuple(range(size, n_rows, size)) for size in (2, math.ceil(n_rows / 3)) if 0 < size < n_rows <= 200
    ]
    found += [(int(c),) for c in np.unique(np.linspace(1, max(1, n_rows - 1), _MOST_SINGLE_CUTS, dtype=int))]
    found += [tuple(int(c) for c in np.sort(random.integers(0, n_rows + 1, 3))) for _ in range(2)]
    return list(dict.fromkeys(found)) if n_rows > 1 else []


def _show(cut: Sequence[int], n_rows: int) -> str:
    edges = [0, *sorted({c for c in cut if 0 < c < n_rows}), n_rows]
    told = [f"[{a}, {b})" for a, b in itertools.pairwise(edges)]
    return " ".join(told[:8]) + (" ..." if len(told) > 8 else "")


def _records(frame: pd.DataFrame) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A frame's rows as JSON objects, and the schema that reads them back."""
    table = from_pandas(frame.reset_index(drop=True), "frame")
    schema = {f.name: _type_text(f.name, f.type) for f in table.schema}
    return [{k: _json(v) for k, v in row.items()} for row in table.to_pylist()], schema


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_json(v) for v in value]
    if isinstance(value, (dt.datetime, dt.date)):
        return value.isoformat()
    return value  # a Decimal is written as text by the log, which keeps its digits


def _type_text(column: str, type_: pa.DataType) -> str:
    for is_type, text in _TEXTS:
        if is_type(type_):
            return text
    if pa.types.is_integer(type_) or pa.types.is_decimal(type_):
        return str(type_).replace("decimal128", "decimal").replace(" ", "")
    if pa.types.is_timestamp(type_):
        return f"timestamp[us{', UTC' if type_.tz else ''}]"
    if pa.types.is_list(type_) or pa.types.is_large_list(type_):
        return f"list<{_type_text(column, type_.value_type)}>"
    if pa.types.is_struct(type_):
        return f"struct<{', '.join(f'{f.name}: {_type_text(column, f.type)}' for f in type_)}>"
    raise SchemaError(
        f"Column {column!r} of the frame has type {type_}, which no record carries.", hint="Convert it."
    )


_TEXTS: tuple[tuple[Callable[[pa.DataType], bool], str], ...] = (
    (pa.types.is_string, "str"),
    (pa.types.is_large_string, "str"),
    (pa.types.is_null, "str"),
    (pa.types.is_boolean, "bool"),
    (pa.types.is_floating, "float64"),
    (pa.types.is_date, "date"),
)
