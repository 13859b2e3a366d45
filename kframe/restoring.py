"""`restore`: a pipeline's tables and positions from its changelog, in a file that it can go on from."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kframe.commit.ledger import Ledger
from kframe.commit.store import open_store, quote
from kframe.errors import ConfigError
from kframe.model import TopicPartition
from kframe.progress import progress_bar
from kframe.source.settings import Settings
from kframe.standby.standing import existing_changelog, follower

_TABLES = """
SELECT table_name FROM information_schema.tables JOIN _kframe.tables ON name = table_name
WHERE table_catalog = current_database() AND table_schema = 'main' AND pipeline = ? AND fingerprint <> 'side'
ORDER BY ALL"""


@dataclass(frozen=True)
class Restored:
    """What a file holds after `restore`: each table's rows, and the batch and positions they are as of."""

    pipeline: str
    path: str
    batch_id: int
    committed_at: datetime | None
    tables: Mapping[str, int]
    positions: Mapping[TopicPartition, int]
    seconds: float

    def __str__(self) -> str:
        at = f", committed at {self.committed_at:%Y-%m-%d %H:%M:%S} UTC" if self.committed_at else ""
        batch = f"batch {self.batch_id}{at}" if self.batch_id >= 0 else "before its first batch"
        rows = [f"  {name}: {rows:,} rows" for name, rows in self.tables.items()]
        positions = [f"  {tp}: {offset}" for tp, offset in self.positions.items()]
        return "\n".join(
            [
                f"{self.path} holds pipeline {self.pipeline!r} as of {batch} (in {self.seconds:.1f} s).",
                "Tables:",
                *(rows or ["  none yet"]),
                "Positions, each the next offset to read:",
                *(positions or ["  none yet"]),
                f"To go on: Pipeline({self.path!r}, name={self.pipeline!r}, standby=True, ...) with the same "
                "steps, then run() or start().",
            ]
        )


def restore(
    pipeline: str,
    path: str | os.PathLike[str],
    *,
    brokers: str,
    kafka_config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Restored:
    """Rebuild a pipeline's tables and positions from its changelog, as of its newest published batch.

    The file is what an instance with ``standby=True`` would restore for itself before it runs. Neither the
    steps nor the source's topics are needed, and no instance is disturbed.

    Parameters
    ----------
    pipeline : str
        Its name.
    path : path
        A DuckDB file, made when missing. One that holds an older batch of the pipeline is brought up to date;
        after a restore that was cut short, the next one goes on from there.
    brokers : str
    kafka_config : mapping, optional
        As of `Pipeline`.
    progress : bool
        A bar over the changelog's records.

    Returns
    -------
    Restored

    Raises
    ------
    ConfigError
        There is no changelog of that name or nothing in it, or the file holds batches that it lacks. Nothing
        was changed.
    BrokerUnavailable, StoreLocked
    """
    settings = Settings(brokers, kafka_config)
    topic, retention = existing_changelog(settings, pipeline)
    began = time.monotonic()
    store = open_store(path)
    user = object()
    store.use(user)
    try:
        ledger = Ledger(store, pipeline)
        with progress_bar(f"{pipeline} restoring", " records", shown=progress) as advance:
            last = follower(settings, ledger, topic, retention).catch_up(advance, keep_own=True)
        if last is None or last.file == store.id:
            raise _nothing_to_restore(ledger, topic)
        store.checkpoint()
        return _told(ledger, time.monotonic() - began)
    finally:
        store.release(user)


def _told(ledger: Ledger, seconds: float) -> Restored:
    cur = ledger.store.cursor()
    names = [name for (name,) in cur.execute(_TABLES, [ledger.pipeline]).fetchall()]
    counts = [cur.execute(f"SELECT count(*) FROM main.{quote(name)}").fetchall()[0][0] for name in names]
    return Restored(
        pipeline=ledger.pipeline,
        path=ledger.store.path,
        batch_id=ledger.next_batch_id() - 1,
        committed_at=ledger.last_committed_at(),
        tables=dict(zip(names, counts, strict=True)),
        positions={tp: position.offset for tp, position in ledger.positions().items()},
        seconds=seconds,
    )


def _nothing_to_restore(ledger: Ledger, topic: str) -> ConfigError:
    if ledger.next_batch_id() == 0:
        return ConfigError(
            f"Topic {topic!r} holds no batch yet.",
            kept="Nothing was changed.",
            hint=f"Run pipeline {ledger.pipeline!r} with standby=True first.",
        )
    return ConfigError(
        f"{ledger.store.path} is the file that the changelog's newest batch comes from: it lacks nothing.",
        kept="Nothing was changed.",
        hint="Run the pipeline with it, or restore into another file.",
    )
