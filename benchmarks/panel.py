"""What a live panel costs: the kernel's CPU while numbers move at 4 Hz, and bytes sent when nothing moves.

    python benchmarks/panel.py [--seconds 30] [--partitions 100]

A real kernel runs a pipeline whose log gets records twenty times a second, so that every look of the panel
finds something new. CPU is that of the threads which draw the panel and send the kernel's output, as Linux
counts it; the whole process's would tell more of the pipeline than of the panel. Bytes are those on the
kernel's output socket, in all frames.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter

from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel

DEFINE = """
import threading, time
import kframe as kf
from kframe.testing import MemorySource
log = MemorySource()
log.create("orders", {partitions})
shop = kf.Pipeline({path!r}, source=log, commit_interval_ms=20)
shop.topic("orders", schema={{"n": "int64"}})
shop.table("seen", inputs=["orders"])(lambda orders: orders.iloc[:0])
fed = threading.Event()
def feed():
    n = 0
    while True:
        if fed.is_set():
            at = n % {partitions}
            log.expire("orders", log.append("orders", {{"n": n}}, partition=at), partition=at)
            n += 1
        time.sleep(0.05)
threading.Thread(target=feed, daemon=True).start()
shop.start()
def drawing():
    threads = [t.native_id for t in threading.enumerate() if t.name in ("kframe-panel", "IOPub")]
    return sum(int(open(f"/proc/self/task/{{id}}/schedstat").read().split()[0]) for id in threads) / 1e9
"""


def main() -> None:
    """Run the measurement and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--partitions", type=int, default=100)
    args = parser.parse_args()
    manager, client = start_new_kernel()
    try:
        with tempfile.TemporaryDirectory() as folder:
            tell(client, DEFINE.format(path=f"{folder}/p.duckdb", partitions=args.partitions))
            tell(client, "fed.set()")
            tell(client, "shop")
            busy = measure(client, args.seconds)
            tell(client, "fed.clear()")
            measure(client, 75)  # until the last minute's rates have faded
            idle = measure(client, args.seconds)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    each = busy["bytes"] / max(busy["updates"], 1) / 1024
    hour = idle["bytes"] * 3600 / args.seconds / 1024
    print(f"{args.partitions} partitions, {args.seconds:.0f} s each")
    updates = busy["updates"] / args.seconds
    print(f"busy  {updates:.2f} updates/s of {each:.1f} KiB; {busy['cpu_s'] / args.seconds:.2%} of a core")
    print(f"idle  {idle['updates'] / args.seconds:.2f} updates/s, {hour:,.0f} KiB an hour")


def measure(client: BlockingKernelClient, seconds: float) -> dict[str, float]:
    """CPU seconds of drawing and sending, and messages and bytes that it sent unasked, over a time."""
    began = float(tell(client, "print(drawing())"))
    seen: Counter[str] = Counter()
    socket = client.iopub_channel.socket
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if socket.poll(left * 1000):
            frames = socket.recv_multipart()
            seen["bytes"] += sum(map(len, frames))
            seen["updates"] += b'"comm_msg"' in b"".join(frames)
    return {"updates": 0, "bytes": 0, **seen, "cpu_s": float(tell(client, "print(drawing())")) - began}


def tell(client: BlockingKernelClient, code: str) -> str:
    """Run a cell; what it printed."""
    printed: list[str] = []

    def see(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        assert message["msg_type"] != "error", "\n".join(content["traceback"])
        if message["msg_type"] == "stream":
            printed.append(content["text"])

    client.execute_interactive(code, timeout=60, output_hook=see)
    return "".join(printed)


if __name__ == "__main__":
    main()
