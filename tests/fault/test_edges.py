"""At every edge of the engine an exception, a KeyboardInterrupt and a SIGKILL: resume, and equality.

Kills: a fault that never fires; COMMIT after an error; ROLLBACK left out; positions remembered rather than
read back; positions and rows in two transactions.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf
from kframe.testing import (
    EDGES,
    Fault,
    Faults,
    InjectedFault,
    MemorySource,
    add,
    check,
    crash,
    play,
    resume,
    run,
)

N = 60
BATCH = 10
ROWS = [{"sku": f"s{i % 7}", "qty": i} for i in range(N)]


def log() -> MemorySource:
    """The same log in every process: two partitions, gaps, a tombstone and an undecodable record."""
    source = MemorySource()
    source.create("orders", 2)
    for i, row in enumerate(ROWS):
        source.append("orders", row, partition=i % 2, gap=3 if i % 10 == 0 else 0)
    source.append("orders", b"{", partition=0)
    source.append("orders", None, partition=1)
    return source


def shop(path: str | Path, at_edge: Faults) -> kf.Pipeline:
    pipeline = kf.Pipeline(path, source=log(), batch_rows_max=BATCH, at_edge=at_edge)
    pipeline.topic("orders", schema={"sku": "str", "qty": "int64"}, include=["partition", "offset"])
    pipeline.land("orders")
    pipeline.table("latest", key="sku")(lambda orders: orders[["sku", "qty"]])
    pipeline.aggregate("sold", source="orders", by="sku", n=("qty", "count"), total=("qty", "sum"))
    # one id for the topic in every process
    assert pipeline._source is not None
    pipeline._source._ids["orders"] = "same"  # type: ignore[attr-defined]
    return pipeline


def tables(path: Path) -> dict[str, pd.DataFrame]:
    with shop(path, Faults()) as pipeline:
        pipeline.run(progress=False)
        assert len(pipeline.dead_letters()) == 1
        batches = pipeline.batches(100)
        assert sorted(batches["batch_id"]) == list(range(len(batches)))
        assert batches["rows"].sum() == N + 2
        return {t: pipeline.read(t).sort_values(c, ignore_index=True) for t, c in SORT.items()}


SORT = {"orders": ["_partition", "_offset"], "latest": ["sku"], "sold": ["sku"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    expected = tables(tmp_path_factory.mktemp("undisturbed") / "shop.duckdb")
    assert len(expected["orders"]) == N
    assert expected["sold"]["total"].sum() == sum(r["qty"] for r in ROWS)
    return expected


def assert_equal(got: dict[str, pd.DataFrame], expected: dict[str, pd.DataFrame]) -> None:
    for name, frame in expected.items():
        pd.testing.assert_frame_equal(got[name], frame, check_like=True, obj=name)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("kind", ["exception", "interrupt"])
@pytest.mark.parametrize("edge", EDGES)
def test_a_raise_at_an_edge(
    edge: str, kind: str, at: int, tmp_path: Path, undisturbed: dict[str, pd.DataFrame]
) -> None:
    faults = Faults(Fault(edge, kind, at))
    with (
        shop(tmp_path / "shop.duckdb", faults) as pipeline,
        pytest.raises(KeyboardInterrupt if kind == "interrupt" else InjectedFault),
    ):
        pipeline.run(progress=False)
    assert faults.fired == [Fault(edge, kind, at)]
    assert_equal(tables(tmp_path / "shop.duckdb"), undisturbed)


@pytest.mark.parametrize("edge", EDGES)
def test_a_raise_at_an_edge_then_the_same_object_again(
    edge: str, tmp_path: Path, undisturbed: dict[str, pd.DataFrame]
) -> None:
    """Kills: what a rolled-back batch changed in memory (positions, batch ids) kept for the next."""
    faults = Faults(Fault(edge, at=2))
    with shop(tmp_path / "shop.duckdb", faults) as pipeline:
        with pytest.raises(InjectedFault):
            pipeline.run(progress=False)
        pipeline.run(progress=False)
    assert faults.fired == [Fault(edge, at=2)]
    assert_equal(tables(tmp_path / "shop.duckdb"), undisturbed)


@pytest.mark.parametrize("edge", EDGES)
def test_sigkill_at_an_edge(edge: str, tmp_path: Path, undisturbed: dict[str, pd.DataFrame]) -> None:
    path = tmp_path / "shop.duckdb"
    child = subprocess.run([sys.executable, __file__, str(path), edge, "2"], check=False, timeout=60)
    assert child.returncode == -signal.SIGKILL, f"the fault at {edge} never fired"
    assert_equal(tables(path), undisturbed)


def test_a_script_of_crashes() -> None:
    def define(pipeline: kf.Pipeline) -> None:
        pipeline.topic("orders", schema={"sku": "str", "qty": "int64"})
        pipeline.aggregate("sold", source="orders", by="sku", n=("qty", "sum"))

    a, b = {"sku": "a", "qty": 1}, {"sku": "b", "qty": 2}
    script = [
        add("orders", a, b, a),
        crash("rows_written", at=2),
        resume(),
        add("orders", a),
        crash("committed", "interrupt"),
        resume(),
        check("sold", [{"sku": "a", "n": 3}, {"sku": "b", "n": 2}]),
    ]
    play(script, define, batch_rows_max=1)
    with pytest.raises(AssertionError, match=r"(?m)^=> check\('sold', \[\]\)"):
        play([add("orders", a), run(), check("sold", [])], define)
    with pytest.raises(AssertionError, match=r"no crash[^=]*\n=> crash\('begun', 'exception', at=9\)"):
        play([add("orders", a), crash("begun", at=9)], define)


if __name__ == "__main__":
    database, where, nth = sys.argv[1:]
    shop(database, Faults(Fault(where, "kill", int(nth)))).run(progress=False)
