"""A drain in C: librdkafka's records into columns without a Python object for each.

`drain.c` is compiled when kframe is installed where there is a C compiler. Without it, with callables in the
configuration, or when headers are wanted, `kframe.source.drain.ObjectDrain` does the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import numpy as np
import pyarrow as pa

from kframe.model import RECORDS, Position, TopicPartition
from kframe.source.drain import Columns, is_end

LIBRARY = Path(__file__).with_name("_drain.so")
_ROWS_MAX = 8192
_CONSUMER = 1
_SET = 0


class _Message(ctypes.Structure):
    _fields_ = [
        ("error", c_int32),
        ("topic", c_void_p),
        ("partition", c_int32),
        ("value", c_void_p),
        ("value_size", c_size_t),
        ("key", c_void_p),
        ("key_size", c_size_t),
        ("offset", c_int64),
    ]


class _Bytes(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("capacity", c_int64),
        ("ends", c_void_p),
        ("valid", c_void_p),
        ("nulls", c_int64),
    ]


class _Client(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("consume", "timestamp", "leader_epoch", "destroy")]


class _Rows(ctypes.Structure):
    """The beginning of drain.c's ``drain_t``."""

    _fields_ = [
        ("client", _Client),
        ("queue", c_void_p),
        ("rows", c_int64),
        ("rows_max", c_int64),
        ("topics", c_void_p),
        ("partitions", c_void_p),
        ("leader_epochs", c_void_p),
        ("offsets", c_void_p),
        ("timestamps", c_void_p),
        ("keys", _Bytes),
        ("values", _Bytes),
        ("failed", POINTER(_Message)),
    ]


_ERROR_CB = ctypes.CFUNCTYPE(None, c_void_p, c_int, c_char_p, c_void_p)

_OF_CLIENT: dict[str, tuple[Any, list[Any]]] = {
    "rd_kafka_conf_new": (c_void_p, []),
    "rd_kafka_conf_set": (c_int, [c_void_p, c_char_p, c_char_p, c_char_p, c_size_t]),
    "rd_kafka_conf_set_error_cb": (None, [c_void_p, _ERROR_CB]),
    "rd_kafka_conf_destroy": (None, [c_void_p]),
    "rd_kafka_new": (c_void_p, [c_int, c_void_p, c_char_p, c_size_t]),
    "rd_kafka_fatal_error": (c_int, [c_void_p, c_char_p, c_size_t]),
    "rd_kafka_poll_set_consumer": (c_int, [c_void_p]),
    "rd_kafka_queue_get_consumer": (c_void_p, [c_void_p]),
    "rd_kafka_queue_destroy": (None, [c_void_p]),
    "rd_kafka_consumer_close": (c_int, [c_void_p]),
    "rd_kafka_destroy": (None, [c_void_p]),
    "rd_kafka_topic_partition_list_new": (c_void_p, [c_int]),
    "rd_kafka_topic_partition_list_add": (c_void_p, [c_void_p, c_char_p, c_int32]),
    "rd_kafka_topic_partition_list_set_offset": (c_int, [c_void_p, c_char_p, c_int32, c_int64]),
    "rd_kafka_topic_partition_list_destroy": (None, [c_void_p]),
    "rd_kafka_topic_partition_set_leader_epoch": (None, [c_void_p, c_int32]),
    "rd_kafka_assign": (c_int, [c_void_p, c_void_p]),
    "rd_kafka_commit": (c_int, [c_void_p, c_void_p, c_int]),
    "rd_kafka_get_watermark_offsets": (
        c_int,
        [c_void_p, c_char_p, c_int32, POINTER(c_int64), POINTER(c_int64)],
    ),
    "rd_kafka_topic_name": (c_char_p, [c_void_p]),
    "rd_kafka_message_errstr": (c_char_p, [POINTER(_Message)]),
    "rd_kafka_err2str": (c_char_p, [c_int]),
}
_OF_DRAIN: dict[str, tuple[Any, list[Any]]] = {
    "drain_new": (POINTER(_Rows), [POINTER(_Client), c_void_p, c_int64]),
    "drain_take": (c_int64, [POINTER(_Rows), c_int64, c_int]),
    "drain_go_on": (None, [POINTER(_Rows)]),
    "drain_reset": (None, [POINTER(_Rows)]),
    "drain_free": (None, [POINTER(_Rows)]),
}


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """The client's own librdkafka, and ours; None where one cannot be had."""
    try:
        client, drain = ctypes.CDLL(ck.cimpl.__file__), ctypes.CDLL(str(LIBRARY))
        for library, functions in ((client, _OF_CLIENT), (drain, _OF_DRAIN)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError):
        return None
    return client, drain


