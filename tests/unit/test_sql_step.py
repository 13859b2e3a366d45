"""SQL steps: what is kept incrementally, what runs row by row, what is refused."""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa
import pytest

from kframe.errors import DefinitionError
from kframe.sinks.table import prepare, write
from kframe.transform.algebra import Incremental
from kframe.transform.sql import SqlRows, sql_step

TOPICS = ["orders", "clicks"]
PRODUCTS = pa.table({"sku": ["a", "b"], "cat": ["food", "toys"]})


def orders(start: int, *rows: tuple[Any, ...]) -> pa.Table:
    sku, qty, at = zip(*rows, strict=True)
    n = len(rows)
    return pa.table(
        {
            "sku": pa.array(sku, pa.string()),
            "qty": pa.array(qty, pa.int64()),
            "at": pa.array(at, pa.timestamp("ms")),
            "_partition": pa.array([0] * n, pa.int32()),
            "_offset": pa.array(range(start, start + n), pa.int64()),
            "_timestamp": pa.array([0] * n, pa.timestamp("ms", "UTC")),
        }
    )


DAY = 86_400_000
FIRST = orders(0, ("a", 1, 0), ("b", 5, DAY), (None, None, 0))
SECOND = orders(3, ("a", 3, DAY + 1), ("c", 4, 5), ("A", 2, DAY))


def tuples(con: duckdb.DuckDBPyConnection, query: str) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in con.sql(query).to_arrow_table().to_pylist()]


def feed(query: str) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    """The table after two batches, and one DuckDB pass over both."""
    step = sql_step("t", query, TOPICS)
    with duckdb.connect(config={"python_enable_replacements": "false"}) as store, duckdb.connect() as con:
        prepare(store, [step], {"orders": FIRST.schema, "products": PRODUCTS.schema})
        for batch in (FIRST, SECOND):
            partial = step.partial(con, {"orders": batch}, {"products": PRODUCTS})
            for change in step.merge(store, partial):
                write(store, change)
        ours = tuples(store, "FROM t ORDER BY ALL")
        con.register("orders", pa.concat_tables([FIRST, SECOND]))
        con.register("products", PRODUCTS)
        return ours, tuples(con, f"FROM ({query}) ORDER BY ALL")


@pytest.mark.parametrize(
    "query",
    [
        "SELECT sku, count(*) AS n, sum(qty * 2) AS total FROM orders WHERE qty > 1 GROUP BY sku",
        "SELECT date_trunc('day', \"at\") AS day, sum(qty) / count(*) AS r FROM orders GROUP BY 1",
        "SELECT upper(sku) AS name, avg(qty) FILTER (WHERE qty > 1) AS m FROM orders o GROUP BY name",
        "SELECT upper(sku) || '!' AS k, var_pop(qty), bool_and(qty > 1) FROM orders GROUP BY upper(sku)",
        "SELECT p.cat, sum(qty) AS s, s + 1 AS t FROM orders LEFT JOIN products p USING (sku) GROUP BY 1",
        "SELECT sku FROM orders GROUP BY sku",
        "SELECT sum(qty) AS s, count(DISTINCT sku) AS k FROM orders HAVING count(*) > 5",
        "SELECT count(*) AS n FROM (SELECT * FROM orders WHERE qty > 1)",
        'SELECT sku, arg_min(qty, "at") AS q, any_value(upper(sku)) AS v FROM orders GROUP BY sku',
        "SELECT sku, count(*) AS n FROM orders GROUP BY orders.sku",
    ],
)
def test_aggregates_equal_one_pass(query: str) -> None:
    """Kills: keys by position or alias lost; expressions over aggregates per batch; WHERE dropped."""
    assert isinstance(sql_step("t", query, TOPICS), Incremental)
    ours, expected = feed(query)
    assert ours == expected


@pytest.mark.parametrize(
    "query",
    [
        "FROM orders",
        "SELECT sku, qty * 2 AS twice FROM orders WHERE qty > 1",
        "WITH big AS (SELECT * FROM orders WHERE qty > 1) SELECT sku FROM big",
        "SELECT o.qty, p.cat FROM orders o JOIN products p USING (sku)",
        "SELECT qty FROM orders WHERE sku IN (SELECT sku FROM products)",
    ],
)
def test_rows_are_appended(query: str) -> None:
    """Kills: a row-wise SELECT taken for an aggregate."""
    assert isinstance(sql_step("t", query, TOPICS), SqlRows)
    ours, expected = feed(query)
    assert ours == expected


