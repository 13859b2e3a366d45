"""Where a micro-batch's tasks run. Here: in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kframe.model import OffsetRange, Partial


class Executor(Protocol):
    """Runs pure tasks: nothing is committed by them, so a lost one is simply run again."""

    def slots(self) -> int:
        """How many tasks are worth making of one batch."""

    def run(
        self,
        fn: Callable[[tuple[OffsetRange, ...]], Partial],
        tasks: Sequence[tuple[OffsetRange, ...]],
    ) -> Iterator[Partial]:
        """Each task's result, in any order."""


class LocalExecutor:
    """This thread."""

    def slots(self) -> int:
        """One: the source's reader already works ahead."""
        return 1

    def run(
        self,
        fn: Callable[[tuple[OffsetRange, ...]], Partial],
        tasks: Sequence[tuple[OffsetRange, ...]],
    ) -> Iterator[Partial]:
        """Each task's result, in order."""
        return map(fn, tasks)
