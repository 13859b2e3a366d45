"""The ledger's fence: compare-and-set on positions, and epochs."""

# ruff: noqa: PT012 - what is raised inside of a transaction is what these tests are about

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import kframe as kf
from kframe.commit.ledger import Ledger, now
from kframe.commit.store import Store, open_store
from kframe.commit.transaction import transaction
from kframe.errors import Fenced
from kframe.model import BatchReport, OffsetRange, Position, TopicPartition
from kframe.testing import MemorySource

TP = TopicPartition("orders", 0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "shop.duckdb")
    yield store
    store.close()


def claimed(store: Store, at: int | None = None) -> Ledger:
    ledger = Ledger(store, "shop")
    with transaction(store, lambda: False) as cur:
        ledger.claim(cur, "a test", None)
        if at is not None:
            ledger.add_positions(cur, {TP: Position(at)})
    return ledger


def advance(ledger: Ledger, start: int, stop: int) -> None:
    with transaction(ledger.store, lambda: False) as cur:
        ledger.advance(cur, [OffsetRange(*TP, start, stop, 4)])


def test_positions_move_over_the_ranges(store: Store) -> None:
    ledger = claimed(store, at=5)
    advance(ledger, 5, 9)
    assert ledger.positions() == {TP: Position(9, 4)}


@pytest.mark.parametrize("start", [4, 6, 0])
def test_a_position_that_is_elsewhere_fences(store: Store, start: int) -> None:
    """Kills: ``UPDATE`` without ``position = start``, or without counting the rows it changed."""
    ledger = claimed(store, at=5)
    with pytest.raises(Fenced, match="another run has taken over"):
        advance(ledger, start, 9)
    assert ledger.positions() == {TP: Position(5)}


def test_one_of_several_ranges_elsewhere_fences_all(store: Store) -> None:
    """Kills: ``any row moved`` in the place of ``every row moved``."""
    ledger = claimed(store, at=5)
    with pytest.raises(Fenced), transaction(store, lambda: False) as cur:
        ledger.advance(cur, [OffsetRange(*TP, 5, 9), OffsetRange("orders", 1, 0, 3)])
    assert ledger.positions() == {TP: Position(5)}


def test_a_newer_epoch_fences_the_older_run(store: Store) -> None:
    """Kills: ``UPDATE`` without ``epoch = mine``: the zombie's position is where it expects it."""
    zombie = claimed(store, at=5)
    newer = claimed(store)
    assert newer.epoch == zombie.epoch + 1
    with pytest.raises(Fenced, match=f"epoch {zombie.epoch}"):
        advance(zombie, 5, 9)
    advance(newer, 5, 9)
    assert newer.positions()[TP].offset == 9


def test_a_zombie_cannot_take_a_batch_id(store: Store) -> None:
    """Kills: a batch log without the fence (a retry of dead letters moves no position)."""
    zombie, newer = claimed(store), claimed(store)
    report = BatchReport(0, (), 1, 0, {}, now())
    with pytest.raises(Fenced), transaction(store, lambda: False) as cur:
        zombie.record_batch(cur, report, 0)
    with transaction(store, lambda: False) as cur:
        newer.record_batch(cur, report, 0)
    with pytest.raises(Fenced), transaction(store, lambda: False) as cur:
        newer.record_batch(cur, report, 0)
    assert newer.next_batch_id() == 1
    assert newer.has_batch(0)
    assert not zombie.has_batch(0)


def test_two_transactions_at_once_one_wins(store: Store) -> None:
    """Kills: a read check in the place of compare-and-set: both would commit."""
    ledger = claimed(store, at=5)
    ranges = [OffsetRange(*TP, 5, 9)]
    with pytest.raises(Fenced), transaction(store, lambda: False) as late:
        late.execute("SELECT * FROM _kframe.positions").fetchall()
        advance(ledger, 5, 9)
        ledger.advance(late, ranges)
    assert ledger.positions()[TP].offset == 9


def test_a_run_that_another_overtakes_in_its_batch_commits_nothing(tmp_path: Path) -> None:
    """Kills: rows written apart from the fence: the overtaken batch's rows would stay."""
    path = tmp_path / "shop.duckdb"
    log = MemorySource({"orders": [{"i": i} for i in range(10)]})
    overtaken = []

    def overtake(edge: str) -> None:
        if edge == "transformed" and not overtaken:
            overtaken.append(edge)
            claimed(open_store(path))

    with kf.Pipeline(path, source=log, batch_rows_max=5, at_edge=overtake) as shop:
        shop.topic("orders", schema={"i": "int64"})
        shop.land("orders")
        with pytest.raises(Fenced):
            shop.run(progress=False)
        assert overtaken
        assert shop.sql("FROM _kframe.batches").df().empty
        assert shop.run(progress=False).rows == 10
        assert sorted(shop.read("orders")["i"]) == list(range(10))


def test_positions_of_another_cluster_are_refused(store: Store) -> None:
    ledger = Ledger(store, "shop")
    with transaction(store, lambda: False) as cur:
        ledger.claim(cur, "a test", "cluster-a")
    with pytest.raises(Fenced, match="cluster-a"), transaction(store, lambda: False) as cur:
        ledger.claim(cur, "a test", "cluster-b")


def test_two_pipelines_in_one_file_keep_apart(store: Store) -> None:
    """Kills: a statement without ``pipeline = ?``."""
    shop, other = claimed(store, at=5), Ledger(store, "other")
    with transaction(store, lambda: False) as cur:
        other.claim(cur, "a test", None)
        other.add_positions(cur, {TP: Position(5)})
    advance(other, 5, 6)
    assert shop.positions() == {TP: Position(5)}
    with transaction(store, lambda: False) as cur:
        other.forget(cur)
    advance(shop, 5, 7)
    assert (other.positions(), shop.positions()[TP].offset) == ({}, 7)
