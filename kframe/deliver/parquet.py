"""A folder of Parquet files as a target: whole files that appear at once, with their positions inside."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from kframe.errors import DeliveryDelayed
from kframe.model import Entry

KIND, ID = "_kframe_kind", "_kframe_id"
"""Columns of a keyed table's files: ``"upsert"`` or ``"delete"``; the row's id. A key's newest row wins."""


class ParquetFolder:
    """Exactly once into ``<folder>/<table>/<pipeline>-<first id>-<stop id>.parquet``.

    A file is written beside its place and renamed, in the order of ids: a reader sees whole files only, and
    the newest file says where to go on. So a pipeline's newest file has to stay.

    Parameters
    ----------
    folder : path
        Made when missing.
    pipeline : str
    """

    exact = True

    def __init__(self, folder: str | os.PathLike[str], pipeline: str) -> None:
        self.folder = Path(folder).resolve()
        self.name = f"parquet:{self.folder}"
        self._pipeline = pipeline
        self._prefix = quote(pipeline, safe="")
        self._written: list[tuple[Path, Path]] = []

    def __repr__(self) -> str:
        return f"<ParquetFolder {self.folder}>"

    def open(self, kept: int) -> int | None:
        """Remove what was never finished; the position behind the newest file."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.close()
            for unfinished in self.folder.glob(f"*/.{self._prefix}-*"):
                unfinished.unlink()
            newest = max(self.folder.glob(f"*/{self._prefix}-*-*.parquet"), key=_ids, default=None)
            if newest is None:
                return None
            return int(pq.read_metadata(newest).metadata[b"kframe.stop_id"])
        except OSError as error:
            raise _delayed(self.folder, error) from None

    def send(self, entries: Iterable[Entry]) -> None:
        """Write every entry to a file beside its place."""
        try:
            for entry in entries:
                self._written.append(self._write(entry))
        except OSError as error:
            raise _delayed(self.folder, error) from None

    def commit(self, position: int) -> None:
        """Put the files in their places, in order; after a crash between two, the rest is written again."""
        try:
            for beside, place in self._written:
                os.replace(beside, place)
            for folder in {place.parent for _, place in self._written}:
                _sync(folder)
            self._written = []
        except OSError as error:
            raise _delayed(self.folder, error) from None

    def close(self) -> None:
        """Remove what is not in its place."""
        for beside, _ in self._written:
            beside.unlink(missing_ok=True)
        self._written = []

    def _write(self, entry: Entry) -> tuple[Path, Path]:
        folder = self.folder / quote(entry.name, safe="")
        folder.mkdir(exist_ok=True)
        name = f"{self._prefix}-{entry.first_id:019d}-{entry.stop_id:019d}.parquet"
        rows = entry.rows
        if entry.kind != "append":
            ids = pa.array(range(entry.first_id, entry.stop_id), pa.int64())
            kinds = pa.repeat(pa.scalar(entry.kind), rows.num_rows)
            rows = rows.append_column(KIND, kinds).append_column(ID, ids)
        told = {
            "kframe.pipeline": self._pipeline,
            "kframe.table": entry.name,
            "kframe.batch_id": str(entry.batch_id),
            "kframe.first_id": str(entry.first_id),
            "kframe.stop_id": str(entry.stop_id),
        }
        beside = folder / f".{name}"
        pq.write_table(rows.replace_schema_metadata(told), beside)
        _sync(beside)
        return beside, folder / name


def _ids(file: Path) -> int:
    return int(file.stem.rsplit("-", 1)[1])


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delayed(folder: Path, error: OSError) -> DeliveryDelayed:
    return DeliveryDelayed(
        f"Files cannot be written to {folder}: {error.strerror}",
        kept="The rows are kept in the outbox.",
        hint="It is tried again.",
    )
