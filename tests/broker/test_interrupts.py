"""Ctrl-C (SIGINT) in a process of its own, amid the work: what it says, and what works after it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf

pytestmark = pytest.mark.broker
MakeTopic = Callable[..., str]

BEGIN = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with &
import pandas as pd
import kframe as kf
import kframe.rebuild, kframe.standalone
topic, brokers = sys.argv[1], os.environ["BROKERS"]

kept = []

def now():
    print("now", flush=True)

class Bar(kframe.standalone.tqdm):
    def update(self, n=1):
        super().update(n)
        now()
        threading.Event().wait(30)

def interrupted(call):
    try:
        call()
    except KeyboardInterrupt as error:
        print("|".join(error.__notes__), flush=True)
        kept.append(error)  # as a notebook keeps it, for its debugger
        return
    sys.exit("it was not interrupted")

def threads():
    return sorted(t.name for t in threading.enumerate() if t is not threading.main_thread())
"""

SHOP = """
shop = kf.Pipeline("shop.duckdb", brokers=brokers)
shop.topic(topic, schema={"n": "int64"})
slow = threading.Event()

@shop.table("rows", inputs=[topic])
def rows(batch):
    if slow.is_set():
        now()
        threading.Event().wait(30)
    return batch
"""


def interrupt(kafka: kf.LocalKafka, folder: Path, topic: str, script: str) -> list[str]:
    """Run a script, send SIGINT whenever it prints ``now``, and return the other lines it printed."""
    (folder / "script.py").write_text(BEGIN + script)
    process = subprocess.Popen(
        [sys.executable, "script.py", topic],
        cwd=folder,
        env={**os.environ, "BROKERS": kafka.brokers},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    told = []
    for line in process.stdout:
        if line == "now\n":
            process.send_signal(signal.SIGINT)
        else:
            told.append(line.rstrip("\n"))
    errors = process.stderr.read()
    assert process.wait(60) == 0, errors
    return told


@pytest.fixture
def topic(kafka: kf.LocalKafka, make_topic: MakeTopic) -> str:
    name = make_topic(2)
    kf.write(pd.DataFrame({"n": range(1000)}), name, brokers=kafka.brokers, progress=False)
    return name


def test_a_read_that_is_interrupted_leaves_no_thread_and_no_client(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: the fetching thread and its consumer, kept alive by the error's traceback."""
    script = """
kframe.standalone.tqdm, tqdm = Bar, kframe.standalone.tqdm
made, make = [], kframe.standalone._source
kframe.standalone._source = lambda *given: made.append(make(*given)) or made[-1]
interrupted(lambda: kf.read(topic, brokers=brokers, schema={"n": "int64"}))
print([name for name in threads() if "kframe" in name], [source._reader for source in made])
kframe.standalone.tqdm = tqdm
print(len(kf.read(topic, brokers=brokers, schema={"n": "int64"}, progress=False)))
"""
    told = interrupt(kafka, tmp_path, topic, script)
    assert told == [
        "kframe: interrupted; nothing is kept of what was read, and no position anywhere.",
        "[] [None]",
        "1000",
    ]


def test_a_look_that_is_interrupted(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    script = """
infer = kframe.standalone.infer_schema
def slow(*given):
    now()
    threading.Event().wait(30)
kframe.standalone.infer_schema = slow
interrupted(lambda: kf.peek(topic, brokers=brokers))
kframe.standalone.infer_schema = infer
print(len(kf.peek(topic, brokers=brokers, n=4).frame))
"""
    told = interrupt(kafka, tmp_path, topic, script)
    assert told == ["kframe: interrupted; the look has ended; no position is kept anywhere.", "4"]


@pytest.mark.parametrize("transactional", [True, False])
def test_a_write_that_is_interrupted_says_how_much_is_there(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path, transactional: bool
) -> None:
    """Kills: a transaction left open, a count that is not the topic's, rows that are sent afterwards."""
    topic = make_topic()
    script = f"""
kframe.standalone.tqdm = Bar
interrupted(lambda: kf.write(
    pd.DataFrame({{"n": range(120_000)}}), topic, brokers=brokers, transactional={transactional}
))
"""
    told = interrupt(kafka, tmp_path, topic, script)
    there = len(kf.read(topic, brokers=kafka.brokers, schema={"n": "int64"}, progress=False))
    if transactional:
        assert there == 0
        assert told == [
            f"kframe: interrupted; the transaction was rolled back: nothing of it is visible in {topic!r}."
        ]
    else:
        assert told == [f"kframe: interrupted; {there:,} of 120,000 rows are in {topic!r}."]
        assert there < 120_000
    rows = pd.DataFrame({"n": [-1]})
    assert kf.write(rows, topic, brokers=kafka.brokers, transactional=True, progress=False) == 1
    assert len(kf.read(topic, brokers=kafka.brokers, schema={"n": "int64"}, progress=False)) == there + 1


def test_a_write_without_a_broker_can_be_interrupted(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    """Kills: a wait inside the client that holds Ctrl-C back for a minute."""
    script = """
def press():
    began.append(time.monotonic())
    now()

began = []
threading.Timer(1, press).start()
config = {"log_level": 0}
rows = pd.DataFrame({"n": [1]})
interrupted(lambda: kf.write(rows, topic, brokers="127.0.0.1:1", transactional=True, kafka_config=config))
print(time.monotonic() - began[0] < 30)
"""
    told = interrupt(kafka, tmp_path, "nowhere", script)
    assert "the transaction was rolled back" in told[0]
    assert told[1] == "True"


def test_a_run_a_preview_and_a_rebuild_that_are_interrupted(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: a shadow that stays behind, a table half rebuilt, a connection that no longer answers."""
    script = (
        SHOP
        + """
slow.set()
interrupted(shop.run)
slow.clear()
print(shop.run(progress=False).rows, len(shop.read("rows")))
slow.set()
interrupted(lambda: shop.preview("rows"))
interrupted(lambda: shop.rebuild("rows"))
slow.clear()
print(sorted(name for name in os.listdir(".") if "rebuild" in name), len(shop.read("rows")))
print([name for name in threads() if "kframe" in name])
print(shop.rebuild("rows", progress=False), len(shop.preview("rows", n=5)), len(shop.replay(0)))
"""
    )
    told = interrupt(kafka, tmp_path, topic, script)
    assert "a running one was rolled back" in told[0]
    assert told[1:] == [
        "1000 1000",
        "kframe: interrupted; the preview has ended; previews commit nothing.",
        "kframe: interrupted; the rebuild was given up: 'rows' is as it was.",
        "[] 1000",
        "[]",
        "1000 5 1000",
    ]


def test_a_rebuild_that_is_interrupted_while_it_commits_has_finished(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: a rebuild that is in place, and said to be given up."""
    script = (
        SHOP
        + """
shop.run(progress=False)
prepare = kframe.rebuild.prepare
def slow_prepare(*given):
    now()
    threading.Event().wait(1)
    prepare(*given)
kframe.rebuild.prepare = slow_prepare
interrupted(lambda: shop.rebuild("rows", progress=False))
print(len(shop.read("rows")))
"""
    )
    told = interrupt(kafka, tmp_path, topic, script)
    assert told == ["kframe: interrupted; the rebuild had finished: 'rows' is the new one.", "1000"]


def test_a_replay_and_a_wait_that_are_interrupted(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    script = (
        SHOP
        + """
import kframe.pipeline.exploring as exploring
shop.run(progress=False)
read = exploring.read_ranges
def slow_read(*given):
    read(*given)
    now()
    threading.Event().wait(30)
exploring.read_ranges = slow_read
interrupted(lambda: shop.replay(0))
exploring.read_ranges = read
print(len(shop.replay(0)))
shop.start()
threading.Timer(0.2, now).start()
interrupted(shop.wait)
print(shop.status().state)
shop.stop()
print(shop.status().state)
"""
    )
    told = interrupt(kafka, tmp_path, topic, script)
    assert told == [
        "kframe: interrupted; the replay has ended; nothing was changed.",
        "1000",
        "kframe: interrupted; the pipeline goes on in the background; stop() ends it.",
        "running",
        "stopped",
    ]
