"""What pipelines show of themselves: escaped, from what they know, only changes, never raising."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import kframe as kf
from kframe import markup
from kframe.meter import Meter
from kframe.model import BatchReport, OffsetRange, Position, RunReport, TopicPartition
from kframe.notebook.page import page
from kframe.notebook.panel import IDLE_S, Changes
from kframe.schema import Schema
from kframe.status import Failure, Status
from kframe.testing import MemorySource

HOSTILE = """<script>alert("x")</script>&'<img src=x onerror=alert(1)>"""


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sources: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_harmless(html: str, told: str = HOSTILE) -> None:
    """Nothing that runs, nothing that notebooks strip but `STYLE`, and the hostile text as text."""
    seen = Tags(html)
    assert not seen.tags & {"script", "svg", "iframe", "object", "link", "form"}
    assert not any(name.startswith("on") for name in seen.attributes)
    assert all(source.startswith("data:image/") for source in seen.sources)
    assert told in seen.text


@pytest.fixture
def log() -> MemorySource:
    return MemorySource({"orders": [{"n": i} for i in range(10)]})


@pytest.fixture
def shop(log: MemorySource, tmp_path: Path) -> Iterator[kf.Pipeline]:
    with kf.Pipeline(tmp_path / "shop.duckdb", source=log, commit_interval_ms=20) as made:
        made.topic("orders", schema={"n": "int64"})
        made.land("orders", table="rows")
        yield made


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most 20 s."""
    waiting = threading.Event()
    for _ in range(2000):
        if condition():
            return
        waiting.wait(0.01)
    raise AssertionError("it did not happen within 20 s")


# ---- escaping -----------------------------------------------------------------------------------------


def status(**changes: Any) -> Status:
    made = Status(HOSTILE, "running", 3, 12, 1, 5.0, None, {}, None, None)
    return replace(made, **changes)


def failure(told: str = HOSTILE) -> Failure:
    ranges = (OffsetRange(told, 0, 1, 2),)
    return Failure(told, told, told, told, told, told, ranges, told)


@pytest.mark.parametrize(
    "html",
    [
        page(status()),
        page(status(lag={TopicPartition(HOSTILE, 1): 7})),
        page(status(trouble=HOSTILE)),
        page(status(state="failed", failure=failure())),
        RunReport(HOSTILE, 1, 2, 3, 0.5, {TopicPartition(HOSTILE, 0): 1})._repr_html_(),
        OffsetRange(HOSTILE, 0, 1, 2)._repr_html_(),
        Schema.parse({HOSTILE: "str"})._repr_html_(),
        kf.LocalKafka(HOSTILE)._repr_html_(),
        markup.figure(HOSTILE, HOSTILE, HOSTILE),
    ],
)
def test_whatever_names_and_errors_carry_is_text(html: str) -> None:
    """Kills: a value put into HTML as it is."""
    check_harmless(html)


@pytest.fixture
def wide() -> Iterator[None]:
    with pd.option_context("display.max_colwidth", None):
        yield


@pytest.mark.usefixtures("wide")
def test_a_hostile_record_stays_text_in_results_live_views_and_frames(
    log: MemorySource, shop: kf.Pipeline
) -> None:
    """Kills: a table drawn without escaping; an alternative text that ends its attribute."""
    log.append("words", {"w": HOSTILE, "n": 1})
    shop.topic("words", schema={"w": "str", "n": "int64"})
    shop.land("words")
    log.append("orders", HOSTILE.encode())
    shop._options = replace(shop._options, dead_letters_max_ratio=1.0)
    shop.run()
    query = f"SELECT *, '{HOSTILE.replace(chr(39), chr(39) * 2)}' AS x FROM words"
    check_harmless(shop.sql(query)._repr_html_())
    check_harmless(shop.live(query)._repr_html_())
    check_harmless(shop.live("SELECT w, n FROM words", chart="bar", title=HOSTILE)._repr_html_())
    check_harmless(kf.report(shop.live(query, title=HOSTILE), title=HOSTILE)._repr_html_())
    check_harmless(shop.live(f'FROM "{HOSTILE}"')._repr_html_())
    assert "<script" not in shop.dead_letters().to_html()


def test_an_error_in_a_users_function_is_text_and_names_step_line_and_ranges(shop: kf.Pipeline) -> None:
    def broken(orders: pd.DataFrame) -> pd.DataFrame:
        raise RuntimeError(HOSTILE)

    shop.table("broken")(broken)
    with pytest.raises(kf.errors.StepError):
        shop.run()
    html = shop._repr_html_()
    check_harmless(html, f"Step 'broken' raised RuntimeError: {HOSTILE}")
    seen = Tags(html).text
    assert "raise RuntimeError(HOSTILE)" in seen
    assert "Rolled back: orders[0] offsets [0, 10)" in seen
    assert "Traceback (most recent call last)" in seen
    assert "tables and positions are as they were" in seen


def test_a_batch_that_could_not_be_written_names_what_was_rolled_back(
    log: MemorySource, shop: kf.Pipeline
) -> None:
    """Kills: ranges that functions' errors alone carry."""
    shop.table("kinds")(
        lambda orders: orders.assign(n=orders.n.astype("str")) if orders.n.max() > 9 else orders
    )
    shop.run()
    log.append("orders", {"n": 10})
    with pytest.raises(kf.errors.SchemaError):
        shop.run()
    seen = Tags(shop._repr_html_()).text
    assert "SchemaError: table 'kinds', column 'n': stored as BIGINT, the rows have VARCHAR" in seen
    assert "Rolled back: orders[0] offsets [10, 11)" in seen


