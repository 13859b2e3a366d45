"""Reading a SELECT with DuckDB's own parser, and refusing what cannot be computed batch by batch."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import duckdb

Node = dict[str, Any]
"""A node of DuckDB's syntax tree, as ``json_serialize_sql`` writes it."""

_CLOCKS = {"current_date", "current_time", "current_timestamp", "localtime", "localtimestamp"}
_TABLE_FUNCTIONS = {"unnest", "range", "generate_series"}
_FILE = re.compile(
    r"[/\\*?]|\.(csv|tsv|txt|json|ndjson|jsonl|parquet|xlsx|arrow|db|duckdb|gz|zst)$", re.IGNORECASE
)
_QUOTES = 'Correct the query; a column named like a keyword needs double quotes: "at".'
_MODIFIERS = {
    "ORDER_MODIFIER": ("ORDER BY", "A table has no order: write ORDER BY in sql() when you read."),
    "LIMIT_MODIFIER": ("LIMIT", "Write LIMIT in sql() when you read."),
    "LIMIT_PERCENT_MODIFIER": ("LIMIT", "Write LIMIT in sql() when you read."),
    "DISTINCT_MODIFIER": ("DISTINCT", "Use GROUP BY the same columns, which is kept across batches."),
}


class Refused(Exception):
    """Part of a query would be wrong when it runs on each batch alone."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.hint = hint


@lru_cache(maxsize=1)
def _parser() -> duckdb.DuckDBPyConnection:
    return duckdb.connect()


def _scalar(sql: str, value: str) -> Any:
    row = _parser().cursor().execute(sql, [value]).fetchone()
    return row[0] if row else None


def parse(query: str) -> Node:
    """The tree of one SELECT. Raises `Refused` for anything else."""
    tree = json.loads(_scalar("SELECT json_serialize_sql(?)", query))
    if tree["error"]:
        raise Refused(
            f"is not one SELECT that DuckDB can read: {tree.get('error_message', '')}", "Correct the query."
        )
    if len(tree["statements"]) != 1:
        raise Refused(f"has {len(tree['statements'])} statements", "Write one SELECT.")
    node: Node = tree["statements"][0]["node"]
    if node["type"] != "SELECT_NODE":
        raise Refused("UNION, INTERSECT and EXCEPT", "Write one table for each SELECT.")
    return node


def text_of(node: Node, *, whole: bool = False) -> str:
    """SQL of an expression, or of a `whole` SELECT."""
    if not whole:
        select = parse("SELECT 1")
        expression = copy.deepcopy(node)
        expression["alias"] = ""
        select["select_list"] = [expression]
        return text_of(select, whole=True).removeprefix("SELECT ")
    tree = {"error": False, "statements": [{"node": node, "named_param_map": []}]}
    return str(_scalar("SELECT json_deserialize_sql(?::JSON)", json.dumps(tree)))


def nodes(tree: Any, *, subqueries: bool = True) -> Iterator[Node]:
    """Every node of a tree, parents first; on request without those of subqueries in expressions."""
    if isinstance(tree, dict):
        yield tree
        if subqueries or tree.get("class") != "SUBQUERY":
            for value in tree.values():
                yield from nodes(value, subqueries=subqueries)
    elif isinstance(tree, list):
        for item in tree:
            yield from nodes(item, subqueries=subqueries)


@lru_cache(maxsize=1)
def _functions() -> Mapping[str, tuple[set[str], set[str], str]]:
    """DuckDB's functions: name -> (kinds, stabilities, definition if it is a macro)."""
    found: dict[str, tuple[set[str], set[str], str]] = {}
    columns = "function_name, function_type, stability, macro_definition"
    rows = _parser().cursor().execute(f"SELECT DISTINCT {columns} FROM duckdb_functions()").fetchall()
    for name, kind, stability, macro in rows:
        kinds, stabilities, _ = found.setdefault(name.lower(), (set(), set(), macro or ""))
        kinds.add(kind)
        stabilities.add(stability or "CONSISTENT")
    return found


@lru_cache(maxsize=512)
def _traits(name: str) -> frozenset[str]:
    """Of ``aggregate`` and ``volatile``, what a function is, macros seen through."""
    kinds, stabilities, macro = _functions().get(name, (set(), set(), ""))
    traits = {"aggregate"} if "aggregate" in kinds and "scalar" not in kinds else set()
    if stabilities - {"CONSISTENT"}:
        traits.add("volatile")
    if "macro" in kinds and macro:
        body = json.loads(_scalar("SELECT json_serialize_sql(?)", f"SELECT {macro}"))
        for node in nodes(body.get("statements", [])):
            if node.get("class") == "FUNCTION":
                traits |= _traits(node["function_name"].lower())
    return frozenset(traits)


def aggregates_in(tree: Any) -> Iterator[Node]:
    """The aggregate calls of an expression, outermost first; those in subqueries are not its own."""
    for node in nodes(tree, subqueries=False):
        if node.get("class") == "FUNCTION" and "aggregate" in _traits(node["function_name"].lower()):
            yield node


def is_aggregate(node: Node) -> bool:
    """Whether a SELECT has groups or aggregates."""
    grouped = node["group_expressions"] or node["aggregate_handling"] == "FORCE_AGGREGATES"
    own = [node["select_list"], node["having"]]
    return bool(grouped) or node["having"] is not None or next(aggregates_in(own), None) is not None


