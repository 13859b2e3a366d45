"""Reading and writing topics without a pipeline: `peek`, `read`, `write`. No position is kept."""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import confluent_kafka as ck
import pandas as pd
import pyarrow as pa
from tqdm.auto import tqdm

from kframe.batch.decode import Decoder
from kframe.batch.infer import infer_schema
from kframe.commit.transaction import interrupts_deferred
from kframe.errors import ConfigError, KframeError, interruptible
from kframe.model import Position, TopicPartition
from kframe.schema import Schema
from kframe.source.bounded import batches_between, read_bounded
from kframe.source.kafka import KafkaSource
from kframe.source.protocol import Start
from kframe.source.settings import Settings
from kframe.taking_over import first_values
from kframe.transform.frames import to_pandas

_INCLUDE = ("partition", "offset", "timestamp", "key")
_PRODUCE_ROWS = 50_000
_TIMEOUT_S = 60.0
_CLOSE_S = 10.0
_WAIT_S = 0.5


@dataclass(frozen=True)
class Peek:
    """The first records of a topic, and the schema that they suggest."""

    topic: str
    frame: pd.DataFrame
    schema: Schema
    format: str = "json"

    def __repr__(self) -> str:
        return f"{self.frame}\n\n{self._code()}"

    def _repr_html_(self) -> str:
        from html import escape

        return f"{self.frame.to_html(index=False, escape=True, border=0)}<pre>{escape(self._code())}</pre>"

    def _code(self) -> str:
        fields = json.dumps(self.schema.to_dict(), indent=4, ensure_ascii=False)
        format_ = "" if self.format == "json" else f", format={self.format!r}"
        return f"topic({self.topic!r}, schema={fields}{format_})"


@interruptible(lambda: "the look has ended; no position is kept anywhere.")
def peek(
    topic: str,
    *,
    brokers: str,
    n: int = 5,
    format: str = "json",
    kafka_config: Mapping[str, Any] | None = None,
) -> Peek:
    """Look at a topic's first records.

    Parameters
    ----------
    topic, brokers : str
    n : int, records
        How many are shown; the schema is inferred from up to 1,000.

    Returns
    -------
    Peek
        ``.frame``: DataFrame, shape (<= n, n_columns), the schema's and ``_partition``, ``_offset``,
        ``_timestamp``, ``_key``; ``.schema``, ready to paste. Nothing is committed anywhere.

    Raises
    ------
    ConfigError
        The topic does not exist or is empty.
    """
    source = _source(brokers, kafka_config)
    info = source.describe([topic])[topic]
    values = first_values(source, topic, info)
    if not values:
        raise ConfigError(f"Topic {topic!r} is empty: there is nothing to show.")
    schema = infer_schema(values, format)
    tps = [TopicPartition(topic, p) for p in range(info.partitions)]
    low, high = source.offsets(tps, "earliest"), source.offsets(tps, "latest")
    stops = {tp: min(high[tp], low[tp] + n) for tp in tps}
    starts = {tp: Position(low[tp]) for tp in tps if low[tp] < stops[tp]}
    records = read_bounded(source, starts, stops)[topic].slice(0, n)
    frame = Decoder(topic, schema, format=format, include=_INCLUDE).decode(records).frame
    return Peek(topic, to_pandas(frame), schema, format)


