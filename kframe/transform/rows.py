"""Steps that turn a batch's rows into a table's rows: landing, and users' pandas functions."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from kframe.errors import DefinitionError, SchemaError
from kframe.model import PROVENANCE, Change
from kframe.transform.frames import from_pandas, index_as_columns, to_pandas

DELETED = "_tombstone"
"""A boolean column of a keyed step's result: True removes the key's row. Never stored."""


@dataclass(frozen=True)
class Land:
    """Every record of a topic, appended to a table of the topic's columns."""

    name: str
    topic: str
    include: tuple[str, ...] = ()

    @property
    def topics(self) -> tuple[str, ...]:
        """The one topic it reads."""
        return (self.topic,)

    @property
    def tables(self) -> tuple[str, ...]:
        """It reads no table."""
        return ()

    def fingerprint(self) -> str:
        """Changes when the definition does."""
        return f"land:{self.topic}"

    def form(self) -> str:
        """Rows are added."""
        return "rows"

    def partial(self, con: Any, frames: Mapping[str, pa.Table], tables: Mapping[str, pa.Table]) -> pa.Table:
        """The batch's rows themselves."""
        return visible(frames[self.topic], self.include)

    def combine(self, con: Any, partials: Sequence[pa.Table]) -> pa.Table:
        """All rows."""
        return pa.concat_tables(partials)

    def merge(self, cur: Any, rows: pa.Table) -> list[Change]:
        """All rows, appended."""
        return [Change(self.name, rows)]


def visible(frame: pa.Table, include: Sequence[str]) -> pa.Table:
    """A decoded frame without the provenance that its topic does not include."""
    return frame.drop_columns([name for name in PROVENANCE if name[1:] not in include])


@dataclass(frozen=True)
class RowStep:
    """A user's function from DataFrames to the rows of one table."""

    name: str
    function: Callable[..., pd.DataFrame | None]
    arguments: Mapping[str, str]
    """Parameter -> the topic or table whose rows it gets."""
    topics: tuple[str, ...]
    tables: tuple[str, ...]
    key: tuple[str, ...] = ()
    lookup: Mapping[str, str] = field(default_factory=dict)
    include: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Topic -> what it includes beside its schema."""

    def fingerprint(self) -> str:
        """Changes when the function's source, its inputs or its key do."""
        told = f"{_source_of(self.function)}|{self.arguments}|{self.key}|{dict(self.lookup)}"
        return hashlib.sha256(told.encode()).hexdigest()

    def form(self) -> str:
        """Rows are added, or replaced by key."""
        return f"rows by {', '.join(self.key)}" if self.key else "rows"

    def frames(
        self, frames: Mapping[str, pa.Table], tables: Mapping[str, pa.Table]
    ) -> dict[str, pd.DataFrame]:
        """The DataFrames the function is called with, by parameter."""
        rows = {**tables, **{t: visible(frames[t], self.include.get(t, ())) for t in self.topics}}
        return {parameter: to_pandas(rows[name]) for parameter, name in self.arguments.items()}

    def partial(self, con: Any, frames: Mapping[str, pa.Table], tables: Mapping[str, pa.Table]) -> pa.Table:
        """Call the function; its rows, each key at most once."""
        result = self.function(**self.frames(frames, tables))
        return pa.table({}) if result is None else self._checked(result)

    def combine(self, con: Any, partials: Sequence[pa.Table]) -> pa.Table:
        """All rows; of those with the same key the last."""
        rows = pa.concat_tables(
            [p for p in partials if p.num_columns] or partials[:1], promote_options="default"
        )
        if len(partials) == 1 or not self.key:
            return rows
        return from_pandas(to_pandas(rows).drop_duplicates(list(self.key), keep="last"), self.name)

    def merge(self, cur: Any, rows: pa.Table) -> list[Change]:
        """Rows appended, or put in the place of those with the same key."""
        if rows.num_columns == 0:
            return []
        if not self.key or DELETED not in rows.column_names:
            return [Change(self.name, rows, self.key)]
        gone = pc.fill_null(rows[DELETED], False)
        rest = rows.drop_columns([DELETED])
        return [
            Change(
                self.name, rest.filter(pc.invert(gone)), self.key, rest.filter(gone).select(list(self.key))
            )
        ]

    def _checked(self, result: pd.DataFrame) -> pa.Table:
        if not self.key or not isinstance(result, pd.DataFrame):
            return from_pandas(result, self.name)
        result = index_as_columns(result, self.name)
        missing = [k for k in self.key if k not in result.columns]
        if missing:
            raise SchemaError(
                f"Step {self.name!r} returned no column {missing[0]!r}, which is its key.",
                hint=f"Columns returned: {', '.join(map(str, result.columns)) or 'none'}.",
            )
        return from_pandas(result.drop_duplicates(list(self.key), keep="last"), self.name)


def row_step(
    name: str,
    function: Callable[..., Any],
    *,
    topics: Mapping[str, tuple[str, ...]],
    tables: Sequence[str],
    key: Sequence[str],
    inputs: Sequence[str] | None,
    lookup: Mapping[str, str],
) -> RowStep:
    """Bind a function's parameters to topics and tables by name, or to `inputs` in order.

    `topics` maps each topic to what it includes beside its schema.

    Raises
    ------
    DefinitionError
        A parameter without a default names neither, or no topic is read.
    """
    parameters = [
        p
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if inputs is not None:
        arguments = dict(zip((p.name for p in parameters), inputs, strict=False))
    else:
        known = {*topics, *tables, *lookup}
        arguments = {p.name: p.name for p in parameters if p.name in known or p.default is p.empty}
    unknown = [a for a in arguments.values() if a not in {*topics, *tables, *lookup}]
    if unknown:
        raise DefinitionError(
            f"Step {name!r}: {unknown[0]!r} names no topic or table of this pipeline.",
            hint=f"Topics: {', '.join(topics) or 'none'}; tables: {', '.join(tables) or 'none'}. "
            "Declare it first, rename the parameter, or give inputs=[...].",
        )
    read = tuple(a for a in dict.fromkeys(arguments.values()) if a in topics)
    if not read:
        raise DefinitionError(
            f"Step {name!r} reads no topic, so no record would ever run it.",
            hint="Give the function a parameter named like a topic, or inputs=[...].",
        )
    side = tuple(a for a in dict.fromkeys(arguments.values()) if a not in topics)
    return RowStep(
        name, function, arguments, read, side, tuple(key), dict(lookup), {t: topics[t] for t in read}
    )


def _source_of(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return repr((code.co_code, code.co_consts)) if code else repr(type(function))
