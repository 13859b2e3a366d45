"""Quix Streams, from PyPI, in an environment of its own: it needs an older confluent-kafka."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from benchmarks import marks
from benchmarks.peers import WORK, Run, own_python, program, run_of

if TYPE_CHECKING:
    from benchmarks.data import Sums

VERSION = "3.28.1"


class Quix:
    """Its own consumer with the setting that matters most."""

    name = "Quix Streams"
    jobs: tuple[str, ...] = ("land", "aggregate")
    guarantee = "exactly once, in Kafka"
    settings = "exactly-once, commit_interval=1.0, fetch.queue.backoff.ms=5, lz4"

    def set_up(self) -> str:
        own_python("quix", f"quixstreams=={VERSION}")
        return VERSION

    def command(self, run: Run) -> list[str]:
        return program("benchmarks.peers.quix", run, python=str(WORK / "quix" / "bin" / "python"))

    def sums(self, run: Run, said: str) -> Sums:
        """Of the output topic, or of the state's changelog."""
        from benchmarks.data import Sums
        from benchmarks.verify import latest_of_topic, sums_of_topic

        if run.job == "land":
            return sums_of_topic(run.brokers, f"{_group(run)}-output")
        changelog = f"changelog__{_group(run)}--{run.topic}--default"
        found = [json.loads(value) for value in latest_of_topic(run.brokers, changelog).values()]
        n, qty, revenue = (sum(column) for column in zip(*found, strict=True))
        return Sums(n, None, qty, revenue)


def main(run: Run) -> None:
    """Every order to an output topic, or totals per sku in the state."""
    from quixstreams import Application

    app = Application(
        broker_address=run.brokers,
        consumer_group=_group(run),
        processing_guarantee="exactly-once",
        commit_interval=1.0,
        auto_offset_reset="earliest",
        state_dir=str(run.folder / "state"),
        consumer_extra_config={"fetch.queue.backoff.ms": 5},
        producer_extra_config={"compression.type": "lz4"},
        loglevel="ERROR",
    )
    orders = app.dataframe(app.topic(run.topic, value_deserializer="json"))
    if run.job == "land":
        orders.to_topic(app.topic(f"{_group(run)}-output", value_serializer="json"))
    else:
        orders.update(_add, stateful=True)
    marks.consuming()
    app.run(count=run.records)
    marks.done()


def _add(order: dict[str, Any], state: Any) -> None:
    n, qty, revenue = state.get(order["sku"], (0, 0, 0.0))
    state.set(order["sku"], (n + 1, qty + order["qty"], revenue + order["qty"] * order["price"]))


def _group(run: Run) -> str:
    return f"quix-{run.job}-{run.folder.name}"


if __name__ == "__main__":
    main(run_of(sys.argv))
