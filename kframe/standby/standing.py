"""A pipeline that stands by: what it takes from its changelog before it runs, and leaves in it then."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from confluent_kafka.admin import AdminClient, NewTopic

from kframe.commit.ledger import Ledger
from kframe.commit.outbox import Outbox
from kframe.commit.transaction import transaction
from kframe.deliver.deliverer import another_file
from kframe.deliver.kafka import NAME as KAFKA
from kframe.deliver.kafka import delivered_position
from kframe.deliver.producing import explained, prepare_topics, topic_configs, unless_there
from kframe.deliver.target import Target
from kframe.errors import ConfigError, Fenced
from kframe.source.kafka import KafkaSource
from kframe.source.settings import Settings
from kframe.standby.election import Election
from kframe.standby.follow import EDGES as FOLLOW_EDGES
from kframe.standby.follow import Follower
from kframe.standby.journal import Journal

EDGES = (*FOLLOW_EDGES, "claimed", "caught_up")
"""Of standing by; the last two of a take-over: the former one is fenced; the changelog is read to its end."""
_ADMIN_TIMEOUT_S = 10.0
_CONFIG = {"cleanup.policy": "compact", "delete.retention.ms": "604800000"}  # a week to come back warm


def changelog_topic(pipeline: str) -> str:
    """The topic of a pipeline's changelog."""
    return f"kframe.{pipeline}.changelog"


def prepare_changelog(settings: Settings, topic: str) -> None:
    """Make the changelog topic where there is none."""
    with explained(settings):
        admin = AdminClient(settings.admin())
        new = NewTopic(topic, num_partitions=1, replication_factor=-1, config=_CONFIG)
        for future in admin.create_topics([new], request_timeout=_ADMIN_TIMEOUT_S).values():
            unless_there(future)


def tombstones_kept(settings: Settings, topic: str) -> timedelta | None:
    """How long a changelog topic keeps tombstones; None when there is no such topic."""
    with explained(settings):
        admin = AdminClient(settings.admin())
        if topic not in admin.list_topics(timeout=_ADMIN_TIMEOUT_S).topics:
            return None
        config = topic_configs(admin, [topic])[topic]
        return timedelta(milliseconds=int(config["delete.retention.ms"].value))


def existing_changelog(settings: Settings, pipeline: str) -> tuple[str, timedelta]:
    """The topic of a pipeline's changelog, and how long it keeps tombstones.

    Raises
    ------
    ConfigError
        There is no such topic.
    """
    topic = changelog_topic(pipeline)
    retention = tombstones_kept(settings, topic)
    if retention is None:
        raise ConfigError(
            f"Pipeline {pipeline!r} publishes no changelog: there is no topic {topic!r}.",
            kept="Nothing was changed.",
            hint=f"Run it with standby=True: Pipeline(..., name={pipeline!r}, standby=True).",
        )
    return topic, retention


def follower(
    settings: Settings,
    ledger: Ledger,
    topic: str,
    retention: timedelta,
    at_edge: Callable[[str], None] = lambda _edge: None,
) -> Follower:
    """What brings `ledger`'s file up to a changelog."""
    source = KafkaSource(settings, group_id=f"kframe.{ledger.pipeline}.follower")
    return Follower(ledger, source, topic, KAFKA, retention, at_edge)


def leave(settings: Settings | None, ledger: Ledger, what: str) -> None:
    """Let a file that has stood by be used alone. Its changelog would lack what is done: it must be gone.

    Raises
    ------
    ConfigError
        It is there.
    Restoring
        The file was being restored from it.
    DeliveryUnknown
        Another instance has published more than this file has.
    """
    topic = changelog_topic(ledger.pipeline)
    if not ledger.follows() and not Outbox(ledger.store, ledger.pipeline).enrolled(KAFKA, topic):
        return
    if settings is None or tombstones_kept(settings, topic) is not None:
        raise ConfigError(
            f"{what}: pipeline {ledger.pipeline!r} has stood by with this file, and without standby=True the "
            "other instances would miss what it does.",
            kept="Nothing was changed.",
            hint=f"Give standby=True. To stand by no more, stop all instances and delete topic {topic!r}.",
        )
    _check_newest(ledger, delivered_position(settings, ledger.pipeline))
    with transaction(ledger.store, lambda: False) as cur:
        ledger.check_whole(cur)
        Outbox(ledger.store, ledger.pipeline).withdraw(cur, KAFKA, topic)
        ledger.follow_nothing(cur)


def _check_newest(ledger: Ledger, held: int) -> None:
    end = Outbox(ledger.store, ledger.pipeline).end(KAFKA)
    if held > end:
        raise another_file(ledger.pipeline, KAFKA, held, end)


class Standby:
    """One instance of a pipeline of which several may exist, each with a file of its own.

    Parameters
    ----------
    settings : Settings
    ledger : Ledger
        Of this instance's file.
    at_edge : callable
        Told each of `EDGES`.
    """

    def __init__(self, settings: Settings, ledger: Ledger, at_edge: Callable[[str], None]) -> None:
        self._settings = settings
        self._ledger = ledger
        self._at_edge = at_edge
        self._topic = changelog_topic(ledger.pipeline)
        self._retention = timedelta(0)

    def journal(self) -> Journal:
        """What a run publishes of itself."""
        return Journal(self._ledger, KAFKA, self._topic)

    def elect(self, release: Callable[[bool], None]) -> Election:
        """Join the group of the pipeline's instances. See `Election`."""
        prepare_changelog(self._settings, self._topic)
        self._retention = tombstones_kept(self._settings, self._topic) or self._retention
        prepare_topics(self._settings, [])
        group = f"kframe.{self._ledger.pipeline}.standby"
        return Election(self._settings, group, self._topic, release)

    def catch_up(self, stopped: Callable[[], bool], advance: Callable[[int, int], object]) -> None:
        """Bring the file up to the changelog as of now."""
        self._follower().catch_up(advance, stopped)

    def follow(self, stopped: Callable[[], bool]) -> None:
        """Keep the file up to the changelog until told to stop. After `catch_up`."""
        if not stopped():
            self._follower().follow(stopped)

    def take_over(self, target: Target) -> None:
        """Fence whoever was active, then read the changelog to its end: from now on it is this instance's.

        Parameters
        ----------
        target : Target
            The Kafka target that this instance will deliver by. It claims the delivered position first: one
            that was paused on its way to being active finds the claim when it wakes, and publishes nothing.

        Raises
        ------
        Fenced
            Another instance has published meanwhile.
        """
        held = target.open(0) or 0
        target.commit(held)
        self._at_edge("claimed")
        reader = self._follower()
        last = reader.catch_up()
        self._at_edge("caught_up")
        outbox = Outbox(self._ledger.store, self._ledger.pipeline)
        if last is None:
            _check_newest(self._ledger, held)
            on_its_way = outbox.enrolled(KAFKA, self._topic) and outbox.undelivered(KAFKA)
            if not on_its_way:
                reader.begin()
        elif last is not None and last.file != self._ledger.store.id and outbox.position(KAFKA)[0] != held:
            raise Fenced(
                f"Another instance of pipeline {self._ledger.pipeline!r} has published meanwhile.",
                kept="Nothing of this one was published.",
            )

    def _follower(self) -> Follower:
        return follower(self._settings, self._ledger, self._topic, self._retention, self._at_edge)
