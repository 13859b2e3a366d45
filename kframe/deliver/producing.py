"""What the Kafka client's producers need to be safe: bounded calls, errors told apart, topics that exist."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

from kframe.errors import ConfigError, DeliveryDelayed, DeliveryRefused, KframeError
from kframe.model import Entry, Outlet
from kframe.source.settings import Settings

MARKER = "kframe-delivered"
"""The topic whose group offsets are delivered positions. It never holds a record, but it must exist."""
_ADMIN_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.1
_FLUSH_TIMEOUT_S = 60.0
FENCED = {ck.KafkaError._FENCED, ck.KafkaError.INVALID_PRODUCER_EPOCH, 90}
_REFUSED = {
    ck.KafkaError.MSG_SIZE_TOO_LARGE: "it is too large for the topic or the producer",
    ck.KafkaError.RECORD_LIST_TOO_LARGE: "its batch is too large for the topic",
    ck.KafkaError.INVALID_RECORD: "the topic takes no such record (a compacted one needs keys)",
    ck.KafkaError.TOPIC_AUTHORIZATION_FAILED: "this user may not write to the topic",
    ck.KafkaError.GROUP_AUTHORIZATION_FAILED: "this user may not use the delivery group",
    ck.KafkaError.CLUSTER_AUTHORIZATION_FAILED: "this user may not produce to the cluster",
    ck.KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED: "this user may not use the transactional id",
}
_quiet = logging.getLogger("kframe.kafka")
"""For the client's own lines: what they say is in our errors, and a library does not print."""
_quiet.addHandler(logging.NullHandler())
_KEPT = "Nothing is lost: the row and those behind it are kept in the outbox; tables and positions stand."


class Hung(Exception):
    """A call of the client did not come back."""


def bounded(call: Callable[[], Any], within_s: float) -> Any:
    """Run a client call that may ignore its timeout; raises `Hung`, and leaves it alone, when it does."""
    outcome: list[tuple[Any, BaseException | None]] = []
    ended = threading.Event()

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))
        finally:
            ended.set()

    threading.Thread(target=work, name="kframe-client-call", daemon=True).start()
    if not ended.wait(within_s):
        raise Hung
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


class Sender:
    """A producer, and what the brokers did not take from it.

    Parameters
    ----------
    config : mapping
        Of the producer. Records get the partitions that Kafka's Java clients would give them.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        reports = {"delivery.report.only.error": True, "on_delivery": self._report}
        own = {"enable.idempotence": True, **reports}  # retries neither double nor reorder
        self.producer = ck.Producer({"partitioner": "murmur2_random", **config, **own}, logger=_quiet)
        self._failed: tuple[Any, Any] | None = None

    def _report(self, error: Any, message: Any) -> None:
        """Keep the largest: with one record too large, the whole request that it is in fails."""
        if error is not None and (self._failed is None or len(message) > len(self._failed[1])):
            self._failed = (error, message)

    def check(self) -> None:
        """Raise for a record that was not taken, if there is one."""
        if self._failed is None:
            return
        error, message = self._failed
        if error.code() in _REFUSED:
            raise refused(error.code(), message.topic(), message.key(), message.value())
        raise DeliveryDelayed(f"Topic {message.topic()!r}: {error.str()}", kept=_KEPT)

    def produce(self, entries: Iterable[Entry]) -> None:
        """Hand over every record, waiting while the client's queue is full, then for all acknowledgements."""
        for entry in entries:
            send = self.producer.produce
            for key, value in zip(*(entry.rows[c].to_pylist() for c in ("key", "value")), strict=True):
                try:
                    send(entry.name, value, key)
                except BufferError:
                    self._when_there_is_room(entry.name, value, key)
                except ck.KafkaException as error:
                    if error.args[0].code() in _REFUSED:
                        raise refused(error.args[0].code(), entry.name, key, value) from None
                    raise
            self.producer.poll(0)
        if self.producer.flush(_FLUSH_TIMEOUT_S):
            raise DeliveryDelayed(f"No acknowledgement in {_FLUSH_TIMEOUT_S:g} s.", kept=_KEPT)
        self.check()

    def _when_there_is_room(self, topic: str, value: bytes | None, key: bytes | None) -> None:
        while True:
            self.producer.poll(0.1)
            try:
                self.producer.produce(topic, value, key)
                return
            except BufferError:
                continue


