"""`follow`: a read-only copy of another pipeline's tables, kept exactly by its changelog."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Self

import pandas as pd

from kframe.commit.ledger import Ledger
from kframe.commit.store import open_store, quote
from kframe.errors import ConfigError
from kframe.progress import progress_bar
from kframe.reading import Result, query
from kframe.source.settings import Settings
from kframe.standby.standing import existing_changelog, follower


def follow(
    pipeline: str,
    path: str | os.PathLike[str],
    *,
    brokers: str,
    kafka_config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Replica:
    """Copy the tables of a pipeline that runs elsewhere with ``standby=True``, as of its newest batch.

    Parameters
    ----------
    pipeline : str
        Its name.
    path : path
        A DuckDB file for the copy, made when missing. A later call goes on where this one stops.
    brokers : str
    kafka_config : mapping, optional
        As of `Pipeline`.
    progress : bool
        A bar over the changelog's records.

    Returns
    -------
    Replica
        Up to date as of now. `Replica.update` brings it up to date again, `Replica.start` keeps it so.

    Raises
    ------
    ConfigError
        There is no changelog of that name, or the file is the pipeline's own.
    BrokerUnavailable, StoreLocked
    """
    replica = Replica(pipeline, path, brokers=brokers, kafka_config=kafka_config)
    try:
        return replica.update(progress=progress)
    except BaseException:
        replica.close()
        raise


class Replica:
    """A pipeline's tables in a file of one's own, each read as of one of its batches. Made by `follow`."""

    def __init__(
        self,
        pipeline: str,
        path: str | os.PathLike[str],
        *,
        brokers: str,
        kafka_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipeline = pipeline
        settings = Settings(brokers, kafka_config)
        topic, retention = existing_changelog(settings, pipeline)
        self._store = open_store(path)
        self._store.use(self)
        self._ledger = Ledger(self._store, pipeline)
        self._follower = follower(settings, self._ledger, topic, retention)
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._ended.set()
        self._error: BaseException | None = None

    def __repr__(self) -> str:
        state = "following" if not self._ended.is_set() else "as it was"
        failed = f"; failed: {str(self._error).splitlines()[0]}" if self._error else ""
        return f"<Replica of {self.pipeline!r}, {state} at batch {self._ledger.next_batch_id() - 1}{failed}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, *, progress: bool = True) -> Self:
        """Apply what the pipeline has committed and published up to now. Errors as of `follow`."""
        self.stop()
        with progress_bar(f"{self.pipeline} restoring", " records", shown=progress) as advance:
            last = self._follower.catch_up(advance)
            if last is None or last.file == self._store.id:
                raise ConfigError(
                    f"{self._store.path} is the pipeline's own file, or its changelog is still empty.",
                    kept="Nothing was changed.",
                    hint="Give the copy another path.",
                )
        return self

    def start(self) -> Self:
        """Follow in the background until `stop`."""
        self.stop()
        self._stop.clear()
        self._ended.clear()
        self._error = None
        threading.Thread(target=self._work, name=f"kframe-follow-{self.pipeline}", daemon=True).start()
        return self

    def stop(self) -> None:
        """End the background following. The tables stay as they are."""
        self._stop.set()
        self._ended.wait()

    def close(self) -> None:
        """Stop, and give up the file."""
        self.stop()
        self._store.release(self)

    def sql(self, query_text: str, parameters: object = None) -> Result:
        """Run one read-only query; all rows are as of one batch, which the result names.

        Raises
        ------
        KframeError
            What has ended the background following.
        """
        if self._error is not None:
            raise self._error
        return query(self._ledger, query_text, parameters)

    def read(self, table: str) -> pd.DataFrame:
        """A whole table as a DataFrame; ``attrs`` holds the batch and positions it is as of."""
        return self.sql(f"FROM {quote(table)}").df()

    def _work(self) -> None:
        try:
            self._follower.follow(self._stop.is_set)
        except BaseException as error:
            self._error = error
        finally:
            self._ended.set()
