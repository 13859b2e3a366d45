"""Kafka topics as a target: in Kafka transactions, or at least once."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import confluent_kafka as ck

from kframe.deliver.producing import FENCED, MARKER, Hung, Sender, bounded, told
from kframe.errors import DeliveryDelayed, Fenced
from kframe.model import Entry
from kframe.source.settings import Settings

NAME = "kafka"
"""The target's name: all output topics of a pipeline go through one outbox, so batches stay whole."""
_TIMEOUT_S = 10.0
_WATCHDOG_S = 15.0
_abandoned: list[Any] = []
"""Producers with a call that never came back: destroying them would wait for it."""


class TransactionalTopics:
    """Exactly once: records and the delivered position in one Kafka transaction.

    The position is the offset of a marker topic in a group of the pipeline's own; the offset's metadata names
    its owner. A producer is used again only while its calls return in half of ``retry.backoff.ms``: a slower
    one may have sent EndTxn twice, and the late one would end the next transaction.

    Parameters
    ----------
    settings : Settings
    pipeline : str
        Names the group and the transactional id: ``kframe.<pipeline>.delivery``.
    """

    name = NAME
    exact = True

    def __init__(self, settings: Settings, pipeline: str) -> None:
        self.recycled = 0
        self._settings = settings
        self._id = _delivery_id(pipeline)
        self._owner = uuid.uuid4().hex
        self._config = settings.producer(transactional_id=self._id)
        self._slow_s = int(self._config.get("retry.backoff.ms", 100)) / 2000
        self._sender: Sender | None = None
        self._spare: Sender | None = None
        self._group: Any = None
        self._begun = False
        self._fenced = self._owned = False

    def open(self, kept: int) -> int | None:
        """A new producer, which ends what the old one left open; then the position in the group."""
        with self._errors():
            if self._group is None:
                self._group = ck.Consumer(self._settings.consumer(self._id))
            if self._fenced:
                self._check_still_ours()
            self._renew()
            position = self._committed()
        if self._owned and position.metadata and position.metadata != self._owner:
            raise self._taken_over()  # and its producer, fenced by ours, finds that out and goes on
        return position.offset if position.offset >= 0 else None

    def send(self, entries: Iterable[Entry]) -> None:
        """Begin a transaction, and have all records acknowledged."""
        with self._errors() as sender:
            sender.producer.begin_transaction()
            self._begun = True
            sender.produce(entries)

    def commit(self, position: int) -> None:
        """End the transaction, with the position in it."""
        with self._errors() as sender:
            if not self._begun:
                sender.producer.begin_transaction()
            marker = ck.TopicPartition(MARKER, 0, position, self._owner)
            group = self._group.consumer_group_metadata()
            slowest = self._timed(
                lambda: sender.producer.send_offsets_to_transaction([marker], group, _TIMEOUT_S),
                lambda: sender.producer.commit_transaction(_TIMEOUT_S),
            )
            self._begun, self._owned = False, True
            if slowest > self._slow_s:
                self.recycled += 1
                self._renew()
                self._spare = self._warmed()

    def close(self) -> None:
        """Leave; an open transaction is aborted."""
        sender, self._sender, self._spare = self._sender, None, None
        if sender is not None and self._begun:
            with contextlib.suppress(ck.KafkaException, SystemError, Hung):
                bounded(lambda: sender.producer.abort_transaction(_TIMEOUT_S), _WATCHDOG_S)
        if self._group is not None:
            self._group.close()
            self._group = None

    # ---- producers ----------------------------------------------------------------------------------

    def _renew(self) -> None:
        """Another producer takes the transactional id over: whatever the old one sent late is fenced."""
        old, self._sender = self._sender, self._spare or Sender(self._config)
        self._spare, self._begun = None, False
        if old is not None:
            old.producer.purge()
        new = self._sender
        self._timed(lambda: _connect(new), lambda: new.producer.init_transactions(_TIMEOUT_S))

    def _warmed(self) -> Sender:
        """A producer for later, which connects meanwhile."""
        spare = Sender(self._config)
        threading.Thread(target=_connect, args=[spare], name="kframe-producer-warm", daemon=True).start()
        return spare

    def _timed(self, *calls: Callable[[], Any]) -> float:
        """Make the calls, each under the watchdog; the seconds that the slowest took."""
        slowest = 0.0
        for call in calls:
            began = time.monotonic()
            bounded(call, _WATCHDOG_S)
            slowest = max(slowest, time.monotonic() - began)
        return slowest

    def _committed(self) -> Any:
        return self._group.committed([ck.TopicPartition(MARKER, 0)], timeout=_TIMEOUT_S)[0]

    # ---- errors -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _errors(self) -> Iterator[Any]:
        """The client's errors as kframe's. Each is followed by `open`, or by the end."""
        try:
            yield self._sender
        except Hung:
            _abandoned.append(self._sender)
            self._sender = None
            raise DeliveryDelayed(
                f"Kafka's client did not come back in {_WATCHDOG_S:g} s; its producer is abandoned.",
                kept="The rows are kept in the outbox.",
            ) from None
        except ck.KafkaException as error:
            if self._sender is not None:
                self._sender.check()
            if error.args[0].code() in FENCED:
                self._fenced = True
                self._check_still_ours()
            raise told(self._settings, error) from None
        except SystemError as error:  # the client's flush after a fatal error
            raise DeliveryDelayed(f"Kafka's client failed: {error}", kept="The rows are kept.") from None

    def _check_still_ours(self) -> None:
        """A fenced producer: by another run, or by the broker when a transaction took too long?

        Until that is answered no new producer may take the id over.

        Raises
        ------
        Fenced
            The position's owner is another one.
        DeliveryDelayed
            No answer: the position of an open transaction cannot be read.
        """
        try:
            owner = self._committed().metadata
        except ck.KafkaException as error:
            raise told(self._settings, error) from None
        if owner != self._owner:
            raise self._taken_over()
        self._fenced = False

    def _taken_over(self) -> Fenced:
        return Fenced(
            f"Another run delivers the rows of {self._id!r} now.",
            kept="Nothing of this delivery is visible; the rows are kept in the outbox.",
            hint="Use the newer run, or give this pipeline another name=.",
        )