@interruptible(lambda: "nothing is kept of what was read, and no position anywhere.")
def read(
    topic: str,
    *,
    brokers: str,
    start: Start = "earliest",
    end: Start = "latest",
    schema: Mapping[str, str] | None = None,
    format: str = "json",
    include: Sequence[str] = (),
    kafka_config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """A bounded part of a topic as one DataFrame.

    Parameters
    ----------
    start, end : "earliest", "latest", time or {partition: offset}
        Offsets ``[start, end)`` of every partition; times mean the first record at or after them. What lies
        beyond the log's end is left out.
    schema : mapping, optional
        Default: inferred from the first records.
    include : sequence of str
        As in `Pipeline.topic`.

    Returns
    -------
    DataFrame, shape (n_records, n_columns)
        Partition by partition in offset order. ``attrs["dead_letters"]`` holds undecodable records as a
        DataFrame. Nothing is committed anywhere.
    """
    source = _source(brokers, kafka_config, [topic] if "headers" in include else [])
    info = source.describe([topic])[topic]
    tps = [TopicPartition(topic, p) for p in range(info.partitions)]
    starts, ends, latest = (source.offsets(tps, at) for at in (start, end, "latest"))
    stops = {tp: min(ends[tp], latest[tp]) for tp in tps}
    positions = {tp: Position(starts[tp]) for tp in tps if starts[tp] < stops[tp]}
    decoder = Decoder(topic, _schema(source, topic, schema, format), format=format, include=tuple(include))
    frames, dead = [decoder.empty()], []
    total = sum(stops[tp] - p.offset for tp, p in positions.items())
    with _bar(topic, total, progress) as bar, closing(batches_between(source, positions, stops)) as batches:
        for fetched in batches if positions else ():
            if topic in fetched.records:
                decoded = decoder.decode(fetched.records[topic])
                frames.append(decoded.frame)
                dead.append(decoded.dead)
            bar.update(sum(r.stop - r.start for r in fetched.ranges))
    table = pa.concat_tables(frames).sort_by([("_partition", "ascending"), ("_offset", "ascending")])
    frame = to_pandas(table.select(decoder.visible))
    if any(d.num_rows for d in dead):
        frame.attrs["dead_letters"] = pa.concat_tables(dead).to_pandas()
    return frame


def write(
    frame: pd.DataFrame,
    topic: str,
    *,
    brokers: str,
    key: str | None = None,
    transactional: bool = False,
    kafka_config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> int:
    """Write a DataFrame's rows as JSON records, with an idempotent producer.

    Parameters
    ----------
    frame : DataFrame, shape (n_rows, n_columns)
        Columns become fields; missing values become null, times ISO 8601 text, decimals text.
    key : str, optional
        The column whose value, as text, is the record's key.
    transactional : bool
        All rows become visible to read_committed readers at once, or none.

    Returns
    -------
    int
        Records written and acknowledged by all in-sync replicas.

    Raises
    ------
    KframeError
        A record was refused. Without `transactional`, records before it may be in the topic.
    KeyboardInterrupt
        Its note says what is in the topic: with `transactional` all rows or none, else how many.
    """
    if key is not None and key not in frame.columns:
        raise ConfigError(
            f"write(key={key!r}): the frame has no such column.", hint=f"It has: {', '.join(frame.columns)}"
        )
    settings = Settings(brokers, kafka_config)
    own = {"transactional_id": f"kframe-write-{uuid.uuid4()}"} if transactional else {}
    producer = ck.Producer(settings.producer(**own))
    sent = _Sent(topic, len(frame), transactional)
    with interruptible(sent.outcome):
        try:
            if transactional:
                _init_transactions(producer)
                producer.begin_transaction()
            with _bar(topic, len(frame), progress) as bar:
                for first in range(0, len(frame), _PRODUCE_ROWS):
                    part = frame.iloc[first : first + _PRODUCE_ROWS]
                    _produce(producer, topic, part, key, sent)
                    bar.update(len(part))
                sent.check(unanswered=_flush(producer))
            if transactional:
                with interrupts_deferred():  # what it does is told afterwards, and true
                    producer.commit_transaction(_TIMEOUT_S)
                    sent.committed = True
        except BaseException:
            if not sent.committed:
                _give_up(producer, transactional)
            raise
    return len(frame)


@dataclass
class _Sent:
    """How far a `write` has come, by the brokers' answers."""

    topic: str
    rows: int
    transactional: bool
    acknowledged: int = 0
    refused: str | None = None
    committed: bool = False

    def answered(self, error: Any, _record: Any) -> None:
        """The brokers' answer to one record."""
        if error is None:
            self.acknowledged += 1
        elif self.refused is None:
            self.refused = str(error.str())

    def check(self, *, unanswered: int) -> None:
        """Raises `KframeError` unless every record was acknowledged."""
        if unanswered or self.refused:
            raise KframeError(
                f"write({self.topic!r}): {self.refused or 'the brokers did not acknowledge in time'}",
                kept="Nothing is visible." if self.transactional else "Some records may be in the topic.",
            )

    def outcome(self) -> str:
        """What an interrupt has left."""
        if self.committed:
            return f"the transaction had committed: all {self.rows:,} rows are in {self.topic!r}."
        if self.transactional:
            return f"the transaction was rolled back: nothing of it is visible in {self.topic!r}."
        return f"{self.acknowledged:,} of {self.rows:,} rows are in {self.topic!r}."


def _init_transactions(producer: Any) -> None:
    """In short waits: the client holds Ctrl-C back in each of them."""
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            producer.init_transactions(_WAIT_S)
            return
        except ck.KafkaException as error:
            if not error.args[0].retriable() or time.monotonic() > deadline:
                raise


def _flush(producer: Any) -> int:
    """Wait, in short waits, while records are being answered; how many were not in a minute."""
    left, deadline = len(producer), time.monotonic() + _TIMEOUT_S
    while (now_left := producer.flush(_WAIT_S)) and time.monotonic() < deadline:
        if now_left < left:
            left, deadline = now_left, time.monotonic() + _TIMEOUT_S
    return int(now_left)


def _give_up(producer: Any, transactional: bool) -> None:
    """Roll back, or at least wait for the answers to what has left, so that they can be counted."""
    with interrupts_deferred(), contextlib.suppress(ck.KafkaException):
        producer.purge(in_flight=False)
        if transactional:
            producer.abort_transaction(_CLOSE_S)
        else:
            producer.flush(_CLOSE_S)


def _produce(producer: Any, topic: str, frame: pd.DataFrame, key: str | None, sent: _Sent) -> None:
    keys = [None] * len(frame) if key is None else [None if pd.isna(k) else str(k) for k in frame[key]]
    for value, record_key in zip(json_lines(frame), keys, strict=True):
        while True:
            try:
                producer.produce(topic, value=value, key=record_key, on_delivery=sent.answered)
                break
            except BufferError:
                producer.poll(0.1)
    producer.poll(0)


def _bar(topic: str, total: int, progress: bool) -> Any:
    return tqdm(total=total, desc=topic, unit=" records", unit_scale=True, disable=None if progress else True)


def json_lines(frame: pd.DataFrame) -> list[str]:
    """Each row as one JSON object."""
    return frame.to_json(orient="records", lines=True, date_format="iso", date_unit="us").splitlines()


def _schema(source: KafkaSource, topic: str, given: Mapping[str, str] | None, format: str) -> Schema:
    if given is not None:
        return Schema.parse(given)
    return infer_schema(first_values(source, topic, source.describe([topic])[topic]), format)


def _source(brokers: str, kafka_config: Mapping[str, Any] | None, headers: Sequence[str] = ()) -> KafkaSource:
    return KafkaSource(Settings(brokers, kafka_config), group_id="kframe.reader", headers=headers)
