"""The benchmarks' harness, on few records: what it runs, checks and names."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import kframe as kf
from benchmarks.data import Sums, expected
from benchmarks.measure import ProgramFailed, measure
from benchmarks.page import throughput_table
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
