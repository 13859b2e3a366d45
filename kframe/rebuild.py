"""Computing one table anew from the retained log, beside the old one, and swapping the two at once."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from tqdm.auto import tqdm

from kframe.batch.decode import Decoder
from kframe.commit.ledger import Ledger
from kframe.commit.store import Store, open_store, quote, registered
from kframe.commit.transaction import interrupts_deferred, transaction
from kframe.engine import Engine
from kframe.errors import DefinitionError, LostRange, interruptible
from kframe.executors.local import LocalExecutor
from kframe.model import Limits, OffsetRange, Outlet, Position, TopicPartition
from kframe.sinks.outbox import resent
from kframe.sinks.table import drop, prepare
from kframe.source.protocol import Source
from kframe.transform.step import Step, defined


def rebuild(
    store: Store,
    ledger: Ledger,
    source: Source,
    step: Step,
    decoders: dict[str, Decoder],
    limits: Limits,
    written: Sequence[str],
    outlets: Sequence[Outlet],
    progress: bool,
) -> int:
    """Run `step` alone over everything up to the ledger's positions, then put its table in place.

    Parameters
    ----------
    written : sequence of str
        Tables that the pipeline's other steps write; their past rows are not known any more.
    outlets : sequence of Outlet
        Through which the pipeline's tables leave.
    progress : bool
        Show a bar over the records.

    Returns
    -------
    int
        Records read.

    Raises
    ------
    DefinitionError
        The step reads a table of `written`.
    LostRange
        The log no longer goes back to the first record. The old table stands.
    """
    _check_inputs(step, written)
    swapped = threading.Event()
    with interruptible(lambda: _outcome(step.name, swapped.is_set())):
        return _rebuilt(store, ledger, source, step, decoders, limits, outlets, progress, swapped)


def _rebuilt(
    store: Store,
    ledger: Ledger,
    source: Source,
    step: Step,
    decoders: dict[str, Decoder],
    limits: Limits,
    outlets: Sequence[Outlet],
    progress: bool,
    swapped: threading.Event,
) -> int:
    stops = {tp: p.offset for tp, p in ledger.positions().items() if tp.topic in decoders}
    starts = {tp: start for tp, start in ledger.first_positions().items() if tp in stops}
    earliest = source.offsets(stops, "earliest")
    lost = [OffsetRange(tp.topic, tp.partition, start, earliest[tp]) for tp, start in starts.items()]
    lost = [r for r in lost if r.start < min(r.stop, stops[r.tp])]
    if lost:
        raise LostRange.of(lost, [])
    with tempfile.TemporaryDirectory(dir=Path(store.path).parent, prefix=".kframe-rebuild-") as folder:
        shadow = open_store(Path(folder) / "shadow.duckdb")
        try:
            _copy_side_tables(store, shadow, step)
            engine = _engine(shadow, ledger.pipeline, source, step, decoders, limits, starts, stops)
            try:
                _run(engine, step.name, progress)
            finally:
                engine.close()
            with interrupts_deferred():
                schemas = {topic: decoder.empty().schema for topic, decoder in decoders.items()}
                _swap(store, ledger, shadow, step, schemas, outlets)
                swapped.set()
            return engine.rows
        finally:
            source.close()
            shadow.close()


def _run(engine: Engine, table: str, progress: bool) -> None:
    total = sum(stop - engine.positions[tp].offset for tp, stop in (engine.stops or {}).items())
    with tqdm(
        total=total,
        desc=f"rebuild {table}",
        unit=" records",
        unit_scale=True,
        disable=None if progress else True,
    ) as bar:
        while not engine.done:
            report = engine.run_batch()
            bar.update(sum(r.stop - r.start for r in report.ranges) if report else 0)


def _outcome(table: str, swapped: bool) -> str:
    if swapped:
        return f"the rebuild had finished: {table!r} is the new one."
    return f"the rebuild was given up: {table!r} is as it was."


def _check_inputs(step: Step, written: Sequence[str]) -> None:
    past = [t for t in step.tables if t in written]
    if past:
        raise DefinitionError(
            f"{step.name!r} reads {past[0]!r}, whose rows of back then are not kept.",
            kept="Nothing was changed.",
            hint="rewind('earliest') computes all tables anew, together.",
        )


def _engine(
    shadow: Store,
    pipeline: str,
    source: Source,
    step: Step,
    decoders: dict[str, Decoder],
    limits: Limits,
    starts: dict[TopicPartition, int],
    stops: dict[TopicPartition, int],
) -> Engine:
    ledger = Ledger(shadow, pipeline)
    positions = {tp: Position(start) for tp, start in starts.items()}
    with transaction(shadow, lambda: False) as cur:
        ledger.claim(cur, "rebuild", None)
        ledger.add_positions(cur, positions)
    source.start(positions, stops, limits)
    infos = source.describe(decoders)
    steps = (step,)
    return Engine(
        store=shadow,
        ledger=ledger,
        source=source,
        executor=LocalExecutor(),
        decoders=decoders,
        steps=lambda: steps,
        topic_ids={topic: info.topic_id for topic, info in infos.items()},
        positions=positions,
        limits=limits,
        stops=stops,
        stopped=lambda: False,
        dead_letters_max_ratio=1.0,
        at_edge=lambda _edge: None,
    )


def _copy_side_tables(store: Store, shadow: Store, step: Step) -> None:
    for table in step.tables:
        rows = store.cursor().sql(f"FROM main.{quote(table)}").to_arrow_table()
        _put(shadow, "main", table, rows)


def _put(store: Store, schema: str, table: str, rows: pa.Table) -> None:
    cur = store.cursor()
    with registered(cur, "_kframe_rows", rows) as data:
        cur.execute(f"CREATE TABLE {quote(schema)}.{quote(table)} AS SELECT * FROM {data}")


def _swap(
    store: Store,
    ledger: Ledger,
    shadow: Store,
    step: Step,
    schemas: dict[str, pa.Schema],
    outlets: Sequence[Outlet],
) -> None:
    """In one transaction: drop the old table and state, write the new ones, and post what has changed."""
    made = shadow.cursor().sql(
        "SELECT table_schema, table_name FROM information_schema.tables "
        "WHERE table_type = 'BASE TABLE' AND table_schema IN ('main', '_state')"
    )
    names = [(s, t) for s, t in made.fetchall() if t not in step.tables]
    with (
        transaction(store, lambda: False) as cur,
        resent(cur, ledger, outlets, step.name),
    ):
        drop(cur, step.name)
        for schema, table in names:
            rows = shadow.cursor().sql(f"FROM {quote(schema)}.{quote(table)}").to_arrow_table()
            with registered(cur, "_kframe_rows", rows) as data:
                cur.execute(f"CREATE TABLE {quote(schema)}.{quote(table)} AS SELECT * FROM {data}")
        prepare(cur, [step], schemas)
        ledger.define(cur, defined([step]))
