"""Mending a file whose write-ahead log is damaged, from a crash of the disk or of what is below it."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kframe.commit.store import open_store
from kframe.errors import ConfigError, StoreDamaged

_POSITION = re.compile(r"byte position (\d+)")


def repair(file: str | os.PathLike[str]) -> str:
    """Cut the write-ahead log off where its damage begins, after a backup of both files.

    What was committed behind that point is gone from the tables and from the positions alike, so the records
    are consumed again: nothing is lost while Kafka retains them.

    Parameters
    ----------
    file : path

    Returns
    -------
    str
        What was done, and where the pipelines stand now.

    Raises
    ------
    ConfigError
        There is nothing to repair.
    StoreDamaged
        The damage is not in the write-ahead log. The files are as they were.
    """
    path = Path(os.path.realpath(file))
    wal = path.with_name(path.name + ".wal")
    position = _damage(path)
    backups = [_backup(p) for p in (path, wal)]
    with wal.open("r+b") as log:
        log.truncate(position)
    store = open_store(path)
    try:
        rows = store.cursor().execute(
            "SELECT pipeline, topic, partition, position FROM _kframe.positions ORDER BY ALL"
        )
        at = [f"  {pipeline}: {topic}[{part}] at {pos}" for pipeline, topic, part, pos in rows.fetchall()]
    finally:
        store.close()
    saved = " and ".join(p.name for p in backups)
    return "\n".join([f"{wal.name} was cut off at byte {position}; {saved} hold what was there.", *at])


def _damage(path: Path) -> int:
    """Where the write-ahead log is damaged, as DuckDB says it."""
    if not path.exists():
        raise ConfigError(f"There is no file {path}.")
    try:
        open_store(path).close()
    except StoreDamaged as error:
        found = _POSITION.search(str(error.__cause__))
        if found is None:
            raise StoreDamaged(
                f"{path} is damaged elsewhere than in its write-ahead log: {error.__cause__}",
                kept="The files are as they were.",
                hint="Restore a backup or a snapshot, or begin anew from Kafka.",
            ) from error
        return int(found[1])
    raise ConfigError(f"{path} opens without an error: there is nothing to repair.")


def _backup(path: Path) -> Path:
    for n in range(1, 1000):
        copy = path.with_name(f"{path.name}.damaged-{n}")
        if not copy.exists():
            shutil.copy2(path, copy)
            return copy
    raise ConfigError(f"There are too many backups beside {path}.")
