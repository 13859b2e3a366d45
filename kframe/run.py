"""One run of a pipeline: take over, find the positions, loop over batches, end."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.commit.store import Store
from kframe.commit.transaction import interrupts_deferred
from kframe.config import Options
from kframe.definition import Definition
from kframe.deliver.deliverer import Deliveries
from kframe.deliver.kafka import NAME as KAFKA
from kframe.deliver.target import Target
from kframe.engine import Engine
from kframe.errors import (
    BrokerUnavailable,
    DeliveryDelayed,
    DeliveryUnknown,
    Fenced,
    InstanceActive,
    Retryable,
    is_interrupt,
)
from kframe.executors.local import Executor
from kframe.meter import Meter
from kframe.model import BatchReport, Fetched, Outlet, RunReport, TopicPartition
from kframe.progress import Advance, progress_bar
from kframe.source.protocol import Source
from kframe.standby.election import Election
from kframe.standby.standing import Standby
from kframe.taking_over import TakingOver
from kframe.worker import AtEdge

TRANSITIONS = {
    "new": {"running", "standby", "failed", "stopped"},
    "standby": {"running", "standby", "stopped", "failed"},  # a take-over that came to nothing: once more
    "running": {"paused", "stopping", "standby", "stopped", "failed"},
    "paused": {"running", "stopping"},
    "stopping": {"stopped", "failed"},
    "stopped": set(),
    "failed": set(),
}
"""The states of a run, and which may follow which."""

_RETRY_S = 1.0
_METADATA_S = 5.0
_WAL_BYTES = 256 << 20
_UNDELIVERED_MAX = 1_000_000  # rows in the outbox; beyond it, reading waits for the deliverers
_PATIENCE_S = 60.0
_CLOSE_S = 10.0
_RELEASE_S = 60.0
_LOOK_S = 0.2
_TURN_S = 3.0
_FRUITLESS_MAX = 10


class Run(TakingOver):
    """One run. `execute` does it on the calling thread; every other method may be called from any thread.

    Parameters
    ----------
    until_end : bool
        Stop at the end offsets seen at the start, or follow the topics for ever.
    progress : bool
        Show a progress bar.
    outlets : callable
        What leaves, with the topics checked. Asked once, when the run takes over.
    targets : callable
        Where rows are delivered. Asked when the run takes over.
    standby : Standby, optional
        Of several instances of the pipeline one is active, and the others follow it.
    """

    def __init__(
        self,
        *,
        definition: Definition,
        options: Options,
        store: Store,
        ledger: Ledger,
        source: Source,
        executor: Executor | None,
        until_end: bool,
        progress: bool,
        at_edge: AtEdge,
        outlets: Callable[[], Sequence[Outlet]],
        targets: Callable[[], Sequence[Target]],
        standby: Standby | None = None,
    ) -> None:
        super().__init__(
            definition=definition,
            options=options,
            store=store,
            ledger=ledger,
            source=source,
            executor=executor,
            until_end=until_end,
            at_edge=at_edge,
            outlets=outlets,
            standby=standby,
        )
        self.state = "new"
        self.error: BaseException | None = None
        self.trouble: str | None = None
        self.engine: Engine | None = None
        self.last: BatchReport | None = None
        self.meter = Meter()
        self.ended = threading.Event()
        self.started_at = time.monotonic()
        self._progress = progress
        self._targets = targets
        self._deliveries: Deliveries | None = None
        self._election: Election | None = None
        self._served = threading.Event()
        self._fruitless = 0
        self._stop = threading.Event()
        self._unpaused = threading.Event()
        self._unpaused.set()
        self._snapshot_due = 0.0

    # ---- steering -----------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the run to end after the running batch."""
        self._stop.set()
        self._unpaused.set()

    def pause(self) -> None:
        """Hold before the next batch."""
        self._unpaused.clear()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._unpaused.set()

    def execute(self) -> RunReport:
        """Run until the end, a stop, or an error, which is kept in ``error`` and raised."""
        return self._execute(self._loop)

    def retry(self, records: Fetched) -> RunReport:
        """Run dead letters through the steps once more, in one transaction. Errors as in `execute`."""

        def once(engine: Engine) -> None:
            self.last = engine.retry(records)

        return self._execute(once)

    def _execute(self, work: Callable[[Engine], None]) -> RunReport:
        try:
            if self._standby is None:
                self._become("running")
                self._serve(work, self._targets())
            else:
                self._stand_by(self._standby, work)
            self._become("stopped")
            return self.report()
        except BaseException as raised:
            error = KeyboardInterrupt() if is_interrupt(raised) else raised
            self.error = error
            self.state = "failed"
            if isinstance(error, KeyboardInterrupt):
                error.add_note(
                    f"kframe: pipeline {self._definition.pipeline!r} was interrupted. Committed batches "
                    "stand, a running one was rolled back; the next run goes on from the stored positions."
                )
            if error is raised:
                raise
            raise error from None
        finally:
            self._stop.set()
            with interrupts_deferred():  # a second Ctrl-C would leave the source open
                self._close()
                self.ended.set()

    def _serve(self, work: Callable[[Engine], None], targets: Sequence[Target]) -> None:
        deliveries = Deliveries(Outbox(self._store, self._ledger.pipeline), targets, self._at_edge)
        self.engine = self._take_over(self._stopped)
        if targets:
            self._deliveries = deliveries
            self._deliveries.start()
        work(self.engine)
        self._finish()

    def _close(self) -> None:
        if self._deliveries is not None:
            self._deliveries.close(0.0)
        if self.engine is not None:
            self.engine.close()
        self._source.close()

    # ---- standing by --------------------------------------------------------------------------------

    def _stand_by(self, standby: Standby, work: Callable[[Engine], None]) -> None:
        """Follow whichever instance is active; when it is this one, work, until the group says otherwise."""
        self._become("standby")
        self._election = election = standby.elect(self._release)
        try:
            while not self._stop.is_set():
                if not self._follow(standby, election):
                    return
                if self._serve_a_turn(standby, work):
                    return
                self._become("standby")
        finally:
            self._served.set()
            election.leave()

    def _follow(self, standby: Standby, election: Election) -> bool:
        """Follow until this instance is the active one (True), or has been told to stop."""

        def called() -> bool:
            return self._stop.is_set() or election.active

        patience = time.monotonic() + (_PATIENCE_S if self.bounded else math.inf)
        while not called():
            try:
                with self._progress_bar(None, "restoring", " records") as advance:
                    standby.catch_up(called, advance)
                self.trouble = None
                standby.follow(lambda: called() or time.monotonic() > patience)
            except BrokerUnavailable as error:
                if self.bounded:
                    raise
                self.trouble = error.what
                self._stop.wait(_RETRY_S)
                continue
            if not called():
                raise InstanceActive(self._definition.pipeline)
        return not self._stop.is_set()

    def _serve_a_turn(self, standby: Standby, work: Callable[[Engine], None]) -> bool:
        """Work while this instance is the active one; whether it has ended for another reason than that."""
        self._served.clear()
        try:
            targets = self._targets()
            standby.take_over(next(target for target in targets if target.name == KAFKA))
            self._become("running")
            self._serve(work, targets)
            return not self._deposed()
        except (Retryable, Fenced, DeliveryUnknown) as error:
            # Another one publishes already, or is yet to learn that it no longer may: the group decides.
            self._fruitless = 0 if self.engine and self.engine.batches else self._fruitless + 1
            decided = self._turn_ends()
            if not self.bounded and isinstance(error, (BrokerUnavailable, DeliveryDelayed)):
                self.trouble = error.what  # until the brokers are back
            elif not decided and (isinstance(error, DeliveryUnknown) or self._fruitless > _FRUITLESS_MAX):
                raise
            return False
        finally:
            self._close()
            self._served.set()

    def _release(self, in_time: bool) -> None:
        """The group hands the work on: end the running batch and deliver it, if there is time for that."""
        if not in_time and self._deliveries is not None:
            self._deliveries.close(0.0)
        self._served.wait(_RELEASE_S)

    def _turn_ends(self) -> bool:
        """Wait for the group to say that another instance is the active one; False: it does not."""
        patience = time.monotonic() + _TURN_S
        while not self._deposed() and not self._stop.is_set() and time.monotonic() < patience:
            self._served.wait(_LOOK_S)
        return self._deposed()

    def _deposed(self) -> bool:
        return self._election is not None and not self._election.active

    @property
    def delivery_trouble(self) -> str | None:
        """Why committed rows do not reach their targets, if they don't."""
        return self._deliveries.trouble() if self._deliveries else None

    def report(self) -> RunReport:
        """What the run has done so far."""
        engine = self.engine
        return RunReport(
            self._definition.pipeline,
            engine.batches if engine else 0,
            engine.rows if engine else 0,
            engine.dead_letters if engine else 0,
            time.monotonic() - self.started_at,
            {tp: p.offset for tp, p in dict(engine.positions).items()} if engine else {},
        )

    def ends(self) -> Mapping[TopicPartition, int]:
        """Where each partition ends as far as this run knows: at its stop, or at the end last fetched."""
        return self._source.ends() if self._stops is None else self._stops

    def observe(self) -> None:
        """Let the meter take a sample, when it is time; asks no broker. From any thread."""
        if self.engine is not None and not self.ended.is_set():
            self.meter.note(self.engine.positions, self.ends(), self.engine.rows)

    # ---- the loop -----------------------------------------------------------------------------------

    def _loop(self, engine: Engine) -> None:
        look_again = time.monotonic() + _METADATA_S
        with self._bar(engine) as advance:
            while not self._stop.is_set() and not self._deposed() and not engine.done:
                if not self._unpaused.is_set():
                    self._hold()
                    continue
                if self._deliveries is not None:
                    self._let_catch_up(self._deliveries)
                try:
                    self.observe()
                    report = engine.run_batch()
                    if not self.bounded and time.monotonic() >= look_again:
                        self._add_partitions(engine)
                        look_again = time.monotonic() + _METADATA_S
                except BrokerUnavailable as error:
                    self._rewind_source(engine, error)
                    continue
                self.trouble = self._source.trouble()
                if report is not None:
                    self.last = report
                    advance(sum(r.stop - r.start for r in report.ranges))
                    self._after_commit()

    def _hold(self) -> None:
        self._become("paused")
        while not self._unpaused.wait(_LOOK_S) and not self._deposed():
            pass
        self._become("stopping" if self._stop.is_set() else "running")

    def _rewind_source(self, engine: Engine, error: BrokerUnavailable) -> None:
        """Nobody answered before the commit: wait, then read the batch again from the ledger's positions."""
        while not self._stop.wait(_RETRY_S):
            self.trouble = error.what
            with contextlib.suppress(BrokerUnavailable):
                engine.restart_source()
                return

    def _after_commit(self) -> None:
        if self._deliveries is not None:
            self._deliveries.wake()
        with contextlib.suppress(OSError):
            if os.path.getsize(self._store.path + ".wal") > _WAL_BYTES:
                self._store.checkpoint()
        if self._options.snapshot_to and time.monotonic() >= self._snapshot_due:
            self._snapshot()

    def _snapshot(self) -> None:
        began = time.monotonic()
        self._store.snapshot(self._options.snapshot_to or "")
        took = time.monotonic() - began
        self._snapshot_due = began + max(1.0, 10 * took)  # copying stays a small part of the work

    def _let_catch_up(self, deliveries: Deliveries) -> None:
        """Hold reading back while the outbox is long, so that a slow target does not fill the disk."""
        for _ in deliveries.progress(_UNDELIVERED_MAX, math.inf):
            if self._stop.is_set():
                return

    def _deliver_rest(self) -> None:
        """Deliver what is committed: a bounded run all of it, a stopped one what it can in bounded time."""
        if self._deliveries is None:
            return
        self._deliveries.wake()
        left = self._deliveries.undelivered()
        with self._progress_bar(left, "delivering", " rows") as advance:
            for now_left in self._deliveries.progress(0, _PATIENCE_S) if self.bounded else ():
                advance(left - now_left)
                left = now_left
                if self._stop.is_set():
                    break
        self._deliveries.close(_CLOSE_S)
        self._deliveries.check()

    def _finish(self) -> None:
        self._deliver_rest()
        self._store.checkpoint()
        if self._options.snapshot_to:
            self._snapshot()

    def _become(self, state: str) -> None:
        assert state in TRANSITIONS[self.state], f"{self.state} -> {state}"
        self.state = state

    @contextlib.contextmanager
    def _bar(self, engine: Engine) -> Iterator[Advance]:
        total = sum(engine.stops[tp] - p.offset for tp, p in engine.positions.items()) if engine.stops else 0
        with self._progress_bar(total, "", " records") as advance:
            yield advance

    @contextlib.contextmanager
    def _progress_bar(self, total: int | None, doing: str, unit: str) -> Iterator[Advance]:
        what = f"{self._definition.pipeline} {doing}".strip()
        with progress_bar(what, unit, shown=self._progress and self.bounded, total=total) as advance:
            yield advance

    def _stopped(self) -> bool:
        return self._stop.is_set() or not self._unpaused.is_set() or self._deposed()


@contextlib.contextmanager
def stop_on_sigterm(run: Run) -> Iterator[None]:
    """Let SIGTERM end `run` after its batch, where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
