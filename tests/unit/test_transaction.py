"""The only BEGIN and COMMIT: all or nothing, whatever is raised, wherever."""

# ruff: noqa: PT012 - what is raised inside of a transaction is what these tests are about

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from kframe.commit.store import Store, open_store
from kframe.commit.transaction import transaction


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(tmp_path / "shop.duckdb")
    store.cursor().execute("CREATE TABLE t (i INTEGER PRIMARY KEY)")
    yield store
    store.close()


def rows(store: Store) -> list[int]:
    return [i for (i,) in store.cursor().execute("SELECT i FROM t ORDER BY i").fetchall()]


def never() -> bool:
    raise AssertionError("asked whether the batch is durable, though COMMIT did not raise")


def test_all_of_it_is_durable(store: Store) -> None:
    with transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        cur.execute("INSERT INTO t VALUES (2)")
    assert rows(store) == [1, 2]


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_any_exception_rolls_back(store: Store, raised: type[BaseException]) -> None:
    """Kills: ``except Exception``; ROLLBACK left out; COMMIT in a ``finally``."""
    with pytest.raises(raised), transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        raise raised
    assert rows(store) == []
    with transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (3)")
    assert rows(store) == [3]


def test_an_aborted_transaction_never_counts_as_committed(store: Store) -> None:
    """Kills: COMMIT after an error, which DuckDB answers by rolling back without a word."""
    with pytest.raises(duckdb.ConstraintException), transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        cur.execute("INSERT INTO t VALUES (1)")
    assert rows(store) == []


def test_sigint_waits_from_begin_to_commit(store: Store) -> None:
    """Kills: no deferral (the batch would be rolled back, or durable and reported as failed)."""
    reached = False
    with pytest.raises(KeyboardInterrupt), transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        signal.raise_signal(signal.SIGINT)
        cur.execute("INSERT INTO t VALUES (2)")
        reached = True
    assert reached
    assert rows(store) == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigint_during_a_failing_transaction_rolls_back(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), transaction(store, never) as cur:
        cur.execute("INSERT INTO t VALUES (1)")
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    assert rows(store) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_signals_are_left_alone(store: Store) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[Any] = []

    def work() -> None:
        with transaction(store, never) as cur:
            seen.append(signal.getsignal(signal.SIGINT))
            cur.execute("INSERT INTO t VALUES (1)")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert seen == [before]
    assert rows(store) == [1]


class _Cursor:
    """A cursor whose COMMIT raises, before or after the real one."""

    def __init__(self, cur: Any, *, durable: bool, raised: BaseException) -> None:
        self.cur, self.durable, self.raised = cur, durable, raised

    def execute(self, query: str, *parameters: Any) -> Any:
        if query != "COMMIT":
            return self.cur.execute(query, *parameters)
        if self.durable:
            self.cur.execute("COMMIT")
        raise self.raised

    def close(self) -> None:
        self.cur.close()


OUT_OF_COMMIT = [
    RuntimeError("Query interrupted"),
    duckdb.TransactionException("failed to commit"),
    duckdb.FatalException("database has been invalidated"),
]


@pytest.mark.parametrize("raised", OUT_OF_COMMIT, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("durable", [True, False])
def test_an_exception_out_of_commit_asks_the_file(
    store: Store, monkeypatch: pytest.MonkeyPatch, durable: bool, raised: Exception
) -> None:
    """Kills: believing the exception (the batch would run twice), or believing COMMIT (it would be lost)."""
    cursor = _Cursor(store.cursor(), durable=durable, raised=raised)
    monkeypatch.setattr(store, "cursor", lambda: cursor)

    def committed() -> bool:
        monkeypatch.undo()
        return rows(store) == [1]

    def write() -> None:
        with transaction(store, committed) as cur:
            cur.execute("INSERT INTO t VALUES (1)")

    if durable:
        write()
    else:
        with pytest.raises(type(raised)):
            write()
    assert rows(store) == ([1] if durable else [])