def delivered_position(settings: Settings, pipeline: str) -> int:
    """What has been delivered, by whichever run; nobody is disturbed.

    Raises
    ------
    DeliveryDelayed
        Kafka does not say.
    """
    group = ck.Consumer(settings.consumer(_delivery_id(pipeline)))
    try:
        return max(0, int(group.committed([ck.TopicPartition(MARKER, 0)], timeout=_TIMEOUT_S)[0].offset))
    except ck.KafkaException as error:
        raise told(settings, error) from None
    finally:
        group.close()


def _delivery_id(pipeline: str) -> str:
    """The name of the group and of the transactional id."""
    return f"kframe.{pipeline}.delivery"


def _connect(sender: Sender) -> None:
    """Be connected: else `init_transactions` finds no coordinator, and asks again half a second later."""
    with contextlib.suppress(ck.KafkaException):
        sender.producer.list_topics(MARKER, timeout=_TIMEOUT_S)


class IdempotentTopics:
    """At least once: an idempotent producer; the position is in the pipeline's file alone."""

    name = NAME
    exact = False

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sender: Sender | None = None

    def open(self, kept: int) -> int | None:
        """A new producer, and on from the file's position."""
        self._sender = Sender(self._settings.producer())
        return kept

    def send(self, entries: Iterable[Entry]) -> None:
        """Have all records acknowledged."""
        assert self._sender is not None, "open() first"
        try:
            self._sender.produce(entries)
        except ck.KafkaException as error:
            raise told(self._settings, error) from None

    def commit(self, position: int) -> None:
        """Nothing: what was sent is visible, and the file holds the position."""

    def close(self) -> None:
        """Leave."""
        self._sender = None