def takes(config: Mapping[str, Any]) -> bool:
    """Whether `NativeDrain` is there, and can do what this configuration asks for."""
    return _libraries() is not None and all(isinstance(v, (str, int, float)) for v in config.values())


class NativeDrain:
    """A consumer of its own on the wheel's librdkafka. See `kframe.source.drain.Drain`.

    Parameters
    ----------
    config : mapping
        The consumer's; plain values only.
    on_error : callable
        Gets a KafkaError that concerns the whole client.
    """

    at_once = _ROWS_MAX

    def __init__(self, config: Mapping[str, Any], on_error: Callable[[Any], None]) -> None:
        libraries = _libraries()
        assert libraries is not None, "takes() first"
        self._client, self._library = libraries
        self._on_error = on_error
        self._error_cb = _ERROR_CB(self._client_error)  # librdkafka keeps no reference
        self._handle = self._new(config)
        self._client.rd_kafka_poll_set_consumer(self._handle)
        self._queue = self._client.rd_kafka_queue_get_consumer(self._handle)
        functions = ("consume_batch_queue", "message_timestamp", "message_leader_epoch", "message_destroy")
        pointers = [ctypes.cast(getattr(self._client, f"rd_kafka_{name}"), c_void_p) for name in functions]
        self._drain = self._library.drain_new(_Client(*pointers), self._queue, _ROWS_MAX)
        if not self._drain:
            raise MemoryError
        self._begin()

    def _new(self, config: Mapping[str, Any]) -> int:
        conf = self._client.rd_kafka_conf_new()
        told = ctypes.create_string_buffer(512)
        for name, value in config.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if self._client.rd_kafka_conf_set(conf, name.encode(), text.encode(), told, len(told)) != _SET:
                self._client.rd_kafka_conf_destroy(conf)
                raise _refused(told)
        self._client.rd_kafka_conf_set_error_cb(conf, self._error_cb)
        handle = self._client.rd_kafka_new(_CONSUMER, conf, told, len(told))
        if not handle:
            self._client.rd_kafka_conf_destroy(conf)
            raise _refused(told)
        return int(handle)

    def _client_error(self, handle: int, code: int, reason: bytes, _opaque: int) -> None:
        fatal = code == ck.KafkaError._FATAL
        if fatal:
            told = ctypes.create_string_buffer(512)
            code, reason = self._client.rd_kafka_fatal_error(handle, told, len(told)), told.value
        self._on_error(ck.KafkaError(code, _text(reason), fatal=fatal))

    # ---- a drain ------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.rows = self.bytes = 0
        self._ends: dict[TopicPartition, int] = {}
        self._library.drain_reset(self._drain)

    @property
    def empty(self) -> bool:
        return not self.rows and not self._ends

    def assign(self, positions: Mapping[TopicPartition, Position]) -> None:
        partitions = self._partitions(positions)
        code = self._client.rd_kafka_assign(self._handle, partitions)
        self._client.rd_kafka_topic_partition_list_destroy(partitions)
        if code:
            raise ck.KafkaException(ck.KafkaError(code))

    def take(self, rows_max: int, timeout_s: float) -> None:
        if self._library.drain_take(self._drain, rows_max, round(timeout_s * 1000)) < 0:
            raise MemoryError
        held = self._drain.contents
        self.rows = held.rows
        self.bytes = _size(held.keys, held.rows) + _size(held.values, held.rows)
        if held.failed:
            self._take_failed(held.failed)

    def _take_failed(self, failed: Any) -> None:
        message = failed.contents
        tp = TopicPartition(self._topic(message.topic), message.partition)
        reason = _text(self._client.rd_kafka_message_errstr(failed))
        error, offset = ck.KafkaError(message.error, reason), message.offset
        self._library.drain_go_on(self._drain)
        if is_end(tp, error):
            self._ends[tp] = offset

    def cut(self) -> Columns:
        records: dict[str, pa.RecordBatch] = {}
        next_: dict[TopicPartition, Position] = {}
        if self.rows:
            batch, topics, epochs = self._columns(self._drain.contents, self.rows)
            for pointer in set(topics[np.append(True, topics[1:] != topics[:-1])].tolist()):
                mine = np.flatnonzero(topics == pointer)
                topic = self._topic(pointer)
                records[topic] = batch if len(mine) == len(topics) else batch.take(pa.array(mine))
                next_ |= _behind(topic, records[topic], epochs[mine])
        for tp, end in self._ends.items():
            last = next_.get(tp, Position(0))
            next_[tp] = Position(max(last.offset, end), last.leader_epoch)
        self._begin()
        return records, next_

    @staticmethod
    def _columns(held: Any, n: int) -> tuple[pa.RecordBatch, Any, Any]:
        """The records of all topics, each one's topic (a pointer), and its leader epoch."""
        columns = [
            pa.array(_array(held.partitions, np.int32, n)),
            pa.array(_array(held.offsets, np.int64, n)),
            pa.array(_array(held.timestamps, np.int64, n)).cast(RECORDS.field("timestamp").type),
            _binary(held.keys, n),
            _binary(held.values, n),
            pa.nulls(n, RECORDS.field("headers").type),
        ]
        batch = pa.RecordBatch.from_arrays(columns, schema=RECORDS)
        return batch, _array(held.topics, np.uint64, n), _array(held.leader_epochs, np.int32, n)

    def end(self, tp: TopicPartition) -> int:
        low, high = c_int64(), c_int64(-1)
        self._client.rd_kafka_get_watermark_offsets(
            self._handle, tp.topic.encode(), tp.partition, ctypes.byref(low), ctypes.byref(high)
        )
        return high.value

    def acknowledge(self, positions: Mapping[TopicPartition, Position]) -> None:
        partitions = self._partitions(positions)
        self._client.rd_kafka_commit(self._handle, partitions, True)
        self._client.rd_kafka_topic_partition_list_destroy(partitions)

    def close(self) -> None:
        self._library.drain_free(self._drain)
        self._client.rd_kafka_queue_destroy(self._queue)
        self._client.rd_kafka_consumer_close(self._handle)
        self._client.rd_kafka_destroy(self._handle)

    def _topic(self, pointer: int) -> str:
        return _text(self._client.rd_kafka_topic_name(pointer)) if pointer else ""

    def _partitions(self, positions: Mapping[TopicPartition, Position]) -> int:
        made = self._client.rd_kafka_topic_partition_list_new(len(positions))
        for tp, position in positions.items():
            topic = tp.topic.encode()
            entry = self._client.rd_kafka_topic_partition_list_add(made, topic, tp.partition)
            self._client.rd_kafka_topic_partition_list_set_offset(made, topic, tp.partition, position.offset)
            if position.leader_epoch >= 0:
                self._client.rd_kafka_topic_partition_set_leader_epoch(entry, position.leader_epoch)
        return int(made)


