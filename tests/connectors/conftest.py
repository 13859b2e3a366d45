"""A real PostgreSQL, once a session, owned by a user that may run it."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

psycopg = pytest.importorskip("psycopg")


class Postgres:
    """A server on a free port of loopback, in a temporary folder; it can be killed and started again."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self.folder = Path(tempfile.mkdtemp(prefix="kframe-postgres-"))
        self._user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
        if self._user is not None:
            os.chown(self.folder, self._user.pw_uid, self._user.pw_gid)
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        data = self.folder / "data"
        made = self._run("initdb", "-D", str(data), "-U", "kframe", "-A", "trust", "-E", "UTF8", "--no-sync")
        assert made.wait() == 0, "initdb failed"
        self.start()

    @property
    def conninfo(self) -> str:
        return f"postgresql://kframe:secret-word@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it, also after `kill`, and wait until it answers."""
        options = ["-D", str(self.folder / "data"), "-p", str(self.port), "-k", str(self.folder)]
        self._process = self._run("postgres", *options, "-h", "127.0.0.1", "-c", "shared_buffers=32MB")
        while True:
            assert self._process.poll() is None, "PostgreSQL did not start"
            with contextlib.suppress(psycopg.OperationalError), psycopg.connect(self.conninfo):
                return

    def kill(self) -> None:
        """SIGKILL the postmaster, and every process of its own."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def rows(self, query: str) -> list[tuple]:
        with psycopg.connect(self.conninfo, autocommit=True) as con:
            done = con.execute(query)
            return done.fetchall() if done.description else []

    def stop(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        user = {} if self._user is None else {"user": self._user.pw_uid, "group": self._user.pw_gid}
        return subprocess.Popen(
            [self._binaries / program, *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            start_new_session=True,
            **user,
        )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server; the tests are skipped by name, with the reason, where there are no binaries."""
    found = shutil.which("postgres")
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda p: int(p.split("/")[4]))
    if found is None and not folders:
        pytest.skip("no PostgreSQL server: neither on the path nor in /usr/lib/postgresql")
    server = Postgres(Path(found).parent if found else Path(folders[-1]))
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