def test_configured_secrets_are_not_in_a_page(tmp_path: Path) -> None:
    """Kills: an error shown as it is, when a function's exception repeats the configuration."""
    secret = "hunter2-hunter2"
    config = {"sasl.username": "me", "sasl.password": secret, "sasl.mechanism": "PLAIN"}
    with kf.Pipeline(tmp_path / "s.duckdb", brokers="127.0.0.1:1", kafka_config=config) as made:
        run = made._new_run(until_end=True, progress=False)
        try:
            raise RuntimeError(f"no luck with {secret}")
        except RuntimeError as error:
            run.error, run.state, run.trouble = error, "failed", f"trouble with {secret}"
        run.ended.set()
        assert "no luck with [hidden]" in made._repr_html_()
        assert secret not in made._repr_html_() + repr(made.status()) + str(made.status().failure)


# ---- never raising, never asking ------------------------------------------------------------------------


def test_reprs_in_every_state(log: MemorySource, shop: kf.Pipeline) -> None:
    """Kills: a repr that needs a run, or an open file."""
    views = [shop.live("FROM rows"), kf.report(shop.live("FROM nowhere"))]

    def shown() -> list[str]:
        objects = [shop, shop.status(), *views]
        return [repr(o) for o in objects] + [o._repr_html_() for o in objects]

    assert "new" in shown()[0]
    shop.start()
    until(lambda: shop.status().rows == 10)
    assert "running: 10 rows" in shown()[0]
    shop.pause()
    until(lambda: shop.status().state == "paused")
    assert "paused" in shown()[0]
    shop.stop()
    assert "stopped" in shown()[0]
    shop.close()
    assert "stopped" in shown()[0]


def test_the_end_of_the_process_is_a_stop_and_no_failure(tmp_path: Path) -> None:
    """Kills: a batch begun in advance when the interpreter makes no more threads."""
    script = f"""
import atexit, threading
atexit.register(lambda: print(shop.status().state, shop.status().error))
import kframe as kf
from kframe.testing import MemorySource
log = MemorySource({{"orders": [{{"n": 1}}]}})
shop = kf.Pipeline({str(tmp_path / "p.duckdb")!r}, source=log, commit_interval_ms=5)
shop.topic("orders", schema={{"n": "int64"}})
shop.land("orders")
def feed():  # asks the pipeline nothing: a daemon thread inside of DuckDB aborts the process as it ends
    while True:
        log.append("orders", {{"n": 2}})
        threading.Event().wait(0.001)
threading.Thread(target=feed, daemon=True).start()
shop.start()
while shop.status().batches < 20: threading.Event().wait(0.01)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "stopped None\n", done.stderr


def test_a_page_that_cannot_be_drawn_says_why(shop: kf.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Status:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(shop, "status", fail)
    check_harmless(shop._repr_html_(), f"RuntimeError: {HOSTILE}")


def test_reprs_ask_no_broker(log: MemorySource, shop: kf.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a lag that is looked up in Kafka when it is shown."""
    shop.start()
    until(lambda: shop.status().rows == 10)
    shop.pause()
    until(lambda: shop.status().state == "paused")
    log.append("orders", {"n": 10})

    def ask(*_: object) -> None:
        raise AssertionError("a broker was asked")

    for name in ("describe", "offsets", "cluster_id", "fetch"):
        monkeypatch.setattr(log, name, ask)
    assert shop.status().lag == {TopicPartition("orders", 0): 1}
    assert "offsets behind" in Tags(shop._repr_html_()).text
    monkeypatch.undo()


# ---- what a page says -----------------------------------------------------------------------------------


