"""Runs a broker for as long as its owner lives. Started by `kframe.broker` as a process of its own.

The owner holds the other end of this process's standard input. When the owner ends, also by SIGKILL, the
input ends, and the broker is stopped. Standard library only: it starts in milliseconds.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading

_STOP_TIMEOUT_S = 15
_PR_SET_PDEATHSIG = 1


def main(log: str, delete: str, *command: str) -> None:
    """Run `command` until it ends or standard input does; then remove the folder `delete` ("": none)."""
    with open(log, "ab") as out:
        broker = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=_die_with_parent
        )
    print(broker.pid, flush=True)
    threading.Thread(target=_stop_when_alone, args=(broker, delete), daemon=True).start()
    broker.wait()
    _owner_is_gone.wait(0.2)
    if _owner_is_gone.is_set():
        _stopped.wait(_STOP_TIMEOUT_S)


_owner_is_gone = threading.Event()
_stopped = threading.Event()


def _stop_when_alone(broker: "subprocess.Popen[bytes]", delete: str) -> None:
    while os.read(0, 1024):
        pass
    _owner_is_gone.set()
    broker.terminate()
    try:
        broker.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        broker.kill()
        broker.wait()
    if delete:
        shutil.rmtree(delete, ignore_errors=True)
    _stopped.set()


def _die_with_parent() -> None:
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
