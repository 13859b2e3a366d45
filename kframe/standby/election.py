"""Which of a pipeline's instances is active: a consumer group gives it the changelog's one partition."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import confluent_kafka as ck

from kframe.source.settings import Settings

_POLL_S = 0.1


class Election:
    """This instance's membership in the group, on a thread of its own.

    Parameters
    ----------
    settings : Settings
    group_id, topic : str
        The group, and a topic with one partition.
    release : callable
        Called, on that thread, when the partition is to be handed on; returns when this instance has ended
        its work. Told whether there is time to end it well (False: another one may be active already).
    """

    def __init__(
        self, settings: Settings, group_id: str, topic: str, release: Callable[[bool], None]
    ) -> None:
        self._release = release
        self._active = threading.Event()
        self._leaving = threading.Event()
        self._consumer = ck.Consumer({**settings.member(group_id), "error_cb": lambda _error: None})
        self._consumer.subscribe(
            [topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )
        self._thread = threading.Thread(target=self._work, name="kframe-election", daemon=True)
        self._left = threading.Event()
        self._thread.start()

    @property
    def active(self) -> bool:
        """Whether this instance is the active one, as far as it knows."""
        return self._active.is_set()

    def leave(self) -> None:
        """Leave the group: another instance becomes active at once."""
        self._leaving.set()
        self._left.wait()

    def _work(self) -> None:
        try:
            while not self._leaving.is_set():
                self._consumer.poll(_POLL_S)  # nothing is fetched: the partition is paused
        finally:
            self._consumer.close()
            self._active.clear()
            self._left.set()

    def _assigned(self, consumer: Any, partitions: list[Any]) -> None:
        own = [ck.TopicPartition(tp.topic, tp.partition, ck.OFFSET_END) for tp in partitions]
        consumer.incremental_assign(own)
        if own:
            consumer.pause(own)
            self._active.set()

    def _revoked(self, consumer: Any, partitions: list[Any]) -> None:
        self._end(consumer, partitions, in_time=True)

    def _lost(self, consumer: Any, partitions: list[Any]) -> None:
        self._end(consumer, partitions, in_time=False)

    def _end(self, consumer: Any, partitions: list[Any], *, in_time: bool) -> None:
        if partitions:
            self._active.clear()
            self._release(in_time)
            consumer.incremental_unassign(partitions)
