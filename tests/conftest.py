"""The real Apache Kafka, once a session."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

import kframe as kf


@pytest.fixture(scope="session")
def kafka() -> Iterator[kf.LocalKafka]:
    """A running broker; the tests are skipped by name, with the reason, where none can be had."""
    try:
        broker = kf.local_kafka(progress=False)
    except kf.errors.LocalKafkaError as error:
        pytest.skip(f"no local Kafka: {error}")
    with broker:
        yield broker


@pytest.fixture(scope="session")
def make_topic(kafka: kf.LocalKafka) -> Callable[..., str]:
    """``make_topic(partitions=1, **config)`` -> the name of a new topic; config with ``_`` for ``.``."""
    numbers = itertools.count()

    def make(partitions: int = 1, **config: object) -> str:
        settings = {name.replace("_", "."): str(value) for name, value in config.items()}
        return kafka.create_topic(f"topic{next(numbers)}", partitions, settings)

    return make
