"""What carries committed rows somewhere: the protocol of a target."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from kframe.model import Entry


class Target(Protocol):
    """A place that a pipeline's rows are carried to. One thread calls its methods.

    Rows have dense ids; a position is the id of the next row to deliver. After any error the deliverer calls
    `open` again and goes on from the position that it returns, so a target recovers in one way only.
    """

    @property
    def name(self) -> str:
        """The target's name in the outbox; another one is another target, which starts from nothing."""

    @property
    def exact(self) -> bool:
        """Whether `commit` makes rows and position visible together."""

    def open(self, kept: int) -> int | None:
        """Take over from whoever delivered before, end what they left unfinished, and say where to go on.

        Parameters
        ----------
        kept : int
            The position in the pipeline's file.

        Returns
        -------
        int or None
            The position that the target holds, None when it holds none; `kept` for a target that never does.

        Raises
        ------
        Retryable
            It cannot be reached now.
        """

    def send(self, entries: Iterable[Entry]) -> None:
        """Carry rows there, in order, not to be seen yet where that is possible."""

    def commit(self, position: int) -> None:
        """Make what was sent visible, and `position` with it. Also called with nothing sent, to take over.

        Raises
        ------
        Retryable
            It may be visible or not; `open` will tell.
        Fatal
            A person has to decide. Nothing of what was sent is visible.
        """

    def close(self) -> None:
        """Give up connections. Nothing that was sent and not committed becomes visible."""
