"""Instances on hosts of their own, whose cables are pulled: another takes over, the one cut off gives way.

Kills: an instance that cannot reach the brokers and goes on publishing when it can again; one that waits for
them for ever; a batch that was in flight when the cable was pulled, published twice or never.
"""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from kframe.testing import Fault
from tests.broker.cluster import Cluster
from tests.broker.hosts import Hosts, enter
from tests.broker.test_takeover import (
    PROTOCOLS,
    Feeder,
    Instance,
    check_output,
    check_tables,
    serve,
    until,
)

pytestmark = pytest.mark.broker

CUTS = 4
QUICK = {"group.min.session.timeout.ms": 500}


def serve_on(told: Any, fault: list[Fault], path: str, host: str, *where: Any) -> None:
    enter(host)
    serve(told, fault, path, *where)


def cut_off_and_back(hosts: Hosts, members: dict[str, Instance], feeder: Feeder) -> None:
    """Cut the active one off until another has read on, and a little longer."""
    until(lambda: any(m.active and m.said[1] for m in members.values()), lambda: f"{members}")
    name = next(name for name, m in members.items() if m.active)
    other = next(m for m in members.values() if m is not members[name])
    hosts.cut(name)
    began, at = time.monotonic(), feeder.written
    until(lambda: other.active and other.said[1] > at, lambda: f"{members}")
    print(f"\n{other.file.name} took over {time.monotonic() - began:.1f} s after {name} was cut off")
    threading.Event().wait(1.0)
    hosts.mend(name)
    until(lambda: not members[name].active, lambda: f"{members}")


def test_the_active_one_cut_off(tmp_path: Path) -> None:
    with Hosts("ab") as hosts, Cluster(tmp_path / "kafka", 1, hosts.gateway, **QUICK) as kafka:
        topic = kafka.create_topic("orders", 3)
        kafka.create_topic(f"{topic}-out", 3)
        where = (kafka.brokers, topic, PROTOCOLS["classic"])
        feeder = Feeder(kafka, topic)
        feeder.start()
        members = {
            name: Instance(tmp_path / f"{name}.duckdb", (hosts.namespace(name), *where), process=serve_on)
            for name in "ab"
        }
        instances = members.values()
        try:
            for _ in range(CUTS):
                cut_off_and_back(hosts, members, feeder)
            records = feeder.end()
            until(lambda: any(m.active and m.said[1] == records for m in instances), lambda: f"{members}")
            for member in instances:
                member.send(signal.SIGTERM)
            until(lambda: all(m.process.exitcode == 0 for m in instances), lambda: f"{members}")
        finally:
            feeder.end()
            for member in instances:
                member.kill()
        for member in instances:
            check_tables(member.file, records, *where)
        check_output(kafka, f"{topic}-out", records)
