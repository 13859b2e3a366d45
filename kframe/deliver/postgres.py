"""PostgreSQL as a target: rows and position in one transaction, or every key with the id that it is as of."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import psycopg
import pyarrow as pa
from psycopg import sql

from kframe.deliver.postgres_copy import columns_of, copy_rows
from kframe.errors import DeliveryDelayed, DeliveryRefused, Fenced, KframeError
from kframe.model import Entry

ID = "_kframe_id"
"""Idempotent mode: the column with the id of the row's last change."""
_POSITIONS = "_kframe_positions"
_KEPT = "Nothing is lost: the rows are kept in the outbox."
_CONNECT_TIMEOUT_S = 5
_OPTIONS = (
    "-c lock_timeout=10s -c idle_in_transaction_session_timeout=60s -c timezone=UTC "
    "-c client_min_messages=warning"
)


class PostgresTables:
    """Tables of the same names in one PostgreSQL schema (PostgreSQL 15 or newer).

    Parameters
    ----------
    conninfo : str
        ``postgresql://user@host/database``; secrets in it are never shown.
    pipeline : str
    schema : str
        Where the tables are, and the table ``_kframe_positions``. Made when missing.
    idempotent : bool
        False: the position is in PostgreSQL, in the transaction of the rows; one owner at a time. True: each
        row has the id of its change, and an update or delete that is not newer is ignored, so that
        replays and deliverers out of order do no harm.
    """

    def __init__(self, conninfo: str, pipeline: str, *, schema: str = "public", idempotent: bool) -> None:
        try:
            told = psycopg.conninfo.conninfo_to_dict(conninfo)
        except psycopg.ProgrammingError:
            raise ValueError("the connection string cannot be read (it is not shown)") from None
        place = f"{told.get('host', '')}:{told.get('port', 5432)}/{told.get('dbname', '')}"
        self.name = f"postgresql://{place}/{schema}"
        self.exact = not idempotent
        self._conninfo = conninfo
        self._password = str(told.get("password") or "")
        self._pipeline = pipeline
        self._schema = schema
        self._idempotent = idempotent
        self._owner = uuid.uuid4().hex
        self._con: psycopg.Connection[Any] | None = None

    def __repr__(self) -> str:
        return f"<PostgresTables {self.name}>"

    # ---- the protocol of a target -------------------------------------------------------------------

    def open(self, kept: int) -> int | None:
        """Connect and become the owner; whoever was it gets `Fenced`."""
        self.close()
        with self._errors():
            self._con = psycopg.connect(
                self._conninfo, connect_timeout=_CONNECT_TIMEOUT_S, options=_OPTIONS, autocommit=False
            )
            cur = self._con.cursor()
            cur.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(self._schema)))
            cur.execute(
                sql.SQL(
                    "CREATE TABLE IF NOT EXISTS {} (pipeline text PRIMARY KEY, position bigint, "
                    "owner text NOT NULL)"
                ).format(self._table(_POSITIONS))
            )
            cur.execute(
                sql.SQL(
                    "INSERT INTO {} AS p VALUES (%s, NULL, %s) ON CONFLICT (pipeline) "
                    "DO UPDATE SET owner = excluded.owner RETURNING position"
                ).format(self._table(_POSITIONS)),
                [self._pipeline, self._owner],
            )
            row = cur.fetchone()
            self._con.commit()
        held = row[0] if row else None
        return max(held or 0, kept) if self._idempotent else held

    def send(self, entries: Iterable[Entry]) -> None:
        """Write the rows; nobody sees them yet."""
        with self._errors() as con:
            cur = con.cursor()
            for entry in entries:
                self._lock(cur, entry.name)
                self._ensure(cur, entry)
                self._apply(cur, entry)

    def commit(self, position: int) -> None:
        """COMMIT, with the position."""
        owned: sql.Composable = (
            sql.SQL("") if self._idempotent else sql.SQL(" AND owner = {}").format(self._owner)
        )
        with self._errors() as con:
            moved = con.execute(
                sql.SQL(
                    "UPDATE {} SET position = greatest(position, %s) WHERE pipeline = %s{} RETURNING 1"
                ).format(self._table(_POSITIONS), owned),
                [position, self._pipeline],
            ).fetchall()
            if not moved:
                raise Fenced(
                    f"{self.name}: another run delivers the rows of pipeline {self._pipeline!r} now.",
                    kept="This delivery was rolled back; the rows are kept in the outbox.",
                    hint="Use the newer run, or give this pipeline another name=.",
                )
            con.commit()

    def close(self) -> None:
        """Leave; what is not committed is rolled back."""
        con, self._con = self._con, None
        if con is not None:
            with contextlib.suppress(psycopg.Error):
                con.close()

    # ---- tables -------------------------------------------------------------------------------------

    def _ensure(self, cur: psycopg.Cursor[Any], entry: Entry) -> None:
        """Make the table, or add the columns that it does not have."""
        columns = columns_of(entry.rows.schema)
        made = [sql.SQL("{} {}").format(sql.Identifier(n), sql.SQL(t)) for n, t in columns.items()]
        if self._idempotent:
            made.append(sql.SQL("{} bigint NOT NULL").format(sql.Identifier(ID)))
        unique = entry.key if entry.kind != "append" else ((ID,) if self._idempotent else ())
        if unique:
            made.append(sql.SQL("UNIQUE NULLS NOT DISTINCT ({})").format(_names(unique)))
        table = self._table(entry.name)
        cur.execute(
            "SELECT column_name FROM information_schema.columns WHERE table_schema = %s AND table_name = %s",
            [self._schema, entry.name],
        )
        known = {name for (name,) in cur.fetchall()}
        if not known:
            cur.execute(sql.SQL("CREATE TABLE {} ({})").format(table, sql.SQL(", ").join(made)))
        for name, type_ in columns.items() if known else ():
            if name not in known:
                cur.execute(
                    sql.SQL("ALTER TABLE {} ADD COLUMN {} {}").format(
                        table, sql.Identifier(name), sql.SQL(type_)
                    )
                )

    def _apply(self, cur: psycopg.Cursor[Any], entry: Entry) -> None:
        table, names = self._table(entry.name), list(columns_of(entry.rows.schema))
        if entry.kind == "append" and not self._idempotent:
            copy_rows(cur, table, entry.rows)
            return
        rows, staged = entry.rows, sql.Identifier("_kframe_rows")
        if self._idempotent:
            rows = rows.append_column(ID, pa.array(range(entry.first_id, entry.stop_id), pa.int64()))
            names = [*names, ID]
        cur.execute("DROP TABLE IF EXISTS pg_temp._kframe_rows")
        cur.execute(
            sql.SQL("CREATE TEMP TABLE {} ON COMMIT DROP AS SELECT {} FROM {} WITH NO DATA").format(
                staged, _names(names), table
            )
        )
        copy_rows(cur, staged, rows)
        if entry.kind == "delete":
            self._delete(cur, entry, table, staged)
        else:
            self._merge(cur, entry, table, staged, names)

    def _merge(
        self, cur: psycopg.Cursor[Any], entry: Entry, table: Any, staged: Any, names: list[str]
    ) -> None:
        """Rows added or put in the place of those with the same key; in idempotent mode unless older."""
        unique = entry.key if entry.kind == "upsert" else (ID,)
        sets = [sql.SQL("{0} = excluded.{0}").format(sql.Identifier(n)) for n in names if n not in unique]
        action: sql.Composable = sql.SQL("NOTHING")
        if sets and entry.kind == "upsert":
            action = sql.SQL("UPDATE SET ") + sql.SQL(", ").join(sets)
            if self._idempotent:
                action += sql.SQL(" WHERE t.{0} < excluded.{0}").format(sql.Identifier(ID))
        source: sql.Composable = sql.SQL("{} AS s").format(staged)
        if self._idempotent and entry.kind == "upsert" and self._has_tombstones(cur, entry.name):
            source += sql.SQL(" WHERE NOT EXISTS (SELECT 1 FROM {} AS g WHERE {} AND g.{} >= s.{})").format(
                self._tombstones(entry.name),
                _same("g", "s", entry.key, nulls=True),
                sql.Identifier(ID),
                sql.Identifier(ID),
            )
        cur.execute(
            sql.SQL("INSERT INTO {} AS t ({}) SELECT {} FROM {} ON CONFLICT ({}) DO {}").format(
                table, _names(names), _names(names), source, _names(unique), action
            )
        )

    def _delete(self, cur: psycopg.Cursor[Any], entry: Entry, table: Any, staged: Any) -> None:
        """Rows removed; in idempotent mode unless they are newer, and remembered, so that none comes back."""
        nulls = any(entry.rows[name].null_count for name in entry.key)
        older: sql.Composable = sql.SQL("")
        if self._idempotent:
            older = sql.SQL(" AND t.{0} < s.{0}").format(sql.Identifier(ID))
            self._remember(cur, entry, staged)
        cur.execute(
            sql.SQL("DELETE FROM {} AS t USING {} AS s WHERE {}{}").format(
                table, staged, _same("t", "s", entry.key, nulls=nulls), older
            )
        )

    def _remember(self, cur: psycopg.Cursor[Any], entry: Entry, staged: Any) -> None:
        names = [*entry.key, ID]
        if not self._has_tombstones(cur, entry.name):
            cur.execute(
                sql.SQL("CREATE TABLE {} AS SELECT {} FROM {} WITH NO DATA").format(
                    self._tombstones(entry.name), _names(names), staged
                )
            )
            cur.execute(
                sql.SQL("ALTER TABLE {} ADD UNIQUE NULLS NOT DISTINCT ({})").format(
                    self._tombstones(entry.name), _names(entry.key)
                )
            )
        cur.execute(
            sql.SQL(
                "INSERT INTO {} AS t SELECT {} FROM {} ON CONFLICT ({}) DO UPDATE SET {} = excluded.{} "
                "WHERE t.{} < excluded.{}"
            ).format(
                self._tombstones(entry.name),
                _names(names),
                staged,
                _names(entry.key),
                *[sql.Identifier(ID)] * 4,
            )
        )

    def _has_tombstones(self, cur: psycopg.Cursor[Any], table: str) -> bool:
        name = self._tombstones(table).as_string(cur)
        row = cur.execute("SELECT to_regclass(%s) IS NOT NULL", [name]).fetchone()
        return bool(row and row[0])

    def _tombstones(self, table: str) -> sql.Identifier:
        return self._table(f"_kframe_deleted_{table}")

    def _table(self, name: str) -> sql.Identifier:
        return sql.Identifier(self._schema, name)

    def _lock(self, cur: psycopg.Cursor[Any], table: str) -> None:
        """Until COMMIT one deliverer writes the table: a delete and an older upsert must not cross."""
        cur.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [f"{self._schema}.{table}"])

    # ---- errors -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self) -> Iterator[psycopg.Connection[Any]]:
        """The driver's errors as kframe's. Each is followed by `open`, or by the end."""
        try:
            yield self._con  # type: ignore[misc] # None only while open() connects
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            raise self._told(DeliveryDelayed, "does not take the rows now", error) from None
        except psycopg.Error as error:
            raise self._told(DeliveryRefused, "refuses the rows", error) from None

    def _told(self, kind: type[KframeError], what: str, error: psycopg.Error) -> KframeError:
        text = str(error).strip()
        text = text.replace(self._password, "[hidden]") if self._password else text
        return kind(f"{self.name} {what}: {text}", kept=_KEPT, hint="Correct it there, then run again.")


def _names(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.Identifier, names))


def _same(left: str, right: str, key: Iterable[str], *, nulls: bool) -> sql.Composed:
    """Equal keys; NULLs are equal too where asked, which no index helps with."""
    operator = "IS NOT DISTINCT FROM" if nulls else "="
    parts = [
        sql.SQL("{} {} {}").format(sql.Identifier(left, n), sql.SQL(operator), sql.Identifier(right, n))
        for n in key
    ]
    return sql.SQL(" AND ").join(parts)
