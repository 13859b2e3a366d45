"""How fast a run processes and how fast its topics grow: samples of the last minute."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kframe.model import Position, TopicPartition

_SAMPLE_S = 1.0
_KEPT = 64  # samples: a minute and a little more
_WINDOW_S = 5.0  # what a rate is taken over
_SMOOTH = 3  # samples that a point of the history is taken over: batches are often a second apart


class Sample(NamedTuple):
    """Offsets processed and arrived since the run began, at a time of a monotonic clock; records processed.

    Offsets are more than records where control records of transactions or compaction take some.
    """

    at: float
    processed: int
    arrived: int
    records: int


class Meter:
    """Samples of one run's positions and end offsets; any thread may note and read.

    Parameters
    ----------
    clock : callable
        Seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._samples: deque[Sample] = deque(maxlen=_KEPT)
        self._positions: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._begin: dict[TopicPartition, int] = {}

    def note(
        self, positions: Mapping[TopicPartition, Position], ends: Mapping[TopicPartition, int], records: int
    ) -> None:
        """Take a sample, unless the last one is younger than a second. `records` are those of the run."""
        now = self._clock()
        if self._samples and now - self._samples[-1].at < _SAMPLE_S:
            return
        at = {tp: p.offset for tp, p in dict(positions).items()}
        with self._lock:
            last = self._samples[-1] if self._samples else Sample(now, 0, 0, 0)
            processed = last.processed + _moved(self._positions, at)
            arrived = last.arrived + _moved(self._ends, ends)
            self._samples.append(Sample(now, processed, arrived, records))
            self._positions, self._ends = at, {**self._ends, **ends}
            self._begin = {**at, **self._begin}

    def rates(self) -> tuple[float, float, float]:
        """A second, over the last five: offsets processed, offsets arriving, records processed."""
        samples = list(self._samples)
        recent = [s for s in samples if s.at >= self._clock() - _WINDOW_S - _SAMPLE_S]
        return _between(recent[0], recent[-1]) if len(recent) > 1 else (0.0, 0.0, 0.0)

    def history(self) -> tuple[tuple[float, float, float], ...]:
        """(seconds, processed a second, arriving a second) of the last minute, in offsets, oldest first."""
        samples = list(self._samples)
        return tuple(
            (new.at, *_between(samples[max(0, i - _SMOOTH)], new)[:2]) for i, new in enumerate(samples) if i
        )

    def progress(self, at: Mapping[TopicPartition, int], ends: Mapping[TopicPartition, int]) -> float | None:
        """The share in [0, 1] of the way from where the run began to `ends`; None: there is no way."""
        begin = dict(self._begin)
        way = sum(max(0, end - begin.get(tp, end)) for tp, end in ends.items())
        done = sum(max(0, at.get(tp, 0) - begin.get(tp, at.get(tp, 0))) for tp in ends)
        return min(1.0, done / way) if way else None


def _moved(old: Mapping[TopicPartition, int], new: Mapping[TopicPartition, int]) -> int:
    return sum(max(0, offset - old[tp]) for tp, offset in new.items() if tp in old)


def _between(old: Sample, new: Sample) -> tuple[float, float, float]:
    seconds = max(new.at - old.at, 1e-9)
    processed, arrived, records = (b - a for a, b in zip(old[1:], new[1:], strict=True))
    return processed / seconds, arrived / seconds, records / seconds
