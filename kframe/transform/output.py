"""Steps whose rows leave: no table keeps them. And what users see change when a step's state does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from kframe.model import OUTPUT, Change
from kframe.transform.aggregate import Aggregate
from kframe.transform.algebra import STATE_SCHEMA, Incremental
from kframe.transform.rows import RowStep
from kframe.transform.step import Step


@dataclass(frozen=True)
class Output(RowStep):
    """A user's function from DataFrames to the records of one topic. Its ``key`` is always empty: rows of the
    same record key all leave, in order."""

    record_key: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """Changes when the function's source, its inputs or the records' key do."""
        return f"{super().fingerprint()}|{self.record_key}"

    def merge(self, cur: Any, rows: pa.Table) -> list[Change]:
        """All rows, for no table."""
        return [Change(self.name, rows, schema=OUTPUT)] if rows.num_columns else []


def shown_key(step: Step) -> tuple[str, ...]:
    """The key of a step's table as users see it; empty where rows are only added.

    Raises
    ------
    DefinitionError
        An aggregate that does not show its group columns: its rows cannot be told apart elsewhere.
    """
    if isinstance(step, Aggregate | Incremental):
        return (step.plan if isinstance(step, Aggregate) else step).shown_key()
    return step.key if isinstance(step, RowStep) else ()


def stored(steps: Iterable[Step]) -> Iterator[Change]:
    """The tables in which steps keep rows, each as a change without rows: its name, schema and key."""
    nothing = pa.table({})
    for step in (s for s in steps if not isinstance(s, Output)):
        plan = step.plan if isinstance(step, Aggregate) else step
        if isinstance(plan, Incremental):
            yield Change(plan.name, nothing, plan.key, schema=STATE_SCHEMA)
            yield from (
                Change(f"{plan.name}:{label}", nothing, schema=STATE_SCHEMA) for label in plan.distinct
            )
        else:
            yield Change(step.name, nothing, step.key if isinstance(step, RowStep) else ())


def shown(
    cur: duckdb.DuckDBPyConnection, steps: Iterable[Step], changes: Sequence[Change], wanted: set[str]
) -> list[Change]:
    """The changes of the tables in `wanted` as users see them: an aggregate's finished rows, not its state.

    Parameters
    ----------
    cur : DuckDBPyConnection
        Any; nothing is read from the store.
    """
    plans = {s.name: s.plan if isinstance(s, Aggregate) else s for s in steps}
    found = []
    for change in (c for c in changes if c.table in wanted):
        plan = plans.get(change.table)
        if change.schema == STATE_SCHEMA and isinstance(plan, Incremental):
            found.append(plan.shown(cur, change.rows))
        else:
            found.append(change)
    return found
