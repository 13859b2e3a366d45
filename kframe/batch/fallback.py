"""A quick way for most values, and a slower one for those that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

Decode = Callable[[pa.ChunkedArray], tuple[pa.Table, Any, dict[int, str]]]
"""From values (no nulls; binary or texts) to the rows that fit, which they are, and why the others don't."""


def completed(
    values: pa.ChunkedArray, rows: pa.Table, taken: Any, others: Decode
) -> tuple[pa.Table, Any, dict[int, str]]:
    """What a quick way has taken, and what `others` makes of the rest, as one `Decode` would give it.

    Parameters
    ----------
    values : ChunkedArray, shape (n,)
    rows : Table, shape (n_taken, n_columns)
        In order.
    taken : bool array, shape (n,)
        Which values they are of.
    others : Decode
        Its rows are cast to the types of `rows`.
    """
    if taken.all():
        return rows, taken, {}
    more, fits, errors = others(values.filter(pa.array(~taken)))  # take() would copy all chunks into one
    left = np.flatnonzero(~taken)
    if len(more):
        order = np.concatenate([np.flatnonzero(taken), left[fits]]).argsort()
        rows = pa.concat_tables([rows, more.cast(rows.schema)]).take(pa.array(order)) if len(rows) else more
    good = taken.copy()
    good[left[fits]] = True
    return rows, good, {int(left[i]): told for i, told in errors.items()}