@pytest.mark.parametrize(
    "query",
    [
        "SELECT DISTINCT a FROM orders",
        "SELECT a FROM orders ORDER BY a LIMIT 3",
        "SELECT row_number() OVER () FROM orders",
        "SELECT median(a) FROM orders",
        "SELECT quantile_cont(a,0.5) FROM orders GROUP BY b",
        "SELECT mode(a), list(b) FROM orders",
        "SELECT string_agg(a) FROM orders",
        "SELECT * FROM orders JOIN clicks USING (id)",
        "SELECT * FROM orders a JOIN orders b USING (id)",
        "SELECT random() FROM orders",
        "SELECT now(), a FROM orders",
        "SELECT current_date FROM orders",
        "SELECT * FROM (SELECT sku, count(*) FROM orders GROUP BY 1)",
        "WITH x AS (SELECT count(*) c FROM orders) SELECT * FROM x",
        "SELECT * FROM read_csv('a.csv')",
        "SELECT * FROM orders JOIN 'p.parquet' USING (sku)",
        "SELECT * FROM products",
        "INSERT INTO x SELECT 1",
        "SELECT 1; SELECT 2",
        "SELECT a FROM orders UNION ALL SELECT b FROM clicks",
        "SELECT sku, a FROM orders GROUP BY sku",
        "SELECT * FROM orders RIGHT JOIN products USING (sku)",
        "SELECT * FROM orders FULL JOIN products USING(sku)",
        "SELECT * FROM products LEFT JOIN orders USING(sku)",
        "SELECT a FROM orders WHERE a > (SELECT avg(a) FROM orders)",
        "SELECT geomean(a) FROM orders",
        "SELECT sum(DISTINCT a) FROM orders",
        "SELECT first(a ORDER BY b) FROM orders",
        "SELECT a FROM orders QUALIFY row_number() OVER ()=1",
        "SELECT a FROM orders USING SAMPLE 10%",
        "SELECT a,b,sum(c) FROM orders GROUP BY ROLLUP(a,b)",
        "SELECT selec FROM",
        "SELECT *, count(*) FROM orders GROUP BY ALL",
        "WITH o AS (SELECT * FROM orders) SELECT * FROM o a JOIN o b USING (id)",
        "SELECT * FROM main.orders",
        "PIVOT orders ON a USING sum(b)",
        "SELECT a FROM orders WHERE EXISTS (SELECT 1 FROM clicks)",
        "SELECT nextval('s') FROM orders",
        "SELECT count(*) AS n, sum(a) AS n FROM orders",
        "SELECT a FROM orders POSITIONAL JOIN products",
        "SELECT arg_max(a, b, 3) FROM orders",
        "SELECT histogram(a) FROM orders",
    ],
)
def test_what_would_be_wrong_batch_by_batch_is_refused(query: str) -> None:
    """Kills: each of these accepted, silently wrong."""
    with pytest.raises(DefinitionError) as caught:
        sql_step("t", query, TOPICS)
    assert caught.value.hint


def test_tables_read_are_told_and_checked() -> None:
    """Kills: a lookup table the engine never passes."""
    query = "SELECT * FROM orders JOIN products USING (sku)"
    step = sql_step("t", query, TOPICS, ["products"])
    assert (step.topics, step.tables) == (("orders",), ("products",))
    with pytest.raises(DefinitionError, match="neither a topic nor a table"):
        sql_step("t", query, TOPICS, [])


def test_an_alias_that_is_also_a_column_is_refused() -> None:
    """Kills: GROUP BY the alias where SQL takes the column."""
    step = sql_step("t", "SELECT upper(sku) AS qty, count(*) AS n FROM orders GROUP BY qty", TOPICS)
    with pytest.raises(DefinitionError, match="alias"):
        step.ddl({"orders": FIRST.schema})


def test_unknown_columns_are_a_definition_error() -> None:
    """Kills: a raw DuckDB error."""
    for query in ("SELECT nope FROM orders", "SELECT sum(nope) AS s FROM orders"):
        with duckdb.connect() as con, pytest.raises(DefinitionError, match="nope"):
            sql_step("t", query, TOPICS).partial(con, {"orders": FIRST}, {})


def test_no_groups_is_one_row_before_the_first_record() -> None:
    """Kills: an empty view."""
    step = sql_step("t", "SELECT count(*) AS n, sum(qty) AS s FROM orders", TOPICS)
    with duckdb.connect() as store:
        prepare(store, [step], {"orders": FIRST.schema})
        assert store.execute("FROM t").fetchall() == [(0, None)]
