"""Instances that follow, take over, compute, deliver and are deposed in any order: every file stays right.

The standby protocol's own parts on files of their own; the brokers are a log in memory with transactions.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

import kframe as kf
import kframe.deliver.deliverer as deliverer
import kframe.standby.follow as follow
from kframe.commit.outbox import Outbox
from kframe.deliver.deliverer import Deliverer
from kframe.deliver.kafka import NAME
from kframe.engine import Engine
from kframe.errors import ConfigError, DeliveryDelayed, DeliveryUnknown, Fenced, Restoring
from kframe.model import Entry, Limits
from kframe.standby.follow import Follower
from kframe.standby.standing import Standby, changelog_topic
from kframe.taking_over import TakingOver
from kframe.testing import InjectedFault, MemorySource

TOPIC = changelog_topic("shop")
SCHEMA = {"sku": "str", "n": "int64"}
FILES = "abc"
EXAMPLES = int(os.environ.get("KFRAME_EXAMPLES", "12"))
WHICH = st.sampled_from("aabbc")
ENOUGH = 100
LOOKS = st.integers(1, 8) | st.just(ENOUGH)
DELIVERIES = (*deliverer.EDGES, "reply lost")
THEN = st.sampled_from(["deliver", "compute", "end", *DELIVERIES])
FAULT = st.sampled_from(["", "", "", "applying", "applied"])


class Brokers:
    """What they keep: orders, changelog, and the delivered position with its owner."""

    def __init__(self) -> None:
        self.log = MemorySource()
        self.log.create("orders", 2)
        self.log.create("returns")
        self.log.create(TOPIC)
        self.position: int | None = None
        self.owner: object = None
        self.producer: object = None

    def compact(self, keep: Callable[[int], bool]) -> None:
        """Remove records of the changelog that a later one of the same key replaces."""
        (log,) = self.log._logs[TOPIC]
        last = {r["key"]: r["offset"] for r in log.records}
        log.records = [r for r in log.records if last[r["key"]] == r["offset"] or keep(r["offset"])]


class Topics:
    """A target that writes to them in transactions, as one owner of the position."""

    name = NAME
    exact = True

    def __init__(self, brokers: Brokers, reply_lost: bool = False) -> None:
        self.reply_lost = reply_lost
        self._brokers = brokers
        self._producer = object()
        self._sent: list[tuple[str, bytes, bytes | None]] = []
        self._owned = False

    def open(self, kept: int) -> int | None:
        if self._owned:
            self._check_ours()
        self._brokers.producer = self._producer = object()
        self._sent = []
        return self._brokers.position

    def send(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            columns = (entry.rows[c].to_pylist() for c in ("key", "value"))
            self._sent += [(entry.name, key, value) for key, value in zip(*columns, strict=True)]

    def commit(self, position: int) -> None:
        if self._brokers.producer is not self._producer:
            self._check_ours()
            raise DeliveryDelayed("fenced by the broker")
        for topic, key, value in self._sent:
            self._brokers.log.append(topic, value, key=key)
        self._brokers.log.skip(TOPIC, 1)
        self._brokers.position, self._brokers.owner = position, self
        self._sent, self._owned = [], True
        if self.reply_lost:
            self.reply_lost = False
            raise DeliveryDelayed("no reply")

    def close(self) -> None:
        self._sent = []

    def _check_ours(self) -> None:
        if self._brokers.owner is not self:
            raise Fenced("another one")


class OfLog(Standby):
    """A `Standby` whose changelog is the log."""

    def __init__(self, made: kf.Pipeline, brokers: Brokers, at_edge: Callable[[str], None]) -> None:
        self._brokers = brokers
        super().__init__(None, made._ledger, at_edge)  # type: ignore[arg-type]
        self._retention = timedelta(days=1)

    def grow_stale(self, retention: timedelta = timedelta(0)) -> None:
        """What was deleted since the last look may not be told any more."""
        self._retention = retention

    def _follower(self) -> Follower:
        return Follower(self._ledger, self._brokers.log.beside(), TOPIC, NAME, self._retention, self._at_edge)


class Member:
    """One instance and its file."""

    def __init__(self, path: Path, brokers: Brokers) -> None:
        self._brokers = brokers
        self._source = brokers.log.beside()
        self.made = shop = kf.Pipeline(
            path, name="shop", source=self._source, batch_rows_max=3, commit_interval_ms=10
        )
        shop.topic("orders", schema=SCHEMA, include=["partition", "offset"])
        shop.land("orders", table="landed")
        shop.aggregate("sold", source="orders", by="sku", n=("n", "count"), total=("n", "sum"))
        shop.topic("returns", schema=SCHEMA)  # of which there are none yet
        shop.aggregate("returned", source="returns", by="sku", n=("n", "count"))
        self.standby = OfLog(shop, brokers, self._at_edge)
        self.engine: Engine | None = None
        self.target = Topics(brokers)
        self.fault = ""
        self.follows = False

    def strikes(self, fault: str, work: Callable[[], None]) -> None:
        """Do it, with a fault on the way; the file is right, however it ends."""
        self.fault = fault
        try:
            work()
        except InjectedFault:
            pass
        finally:
            self.fault = ""
        self.check()

    def _at_edge(self, edge: str) -> None:
        if edge == self.fault:
            self.fault = ""
            raise InjectedFault(edge)

    def take_over(self) -> None:
        self.target = Topics(self._brokers)
        self.standby.take_over(self.target)
        self.engine = TakingOver(
            definition=self.made._definition,
            options=self.made._options,
            store=self.made._store,
            ledger=self.made._ledger,
            source=self._source,
            executor=None,
            until_end=False,
            at_edge=self._at_edge,
            outlets=lambda: [],
            standby=self.standby,
        )._take_over(lambda: True)

    def catch_up(self, stopped: Callable[[], bool] = lambda: False) -> None:
        self.standby.catch_up(stopped, lambda _read, _of: None)
        self.standby.grow_stale(timedelta(days=1))

    def deliver(self, fault: str = "deliver") -> None:
        """Everything that is committed; raises what ends it."""
        self.fault, self.target.reply_lost = fault, fault == "reply lost"
        carrier = Deliverer(Outbox(self.made._store, "shop"), self.target, self._at_edge)
        carrier.start()
        carrier.close(10)
        if carrier.error is not None:
            raise carrier.error

    def end_turn(self) -> None:
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def check(self) -> None:
        """The tables are those of the positions."""
        try:
            positions = self.made.sql("SELECT 1").positions
        except Restoring:
            return
        logs = self._brokers.log._logs["orders"]
        ends = {tp.partition: position for tp, position in positions.items() if tp.topic == "orders"}
        records = [r for p, log in enumerate(logs) for r in log.records if r["offset"] < ends.get(p, 0)]
        if not records:
            return
        read = [json.loads(r["value"]) for r in records]
        by_sku = {sku: [r["n"] for r in read if r["sku"] == sku] for sku in sorted({r["sku"] for r in read})}
        cur = self.made._store.cursor()
        assert cur.execute("SELECT n FROM landed ORDER BY n").fetchall() == sorted((r["n"],) for r in read)
        sold = cur.execute("SELECT sku, n, total FROM sold ORDER BY sku").fetchall()
        assert sold == [(sku, len(ns), sum(ns)) for sku, ns in by_sku.items()]


class StandingBy(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.brokers = Brokers()
        self.fed = 0
        self.made = 0
        self.members = {name: self._new(name) for name in FILES}

    def _new(self, name: str) -> Member:
        self.made += 1
        member = Member(self._folder / f"{name}{self.made}.duckdb", self.brokers)
        self._stack.callback(member.made.close)
        return member

    @rule(name=WHICH, looks=LOOKS, fault=FAULT, rows=st.sampled_from([15, 1000]))
    def stand_by(self, name: str, looks: int, fault: str, rows: int) -> None:
        """Catch up, or follow once that has been done; to the end, or until told to stop."""
        member = self.members[name]
        if member.engine is None:
            read_at_once(rows)
            work = member.standby.follow if member.follows else member.catch_up
            member.strikes(fault, lambda: work(after(looks)))
            member.follows = fault == "" and (member.follows or looks == ENOUGH)

    @rule(name=WHICH, records=st.integers(0, 7), then=THEN)
    def work(self, name: str, records: int, then: str) -> None:
        """Take over, if need be, and compute a batch; then perhaps deliver, perhaps in vain."""
        self._feed(records)
        member = self.members[name]
        try:
            if member.engine is None:
                member.follows = False
                member.take_over()
            assert member.engine is not None
            member.engine.run_batch()
            if then == "end":
                member.end_turn()
            elif then != "compute":
                member.deliver(then)
        except (InjectedFault, Fenced, DeliveryUnknown):
            member.end_turn()
        member.check()

    def _feed(self, records: int) -> None:
        for i in range(self.fed, self.fed + records):
            self.brokers.log.append("orders", {"sku": f"s{i % 3}", "n": i}, partition=i % 2)
        self.fed += records

    @rule(name=WHICH, what=st.sampled_from(["compacted", "stale", "lost"]), modulus=st.integers(1, 4))
    def mishap(self, name: str, what: str, modulus: int) -> None:
        """The changelog is compacted, an instance looks at it too seldom, or its file is lost."""
        if what == "compacted":
            self.brokers.compact(lambda offset: offset % modulus == 1)
        elif what == "stale":
            self.members[name].standby.grow_stale()
        else:
            self.members[name].end_turn()
            self.members[name] = self._new(name)

    def teardown(self) -> None:
        read_at_once(1000)
        with self._stack:
            for member in self.members.values():
                member.end_turn()
            active = self.members["a"]
            active.take_over()
            assert active.engine is not None
            while active.engine.run_batch() is not None:
                pass
            active.deliver()
            active.end_turn()
            for member in self.members.values():
                member.catch_up()
                member.check()
                assert sum(member.made.sql("SELECT 1").positions.values()) == self.fed


def read_at_once(rows_max: int) -> None:
    follow._LIMITS = Limits(rows_max=rows_max, bytes_max=1 << 20, interval_s=0.0)


def after(n: int) -> Callable[[], bool]:
    """Stops at the n-th time that it is asked."""
    asked = iter(range(n))
    return lambda: next(asked, None) is None


def test_instances_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a batch applied twice or half; own batches kept beside those that replaced them."""
    monkeypatch.setattr(follow, "_LIMITS", follow._LIMITS)  # what is set is undone at the end
    monkeypatch.setattr(deliverer, "_RETRY_S", 0.0)
    run_state_machine_as_test(
        StandingBy,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_own_batches_are_replaced_while_following(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: what had been read when that was noticed is applied again with the rest."""
    monkeypatch.setattr(follow, "_LIMITS", follow._LIMITS)
    state = StandingBy()
    state.work("b", 7, "deliver")
    state.work("b", 5, "end")
    state.stand_by("b", ENOUGH, "", 1000)
    state.work("a", 9, "deliver")
    state.stand_by("b", ENOUGH, "", 5)
    state.teardown()


def test_a_file_that_was_used_alone_is_no_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: two cuts of the same records into batches, mixed; batches of one's own thrown away."""
    monkeypatch.setattr(follow, "_LIMITS", follow._LIMITS)
    state = StandingBy()
    state.work("a", 5, "deliver")
    alone = state.members["b"]
    alone.made.run(progress=False)
    for follows in (False, True):
        alone.follows = follows
        with pytest.raises(ConfigError, match="empty file"):
            state.stand_by("b", ENOUGH, "", 1000)
    alone.check()
    state.mishap("b", "lost", 1)
    state.teardown()


def test_a_changelog_that_was_made_again_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: one read on from where the old one was left; what the file had told is taken for told."""
    monkeypatch.setattr(follow, "_LIMITS", follow._LIMITS)
    for first in "ab":  # the file that knows most goes on; or an empty one begins, and is read by all
        state = StandingBy()
        for _ in range(3):
            state.work("a", 5, "deliver")
        state.members["a"].end_turn()
        for name in "bc":
            state.stand_by(name, ENOUGH, "", 1000)
        if first == "b":
            state.mishap("b", "lost", 1)
            state.mishap("c", "lost", 1)
            state.stand_by("c", 1, "applied", 1000)  # not known to be whole
            state.brokers.position = None
        state.brokers.log.create(TOPIC)
        if first == "a":
            state.stand_by("c", ENOUGH, "", 1000)
        for _ in range(5):
            state.work(first, 3, "deliver")
            assert state.members[first].engine is not None
            state.stand_by("c", ENOUGH, "", 1000)
        state.teardown()
