"""Pipelines as users write them, on a log in memory."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf
from kframe.errors import (
    ConfigError,
    DefinitionError,
    Fenced,
    KframeError,
    LostRange,
    SchemaError,
    StepError,
    TooManyDeadLetters,
)
from kframe.testing import MemorySource

SCHEMA = {"sku": "str", "qty": "int64"}


def orders(n: int = 10) -> MemorySource:
    return MemorySource({"orders": [{"sku": f"s{i % 3}", "qty": i} for i in range(n)]})


def shop(folder: Path, source: MemorySource | None = None, **options: object) -> kf.Pipeline:
    made = kf.Pipeline(folder / "shop.duckdb", source=source or orders(), **options)  # type: ignore[arg-type]
    made.topic("orders", schema=SCHEMA)
    return made


def test_the_next_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    """Kills: positions that are not stored, or stored before the rows."""
    log = orders(10)
    with shop(tmp_path, log) as made:
        made.land("orders")
        assert made.run().rows == 10
        assert made.run().rows == 0
    log.append("orders", {"sku": "s0", "qty": 99})
    with shop(tmp_path, log) as made:
        made.land("orders")
        assert made.run().rows == 1
        assert sorted(made.read("orders")["qty"]) == [*range(10), 99]


def test_a_schema_is_inferred_once_and_pinned(tmp_path: Path) -> None:
    log = orders(3)
    with kf.Pipeline(tmp_path / "p.duckdb", source=log) as made:
        made.topic("orders")
        made.land("orders")
        made.run()
        assert made.schema("orders").to_dict() == SCHEMA
    log.append("orders", {"sku": "s0", "qty": "many"})
    with kf.Pipeline(tmp_path / "p.duckdb", source=log) as made:
        made.topic("orders")
        made.land("orders")
        made.run()
        assert "expected int64" in made.dead_letters()["error"][0]


def test_tables_of_one_pipeline_commit_together(tmp_path: Path) -> None:
    """A step that fails takes every other step's rows back. Kills: a transaction per table."""
    with shop(tmp_path) as made:
        made.land("orders")
        made.table("broken", inputs=["orders"])(lambda batch: batch.no_such_column)
        with pytest.raises(StepError):
            made.run()
        assert made.sql(
            "SELECT count(*) FROM information_schema.tables WHERE table_name = 'orders'"
        ).fetchall() == [(0,)]
        assert set(made.status().positions.values()) == {0}


def test_a_failing_function_is_named_with_its_line_and_ranges(tmp_path: Path) -> None:
    with shop(tmp_path) as made:

        @made.table("big")
        def big(orders: pd.DataFrame) -> pd.DataFrame:
            return orders[orders.amount > 3]  # there is no amount

        with pytest.raises(StepError) as caught:
            made.run()
        told = str(caught.value)
        assert "Step 'big' raised AttributeError" in told
        assert "return orders[orders.amount > 3]" in told
        assert "orders[0] offsets [0, 10)" in told
        frame = made.failed_batch()
        assert isinstance(frame, pd.DataFrame)
        assert frame["qty"].tolist() == list(range(10))

        @made.table("big")  # the corrected cell
        def big_again(orders: pd.DataFrame) -> pd.DataFrame:
            return orders[orders.qty > 3]

        assert made.run().rows == 10
        assert sorted(made.read("big")["qty"]) == [4, 5, 6, 7, 8, 9]
        assert made.failed_batch() is None


def test_a_side_table_is_looked_up_for_the_keys_of_the_batch(tmp_path: Path) -> None:
    """Kills: passing the whole table."""
    seen: list[int] = []
    log = MemorySource({"orders": [{"sku": "s1", "qty": 1}]})
    with shop(tmp_path, log) as made:
        made.side_table("products", pd.DataFrame({"sku": ["s0", "s1"], "title": ["a", "b"]}), key="sku")

        @made.table("titled", lookup={"products": "sku"})
        def titled(orders: pd.DataFrame, products: pd.DataFrame) -> pd.DataFrame:
            seen.append(len(products))
            return orders.merge(products, on="sku")

        made.run()
        assert made.read("titled")["title"].tolist() == ["b"]
        assert seen == [1]


def test_a_later_step_sees_the_rows_of_an_earlier_one_in_the_same_batch(tmp_path: Path) -> None:
    log = MemorySource({"orders": [{"sku": "s1", "qty": 1}], "products": [{"sku": "s1", "qty": 7}]})
    with shop(tmp_path, log) as made:
        made.topic("products", schema=SCHEMA)
        made.table("stock", key="sku", inputs=["products"])(lambda batch: batch)

        @made.table("left")
        def left(orders: pd.DataFrame, stock: pd.DataFrame) -> pd.DataFrame:
            return orders.merge(stock, on="sku", suffixes=("", "_stock"))

        made.run()
        assert made.read("left")["qty_stock"].tolist() == [7]


