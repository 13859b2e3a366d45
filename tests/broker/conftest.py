"""One real Apache Kafka for the whole session."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest

import kframe as kf
from kframe.errors import LocalKafkaError


@pytest.fixture(scope="session")
def kafka() -> Iterator[kf.LocalKafka]:
    try:
        broker = kf.local_kafka(progress=False)
    except LocalKafkaError as error:
        pytest.skip(f"no Apache Kafka: {error}")
    with broker:
        yield broker


@pytest.fixture
def make_topic(kafka: kf.LocalKafka, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Topics with names of the test's own: ``make_topic(partitions=1, **config)``."""
    numbers = itertools.count()

    def make(partitions: int = 1, **config: str) -> str:
        name = f"{request.node.name[:80].replace('[', '-').replace(']', '')}-{next(numbers)}"
        return kafka.create_topic(name, partitions, config)

    return make