def refused(code: int, topic: str, key: bytes | None, value: bytes | None) -> KframeError:
    """The error for a record that will not be taken, which names it."""
    shown = "none" if key is None else repr(key[:100])
    return DeliveryRefused(
        f"Topic {topic!r} refuses the record with key {shown} ({len(value or b''):,} bytes): "
        f"{_REFUSED.get(code, f'code {code}')}.",
        kept=_KEPT,
        hint="For larger records raise the topic's max.message.bytes, and message.max.bytes in kafka_config; "
        "then run again.",
    )


def told(settings: Settings, error: ck.KafkaException) -> KframeError:
    """The client's error as kframe's: refusals need a person, everything else may pass."""
    kafka_error = error.args[0]
    text = settings.redact(kafka_error.str())
    if kafka_error.code() in _REFUSED:
        return DeliveryRefused(
            f"Kafka refuses the delivery: {_REFUSED[kafka_error.code()]} ({text}).",
            kept=_KEPT,
            hint="Correct it, then run again.",
        )
    return DeliveryDelayed(f"Kafka does not take the rows now: {text}", kept=_KEPT)


def prepare_topics(settings: Settings, outlets: Iterable[Outlet]) -> set[str]:
    """Make the topics that do not exist yet, the marker among them; the names of those that are compacted.

    Topics get the broker's default partitions and replicas; those of keyed tables (``null_keys`` False) are
    made compacted.

    Raises
    ------
    ConfigError
        A topic cannot be made, or a compacted one would get records without a key.
    """
    made = {o.name: {} if o.null_keys else {"cleanup.policy": "compact"} for o in outlets}
    with explained(settings):
        admin = AdminClient(settings.admin())
        known = admin.list_topics(timeout=_ADMIN_TIMEOUT_S).topics
        new = [
            NewTopic(name, num_partitions=1 if name == MARKER else -1, replication_factor=-1, config=config)
            for name, config in {**made, MARKER: {"cleanup.policy": "compact"}}.items()
            if name not in known
        ]
        for future in admin.create_topics(new, request_timeout=_ADMIN_TIMEOUT_S).values() if new else ():
            unless_there(future)
        policies = topic_configs(admin, made) if made else {}
    compacted = {name for name, config in policies.items() if "compact" in config["cleanup.policy"].value}
    for outlet in outlets:
        if outlet.name in compacted and not outlet.key:
            raise ConfigError(
                f"Topic {outlet.name!r} is compacted: it takes no records without a key.",
                kept="Nothing was changed.",
                hint="Give the output a key=, or the topic another cleanup.policy.",
            )
    return compacted


def topic_configs(admin: AdminClient, names: Iterable[str]) -> dict[str, Any]:
    """The settings of topics. One that has just been made is unknown to some broker for a moment."""
    asked = [ConfigResource(ConfigResource.Type.TOPIC, name) for name in names]
    until = time.monotonic() + _ADMIN_TIMEOUT_S
    while True:
        try:
            return {r.name: future.result() for r, future in admin.describe_configs(asked).items()}
        except ck.KafkaException as error:
            unknown = error.args[0].code() == ck.KafkaError.UNKNOWN_TOPIC_OR_PART
            if not unknown or time.monotonic() > until:
                raise
            time.sleep(_LOOK_AGAIN_S)


def unless_there(future: Any) -> None:
    """Wait for a topic to be made; that it exists is no error."""
    try:
        future.result()
    except ck.KafkaException as error:
        if error.args[0].code() != ck.KafkaError.TOPIC_ALREADY_EXISTS:
            raise


@contextmanager
def explained(settings: Settings) -> Iterator[None]:
    """An admin client's errors as kframe's."""
    try:
        yield
    except ck.KafkaException as error:
        code, text = error.args[0].code(), settings.redact(error.args[0].str())
        if error.args[0].retriable() or code in (ck.KafkaError._TRANSPORT, ck.KafkaError._TIMED_OUT):
            raise DeliveryDelayed(f"The output topics cannot be looked at: {text}", kept=_KEPT) from None
        raise ConfigError(
            f"The output topics cannot be prepared: {text}",
            kept="Nothing was changed.",
            hint=f"Create them, and the topic {MARKER!r}, or allow this user to.",
        ) from None
