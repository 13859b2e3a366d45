"""A TCP proxy before a broker that reads Kafka's requests, and delays or cuts those of some API keys.

Requests are length-prefixed, and begin with their API key; responses pass as they are, so the broker must
advertise the proxy's address.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

PRODUCE, INIT_PRODUCER_ID, ADD_PARTITIONS, ADD_OFFSETS, END_TXN, TXN_OFFSET_COMMIT = 0, 22, 24, 25, 26, 28
Rule = Callable[[int], float | None]
"""From an API key to the seconds that the request is held back; None cuts the connection instead."""


class Proxy:
    """Listens on a port of its own; ``rule`` may be set at any time.

    Attributes
    ----------
    seen, touched : Counter
        Requests by API key: all, and those that were delayed, cut or late.
    late : list of int
        API keys, each to be met once: the client's connection is cut, and the request, which was on its way
        already, arrives when `arrive` is set.
    arrived : Event
        The last late request has been answered.
    """

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        self.seen: Counter[int] = Counter()
        self.touched: Counter[int] = Counter()
        self.rule: Rule = lambda _key: 0.0
        self.late: list[int] = []
        self.arrive = threading.Event()
        self.arrived = threading.Event()
        self._target = target
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop listening, and drop every connection."""
        self._closed.set()
        for one in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                one.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
                broker = socket.create_connection(self._target)
            except OSError:
                continue
            self._sockets += [client, broker]
            for work in (self._requests, self._responses):
                threading.Thread(target=work, args=(client, broker), daemon=True).start()

    def _requests(self, client: socket.socket, broker: socket.socket) -> None:
        with contextlib.suppress(OSError), client, broker:
            while size := _exactly(client, 4):
                body = _exactly(client, struct.unpack(">i", size)[0])
                key = struct.unpack(">h", body[:2])[0]
                self.seen[key] += 1
                if key in self.late:
                    self.late.remove(key)
                    self._arrive_late(client, broker, size + body)
                    return
                delay = self.rule(key)
                if delay is None:
                    self.touched[key] += 1
                    return
                if delay:
                    self.touched[key] += 1
                    self._closed.wait(delay)
                broker.sendall(size + body)

    def _arrive_late(self, client: socket.socket, broker: socket.socket, request: bytes) -> None:
        self.touched[struct.unpack(">h", request[4:6])[0]] += 1
        client.shutdown(socket.SHUT_RDWR)
        self.arrive.wait(30)
        with socket.create_connection(self._target) as other:
            other.sendall(request)
            _exactly(other, struct.unpack(">i", _exactly(other, 4))[0])
        self.arrived.set()

    def _responses(self, client: socket.socket, broker: socket.socket) -> None:
        with contextlib.suppress(OSError), client, broker:
            while data := broker.recv(1 << 16):
                client.sendall(data)


def _exactly(source: socket.socket, count: int) -> bytes:
    """`count` bytes; none at the connection's end."""
    got = bytearray()
    while len(got) < count:
        part = source.recv(count - len(got))
        if not part:
            return b""
        got += part
    return bytes(got)
