"""SQL steps: what one SELECT over a topic means when its records arrive in batches.

A SELECT is either an aggregation that can be kept incrementally, or row-wise and runs on each batch alone;
whatever would be silently wrong per batch is refused. DuckDB's own parser reads the query.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import duckdb
import pyarrow as pa

from kframe.errors import DefinitionError
from kframe.model import Change
from kframe.transform.algebra import Incremental, all_registered
from kframe.transform.parts import Measure
from kframe.transform.query import Node, Reader, Refused, aggregates_in, is_aggregate, parse, text_of

SqlAggregate = Incremental

_FUNCTIONS = {
    "count_star": "size",
    "count": "count",
    "sum": "sum",
    "min": "min",
    "max": "max",
    "avg": "mean",
    "mean": "mean",
    "stddev": "std",
    "stddev_samp": "std",
    "stddev_pop": "std_pop",
    "variance": "var",
    "var_samp": "var",
    "var_pop": "var_pop",
    "any_value": "first",
    "first": "first_row",
    "arbitrary": "first_row",
    "last": "last_row",
    "bool_and": "min",
    "bool_or": "max",
    "count_if": "sum",
    "countif": "sum",
    "arg_min": "arg_min",
    "argmin": "arg_min",
    "min_by": "arg_min",
    "arg_max": "arg_max",
    "argmax": "arg_max",
    "max_by": "arg_max",
}
_PLACED = {"first", "first_row", "last_row", "arg_min", "arg_max"}
_LATER = "Land the topic with land(), and run this query with sql() when you read."


@dataclass(frozen=True)
class SqlRows:
    """A row-wise SELECT: each batch's result is appended to the table."""

    name: str
    query: str
    topics: tuple[str, ...]
    tables: tuple[str, ...]

    def fingerprint(self) -> str:
        """The definition as stable text."""
        return repr((1, self.query))

    def form(self) -> str:
        """Rows are added."""
        return "rows"

    def ddl(self, schemas: Mapping[str, pa.Schema] | None = None) -> list[str]:
        """Nothing: the writer makes the table."""
        return []

    def partial(
        self,
        con: duckdb.DuckDBPyConnection,
        frames: Mapping[str, pa.Table],
        tables: Mapping[str, pa.Table] | None = None,
    ) -> pa.Table:
        """The rows that some records give. `con`: in memory, in time zone UTC, private."""
        rows = {**{name: frames[name] for name in self.topics}, **{t: (tables or {})[t] for t in self.tables}}
        with all_registered(con, rows):
            try:
                return con.sql(self.query).to_arrow_table()
            except (duckdb.BinderException, duckdb.CatalogException) as error:
                raise DefinitionError(
                    f"table {self.name!r} does not fit its input: {error}",
                    hint=f"Check the columns that it names against {', '.join(rows)}.",
                ) from error

    def combine(self, con: duckdb.DuckDBPyConnection, partials: Sequence[pa.Table]) -> pa.Table:
        """All rows, in the order given."""
        return pa.concat_tables(partials)

    def merge(self, cur: duckdb.DuckDBPyConnection, partial: pa.Table) -> list[Change]:
        """The rows, to be appended."""
        return [Change(self.name, partial)] if partial.num_rows else []


def sql_step(
    name: str, query: str, topics: Collection[str], tables: Collection[str] | None = None
) -> Incremental | SqlRows:
    """Find out how to keep the result of a SELECT over one topic.

    Parameters
    ----------
    name : str
        The table.
    query : str
        One SELECT that reads one topic, and tables of the pipeline by lookup joins if need be.
    topics : collection of str
        The pipeline's topics. Every other name after FROM or JOIN is taken for a table.
    tables : collection of str, optional
        The pipeline's tables; when given, a name that is neither is refused.

    Returns
    -------
    Incremental or SqlRows
        With aggregates or GROUP BY: kept incrementally, equal to one pass over the whole topic. Without: run
        on each batch, the rows appended. `tables` are read as they stand when the batch runs.

    Raises
    ------
    DefinitionError
        The query cannot be kept so that it equals one pass over the whole topic; the text says why and
        what to do instead.

    Notes
    -----
    As in SQL, the sum of nothing is NULL and NULLs make a group. An aggregate without GROUP BY is one row,
    also before the first record. Sums of integers are BIGINT, and fail the batch when they do not fit.
    ``first``, ``last``, ``any_value`` and ties of ``arg_min`` and ``arg_max`` go by the order of the log
    (`_timestamp`, `_partition`, `_offset`). HAVING and expressions over aggregates are part of the view.
    """
    try:
        node = parse(query)
        reader = Reader({topic.casefold(): topic for topic in topics})
        reader.check(node)
        topic = reader.only_topic()
        _check_tables(reader.tables, tables)
        if not is_aggregate(node):
            return SqlRows(name, query, (topic,), tuple(reader.tables))
        return _Rewriter(node, reader).incremental(name, topic)
    except Refused as refused:
        raise DefinitionError(f"SQL table {name!r}: {refused}", hint=refused.hint or _LATER) from None


