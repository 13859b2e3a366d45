"""The C limit: librdkafka's own consumer, in C, from the library that the confluent-kafka package brings."""

from __future__ import annotations

from pathlib import Path

import confluent_kafka as ck

from benchmarks.data import PARTITIONS, Sums, expected
from benchmarks.peers import HERE, WORK, NotInstalled, Run, tool


class Limit:
    """Reads every record and does nothing with it, or copies its value."""

    name = "librdkafka in C"
    jobs: tuple[str, ...] = ("read", "copy")
    guarantee = "-"
    settings = "fetch.queue.backoff.ms=5, queued.min.messages=300000"

    def __init__(self) -> None:
        self._program = WORK / "limit"

    def set_up(self) -> str:
        package = Path(ck.__file__).parent
        found = sorted((package.parent / "confluent_kafka.libs").glob("librdkafka*.so*"))
        if not found:
            raise NotInstalled("this confluent-kafka package brings no librdkafka of its own")
        WORK.mkdir(exist_ok=True)
        source, library = HERE / "limit.c", found[0]
        tool(
            ["cc", "-O2", "-o", str(self._program), str(source), str(library), f"-Wl,-rpath,{library.parent}"]
        )
        return str(ck.libversion()[0])

    def command(self, run: Run) -> list[str]:
        return [
            str(self._program), run.brokers, run.topic, str(PARTITIONS), str(run.records), run.job
        ]  # fmt: skip

    def sums(self, run: Run, said: str) -> Sums:
        """It adds nothing up; the number of records is all there is to check."""
        return expected(run.records)._replace(records=int(said.split()[0]))
