"""Two hundred SIGKILLs of a real process on the real broker: nothing lost, nothing doubled.

Half of them at the engine's edges, half at random moments (while DuckDB opens, Kafka connects, between two
instructions of a COMMIT). The topic holds transactional records, aborted ones too.

Kills: positions committed apart from the rows; an aborted record landed; positions remembered instead of
read from the file; ``position = last offset + 1`` waiting for an offset that never comes.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

KILLS = 200
RECORDS = 30_000
PARTITIONS = 4
ROWS = 40  # of one batch, so that a session that lives for a few batches leaves most of the log to the next

# ---- the process that is killed ---------------------------------------------------------------------


def pipeline(path: str, brokers: str, topic: str, at_edge: Any) -> Any:
    import kframe as kf

    shop = kf.Pipeline(path, brokers=brokers, batch_rows_max=ROWS, commit_interval_ms=200, at_edge=at_edge)
    shop.topic(topic, schema={"sku": "str", "qty": "int64"}, include=["partition", "offset"])
    shop.land(topic, table="landed")
    shop.aggregate("sold", source=topic, by="sku", n=("qty", "count"), total=("qty", "sum"))
    shop.table("latest", key="sku", inputs=[topic])(lambda rows: rows[["sku", "qty", "_offset"]])
    return shop


def serve() -> None:
    """Fork a session for each line of stdin; tell its PID and how it ended.

    Everything is imported before the first fork, so a session starts in a few milliseconds; no thread of
    DuckDB or Kafka's client exists yet.
    """
    import kframe.testing  # noqa: F401

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
    from kframe.testing import Fault, Faults

    code = 1
    try:
        faults = Faults(*([Fault(edge, "kill", at)] if edge else []))
        shop = pipeline(**where, at_edge=faults)
        shop.run(progress=False)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


# ---- the one who kills ------------------------------------------------------------------------------


class Server:
    """The fork server, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin: IO[str] = process.stdin
        self.stdout: IO[str] = process.stdout

    def session(self, *, edge: str | None, at: int = 1, within_s: float | None = None, **where: str) -> int:
        """One session's exit code; without an end of its own `within_s`, it is killed then."""
        self.stdin.write(json.dumps({"edge": edge, "at": at, **where}) + "\n")
        self.stdin.flush()
        pid = int(self._line(60))
        if within_s is not None and not select.select([self.stdout], [], [], within_s)[0]:
            os.kill(pid, signal.SIGKILL)
        return int(self._line(60))

    def _line(self, timeout_s: float) -> str:
        assert select.select([self.stdout], [], [], timeout_s)[0], "the session hangs"
        line = self.stdout.readline()
        assert line, "the fork server is gone"
        return line


@contextmanager
def fork_server(file: str = __file__) -> Iterator[Server]:
    """The fork server of a test file."""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, file],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=environment,
    )
    try:
        yield Server(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def produce(brokers: str, topic: str, count: int, random_: random.Random) -> list[tuple[int, int, str, int]]:
    """Write about `count` records in transactions, a third of them aborted; (partition, offset, sku, qty)."""
    import confluent_kafka as ck

    producer = ck.Producer(
        {"bootstrap.servers": brokers, "transactional.id": f"writer-{topic}", "linger.ms": 2}
    )
    producer.init_transactions(30)
    committed: list[tuple[int, int, str, int]] = []
    written = 0
    while written < count:
        sent: list[tuple[int, int, str, int]] = []
        producer.begin_transaction()
        for _ in range(random_.randint(20, 400)):
            key, qty = random_.randrange(40), written

            def delivered(
                error: Any, message: Any, sku: str = f"s{key}", qty: int = qty, sent: Any = sent
            ) -> None:
                assert error is None, error
                sent.append((message.partition(), message.offset(), sku, qty))

            value = json.dumps({"sku": f"s{key}", "qty": qty})
            producer.produce(topic, value, partition=key % PARTITIONS, on_delivery=delivered)
            written += 1
        producer.flush(30)
        if random_.random() < 1 / 3:
            producer.abort_transaction(30)
        else:
            producer.commit_transaction(30)
            committed += sent
    return committed


def test_two_hundred_kills_lose_and_double_nothing(
    kafka: Any, make_topic: Callable[..., str], tmp_path: Path
) -> None:
    from kframe.testing import EDGES, Faults

    random_ = random.Random(7)
    topic = make_topic(PARTITIONS)
    where = {"path": str(tmp_path / "shop.duckdb"), "brokers": kafka.brokers, "topic": topic}
    expected = produce(kafka.brokers, topic, RECORDS, random_)
    hits: Counter[str] = Counter()
    began = time.monotonic()
    with fork_server() as server:
        assert (
            server.session(edge="committed", **where) == -signal.SIGKILL
        )  # the file is there, and one batch
        hits["committed"] += 1
        while hits.total() < KILLS:
            at_edge = hits.total() % 2 == 0
            edge = EDGES[hits.total() // 2 % len(EDGES)] if at_edge else None
            within_s = None if at_edge else random_.uniform(0.0, 0.35)
            code = server.session(edge=edge, at=random_.randint(1, 4), within_s=within_s, **where)
            assert code in (0, -signal.SIGKILL), f"a session failed with exit code {code}"
            if code == 0:  # the log is drained: more of it
                expected += produce(kafka.brokers, topic, RECORDS // 10, random_)
            else:
                hits[edge or "a random moment"] += 1
        assert server.session(edge=None, **where) == 0
    print(f"\n{hits.total()} SIGKILLs in {time.monotonic() - began:.0f} s:")
    for edge in (*EDGES, "a random moment"):
        print(f"  {edge:>18} {hits[edge]:4}")
    assert all(hits[edge] for edge in (*EDGES, "a random moment"))
    with pipeline(**where, at_edge=Faults()) as shop:
        assert shop.run(progress=False).rows == 0
        check(shop, expected)


def check(shop: Any, expected: list[tuple[int, int, str, int]]) -> None:
    landed = shop.sql("SELECT _partition, _offset, sku, qty FROM landed").arrow()
    rows = sorted(zip(*(column.to_pylist() for column in landed.columns), strict=True))
    lost, surplus = set(expected) - set(rows), set(rows) - set(expected)
    doubled = len(rows) - len(set(rows))
    print(f"  {len(rows):,} landed of {len(expected):,}: {len(lost)} lost, {doubled} doubled")
    assert (len(lost), len(surplus), doubled) == (0, 0, 0)
    totals: dict[str, tuple[int, int]] = {}
    latest: dict[str, tuple[int, int]] = {}
    for _, offset, sku, qty in sorted(expected):
        n, total = totals.get(sku, (0, 0))
        totals[sku] = (n + 1, total + qty)
        latest[sku] = (qty, offset)
    assert {s: (n, int(t)) for s, n, t in shop.sql("SELECT sku, n, total FROM sold").fetchall()} == totals
    assert {s: (q, o) for s, q, o in shop.sql("SELECT sku, qty, _offset FROM latest").fetchall()} == latest
    log = shop.batches(10**9)
    assert sorted(log["batch_id"]) == list(range(len(log)))
    assert log["rows"].sum() == len(rows)


if __name__ == "__main__":
    serve()