def _check_tables(read: Collection[str], known: Collection[str] | None) -> None:
    unknown = [table for table in read if known is not None and table not in known]
    if unknown:
        raise Refused(
            f"{unknown[0]!r} is neither a topic nor a table of the pipeline",
            f"Tables: {', '.join(known or ()) or 'none'}.",
        )


@dataclass
class _Rewriter:
    """Splits an aggregation into keys, arguments and measures, and what is left for the view."""

    node: Node
    reader: Reader
    keys: list[Node] = field(default_factory=list)
    arguments: dict[str, str] = field(default_factory=dict)
    """SQL of an argument -> its label."""
    measures: list[Measure] = field(default_factory=list)
    not_columns: list[str] = field(default_factory=list)

    def incremental(self, name: str, topic: str) -> Incremental:
        if self.node["cte_map"]["map"]:
            raise Refused("WITH in front of an aggregation", "Write it as a subquery after FROM.")
        self.keys = list(self._group_keys())
        self._check_keys()
        outputs = [(_title(item), text_of(self._rewrite(item, ()))) for item in self.node["select_list"]]
        having = self.node["having"]
        condition = text_of(self._rewrite(having, ())) if having else ""
        _check_titles([title for title, _ in outputs])
        return Incremental(
            name=name,
            topics=(topic,),
            tables=tuple(self.reader.tables),
            source=self._source(),
            topic=self.reader.alias or "",
            keys=tuple((f"group:{i}", text_of(key)) for i, key in enumerate(self.keys)),
            arguments=tuple((label, sql) for sql, label in self.arguments.items()),
            measures=tuple(dict.fromkeys(self.measures)),
            outputs=tuple(outputs),
            having=condition,
            not_columns=tuple(self.not_columns),
        )

    def _source(self) -> str:
        whole = parse("SELECT 1 FROM t")
        whole["from_table"], whole["where_clause"] = self.node["from_table"], self.node["where_clause"]
        return text_of(whole, whole=True).removeprefix("SELECT 1 FROM ")

    # --- GROUP BY ----------------------------------------------------------------------------------

    def _group_keys(self) -> Iterator[Node]:
        items = self.node["select_list"]
        if len(self.node["group_sets"]) > 1:
            raise Refused("GROUPING SETS, ROLLUP and CUBE", "Write one table for each set of groups.")
        if self.node["aggregate_handling"] == "FORCE_AGGREGATES":
            yield from (item for item in items if not list(aggregates_in(item)))
        for expression in self.node["group_expressions"]:
            yield self._resolve(expression, items)

    def _check_keys(self) -> None:
        if any(key["class"] == "STAR" for key in self.keys):
            raise Refused("* beside aggregates", "Name the columns.")

    def _resolve(self, expression: Node, items: Sequence[Node]) -> Node:
        """``GROUP BY 1`` and ``GROUP BY alias`` as the expression they stand for."""
        place = _integer(expression)
        if place is not None:
            if not 1 <= place <= len(items):
                raise Refused(f"GROUP BY {place}, but there are {len(items)} columns")
            return items[place - 1]
        item = self._aliased(expression)
        if item is None or _same(item, expression):
            return expression
        self.not_columns.append(item["alias"])
        return item

    def _aliased(self, expression: Node) -> Node | None:
        if expression["class"] != "COLUMN_REF" or len(expression["column_names"]) > 1:
            return None
        name = expression["column_names"][0].casefold()
        return next((i for i in self.node["select_list"] if i["alias"].casefold() == name), None)

    # --- the select list ---------------------------------------------------------------------------

    def _rewrite(self, expression: Any, inside: tuple[str, ...]) -> Any:
        """The expression over keys and measures; `inside` are the aliases being expanded."""
        if isinstance(expression, list):
            return [self._rewrite(item, inside) for item in expression]
        if not isinstance(expression, dict):
            return expression
        for i, key in enumerate(self.keys):
            if "class" in expression and _same(key, expression):
                return _column(f"group:{i}")
        if next(aggregates_in(expression), None) is expression:
            return _column(self._measure(expression))
        if expression.get("class") in ("SUBQUERY", "STAR"):
            raise Refused(
                f"{'a subquery' if expression['class'] == 'SUBQUERY' else '*'} beside aggregates",
                "Name columns; join the table after FROM, or use it in sql() when you read.",
            )
        if expression.get("class") == "COLUMN_REF":
            return self._expand(expression, inside)
        return {name: self._rewrite(value, inside) for name, value in expression.items()}

    def _expand(self, column: Node, inside: tuple[str, ...]) -> Any:
        item = self._aliased(column)
        if item is None or item["alias"] in inside:
            raise Refused(
                f"{text_of(column)} is neither grouped nor aggregated",
                "Add it to GROUP BY, or wrap it in any_value().",
            )
        return self._rewrite(item, (*inside, item["alias"]))

    def _measure(self, call: Node) -> str:
        sql_name = call["function_name"].lower()
        function = _FUNCTIONS.get(sql_name)
        if function is None:
            raise Refused(
                f"{sql_name}() needs all rows at once and cannot be kept incrementally",
                f"Functions: {', '.join(sorted(_FUNCTIONS))}, count(DISTINCT x). For others: {_LATER}",
            )
        if call["order_bys"]["orders"]:
            raise Refused(f"{sql_name}(... ORDER BY ...)", "Use arg_min(value, by) or arg_max(value, by).")
        if call["distinct"] and function not in ("min", "max"):
            if function != "count":
                raise Refused(f"{sql_name}(DISTINCT ...)", f"Only count(DISTINCT x) is kept. {_LATER}")
            function = "nunique"
        measure = self._with_arguments(sql_name, function, call)
        self.measures.append(measure)
        return measure.slot

    def _with_arguments(self, sql_name: str, function: str, call: Node) -> Measure:
        values = [argument["expression"] for argument in call["arguments"]]
        wanted = 2 if function.startswith("arg_") else 0 if function == "size" else 1
        if len(values) != wanted:
            raise Refused(f"{sql_name}() with {len(values)} arguments", f"Give it {wanted}.")
        if function in _PLACED and self.reader.alias is None:
            raise Refused(
                f"{sql_name}() over a subquery", "Its place in the log is not known: read the topic itself."
            )
        if function == "size" and call["filter"] is None:
            return Measure("size")
        labels = [self._label(_argument(sql_name, text_of(x), call["filter"])) for x in values or [_ONE]]
        return Measure("count" if function == "size" else function, *labels)

    def _label(self, sql: str) -> str:
        return self.arguments.setdefault(sql, f"a{len(self.arguments)}")


