"""pandas named aggregation, kept incrementally."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import duckdb
import pyarrow as pa

from kframe.errors import DefinitionError
from kframe.model import Change
from kframe.transform.algebra import Incremental
from kframe.transform.parts import Measure, quote

FUNCTIONS = ("count", "size", "sum", "min", "max", "mean", "var", "std", "first", "last", "nunique")


class Aggregate:
    """A table with one row per group, equal to one ``groupby(by, dropna=False).agg(...)`` over the topic.

    Parameters
    ----------
    name : str
        The table (a view over the state).
    source : str
        The topic.
    by : str or sequence of str
        Group columns. Rows where one is missing make a group of their own (``dropna=False``).
    measures : mapping of str to (column, function)
        pandas named aggregation. Functions: count, size, sum, min, max, mean, var, std, first, last, nunique.

    Raises
    ------
    DefinitionError
        An unknown function, no group column, or two columns of the same name.

    Notes
    -----
    As in pandas, missing values (NULL, NaN) of a measure are skipped; the sum of nothing is 0; mean, min,
    max, first and last of nothing, and var and std (``ddof=1``) of fewer than two values, are NULL.
    Where it differs: integers stay ``int64`` and a sum that does not fit fails the batch rather
    than wrapping; ``decimal(p,s)`` sums exactly to ``decimal(38,s)``; ``first`` and ``last`` go by
    (`_timestamp`, `_partition`, `_offset`), so they do not depend on how the log was cut into batches.
    ``nunique`` is exact: it keeps each distinct pair of group and value.

    Examples
    --------
    >>> Aggregate("revenue", source="orders", by="sku", measures={"total": ("amount", "sum")}).key
    ('sku',)
    """

    def __init__(
        self,
        name: str,
        *,
        source: str,
        by: str | Sequence[str],
        measures: Mapping[str, tuple[str, str]],
    ) -> None:
        self.by = (by,) if isinstance(by, str) else tuple(by)
        self.measures = dict(measures)
        _check(name, self.by, self.measures)
        kept = {output: _measure(column, function) for output, (column, function) in self.measures.items()}
        labels = dict.fromkeys(m.label for m in kept.values() if m.label)
        outputs = [(column, quote(column)) for column in self.by]
        outputs += [(output, quote(measure.slot)) for output, measure in kept.items()]
        self.plan = Incremental(
            name=name,
            topics=(source,),
            tables=(),
            source=quote(source),
            topic=quote(source),
            keys=tuple((column, f"{quote(source)}.{quote(column)}") for column in self.by),
            arguments=tuple((label, f"{quote(source)}.{quote(label)}") for label in labels),
            measures=tuple(dict.fromkeys(kept.values())),
            outputs=tuple(outputs),
            pandas=True,
        )

    @property
    def name(self) -> str:
        return self.plan.name

    @property
    def topics(self) -> tuple[str, ...]:
        return self.plan.topics

    @property
    def tables(self) -> tuple[str, ...]:
        return self.plan.tables

    @property
    def key(self) -> tuple[str, ...]:
        return self.plan.key

    @property
    def state_tables(self) -> tuple[str, ...]:
        return self.plan.state_tables

    def __repr__(self) -> str:
        return f"<Aggregate {self.name} of {self.topics[0]} by {', '.join(self.by)}>"

    def fingerprint(self) -> str:
        """The definition as stable text."""
        return self.plan.fingerprint()

    def form(self) -> str:
        """See `Incremental.form`."""
        return self.plan.form()

    def ddl(self, schemas: Mapping[str, pa.Schema] | None = None) -> list[str]:
        """See `Incremental.ddl`."""
        return self.plan.ddl(schemas)

    def partial(
        self,
        con: duckdb.DuckDBPyConnection,
        frames: Mapping[str, pa.Table],
        tables: Mapping[str, pa.Table] | None = None,
    ) -> pa.Table:
        """See `Incremental.partial`."""
        return self.plan.partial(con, frames)

    def combine(self, con: duckdb.DuckDBPyConnection, partials: Sequence[pa.Table]) -> pa.Table:
        """See `Incremental.combine`."""
        return self.plan.combine(con, partials)

    def merge(self, cur: duckdb.DuckDBPyConnection, partial: pa.Table) -> list[Change]:
        """See `Incremental.merge`."""
        return self.plan.merge(cur, partial)


def _measure(column: str, function: str) -> Measure:
    return Measure("size") if function == "size" else Measure(function, column)


def _check(name: str, by: Sequence[str], measures: Mapping[str, tuple[str, str]]) -> None:
    if not by or not measures:
        missing = "group column (by=)" if not by else "measure"
        raise DefinitionError(
            f"aggregate {name!r} has no {missing}",
            hint='Write by="sku", n=("sku", "count").',
        )
    for output, pair in measures.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise DefinitionError(
                f"aggregate {name!r}: {output}={pair!r} is not a (column, function) pair",
                hint='Write it as pandas does: total=("amount", "sum").',
            )
        if pair[1] not in FUNCTIONS:
            raise DefinitionError(
                f"aggregate {name!r}: {output} uses {pair[1]!r}, which cannot be kept incrementally",
                hint=f"Functions: {', '.join(FUNCTIONS)}. For others, land the topic and query it.",
            )
    _check_names(name, [*by, *measures])
    _check_names(name, sorted({column for column, _ in measures.values()}))


def _check_names(name: str, columns: Sequence[str]) -> None:
    seen: set[str] = set()
    for column in columns:
        if column.casefold() in seen:
            raise DefinitionError(
                f"aggregate {name!r} has two columns named {column!r}",
                hint="Rename one; DuckDB does not tell upper from lower case.",
            )
        seen.add(column.casefold())