def test_a_step_may_read_an_aggregate_from_the_first_batch_on(tmp_path: Path) -> None:
    """As of the batch before, so empty at first. Kills: a table that only its first batch makes."""
    seen: list[int] = []
    with shop(tmp_path, batch_rows_max=5) as made:
        made.aggregate("totals", source="orders", by="sku", n=("qty", "count"))

        @made.table("rows")
        def rows(orders: pd.DataFrame, totals: pd.DataFrame) -> pd.DataFrame:
            seen.append(int(totals["n"].sum()))
            return orders

        made.run(progress=False)
        assert seen == [0, 5]
        assert made.read("totals")["n"].sum() == 10


def test_a_keyed_step_replaces_and_removes_rows(tmp_path: Path) -> None:
    """The last row of a key wins; ``_tombstone`` removes. Kills: DuckDB's first-wins upsert."""
    log = orders(0)
    log.create("orders")
    for qty in (1, 2, 3):
        log.append("orders", {"sku": "a", "qty": qty})
    log.append("orders", {"sku": "b", "qty": 1})
    with shop(tmp_path, log) as made:

        @made.table("latest", key="sku")
        def latest(orders: pd.DataFrame) -> pd.DataFrame:
            return orders.assign(_tombstone=orders.qty < 0)

        made.run()
        assert dict(made.sql("SELECT sku, qty FROM latest").fetchall()) == {"a": 3, "b": 1}
        log.append("orders", {"sku": "a", "qty": -1})
        made.run()
        assert dict(made.sql("SELECT sku, qty FROM latest").fetchall()) == {"b": 1}


def test_a_new_field_becomes_a_column_in_the_batch_that_brings_it(tmp_path: Path) -> None:
    log = orders(2)
    with kf.Pipeline(tmp_path / "p.duckdb", source=log) as made:
        made.topic("orders", schema=SCHEMA, on_new_field="add")
        made.land("orders")
        made.run()
        log.append("orders", {"sku": "x", "qty": 5, "coupon": "HALF"})
        made.run()
        assert made.sql("SELECT coupon FROM orders ORDER BY qty").fetchall() == [(None,), (None,), ("HALF",)]
        assert made.schema("orders").to_dict()["coupon"] == "str"


def test_dead_letters_are_kept_and_can_be_retried(tmp_path: Path) -> None:
    log = orders(3)
    log.append("orders", {"sku": "late"}, key="k", timestamp_ms=1234)
    with shop(tmp_path, log) as made:
        made.topic("orders", schema={"sku": "str", "qty": "int64 not null"})
        made.land("orders")
        assert made.run().dead_letters == 1
        (dead,) = made.dead_letters().to_dict("records")
        assert (dead["topic"], dead["offset"], dead["key"], dead["value"]) == (
            "orders",
            3,
            b"k",
            b'{"sku": "late"}',
        )
        assert made.retry_dead_letters().dead_letters == 1
        made.topic("orders", schema=SCHEMA)
        assert made.retry_dead_letters().dead_letters == 0
        assert made.dead_letters().empty
        assert made.sql("SELECT sku FROM orders WHERE qty IS NULL").fetchall() == [("late",)]
        assert set(made.status().positions.values()) == {4}


def test_a_query_may_give_any_of_duckdbs_types(tmp_path: Path) -> None:
    given = (
        "MAP {'k': qty} AS m, {'a': [1.5, NULL]} AS s, TIME '12:00:01.5' AS t, "
        "'\\xAA\\x00'::BLOB AS b, 18446744073709551615::UBIGINT AS u, "
        "TIMESTAMP_NS '2024-01-01 00:00:00.123456789' AS n"
    )
    with shop(tmp_path, orders(2)) as made:
        made.sql_table("odd", f"SELECT qty, {given} FROM orders")
        made.run()
        made.run()  # into the table as it is stored
        expected = made.sql(f"SELECT qty, {given} FROM odd ORDER BY qty").fetchall()
        assert made.sql("FROM odd ORDER BY qty").fetchall() == expected


def test_a_type_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.sql_table("odd", "SELECT union_value(n := qty) AS tagged FROM orders")
        with pytest.raises(SchemaError, match=r"table 'odd', column 'tagged': .* cannot be stored"):
            made.run()