_ONE: Node = parse("SELECT 1")["select_list"][0]


def _argument(sql_name: str, x: str, condition: Node | None) -> str:
    """The argument as a column whose NULLs are skipped."""
    if sql_name in ("count_if", "countif"):
        x = f"CAST(CAST({x} AS BOOLEAN) AS INTEGER)"
    elif sql_name in ("bool_and", "bool_or"):
        x = f"CAST({x} AS BOOLEAN)"
    elif sql_name in ("first", "arbitrary", "last") and condition is not None:
        raise Refused(f"{sql_name}(...) FILTER", "Use any_value(x) FILTER (...), or arg_max(x, _offset).")
    return x if condition is None else f"CASE WHEN {text_of(condition)} THEN {x} END"


def _title(item: Node) -> str:
    if item["alias"]:
        return str(item["alias"])
    return str(item["column_names"][-1]) if item["class"] == "COLUMN_REF" else text_of(item)


def _check_titles(titles: Sequence[str]) -> None:
    seen = [title.casefold() for title in titles]
    twice = [title for title in titles if seen.count(title.casefold()) > 1]
    if twice:
        raise Refused(f"two columns are named {twice[0]!r}", "Give them names with AS.")


def _column(name: str) -> Node:
    reference: Node = parse("SELECT c")["select_list"][0]
    reference["column_names"] = [name]
    return reference


def _integer(expression: Node) -> int | None:
    literal = expression.get("literal")
    if expression["class"] != "CONSTANT" or not literal or literal["kind"] != "INTEGER":
        return None
    return int(literal["text"])


def _same(left: Any, right: Any) -> bool:
    """Whether two expressions are the same text to a reader: aliases and places in the query don't count."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.get("class") == right.get("class") == "COLUMN_REF":
            return _same_column(left["column_names"], right["column_names"])
        return all(_same(left[k], right.get(k)) for k in left if k != "alias" and "location" not in k)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    return json.dumps(left) == json.dumps(right)


def _same_column(left: Sequence[str], right: Sequence[str]) -> bool:
    shorter = min(len(left), len(right))
    return [n.casefold() for n in left[-shorter:]] == [n.casefold() for n in right[-shorter:]]
