"""Run the benchmarks, store what they measured, and draw docs/performance.md from it.

Only a run of all peers is stored: figures of different runs do not belong into one table.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import kframe as kf
from benchmarks import backpressure, growth, latency, page, restart, results, throughput
from benchmarks.peers import WORK

Rows = list[dict[str, object]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="run-benchmarks", description=__doc__)
    parser.add_argument("--records", type=int, default=10_000_000, help="of the throughput benchmark")
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    names = [peer.name for peer in throughput.PEERS]
    parser.add_argument("--peers", nargs="+", choices=names, default=names, help="fewer: nothing is stored")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    for name in args.only:
        with kf.local_kafka() as kafka:  # each its own: thousands of partitions slow a broker down
            BENCHMARKS[name](kafka, args)
    page.draw()


def _throughput(kafka: kf.LocalKafka, args: argparse.Namespace) -> None:
    peers = [peer for peer in throughput.PEERS if peer.name in args.peers]
    rows = _shown(throughput.run(kafka, args.records, peers))
    print(page.throughput_table(rows))
    if len(peers) == len(throughput.PEERS):
        results.save("throughput", rows, records=args.records)


def _latency(kafka: kf.LocalKafka, _args: argparse.Namespace) -> None:
    rows = _shown(latency.run(kafka))
    results.save("latency", rows, rate=latency.RATE, seconds=latency.SECONDS, warm_up_s=latency.WARM_UP_S)


def _growth(kafka: kf.LocalKafka, _args: argparse.Namespace) -> None:
    results.save("growth", _shown(growth.run(kafka)), batch_rows_max=growth.BATCH_ROWS)


def _backpressure(kafka: kf.LocalKafka, args: argparse.Namespace) -> None:
    records = min(args.records, 2_000_000)  # ten times slower: minutes, not more
    topic = throughput.orders_topic(kafka, records)
    rows = _shown(backpressure.run(kafka, topic, records))
    results.save("backpressure", rows, records=records, sample_s=backpressure.SAMPLE_S)


def _restart(kafka: kf.LocalKafka, args: argparse.Namespace) -> None:
    records = min(args.records, restart.KEYS_MAX)
    rows = _shown(restart.run(kafka, records))
    settings = {"rate": restart.RATE, "session_timeout_s": restart.SESSION_S, "rounds": restart.ROUNDS}
    results.save("restart", rows, records=records, **settings)


def _shown(rows: Iterable[dict[str, object]]) -> Rows:
    """The rows, each printed as soon as it is there."""
    found = []
    for row in rows:
        print(", ".join(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)
        found.append(row)
    return found


BENCHMARKS = {
    "throughput": _throughput,
    "latency": _latency,
    "growth": _growth,
    "backpressure": _backpressure,
    "restart": _restart,
}


if __name__ == "__main__":
    main()
