"""Records to DataFrames' columns: one decoder a topic, and dead letters for what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kframe.batch import native_json
from kframe.batch.csv_columns import CsvColumns
from kframe.batch.fallback import Decode, completed
from kframe.batch.json_columns import JsonColumns, unknown_fields
from kframe.errors import DefinitionError
from kframe.model import DEAD_LETTERS, PROVENANCE, RECORDS, Decoded
from kframe.schema import Schema

INCLUDE = ("key", "headers", "timestamp", "partition", "offset", "tombstone")


class Decoder:
    """Decodes one topic's records. One thread uses it at a time.

    Parameters
    ----------
    topic : str
    schema : Schema
    format : str
        ``"json"``, ``"csv"``, ``"text"`` or ``"bytes"``: a key of `FORMATS`.
    include : sequence of str
        Of `INCLUDE`: columns ``_key`` (bytes), ``_headers`` (list of structs), ... that users get to see.
    on_new_field : "ignore" or "add"
        Whether unknown JSON fields are reported in ``Decoded.new_fields``.
    record_bytes_max : int, bytes
        A longer value is a dead letter, unread.
    delimiter : str
        One character, between the cells of ``format="csv"``.

    Raises
    ------
    DefinitionError
        An option is not usable.
    """

    def __init__(
        self,
        topic: str,
        schema: Schema,
        *,
        format: str = "json",
        include: Sequence[str] = (),
        on_new_field: str = "ignore",
        record_bytes_max: int = 64 << 20,
        delimiter: str = ",",
    ) -> None:
        _check_options(topic, format, include, on_new_field, delimiter)
        self.topic = topic
        self.schema = schema
        self._options: dict[str, Any] = {
            "format": format,
            "include": tuple(include),
            "on_new_field": on_new_field,
            "record_bytes_max": record_bytes_max,
            "delimiter": delimiter,
        }
        self._con = private_connection()
        self._values = FORMATS[format](schema, self._con, delimiter)
        self._empty = self.decode(RECORDS.empty_table()).frame

    def __repr__(self) -> str:
        return f"<Decoder {self.topic!r} {self._options['format']} {self.schema!r}>"

    @property
    def learns(self) -> bool:
        """Whether a batch may bring columns that the next one is decoded with."""
        return bool(self._options["on_new_field"] == "add")

    @property
    def visible(self) -> list[str]:
        """The columns that users get to see: the schema's, and those they asked for."""
        return [f.name for f in self.schema] + [
            f"_{name}" for name in INCLUDE if name in self._options["include"]
        ]

    def with_fields(self, new: Mapping[str, str]) -> Decoder:
        """A decoder for the same topic with more columns."""
        return Decoder(self.topic, self.schema.with_fields(new), **self._options)

    def empty(self) -> pa.Table:
        """A decoded frame without rows."""
        return self._empty

    def decode(self, records: pa.Table) -> Decoded:
        """Decode one batch of the topic's records.

        Parameters
        ----------
        records : Table
            Columns `RECORDS`, any order of partitions.

        Returns
        -------
        Decoded
            Every record is in it once: as a row, as a dead letter, or counted as a tombstone. Rows keep the
            records' order.
        """
        dead: list[pa.Table] = []
        place = np.arange(records.num_rows)
        has_value = _bools(records["value"].is_valid()) if records["value"].null_count else None
        present = records if has_value is None else records.filter(pa.array(has_value))
        place = place if has_value is None else place[has_value]
        present, place = self._without_oversized(present, place, dead)
        rows, good, errors = self._values(present["value"])
        if errors:
            told = [errors[i] for i in np.flatnonzero(~good).tolist()]
            dead.append(self._dead(present.filter(pa.array(~good)), told))  # take() would copy all chunks
            present, place = present.filter(pa.array(good)), place[good]
        new_fields = self._new_fields(present)
        if has_value is not None and "tombstone" in self._options["include"]:
            rows, present = self._with_tombstones(rows, place, records, has_value)
        return Decoded(
            self._frame(rows, present),
            pa.concat_tables([DEAD_LETTERS.empty_table(), *dead]),
            0 if has_value is None else int(np.count_nonzero(~has_value)),
            new_fields,
        )

    # ---- its parts ----------------------------------------------------------------------------------

    def _without_oversized(self, records: pa.Table, place: Any, dead: list[pa.Table]) -> tuple[pa.Table, Any]:
        most = self._options["record_bytes_max"]
        if records["value"].nbytes <= most:
            return records, place
        sizes = pc.binary_length(records["value"])
        large = _bools(pc.greater(sizes, most))
        if large.any():
            found = records.filter(pa.array(large))
            told = [
                f"value of {n:,} bytes is over record_bytes_max={most:,}"
                for n in sizes.filter(pa.array(large)).to_pylist()
            ]
            nothing = pa.nulls(found.num_rows, pa.binary())
            dead.append(
                self._dead(found.set_column(found.column_names.index("value"), "value", nothing), told)
            )
            records, place = records.filter(pa.array(~large)), place[~large]
        return records, place

    def _dead(self, records: pa.Table, errors: list[str]) -> pa.Table:
        columns = {name: records[name] for name in ("partition", "offset", "timestamp", "key", "value")}
        topic = pa.array([self.topic] * records.num_rows, pa.string())
        return pa.table(
            {"topic": topic, **columns, "error": pa.array(errors, pa.string())}, schema=DEAD_LETTERS
        )

    def _frame(self, rows: pa.Table, records: pa.Table) -> pa.Table:
        """The rows with the provenance and included columns of their records: the same schema every time."""
        include = self._options["include"]
        columns = {name: records[name[1:]] for name in PROVENANCE}
        columns |= {f"_{name}": records[name] for name in ("key", "headers") if name in include}
        if "tombstone" in include:
            columns["_tombstone"] = records["value"].is_null()
        fields = [f.with_nullable(f.nullable or "tombstone" in include) for f in self.schema.arrow]
        fields += [pa.field(name, column.type) for name, column in columns.items()]
        return pa.Table.from_arrays([*rows.columns, *columns.values()], schema=pa.schema(fields))

    def _with_tombstones(
        self, rows: pa.Table, place: Any, records: pa.Table, has_value: Any
    ) -> tuple[pa.Table, pa.Table]:
        """The rows and one without values for each tombstone, and their records, in the records' order."""
        empty = np.flatnonzero(~has_value)
        nothing = pa.table([pa.nulls(len(empty), f.type.arrow) for f in self.schema], names=rows.column_names)
        both = pa.concat_tables([rows.cast(nothing.schema), nothing])
        places = np.concatenate([place, empty])
        return both.take(pa.array(places.argsort())), records.take(pa.array(np.sort(places)))

    def _new_fields(self, records: pa.Table) -> dict[str, str]:
        if self._options["on_new_field"] != "add" or not records.num_rows:
            return {}
        return unknown_fields(self._con, self.schema, records["value"].cast(pa.string()))


