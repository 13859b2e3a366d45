"""Looking without committing: previews, drawings, replays, and tables that no batch has made yet."""

from __future__ import annotations

import html
import os
import re
import signal
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import duckdb
import pandas as pd
import pytest

import kframe as kf
from kframe.drawing import Drawing, Node
from kframe.errors import (
    ConfigError,
    DefinitionError,
    KframeError,
    LostRange,
    SchemaError,
    StepError,
    TopicRecreated,
)
from kframe.model import TopicPartition
from kframe.preview import dealt
from kframe.testing import MemorySource

SCHEMA = {"sku": "str", "qty": "int64"}


def orders(n: int = 10) -> MemorySource:
    return MemorySource({"orders": [{"sku": f"s{i % 3}", "qty": i} for i in range(n)]})


def shop(folder: Path, source: MemorySource | None = None, **options: object) -> kf.Pipeline:
    made = kf.Pipeline(folder / "shop.duckdb", source=source or orders(), **options)  # type: ignore[arg-type]
    made.topic("orders", schema=SCHEMA)
    return made


def stored(made: kf.Pipeline) -> list[tuple[object, ...]]:
    """Everything that a commit would change."""
    return made.sql(
        "SELECT table_schema, table_name FROM information_schema.tables UNION ALL "
        "SELECT topic, position::VARCHAR FROM _kframe.positions UNION ALL "
        "SELECT pipeline, batch_id::VARCHAR FROM _kframe.batches ORDER BY ALL"
    ).fetchall()


# ---- preview ------------------------------------------------------------------------------------------


