"""A hundred and forty SIGKILLs of a real process that delivers: nothing lost, nothing doubled, keys in order.

A third while records are sent and not committed, a third when they are committed and the file does not know
it, a third at random moments. Kafka's own console consumer is a judge beside ours.

Kills: resending from the position in the file; reading the delivered position before init_transactions; rows
posted outside of the batch's transaction; trimming before the commit.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kframe.broker import _java
from kframe.kafka_jars import kafka_jars
from kframe.testing import DELIVERY_EDGES, Fault, Faults
from tests.broker.test_kills import fork_server
from tests.broker.test_outputs import consume

pytestmark = pytest.mark.broker

LANES = 3  # pipelines beside each other, for each mostly waits
KILLS = 47  # in each
KEYS = 30
RECORDS = 3000  # a round

# ---- the process that is killed ---------------------------------------------------------------------


def pipeline(path: str, brokers: str, topic: str, at_edge: Any) -> Any:
    import kframe as kf

    shop = kf.Pipeline(path, brokers=brokers, batch_rows_max=10, commit_interval_ms=200, at_edge=at_edge)
    shop.topic(topic, schema={"sku": "str", "qty": "int64"})
    shop.aggregate("sold", source=topic, by="sku", n=("qty", "count"), total=("qty", "sum"))
    shop.publish("sold", topic=f"{topic}-sold")
    shop.output(f"{topic}-out", key="sku", inputs=[topic])(lambda orders: orders)
    return shop


def serve() -> None:
    """Fork a session for each line of stdin; tell its PID and how it ended."""
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            session(**order)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def session(edge: str | None, at: int, **where: str) -> None:
    """Run to the end of the topic; at an edge's n-th pass SIGKILL strikes."""
    code = 1
    try:
        faults = Faults(*([Fault(edge, "kill", at)] if edge else []))
        pipeline(**where, at_edge=faults).run(progress=False)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


# ---- the one who kills ------------------------------------------------------------------------------


def produce(brokers: str, topic: str, first: int) -> list[tuple[str, int]]:
    """Write a round of records; a key's are in one partition, so that they have an order."""
    import confluent_kafka as ck

    producer = ck.Producer({"bootstrap.servers": brokers, "linger.ms": 5})
    sent = []
    for i in range(first, first + RECORDS):
        key = i * 7 % KEYS
        producer.produce(topic, json.dumps({"sku": f"s{key}", "qty": i}), partition=key % 2)
        sent.append((f"s{key}", i))
    assert producer.flush(30) == 0
    return sent


def console_consumer(brokers: str, topic: str) -> list[tuple[str, Any]]:
    """What Kafka's own consumer shows: (key, value), in its order."""
    command = [_java(), "-Xmx256m", "-cp", str(kafka_jars(progress=False) / "*")]
    command += ["org.apache.kafka.tools.consumer.ConsoleConsumer", "--bootstrap-server", brokers]
    command += ["--topic", topic, "--from-beginning", "--isolation-level", "read_committed"]
    command += ["--timeout-ms", "4000", "--formatter-property", "print.key=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "Processed a total of" in done.stderr, done.stderr
    lines = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t{" in line]  # not its log
    return [(key, json.loads(value)) for key, value in lines]


def test_kills_of_the_delivering_process_lose_and_double_nothing(
    kafka: Any, make_topic: Callable[..., str], tmp_path: Path
) -> None:
    began = time.monotonic()
    topics = [make_topic(2) for _ in range(LANES)]
    with ThreadPoolExecutor(LANES) as pool:
        lanes = list(pool.map(partial(strike, kafka, tmp_path), topics))
    hits = sum((struck for _, struck in lanes), Counter[str]())
    print(f"\n{hits.total()} SIGKILLs in {time.monotonic() - began:.0f} s:")
    for edge in (*DELIVERY_EDGES, "a random moment"):
        print(f"  {edge:>16} {hits[edge]:4}")
    assert all(hits[edge] >= LANES * (KILLS // 3) for edge in (*DELIVERY_EDGES, "a random moment"))
    for topic, (expected, _) in zip(topics, lanes, strict=True):
        judge(kafka, topic, expected)


def strike(kafka: Any, tmp_path: Path, topic: str) -> tuple[list[tuple[str, int]], Counter[str]]:
    """Kill a pipeline's sessions again and again; what it has been given, and how often each edge was hit."""
    random_ = random.Random(topic)
    kafka.create_topic(f"{topic}-out", 3)
    where = {"path": str(tmp_path / f"{topic}.duckdb"), "brokers": kafka.brokers, "topic": topic}
    expected = produce(kafka.brokers, topic, 0)
    hits: Counter[str] = Counter()
    with fork_server(__file__) as server:
        while hits.total() < KILLS:
            edge = (*DELIVERY_EDGES, None)[hits.total() % 3]
            within_s = random_.uniform(0.0, 0.6) if edge is None else None
            code = server.session(edge=edge, at=random_.randint(1, 2), within_s=within_s, **where)
            assert code in (0, -signal.SIGKILL), f"a session failed with exit code {code}"
            if code == 0:
                expected += produce(kafka.brokers, topic, len(expected))
            else:
                hits[edge or "a random moment"] += 1
        assert server.session(edge=None, at=1, **where) == 0
    return expected, hits


def judge(kafka: Any, topic: str, expected: list[tuple[str, int]]) -> None:
    import kframe as kf

    out = f"{topic}-out"
    theirs = [(key, value["qty"]) for key, value in console_consumer(kafka.brokers, out)]
    frame = kf.read(
        out, brokers=kafka.brokers, schema={"sku": "str", "qty": "int64"}, include=["key"], progress=False
    )
    ours = [(key.decode(), qty) for key, qty in zip(frame["_key"], frame["qty"], strict=True)]
    everything = consume(kafka, out, isolation_level="read_uncommitted")
    for name, got in (("console consumer", theirs), ("kframe", ours)):
        lost, doubled = set(expected) - set(got), len(got) - len(set(got))
        disordered = sum(1 for key in range(KEYS) if not _ascending([q for k, q in got if k == f"s{key}"]))
        print(f"  {name}: {len(got):,} of {len(expected):,}; {len(lost)} lost, {doubled} doubled, "
              f"{disordered} keys out of order")  # fmt: skip
        assert (len(lost), doubled, disordered, len(got)) == (0, 0, 0, len(expected))
    print(f"  {len(everything) - len(ours):,} aborted records")
    assert len(everything) > len(ours)
    sold = dict(consume(kafka, f"{topic}-sold"))  # the last record of each key is the table
    assert {key.decode(): (v["n"], v["total"]) for key, v in sold.items() if key} == {
        f"s{k}": (len(range(0, len(expected), KEYS)), sum(q for s, q in expected if s == f"s{k}"))
        for k in range(KEYS)
    }


def _ascending(numbers: list[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(numbers))


if __name__ == "__main__":
    serve()