def test_too_many_dead_letters_stop_the_run(tmp_path: Path) -> None:
    log = MemorySource({"orders": [{"sku": 1} for _ in range(50)]})
    with shop(tmp_path, log) as made:
        made.land("orders")
        with pytest.raises(TooManyDeadLetters, match="sku: expected str, got number 1"):
            made.run()
        assert made.dead_letters().empty


def test_a_changed_definition_is_said_aloud(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.sql_table("some", "SELECT sku, qty FROM orders WHERE qty > 1")
        made.run()
        made.sql_table("some", "SELECT sku, qty FROM orders WHERE qty > 2")
        with pytest.warns(UserWarning, match="definition of some has changed"):
            made.run()
    with shop(tmp_path, on_definition_change="stop") as made:
        made.sql_table("some", "SELECT sku, qty FROM orders WHERE qty > 3")
        with pytest.raises(DefinitionError, match="some has changed"):
            made.run()


def keyed(key: str) -> Callable[[kf.Pipeline], object]:
    return lambda made: made.table("t", key=key)(lambda orders: orders.drop_duplicates(key, keep="last"))


def grouped(query: str) -> Callable[[kf.Pipeline], object]:
    return lambda made: made.sql_table("t", f"SELECT {query} FROM orders GROUP BY 1")


def summed(by: str, **measures: tuple[str, str]) -> Callable[[kf.Pipeline], object]:
    return lambda made: made.aggregate("t", source="orders", by=by, **measures)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (keyed("sku"), keyed("qty")),
        (keyed("sku"), summed("sku", n=("qty", "sum"))),
        (summed("sku", n=("qty", "sum")), summed("qty", n=("qty", "sum"))),
        (summed("sku", n=("qty", "sum")), summed("sku", n=("qty", "sum"), most=("qty", "max"))),
        (summed("sku", n=("qty", "sum")), keyed("sku")),
        (grouped("sku, sum(qty), sum(-qty)"), grouped("sku, sum(-qty), sum(qty)")),
        (grouped("qty % 2, count(*)"), grouped("qty % 3, count(*)")),
    ],
)
def test_what_is_kept_in_another_form_is_not_gone_on_with(
    before: Callable[[kf.Pipeline], object], after: Callable[[kf.Pipeline], object], tmp_path: Path
) -> None:
    """Kills: sums of two columns added up, a key twice in its table, an error of DuckDB's about our state."""
    log = orders(10)
    with shop(tmp_path, log) as made:
        before(made)
        made.run()
        then = made.read("t")
    log.append("orders", {"sku": "s0", "qty": 99})
    with shop(tmp_path, log) as made:
        after(made)
        with pytest.raises(DefinitionError, match="stored as") as raised:
            made.run()
        assert "rebuild('t')" in str(raised.value)
        pd.testing.assert_frame_equal(made.read("t"), then)
        assert made.rebuild("t", progress=False) == 10
        assert made.run().rows == 1
        got = made.sql("FROM t ORDER BY ALL").fetchall()
    (tmp_path / "anew").mkdir()
    with shop(tmp_path / "anew", log) as made:
        after(made)
        made.run()
        assert made.sql("FROM t ORDER BY ALL").fetchall() == got


def test_a_form_is_not_changed_while_it_runs(tmp_path: Path) -> None:
    log = orders(10)
    with shop(tmp_path, log, commit_interval_ms=20) as made:
        summed("sku", n=("qty", "sum"))(made)
        made.start()
        while made.status().rows < 10:
            made.lag()
        summed("sku", n=("qty", "max"))(made)
        log.append("orders", {"sku": "s0", "qty": 99})  # the batch that waits for it is still the old one's
        while made.status().rows < 11 and made.status().state == "running":
            made.lag()
        log.append("orders", {"sku": "s0", "qty": 100})
        with pytest.raises(DefinitionError, match="stored as"):
            made.wait(30)
        summed("sku", n=("qty", "sum"))(made)
        made.run()
        assert made.read("t")["n"].sum() == sum(range(10)) + 199


def test_two_pipelines_share_a_file_but_no_table(tmp_path: Path) -> None:
    log = orders(4)
    with shop(tmp_path, log) as one, kf.Pipeline(tmp_path / "shop.duckdb", source=log, name="two") as two:
        one.land("orders")
        one.run()
        two.topic("orders", schema=SCHEMA)
        two.land("orders", table="copy")
        assert two.run().rows == 4
        two.land("orders")
        with pytest.raises(DefinitionError, match="written by pipeline 'shop'"):
            two.run()


