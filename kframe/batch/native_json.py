"""A decoder in C for the common record: JSON objects into columns, in one pass.

`json_rows.c` is compiled when kframe is installed where there is a C compiler. It takes only records that
leave no question open; `kframe.batch.json_columns` decides all others, and every one without a compiler.
"""

from __future__ import annotations

import ctypes
import json
import threading
from ctypes import POINTER, c_char_p, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kframe.schema import Schema, Type

LIBRARY = Path(__file__).with_name("_json_rows.so")
_KINDS = ("bool", "int", "float", "str", "timestamp", "date", "decimal", "json", "list", "struct")
"""In the order of json_rows.c's ``kind``."""
_FRACTION = {"s": 0, "ms": 3, "us": 6}


class _Column(ctypes.Structure):
    """json_rows.c's ``column_t``."""


_Column._fields_ = [
    ("name", c_char_p),
    *((name, c_int32) for name in ("name_size", "kind", "width", "required")),
    *((name, c_int64) for name in ("low", "high")),
    *((name, c_int32) for name in ("digits", "scale", "zone", "next")),
    ("seen", c_int64),
    *((name, c_void_p) for name in ("values", "valid", "ends")),
    *((name, c_int64) for name in ("rows_max", "capacity")),
    ("members", POINTER(_Column)),
    ("count", c_int64),
]


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.json_rows.restype = c_int64
    library.json_rows.argtypes = [POINTER(_Column), c_void_p, c_void_p, c_int64, c_void_p]
    library.json_free.restype = None
    library.json_free.argtypes = [POINTER(_Column)]
    return library


def takes(schema: Schema) -> bool:
    """Whether `NativeJson` is there, and knows all of these types and names."""
    return _library() is not None and all(_plain(f.name) and _known(f.type) for f in schema)


def _known(type_: Type) -> bool:
    return type_.kind in _KINDS and all(_plain(name) and _known(t) for name, t in type_.members)


def _plain(name: str) -> bool:
    """Whether JSON writes a name as it is."""
    return json.dumps(name, ensure_ascii=False) == f'"{name}"'


class NativeJson:
    """Decodes texts into a table of the schema's columns.

    Parameters
    ----------
    schema : Schema
        That `takes` says yes to.
    """

    def __init__(self, schema: Schema) -> None:
        library = _library()
        assert library is not None, "takes() first"
        self._library = library
        self._schema = schema
        self._lock = threading.Lock()  # C uses the columns' memory again, without the GIL
        whole = Type("struct", pa.struct(schema.arrow), "", tuple((f.name, f.type) for f in schema))
        self._whole = _column("", whole)
        for i, field in enumerate(schema):
            self._whole.members[i].required = field.required

    def __del__(self) -> None:
        if hasattr(self, "_whole"):
            self._library.json_free(self._whole)

    def decode(self, texts: pa.ChunkedArray) -> tuple[pa.Table, Any]:
        """Decode what leaves no question open.

        Parameters
        ----------
        texts : ChunkedArray of string, shape (n,)
            No nulls.

        Returns
        -------
        rows : Table, shape (n_taken, n_columns)
            In order, under the schema's Arrow types.
        taken : bool array, shape (n,)
            Which they are.
        """
        taken = np.zeros(len(texts), bool)
        batches, begin = [], 0
        for chunk in texts.chunks:
            if len(chunk):
                with self._lock:
                    batches.append(self._chunk(chunk, taken[begin : begin + len(chunk)]))
                begin += len(chunk)
        return pa.Table.from_batches(batches, self._schema.arrow), taken

    def _chunk(self, texts: pa.StringArray, taken: Any) -> pa.RecordBatch:
        _, bounds, data = texts.buffers()
        n = self._library.json_rows(
            self._whole,
            data.address if data else None,
            bounds.address + 4 * texts.offset,
            len(texts),
            taken.ctypes.data,
        )
        if n < 0:
            raise MemoryError
        arrays = [_array(self._whole.members[i], f.type, n) for i, f in enumerate(self._schema)]
        return pa.RecordBatch.from_arrays(arrays, schema=self._schema.arrow)


def _column(name: str, type_: Type, next_: int = 0) -> _Column:
    made = _Column(name.encode(), len(name.encode()), _KINDS.index(type_.kind), next=next_)
    if type_.kind == "bool":
        made.width = 1
    elif type_.kind not in ("str", "json", "list", "struct"):
        made.width = type_.arrow.bit_width // 8
    if type_.kind == "int":
        bits, unsigned = type_.arrow.bit_width, type_.text.startswith("u")
        made.low = 0 if unsigned else -(2 ** (bits - 1))
        made.high = min(2**bits if unsigned else 2 ** (bits - 1), 2**63) - 1
    elif type_.kind == "timestamp":
        made.scale, made.zone = _FRACTION[type_.arrow.unit], type_.arrow.tz is not None
        made.high = (2**63 - 1) // 10 ** (6 - made.scale)  # the store counts microseconds
        made.low = -made.high
    elif type_.kind == "decimal":
        made.digits, made.scale = type_.arrow.precision, type_.arrow.scale
    elif type_.members:
        made.count = n = len(type_.members)
        members = (_column(member, t, (i + 1) % n) for i, (member, t) in enumerate(type_.members))
        made.members = (_Column * n)(*members)
    return made


def _array(column: _Column, type_: Type, n: int) -> pa.Array:
    """A copy of a column's first `n` values."""
    valid = np.frombuffer(_copy(column.valid, n), bool)
    nulls = n - int(np.count_nonzero(valid))
    buffers = [_bits(valid) if nulls else None]
    children = []
    if type_.kind in ("str", "json", "list"):
        ends = np.frombuffer(_copy(column.ends, 4 * (n + 1)) if n else bytes(4), np.int32)
        buffers.append(pa.py_buffer(ends))
        if type_.kind == "list":
            children.append(_array(column.members[0], type_.members[0][1], int(ends[-1])))
        else:
            buffers.append(pa.py_buffer(_copy(column.values, int(ends[-1]))))
    elif type_.kind == "struct":
        children = [_array(column.members[i], t, n) for i, (_, t) in enumerate(type_.members)]
    elif type_.kind == "bool":
        buffers.append(_bits(np.frombuffer(_copy(column.values, n), bool)))
    else:
        buffers.append(pa.py_buffer(_copy(column.values, n * column.width)))
    return pa.Array.from_buffers(type_.arrow, n, buffers, nulls, children=children)


def _copy(address: int | None, size: int) -> bytes:
    return ctypes.string_at(address, size) if address and size else b""


def _bits(values: Any) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little").tobytes())
