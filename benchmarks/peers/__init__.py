"""The systems that are measured: one module each, behind `Peer`. Only the standard library is imported here,
because a peer's module is also the program that runs in the peer's own environment.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from benchmarks.data import Sums

HERE = Path(__file__).parent
WORK = HERE.parent / ".work"
"""Environments, compiled programs and the broker's data; ignored by git."""


class NotInstalled(Exception):
    """A peer cannot be set up on this machine; the message says why."""


@dataclass(frozen=True)
class Run:
    """One job of one peer: which topic, how many records it has, and a folder for everything it writes."""

    job: str
    brokers: str
    topic: str
    records: int
    folder: Path

    @property
    def database(self) -> str:
        """The DuckDB file of peers that write one."""
        return str(self.folder / "orders.duckdb")


class Peer(Protocol):
    """A system under measurement.

    Attributes
    ----------
    name : str
    jobs : tuple of str
        Of ``read``, ``copy``, ``land``, ``aggregate`` and ``pandas``; docs/performance.md says what each is.
    guarantee : str
        What it promises when it crashes, with these settings.
    settings : str
        How it is set, as far as that is not its default.
    """

    name: str
    jobs: tuple[str, ...]
    guarantee: str
    settings: str

    def set_up(self) -> str:
        """Install what is missing; the version. Raises `NotInstalled`."""
        ...

    def command(self, run: Run) -> list[str]:
        """The program that does `run` and speaks as `benchmarks.marks` says."""
        ...

    def sums(self, run: Run, said: str) -> Sums:
        """What the program has written adds up to; `said` is the rest of its ``done`` line."""
        ...


def program(module: str, run: Run, *more: str, python: str = sys.executable) -> list[str]:
    """The command of a peer whose own module is its program: ``main(run)``, then `more`."""
    arguments = [run.job, run.brokers, run.topic, str(run.records), str(run.folder), *more]
    return [python, "-m", module, *arguments]


def run_of(argv: Sequence[str]) -> Run:
    """The `Run` in a command line of `program`."""
    job, brokers, topic, records, folder = argv[1:6]
    return Run(job, brokers, topic, int(records), Path(folder))


def own_python(name: str, *requirements: str) -> str:
    """The interpreter of a virtual environment in `WORK` that has `requirements`."""
    python = WORK / name / "bin" / "python"
    if not python.exists():
        tool([sys.executable, "-m", "venv", str(WORK / name)])
    tool([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements])
    return str(python)


def tool(command: Sequence[str], cwd: Path = HERE) -> str:
    """Run a tool of the set-up; what it printed. `NotInstalled` when it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NotInstalled(f"{command[0]} is not on this machine") from None
    if done.returncode:
        told = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise NotInstalled(f"{Path(command[0]).name} failed: {' | '.join(told[:2])[:300]}")
    return done.stdout.strip()