def test_a_preview_of_every_kind_of_step_commits_nothing(tmp_path: Path) -> None:
    """Kills: a preview that writes to the store, reads from the start, or forgets a kind of step."""
    with shop(tmp_path) as made:
        made.side_table("names", pd.DataFrame({"sku": ["s0", "s1"], "name": ["zero", "one"]}), key="sku")
        made.land("orders")
        made.aggregate("total", source="orders", by="sku", n=("qty", "size"), most=("qty", "max"))
        made.sql_table("grouped", "SELECT sku, sum(qty) AS qty FROM orders GROUP BY sku")
        made.sql_table("doubled", "SELECT qty * 2 AS twice FROM orders WHERE qty > 8")
        made.table("last", key="sku", inputs=["orders"])(lambda batch: batch)

        @made.table("named", lookup={"names": "sku"})
        def named(orders: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
            return orders.merge(names, on="sku")

        before = stored(made)
        assert made.preview("orders", n=3)["qty"].tolist() == [7, 8, 9]
        total = made.preview("total", n=4).sort_values("sku")
        assert total[["sku", "n", "most"]].values.tolist() == [["s0", 2, 9], ["s1", 1, 7], ["s2", 1, 8]]
        assert sorted(made.preview("grouped", n=4)["qty"]) == [7, 8, 15]
        assert made.preview("doubled", n=4)["twice"].tolist() == [18]
        assert made.preview("last", n=5).sort_values("sku")["qty"].tolist() == [9, 7, 8]
        assert made.preview("named", n=3)[["qty", "name"]].values.tolist() == [[7, "one"], [9, "zero"]]
        assert stored(made) == before
        assert made.run().rows == 10


def test_a_preview_says_that_it_is_one(tmp_path: Path) -> None:
    log = orders(4)
    log.append("orders", b"{")
    with shop(tmp_path, log) as made:
        made.land("orders")
        seen = made.preview("orders", n=3)
        assert seen.attrs["preview"] == "step 'orders' over the latest 3 records; nothing was committed"
        assert seen.attrs["ranges"] == ["orders[0] offsets [2, 5)"]
        assert [line.split(":")[0] for line in seen.attrs["dead_letters"]] == ["orders[0] offset 4"]


def test_a_preview_of_an_output_goes_by_its_topic(tmp_path: Path) -> None:
    """Kills: a name of our own making that nobody has declared."""
    with kf.Pipeline(tmp_path / "p.duckdb", brokers="127.0.0.1:1") as made:
        made._source = orders()
        made.topic("orders", schema=SCHEMA)
        made.output("alerts", inputs=["orders"])(lambda batch: batch[batch.qty > 7])
        assert made.preview("alerts")["qty"].tolist() == [8, 9]
        assert made.preview("output:alerts")["qty"].tolist() == [8, 9]


def test_a_preview_before_anything_is_there(tmp_path: Path) -> None:
    """Kills: a fetch of nothing that never ends; columns lost with the rows."""
    with shop(tmp_path, orders(0)) as made:
        made.land("orders")
        made.sql_table("big", "SELECT qty FROM orders WHERE qty > 5")
        assert made.preview("orders").columns.tolist() == ["sku", "qty"]
        assert made.preview("big").columns.tolist() == ["qty"]
        made.table("late", inputs=["orders", "big"])(lambda batch, big: batch)
        with pytest.raises(DefinitionError, match="does not exist yet"):
            made.preview("late")
        with pytest.raises(DefinitionError, match="No step makes 'bog'"):
            made.preview("bog")
        with pytest.raises(ConfigError, match="at least 1"):
            made.preview("big", n=0)


def test_a_preview_reads_committed_tables_and_leaves_a_running_batch_alone(tmp_path: Path) -> None:
    """Kills: the run's own source read by the preview, which would move its stops and limits."""
    log = orders(10)
    commits = threading.Semaphore(0)
    told = lambda edge: commits.release() if edge == "committed" else None  # noqa: E731
    with shop(tmp_path, log, commit_interval_ms=10, batch_rows_max=4, at_edge=told) as made:
        inside, go_on = threading.Event(), threading.Event()
        made.aggregate("total", source="orders", by="sku", n=("qty", "size"))
        made.run()

        @made.table("slow")
        def slow(orders: pd.DataFrame) -> pd.DataFrame:
            inside.set()
            assert go_on.wait(30)
            return orders

        made.table("joined", inputs=["orders", "total"])(lambda batch, total: batch.merge(total, on="sku"))
        log.append("orders", {"sku": "s0", "qty": 10})
        made.start()
        assert inside.wait(30)
        seen = made.preview("joined", n=2)
        assert seen[["qty", "n"]].values.tolist() == [[9, 4], [10, 4]]
        assert (log._stops, log._limits.rows_max) == (None, 4)
        go_on.set()
        log.append("orders", {"sku": "s1", "qty": 11})
        while made.status().positions[TopicPartition("orders", 0)] < 12:
            assert commits.acquire(timeout=30)
        made.stop()
        assert made.sql("SELECT qty FROM slow ORDER BY qty").fetchall() == [(10,), (11,)]
        assert made.status().state == "stopped"


def test_a_preview_that_fails_says_what_was_kept(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.table("broken", inputs=["orders"])(lambda batch: batch.nothing)
        with pytest.raises(StepError) as caught:
            made.preview("broken", n=2)
        assert "Step 'broken' raised AttributeError" in str(caught.value)
        assert "It was a preview" in str(caught.value)
        assert "rolled back" not in str(caught.value)
        assert caught.value.frames["batch"]["qty"].tolist() == [8, 9]
        assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("sizes", "n", "expected"),
    [
        ([10], 3, [3]),
        ([10, 10], 5, [3, 2]),
        ([1, 10, 10], 9, [1, 4, 4]),
        ([0, 2], 9, [0, 2]),
        ([5, 5], 1, [1, 0]),
    ],
)
def test_offsets_are_dealt_evenly(sizes: list[int], n: int, expected: list[int]) -> None:
    """Kills: a short partition's share that is lost, and more than `n` in all."""
    low = {TopicPartition("t", p): 100 for p in range(len(sizes))}
    high = {tp: 100 + size for tp, size in zip(low, sizes, strict=True)}
    assert list(dealt(low, high, n).values()) == expected


# ---- replay -------------------------------------------------------------------------------------------


def test_a_batch_again_as_the_function_got_it(tmp_path: Path) -> None:
    """Kills: a range that is one off, another batch's ranges, dead letters left out."""
    log = orders(5)
    log.append("orders", b"{")
    got: list[pd.DataFrame] = []
    with shop(tmp_path, log, batch_rows_max=4) as made:
        made.table("rows", inputs=["orders"])(lambda batch: got.append(batch) or batch)
        made.run()
        for batch_id, frame in enumerate(got):
            pd.testing.assert_frame_equal(made.replay(batch_id), frame)
        last = made.replay(1)
        assert isinstance(last, pd.DataFrame)
        assert last.attrs["batch_id"] == 1
        assert last.attrs["ranges"] == ["orders[0] offsets [4, 6)"]
        assert "offset 5" in last.attrs["dead_letters"][0]
        with pytest.raises(ConfigError, match="Batch 7 is not in the ledger"):
            made.replay(7)


def test_a_batch_of_several_topics_is_a_dict(tmp_path: Path) -> None:
    log = MemorySource({"orders": [{"sku": "a", "qty": 1}], "prices": [{"sku": "a", "price": 2}]})
    with shop(tmp_path, log) as made:
        made.topic("prices", schema={"sku": "str", "price": "int64"})
        made.land("orders")
        made.land("prices")
        made.run()
        again = made.replay(0)
        assert isinstance(again, dict)
        assert {topic: len(frame) for topic, frame in again.items()} == {"orders": 1, "prices": 1}


def test_a_replay_beyond_retention_names_what_is_gone(tmp_path: Path) -> None:
    """Kills: the rest of a batch taken for all of it."""
    log = orders(10)
    with shop(tmp_path, log, batch_rows_max=5) as made:
        made.land("orders")
        made.run()
        log.expire("orders", 7)
        with pytest.raises(LostRange, match=r"offsets \[5, 7\): retention has removed them") as caught:
            made.replay(1)
        assert [(r.start, r.stop) for r in caught.value.ranges] == [(5, 7)]
        with pytest.raises(LostRange, match=r"offsets \[0, 5\)"):
            made.replay(0)
        log.create("orders")
        with pytest.raises(TopicRecreated):
            made.replay(1)


def test_compacted_records_are_counted(tmp_path: Path) -> None:
    log = orders(10)
    with shop(tmp_path, log) as made:
        made.land("orders")
        made.run()
        log._logs["orders"][0].records = log._logs["orders"][0].records[3:]  # what compaction does
        with pytest.warns(UserWarning, match="has removed 3 of the 10 records of batch 0"):
            assert len(made.replay(0)) == 7


# ---- explain ------------------------------------------------------------------------------------------


def test_a_pipeline_explained_as_text_and_as_a_picture(tmp_path: Path) -> None:
    """Kills: a name that is not escaped, in the SVG or in the text beside it."""
    with shop(tmp_path) as made:
        made.topic("<b>&\"'", schema=SCHEMA)
        made.side_table("names", pd.DataFrame({"sku": ["s0"]}), key="sku")
        made.land("<b>&\"'")
        made.aggregate("total", source="orders", by="sku", n=("qty", "size"))
        made.sql_table("grouped", "SELECT sku, count(*) AS n FROM orders GROUP BY sku")

        @made.table("named", key="sku", lookup={"names": "sku"})
        def named(orders: pd.DataFrame, names: pd.DataFrame) -> pd.DataFrame:
            return orders

        made.table("after", inputs=["orders", "named"])(lambda batch, named: batch)
        drawing = made.explain()
        assert repr(drawing).splitlines() == [
            "pipeline shop",
            "  <b>&\"' -> land (step, every record) -> <b>&\"' (table, rows added)",
            "  orders -> n (step, aggregate by sku) -> total (table, key sku)",
            "  orders -> SQL (step, grouped) -> grouped (table, one row a group)",
            "  orders, names -> named() (step, lookup names by sku) -> named (table, key sku)",
            "  orders, named -> <lambda>() (step, pandas) -> after (table, rows added)",
        ]
        shown = drawing._repr_html_()
        picture = re.fullmatch(
            r'<img src="data:image/svg\+xml,([^"<>]*)" alt="([^"<>]*)" style="[^"]*">', shown
        )
        assert picture is not None
        assert html.unescape(picture[2]) == repr(drawing)
        root = ET.fromstring(unquote(picture[1]))
        texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "<b>&\"'" in texts
        assert "named()" in texts
        assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == len(drawing.nodes)
        assert len(root.findall("{http://www.w3.org/2000/svg}path")) == len(drawing.edges)


def test_a_long_edge_runs_beside_the_boxes_between() -> None:
    """Kills: an edge drawn through the box of a node that it has nothing to do with."""
    nodes = {name: Node("step", name) for name in "abcd"}
    drawing = Drawing("t", nodes, [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")])
    boxes = drawing._boxes()
    lanes = [box for id_, box in boxes.items() if id_ not in nodes]
    assert len(lanes) == 2
    for lane in lanes:
        beside = [b for id_, b in boxes.items() if id_ in nodes and b.x == lane.x]
        assert beside
        assert not any(b.y <= lane.middle <= b.y + b.height for b in beside)


def test_steps_that_read_each_other_are_drawn_too(tmp_path: Path) -> None:
    """Kills: a layout that never ends on a cycle."""
    with shop(tmp_path) as made:
        made.table("a", inputs=["orders"])(lambda batch: batch)
        made.table("b", inputs=["orders", "a"])(lambda batch, a: batch)
        made.table("a", inputs=["orders", "b"])(lambda batch, b: batch)
        assert "orders, b -> <lambda>()" in repr(made.explain())
        ET.fromstring(made.explain().svg())


def test_what_leaves_is_drawn_behind_its_table(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.aggregate("total", source="orders", by="sku", n=("qty", "size"))
        leaves = SimpleNamespace(step="total", target="kafka", name="totals")
        made._definition.outlets = {("kafka", "totals"): leaves}  # type: ignore[attr-defined]
        assert repr(made.explain()).splitlines()[-1] == "  total -> totals (output, kafka)"


def test_nothing_declared_is_drawn_as_nothing(tmp_path: Path) -> None:
    with kf.Pipeline(tmp_path / "p.duckdb", source=orders()) as made:
        assert repr(made.explain()) == "pipeline p"
        ET.fromstring(made.explain().svg())


# ---- tables that no batch has made --------------------------------------------------------------------


def test_a_declared_table_is_empty_before_its_first_batch(tmp_path: Path) -> None:
    """Kills: DuckDB's catalog error for a table that the user has declared."""
    with shop(tmp_path) as made:
        made.land("orders")
        made.aggregate("total", source="orders", by="sku", n=("qty", "size"))
        made.sql_table("never", "SELECT sku, qty FROM orders WHERE qty > 1000")
        assert made.read("orders").columns.tolist() == ["sku", "qty"]
        assert made.read("total").dtypes.astype(str).to_dict() == {"sku": "str", "n": "Int64"}
        assert made.sql("SELECT o.qty FROM orders o JOIN never USING (sku)").fetchall() == []
        made.run()
        assert len(made.read("orders")) == 10
        assert made.read("never").empty
        with pytest.raises(Exception, match="nowhere does not exist"):
            made.read("nowhere")


def test_a_table_whose_columns_only_a_run_can_tell(tmp_path: Path) -> None:
    with kf.Pipeline(tmp_path / "p.duckdb", source=orders()) as made:
        made.topic("orders")
        made.land("orders")
        made.table("big", inputs=["orders"])(lambda batch: batch)
        for name in ("orders", "big"):
            with pytest.raises(KframeError, match=f"Table '{name}' is declared, but no batch has made it"):
                made.read(name)
        made.run()
        assert len(made.read("big")) == 10


@pytest.mark.parametrize("key", [None, "sku"])
def test_an_index_that_clashes_with_a_column_names_both(tmp_path: Path, key: str | None) -> None:
    """Kills: pandas' ValueError, which names no step."""
    with shop(tmp_path) as made:
        made.table("clash", key=key, inputs=["orders"])(lambda batch: batch.set_index("sku", drop=False))
        with pytest.raises(SchemaError, match=r"Step 'clash' returned an index .* insert sku"):
            made.run()


# ---- a corrected function -----------------------------------------------------------------------------


def test_a_corrected_function_applies_from_the_next_batch_on(tmp_path: Path) -> None:
    """Kills: a batch half under the old and half under the new function; a ledger that keeps the old one."""
    log = orders(3)
    commits = threading.Semaphore(0)
    told = lambda edge: commits.release() if edge == "committed" else None  # noqa: E731
    with shop(tmp_path, log, commit_interval_ms=10, at_edge=told) as made:
        inside, go_on = threading.Event(), threading.Event()

        @made.table("marked")
        def marked(orders: pd.DataFrame) -> pd.DataFrame:
            inside.set()
            assert go_on.wait(30)
            return orders.assign(rule="old")

        def fingerprint() -> object:
            return made.sql("SELECT fingerprint FROM _kframe.tables WHERE name = 'marked'").fetchall()

        made.start()
        assert inside.wait(30)

        @made.table("marked")
        def corrected(orders: pd.DataFrame) -> pd.DataFrame:
            return orders.assign(rule="new")

        go_on.set()
        assert commits.acquire(timeout=30)
        assert made.sql("SELECT rule FROM marked").fetchall() == [("old",)] * 3
        old = fingerprint()
        log.append("orders", {"sku": "s", "qty": 3})
        assert commits.acquire(timeout=30)
        made.stop()
        assert made.sql("SELECT rule FROM marked ORDER BY qty").fetchall() == [("old",)] * 3 + [("new",)]
        assert fingerprint() != old


# ---- interrupts ---------------------------------------------------------------------------------------


def test_only_an_interrupt_is_taken_for_one(tmp_path: Path) -> None:
    """Kills: a user's RuntimeError about something interrupted, reported as Ctrl-C."""
    with shop(tmp_path) as made:

        @made.table("broken")
        def broken(orders: pd.DataFrame) -> pd.DataFrame:
            raise RuntimeError("the connection was interrupted")

        with pytest.raises(StepError, match="the connection was interrupted"):
            made.run()
        with pytest.raises(StepError, match="the connection was interrupted"):
            made.preview("broken")


def test_ctrl_c_inside_duckdb_comes_out_as_ctrl_c(tmp_path: Path) -> None:
    """Kills: DuckDB's RuntimeError in the place of KeyboardInterrupt, in a preview and in a run."""
    lengthy = "SELECT count(*) FROM range(3_000_000_000) a WHERE hash(a.range) = 1"
    with shop(tmp_path) as made:

        @made.table("asks")
        def asks(orders: pd.DataFrame) -> pd.DataFrame:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            duckdb.connect().sql(lengthy).fetchall()
            return orders

        for call, told in ((made.run, "rolled back"), (lambda: made.preview("asks"), "commit nothing")):
            with pytest.raises(KeyboardInterrupt) as caught:
                call()
            assert told in caught.value.__notes__[0]
        made.table("asks", inputs=["orders"])(lambda batch: batch)
        assert made.run().rows == 10
