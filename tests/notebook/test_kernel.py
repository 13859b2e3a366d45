"""Pipelines in a real notebook kernel: interrupts, re-run cells, a second kernel, quiet threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

DEFINE = """
import threading
import kframe as kf
from kframe.testing import MemorySource
log = MemorySource({{"orders": [{{"n": i}} for i in range(10)]}})
shop = kf.Pipeline({path!r}, source=log, commit_interval_ms=20)
shop.topic("orders", schema={{"n": "int64"}})
shop.land("orders", table="rows")
"""

Kernel = tuple[KernelManager, BlockingKernelClient]


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run(kernel: Kernel, code: str, *, interrupt_at: str | None = None) -> tuple[str, str]:
    """Run a cell; what it printed and the name of its error. Interrupts when `interrupt_at` is printed."""
    manager, client = kernel
    printed: list[str] = []

    def see(message: dict[str, object]) -> None:
        content = message["content"]
        assert isinstance(content, dict)
        if message["msg_type"] == "stream":
            printed.append(content["text"])
            if interrupt_at is not None and interrupt_at in content["text"]:
                manager.interrupt_kernel()
        elif message["msg_type"] == "error":
            printed.append("\n".join(content["traceback"]))

    reply = client.execute_interactive(code, timeout=60, output_hook=see)
    return "".join(printed), reply["content"].get("ename", "")


def test_the_stop_button_during_run_rolls_back_and_leaves_a_usable_pipeline(
    kernel: Kernel, tmp_path: Path
) -> None:
    """Kills: a connection broken by the interrupt, or a batch half written."""
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    slow = """
@shop.table("slow", inputs=["orders"])
def slow(batch):
    print("inside", flush=True)
    threading.Event().wait(30)
    return batch
shop.run()
"""
    told, error = run(kernel, slow, interrupt_at="inside")
    assert error == "KeyboardInterrupt"
    assert "rolled back" in told
    again = """
shop.table("slow", inputs=["orders"])(lambda batch: batch)
print(shop.run().rows, len(shop.read("slow")))
"""
    assert run(kernel, again) == ("10 10\n", "")


def test_the_stop_button_during_wait_and_sql(kernel: Kernel, tmp_path: Path) -> None:
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    run(kernel, "shop.start()")
    _, error = run(kernel, "print('waiting', flush=True)\nshop.wait()", interrupt_at="waiting")
    assert error == "KeyboardInterrupt"
    long = """
print("asking", flush=True)
shop.sql("SELECT count(*) FROM range(100_000_000_000) a WHERE hash(a.range) = 1")
"""
    _, error = run(kernel, long, interrupt_at="asking")
    assert error == "KeyboardInterrupt"
    told = run(kernel, "print(shop.status().state, len(shop.read('rows')))\nshop.stop()")
    assert told == ("running 10\n", "")


def test_a_cell_that_runs_again_stops_the_old_run(kernel: Kernel, tmp_path: Path) -> None:
    cell = DEFINE.format(path=str(tmp_path / "p.duckdb")) + "shop.start()\n"
    run(kernel, cell + "first = shop")
    told = run(kernel, cell + "print(first.status().state, shop.status().state in ('new', 'running'))")
    assert told == ("stopped True\n", "")


def test_a_second_kernel_is_told_who_has_the_file(kernel: Kernel, tmp_path: Path) -> None:
    cell = DEFINE.format(path=str(tmp_path / "p.duckdb"))
    assert run(kernel, cell)[1] == ""
    manager, client = start_new_kernel()
    try:
        told, error = run((manager, client), cell)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert error == "StoreLocked"
    assert "notebook kernel" in told
    assert f"PID {run(kernel, 'import os; print(os.getpid())')[0].strip()}" in told


def test_a_background_run_prints_into_no_cell(kernel: Kernel, tmp_path: Path) -> None:
    """Kills: a print or a traceback from the thread."""
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    failing = """
shop.table("broken", inputs=["orders"])(lambda batch: batch.nothing)
shop.start()
ended = shop._run.ended.wait(20)
"""
    assert run(kernel, failing) == ("", "")
    told, error = run(kernel, "shop.wait()")
    assert error == "StepError"
    assert "Step 'broken' raised AttributeError" in told


def test_the_stop_button_while_exploring_says_what_was_kept(kernel: Kernel, tmp_path: Path) -> None:
    """Kills: a preview, a rebuild or a replay that takes the pipeline's source or file with it."""
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    slow = """
slow = threading.Event()

@shop.table("slow", inputs=["orders"])
def slowly(batch):
    if slow.is_set():
        print("inside", flush=True)
        threading.Event().wait(30)
    return batch

shop.run()
slow.set()
"""
    run(kernel, slow)
    told, error = run(kernel, "shop.preview('slow', n=3)", interrupt_at="inside")
    assert error == "KeyboardInterrupt"
    assert "previews commit nothing" in told
    told, error = run(kernel, "shop.rebuild('slow')", interrupt_at="inside")
    assert error == "KeyboardInterrupt"
    assert "'slow' is as it was" in told
    again = """
slow.clear()
print(len(shop.read('slow')), shop.rebuild('slow'), len(shop.preview('slow', n=3)), len(shop.replay(0)))
"""
    told = run(kernel, again)
    assert told[0].splitlines()[-1] == "10 10 3 10"
    assert told[1] == ""