def _text(told: bytes | None) -> str:
    return (told or b"").decode(errors="replace")


def _refused(told: Any) -> ck.KafkaException:
    return ck.KafkaException(ck.KafkaError(ck.KafkaError._INVALID_ARG, _text(told.value)))


def _array(address: int, type_: type[np.generic], n: int) -> Any:
    """A copy of `n` values at an address."""
    return np.frombuffer(ctypes.string_at(address, n * np.dtype(type_).itemsize), type_)


def _size(column: _Bytes, n: int) -> int:
    """Bytes in the first `n` rows."""
    return c_int32.from_address(column.ends + 4 * (n - 1)).value if n else 0


def _binary(column: _Bytes, n: int) -> pa.Array:
    """A copy of `n` rows of bytes as an Arrow array."""
    starts = pa.py_buffer(b"\0\0\0\0" + ctypes.string_at(column.ends, 4 * n))
    size = _size(column, n)
    data = pa.py_buffer(ctypes.string_at(column.data, size) if size else b"")
    valid = None
    if column.nulls:
        valid = pa.py_buffer(np.packbits(_array(column.valid, np.uint8, n), bitorder="little").tobytes())
    return pa.Array.from_buffers(pa.binary(), n, [valid, starts, data], null_count=column.nulls)


def _behind(topic: str, records: pa.RecordBatch, epochs: Any) -> dict[TopicPartition, Position]:
    """The position behind each partition's last record."""
    partitions, offsets = records.column("partition").to_numpy(), records.column("offset").to_numpy()
    last = np.append(np.flatnonzero(np.diff(partitions)), len(epochs) - 1)  # of each run of one partition
    rows = zip(partitions[last].tolist(), (offsets[last] + 1).tolist(), epochs[last].tolist(), strict=True)
    return {TopicPartition(topic, p): Position(offset, epoch) for p, offset, epoch in rows}
