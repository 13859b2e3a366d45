"""Queries on the store: one consistent snapshot, and the positions it is as of."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa

from kframe.commit.ledger import Ledger
from kframe.errors import KframeError, interruptible
from kframe.markup import text
from kframe.model import TopicPartition
from kframe.transform.frames import to_pandas

_SHOWN_ROWS = 20


@dataclass(frozen=True)
class Result:
    """A query's rows, with the batch and the positions that they are as of."""

    table: pa.Table
    batch_id: int
    positions: Mapping[TopicPartition, int]

    def df(self) -> pd.DataFrame:
        """The rows as pandas: decimals stay exact, integers with NULL stay integers.

        Returns
        -------
        DataFrame, shape (n_rows, n_columns)
            ``attrs`` holds ``batch_id`` and ``positions``.
        """
        frame = to_pandas(self.table)
        frame.attrs.update(
            batch_id=self.batch_id, positions={str(tp): offset for tp, offset in self.positions.items()}
        )
        return frame

    def arrow(self) -> pa.Table:
        """The rows as an Arrow table."""
        return self.table

    def fetchall(self) -> list[tuple[Any, ...]]:
        """The rows as tuples."""
        return [tuple(row.values()) for row in self.table.to_pylist()]

    def __repr__(self) -> str:
        head = self.table.slice(0, _SHOWN_ROWS).to_pandas(types_mapper=pd.ArrowDtype)
        return f"{head}\n[{self.table.num_rows:,} rows, as of {self.as_of}]"

    def _repr_html_(self) -> str:
        return self.html(_SHOWN_ROWS)

    def html(self, rows: int) -> str:
        """The first `rows` rows as a table, how many there are, and the batch they are as of."""
        head = self.table.slice(0, rows).to_pandas(types_mapper=pd.ArrowDtype)
        note = text(f"{self.table.num_rows:,} rows, as of {self.as_of}")
        return f"{head.to_html(index=False, escape=True, border=0)}<div><small>{note}</small></div>"

    @property
    def as_of(self) -> str:
        """``batch 12``, or that there has been none."""
        return f"batch {self.batch_id}" if self.batch_id >= 0 else "before the first batch"


@interruptible(lambda: "the query has ended; sql() and read() change nothing.")
def query(
    ledger: Ledger,
    sql: str,
    parameters: object = None,
    unmade: Callable[[], Mapping[str, pa.Schema | None]] = dict,
) -> Result:
    """Run one read-only statement and read the positions in the same snapshot.

    Ctrl-C interrupts the statement, also a long one, and leaves every connection usable.

    Parameters
    ----------
    unmade : callable
        The declared tables that no batch has made yet, with their columns where these are known: then they
        are read as empty. Asked only when a table is missing.

    Raises
    ------
    KframeError
        The statement would write, reads a table that does not exist yet and has no known columns, or the
        tables are being restored.
    """

    def run(empty: Mapping[str, pa.Table]) -> Result:
        result: Result = _interruptible(
            ledger.store.cursor(), lambda cur: _read(cur, ledger, sql, parameters, empty)
        )
        return result

    try:
        return run({})
    except duckdb.CatalogException:
        declared = unmade()
    try:
        return run({t: columns.empty_table() for t, columns in declared.items() if columns is not None})
    except duckdb.CatalogException as error:
        told = str(error).casefold()
        for table in declared:
            if f"name {table.casefold()} does not exist" in told:
                raise _unmade(table) from None
        raise


def _read(
    cur: duckdb.DuckDBPyConnection,
    ledger: Ledger,
    sql: str,
    parameters: object,
    empty: Mapping[str, pa.Table],
) -> Result:
    for name, rows in empty.items():
        cur.register(name, rows)
    cur.execute("BEGIN TRANSACTION READ ONLY")
    try:
        ledger.check_whole(cur)
        table = cur.sql(sql, params=parameters).to_arrow_table()
        at = {tp: p.offset for tp, p in ledger.positions(cur).items()}
        batch_id = cur.execute(
            "SELECT next_batch_id - 1 FROM _kframe.pipelines WHERE name = ?", [ledger.pipeline]
        ).fetchall()
    except duckdb.TransactionException as error:
        if "read-only" in str(error):
            raise KframeError(
                "sql() only reads; tables change by batches alone.",
                kept="Nothing was changed.",
                hint="Use side_table() for data of your own.",
            ) from None
        raise
    finally:
        cur.execute("ROLLBACK")
        cur.close()
    return Result(table, int(batch_id[0][0]) if batch_id else -1, at)


def _unmade(table: str) -> KframeError:
    return KframeError(
        f"Table {table!r} is declared, but no batch has made it yet, and its columns are not known before.",
        kept="Nothing was changed.",
        hint=f"run() or start() makes it; preview({table!r}) shows what its step would make.",
    )


def _interruptible(cur: duckdb.DuckDBPyConnection, read: Any) -> Any:
    """Run `read` on a helper thread in the foreground, so that Ctrl-C reaches us and not DuckDB."""
    if threading.current_thread() is not threading.main_thread():
        return read(cur)
    outcome: list[Any] = []
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append((read(cur), None))
        except BaseException as error:
            outcome.append((None, error))
        ended.set()

    try:
        threading.Thread(target=work, name="kframe-read", daemon=True).start()
        ended.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(duckdb.Error):  # it may have ended and closed the cursor by now
            cur.interrupt()
        ended.wait(5)
        raise
    result, error = outcome[0]
    if error is not None:
        raise error
    return result
