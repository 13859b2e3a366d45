"""Rows that have been committed and are still to be delivered: written with the batch, removed after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import duckdb
import pyarrow as pa

from kframe.commit.store import Store
from kframe.commit.transaction import transaction
from kframe.model import Entry

_ENTRY_ROWS = 50_000
_IPC = pa.ipc.IpcWriteOptions(compression="lz4")


@dataclass(frozen=True)
class Due:
    """Whole batches that come next for a target: ids ``[start, stop)``, and where their entries begin."""

    start: int
    stop: int
    first_ids: tuple[int, ...]


class Outbox:
    """One pipeline's outgoing rows. Each target's ids are dense: what is missing has been delivered, or lost.

    The batch's transaction only inserts, `trim` only deletes, so that delivering never makes a batch
    conflict. Every other method reads in a snapshot of its own.
    """

    def __init__(self, store: Store, pipeline: str) -> None:
        self.store = store
        self.pipeline = pipeline

    # ---- in the batch's transaction -----------------------------------------------------------------

    def post(
        self,
        cur: duckdb.DuckDBPyConnection,
        batch_id: int,
        target: str,
        name: str,
        rows: pa.Table,
        *,
        kind: str = "append",
        key: Sequence[str] = (),
    ) -> None:
        """Add rows, which take the target's next ids."""
        first = self.end(target, cur)
        for start in range(0, rows.num_rows, _ENTRY_ROWS):
            part = rows.slice(start, _ENTRY_ROWS)
            ids = [first + start, first + start + part.num_rows]
            cur.execute(
                "INSERT INTO _kframe.outbox VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [self.pipeline, target, *ids, batch_id, name, kind, list(key), _packed(part)],
            )

    def enrol(self, cur: duckdb.DuckDBPyConnection, target: str, name: str) -> bool:
        """Remember an outlet; whether it is a new one, whose table's earlier rows have never left."""
        known = self.enrolled(target, name, cur)
        if not known:
            cur.execute("INSERT INTO _kframe.outlets VALUES (?, ?, ?)", [self.pipeline, target, name])
        return not known

    def enrolled(self, target: str, name: str, cur: duckdb.DuckDBPyConnection | None = None) -> bool:
        """Whether the outlet is remembered."""
        found = (cur or self.store.cursor()).execute(
            "SELECT 1 FROM _kframe.outlets WHERE pipeline = ? AND target = ? AND name = ?",
            [self.pipeline, target, name],
        )
        return bool(found.fetchall())

    def withdraw(self, cur: duckdb.DuckDBPyConnection, target: str, name: str) -> None:
        """Forget an outlet: the next time it is a new one."""
        outlet = [self.pipeline, target, name]
        cur.execute("DELETE FROM _kframe.outlets WHERE pipeline = ? AND target = ? AND name = ?", outlet)

    # ---- delivering ---------------------------------------------------------------------------------

    def position(self, target: str) -> tuple[int, bool]:
        """The position that the file knows to be delivered, and whether that was exactly once."""
        rows = self.store.cursor().execute(
            "SELECT position, exact FROM _kframe.deliveries WHERE pipeline = ? AND target = ?",
            [self.pipeline, target],
        )
        row = rows.fetchone()
        return (int(row[0]), bool(row[1])) if row else (0, True)

    def end(self, target: str, cur: duckdb.DuckDBPyConnection | None = None) -> int:
        """The id that the target's next row gets."""
        row = (
            (cur or self.store.cursor())
            .execute(
                "SELECT greatest("
                "(SELECT coalesce(max(stop_id), 0) FROM _kframe.outbox WHERE pipeline = $1 AND target = $2), "
                "(SELECT coalesce(max(position), 0) FROM _kframe.deliveries "
                "WHERE pipeline = $1 AND target = $2))",
                [self.pipeline, target],
            )
            .fetchone()
        )
        assert row is not None
        return int(row[0])

    def undelivered(self, target: str | None = None) -> int:
        """Rows in the outbox: of one target, or of all."""
        row = (
            self.store.cursor()
            .execute(
                "SELECT coalesce(sum(stop_id - first_id), 0) FROM _kframe.outbox "
                "WHERE pipeline = $1 AND ($2 IS NULL OR target = $2)",
                [self.pipeline, target],
            )
            .fetchone()
        )
        assert row is not None
        return int(row[0])

    def due(self, target: str, position: int, rows_max: int) -> Due | None:
        """What comes next: at least one whole batch, and more of them up to `rows_max` rows.

        Returns
        -------
        Due or None
            None when everything is delivered. It begins at `position` unless rows are missing.
        """
        found = (
            self.store.cursor()
            .execute(
                "SELECT first_id, stop_id, batch_id FROM _kframe.outbox "
                "WHERE pipeline = ? AND target = ? AND stop_id > ? ORDER BY first_id",
                [self.pipeline, target, position],
            )
            .fetchall()
        )
        taken: list[tuple[int, int, int]] = []
        for entry in found:
            if taken and entry[2] != taken[-1][2] and entry[1] - taken[0][0] > rows_max:
                break
            taken.append(entry)
        return Due(taken[0][0], taken[-1][1], tuple(first for first, _, _ in taken)) if taken else None

    def entries(self, target: str, due: Due) -> Iterator[Entry]:
        """The entries of `due`, one in memory at a time."""
        cur = self.store.cursor()
        for first_id in due.first_ids:
            row = cur.execute(
                'SELECT first_id, stop_id, batch_id, name, kind, "key", rows FROM _kframe.outbox '
                "WHERE pipeline = ? AND target = ? AND first_id = ?",
                [self.pipeline, target, first_id],
            ).fetchone()
            assert row is not None
            first, stop, batch_id, name, kind, key, rows = row
            yield Entry(first, stop, batch_id, name, kind, tuple(key), pa.ipc.open_stream(rows).read_all())

    def trim(self, target: str, position: int, *, exact: bool) -> None:
        """Remove what lies below `position`, which has been delivered."""
        with transaction(self.store, lambda: False) as cur:
            self.delivered(cur, target, position, exact=exact)

    def delivered(self, cur: duckdb.DuckDBPyConnection, target: str, position: int, *, exact: bool) -> None:
        """As `trim`, inside a transaction."""
        mine = [self.pipeline, target]
        cur.execute(
            "DELETE FROM _kframe.outbox WHERE pipeline = ? AND target = ? AND stop_id <= ?", [*mine, position]
        )
        cur.execute("DELETE FROM _kframe.deliveries WHERE pipeline = ? AND target = ?", mine)
        cur.execute("INSERT INTO _kframe.deliveries VALUES (?, ?, ?, ?)", [*mine, position, exact])

    def forget(self, cur: duckdb.DuckDBPyConnection, target: str) -> None:
        """Remove everything of a target, delivered or not."""
        for table in ("outbox", "deliveries", "outlets"):
            cur.execute(
                f"DELETE FROM _kframe.{table} WHERE pipeline = ? AND target = ?", [self.pipeline, target]
            )


def _packed(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema, options=_IPC) as writer:
        writer.write_table(rows)
    return bytes(sink.getvalue())
