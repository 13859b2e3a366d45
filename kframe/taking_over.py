"""A run makes a pipeline its own: epoch, topics, schemas, positions, and the source that reads on."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence

from kframe.batch.infer import infer_schema
from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.commit.store import Store
from kframe.commit.transaction import transaction
from kframe.config import Options
from kframe.definition import Definition, Topic
from kframe.engine import Engine, recreated
from kframe.errors import ConfigError, DefinitionError, LostRange
from kframe.executors.local import Executor, LocalExecutor
from kframe.model import Outlet, Position, TopicPartition
from kframe.schema import Schema
from kframe.sinks.outbox import enrol
from kframe.source.bounded import read_bounded
from kframe.source.protocol import Source, TopicInfo
from kframe.standby.standing import Standby
from kframe.transform.output import stored
from kframe.transform.step import defined
from kframe.worker import AtEdge

_INFER_ROWS = 1000


class TakingOver:
    """The part of a `Run` before its first batch. See there for the parameters."""

    def __init__(
        self,
        *,
        definition: Definition,
        options: Options,
        store: Store,
        ledger: Ledger,
        source: Source,
        executor: Executor | None,
        until_end: bool,
        at_edge: AtEdge,
        outlets: Callable[[], Sequence[Outlet]],
        standby: Standby | None,
    ) -> None:
        self.bounded = until_end
        self._definition = definition
        self._options = options
        self._store = store
        self._ledger = ledger
        self._source = source
        self._executor = executor or LocalExecutor()
        self._at_edge = at_edge
        self._outlets = outlets
        self._standby = standby
        self._stops: dict[TopicPartition, int] | None = None

    def _take_over(self, stopped: Callable[[], bool]) -> Engine:
        """Claim the pipeline, check its topics, settle schemas and positions, and start the source."""
        self._definition.check_runnable()
        topics = self._definition.read_topics()
        infos = self._source.describe(topics)
        known = self._ledger.topics()
        for topic, (topic_id, _) in known.items():
            if topic in infos and topic_id != infos[topic].topic_id:
                raise recreated(topic, topic_id or "?", infos[topic].topic_id)
        schemas = {t: schema_of(self._source, self._definition.topics[t], infos[t], known) for t in topics}
        missing = self._missing_positions(infos, known)
        cluster_id = self._source.cluster_id()
        outlets = self._outlets()
        journal = self._standby.journal() if self._standby else None
        with transaction(self._store, lambda: False) as cur:
            self._ledger.claim(cur, _owner(), cluster_id)
            self._tell_changes(self._ledger.changed(cur, defined(self._definition.steps)))
            for topic in topics:
                self._ledger.pin_topic(cur, topic, infos[topic].topic_id, schemas[topic].to_dict())
            self._ledger.add_positions(cur, missing)
            enrol(cur, Outbox(self._store, self._ledger.pipeline), outlets, self._ledger.next_batch_id())
            if journal is not None:
                journal.open(cur, stored(self._definition.steps))
        positions = {tp: p for tp, p in self._ledger.positions().items() if tp.topic in infos}
        positions = self._start_source(positions)
        return Engine(
            store=self._store,
            ledger=self._ledger,
            source=self._source,
            executor=self._executor,
            decoders={t: self._definition.topics[t].decoder(schemas[t]) for t in topics},
            steps=lambda: self._definition.steps,
            topic_ids={t: infos[t].topic_id for t in topics},
            positions=positions,
            limits=self._options.limits,
            stops=self._stops,
            stopped=stopped,
            dead_letters_max_ratio=self._options.dead_letters_max_ratio,
            at_edge=self._at_edge,
            outlets=outlets,
            journal=journal.batch if journal else None,
        )

    def _missing_positions(
        self, infos: Mapping[str, TopicInfo], known: Mapping[str, object]
    ) -> dict[TopicPartition, Position]:
        """Where unseen partitions begin: those of a new topic as asked, those of a grown one at its start."""
        stored = self._ledger.positions()
        new = [TopicPartition(t, p) for t, i in infos.items() for p in range(i.partitions)]
        new = [tp for tp in new if tp not in stored]
        first = [tp for tp in new if tp.topic not in known]
        grown = [tp for tp in new if tp.topic in known]
        offsets = self._source.offsets(grown, "earliest") if grown else {}
        if first:
            offsets |= self._source.offsets(first, self._options.start_from)
        return {tp: Position(offset) for tp, offset in offsets.items()}

    def _start_source(self, positions: dict[TopicPartition, Position]) -> dict[TopicPartition, Position]:
        """Start reading at the ledger's positions; what is lost is named, and skipped if asked."""
        self._stops = self._source.offsets(positions, "latest") if self.bounded else None
        try:
            self._source.start(positions, self._stops, self._options.limits)
            return positions
        except LostRange as lost:
            skip = self._options.on_lost_range == "skip"
            with transaction(self._store, lambda: False) as cur:
                self._ledger.record_gaps(cur, lost.ranges, "skipped" if skip else "lost")
                if skip:
                    self._ledger.skip(cur, lost.ranges, positions)
            if not skip:
                raise
        stored = self._ledger.positions()
        positions = {tp: stored[tp] for tp in positions}
        self._source.start(positions, self._stops, self._options.limits)
        return positions

    def _add_partitions(self, engine: Engine) -> None:
        """Start to read partitions that the topics have gained."""
        infos = self._source.describe(self._definition.read_topics())
        missing = self._missing_positions(infos, infos)
        if not missing:
            return
        with transaction(self._store, lambda: False) as cur:
            self._ledger.add_positions(cur, missing)
        engine.positions.update(missing)
        engine.restart_source()

    def _tell_changes(self, changed: list[str]) -> None:
        if not changed:
            return
        names = ", ".join(changed)
        if self._options.on_definition_change == "stop":
            raise DefinitionError(
                f"The definition of {names} has changed since the last run.",
                kept="Nothing was changed.",
                hint='Go on with on_definition_change="warn", or compute anew: pipeline.rebuild(name).',
            )
        warnings.warn(
            f"kframe: the definition of {names} has changed since the last run; rows committed before keep "
            "the old one. To compute them anew: pipeline.rebuild(name).",
            stacklevel=2,
        )


