"""A pipeline's options, validated once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kframe.commit.store import MEMORY_LIMIT
from kframe.errors import ConfigError
from kframe.model import Limits
from kframe.source.protocol import Start

GUARANTEES = ("exactly_once", "at_least_once")


@dataclass(frozen=True)
class Options:
    """What `Pipeline` takes beside its file and brokers; the meanings are documented there."""

    start_from: Start = "earliest"
    commit_interval_ms: int = 1000
    batch_rows_max: int = 245_760  # two of DuckDB's row groups: whole ones are written and compressed once
    batch_bytes_max: int = 64 << 20
    processing_guarantee: str = "exactly_once"
    dead_letters_max_ratio: float = 0.1
    on_lost_range: str = "stop"
    on_definition_change: str = "warn"
    snapshot_to: str | None = None
    standby: bool = False
    memory_limit: str = MEMORY_LIMIT

    def __post_init__(self) -> None:
        for name in ("commit_interval_ms", "batch_rows_max", "batch_bytes_max"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a whole number of at least 1.")
        if not 0 <= self.dead_letters_max_ratio <= 1:
            raise ConfigError(f"dead_letters_max_ratio={self.dead_letters_max_ratio!r} is not in [0, 1].")
        _one_of("processing_guarantee", self.processing_guarantee, GUARANTEES)
        if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]i?B", str(self.memory_limit)):
            raise ConfigError(f"memory_limit={self.memory_limit!r} is no size.", hint='Such as "2GB".')
        if self.standby and self.processing_guarantee != "exactly_once":
            raise ConfigError("standby=True publishes tables and positions together: it needs exactly_once.")
        _one_of("on_lost_range", self.on_lost_range, ("stop", "skip"))
        _one_of("on_definition_change", self.on_definition_change, ("warn", "stop"))

    @property
    def limits(self) -> Limits:
        """The engine's view of the sizes."""
        return Limits(self.batch_rows_max, self.batch_bytes_max, self.commit_interval_ms / 1000)


def options_of(given: Mapping[str, Any], kafka_config: Mapping[str, Any] | None) -> Options:
    """`Options` from keyword arguments, and from Kafka Streams' names among Kafka's own settings."""
    named = dict(given)
    config = kafka_config or {}
    if "processing.guarantee" in config:
        named["processing_guarantee"] = str(config["processing.guarantee"]).removesuffix("_v2")
    if "commit.interval.ms" in config:
        try:
            named["commit_interval_ms"] = int(config["commit.interval.ms"])
        except ValueError:
            raise ConfigError("kafka_config['commit.interval.ms'] is not a whole number.") from None
    return Options(**named)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