# ---- formats ----------------------------------------------------------------------------------------


def _texts(values: pa.ChunkedArray) -> tuple[pa.ChunkedArray, Any, dict[int, str]]:
    """Decode as UTF-8; which they are, and why the others are not."""
    try:
        return values.cast(pa.string()), np.ones(len(values), bool), {}
    except pa.ArrowInvalid:
        errors = {}
        for i, raw in enumerate(values.to_pylist()):
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                errors[i] = f"not valid UTF-8: {error.reason} at byte {error.start}"
        good = np.ones(len(values), bool)
        good[list(errors)] = False
        return values.filter(pa.array(good)).cast(pa.string()), good, errors


def _of_texts(decode: Decode) -> Decode:
    """A format over UTF-8 texts as a format over values."""

    def decode_values(values: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        texts, utf8, errors = _texts(values)
        rows, fits, misfits = decode(texts)
        if not errors:
            return rows, fits, misfits
        where = np.flatnonzero(utf8)
        good = utf8.copy()
        good[where[~fits]] = False
        told = {**errors, **{int(where[i]): text for i, text in misfits.items()}}
        return rows, good, dict(sorted(told.items()))

    return decode_values


def _json(schema: Schema, con: duckdb.DuckDBPyConnection, _delimiter: str) -> Decode:
    decode = JsonColumns(schema, con).decode
    return _of_texts(_natively(schema, decode) if native_json.takes(schema) else decode)


def _natively(schema: Schema, others: Decode) -> Decode:
    """`NativeJson` for what it takes, `others` for what it doesn't."""
    native = native_json.NativeJson(schema)

    def decode(texts: pa.ChunkedArray) -> tuple[pa.Table, Any, dict[int, str]]:
        return completed(texts, *native.decode(texts), others)

    return decode


def _text(schema: Schema, _con: duckdb.DuckDBPyConnection, _delimiter: str) -> Decode:
    return _of_texts(
        lambda texts: (pa.Table.from_arrays([texts], schema=schema.arrow), np.ones(len(texts), bool), {})
    )


def _bytes(schema: Schema, _con: duckdb.DuckDBPyConnection, _delimiter: str) -> Decode:
    return lambda values: (
        pa.Table.from_arrays([values], schema=schema.arrow),
        np.ones(len(values), bool),
        {},
    )


def _csv(schema: Schema, con: duckdb.DuckDBPyConnection, delimiter: str) -> Decode:
    return _of_texts(CsvColumns(schema, con, delimiter).decode)


FORMATS: dict[str, Callable[[Schema, duckdb.DuckDBPyConnection, str], Decode]] = {
    "json": _json,
    "text": _text,
    "bytes": _bytes,
    "csv": _csv,
}
"""By name. Another format is one more entry: from a schema to a function from values to rows."""


def _check_options(
    topic: str, format: str, include: Sequence[str], on_new_field: str, delimiter: str
) -> None:
    for what, value, known in (
        *(("include", name, INCLUDE) for name in include),
        ("format", format, tuple(FORMATS)),
        ("on_new_field", on_new_field, ("ignore", "add")),
    ):
        if value not in known:
            raise DefinitionError(
                f"topic({topic!r}, {what}=...): there is no {value!r}.",
                hint=f"Choose from {', '.join(known)}.",
            )
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise DefinitionError(f"topic({topic!r}, delimiter=...): {delimiter!r} is not one character.")
    if on_new_field == "add" and format != "json":
        raise DefinitionError(f"topic({topic!r}): on_new_field='add' needs format='json'.")


def private_connection() -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB that sees no file and no Python variable."""
    con = duckdb.connect(":memory:")
    for setting in (
        "TimeZone = 'UTC'",
        "python_enable_replacements = false",
        "enable_external_access = false",
    ):
        con.execute(f"SET {setting}")
    return con


def _bools(column: Any) -> Any:
    return np.array(column.to_numpy(), dtype=bool)