def schema_of(
    source: Source,
    topic: Topic,
    info: TopicInfo,
    known: Mapping[str, tuple[str | None, dict[str, str] | None]],
) -> Schema:
    """The declared schema, or the one pinned in the ledger, or one inferred from the first records."""
    pinned = known.get(topic.name, (None, None))[1]
    if topic.schema is not None:
        if topic.on_new_field == "add" and pinned is not None:
            return topic.schema.with_fields(
                {k: v for k, v in pinned.items() if k not in topic.schema.to_dict()}
            )
        return topic.schema
    if pinned is not None:
        return Schema.parse(pinned)
    values = first_values(source, topic.name, info)
    if not values:
        raise ConfigError(
            f"Topic {topic.name!r} is empty, so its schema cannot be inferred.",
            kept="Nothing was changed.",
            hint='Give one: topic("...", schema={"column": "type"}), or run again once it holds records.',
        )
    return infer_schema(values, topic.format)


def first_values(source: Source, topic: str, info: TopicInfo) -> list[bytes]:
    """Up to 1,000 values from the beginning of a topic's partitions, tombstones left out."""
    tps = [TopicPartition(topic, p) for p in range(info.partitions)]
    low, high = source.offsets(tps, "earliest"), source.offsets(tps, "latest")
    share = max(1, _INFER_ROWS // len(tps))
    stops = {tp: min(high[tp], low[tp] + share) for tp in tps}
    positions = {tp: Position(low[tp]) for tp in tps if low[tp] < stops[tp]}
    if not positions:
        return []
    records = read_bounded(source, positions, stops).get(topic)
    return [v for v in records["value"].to_pylist() if v is not None] if records is not None else []


def _owner() -> str:
    return f"PID {os.getpid()} on {socket.gethostname()}"
