"""Milliseconds by stage of a batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Timings(dict[str, float]):
    """Milliseconds by stage; `stage` adds to them."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under a stage's name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self[name] = self.get(name, 0.0) + (time.perf_counter() - began) * 1000
