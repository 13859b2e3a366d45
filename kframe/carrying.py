"""`carry`: a topic of changed rows, kept as the table that it tells of, and carried on to a store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa

from kframe.deliver.target import Target
from kframe.pipeline import Pipeline
from kframe.transform.frames import to_pandas


def carry(
    topic: str,
    path: str | os.PathLike[str],
    *,
    brokers: str,
    to: str | os.PathLike[str] | Target,
    key: str | Sequence[str] = (),
    table: str | None = None,
    schema: Mapping[str, str] | None = None,
    mode: str = "transaction",
    kafka_config: Mapping[str, Any] | None = None,
) -> Pipeline:
    """Make a pipeline that carries a published topic to a store, in a process and a file of its own.

    With `Pipeline.publish` on one side and this on the other, processing and delivery run, stop and fail
    apart, and the store is exactly once all the same. The command ``kframe deliver`` runs it.

    Parameters
    ----------
    topic : str
        JSON records, as `Pipeline.publish` writes them.
    path : path
        The DuckDB file that keeps the table and the positions, made when missing.
    brokers : str
    to, mode
        As of `Pipeline.connect`.
    key : str or sequence of str
        The columns that the topic's records are keyed by: the last record of a key counts, and a tombstone
        removes the row. Without it every record is a row that is added; tombstones are counted.
    table : str, optional
        The table's name here and there. Default: the topic's.
    schema : mapping, optional
        As of `Pipeline.topic`. Inferred from the first records by default; decimals and times, which are text
        in JSON, then stay text.
    kafka_config : mapping, optional
        As of `Pipeline`.

    Returns
    -------
    Pipeline
        Defined, not started: ``carry(...).run(until=None)`` goes on until it is stopped.

    Raises
    ------
    DefinitionError, ConfigError
        The schema, the target or the mode is not usable.
    """
    keys = (key,) if isinstance(key, str) else tuple(key)
    carrier = Pipeline(path, brokers=brokers, name=f"deliver-{topic}", kafka_config=kafka_config)
    try:
        carrier.topic(topic, schema=schema, include=["key", "tombstone"] if keys else [])
        name = table or topic
        carrier.table(name, key=keys or None, inputs=[topic])(_as_keyed(keys) if keys else _as_is)
        carrier.connect(to, tables=[name], mode=mode)
    except BaseException:
        carrier.close()
        raise
    return carrier


def _as_is(records: pd.DataFrame) -> pd.DataFrame:
    return records


def _as_keyed(keys: tuple[str, ...]) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """A function that gives tombstones, which have a key and no value, their key's columns."""

    def keyed(records: pd.DataFrame) -> pd.DataFrame:
        gone = records["_tombstone"].astype(bool)
        records = records[~gone | records["_key"].notna()]  # without a key there is nothing to remove
        gone = gone[records.index]
        told = [_parts(value, keys) for value in records.loc[gone, "_key"]]
        rows = records.drop(columns="_key")
        for i, column in enumerate(keys):
            rows.loc[gone, column] = _typed([parts[i] for parts in told], rows[column]).array
        return rows

    return keyed


def _parts(key: bytes, keys: tuple[str, ...]) -> list[str | None]:
    """A record's key, column by column as text: one column's key is its text, several are a JSON object."""
    if len(keys) == 1:
        return [key.decode()]
    told = [json.loads(key)[column] for column in keys]
    return [part if part is None or isinstance(part, str) else json.dumps(part) for part in told]


def _typed(texts: list[str | None], like: pd.Series[Any]) -> pd.Series[Any]:
    type_ = pa.array(like, from_pandas=True).type
    return to_pandas(pa.table({"key": pa.array(texts, pa.string()).cast(type_)}))["key"]
