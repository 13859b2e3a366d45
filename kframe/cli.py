"""The command ``kframe``."""

from __future__ import annotations

import argparse
import configparser
import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kframe.broker import local_kafka
from kframe.carrying import carry
from kframe.commit.repair import repair
from kframe.commit.store import Store, open_store
from kframe.errors import ConfigError, KframeError
from kframe.pipeline import Pipeline
from kframe.restoring import restore
from kframe.standalone import peek

_POSITIONS = """
SELECT pipeline, topic, partition, position FROM _kframe.positions
WHERE $1 IS NULL OR pipeline = $1 ORDER BY pipeline, topic, partition"""

_STATUS = """
SELECT p.name AS pipeline, p.epoch, p.owner AS last_owner, p.next_batch_id AS batches,
    (SELECT coalesce(sum(rows), 0) FROM _kframe.batches b WHERE b.pipeline = p.name) AS rows,
    (SELECT count(*) FROM _kframe.dead_letters d WHERE d.pipeline = p.name) AS dead_letters,
    (SELECT count(*) FROM _kframe.gaps g WHERE g.pipeline = p.name) AS gaps,
    (SELECT max(committed_at) FROM _kframe.batches b WHERE b.pipeline = p.name) AS last_commit
FROM _kframe.pipelines p ORDER BY p.name"""

_DEAD_LETTERS = """
SELECT pipeline, topic, partition, "offset", "timestamp", error FROM _kframe.dead_letters
ORDER BY pipeline, topic, partition, "offset" """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 when kframe says no, or 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    try:
        return int(args.command(args) or 0)
    except KframeError as error:
        print(f"kframe: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("kframe: interrupted; what was committed stands.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kframe", description="Kafka to DuckDB tables, exactly once.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="real flights through a real Kafka, killed half-way and resumed")
    demo.add_argument("--folder", help="keep the tables and the log there")
    demo.set_defaults(command=_demo)

    broker = commands.add_parser("broker", help="a real Apache Kafka on loopback, until Ctrl-C")
    broker.add_argument("--folder", help="keep its data there")
    broker.add_argument("--port", type=int)
    broker.set_defaults(command=_broker)

    run = commands.add_parser("run", help="run a pipeline defined in a module")
    run.add_argument("target", metavar="MODULE:PIPELINE")
    run.add_argument("--until", choices=("end", "forever"), default="forever")
    run.set_defaults(command=_run)

    look = commands.add_parser("peek", help="a topic's first records and the schema they suggest")
    look.add_argument("topic")
    _add_brokers(look)
    look.add_argument("-n", type=int, default=5, help="records to show")
    look.set_defaults(command=lambda args: print(peek(args.topic, n=args.n, **_cluster(args))))

    for name, query, told in (
        ("status", _STATUS, "the pipelines in a file"),
        ("offsets", _POSITIONS, "their positions"),
        ("dead-letters", _DEAD_LETTERS, "records that could not be decoded"),
    ):
        shown = commands.add_parser(name, help=told)
        shown.add_argument("file")
        shown.set_defaults(command=_show, query=query, pipeline=None)
        if name == "offsets":
            shown.add_argument("--pipeline")

    anew = commands.add_parser("restore", help="a pipeline's tables and positions from its changelog")
    anew.add_argument("pipeline", help="its name")
    anew.add_argument("file", help="made when missing")
    _add_brokers(anew)
    anew.set_defaults(command=lambda args: print(restore(args.pipeline, args.file, **_cluster(args))))

    carrier = commands.add_parser("deliver", help="carry a published topic to PostgreSQL or a Parquet folder")
    carrier.add_argument("topic")
    carrier.add_argument("file", help="keeps the table and the positions; made when missing")
    _add_brokers(carrier)
    carrier.add_argument("--to", required=True, help="postgresql://user@host/database, or a folder")
    carrier.add_argument("--key", action="append", default=[], help="a key column; once for each")
    carrier.add_argument(
        "--column", action="append", metavar="NAME=TYPE", help="once for each; else inferred"
    )
    carrier.add_argument("--table", help="its name there; the topic's by default")
    carrier.add_argument("--mode", choices=("transaction", "idempotent"), default="transaction")
    carrier.add_argument("--until", choices=("end", "forever"), default="forever")
    carrier.set_defaults(command=_deliver)

    small = commands.add_parser("compact", help="give back the space that updates have left in a file")
    small.add_argument("file")
    small.set_defaults(command=_compact)

    mend = commands.add_parser("repair", help="drop the damaged end of a file's write-ahead log")
    mend.add_argument("file")
    mend.set_defaults(command=lambda args: print(repair(args.file)))
    return parser


def _add_brokers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--brokers", required=True, metavar="HOST:PORT,...")
    parser.add_argument("--config", metavar="FILE", help="the Kafka client's settings, as name=value lines")


def _cluster(args: argparse.Namespace) -> dict[str, Any]:
    """``brokers`` and ``kafka_config`` as the functions want them."""
    if args.config is None:
        return {"brokers": args.brokers}
    parser = configparser.ConfigParser(interpolation=None, delimiters=("=",))
    try:
        parser.read_string("[client]\n" + Path(args.config).read_text())
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--config {args.config}: {error}.") from None
    except configparser.Error as error:  # its own words quote the line, which may hold a password
        raise ConfigError(
            f"--config {args.config}: {type(error).__name__}.",
            hint="Write name=value lines; # begins a comment.",
        ) from None
    return {"brokers": args.brokers, "kafka_config": dict(parser["client"])}


def _deliver(args: argparse.Namespace) -> None:
    schema = dict(column.partition("=")[::2] for column in args.column) if args.column else None
    options = {"key": args.key, "table": args.table, "schema": schema, "mode": args.mode}
    with carry(args.topic, args.file, to=args.to, **options, **_cluster(args)) as carrier:
        print(carrier.run(until="end" if args.until == "end" else None))


def _demo(args: argparse.Namespace) -> int:
    from kframe.demo import demo  # its data is an extra

    return demo(args.folder)


def _broker(args: argparse.Namespace) -> None:
    with local_kafka(args.folder, port=args.port) as kafka:
        print(f"Apache Kafka at {kafka.brokers}   (data in {kafka.folder}; Ctrl-C ends it)", flush=True)
        print(f'    kf.Pipeline("shop.duckdb", brokers="{kafka.brokers}")', flush=True)
        threading.Event().wait()


def _run(args: argparse.Namespace) -> None:
    module, _, name = args.target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        pipeline = getattr(importlib.import_module(module), name or "pipeline")
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{args.target}: {error}.", hint="Write it as module:variable.") from None
    if not isinstance(pipeline, Pipeline):
        raise ConfigError(f"{args.target} is a {type(pipeline).__name__}, not a Pipeline.")
    with pipeline:
        print(pipeline.run(until="end" if args.until == "end" else None))


def _show(args: argparse.Namespace) -> None:
    with _opened(args.file) as store:
        parameters = [args.pipeline] if "$1" in args.query else None
        rows = store.cursor().sql(args.query, params=parameters).to_arrow_table().to_pandas()
    print(rows.to_string(index=False) if len(rows) else "none")


def _compact(args: argparse.Namespace) -> None:
    with _opened(args.file) as store:
        before, after = store.compact()
    print(f"{args.file}: {before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB after")


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Store]:
    if not os.path.exists(file):
        raise ConfigError(f"There is no file {file}.")
    store = open_store(file)
    try:
        yield store
    finally:
        store.close()
