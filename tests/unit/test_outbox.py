"""The outbox: dense ids, whole batches, trimming, files from before it; and the deliverer's bookkeeping."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from kframe.commit.outbox import Due, Outbox
from kframe.commit.store import Store, open_store
from kframe.commit.transaction import transaction
from kframe.deliver.deliverer import Deliveries
from kframe.errors import DeliveryDelayed, DeliveryUnknown
from kframe.model import Entry


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store(tmp_path / "s.duckdb")
    yield made
    made.close()


def post(store: Store, box: Outbox, batch_id: int, count: int, target: str = "t") -> None:
    with transaction(store, lambda: False) as cur:
        box.post(cur, batch_id, target, "topic", pa.table({"n": range(count)}))


def ids(box: Outbox, due: Due | None, target: str = "t") -> list[tuple[int, int, int]]:
    assert due is not None
    return [(e.first_id, e.stop_id, e.rows.num_rows) for e in box.entries(target, due)]


def test_ids_are_dense_over_batches_and_trims(store: Store) -> None:
    """Kills: ids that begin anew when the outbox is empty."""
    box = Outbox(store, "p")
    post(store, box, 0, 3)
    post(store, box, 1, 2)
    post(store, box, 1, 7, target="other")
    assert ids(box, box.due("t", 0, 100)) == [(0, 3, 3), (3, 5, 2)]
    box.trim("t", 5, exact=True)
    assert (box.due("t", 5, 100), box.undelivered("t"), box.undelivered()) == (None, 0, 7)
    post(store, box, 2, 1)
    assert ids(box, box.due("t", 5, 100)) == [(5, 6, 1)]
    assert box.position("t") == (5, True)


def test_a_batch_stays_whole(store: Store) -> None:
    """Kills: a large batch cut over two deliveries."""
    box = Outbox(store, "p")
    post(store, box, 0, 1)
    post(store, box, 1, 120_000)
    due = box.due("t", 0, 10)
    assert ids(box, due) == [(0, 1, 1)]
    assert ids(box, box.due("t", 1, 10)) == [
        (1, 50_001, 50_000),
        (50_001, 100_001, 50_000),
        (100_001, 120_001, 20_000),
    ]


def test_rows_of_a_batch_that_is_rolled_back_are_not_there(store: Store) -> None:
    box = Outbox(store, "p")

    def fails() -> None:
        with transaction(store, lambda: False) as cur:
            box.post(cur, 0, "t", "topic", pa.table({"n": [1]}))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert box.undelivered() == 0


def test_trimming_conflicts_with_no_batch(store: Store) -> None:
    """Kills: a row that both the batch and the deliverer update."""
    box = Outbox(store, "p")
    post(store, box, 0, 3)
    with transaction(store, lambda: False) as cur:
        box.post(cur, 1, "t", "topic", pa.table({"n": [1]}))
        box.trim("t", 3, exact=True)
    assert ids(box, box.due("t", 3, 10)) == [(3, 4, 1)]


def test_a_file_from_before_the_outbox_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "old.duckdb"
    open_store(path).close()
    with duckdb.connect(str(path)) as con:
        for table in ("outbox", "deliveries", "outlets"):
            con.execute(f"DROP TABLE _kframe.{table}")
    store = open_store(path)
    assert Outbox(store, "p").undelivered() == 0
    store.close()


class Memory:
    """A target that keeps rows and position in memory, and can fail."""

    name = "t"
    exact = True

    def __init__(self) -> None:
        self.position: int | None = None
        self.rows: list[int] = []
        self.fail = 0
        self._sent: list[int] = []

    def open(self, kept: int) -> int | None:
        self._sent = []
        return self.position

    def send(self, entries: Iterable[Entry]) -> None:
        self._sent = [n for e in entries for n in e.rows["n"].to_pylist()]

    def commit(self, position: int) -> None:
        if self._sent and self.fail:
            self.fail -= 1
            raise DeliveryDelayed("not now")
        self.rows, self.position, self._sent = self.rows + self._sent, position, []

    def close(self) -> None:
        pass


def run(box: Outbox, target: Memory, patience_s: float = 30) -> None:
    deliveries = Deliveries(box, [target], lambda _edge: None)
    deliveries.start()
    try:
        for _ in deliveries.progress(0, patience_s):
            pass
        deliveries.check()
    finally:
        deliveries.close(5)
    deliveries.check()


def test_a_delay_is_retried_from_the_targets_position(store: Store) -> None:
    """Kills: giving up after one delay; sending again what the target has."""
    box, target = Outbox(store, "p"), Memory()
    post(store, box, 0, 3)
    target.fail = 1
    run(box, target)
    assert (target.rows, target.position, box.undelivered()) == ([0, 1, 2], 3, 0)


def test_impatience_says_what_is_kept(store: Store) -> None:
    box, target = Outbox(store, "p"), Memory()
    post(store, box, 0, 3)
    target.fail = 10**9
    with pytest.raises(DeliveryDelayed, match=r"3 committed rows could not be delivered.*not now"):
        run(box, target, patience_s=2)
    assert box.undelivered() == 3


@pytest.mark.parametrize(("held", "kept"), [(None, 3), (1, 3), (9, 3)])
def test_a_position_that_cannot_be_is_an_end(store: Store, held: int | None, kept: int) -> None:
    """Kills: beginning at 0 where the target has forgotten; passing rows over where it knows too much."""
    box, target = Outbox(store, "p"), Memory()
    post(store, box, 0, kept)
    box.trim("t", kept, exact=True)
    post(store, box, 1, 2)
    target.position = held
    with pytest.raises(DeliveryUnknown):
        run(box, target)
    assert (target.rows, box.undelivered()) == ([], 2)


def test_a_position_kept_in_the_file_alone_is_taken(store: Store) -> None:
    """After runs that delivered at least once, the target's own position is an old one. Kills: stopping."""
    box, target = Outbox(store, "p"), Memory()
    post(store, box, 0, 3)
    box.trim("t", 3, exact=False)
    post(store, box, 1, 2)
    target.position = 1
    run(box, target)
    assert (target.rows, target.position, box.position("t")) == ([0, 1], 5, (5, True))


def test_missing_rows_are_noticed(store: Store) -> None:
    """Kills: going on behind a gap of ids."""
    box, target = Outbox(store, "p"), Memory()
    post(store, box, 0, 3)
    post(store, box, 1, 3)
    store.cursor().execute("DELETE FROM _kframe.outbox WHERE first_id = 0")
    with pytest.raises(DeliveryUnknown):
        run(box, target)
    assert target.rows == []


def test_closing_delivers_what_is_committed(store: Store) -> None:
    box, target = Outbox(store, "p"), Memory()
    deliveries = Deliveries(box, [target], lambda _edge: None)
    deliveries.start()
    post(store, box, 0, 3)
    deliveries.close(10)
    assert target.rows == [0, 1, 2]
    assert not [t for t in threading.enumerate() if t.name.startswith("kframe-deliver")]
