"""The Kafka client's settings: kframe's defaults, the user's own, and what may not be changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kframe.errors import ConfigError

_OWN: dict[str, Any] = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "enable.partition.eof": True,
    "auto.offset.reset": "error",  # any other choice skips lost records silently
    "isolation.level": "read_committed",
    "check.crcs": True,
}

_DEFAULTS: dict[str, Any] = {
    "fetch.queue.backoff.ms": 5,  # the client's 1000 stalls a fast reader
    "queued.min.messages": 300_000,
    "queued.max.messages.kbytes": 131_072,
    "topic.metadata.refresh.interval.ms": 30_000,
}

_CONNECTING: dict[str, Any] = {
    "log_level": 0,
    "reconnect.backoff.max.ms": 1_000,  # the client's 10 s outlast a broker's restart
}

_ADMIN: dict[str, Any] = {
    "topic.metadata.refresh.interval.ms": 1_000,  # else it asks a dead broker for minutes
}

_PATIENCE: dict[str, Any] = {
    "max.poll.interval.ms": 75_000,  # the group waits so long for a member; a turn ends in 60 s
}

_CLASSIC_MEMBER: dict[str, Any] = {
    "partition.assignment.strategy": "cooperative-sticky",  # others hand the partition round at every change
    "session.timeout.ms": 6_000,
    "heartbeat.interval.ms": 1_000,
}

_REFUSED = {
    "plugin.library.paths": "it loads code into this process",
    "group.instance.id": "kframe assigns partitions itself",
}

PIPELINE_SETTINGS = ("processing.guarantee", "commit.interval.ms")
"""Kafka Streams' names for two of `Pipeline`'s own options, accepted among Kafka's settings."""

_SHOWN = {"bootstrap.servers", "client.id"}


class Settings:
    """A validated Kafka configuration that never shows a secret.

    Parameters
    ----------
    brokers : str
        ``host:port,...``.
    extra : mapping, optional
        Settings under Kafka's own dotted names; SASL and TLS go through to the client as they are.

    Raises
    ------
    ConfigError
        A setting that kframe needs at another value, or one that is refused.
    """

    def __init__(self, brokers: str, extra: Mapping[str, Any] | None = None) -> None:
        if not isinstance(brokers, str) or not brokers.strip():
            raise ConfigError("brokers= is empty.", hint='Give "host:port", or kf.local_kafka().brokers.')
        extra = {k: v for k, v in (extra or {}).items() if k not in PIPELINE_SETTINGS}
        for name, value in extra.items():
            _check(name, value)
        self._extra = {"bootstrap.servers": brokers, **extra}

    def __repr__(self) -> str:
        shown = {k: v if k in _SHOWN else "[hidden]" for k, v in self._extra.items()}
        return f"<Settings {shown}>"

    @property
    def brokers(self) -> str:
        """``host:port,...``."""
        return str(self._extra["bootstrap.servers"])

    def consumer(self, group_id: str) -> dict[str, Any]:
        """The consumer's configuration."""
        own = {k: v for k, v in self._quiet().items() if k != "group.protocol"}
        return {**_DEFAULTS, "group.id": group_id, **own, **_OWN}

    def member(self, group_id: str) -> dict[str, Any]:
        """The configuration of a member of a consumer group that only wants its assignment.

        With the classic protocol a dead member is noticed after ``session.timeout.ms``, 6 s unless given;
        with ``group.protocol=consumer`` the broker's setting decides.
        """
        own = {"group.id": group_id, "enable.auto.commit": False, "auto.offset.reset": "latest"}
        config = {**_PATIENCE, **_CLASSIC_MEMBER, **self._quiet(), **own}
        if config.get("group.protocol") == "consumer":
            return {k: v for k, v in config.items() if k not in _CLASSIC_MEMBER}
        return config

    def admin(self) -> dict[str, Any]:
        """The admin client's configuration: what connecting needs, and to notice which brokers are gone."""
        return {**_ADMIN, **self._connecting()}

    def producer(self, **own: Any) -> dict[str, Any]:
        """An idempotent producer's configuration."""
        return {
            "linger.ms": 20,
            "compression.type": "lz4",
            "enable.idempotence": True,
            **self._connecting(),
            **{name.replace("_", "."): value for name, value in own.items()},
        }

    def redact(self, text: str) -> str:
        """`text` without any configured value, apart from the few that are safe to show."""
        for name, value in self._extra.items():
            if name not in _SHOWN and len(str(value)) > 2:
                text = text.replace(str(value), "[hidden]")
        return text

    def _connecting(self) -> dict[str, Any]:
        return {k: v for k, v in self._quiet().items() if k not in _CONSUMER_ONLY}

    def _quiet(self) -> dict[str, Any]:
        return {**_CONNECTING, **self._extra}


_CONSUMER_ONLY = {
    "group.id", "group.protocol", "heartbeat.interval.ms", "partition.assignment.strategy",
    "isolation.level", "check.crcs", "session.timeout.ms", "max.poll.interval.ms",
    "fetch.min.bytes", "fetch.wait.max.ms", "fetch.message.max.bytes", "max.partition.fetch.bytes",
    "fetch.max.bytes", "fetch.queue.backoff.ms", "queued.min.messages", "queued.max.messages.kbytes",
}  # fmt: skip


def _check(name: str, value: Any) -> None:
    if name in _REFUSED:
        raise ConfigError(f"kafka_config[{name!r}] is refused: {_REFUSED[name]}.", hint="Leave it out.")
    if name in _OWN and str(value).lower() != str(_OWN[name]).lower():
        raise ConfigError(
            f"kafka_config[{name!r}] is fixed at {_OWN[name]!r}: exactly-once depends on it.",
            hint="Leave it out.",
        )
