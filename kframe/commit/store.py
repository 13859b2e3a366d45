"""The one DuckDB file: who owns it, how it is opened, and cursors for its readers and its writer."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb

from kframe.commit.transaction import interrupts_deferred
from kframe.errors import ConfigError, StoreDamaged, StoreLocked

_LEDGER = """
CREATE SCHEMA IF NOT EXISTS _kframe;
CREATE SCHEMA IF NOT EXISTS _state;
CREATE TABLE IF NOT EXISTS _kframe.pipelines (
    name VARCHAR NOT NULL, epoch BIGINT NOT NULL, owner VARCHAR NOT NULL, cluster_id VARCHAR,
    next_batch_id BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.topics (
    pipeline VARCHAR NOT NULL, topic VARCHAR NOT NULL, topic_id VARCHAR, "schema" VARCHAR);
CREATE TABLE IF NOT EXISTS _kframe.tables (
    pipeline VARCHAR NOT NULL, name VARCHAR NOT NULL, fingerprint VARCHAR NOT NULL, form VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.columns (
    pipeline VARCHAR NOT NULL, schema_name VARCHAR NOT NULL, table_name VARCHAR NOT NULL,
    column_name VARCHAR NOT NULL, data_type VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.positions (
    pipeline VARCHAR NOT NULL, topic VARCHAR NOT NULL, partition INTEGER NOT NULL,
    position BIGINT NOT NULL, leader_epoch INTEGER NOT NULL, epoch BIGINT NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.batches (
    pipeline VARCHAR NOT NULL, batch_id BIGINT NOT NULL, epoch BIGINT NOT NULL,
    ranges STRUCT(topic VARCHAR, partition INTEGER, start BIGINT, stop BIGINT)[],
    rows BIGINT, dead_letters BIGINT, tombstones BIGINT, timings_ms MAP(VARCHAR, DOUBLE),
    committed_at TIMESTAMPTZ NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.dead_letters (
    pipeline VARCHAR NOT NULL, batch_id BIGINT NOT NULL, topic VARCHAR NOT NULL, partition INTEGER NOT NULL,
    "offset" BIGINT NOT NULL, "timestamp" TIMESTAMPTZ, "key" BLOB, "value" BLOB, error VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.gaps (
    pipeline VARCHAR NOT NULL, topic VARCHAR NOT NULL, partition INTEGER NOT NULL,
    start BIGINT NOT NULL, stop BIGINT NOT NULL, reason VARCHAR NOT NULL, noticed_at TIMESTAMPTZ NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.outbox (
    pipeline VARCHAR NOT NULL, target VARCHAR NOT NULL, first_id BIGINT NOT NULL, stop_id BIGINT NOT NULL,
    batch_id BIGINT NOT NULL, name VARCHAR NOT NULL, kind VARCHAR NOT NULL, "key" VARCHAR[] NOT NULL,
    rows BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.deliveries (
    pipeline VARCHAR NOT NULL, target VARCHAR NOT NULL, position BIGINT NOT NULL, exact BOOLEAN NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.outlets (
    pipeline VARCHAR NOT NULL, target VARCHAR NOT NULL, name VARCHAR NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.followed (
    pipeline VARCHAR NOT NULL, topic_id VARCHAR NOT NULL, position BIGINT NOT NULL, whole BOOLEAN NOT NULL,
    followed_at TIMESTAMPTZ NOT NULL);
CREATE TABLE IF NOT EXISTS _kframe.file (id VARCHAR NOT NULL);
INSERT INTO _kframe.file SELECT CAST(uuid() AS VARCHAR) WHERE NOT EXISTS (FROM _kframe.file);
"""

_SETTINGS = (
    "SET TimeZone = 'UTC'",
    "SET python_enable_replacements = false",
    "SET wal_autocheckpoint = '1TB'",  # checkpoints only where `Store.checkpoint` allows them
    "SET preserve_insertion_order = true",
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)

MEMORY_LIMIT = "2GB"
"""DuckDB's own default, 80 % of the machine, lets a table that grows fill the memory with its blocks."""

_stores: dict[str, Store] = {}
_stores_lock = threading.Lock()


class Store:
    """An open DuckDB file, shared by every pipeline of this process that lives in it.

    Open it with `open_store`. The file belongs to this process until `close`: DuckDB lets no other
    process in, and a sidecar lock file (``<file>.lock``) says who the owner is.
    """

    def __init__(self, path: str, memory_limit: str) -> None:
        self.path = path
        self._memory_limit = memory_limit
        self.pid = os.getpid()
        self._lock_file = _lock(path)
        self._users: list[object] = []
        self._lock = threading.Lock()
        self._steady = 0
        try:
            self._con = _connect(path, memory_limit)
        except BaseException:
            self._lock_file.close()
            raise
        os.register_at_fork(after_in_child=_forget(weakref.ref(self)))

    def __repr__(self) -> str:
        return f"<Store {self.path}>"

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A fresh cursor: one thread may use it, and it sees its own snapshot.

        Raises
        ------
        StoreLocked
            This process was forked from the owner; DuckDB files cannot be shared across a fork.
        """
        if os.getpid() != self.pid:
            raise StoreLocked(
                f"{self.path} belongs to process {self.pid}, from which this process was forked.",
                kept="Nothing was read or written.",
                hint="Create the Pipeline inside the process that uses it, or read a snapshot_to= copy.",
            )
        return self._con.cursor()

    @property
    def id(self) -> str:
        """The file's own id; a snapshot has another one."""
        (row,) = self.cursor().execute("SELECT id FROM _kframe.file").fetchall()
        return str(row[0])

    def use(self, user: object) -> None:
        """Keep the file open for `user`."""
        self._users.append(user)

    def release(self, user: object) -> None:
        """`user` no longer needs the file; the last one closes it."""
        self._users = [u for u in self._users if u is not user]
        if not self._users:
            self.close()

    def reopen(self) -> None:
        """Open the file again after DuckDB has invalidated the connection. Old cursors are dead."""
        with contextlib.suppress(duckdb.Error):
            self._con.close()
        self._con = _connect(self.path, self._memory_limit)

    def close(self) -> None:
        """Close the file and give up its lock. Idempotent."""
        with _stores_lock:
            if _stores.get(self.path) is self:
                del _stores[self.path]
        if os.getpid() == self.pid:
            self._con.close()
            self._lock_file.close()

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """While the block runs no checkpoint moves rows: rowids that were read can be written to."""
        with self._lock:
            self._steady += 1
        try:
            yield
        finally:
            with self._lock:
                self._steady -= 1

    def checkpoint(self) -> bool:
        """Fold the write-ahead log into the file; False when a reader or a batch is in the way."""
        with self._lock:
            if self._steady:
                return False
            try:
                self.cursor().execute("CHECKPOINT")
            except (duckdb.FatalException, duckdb.InternalException):  # DuckDB has given the file up
                self.reopen()
                return False
            except duckdb.Error:
                return False
            return True

    def compact(self) -> tuple[int, int]:
        """Write the file anew without the space that updates and deletes have left in it.

        Cursors end; nobody may be reading or writing. A kill or Ctrl-C leaves the old file or the new one.

        Returns
        -------
        before, after : int, bytes

        Raises
        ------
        ConfigError
            Another pipeline or reader of this process is in the way.
        """
        if len(self._users) > 1 or not self.checkpoint():
            raise ConfigError(
                f"{self.path} is in use by another pipeline or reader of this process.",
                kept="Nothing was changed.",
                hint="Close the other pipelines and queries, then compact again.",
            )
        before = os.path.getsize(self.path)
        copy = f"{self.path}.compact"
        self.snapshot(copy)
        with interrupts_deferred():  # between the two files there is no connection
            self._con.close()  # so no write-ahead log is left to be taken for the new file's
            os.replace(copy, self.path)
            self._con = _connect(self.path, self._memory_limit)
        return before, os.path.getsize(self.path)

    def snapshot(self, target: str | os.PathLike[str]) -> None:
        """Write a consistent copy of the whole database to `target`, replacing it atomically.

        Parameters
        ----------
        target : path
            Other processes may open it at any time, and keep the copy that they opened.
        """
        target = Path(target)
        work = Path(_snapshot_folder(self.path))
        work.mkdir(exist_ok=True)
        copy = work / "copy.duckdb"
        copy.unlink(missing_ok=True)
        cur = self.cursor()
        source = cur.execute("SELECT current_database()").fetchall()[0][0]
        cur.execute(f"ATTACH {_literal(str(copy))} AS _kframe_snapshot")
        try:
            cur.execute(f"COPY FROM DATABASE {quote(source)} TO _kframe_snapshot")
            cur.execute("UPDATE _kframe_snapshot._kframe.file SET id = CAST(uuid() AS VARCHAR)")
        finally:
            cur.execute("DETACH _kframe_snapshot")
        beside = target.with_name(f".{target.name}.{os.getpid()}.part")
        shutil.move(copy, beside)
        os.replace(beside, target)


def open_store(path: str | os.PathLike[str], memory_limit: str = MEMORY_LIMIT) -> Store:
    """The process's one `Store` for a file, opened when it is not open yet.

    Parameters
    ----------
    path : path
    memory_limit : str
        What DuckDB may hold in memory of the file and of queries; beyond it they spill to disk.

    Raises
    ------
    StoreLocked
        Another process has the file; the message names it.
    StoreDamaged
        The file or its write-ahead log cannot be read.
    """
    real = os.path.realpath(os.fspath(path))
    with _stores_lock:
        store = _stores.get(real)
        if store is None or store.pid != os.getpid():
            store = _stores[real] = Store(real, memory_limit)
        return store


@contextlib.contextmanager
def registered(cur: duckdb.DuckDBPyConnection, name: str, data: object) -> Iterator[str]:
    """Make Arrow data readable in SQL under a private name, for the block's duration."""
    cur.register(name, data)
    try:
        yield quote(name)
    finally:
        with contextlib.suppress(duckdb.Error):  # an aborted transaction refuses it; its own error matters
            cur.unregister(name)


def quote(name: str) -> str:
    """A SQL identifier, quoted."""
    return '"' + name.replace('"', '""') + '"'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _snapshot_folder(path: str) -> str:
    return path + ".snapshot"


def _connect(path: str, memory_limit: str) -> duckdb.DuckDBPyConnection:
    try:
        con = duckdb.connect(path)
        con.execute(f"SET memory_limit = {_literal(memory_limit)}")
        con.execute(f"SET allowed_directories = [{_literal(_snapshot_folder(path))}]")
        for setting in _SETTINGS:
            con.execute(setting)
        con.execute(_LEDGER)
    except duckdb.IOException as error:
        if "lock" in str(error).lower():
            raise _locked(path, str(error)) from error
        raise _damaged(path, error) from error
    except duckdb.Error as error:  # of several types: a damaged WAL is the base class itself
        raise _damaged(path, error) from error
    return con


def _damaged(path: str, error: Exception) -> StoreDamaged:
    return StoreDamaged(
        f"{path} cannot be read: {error}",
        kept="The file and its .wal are untouched.",
        hint=f"Run: kframe repair {path}   (it backs both up, drops the damaged end of the write-ahead log, "
        "and the records behind it are consumed again)",
    )


def _lock(path: str) -> _LockFile:
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise StoreLocked(f"{folder} is not a folder.", hint="Create it, or give another path.")
    lock = _LockFile(path + ".lock")
    owner = lock.acquire()
    if owner is not None:
        raise _locked(path, owner)
    return lock


def _locked(path: str, owner: str) -> StoreLocked:
    return StoreLocked(
        f"{path} is in use by {owner}.",
        kept="Nothing was opened or changed.",
        hint="Stop that pipeline or shut that kernel down, or read its copy: Pipeline(..., snapshot_to=...).",
    )


class _LockFile:
    """A flock beside the database. It ends with its process, and names the owner to others."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1

    def acquire(self) -> str | None:
        """None when the lock is ours now, else a description of its owner."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with os.fdopen(fd) as file:
                return _describe(file.read())
        os.ftruncate(fd, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "program": _program()}
        os.write(fd, json.dumps(owner).encode())
        self._fd = fd
        return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _describe(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"{owner['program']}, PID {owner['pid']} on {owner['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _program() -> str:
    """The owner as others will read it: the notebook kernel's id, or the script's name."""
    program = os.path.basename(sys.argv[0] or "")
    if program.startswith("ipykernel"):
        return f"notebook kernel {Path(sys.argv[-1]).stem.removeprefix('kernel-')}"
    return program or "an interactive Python"


def _forget(ref: weakref.ref[Store]) -> Callable[[], None]:
    def in_child() -> None:
        store = ref()
        if store is not None:
            store._lock_file.close()  # the child must not keep the parent's lock alive

    return in_child
