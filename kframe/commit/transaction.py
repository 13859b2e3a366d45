"""The only BEGIN and COMMIT of the batch protocol."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

import duckdb

if TYPE_CHECKING:
    from kframe.commit.store import Store  # which defers interrupts, too


@contextlib.contextmanager
def transaction(store: Store, committed: Callable[[], bool]) -> Iterator[duckdb.DuckDBPyConnection]:
    """One DuckDB transaction: all of it is durable afterwards, or nothing of it.

    Ctrl-C waits from BEGIN until after COMMIT. Any exception inside the block, a `BaseException` too, rolls
    back and goes on its way; COMMIT never follows one.

    Parameters
    ----------
    store : Store
    committed : callable
        Reads back from the file whether this batch is in it. Asked only when COMMIT itself raised: the batch
        may be durable all the same, and only the file knows.

    Yields
    ------
    DuckDBPyConnection
        A cursor of this transaction's own.
    """
    with interrupts_deferred():
        cur = store.cursor()
        cur.execute("BEGIN TRANSACTION")
        try:
            yield cur
        except BaseException:
            with contextlib.suppress(duckdb.Error, RuntimeError):
                cur.execute("ROLLBACK")
            raise
        try:
            cur.execute("COMMIT")
        except BaseException as error:
            _recover(store, cur, error)
            if not committed():
                raise
        finally:
            with contextlib.suppress(duckdb.Error, RuntimeError):
                cur.close()


def _recover(store: Store, cur: duckdb.DuckDBPyConnection, error: BaseException) -> None:
    """After an exception out of COMMIT: end the transaction, and reopen a file DuckDB has given up on."""
    with contextlib.suppress(duckdb.Error, RuntimeError):
        cur.execute("ROLLBACK")
    if isinstance(error, (duckdb.FatalException, duckdb.InternalException)):
        store.reopen()


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold SIGINT back until the block has ended, then let it through.

    Only the main thread receives signals; in any other thread this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if held and callable(before):
            before(*held[0])