def test_a_page_shows_the_worst_partitions_and_counts_the_others() -> None:
    lag = {TopicPartition("orders", p): 10 * p for p in range(1000)}
    seen = Tags(page(status(lag=lag))).text
    assert "orders[999]" in seen
    assert "orders[994]" not in seen
    assert f"and 995 more, {sum(10 * p for p in range(995)):,} together" in seen
    assert f"{sum(lag.values()):,}" in seen


def test_a_page_tells_states_rates_progress_and_limits_in_words() -> None:
    """Kills: a sign or a colour that stands alone."""
    timings = {"fetch": 10.0, "decode": 20.0, "steps": 60.0, "write": 10.0}
    last = BatchReport(7, (), 55, 0, timings, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))
    seen = page(
        status(
            last=last,
            lag={TopicPartition("orders", 0): 1_200_000},
            processed_per_s=52_345.0,
            arriving_per_s=40_000.0,
            catch_up_s=84.0,
            progress=0.999,
            history=((0.0, 1.0, 2.0), (1.0, 3.0, 2.0)),
        )
    )
    words = Tags(seen).text
    for told in (
        "running",
        "1,200,000",
        "caught up in 1 min 24 s",
        "processed 52,300/s",
        "arriving 40,000/s",
    ):
        assert told in words
    for told in ("batch 7 committed 2026-01-02 03:04:05 UTC", "90 ms", "your functions 60 %", "99 %"):
        assert told in words
    assert 'aria-label="processed of what has arrived"' in seen
    assert 'alt="The last minute: processed 52,300/s, arriving 40,000/s at its end."' in seen


