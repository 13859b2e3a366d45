"""One program and its children, measured from outside: seconds, CPU, memory.

The program prints ``consuming`` when it begins to read and ``done`` when everything is committed, then waits
for its input to be closed (see `benchmarks.marks`). In between, the kernel's own figures are read: CPU
seconds of all its threads, and ``VmHWM``, the peak of resident memory. Not ``ru_maxrss``: a child inherits
that of the process that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TICKS_S = os.sysconf("SC_CLK_TCK")
ROOT = Path(__file__).parent.parent


class ProgramFailed(Exception):
    """A measured program ended, or was ended, before it was done."""


@dataclass(frozen=True)
class Measured:
    """Seconds from process start and from the start of consumption to the last commit; CPU; peak memory."""

    total_s: float
    consume_s: float
    cpu_s: float
    memory_mb: float
    said: str


class Program:
    """A program that speaks as `benchmarks.marks` says, from its start to the end of its processes.

    A context: afterwards its input is closed and its processes are gone, in every case.

    Parameters
    ----------
    folder : Path
        Where it runs, and where its log goes.
    timeout_s : float
        It is ended after so many seconds.
    """

    def __init__(self, command: Sequence[str], folder: Path, *, timeout_s: float = 3600) -> None:
        self._log = folder / "program.log"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self._log.open("w") as errors:
            self.began = time.monotonic()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        self._alarm = threading.Timer(timeout_s, self.kill)
        self._alarm.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._alarm.cancel()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def wait_for(self, mark: str) -> tuple[float, str]:
        """When the program said `mark`, and the rest of that line.

        Raises
        ------
        ProgramFailed
            It ended without; the message has the end of its log.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.split(maxsplit=1)[:1] == [mark]:
                return time.monotonic(), line.removeprefix(mark).strip()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        raise ProgramFailed(f"ended before {mark!r}: " + " | ".join(lines[-3:])[-400:])

    def usage(self) -> tuple[float, float]:
        """CPU seconds and the sum of the memory peaks (MB) of the program and its children."""
        return _usage(self._process.pid)

    def kill(self) -> None:
        """SIGKILL, to all of its processes."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def measure(
    command: Sequence[str],
    folder: Path,
    *,
    meanwhile: Callable[[], None] | None = None,
    timeout_s: float = 3600,
) -> Measured:
    """Run a program to its ``done``. Its processes are gone afterwards, in every case.

    `meanwhile` is called once the program has said that it is consuming.

    Raises
    ------
    ProgramFailed
        It ended without ``done`` or ran longer than `timeout_s`; the message has the end of its log.
    """
    with Program(command, folder, timeout_s=timeout_s) as program:
        consuming = program.wait_for("consuming")[0]
        if meanwhile is not None:
            meanwhile()
        ended, said = program.wait_for("done")
        cpu_s, memory_mb = program.usage()
    return Measured(ended - program.began, ended - consuming, cpu_s, memory_mb, said)


def _usage(pid: int) -> tuple[float, float]:
    """CPU seconds and the sum of the memory peaks (MB) of a process and its descendants."""
    stats = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            stats[int(entry.name)] = (int(after_name[1]), sum(map(int, after_name[11:15])) / _TICKS_S)
    family = {pid}
    while more := {child for child, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return sum(stats[p][1] for p in family), sum(map(peak_mb, family))


def peak_mb(pid: int | str = "self") -> float:
    """The peak of a process' resident memory, ``VmHWM``, in MB."""
    return _status_mb(pid, "VmHWM:")


def resident_mb(pid: int | str = "self") -> float:
    """A process' resident memory now, ``VmRSS``, in MB."""
    return _status_mb(pid, "VmRSS:")


def _status_mb(pid: int | str, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), 0.0)
