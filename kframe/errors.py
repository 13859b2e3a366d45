"""Every error kframe raises, and what to do when it is caught.

::

    KframeError
    ├── Retryable              nothing has changed; the same call may succeed later
    │   ├── BrokerUnavailable
    │   └── DeliveryDelayed    committed rows have not reached their target yet
    ├── AbortBatch             this batch was rolled back; positions and tables are as before
    │   ├── StepError          a user's function raised, or a SQL step failed
    │   ├── SchemaError        data does not fit the declared or stored types
    │   └── TooManyDeadLetters
    └── Fatal                  stop; a person has to decide
        ├── ConfigError        (also a ValueError)
        ├── DefinitionError    (also a ValueError)
        ├── StoreLocked        another process, kernel or fork owns the file
        ├── StoreDamaged       the file or its write-ahead log cannot be read
        ├── Fenced             somebody else advanced this pipeline
        ├── LostRange          Kafka no longer has offsets that were still to be read
        ├── TopicRecreated     the topic was deleted and made again
        ├── UnreadableRecord   the client cannot get past an offset
        ├── DeliveryRefused    a target will not take a committed row
        ├── DeliveryUnknown    nobody can say which committed rows a target has
        └── LocalKafkaError    the local broker could not be fetched or started

The text of an error says what happened and where, what was kept, and the next step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self


class KframeError(Exception):
    """The root of all of kframe's errors.

    Parameters
    ----------
    what : str
        What happened, and where (``orders[3] offsets [40, 90)``).
    kept : str, optional
        What is still true: tables, positions.
    hint : str, optional
        The next step for the reader.
    """

    def __init__(self, what: str, *, kept: str = "", hint: str = "") -> None:
        super().__init__("\n".join(part for part in (what, kept, hint) if part))
        self.what = what
        self.kept = kept
        self.hint = hint

    def retold(self, *, kept: str, hint: str) -> Self:
        """The same error where something else was kept, and something else can be done."""
        told = copy.copy(self)
        KframeError.__init__(told, self.what, kept=kept, hint=hint)
        return told


class Retryable(KframeError):
    """Nothing has changed; the same call may succeed later."""


class BrokerUnavailable(Retryable):
    """No broker answered in time."""


class DeliveryDelayed(Retryable):
    """Committed rows have not reached their target yet; the outbox keeps them."""


class InstanceActive(Retryable):
    """Another instance of a pipeline with ``standby=True`` is the active one."""

    def __init__(self, pipeline: str) -> None:
        super().__init__(
            f"Another instance of pipeline {pipeline!r} is active.",
            kept="This one has followed it: its tables are those of the other's last batch seen.",
            hint="start() stands by and takes over when it ends; sql() reads here meanwhile.",
        )


class Restoring(Retryable):
    """Tables are being restored from a changelog and are of no one batch yet."""


class AbortBatch(KframeError):
    """The running batch was rolled back; tables and positions are as they were.

    Attributes
    ----------
    ranges : tuple of OffsetRange
        The records it would have committed, as far as they are known; of a step, those it ran over.
    """

    ranges: tuple[Any, ...] = ()


class StepError(AbortBatch):
    """A step's function raised; ``__cause__`` is its exception.

    Attributes
    ----------
    step : str
        The table whose step it was.
    frames : dict of str to DataFrame
        What the function was called with, by parameter.
    where : tuple of (file, line, source) or None
        The line of the user's code that raised, or led there.
    """

    step: str = ""
    frames: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    where: tuple[str, int, str] | None = None


class SchemaError(AbortBatch):
    """Data does not fit the declared or the stored types."""


class TooManyDeadLetters(AbortBatch):
    """More records could not be decoded than ``dead_letters_max_ratio`` allows."""


class Fatal(KframeError):
    """The pipeline cannot go on until a person has decided."""


class ConfigError(Fatal, ValueError):
    """An option or a Kafka setting is not usable."""


class DefinitionError(Fatal, ValueError):
    """A topic, table or step cannot be defined like this."""


class StoreLocked(Fatal):
    """Another process, kernel or fork owns the database file."""


class StoreDamaged(Fatal):
    """The database file or its write-ahead log cannot be read."""


class Fenced(Fatal):
    """Somebody else has taken over this pipeline or advanced its positions."""


class LostRange(Fatal):
    """Offsets that were still to be read are no longer in Kafka's log.

    Attributes
    ----------
    ranges : tuple of OffsetRange
        What is lost: below the log's start, or between its end and a position beyond it.
    """

    def __init__(self, what: str, ranges: tuple[Any, ...] = (), *, kept: str = "", hint: str = "") -> None:
        super().__init__(what, kept=kept, hint=hint)
        self.ranges = ranges

    @classmethod
    def of(cls, expired: Sequence[Any], truncated: Sequence[Any]) -> LostRange:
        """The error for ranges that have expired and ranges that were cut off the log's end."""
        told = [f"{r} are no longer in the log (expired or deleted)" for r in expired]
        told += [f"{r} were read before, but the log now ends at {r.start}" for r in truncated]
        return cls(
            "Records are lost: " + "; ".join(told) + ".",
            (*expired, *truncated),
            kept="Tables and positions are as they were; the ranges are named in _kframe.gaps.",
            hint='Restore the topic, or go on without them: Pipeline(..., on_lost_range="skip").',
        )


class TopicRecreated(Fatal):
    """The topic was deleted and made again: its offsets mean other records now."""


class UnreadableRecord(Fatal):
    """Kafka's client cannot get past an offset."""


class DeliveryRefused(Fatal):
    """A target will not take a committed row; the outbox keeps it and those behind it."""


class DeliveryUnknown(Fatal):
    """Nobody can say which of the committed rows a target has; the outbox keeps them."""


class LocalKafkaError(Fatal):
    """The local Apache Kafka could not be fetched, started or stopped."""


def is_interrupt(error: BaseException) -> bool:
    """Whether it is Ctrl-C, also in the forms in which DuckDB raises it."""
    return (
        isinstance(error, KeyboardInterrupt)
        or (type(error) is RuntimeError and str(error) == "Query interrupted")
        or type(error).__name__ == "InterruptException"
    )


@contextlib.contextmanager
def interruptible(outcome: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside the block comes out as a KeyboardInterrupt with a note that says how things stand."""
    try:
        yield
    except BaseException as raised:
        if not is_interrupt(raised):
            raise
        error = KeyboardInterrupt()
        error.add_note(f"kframe: interrupted; {outcome()}")
        raise error from None
