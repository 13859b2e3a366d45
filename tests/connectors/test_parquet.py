"""Tables carried to a folder of Parquet files, and a connector of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kframe as kf
from kframe.deliver.parquet import ParquetFolder
from kframe.errors import DeliveryDelayed, DeliveryUnknown
from kframe.model import Entry
from kframe.testing import Fault, Faults, InjectedFault, MemorySource


def shop(source: MemorySource, folder: Path, **options: Any) -> kf.Pipeline:
    made = kf.Pipeline(folder / "my shop.duckdb", source=source, batch_rows_max=10, **options)
    made.topic("orders", schema={"sku": "str", "qty": "int64"})
    made.land("orders", table="all/orders")

    @made.table("latest", key="sku")
    def latest(orders: pd.DataFrame) -> pd.DataFrame:
        return orders.assign(_tombstone=orders.qty % 5 == 4)

    made.connect(folder / "lake", tables=["all/orders", "latest"])
    return made


def add(source: MemorySource, n: int, first: int = 0) -> None:
    for i in range(first, first + n):
        source.append("orders", {"sku": f"s{i % 6}", "qty": i})


def read(folder: Path, table: str) -> pd.DataFrame:
    files = sorted((folder / "lake" / table).glob("*.parquet"))
    return pa.concat_tables((pq.read_table(f) for f in files), promote_options="default").to_pandas()


def newest(folder: Path) -> dict[str, int]:
    """The table that the change log of `latest` says: each key's newest row, unless it is a delete."""
    log = read(folder, "latest").sort_values("_kframe_id").drop_duplicates("sku", keep="last")
    log = log[log["_kframe_kind"] == "upsert"]
    return dict(zip(log["sku"], log["qty"], strict=True))


@pytest.mark.parametrize("edge", [None, "delivering", "delivered"])
def test_every_row_is_in_one_file(edge: str | None, tmp_path: Path) -> None:
    """Also when it falls at each edge. Kills: files written again under another name; a position apart from
    the files."""
    source, faults = MemorySource(), Faults()
    for i in range(3):
        add(source, 30, first=30 * i)
        with shop(source, tmp_path, at_edge=faults) as made:
            if edge is None:
                made.run(progress=False)
                continue
            faults.arm(Fault(edge))
            with pytest.raises(InjectedFault):
                made.run(progress=False)
    with shop(source, tmp_path) as made:
        made.run(progress=False)
        assert sorted(read(tmp_path, "all%2Forders")["qty"]) == list(range(90))
        latest = made.read("latest")
        assert newest(tmp_path) == dict(zip(latest["sku"], latest["qty"], strict=True))
    assert not list((tmp_path / "lake").glob("*/.*"))


def test_a_crash_between_two_files_goes_on_in_the_middle(tmp_path: Path) -> None:
    """Kills: going on at the batch's start; a file that is seen before it is whole."""
    entries = [
        Entry(0, 2, 0, "a", "append", (), pa.table({"n": [0, 1]})),
        Entry(2, 3, 0, "b", "append", (), pa.table({"n": [2]})),
    ]
    target = ParquetFolder(tmp_path / "lake", "p")
    assert target.open(0) is None
    target.send(entries)
    assert not list((tmp_path / "lake").glob("*/[!.]*"))
    beside, place = target._written[0]
    beside.rename(place)  # as far as it came
    again = ParquetFolder(tmp_path / "lake", "p")
    assert again.open(0) == 2
    again.send(entries[1:])
    again.commit(3)
    assert [f.name.split("-", 1)[1] for f in sorted((tmp_path / "lake").glob("*/*"))] == [
        "0000000000000000000-0000000000000000002.parquet",
        "0000000000000000002-0000000000000000003.parquet",
    ]
    told = pq.read_metadata(sorted((tmp_path / "lake").glob("b/*"))[0]).metadata
    assert (told[b"kframe.first_id"], told[b"kframe.stop_id"]) == (b"2", b"3")
    assert again.open(0) == 3


def test_files_that_vanish_while_rows_are_due_stop_it(tmp_path: Path) -> None:
    """Kills: writing rows again that nobody can say were not taken."""
    source, faults = MemorySource(), Faults()
    add(source, 30)
    with shop(source, tmp_path, at_edge=faults) as made:
        made.run(progress=False)
        add(source, 30, first=30)
        faults.arm(Fault("delivered"))
        with pytest.raises(InjectedFault):
            made.run(progress=False)
        for file in (tmp_path / "lake").glob("*/*"):
            file.unlink()
        with pytest.raises(DeliveryUnknown):
            made.run(progress=False)
        assert made.status().undelivered > 0


def test_a_folder_that_cannot_be_written_is_a_delay(tmp_path: Path) -> None:
    (tmp_path / "lake").write_text("a file")
    with pytest.raises(DeliveryDelayed, match="cannot be written"):
        ParquetFolder(tmp_path / "lake", "p").open(0)
