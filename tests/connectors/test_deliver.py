"""`kframe deliver`: what one pipeline publishes, carried to PostgreSQL by a process of its own.

Kills: removed keys that stay in the store; keys of several columns, or of other types than text, that are not
found again; a carrier that begins anew, or loses rows, when it was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import kframe as kf
from kframe.cli import main
from tests.connectors.conftest import Postgres

pytestmark = pytest.mark.broker
Rows = list[tuple[object, ...]]


def shop(folder: Path, kafka: kf.LocalKafka, topic: str) -> kf.Pipeline:
    """Two tables with removals: one keyed by a text, one by a number and a day; and one without a key."""
    made = kf.Pipeline(folder / "shop.duckdb", brokers=kafka.brokers, name=topic, batch_rows_max=20)
    made.topic(topic, schema={"sku": "str", "n": "int64", "day": "date", "price": "decimal(9,2)"})

    @made.table("latest", key="sku", inputs=[topic])
    def latest(orders: pd.DataFrame) -> pd.DataFrame:
        return orders.assign(_tombstone=orders.n % 5 == 4)

    @made.table("by_day", key=["n", "day"], inputs=[topic])
    def by_day(orders: pd.DataFrame) -> pd.DataFrame:
        return orders.assign(n=orders.n % 7, _tombstone=orders.n % 3 == 2)

    @made.table("seen", inputs=[topic])
    def seen(orders: pd.DataFrame) -> pd.DataFrame:
        return orders[["n"]]

    for table in ("latest", "by_day", "seen"):
        made.publish(table, topic=f"{topic}-{table}")
    return made


def orders(first: int, n: int) -> pd.DataFrame:
    rows = range(first, first + n)
    return pd.DataFrame(
        {
            "sku": [f"it's {i % 11}" for i in rows],
            "n": rows,
            "day": [f"2026-11-{1 + i % 3:02d}" if i % 4 else None for i in rows],
            "price": [f"{i}.25" for i in rows],
        }
    )


COLUMNS = ("sku=str", "n=int64", "day=date", "price=decimal(9,2)")
KEYS = {"latest": ["sku"], "by_day": ["n", "day"], "seen": []}


def arguments(kafka: kf.LocalKafka, postgres: Postgres, folder: Path, topic: str, table: str) -> list[str]:
    config = folder / "client.properties"
    config.write_text("# the client's\nclient.id=carrier\nfetch.wait.max.ms = 50\n")
    told = ["deliver", f"{topic}-{table}", str(folder / f"{table}.duckdb"), "--brokers", kafka.brokers]
    told += ["--config", str(config), "--to", postgres.conninfo, "--table", f"{topic}_{table}"]
    told += [f"--key={key}" for key in KEYS[table]]
    return told + [f"--column={column}" for column in COLUMNS if KEYS[table] or column == "n=int64"]


def there(postgres: Postgres, topic: str, table: str) -> Rows:
    columns = "sku, n, day, price" if KEYS[table] else "n"
    return sorted(postgres.rows(f"SELECT {columns} FROM {topic}_{table}"), key=repr)


def here(made: kf.Pipeline, table: str) -> Rows:
    columns = "sku, n, day, price" if KEYS[table] else "n"
    return sorted(made.sql(f"SELECT {columns} FROM {table}").fetchall(), key=repr)


def test_tables_with_removals_arrive_equal(
    kafka: kf.LocalKafka, make_topic: Callable[..., str], postgres: Postgres, tmp_path: Path
) -> None:
    topic = make_topic(1)
    for first in (0, 60):
        kf.write(orders(first, 60), topic, brokers=kafka.brokers, key="sku", progress=False)
        with shop(tmp_path, kafka, topic) as made:
            made.run(progress=False)
            for table in KEYS:
                command = [*arguments(kafka, postgres, tmp_path, topic, table), "--until", "end"]
                assert main(command) == 0
                assert there(postgres, topic, table) == here(made, table)
            assert 0 < len(here(made, "latest")) < 11
            assert 0 < len(here(made, "by_day")) < 28


def test_a_carrier_that_is_killed_goes_on(
    kafka: kf.LocalKafka, make_topic: Callable[..., str], postgres: Postgres, tmp_path: Path
) -> None:
    topic = make_topic(1)
    command = arguments(kafka, postgres, tmp_path, topic, "seen")
    pause, arrived = threading.Event(), 0
    for first in range(0, 400, 100):
        kf.write(orders(first, 100), topic, brokers=kafka.brokers, progress=False)
        with shop(tmp_path, kafka, topic) as made:
            made.run(progress=False)
        carrier = subprocess.Popen([sys.executable, "-m", "kframe", *command], stdout=subprocess.DEVNULL)
        while arrived <= first:
            assert carrier.poll() is None
            pause.wait(0.05)
            if postgres.rows(f"SELECT 1 FROM pg_tables WHERE tablename = '{topic}_seen'"):
                arrived = len(there(postgres, topic, "seen"))
        os.kill(carrier.pid, signal.SIGKILL)
        carrier.wait()
    assert main([*command, "--until", "end"]) == 0
    assert sorted(there(postgres, topic, "seen")) == [(n,) for n in range(400)]


def test_what_cannot_be_read_is_told_without_secrets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: an error that quotes the line, and with it a password."""
    config = tmp_path / "client.properties"
    config.write_text("sasl.password hunter2\n")
    assert main(["peek", "orders", "--brokers", "127.0.0.1:1", "--config", str(config)]) == 2
    told = capsys.readouterr().err
    assert "name=value" in told
    assert "hunter2" not in told
    assert main(["peek", "orders", "--brokers", "127.0.0.1:1", "--config", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
