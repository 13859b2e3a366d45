"""Faults at the edges of the batch protocol, and a count of what they hit."""

from __future__ import annotations

import os
import signal
from collections import Counter
from dataclasses import dataclass

from kframe.deliver.deliverer import EDGES as DELIVERY_EDGES
from kframe.engine import EDGES
from kframe.standby.standing import EDGES as STANDBY_EDGES

KINDS = ("exception", "interrupt", "kill")
"""An `InjectedFault`, a KeyboardInterrupt, a SIGKILL of this process."""


class InjectedFault(Exception):
    """What a fault of kind ``"exception"`` raises."""


@dataclass(frozen=True)
class Fault:
    """One fault: at which edge, of which kind, at which pass of that edge.

    Parameters
    ----------
    edge : str
        One of `EDGES`, `DELIVERY_EDGES` or `STANDBY_EDGES`.
    kind : "exception", "interrupt" or "kill"
    at : int
        The pass that fires, counted from 1 when the fault is armed.
    """

    edge: str
    kind: str = "exception"
    at: int = 1

    def __post_init__(self) -> None:
        edges = EDGES + DELIVERY_EDGES + STANDBY_EDGES
        for what, value, known in (("edge", self.edge, edges), ("kind", self.kind, KINDS)):
            if value not in known:
                raise ValueError(f"Fault: there is no {what} {value!r}. Choose from {', '.join(known)}.")
        if self.at < 1:
            raise ValueError(f"Fault: passes are counted from 1, not {self.at}.")


class Faults:
    """An ``at_edge`` callable that fires faults, each once, and counts.

    Parameters
    ----------
    *faults : Fault
        Armed from the start; see `arm`.

    Attributes
    ----------
    passed : Counter
        How often each edge was passed.
    fired : list of Fault
        In order. A test that asserts nothing about it may have tested nothing.

    Examples
    --------
    >>> faults = Faults(Fault("rows_written", at=2))
    >>> faults("rows_written")
    >>> faults("rows_written")
    Traceback (most recent call last):
        ...
    kframe.testing.faults.InjectedFault: at rows_written
    >>> faults.fired
    [Fault(edge='rows_written', kind='exception', at=2)]

    ``Pipeline(..., at_edge=faults)`` puts it to work.
    """

    def __init__(self, *faults: Fault) -> None:
        self.passed: Counter[str] = Counter()
        self.fired: list[Fault] = []
        self._armed: list[tuple[Fault, int]] = []
        for fault in faults:
            self.arm(fault)

    def __repr__(self) -> str:
        return f"<Faults {len(self._armed)} armed, {len(self.fired)} fired>"

    def arm(self, fault: Fault) -> None:
        """Fire `fault` at its edge's ``at``-th pass from now on."""
        self._armed.append((fault, self.passed[fault.edge] + fault.at))

    def disarm(self) -> None:
        """Forget what has not fired."""
        self._armed.clear()

    def __call__(self, edge: str) -> None:
        """Pass an edge."""
        self.passed[edge] += 1
        for armed in self._armed:
            fault, at = armed
            if fault.edge == edge and self.passed[edge] == at:
                self._armed.remove(armed)
                self.fired.append(fault)
                _fire(fault)


def _fire(fault: Fault) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "interrupt":
        raise KeyboardInterrupt
    raise InjectedFault(f"at {fault.edge}")
