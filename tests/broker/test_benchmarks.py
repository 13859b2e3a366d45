"""The benchmarks' harness, on few records: what it runs, checks and names."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import confluent_kafka as ck
import pytest

import kframe as kf
from benchmarks import restart
from benchmarks.data import Sums, expected
from benchmarks.measure import ProgramFailed, measure
from benchmarks.page import restart_table, throughput_table
from benchmarks.peers import NotInstalled, Peer, Run
from benchmarks.peers.by_hand import ByHand
from benchmarks.peers.with_kframe import Kframe
from benchmarks.throughput import run

pytestmark = [
    pytest.mark.broker,
    pytest.mark.skipif(sys.platform != "linux", reason="figures come from /proc"),
]
RECORDS = 20_000
SPEAKS = "from benchmarks import marks; marks.consuming(); marks.done('said')"


@dataclass
class Pretender:
    """A peer that reads nothing and claims sums."""

    claims: Sums
    missing: str = ""
    name: str = "pretender"
    jobs: tuple[str, ...] = ("land",)
    guarantee: str = "none"
    settings: str = ""

    def set_up(self) -> str:
        if self.missing:
            raise NotInstalled(self.missing)
        return "1"

    def command(self, run: Run) -> list[str]:
        return [sys.executable, "-c", SPEAKS]

    def sums(self, run: Run, said: str) -> Sums:
        assert said == "said"
        return self.claims


def test_kframe_and_the_script_give_the_expected_sums(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    """Kills: a pandas step that drops a row of each batch, a script that leaves out its last batch."""
    peers: list[Peer] = [Kframe(), ByHand(tuned=True)]
    rows = list(run(kafka, RECORDS, peers, scratch=tmp_path, rounds=1))
    jobs = [("kframe", job) for job in Kframe.jobs] + [("by hand, tuned client", job) for job in ByHand.jobs]
    assert [(row["peer"], row["job"]) for row in rows] == jobs
    for row in rows:
        assert row["problem"] == ""
        assert row["rate"] > row["rate_from_start"] > 0
        assert row["cpu_s"] > 0.1
        assert row["memory_mb"] > 50
    assert not list(tmp_path.iterdir())


def test_a_wrong_result_has_no_figures_and_an_absent_peer_is_named(
    kafka: kf.LocalKafka, tmp_path: Path
) -> None:
    """Kills: rates without a check, a peer that cannot be installed left out."""
    right = expected(RECORDS)
    peers = [Pretender(right), Pretender(right._replace(qty=right.qty + 1)), Pretender(right, "no compiler")]
    good, wrong, absent = run(kafka, RECORDS, peers, scratch=tmp_path, rounds=1)
    assert good["problem"] == ""
    assert (wrong["rate"], str(wrong["problem"])[:12]) == (0, "wrong result")
    assert absent["problem"] == "not installed: no compiler"
    table = throughput_table([good, wrong, absent])
    assert "not installed: no compiler" in table
    assert "wrong result" in table


def test_a_program_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    """Kills: a rate for a program that never said that it was done."""
    command = [sys.executable, "-c", "print('consuming'); raise SystemExit('out of luck')"]
    with pytest.raises(ProgramFailed, match="ended before 'done': out of luck"):
        measure(command, tmp_path)


class Forgetful(Kframe):
    """An instance whose tables lack an order."""

    def sums(self, run: Run, said: str) -> Sums:
        found = super().sums(run, said)
        return found._replace(records=found.records - 1)


def test_a_restart_is_measured_and_checked(
    kafka: kf.LocalKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: a takeover that ends with orders from before the kill; figures for a wrong result."""
    monkeypatch.setattr(restart, "STEADY_S", 1.0)
    good, wrong = restart.run(kafka, RECORDS, [Kframe(), Forgetful()], scratch=tmp_path, rounds=1)
    assert good["problem"] == ""
    assert good["rows"] == RECORDS
    assert 0 < float(str(good["restoring_s"])) < float(str(good["restore_s"]))
    assert float(str(good["takeover_s"])) > restart.SESSION_S - 2  # nobody notices a kill much sooner
    assert str(wrong["problem"]).startswith("AssertionError: wrong result")
    table = restart_table([good, wrong])
    assert f"| kframe | {good['version']} | 20,000 | {good['restoring_s']} |" in table
    assert "AssertionError: wrong result" in table
    assert not list(tmp_path.iterdir())


def test_orders_are_committed_when_their_skus_are_seen(
    kafka: kf.LocalKafka, make_topic: Callable[..., str]
) -> None:
    """Kills: an observer that counts what is not committed, or other orders than it was asked for."""
    topic = make_topic(2)
    keys = [b'["row","main","totals",{"sku":"sku-0001"}]', b"sku-0002"]
    with restart.Changelog(kafka.brokers, topic, 10) as changelog:
        producer = ck.Producer({"bootstrap.servers": kafka.brokers, "transactional.id": topic})
        producer.init_transactions(30)
        producer.begin_transaction()
        for partition, key in enumerate(keys):
            producer.produce(topic, b"", key, partition)
        producer.flush()
        with pytest.raises(TimeoutError, match="2 of 2 orders"):
            changelog.until(range(1, 3), timeout_s=1)
        producer.commit_transaction(30)
        changelog.until(range(11, 13))
        with pytest.raises(TimeoutError, match="1 of 3 orders"):
            changelog.until(range(1, 4), timeout_s=1)
