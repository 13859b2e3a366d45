"""`kf.local_kafka`: its life, its data, and what it says when Kafka cannot be had."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf
from kframe import kafka_jars
from kframe.errors import LocalKafkaError

ROWS = pd.DataFrame({"a": [1, 2, 3]})


def ended(pid: int) -> bool:
    """Whether the process is gone, or only waits for its parent to be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until_ended(pid: int, seconds: float = 20.0) -> bool:
    wait = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if ended(pid):
            return True
        wait.wait(0.05)
    return False


@pytest.fixture(scope="module")
def jars() -> Path:
    try:
        return kafka_jars.kafka_jars(progress=False)
    except LocalKafkaError as error:
        pytest.skip(f"no local Kafka: {error}")


@pytest.mark.usefixtures("jars")
def test_two_side_by_side_keep_apart_and_a_restart_keeps_the_data(tmp_path: Path) -> None:
    with kf.local_kafka(tmp_path / "one") as one, kf.local_kafka() as two:
        assert one.brokers != two.brokers
        assert one.brokers.startswith("127.0.0.1:")
        assert one.pid != two.pid
        one.create_topic("t")
        kf.write(ROWS, "t", brokers=one.brokers)
        with pytest.raises(kf.errors.ConfigError, match="does not exist"):
            kf.read("t", brokers=two.brokers)
        one.kill()
        one.restart()
        assert kf.read("t", brokers=one.brokers)["a"].tolist() == [1, 2, 3]
        folder, pids = two.folder, (one.pid, two.pid)
    assert all(pid is not None and ended(pid) for pid in pids)
    assert folder is not None
    assert not folder.exists(), "a temporary folder goes with its broker"
    with kf.local_kafka(tmp_path / "one") as again:
        assert kf.read("t", brokers=again.brokers)["a"].tolist() == [1, 2, 3]


@pytest.mark.usefixtures("jars")
def test_the_broker_ends_with_an_owner_who_is_killed() -> None:
    script = "import kframe as kf, sys; k = kf.local_kafka(); print(k.pid, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        assert not ended(pid)
        os.kill(owner.pid, signal.SIGKILL)
    assert until_ended(pid), "Java outlived its owner"


def test_a_kafka_that_already_runs_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFRAME_BOOTSTRAP", "kafka.example:9092")
    with kf.local_kafka() as kafka:
        assert kafka.brokers == "kafka.example:9092"
        assert kafka.pid is None
        with pytest.raises(LocalKafkaError, match="was not started by kframe"):
            kafka.restart()


def test_a_damaged_jar_is_fetched_again_and_a_false_one_refused(
    jars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: trusting a file by its name."""
    monkeypatch.setenv("KFRAME_CACHE", str(tmp_path))
    mine = tmp_path / jars.name
    shutil.copytree(jars, mine)
    victim = min(kafka_jars.pinned(), key=lambda jar: (jars / jar.file).stat().st_size)
    genuine = (jars / victim.file).read_bytes()
    served = {"body": genuine}
    asked: list[str] = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(served["body"])

        def log_message(self, *_: object) -> None:
            pass

    mirror = HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=mirror.serve_forever, daemon=True).start()
    try:
        monkeypatch.setenv("KFRAME_MAVEN", f"http://127.0.0.1:{mirror.server_port}")
        (mine / victim.file).write_bytes(genuine[:-1])
        assert kafka_jars.kafka_jars(progress=False) == mine
        assert asked == [f"/{victim.path}"]
        assert (mine / victim.file).read_bytes() == genuine

        (mine / victim.file).unlink()
        served["body"] = b"something else"
        with pytest.raises(LocalKafkaError, match="another SHA-256"):
            kafka_jars.kafka_jars(progress=False)
        assert not (mine / victim.file).exists()
    finally:
        mirror.shutdown()
        mirror.server_close()


def test_nobody_serves_the_jars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFRAME_CACHE", str(tmp_path))
    monkeypatch.setenv("KFRAME_MAVEN", "http://127.0.0.1:9")
    with pytest.raises(LocalKafkaError, match="cannot be fetched") as raised:
        kf.local_kafka(progress=False)
    assert "KFRAME_BOOTSTRAP" in raised.value.hint
    assert "KFRAME_MAVEN" in raised.value.hint


@pytest.mark.usefixtures("jars")
def test_a_setting_that_kafka_refuses_shows_the_end_of_its_log(tmp_path: Path) -> None:
    with pytest.raises(LocalKafkaError, match=r"num\.io\.threads"):
        kf.local_kafka(tmp_path / "k", config={"num.io.threads": "many"}, progress=False)
