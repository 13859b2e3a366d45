"""Several brokers, each a voter of the quorum too, so that a minority of them may be killed."""

from __future__ import annotations

import base64
import socket
import subprocess
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from confluent_kafka.admin import AdminClient, NewTopic

from kframe.broker import LocalKafka, _java, _write_config
from kframe.kafka_jars import kafka_jars

REPLICAS = ("default.replication.factor", "offsets.topic.replication.factor")
REPLICAS += ("transaction.state.log.replication.factor",)
MAJORITY = ("min.insync.replicas", "transaction.state.log.min.isr")
CONFIG = {
    "offsets.topic.num.partitions": 1,  # one leader coordinates all groups
    "transaction.state.log.num.partitions": 1,  # and one all transactions
    "broker.session.timeout.ms": 2000,
    "broker.heartbeat.interval.ms": 500,
}


class Cluster:
    """Brokers that keep their data under `folder`; leaving the ``with`` block stops them.

    Parameters
    ----------
    folder : Path
    nodes : int
        How many; each partition has a replica on every one.
    host : str
        The address at which they listen.

    Attributes
    ----------
    brokers : str
        All of them, for ``bootstrap.servers``.
    """

    def __init__(self, folder: Path, nodes: int = 3, host: str = "127.0.0.1", **config: Any) -> None:
        self._host = host
        self._ports = {node: (_free_port(), _free_port()) for node in range(1, nodes + 1)}
        self._id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "x", 1)
        replicated = dict.fromkeys(REPLICAS, nodes) | dict.fromkeys(MAJORITY, nodes // 2 + 1)
        self._config = {**CONFIG, **replicated, **config}
        self.brokers = ",".join(f"{host}:{port}" for port, _ in self._ports.values())
        self._admin = AdminClient({"bootstrap.servers": self.brokers, "log_level": 0})
        self._nodes = {node: self._node(folder / str(node), node) for node in self._ports}

    def __enter__(self) -> Cluster:
        try:
            self._all(LocalKafka.restart)
        except BaseException:
            self._all(LocalKafka.stop)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._all(LocalKafka.stop)

    def create_topic(self, name: str, partitions: int) -> str:
        self._admin.create_topics([NewTopic(name, num_partitions=partitions)])[name].result(30)
        return name

    def leader(self, topic: str) -> int:
        """The node that leads the topic's first partition; -1 when none does."""
        return int(self._admin.list_topics(timeout=10).topics[topic].partitions[0].leader)

    def in_sync(self) -> bool:
        """Whether every partition has all of its replicas."""
        topics = self._admin.list_topics(timeout=10).topics.values()
        return all(len(p.isrs) == len(self._nodes) for topic in topics for p in topic.partitions.values())

    def kill(self, node: int) -> None:
        """SIGKILL."""
        self._nodes[node].kill()

    def restart(self, node: int) -> None:
        """After `kill`."""
        self._nodes[node].restart()

    def _all(self, call: Callable[[LocalKafka], None]) -> None:
        """At once: none is ready before another is."""
        with ThreadPoolExecutor(len(self._nodes)) as pool:
            list(pool.map(call, self._nodes.values()))

    def _node(self, home: Path, node: int) -> LocalKafka:
        home.mkdir(parents=True)
        voters = ",".join(f"{n}@127.0.0.1:{port}" for n, (_, port) in self._ports.items())
        port, controller = self._ports[node]
        own = {
            "node.id": node,
            "controller.quorum.voters": voters,
            "listeners": f"PLAINTEXT://{self._host}:{port},CONTROLLER://127.0.0.1:{controller}",
            "advertised.listeners": f"PLAINTEXT://{self._host}:{port}",
        }
        properties = _write_config(home, self._ports[node], {**self._config, **own})
        jvm = [_java(), "-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        jvm += [f"-Dlog4j2.configurationFile={home / 'log4j2.yaml'}"]
        jvm += ["-cp", str(kafka_jars(progress=False) / "*")]
        formatted = [*jvm, "kafka.tools.StorageTool", "format", "-t", self._id, "-c", str(properties)]
        subprocess.run(formatted, check=True, capture_output=True, timeout=60)
        command = [*jvm, "kafka.Kafka", str(properties)]
        return LocalKafka(f"{self._host}:{port}", folder=home, command=command)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