def test_making_a_pipeline_again_stops_the_old_one(tmp_path: Path) -> None:
    log = orders(4)
    old = shop(tmp_path, log, commit_interval_ms=20)
    old.land("orders")
    old.start()
    with shop(tmp_path, log) as new:
        assert old.status().state == "stopped"
        new.land("orders")
        new.run()
        with pytest.raises(Fenced, match="made again"):
            old.run()
        assert len(new.read("orders")) == 4


def test_background_errors_are_raised_by_wait(tmp_path: Path) -> None:
    """Kills: printing from the thread, or a run that ends silently."""
    with shop(tmp_path) as made:
        made.table("broken", inputs=["orders"])(lambda batch: batch.nothing)
        made.start()
        with pytest.raises(StepError):
            made.wait(20)
        assert made.status().state == "failed"
        assert "Step 'broken' raised" in (made.status().error or "")


def test_pause_resume_stop(tmp_path: Path) -> None:
    log = orders(4)
    with shop(tmp_path, log, commit_interval_ms=20) as made:
        made.land("orders")
        made.start()
        _until(lambda: made.status().rows == 4)
        made.pause()
        _until(lambda: made.status().state == "paused")
        log.append("orders", {"sku": "late", "qty": 1})
        assert made.status().rows == 4
        made.resume()
        _until(lambda: made.status().rows == 5)
        made.stop()
        assert made.status().state == "stopped"
        assert made.wait().rows == 5


def test_ctrl_c_in_a_user_function_rolls_back_and_says_so(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.land("orders")

        @made.table("slow", inputs=["orders"])
        def slow(batch: pd.DataFrame) -> pd.DataFrame:
            signal.raise_signal(signal.SIGINT)
            return batch

        with pytest.raises(KeyboardInterrupt) as caught:
            made.run()
        assert "rolled back" in " ".join(caught.value.__notes__)
        assert set(made.status().positions.values()) == {0}
        made.table("slow", inputs=["orders"])(lambda batch: batch)
        assert made.run().rows == 10


def test_ctrl_c_interrupts_a_long_query_and_leaves_connections_usable(tmp_path: Path) -> None:
    """Kills: running the query on the main thread, where DuckDB eats the signal."""
    with shop(tmp_path) as made:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            made.sql("SELECT count(*) FROM range(100_000_000_000) a WHERE hash(a.range) = 1")
        assert made.sql("SELECT 1").fetchall() == [(1,)]


def test_sigterm_finishes_the_batch_and_returns(tmp_path: Path) -> None:
    with shop(tmp_path, commit_interval_ms=20) as made:

        @made.table("rows", inputs=["orders"])
        def rows(batch: pd.DataFrame) -> pd.DataFrame:
            os.kill(os.getpid(), signal.SIGTERM)
            return batch

        report = made.run(until=None)
        assert report.rows == 10
        assert len(made.read("rows")) == 10


def test_reading_is_a_snapshot_with_positions(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.land("orders")
        made.run()
        result = made.sql("SELECT count(*) AS n FROM orders")
        assert {str(tp): at for tp, at in result.positions.items()} == {"orders[0]": 10}
        assert result.batch_id == 0
        assert result.df().attrs["positions"] == {"orders[0]": 10}
        assert "as of batch 0" in repr(result)
        with pytest.raises(KframeError, match="only reads"):
            made.sql("DELETE FROM orders")


def test_what_a_record_carries_is_escaped_in_html(tmp_path: Path) -> None:
    log = MemorySource({"orders": [{"sku": "<script>alert(1)</script>", "qty": 1}]})
    with shop(tmp_path, log) as made:
        made.land("orders")
        made.run()
        assert "<script>" not in made.sql("FROM orders")._repr_html_()


def test_rewind_moves_results_and_positions_together(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.land("orders")
        made.aggregate("sums", source="orders", by="sku", n=("qty", "sum"))
        made.run()
        made.rewind("earliest")
        assert made.sql(
            "SELECT count(*) FROM information_schema.tables WHERE table_schema = 'main'"
        ).fetchall() == [(0,)]
        assert made.run().rows == 10
        assert len(made.read("orders")) == 10
        assert made.read("sums")["n"].sum() == 45
        with pytest.raises(ConfigError, match="in part"):
            made.rewind("batch 3")


def test_rebuild_computes_one_table_anew_and_leaves_the_rest(tmp_path: Path) -> None:
    log = orders(10)
    with shop(tmp_path, log, batch_rows_max=3) as made:
        made.land("orders")
        made.aggregate("sums", source="orders", by="sku", n=("qty", "sum"))
        made.run()
        log.append("orders", {"sku": "s0", "qty": 1000})
        made.aggregate("sums", source="orders", by="sku", n=("qty", "max"), u=("sku", "nunique"))
        assert made.rebuild("sums") == 10
        assert dict(made.sql("SELECT sku, n FROM sums").fetchall()) == {"s0": 9, "s1": 7, "s2": 8}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert made.run().rows == 1
        assert dict(made.sql("SELECT sku, n FROM sums").fetchall()) == {"s0": 1000, "s1": 7, "s2": 8}
        assert len(made.read("orders")) == 11
        log.expire("orders", 5)
        with pytest.raises(LostRange):
            made.rebuild("sums")
        assert len(made.read("sums")) == 3


def test_positions_of_another_start(tmp_path: Path) -> None:
    with shop(tmp_path, start_from="latest") as made:
        made.land("orders")
        assert made.run().rows == 0
    with shop(tmp_path / "..", orders(10), name="other", start_from={0: 7}) as made:
        made.land("orders", table="tail")
        assert made.run().rows == 3
    os.unlink(tmp_path / ".." / "shop.duckdb")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"commit_intervall_ms": 5}, "Did you mean commit_interval_ms"),
        ({"commit_interval_ms": 0}, "at least 1"),
        ({"dead_letters_max_ratio": 2}, r"not in \[0, 1\]"),
        ({"processing_guarantee": "maybe"}, "not one of"),
        ({"kafka_config": {"plugin.library.paths": "evil.so"}, "brokers": "b:1"}, "refused"),
        ({"kafka_config": {"enable.auto.commit": True}, "brokers": "b:1"}, "exactly-once depends on it"),
        ({}, "either brokers= or source="),
    ],
)
def test_unusable_options(tmp_path: Path, options: dict[str, object], told: str) -> None:
    needs = {} if "brokers" in options or not options else {"source": orders()}
    with pytest.raises(ConfigError, match=told):
        kf.Pipeline(tmp_path / "p.duckdb", **needs, **options)  # type: ignore[arg-type]


