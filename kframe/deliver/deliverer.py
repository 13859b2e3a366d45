"""Carrying the outbox to its targets: a thread for each, woken by every commit."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from kframe.commit.outbox import Due, Outbox
from kframe.deliver.target import Target
from kframe.errors import DeliveryDelayed, DeliveryUnknown, KframeError, Retryable

EDGES = ("delivering", "delivered")
"""Rows are sent and not committed; the target has them, and the file does not know it yet."""
_ROWS_MAX = 100_000
_RETRY_S = 0.2
_GRACE_S = 5.0
_current: dict[tuple[str, str, str], Deliverer] = {}
"""Who delivers, by file, pipeline and target: a run that gave up on a target may still be inside of it."""


class Deliverer:
    """Delivers one pipeline's rows to one target, until `close`. Made before the run posts any of its own.

    Whatever goes wrong in a retryable way, the way back is that of a restart: `Target.open`, and on from the
    position that it returns. Committed batches are never touched.

    Attributes
    ----------
    error : BaseException or None
        What ended it.
    trouble : str or None
        What it is retrying after.
    """

    def __init__(self, outbox: Outbox, target: Target, at_edge: Callable[[str], None]) -> None:
        self.target = target
        self.error: BaseException | None = None
        self.trouble: str | None = None
        self.ended = threading.Event()
        self.moved = threading.Event()
        self._outbox = outbox
        self._at_edge = at_edge
        self._place = (outbox.store.path, outbox.pipeline, target.name)
        self._made_before: int | None = outbox.end(target.name)
        self._before: Deliverer | None = None
        self._woken = threading.Event()
        self._ending = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"kframe-deliver-{outbox.pipeline}-{target.name}", daemon=True
        )

    def start(self) -> None:
        """Begin to deliver what is in the outbox, when an earlier run has left the target."""
        self._before = _current.get(self._place)
        _current[self._place] = self
        self._thread.start()

    def wake(self) -> None:
        """Look into the outbox: a batch has been committed."""
        self._woken.set()

    def undelivered(self) -> int:
        """Rows in the outbox."""
        return self._outbox.undelivered(self.target.name)

    def close(self, within_s: float) -> None:
        """Deliver what is committed, then end; after `within_s` seconds, end after the running delivery."""
        self._ending.set()
        self._woken.set()
        if self._thread.ident is not None and not self.ended.wait(within_s):
            self._stop.set()
            self._woken.set()
            self.ended.wait(_GRACE_S)

    # ---- on its thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            self._await_turn()
            while not self._done():
                try:
                    position = self._take_over()
                    self.trouble = None
                    self._carry(position)
                except Retryable as error:
                    self.trouble = error.what
                    self._stop.wait(_RETRY_S)
        except BaseException as error:
            self.error = error
        finally:
            if self._before is None or self._before.ended.is_set():
                with contextlib.suppress(Exception):
                    self.target.close()
            if _current.get(self._place) is self:
                del _current[self._place]
            self.ended.set()
            self.moved.set()

    def _await_turn(self) -> None:
        """One thread at a time calls a target."""
        while self._before is not None and not self._before.ended.wait(_RETRY_S) and not self._stop.is_set():
            self.trouble = "an earlier run is still inside of the target"

    def _take_over(self) -> int:
        name = self.target.name
        kept, was_exact = self._outbox.position(name)
        held = self.target.open(kept)
        end = self._outbox.end(name) if self._made_before is None else self._made_before
        position = kept if held is None else held
        if held is not None and held > end:
            raise another_file(self._outbox.pipeline, name, held, end)
        self._made_before = None  # from now on what this run makes may be delivered, too
        if position < kept or (held is None and kept):
            if self._outbox.undelivered(name) and was_exact and self.target.exact:
                raise _position_lost(self._outbox.pipeline, name, held, kept, end)
            position = kept  # it was kept in the file alone, or all rows are delivered
        self.target.commit(position)
        if position > kept:  # delivered by a run that could not write it down
            self._outbox.trim(name, position, exact=self.target.exact)
        return position

    def _carry(self, position: int) -> None:
        name = self.target.name
        while not self._stop.is_set():
            self._woken.clear()
            due = self._outbox.due(name, position, _ROWS_MAX)
            if due is not None:
                self._deliver(due, position)
                position = due.stop
            elif self._ending.is_set():
                return
            else:
                self._woken.wait()

    def _deliver(self, due: Due, position: int) -> None:
        name = self.target.name
        if due.start != position:
            raise _position_lost(self._outbox.pipeline, name, position, due.start, due.stop)
        self.target.send(self._outbox.entries(name, due))
        self._at_edge("delivering")
        self.target.commit(due.stop)
        self._at_edge("delivered")
        self._outbox.trim(name, due.stop, exact=self.target.exact)
        self.moved.set()

    def _done(self) -> bool:
        return self._stop.is_set() or (self._ending.is_set() and not self.undelivered())


class Deliveries:
    """All deliverers of one run."""

    def __init__(self, outbox: Outbox, targets: Sequence[Target], at_edge: Callable[[str], None]) -> None:
        self._outbox = outbox
        self._deliverers = [Deliverer(outbox, target, at_edge) for target in targets]

    def start(self) -> None:
        """Begin to deliver."""
        for deliverer in self._deliverers:
            deliverer.start()

    def wake(self) -> None:
        """A batch has been committed."""
        for deliverer in self._deliverers:
            deliverer.wake()

    def undelivered(self) -> int:
        """Rows in the outbox."""
        return sum(deliverer.undelivered() for deliverer in self._deliverers)

    def trouble(self) -> str | None:
        """What a deliverer is retrying after, or what ended it."""
        ended = [(str(d.error) or repr(d.error)).splitlines()[0] for d in self._deliverers if d.error]
        return next(iter([*ended, *(d.trouble for d in self._deliverers if d.trouble)]), None)

    def check(self) -> None:
        """Raise what has ended a deliverer, if anything has."""
        for deliverer in self._deliverers:
            if deliverer.error is not None:
                raise deliverer.error

    def progress(self, rows_max: int, patience_s: float) -> Iterator[int]:
        """Wait until at most `rows_max` rows are undelivered; the number, five times a second and more.

        Raises
        ------
        DeliveryDelayed
            Nothing was delivered for `patience_s` seconds.
        KframeError
            A deliverer has ended.
        """
        left, since = self.undelivered(), time.monotonic()
        while left > rows_max:
            self.check()
            for deliverer in self._deliverers:
                deliverer.moved.wait(0.2 / len(self._deliverers))
                deliverer.moved.clear()
            before, left = left, self.undelivered()
            yield left
            if left != before:
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise DeliveryDelayed(
                    f"{left:,} committed rows could not be delivered in {patience_s:g} s: "
                    f"{self.trouble() or 'no answer yet'}.",
                    kept="Tables and positions are committed; the rows are kept in the outbox.",
                    hint="The next run delivers them, once each.",
                )
        self.check()

    def close(self, within_s: float) -> None:
        """Deliver what is committed, in bounded time, and end."""
        until = time.monotonic() + within_s
        for deliverer in self._deliverers:
            deliverer.close(max(0.0, until - time.monotonic()))


def another_file(pipeline: str, target: str, held: int, end: int) -> KframeError:
    """The error for a file that has not made what has been delivered."""
    return DeliveryUnknown(
        f"{target}: {held:,} rows of pipeline {pipeline!r} have been delivered there, but this file has only "
        f"ever made {end:,}. It is an older copy, or another file under the same name.",
        kept="Nothing was sent; tables, positions and outbox are as they were.",
        hint="Use the newest file, or give this pipeline another name=.",
    )


def _position_lost(pipeline: str, target: str, held: int | None, kept: int, end: int) -> KframeError:
    return DeliveryUnknown(
        f"{target}: the delivered position of pipeline {pipeline!r} is lost there (it says "
        f"{'nothing' if held is None else f'{held:,}'}, the file says {kept:,}; it may have expired). "
        f"Whether the rows [{kept:,}, {end:,}) have been delivered cannot be known.",
        kept="Nothing was sent; the rows are kept in the outbox.",
        hint="Compare the target with _kframe.outbox. To send them again: run once with processing_guarantee="
        '"at_least_once".',
    )