@pytest.mark.parametrize(
    ("at", "call", "told", "state"),
    [
        (
            "kframe.commit.store.shutil.move",
            "shop.compact()",
            "the file is as it was",
            "10 [1] 10",
        ),
        ("kframe.commit.store._connect", "shop.compact()", "the file has been written anew", "10 [1] 10"),
        (
            "kframe.pipeline.declaring.from_pandas",
            "shop.side_table('side', pd.DataFrame({'a': [2]}))",
            "the table 'side' was not changed",
            "10 [1] 10",
        ),
        (
            "kframe.pipeline.declaring.quote",
            "shop.side_table('side', pd.DataFrame({'a': [2]}))",
            "the table 'side' holds the new rows",
            "10 [2] 10",
        ),
        ("shop.stop", "shop.rewind()", "nothing was rewound", "10 [1] 10"),
        ("kframe.pipeline.drop", "shop.rewind()", "moved back to before the first record", "0 [1] 0"),
    ],
    ids=[
        "compact, before",
        "compact, amid",
        "side table, before",
        "side table, amid",
        "rewind, before",
        "rewind, amid",
    ],
)
def test_the_stop_button_while_the_file_changes_says_what_holds(
    kernel: Kernel, tmp_path: Path, at: str, call: str, told: str, state: str
) -> None:
    """Kills: a file without its connection; a note that tells the opposite of what the file holds."""
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    where, name = at.rsplit(".", 1)
    ready = f"""
import pandas as pd
import kframe.commit.store, kframe.pipeline.declaring
shop.side_table("side", pd.DataFrame({{"a": [1]}}))
shop.run(progress=False)
real = {at}
def slow(*arguments, **options):
    print("inside", flush=True)
    threading.Event().wait(1)
    return real(*arguments, **options)
{where}.{name} = slow
"""
    assert run(kernel, ready)[1] == ""
    said, error = run(kernel, call, interrupt_at="inside")
    assert error == "KeyboardInterrupt"
    assert told in said
    look = f"""
{where}.{name} = real
try:
    rows = len(shop.read("rows"))
except kf.errors.KframeError:
    rows = 0
print(rows, shop.read("side").a.tolist(), sum(shop.status().positions.values()))
print(shop.run(progress=False).rows + rows)
"""
    assert run(kernel, look) == (f"{state}\n10\n", "")


def test_a_second_stop_while_the_first_is_at_work_still_ends_the_run(kernel: Kernel, tmp_path: Path) -> None:
    """Kills: a source that stays open, and a run that never ends, when the clean-up is interrupted."""
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    slow = """
close = log.close
def slow_close():
    print("closing", flush=True)
    ended.wait(1)
    close()
    closed.set()
closed, ended = threading.Event(), threading.Event()
log.close = slow_close
shop.table("broken", inputs=["orders"])(lambda batch: batch.nothing)
shop.run(progress=False)
"""
    assert run(kernel, slow, interrupt_at="closing")[1] == "KeyboardInterrupt"
    told = run(kernel, "print(closed.is_set(), shop._run.ended.is_set(), shop.status().state)")
    assert told == ("True True failed\n", "")


def test_long_work_shows_the_notebooks_bar(kernel: Kernel, tmp_path: Path) -> None:
    """Kills: a bar that is silent in a notebook, where the output is no terminal."""
    pytest.importorskip("ipywidgets")
    run(kernel, DEFINE.format(path=str(tmp_path / "p.duckdb")))
    for call in ("shop.run()", "shop.rebuild('rows')"):
        shown: list[str] = []

        def see(message: dict[str, Any], shown: list[str] = shown) -> None:
            if message["msg_type"] == "display_data":
                shown.extend(message["content"]["data"])

        kernel[1].execute_interactive(call, timeout=60, output_hook=see)
        assert "application/vnd.jupyter.widget-view+json" in shown, call