@pytest.mark.parametrize("colour", [markup.PROCESSED, markup.ARRIVING])
@pytest.mark.parametrize("ground", ["#ffffff", "#111111"])
def test_lines_can_be_seen_on_light_and_dark(colour: str, ground: str) -> None:
    """WCAG 2.2, 1.4.11: at least 3:1."""

    def luminance(hex_: str) -> float:
        parts = [int(hex_[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    light, dark = sorted((luminance(colour), luminance(ground)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (markup.rate(0), "0/s"),
        (markup.rate(3.14), "3.1/s"),
        (markup.rate(999.6), "1,000/s"),
        (markup.rate(52_345), "52,300/s"),
        (markup.duration(0.42), "0.4 s"),
        (markup.duration(59.6), "1 min 0 s"),
        (markup.duration(3725), "1 h 2 min"),
        (markup.duration(400_000), "4 days"),
        (markup.milliseconds(3.21), "3.2 ms"),
        (markup.milliseconds(2400), "2.4 s"),
    ],
)
def test_numbers_as_people_read_them(told: str, expected: str) -> None:
    assert told == expected


# ---- rates ----------------------------------------------------------------------------------------------


def metered(samples: Iterable[tuple[float, dict[int, int], dict[int, int]]], share: float = 1.0) -> Meter:
    """A meter of a log in which a `share` of the offsets hold records."""
    now = [0.0]
    meter = Meter(clock=lambda: now[0])
    for at, positions, ends in samples:
        now[0] = at
        meter.note(
            {TopicPartition("t", p): Position(o) for p, o in positions.items()},
            {TopicPartition("t", p): o for p, o in ends.items()},
            int(share * sum(positions.values())),
        )
    return meter


def test_rates_are_of_the_last_seconds() -> None:
    samples = [(float(s), {0: 100 * s}, {0: 1000 + 10 * s}) for s in range(20)]
    assert metered(samples).rates() == (100.0, 10.0, 100.0)
    assert metered([*samples, (60.0, {0: 1900}, {0: 1190})]).rates() == (0.0, 0.0, 0.0)


def test_a_log_with_gaps_has_fewer_records_than_offsets_and_the_page_says_so() -> None:
    """Kills: a rate of offsets that is called records."""
    samples = [(float(s), {0: 100 * s}, {0: 1000 + 10 * s}) for s in range(20)]
    meter = metered(samples, share=0.5)
    assert meter.rates() == (100.0, 10.0, 50.0)
    rates = dict(zip(("processed_per_s", "arriving_per_s", "records_per_s"), meter.rates(), strict=True))
    seen = Tags(page(status(history=meter.history(), **rates))).text
    assert "offsets, last minute; 50/s of them records" in seen
    rates["records_per_s"] = rates["processed_per_s"]
    seen = Tags(page(status(history=meter.history(), **rates))).text
    assert "offsets, last minute" in seen
    assert "records" not in seen


def test_a_new_partition_is_no_burst_of_records() -> None:
    """Kills: rates from the differences of sums."""
    meter = metered([(0, {0: 0}, {0: 10}), (1, {0: 5}, {0: 20}), (2, {0: 10, 1: 500}, {0: 30, 1: 9000})])
    assert meter.rates()[:2] == (5.0, 10.0)


def test_progress_is_of_what_lay_before_the_run() -> None:
    meter = metered([(0, {0: 100}, {0: 200}), (1, {0: 150}, {0: 200})])
    tp = TopicPartition("t", 0)
    assert meter.progress({tp: 150}, {tp: 200}) == 0.5
    assert meter.progress({tp: 100}, {tp: 100}) is None


def test_samples_are_a_second_apart_and_bounded() -> None:
    """Kills: a sample for each batch, which would cover moments only and grow."""
    meter = metered([(i / 100, {0: i}, {0: i}) for i in range(20_000)])
    assert len(meter.history()) <= 64
    assert meter.history()[-1][0] - meter.history()[0][0] >= 60


# ---- changes only ---------------------------------------------------------------------------------------


class Content:
    """A `Shown` that counts how often it is drawn."""

    def __init__(self) -> None:
        self.value = self.drawn = self.movement = 0

    def html(self, *, id: str = "", static: bool = True) -> str:
        self.drawn += 1
        return str(self.value)

    def moved(self) -> int:
        return self.movement

    def going(self) -> bool:
        return True


def test_only_changes_are_sent_and_few_when_idle() -> None:
    """Kills: sending what the browser has already; drawing four times a second what does not move."""
    now, content = [0.0], Content()
    changes = Changes(content, clock=lambda: now[0])
    assert changes.next() == "0"
    sent = drawn = 0
    for tick in range(1, 401):  # 100 s in which nothing moves, and time changes the content
        now[0], content.value = tick / 4, tick
        sent += changes.next() is not None
    drawn = content.drawn
    assert sent == drawn - 1 == 100 / IDLE_S
    for _ in range(400):
        now[0] += 0.25
        assert changes.next() is None  # the same content is not sent again
    now[0] += 0.25
    content.movement, content.value = 1, -1
    assert changes.next() == "-1"  # what moves is sent at once


# ---- live results ---------------------------------------------------------------------------------------


def test_a_live_view_asks_again_only_after_a_commit(log: MemorySource, shop: kf.Pipeline) -> None:
    """Kills: asking at each look."""
    asked: list[str] = []
    real = shop.sql
    shop.sql = lambda text, *_: (asked.append(text), real(text))[1]  # type: ignore[method-assign]
    view = shop.live("SELECT count(*) AS n FROM rows")
    assert "before the first batch" in view._repr_html_()
    assert "<td>0</td>" in view._repr_html_()
    assert len(asked) == 1
    shop.run()
    assert "as of batch 0" in view._repr_html_()
    assert "<td>10</td>" in view._repr_html_()
    assert len(asked) == 2
    log.append("orders", {"n": 11})
    shop.run()
    assert "<td>11</td>" in view._repr_html_()
    frame = view.df()
    assert frame is not None
    assert frame.attrs["batch_id"] == 1


def test_a_live_view_keeps_its_last_rows_when_the_query_fails(log: MemorySource, shop: kf.Pipeline) -> None:
    shop.run()
    view = shop.live("SELECT count(*) AS n FROM rows")
    assert "<td>10</td>" in view._repr_html_()
    log.append("orders", {"n": 11})
    shop.run()
    shop.close()
    html = view._repr_html_()
    assert "<td>10</td>" in html
    assert "as of batch 0" in html
    assert 'role="alert"' in html


@pytest.mark.parametrize("chart", ["line", "bar"])
def test_charts_are_images_that_say_what_they_show(shop: kf.Pipeline, chart: str) -> None:
    shop.run()
    for query in (
        "SELECT n, n * 2 AS twice, n::DECIMAL(9,2) AS money FROM rows",
        "SELECT n::VARCHAR AS name, n FROM rows",
        "SELECT TIMESTAMPTZ '2026-01-01' + INTERVAL 1 HOUR * n AS at, n FROM rows",
        "SELECT DATE '2026-01-01' + n::INTEGER AS day, CASE WHEN n > 4 THEN n END AS n FROM rows",
        "SELECT n FROM rows",
        "SELECT n, n AS m FROM rows WHERE n < 0",
    ):
        html = shop.live(query, chart=chart, title="Numbers")._repr_html_()
        assert f'alt="{chart} chart of Numbers; ' in html, html
        assert 'src="data:image/png;base64,' in html


def test_charts_that_cannot_be_drawn_say_so(shop: kf.Pipeline) -> None:
    shop.run()
    with pytest.raises(kf.errors.ConfigError, match="'pie' is not one of"):
        shop.live("FROM rows", chart="pie")
    with pytest.raises(kf.errors.ConfigError, match="takes live views"):
        kf.report()
    html = shop.live("SELECT 'a' AS a, 'b' AS b", chart="bar")._repr_html_()
    assert "There is no numeric column to draw" in html
