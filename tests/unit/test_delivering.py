"""A pipeline and its targets: slow ones, hanging ones, failing ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pytest

import kframe as kf
import kframe.deliver.deliverer as deliverer
import kframe.run
from kframe.commit.outbox import Outbox
from kframe.commit.store import open_store
from kframe.commit.transaction import transaction
from kframe.errors import ConfigError, DeliveryDelayed, DeliveryRefused
from kframe.model import Entry
from kframe.testing import MemorySource


class Gate:
    """A target that takes rows while it is open."""

    name = "gate"
    exact = True

    def __init__(self) -> None:
        self.position: int | None = None
        self.rows: list[int] = []
        self.opened = threading.Event()
        self.waited_at = threading.Event()
        self.error: Exception | None = None
        self._sent: list[int] = []

    def open(self, kept: int) -> int | None:
        return self.position

    def send(self, entries: Iterable[Entry]) -> None:
        self.waited_at.set()
        self.opened.wait(60)
        if self.error is not None:
            raise self.error
        self._sent = [n for e in entries for n in e.rows["n"].to_pylist()]

    def commit(self, position: int) -> None:
        self.rows, self.position, self._sent = self.rows + self._sent, position, []

    def close(self) -> None:
        pass


def pipeline(folder: Path, gate: Gate, n: int = 100) -> kf.Pipeline:
    source = MemorySource()
    for i in range(n):
        source.append("numbers", {"n": i})
    made = kf.Pipeline(folder / "p.duckdb", source=source, batch_rows_max=10)
    made.topic("numbers", schema={"n": "int64"})
    made.land("numbers")
    made.connect(gate, tables=["numbers"])
    return made


def until(condition: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(600):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it did not happen in time")


def test_reading_waits_for_a_slow_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: an outbox that grows as fast as Kafka is read."""
    monkeypatch.setattr(kframe.run, "_UNDELIVERED_MAX", 25)
    gate = Gate()
    with pipeline(tmp_path, gate) as made:
        made.start()
        until(lambda: made.status().undelivered == 30)
        assert gate.waited_at.wait(10)
        assert not made._run.ended.wait(0.5)  # type: ignore[union-attr]
        assert made.status().undelivered == 30
        gate.opened.set()
        until(lambda: made.status().rows == 100)
        made.stop()
        assert gate.rows == list(range(100))


def test_stop_is_bounded_though_a_target_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: waiting for ever; the rows lost with the run; two threads inside of one target."""
    monkeypatch.setattr(kframe.run, "_CLOSE_S", 0.1)
    monkeypatch.setattr(deliverer, "_GRACE_S", 0.1)
    gate = Gate()
    with pipeline(tmp_path, gate) as made:
        made.start()
        until(lambda: made.status().rows == 100)
        made.stop()
        assert made.status().undelivered == 100
        made.start()
        until(lambda: "an earlier run" in (made.status().trouble or ""))
        gate.opened.set()
        until(lambda: made.status().undelivered == 0)
        assert gate.rows == list(range(100))


def test_what_a_target_refuses_ends_the_run_and_is_kept(tmp_path: Path) -> None:
    """Kills: a batch rolled back, or rows dropped, for a target's sake."""
    gate = Gate()
    gate.opened.set()
    gate.error = DeliveryRefused("not this row")
    with pipeline(tmp_path, gate) as made:
        made.start()
        with pytest.raises(DeliveryRefused, match="not this row"):
            made.wait(30)
        status = made.status()
        assert status.undelivered == len(made.read("numbers")) > 0
        assert status.error == "not this row"
        gate.error = None
        made.run(progress=False)
        assert (gate.rows, made.status().undelivered) == (list(range(100)), 0)


def test_a_target_of_ones_own_has_a_name_of_its_own(tmp_path: Path) -> None:
    gate = Gate()
    gate.name = "kafka"
    with pytest.raises(ConfigError, match="that of the output topics"):
        pipeline(tmp_path, gate)


def test_trouble_shows_while_it_is_retried(tmp_path: Path) -> None:
    gate = Gate()
    gate.opened.set()
    gate.error = DeliveryDelayed("the target is away")
    with pipeline(tmp_path, gate) as made:
        made.start()
        until(lambda: made.status().trouble == "the target is away")
        assert made.status().state == "running"
        gate.error = None
        until(lambda: made.status().undelivered == 0)
        assert made.status().trouble is None


def test_the_file_does_not_grow_with_what_was_delivered(tmp_path: Path) -> None:
    """200 rounds of 100 kB in a file that ends below 5 MB. Kills: delivered rows that stay."""
    store = open_store(tmp_path / "s.duckdb")
    box = Outbox(store, "p")
    rows = pa.table({"value": [bytes(range(256)) * 4 for _ in range(100)], "n": range(100)})
    noise = pa.array([bytes((i * 7 + j * j) % 256 for j in range(1000)) for i in range(100)])
    for i in range(200):
        with transaction(store, lambda: False) as cur:
            box.post(cur, i, "t", "topic", rows.append_column("noise", noise))
        box.trim("t", (i + 1) * 100, exact=True)
        if i % 20 == 0:
            store.checkpoint()
    store.checkpoint()
    assert box.undelivered() == 0
    store.close()
    assert (tmp_path / "s.duckdb").stat().st_size < 5_000_000


class Mirror(Gate):
    """A target that keeps a table by its key, as a store would."""

    name = "mirror"

    def __init__(self) -> None:
        super().__init__()
        self.table: dict[int, dict[str, int]] = {}

    def send(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            for row in entry.rows.to_pylist():
                if entry.kind == "delete":
                    self.table.pop(row["rest"], None)
                else:
                    self.table[row["rest"]] = row


def test_a_connected_table_made_anew_is_as_it_is_here(tmp_path: Path) -> None:
    """Kills: groups that are gone here and stay there."""
    source, mirror = MemorySource(), Mirror()
    for n in range(20):
        source.append("numbers", {"n": n})
    with kf.Pipeline(tmp_path / "p.duckdb", source=source) as made:
        made.topic("numbers", schema={"n": "int64"})
        for divisor, anew in ((7, lambda: None), (5, lambda: made.rebuild("rests")), (3, made.rewind)):
            made.sql_table("rests", f"SELECT n % {divisor} AS rest, count(*) AS c FROM numbers GROUP BY 1")
            made.connect(mirror, tables=["rests"])
            anew()
            made.run(progress=False)
            assert sorted(mirror.table.values(), key=str) == sorted(
                made.read("rests").to_dict("records"), key=str
            )
            assert len(mirror.table) == divisor
