"""Kafka Streams: the Java program in ``streams/``, built with Maven."""

from __future__ import annotations

import re
import struct

from benchmarks.data import Sums
from benchmarks.peers import HERE, WORK, Run, tool
from benchmarks.verify import latest_of_topic, sums_of_topic

PROJECT = HERE / "streams"
TOTALS = struct.Struct(">qqd")


class KafkaStreams:
    """Two threads for the two cores; a heap of 1 GB."""

    name = "Kafka Streams"
    jobs: tuple[str, ...] = ("land", "aggregate")
    guarantee = "exactly once, in Kafka"
    settings = "exactly_once_v2, commit.interval.ms=1000, 2 threads, -Xmx1g, max.poll.records=5000"

    def set_up(self) -> str:
        tool(["java", "-version"])
        tool(["mvn", "-q", "-B", f"-Dwork={WORK}", "package"], cwd=PROJECT)
        found = re.search(r"<kafka.version>(.*)</", (PROJECT / "pom.xml").read_text())
        assert found is not None
        return found[1]

    def command(self, run: Run) -> list[str]:
        classes = f"{WORK}/streams/classes:{WORK}/streams/jars/*"
        job = [run.job, run.brokers, run.topic, str(run.folder), _application(run)]
        return ["java", "-Xmx1g", "-cp", classes, "kframe.Orders", *job]

    def group(self, run: Run) -> str:
        """The consumer group of its instances."""
        return _application(run)

    def changelog(self, run: Run) -> str:
        """The topic from which its state is restored."""
        return f"{_application(run)}-totals-changelog"

    def sums(self, run: Run, said: str) -> Sums:
        """Of the output topic, or of the state store's changelog."""
        if run.job == "land":
            return sums_of_topic(run.brokers, f"{_application(run)}-output")
        totals = latest_of_topic(run.brokers, self.changelog(run)).values()
        n, qty, revenue = (sum(column) for column in zip(*map(TOTALS.unpack, totals), strict=True))
        return Sums(n, None, qty, revenue)


def _application(run: Run) -> str:
    """Instances that restart elsewhere are of one application, each in a folder of its own."""
    return f"streams-{run.job}-{run.topic if run.job == 'restart' else run.folder.name}"
