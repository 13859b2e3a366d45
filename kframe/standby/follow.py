"""Bringing a file up to a changelog: an empty one whole, a warm one batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import duckdb
import pyarrow as pa

from kframe.batch.plan import NO_END
from kframe.commit.ledger import Ledger, now
from kframe.commit.outbox import Outbox
from kframe.commit.transaction import transaction
from kframe.errors import ConfigError
from kframe.model import RECORDS, Fetched, Limits, OffsetRange, Position, TopicPartition
from kframe.sinks.table import drop, write
from kframe.source.bounded import batches_between, read_bounded
from kframe.source.protocol import Source
from kframe.standby.changelog import Commit, Log, last_commit

EDGES = ("applying", "applied")
"""Rows of the changelog are written and not committed; they are."""
_LIMITS = Limits(rows_max=245_760, bytes_max=64 << 20, interval_s=0.1)
_LOOK_BACK = 64  # offsets; the last commit is seldom farther from the end


class Followed(NamedTuple):
    """How far a file has followed: in which topic, the next offset, whether its tables are those of one
    batch, and when. Topic and time are None for a file that never has."""

    topic_id: str | None
    position: int
    whole: bool
    at: datetime | None


class _Superseded(Exception):
    """Another instance has computed again what this file had committed and not published."""


class Follower:
    """Applies one pipeline's changelog to a file that nobody else writes to.

    Parameters
    ----------
    ledger : Ledger
    source : Source
        For the changelog alone.
    topic : str
    target : str
        The outbox target that carries the changelog.
    retention : timedelta
        How long the topic keeps tombstones. A file that is behind by half of that is restored whole: what was
        deleted meanwhile may not be told any more.
    at_edge : callable
        Told each of `EDGES`.
    """

    def __init__(
        self,
        ledger: Ledger,
        source: Source,
        topic: str,
        target: str,
        retention: timedelta,
        at_edge: Callable[[str], None] = lambda _edge: None,
    ) -> None:
        self._ledger = ledger
        self._store = ledger.store
        self._source = source
        self._tp = TopicPartition(topic, 0)
        self._outbox = Outbox(ledger.store, ledger.pipeline)
        self._target = target
        self._retention = retention
        self._at_edge = at_edge
        self._pending = RECORDS.empty_table()
        self._topic_id = ""

    def catch_up(
        self,
        advance: Callable[[int, int], object] = lambda _read, _of: None,
        stopped: Callable[[], bool] = lambda: False,
        *,
        keep_own: bool = False,
    ) -> Commit | None:
        """Apply the changelog up to its end as of now.

        Parameters
        ----------
        advance : callable
            Told how many offsets have been read, and how many there are in all.
        stopped : callable
            True: leave off. The next call goes on from there.
        keep_own : bool
            Refuse to take back batches of the file's own that the changelog lacks.

        Returns
        -------
        Commit or None
            What the changelog ends with, if with anything. When this very file has published that, the
            changelog holds nothing new.

        Raises
        ------
        ConfigError
            `keep_own`, and there are such batches; or the file is one that was used without standing by, and
            the changelog another's. Nothing was changed.
        """
        self._topic_id = self._id_of_now()
        end = self._source.offsets([self._tp], "latest")[self._tp]
        low = self._source.offsets([self._tp], "earliest")[self._tp]
        stop, last = self._last(low, end)
        if last is None:  # nothing is published yet: what comes can be followed batch by batch
            if not self.followed().whole:
                self._wipe()
                self._move(low, whole=True)
            return None
        if last.file == self._store.id:
            self._move(stop, whole=True)
            return last
        self._check_not_alone()
        if keep_own and self._unpublished(last):
            raise _own_batches(
                self._ledger,
                "Restore into another file, or run the pipeline with this one: it publishes them, unless "
                "another instance has computed them again.",
            )
        followed = self._begun(low, last)
        self._pending = RECORDS.empty_table()
        start = {self._tp: Position(followed.position)}
        for fetched in batches_between(self._source, start, {self._tp: stop}, _LIMITS):
            self._take(fetched)
            advance(sum(r.stop - r.start for r in fetched.ranges), stop - followed.position)
            if stopped():
                return last
        if not followed.whole:
            self._move(stop, whole=True)
        return last

    def begin(self) -> None:
        """The changelog is empty, and begins with this file: what it has published before is gone."""
        low = self._source.offsets([self._tp], "earliest")[self._tp]
        with transaction(self._store, lambda: False) as cur:
            self._outbox.withdraw(cur, self._target, self._tp.topic)
            self._ledger.follow_nothing(cur)
            self._set(cur, low, whole=True)

    def follow(self, stopped: Callable[[], bool]) -> None:
        """Apply what comes, batch by batch, until told to stop. After `catch_up`."""
        while not stopped():
            try:
                self._follow(stopped)
            except _Superseded:
                self.catch_up(stopped=stopped)

    def _follow(self, stopped: Callable[[], bool]) -> None:
        self._pending = RECORDS.empty_table()
        self._topic_id = self._id_of_now()
        followed = self.followed()
        begun = followed.topic_id == self._topic_id
        at = Position(followed.position if begun else self._source.offsets([self._tp], "earliest")[self._tp])
        self._source.start({self._tp: at}, None, _LIMITS)
        try:
            while not stopped():
                plan = (OffsetRange(*self._tp, at.offset, NO_END, at.leader_epoch),)
                fetched = self._source.fetch(plan, stopped)
                self._take(fetched)
                at = next((Position(r.stop, r.leader_epoch) for r in fetched.ranges), at)
        finally:
            self._source.close()

    def followed(self) -> Followed:
        """How far the file is."""
        row = self._store.cursor().execute(
            "SELECT topic_id, position, whole, epoch_ms(followed_at) FROM _kframe.followed "
            "WHERE pipeline = ?",
            [self._ledger.pipeline],
        )
        found = row.fetchone()
        if found is None:
            return Followed(None, 0, self._ledger.next_batch_id() > 0, None)
        topic_id, position, whole, at_ms = found
        return Followed(topic_id, position, whole, datetime.fromtimestamp(at_ms / 1000, UTC))

    # ---- its parts ----------------------------------------------------------------------------------

    def _id_of_now(self) -> str:
        return self._source.describe([self._tp.topic])[self._tp.topic].topic_id

    def _last(self, low: int, end: int) -> tuple[int, Commit | None]:
        """What the changelog ends with, and the offset behind it; only a transaction's marker follows."""
        start = end
        while start > low:
            start, stop = max(low, 2 * start - end - _LOOK_BACK), end
            records = read_bounded(self._source, {self._tp: Position(start)}, {self._tp: stop})
            found = last_commit(records[self._tp.topic]) if self._tp.topic in records else None
            if found is not None:
                return records[self._tp.topic]["offset"][found[0]].as_py() + 1, found[1]
        return low, None

    def _begun(self, low: int, last: Commit) -> Followed:
        """From where to follow: the whole changelog when what the file holds cannot be carried on with."""
        followed = self.followed()
        seen = [at for at in (followed.at, self._ledger.last_committed_at()) if at is not None]
        stale = not seen or now() - max(seen) > self._retention / 2
        within = followed.topic_id == self._topic_id and followed.position >= low
        if within and not stale and not self._unpublished(last):
            return followed
        self._wipe()
        self._move(low, whole=False)
        return self.followed()

    def _unpublished(self, last: Commit) -> bool:
        """Whether the file has committed batches that nobody else has seen."""
        if not self.followed().whole:
            return False
        return self._ledger.next_batch_id() > last.batch_id + 1 or self._holds_own()

    def _holds_own(self) -> bool:
        """Whether it holds rows that are still to be published, or batches of a changelog that is gone."""
        gone = self.followed().topic_id not in (None, self._topic_id)
        return gone or self._outbox.undelivered(self._target) > 0

    def _check_not_alone(self) -> None:
        if self.followed().at is None and self._ledger.next_batch_id() > 0:
            raise _own_batches(self._ledger, "Give an empty file: all that is published is restored into it.")

    def _take(self, fetched: Fetched) -> None:
        """Apply whole batches, and keep the rest; while the file is not whole yet, apply everything."""
        if not fetched.ranges:
            return
        records = fetched.records.get(self._tp.topic, RECORDS.empty_table())
        self._pending = pa.concat_tables([self._pending, records])
        behind = fetched.ranges[0].stop
        followed = self.followed()
        if not followed.whole:
            self._apply(self._pending, behind, whole=False)
            self._pending = RECORDS.empty_table()
            return
        found = last_commit(self._pending)
        if found is not None:
            if found[1].file != self._store.id:
                self._check_not_alone()
                if self._holds_own():
                    raise _Superseded
            head, self._pending = self._pending[: found[0] + 1], self._pending[found[0] + 1 :]
            self._apply(
                head, self._pending["offset"][0].as_py() if len(self._pending) else behind, whole=True
            )

    def _apply(self, records: pa.Table, position: int, *, whole: bool) -> None:
        next_batch_id = self._ledger.next_batch_id() if whole else 0
        found = last_commit(records)
        if found is not None and found[1].batch_id < next_batch_id - 1:
            self._move(position, whole=True)  # all of it is here already, followed by more
            return
        with transaction(self._store, lambda: self.followed().position == position) as cur:
            log = Log(cur, records)
            for sql in log.definitions():
                cur.execute(sql)
            for change in log.changes(next_batch_id):
                write(cur, change)
            if found is not None:
                self._outbox.delivered(cur, self._target, found[1].delivered, exact=True)
            self._set(cur, position, whole=whole)
            self._at_edge("applying")
        self._at_edge("applied")

    def _wipe(self) -> None:
        """Remove what the pipeline has in the file, apart from side tables."""
        with transaction(self._store, lambda: False) as cur:
            for name in self._ledger.forget(cur):
                drop(cur, name)
            self._outbox.forget(cur, self._target)

    def _move(self, position: int, *, whole: bool) -> None:
        with transaction(self._store, lambda: False) as cur:
            self._set(cur, position, whole=whole)

    def _set(self, cur: duckdb.DuckDBPyConnection, position: int, *, whole: bool) -> None:
        cur.execute("DELETE FROM _kframe.followed WHERE pipeline = ?", [self._ledger.pipeline])
        row = [self._ledger.pipeline, self._topic_id, position, whole, now()]
        cur.execute("INSERT INTO _kframe.followed VALUES (?, ?, ?, ?, ?)", row)


def _own_batches(ledger: Ledger, hint: str) -> ConfigError:
    last = ledger.next_batch_id() - 1
    return ConfigError(
        f"{ledger.store.path} holds batches of pipeline {ledger.pipeline!r}, up to {last}, that its "
        "changelog lacks: they were committed here and never published.",
        kept="Nothing was changed.",
        hint=hint,
    )