def test_kafka_streams_names_are_accepted(tmp_path: Path) -> None:
    config = {"processing.guarantee": "exactly_once_v2", "commit.interval.ms": "250"}
    with kf.Pipeline(tmp_path / "p.duckdb", source=orders(), kafka_config=config) as made:
        assert made._options.commit_interval_ms == 250
        assert made._options.processing_guarantee == "exactly_once"


def test_undefined_names_say_what_there_is(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        with pytest.raises(DefinitionError, match="'order' names no topic or table"):
            made.table("x")(lambda order: order)
        with pytest.raises(DefinitionError, match="reads no topic"):
            made.table("x")(lambda: None)
        with pytest.raises(DefinitionError, match="has no topic 'payments'"):
            made.land("payments")
        with pytest.raises(DefinitionError, match="no steps"):
            made.run()


def test_a_result_that_is_no_frame_or_lacks_its_key(tmp_path: Path) -> None:
    with shop(tmp_path) as made:
        made.table("x", inputs=["orders"])(lambda batch: batch.qty)
        with pytest.raises(SchemaError, match="not a DataFrame"):
            made.run()
        made.table("x", inputs=["orders"], key="nope")(lambda batch: batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(SchemaError, match="no column 'nope'"):
                made.run()


def _until(condition: object, seconds: float = 10) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen in time")


def test_what_would_change_one_instance_alone_is_refused(tmp_path: Path) -> None:
    with kf.Pipeline(tmp_path / "p.duckdb", brokers="127.0.0.1:1", standby=True) as made:
        made.topic("orders", schema=SCHEMA)
        made.land("orders")
        for refused in (lambda: made.rebuild("orders"), made.rewind):
            with pytest.raises(ConfigError, match="changes this file alone"):
                refused()
        with pytest.raises(DefinitionError, match="one instance's file"):
            made.connect(tmp_path / "folder", tables=["orders"])
    with pytest.raises(ConfigError, match="needs exactly_once"):
        kf.Pipeline(tmp_path / "q.duckdb", brokers="b:1", standby=True, processing_guarantee="at_least_once")
    with kf.Pipeline(tmp_path / "r.duckdb", source=orders(), standby=True) as made:
        made.topic("orders", schema=SCHEMA)
        made.land("orders")
        with pytest.raises(ConfigError, match="brokers="):
            made.run(progress=False)


def test_a_size_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no size"):
        kf.Pipeline(tmp_path / "p.duckdb", source=orders(), memory_limit="lots")
    with shop(tmp_path, memory_limit="300MB") as made:
        (limit,) = made.sql("SELECT current_setting('memory_limit')").fetchall()[0]
        assert limit.startswith("286")
