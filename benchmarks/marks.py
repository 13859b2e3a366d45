"""What a measured program says: when it begins to consume, and when everything is committed."""

from __future__ import annotations

import sys


def consuming() -> None:
    """Say that the program is up and reads from now on."""
    print("consuming", flush=True)


def done(*said: object) -> None:
    """Say that everything is committed, and stay to be measured until the input is closed."""
    print("done", *said, flush=True)
    sys.stdin.read()