class Reader:
    """What a SELECT reads, refusing what has no meaning batch by batch.

    Parameters
    ----------
    topics : mapping of str to str
        Topics by their name in lower case.
    """

    def __init__(self, topics: Mapping[str, str]) -> None:
        self._topics = topics
        self._names: dict[str, str | None] = {}
        self.read: list[str] = []
        self.tables: list[str] = []
        self.alias: str | None = None
        """The topic's alias, quoted; None when it is read by a subquery."""

    def only_topic(self) -> str:
        if len(self.read) == 1:
            return self.read[0]
        if self.read:
            raise Refused(
                f"reads {' and '.join(self.read)}: records of two reads of topics meet only within one batch",
                "Keep one side as a keyed table, and join the topic to that table.",
            )
        raise Refused(
            f"reads no topic (topics: {', '.join(self._topics.values()) or 'none'})",
            "Name a topic after FROM.",
        )

    def check(self, node: Node) -> None:
        """Check a whole query. Raises `Refused`."""
        for part in nodes(node):
            self._check_node(part)
        self._check_select(node, top=True)

    def _check_node(self, node: Node) -> None:
        kind = node.get("class")
        if kind == "WINDOW":
            raise Refused(f"the window function {node['function_name']}() sees only the rows of one batch")
        names = node.get("column_names", []) if kind == "COLUMN_REF" else []
        clock = len(names) == 1 and names[0].lower() in _CLOCKS
        if clock or (kind == "FUNCTION" and "volatile" in _traits(node["function_name"].lower())):
            called = names[0] if clock else f"{node['function_name']}()"
            raise Refused(
                f"{called} gives another result when a batch is replayed",
                "Use the record's own time (_timestamp) or a field.",
            )

    def _check_select(self, node: Node, *, top: bool) -> None:
        if node["type"] != "SELECT_NODE":
            raise Refused("UNION, INTERSECT and EXCEPT", "Write one table for each SELECT.")
        for modifier in node["modifiers"]:
            what, hint = _MODIFIERS.get(modifier["type"], (modifier["type"], ""))
            raise Refused(f"{what} would apply to each batch alone", hint)
        if node["qualify"] is not None or node["sample"] is not None:
            raise Refused(
                f"{'QUALIFY' if node['qualify'] is not None else 'USING SAMPLE'} sees only one batch"
            )
        if not top and is_aggregate(node):
            raise Refused(
                "aggregates in a subquery are those of one batch",
                "Keep the inner aggregation as a table of its own, and query it with sql().",
            )
        self._check_ctes(node)
        self._check_expressions(node)
        self._check_from(node["from_table"], top=top)

    def _check_ctes(self, node: Node) -> None:
        for entry in node["cte_map"]["map"]:
            before = len(self.read)
            self._check_select(entry["value"]["query_node"], top=False)
            if len(self.read) > before + 1:
                self.only_topic()
            self._names[entry["key"].casefold()] = self.read[before] if len(self.read) > before else None
            del self.read[before:]

    def _check_expressions(self, node: Node) -> None:
        """Subqueries in expressions may read tables, not topics."""
        self._check_subqueries({k: v for k, v in node.items() if k not in ("from_table", "cte_map")})

    def _check_subqueries(self, tree: Any) -> None:
        for part in nodes(tree):
            if part.get("type") in ("BASE_TABLE", "TABLE_FUNCTION"):
                found = self._source(part)
                if found in self._topics.values():
                    raise Refused(f"the subquery over {found} sees only one batch", "Join a table instead.")

    def _check_join(self, node: Node) -> None:
        if node["ref_type"] not in ("REGULAR", "NATURAL", "CROSS", "ASOF"):
            raise Refused(f"a {node['ref_type'].lower()} join", "Join by columns.")

    def _check_from(self, node: Node, *, top: bool) -> bool:
        """Check what follows FROM; True when a topic is below."""
        kind = node["type"]
        if node.get("sample") is not None:
            raise Refused("TABLESAMPLE sees only one batch")
        if kind == "JOIN":
            return self._check_both(node, top=top)
        if kind == "SUBQUERY":
            before = len(self.read)
            self._check_select(node["subquery"]["node"], top=False)
            return len(self.read) > before
        if kind in ("EMPTY", "EXPRESSION_LIST"):
            return False
        if kind not in ("BASE_TABLE", "TABLE_FUNCTION"):
            raise Refused(f"{kind.replace('_', ' ').lower()} after FROM")
        name = self._source(node)
        if name is None or name not in self._topics.values():
            return False
        self.read.append(name)
        if top and node["table_name"].casefold() not in self._names:
            self.alias = '"' + (node["alias"] or node["table_name"]).replace('"', '""') + '"'
        return True

    def _check_both(self, node: Node, *, top: bool) -> bool:
        self._check_join(node)
        self._check_subqueries(node["condition"])
        left, right = self._check_from(node["left"], top=top), self._check_from(node["right"], top=top)
        kind = node["join_type"]
        wrong = {"LEFT": right, "RIGHT": left, "SEMI": right, "ANTI": right}
        if (left or right) and kind != "INNER" and wrong.get(kind, True):
            raise Refused(
                f"the {kind.lower()} join keeps or drops rows of the table by what one batch holds",
                "Put the topic first and use JOIN or LEFT JOIN.",
            )
        return left or right

    def _source(self, node: Node) -> str | None:
        """The topic or table that a node names (added to `tables`); None for what reads neither."""
        if node["type"] == "TABLE_FUNCTION":
            function = node["function"]["function_name"].lower()
            if function not in _TABLE_FUNCTIONS:
                raise Refused(
                    f"{function}() reads outside of the pipeline", "Load it with a side table first."
                )
            return None
        name = str(node["table_name"])
        if node["schema_name"] or node["catalog_name"] or _FILE.search(name):
            raise Refused(
                f"{name!r} is outside of the pipeline: a batch that is replayed could find another content",
                "Load it as a table of the pipeline first.",
            )
        if name.casefold() in self._names:
            return self._names[name.casefold()]
        if name.casefold() in self._topics:
            return self._topics[name.casefold()]
        if name not in self.tables:
            self.tables.append(name)
        return name
