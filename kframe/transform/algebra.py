"""Aggregates as a merge algebra: partials anywhere, one merge, and a view that finalises.

An aggregate is a handful of *parts* (count, sum, mean, M2, ...), each of them one column of a state table.
A part knows how it is computed from rows and how two of its values become one; a measure knows the parts it
needs and the expression that finalises them. Nothing here writes: `Incremental.merge` returns `Change`s.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce

import duckdb
import pyarrow as pa

from kframe.errors import DefinitionError, SchemaError
from kframe.model import Change
from kframe.transform.parts import (
    FLOATS,
    INTEGERS,
    NUMERIC_ONLY,
    Measure,
    Part,
    final_of,
    parts_of,
    quote,
    size_part,
)

STATE_SCHEMA = "_state"
_PLACE = "_kframe_rowid"
EVERYTHING = "group:all"
"""The only key column of an aggregate without groups."""

_ORDER = "{{'t': coalesce(epoch_ms({0}._timestamp), -1), 'p': {0}._partition, 'o': {0}._offset}}"
_DESCENDING = "{{'t': -coalesce(epoch_ms({0}._timestamp), -1), 'p': -{0}._partition, 'o': -{0}._offset}}"


@contextmanager
def registered(con: duckdb.DuckDBPyConnection, table: pa.Table, name: str | None = None) -> Iterator[str]:
    """Show an Arrow table to `con`, under a private name unless one is given; yields it quoted."""
    view = name if name is not None else f"_kframe_{uuid.uuid4().hex}"
    con.register(view, table)
    try:
        yield quote(view)
    finally:
        con.unregister(view)


@dataclass(frozen=True)
class Bound:
    """An `Incremental` with the types of its inputs known."""

    select: str
    parts: tuple[Part, ...]
    distinct: tuple[str, ...]
    finals: Mapping[str, str]


@dataclass(frozen=True)
class Incremental:
    """A grouped aggregation of one topic, kept incrementally.

    Parameters
    ----------
    name : str
        The view that users read; its state lives in tables of the same name in schema ``_state``.
    topics : tuple of str
        The one topic.
    tables : tuple of str
        Tables read as a snapshot (lookup joins); pass them to `partial`.
    source : str
        SQL after ``FROM``, with its ``WHERE``.
    topic : str
        The topic's alias in `source`, quoted.
    keys, arguments : tuple of (name, expression)
        Group keys, and the columns that measures aggregate.
    measures : tuple of Measure
    outputs : tuple of (name, expression)
        The view's columns, over the keys and the measures' slots.
    having : str
        A filter of the view.
    pandas : bool
        NaN is missing, and the sum of nothing is 0; else as SQL has it.
    not_columns : tuple of str
        Aliases that were taken as group keys: refused when they turn out to name a column too.

    Notes
    -----
    Immutable and picklable: partials may be computed in other threads, processes or machines.
    """

    name: str
    topics: tuple[str, ...]
    tables: tuple[str, ...]
    source: str
    topic: str
    keys: tuple[tuple[str, str], ...]
    arguments: tuple[tuple[str, str], ...]
    measures: tuple[Measure, ...]
    outputs: tuple[tuple[str, str], ...]
    having: str = ""
    pandas: bool = False
    not_columns: tuple[str, ...] = ()
    _bound: dict[str, Bound] = field(default_factory=dict, compare=False, repr=False)
    _seen: dict[str, pa.Schema] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if ":" in self.name:
            raise DefinitionError(f"an aggregate cannot be named {self.name!r}", hint="Leave the colon out.")

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.keys) or (EVERYTHING,)

    @property
    def distinct(self) -> tuple[str, ...]:
        """The labels whose distinct values are kept."""
        return tuple(dict.fromkeys(m.label for m in self.measures if m.function == "nunique"))

    @property
    def state_tables(self) -> tuple[str, ...]:
        """The state table, then a table of distinct values for each label of `distinct`."""
        return (self.name, *(f"{self.name}:{label}" for label in self.distinct))

    def fingerprint(self) -> str:
        """The definition as stable text."""
        return repr((1, self.source, self.keys, self.arguments, self.measures, self.outputs, self.having))

    def form(self) -> str:
        """What the groups are by, and what each column of the state is made of."""
        of = dict(self.arguments)
        kept = [f"{m.function}({', '.join(of[x] for x in (m.label, m.by) if x)})" for m in self.measures]
        kept = sorted(kept) if self.pandas else kept  # in SQL an argument's place is its label
        return f"groups by {', '.join(sql for _, sql in self.keys) or 'nothing'} of {', '.join(kept)}"

    # --- binding: expressions meet types -------------------------------------------------------------

    def _rows(self) -> str:
        """The SELECT whose rows are aggregated: keys, then arguments, then the place in the log."""
        columns = [f"{sql} AS {quote(name)}" for name, sql in self.keys]
        columns += [] if self.keys else [f"CAST(0 AS TINYINT) AS {quote(EVERYTHING)}"]
        columns += [f"{sql} AS {quote(':' + label)}" for label, sql in self.arguments]
        places = {m.function for m in self.measures} & {"first", "last", "first_row", "last_row", "arg_min"}
        if places:
            columns.append(f'{_ORDER.format(self.topic)} AS ":order"')
        if any(m.function == "arg_max" for m in self.measures):
            columns.append(f'{_DESCENDING.format(self.topic)} AS ":descending"')
        return f"SELECT {', '.join(columns)} FROM {self.source}"

    def _describe(self, con: duckdb.DuckDBPyConnection) -> dict[str, str]:
        try:
            rows = con.execute(f"DESCRIBE {self._rows()}").fetchall()
        except duckdb.Error as error:
            raise DefinitionError(
                f"table {self.name!r} does not fit its input: {error}",
                hint=f"Check the columns that it names against {', '.join(self.topics + self.tables)}.",
            ) from error
        self._refuse_ambiguous(con)
        return {str(row[0]): str(row[1]) for row in rows}

    def _refuse_ambiguous(self, con: duckdb.DuckDBPyConnection) -> None:
        for alias in self.not_columns:
            try:
                con.execute(f"DESCRIBE SELECT {quote(alias)} FROM {self.source}").fetchall()
            except duckdb.Error:
                continue
            raise DefinitionError(
                f"table {self.name!r} groups by {alias!r}, which is a column and another column's alias",
                hint="Rename the alias, or write the whole expression after GROUP BY.",
            )

    def _bind(self, con: duckdb.DuckDBPyConnection, schemas: Mapping[str, pa.Schema]) -> Bound:
        names = (*self.topics, *self.tables)
        text = "\n".join(schemas[name].to_string(show_schema_metadata=False) for name in names)
        if text not in self._bound:
            self._seen.update(schemas)
            self._bound[text] = self._bind_types(self._describe(con))
        return self._bound[text]

    def _bind_types(self, types: Mapping[str, str]) -> Bound:
        columns = ", ".join(self._clean(name, type_) for name, type_ in types.items())
        parts: dict[str, Part] = {}
        for measure in self.measures:
            type_ = types.get(f":{measure.label}", "")
            self._check_type(measure, type_)
            parts |= {part.column: part for part in parts_of(measure, type_)}
        parts = parts or {":size": size_part()}
        finals = {m.slot: final_of(m, empty_sum_is_zero=self.pandas) for m in self.measures}
        clash = {c.casefold() for c in (*parts, *finals)} & {k.casefold() for k in self.key}
        if clash:
            raise DefinitionError(
                f"table {self.name!r} needs the state column {sorted(clash)[0]!r}, which is a group key",
                hint="Rename that key.",
            )
        return Bound(f"SELECT {columns} FROM ({self._rows()})", tuple(parts.values()), self.distinct, finals)

    def _clean(self, name: str, type_: str) -> str:
        column = quote(name)
        if type_ in FLOATS and self.pandas:
            return f"CASE WHEN isnan({column}) THEN NULL ELSE {column} END AS {column}"
        return f"CAST({column} AS VARCHAR) AS {column}" if type_.startswith("ENUM") else column

    def _check_type(self, measure: Measure, type_: str) -> None:
        number = type_ in INTEGERS | FLOATS | {"BOOLEAN"} or type_.startswith("DECIMAL")
        if measure.function not in NUMERIC_ONLY or number:
            return
        expression = dict(self.arguments)[measure.label]
        raise DefinitionError(
            f"table {self.name!r}: {measure.function} of {expression} has type {type_}, not a number",
            hint="Declare the field as a number in the topic's schema, or use count, min, max or nunique.",
        )

    # --- tables ------------------------------------------------------------------------------------

    def ddl(self, schemas: Mapping[str, pa.Schema] | None = None) -> list[str]:
        """SQL that makes the schema, the state tables and the view; running it again changes nothing.

        Parameters
        ----------
        schemas : mapping of str to Schema, optional
            The frames' schemas, for each of `topics` and `tables`. Without it those last seen by `partial`;
            nothing when it has not run yet.
        """
        if schemas is None and not self._bound:
            return []
        with duckdb.connect() as con:
            con.execute("SET TimeZone = 'UTC'")
            known = schemas if schemas is not None else self._seen
            empty = {name: known[name].empty_table() for name in (*self.topics, *self.tables)}
            partial = self.partial(con, empty, empty)
            bound = self._last_bound()
            with registered(con, partial) as view:
                types = con.execute(f"DESCRIBE {self._merge_sql(bound, view, None, {})}").fetchall()
                pairs = [
                    (x, con.execute(f"DESCRIBE {self._pairs(x, view)}").fetchall()) for x in self.distinct
                ]
        made = [f"CREATE SCHEMA IF NOT EXISTS {quote(STATE_SCHEMA)}", _create(self.name, types)]
        made += [_create(f"{self.name}:{label}", columns) for label, columns in pairs]
        return [*made, self._view(bound)]

    def _view(self, bound: Bound) -> str:
        state = _state(self.name)
        state = state if self.keys else f"(SELECT 1) LEFT JOIN {state} ON true"
        return (
            f"CREATE OR REPLACE VIEW main.{quote(self.name)} AS "
            f"{self._finished(bound, state, self.having or 'true')}"
        )

    def _finished(self, bound: Bound, state: str, where: str) -> str:
        """The SELECT that users see, over rows of the state."""
        inner = [quote(name) for name in self.key]
        inner += [f"{sql} AS {quote(slot)}" for slot, sql in bound.finals.items()]
        outer = ", ".join(f"{sql} AS {quote(name)}" for name, sql in self.outputs)
        return f"SELECT {outer} FROM (SELECT {', '.join(inner)} FROM {state}) WHERE {where}"

    # --- what users see ----------------------------------------------------------------------------

    def shown_key(self) -> tuple[str, ...]:
        """The view's columns that are the group keys.

        Raises
        ------
        DefinitionError
            There is no key, or the view does not show one of them.
        """
        shown = {sql: name for name, sql in reversed(self.outputs)}
        hidden = [key for key in self.key if quote(key) not in shown]
        if hidden or not self.keys:
            raise DefinitionError(
                f"Table {self.name!r} does not show {hidden[0] if self.keys else 'any group column'}, so its "
                "rows cannot be told apart elsewhere.",
                hint="Group by columns, and SELECT each of them.",
            )
        return tuple(shown[quote(key)] for key in self.key)

    def shown(self, cur: duckdb.DuckDBPyConnection, rows: pa.Table) -> Change:
        """The view's rows for whole rows of the state, as an upsert; those that HAVING hides, deleted."""
        bound, key = self._last_bound(), self.shown_key()
        with registered(cur, rows) as state:
            seen = cur.sql(self._finished(bound, state, self.having or "true")).to_arrow_table()
            if not self.having:
                return Change(self.name, seen, key)
            hidden = cur.sql(self._finished(bound, state, f"({self.having}) IS NOT TRUE")).to_arrow_table()
        return Change(self.name, seen, key, hidden.select(list(key)))

    # --- partial, combine, merge -------------------------------------------------------------------

    def partial(
        self,
        con: duckdb.DuckDBPyConnection,
        frames: Mapping[str, pa.Table],
        tables: Mapping[str, pa.Table] | None = None,
    ) -> pa.Table:
        """Aggregate some rows, anywhere.

        Parameters
        ----------
        con : DuckDBPyConnection
            In memory, in time zone UTC, and private to the caller for the time of the call.
        frames : mapping of str to Table
            The topic's rows with ``_partition``, ``_offset`` and ``_timestamp``.
        tables : mapping of str to Table, optional
            The rows of the `tables` it reads.

        Returns
        -------
        Table
            One row per group. Only `combine` and `merge` of this definition understand its columns.

        Raises
        ------
        DefinitionError
            The definition does not fit the frames' columns.
        SchemaError
            A sum overflowed.
        """
        rows = {**{name: frames[name] for name in self.topics}, **{t: (tables or {})[t] for t in self.tables}}
        with all_registered(con, rows), _overflow(self.name):
            bound = self._bind(con, {name: table.schema for name, table in rows.items()})
            return con.sql(self._partial_sql(bound)).to_arrow_table()

    def _partial_sql(self, bound: Bound) -> str:
        columns = [quote(name) for name in self.key]
        columns += [part.select(part.partial, part.wire) for part in bound.parts if part.partial]
        for label in bound.distinct:
            x = quote(f":{label}")
            columns.append(f"list(DISTINCT {x}) FILTER (WHERE {x} IS NOT NULL) AS {quote(label + ':values')}")
        return f"SELECT {', '.join(columns)} FROM ({bound.select}) GROUP BY {self._keys()}"

    def combine(self, con: duckdb.DuckDBPyConnection, partials: Sequence[pa.Table]) -> pa.Table:
        """Merge partials into one, in any order. At least one."""
        bound = self._last_bound()
        if len(partials) > 2 and any(part.column.endswith(":m2") for part in bound.parts):
            return reduce(lambda left, right: self.combine(con, [left, right]), partials)
        if len(partials) == 1:
            return partials[0]
        columns = [quote(name) for name in self.key]
        columns += [part.select(part.merge, part.wire) for part in bound.parts if part.partial]
        for label in bound.distinct:
            x = quote(label + ":values")
            columns.append(f"list_distinct(flatten(list({x}) FILTER (WHERE {x} IS NOT NULL))) AS {x}")
        with registered(con, pa.concat_tables(partials)) as view, _overflow(self.name):
            return con.sql(
                f"SELECT {', '.join(columns)} FROM {view} GROUP BY {self._keys()}"
            ).to_arrow_table()

    def merge(self, cur: duckdb.DuckDBPyConnection, partial: pa.Table) -> list[Change]:
        """What a partial changes in the state, to be written in the batch's transaction.

        Parameters
        ----------
        cur : DuckDBPyConnection
            On the store; only the rows of the partial's keys are read, nothing is written.
        partial : Table
            Of `partial` or `combine`: each key once.

        Returns
        -------
        list of Change
            An upsert of the state table, and an append of the new values of each ``nunique``.

        Raises
        ------
        SchemaError
            A sum no longer fits its column. Nothing has been written.
        """
        if not partial.num_rows:
            return []
        with registered(cur, partial) as view, _overflow(self.name):
            try:
                return self._changes(cur, view, exists=True)
            except duckdb.CatalogException:
                return self._changes(cur, view, exists=False)

    def _changes(self, cur: duckdb.DuckDBPyConnection, view: str, *, exists: bool) -> list[Change]:
        bound = self._last_bound()
        state = _state(self.name) if exists else None
        new = {
            label: cur.sql(self._new_pairs(label, view, exists)).to_arrow_table() for label in bound.distinct
        }
        with all_registered(cur, {f"_kframe_new:{label}": pairs for label, pairs in new.items()}):
            views = {label: quote(f"_kframe_new:{label}") for label in new}
            rows = cur.sql(self._merge_sql(bound, view, state, views)).to_arrow_table()
        places = rows[_PLACE] if exists else None
        rows = rows.drop_columns([_PLACE]) if exists else rows
        changes = [Change(self.name, rows, key=self.key, schema=STATE_SCHEMA, places=places)]
        changes += [
            Change(f"{self.name}:{label}", pairs, schema=STATE_SCHEMA)
            for label, pairs in new.items()
            if pairs.num_rows
        ]
        return changes

    def _pairs(self, label: str, view: str) -> str:
        return f'SELECT {self._keys()}, unnest({quote(label + ":values")}) AS ":value" FROM {view}'

    def _new_pairs(self, label: str, view: str, exists: bool) -> str:
        pairs = self._pairs(label, view)
        if not exists:
            return pairs
        state = _state(f"{self.name}:{label}")
        same = _same((*self.key, ":value"), "a", "b")
        return (
            f"WITH pairs AS MATERIALIZED ({pairs}), "
            f"known AS MATERIALIZED (SELECT a.* FROM {state} a SEMI JOIN pairs b ON {same}) "
            f"SELECT a.* FROM pairs a ANTI JOIN known b ON {same}"
        )

    def _merge_sql(self, bound: Bound, view: str, state: str | None, new: Mapping[str, str]) -> str:
        """Union the affected state rows with the partial's, and merge what has the same key."""
        keys = self._keys()
        wide = ", ".join(part.select(quote(part.column), part.wide) for part in bound.parts)
        merged = ", ".join(part.select(part.merge, part.stored) for part in bound.parts)
        rows = f"SELECT {keys}, {wide} FROM {self._counted(bound, view, new)}"
        if state is None:
            return f"SELECT {keys}, {merged} FROM ({rows}) GROUP BY {keys}"
        place = quote(_PLACE)
        hit = (
            f"SELECT a.*, a.rowid AS {place} FROM {state} a SEMI JOIN {view} b ON {_same(self.key, 'a', 'b')}"
        )
        both = (
            f"SELECT *, NULL AS {place} FROM ({rows}) UNION ALL SELECT {keys}, {wide}, {place} FROM ({hit})"
        )
        return f"SELECT {keys}, {merged}, max({place}) AS {place} FROM ({both}) GROUP BY {keys}"

    def _counted(self, bound: Bound, view: str, new: Mapping[str, str]) -> str:
        """The partial, with the number of new distinct values beside each key."""
        columns, joins = ["p.*"], ""
        for i, label in enumerate(bound.distinct):
            column = quote(f"{label}:nunique")
            columns.append(f"coalesce(n{i}.n, 0) AS {column}" if label in new else f"0 AS {column}")
            if label in new:
                counts = f"(SELECT {self._keys()}, count(*) AS n FROM {new[label]} GROUP BY {self._keys()})"
                joins += f" LEFT JOIN {counts} n{i} ON {_same(self.key, 'p', f'n{i}')}"
        return f"(SELECT {', '.join(columns)} FROM {view} p{joins})"

    def _keys(self) -> str:
        return ", ".join(quote(name) for name in self.key)

    def _last_bound(self) -> Bound:
        if not self._bound:
            raise DefinitionError(f"table {self.name!r}: call ddl() or partial() before combine() or merge()")
        return list(self._bound.values())[-1]


def _create(name: str, columns: Sequence[tuple[object, ...]]) -> str:
    body = ", ".join(f"{quote(str(column[0]))} {column[1]}" for column in columns)
    return f"CREATE TABLE IF NOT EXISTS {_state(name)} ({body})"


def _state(name: str) -> str:
    return f"{quote(STATE_SCHEMA)}.{quote(name)}"


def _same(columns: Sequence[str], left: str, right: str) -> str:
    return " AND ".join(f"{left}.{quote(c)} IS NOT DISTINCT FROM {right}.{quote(c)}" for c in columns)


@contextmanager
def all_registered(con: duckdb.DuckDBPyConnection, frames: Mapping[str, pa.Table]) -> Iterator[None]:
    for name, frame in frames.items():
        con.register(name, frame)
    try:
        yield
    finally:
        for name in frames:
            con.unregister(name)


@contextmanager
def _overflow(name: str) -> Iterator[None]:
    try:
        yield
    except (duckdb.OutOfRangeException, duckdb.ConversionException) as error:
        raise SchemaError(
            f"table {name!r}: a value no longer fits its type: {error}",
            kept="Nothing of this batch was written to it.",
            hint="Sums of integers hold 64 bits, sums of decimals 38 digits: declare the field as float64.",
        ) from error
