"""Instances of one pipeline, each with a file of its own, and copies that follow it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

import kframe as kf
from kframe.cli import main
from kframe.errors import ConfigError, DeliveryUnknown, InstanceActive, Restoring
from kframe.model import TopicPartition
from kframe.standby import standing
from kframe.testing import InjectedFault, MemorySource
from tests.broker.test_takeover import until

pytestmark = pytest.mark.broker

MakeTopic = Callable[..., str]
QUICK = {"session.timeout.ms": 1000, "heartbeat.interval.ms": 300}


@pytest.fixture(scope="module")
def kafka() -> Any:
    """A broker that takes short sessions, so that a dead instance is noticed in a second."""
    with kf.local_kafka(config={"group.min.session.timeout.ms": 500}, progress=False) as broker:
        yield broker


@pytest.fixture
def topic(kafka: kf.LocalKafka, request: pytest.FixtureRequest) -> str:
    return kafka.create_topic(f"{request.node.name[:60].replace('[', '.').replace(']', '')}", 2)


def write(kafka: kf.LocalKafka, topic: str, rows: range, **more: Any) -> None:
    frame = pd.DataFrame({"sku": [f"s{i % 5}" for i in rows], "qty": list(rows), **more})
    kf.write(frame, topic, brokers=kafka.brokers, key="sku", progress=False)


def instance(kafka: kf.LocalKafka, path: Path, topic: str, **options: Any) -> kf.Pipeline:
    config = {**QUICK, **options.pop("kafka_config", {})}
    made = kf.Pipeline(
        path,
        brokers=kafka.brokers,
        name=topic,
        kafka_config=config,
        batch_rows_max=50,
        **{"standby": True, **options},
    )
    made.topic(topic, schema={"sku": "str", "qty": "int64"}, on_new_field="add")
    made.land(topic, table="rows")
    made.aggregate(
        "totals", source=topic, by="sku", n=("qty", "count"), total=("qty", "sum"), kinds=("qty", "nunique")
    )

    @made.table("latest", key="sku", inputs=[topic])
    def latest(batch: pd.DataFrame) -> pd.DataFrame:
        last = batch.drop_duplicates("sku", keep="last")
        return last.assign(_deleted=last["qty"] % 7 == 0)

    return made


def tables(made: kf.Pipeline | kf.Replica) -> dict[str, list[Any]]:
    names = ("rows", "totals", "latest")
    return {name: made.sql(f"FROM {name} ORDER BY ALL").fetchall() for name in names}


def unpublished() -> Callable[[str], None]:
    """Faults: nothing is delivered, but only when a batch has been committed."""
    committed = threading.Event()

    def at_edge(edge: str) -> None:
        if edge == "committed":
            committed.set()
        if edge == "delivering":
            assert committed.wait(30)
            raise InjectedFault("delivering")

    return at_edge


def ledger(made: kf.Pipeline | kf.Replica) -> list[Any]:
    """What of the ledger another machine must know."""
    return [
        made.sql(f"SELECT {columns} FROM _kframe.{table} ORDER BY ALL").fetchall()
        for table, columns in (
            ("positions", "* EXCLUDE (epoch)"),
            ("batches", "* EXCLUDE (timings_ms)"),
            ("dead_letters", "*"),
            ("topics", "*"),
            ("tables", "*"),
        )
    ]


def test_an_empty_machine_goes_on_where_another_stopped(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: state, a removed key, a dead letter or a position that is not in the changelog."""
    write(kafka, topic, range(200))
    kf.write(pd.DataFrame({"sku": ["s1"], "qty": ["x"]}), topic, brokers=kafka.brokers, progress=False)
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        before = tables(a), ledger(a)
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        assert b.run(progress=False).rows == 0
        assert (tables(b), ledger(b)) == before
        assert len(b.dead_letters()) == 1
        write(kafka, topic, range(200, 300), note=["n"] * 100)
        assert b.run(progress=False).rows == 100
        after = tables(b), ledger(b)
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        assert a.run(progress=False).rows == 0
        assert (tables(a), ledger(a)) == after
        assert sorted(a.read("rows")["qty"]) == list(range(300))
        assert a.read("totals")["total"].sum() == sum(range(300))
        assert a.read("rows")["note"].notna().sum() == 100


def test_what_was_committed_but_never_published_is_taken_back(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: a returning instance that keeps batches which another one has computed in its place."""
    write(kafka, topic, range(100))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    write(kafka, topic, range(100, 140))
    with instance(kafka, tmp_path / "a.duckdb", topic, at_edge=unpublished()) as a:
        with pytest.raises(InjectedFault):
            a.run(progress=False)
        assert a.sql("SELECT count(*) FROM rows").fetchall() == [(140,)]
    with instance(kafka, tmp_path / "b.duckdb", topic, commit_interval_ms=7) as b:
        assert b.run(progress=False).rows == 40
        write(kafka, topic, range(140, 150))
        b.run(progress=False)
        expected = tables(b), ledger(b)
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        assert (tables(a), ledger(a)) == expected
        assert sorted(a.read("rows")["qty"]) == list(range(150))


def test_an_instance_that_was_never_replaced_publishes_the_rest(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: taking everything back that was not published, though nobody else has computed it."""
    write(kafka, topic, range(60))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    write(kafka, topic, range(60, 100))
    with instance(kafka, tmp_path / "a.duckdb", topic, at_edge=unpublished()) as a:
        with pytest.raises(InjectedFault):
            a.run(progress=False)
        committed = a.sql("SELECT max(batch_id) FROM _kframe.batches").fetchall()
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        assert a.run(progress=False).rows == 0
        assert a.sql("SELECT max(batch_id) FROM _kframe.batches").fetchall() == committed
        expected = tables(a)
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        b.run(progress=False)
        assert tables(b) == expected


def test_tables_from_before_standby_are_published_whole(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    write(kafka, topic, range(100))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        object.__setattr__(a._options, "standby", False)
        a.run(progress=False)
        object.__setattr__(a._options, "standby", True)
        a.run(progress=False)
        expected = tables(a), ledger(a)
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        b.run(progress=False)
        assert (tables(b), ledger(b)) == expected


def test_a_published_table_goes_on_from_another_machine(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path
) -> None:
    """Kills: outbox ids that begin anew, a table that is sent whole once more."""
    out = f"{topic}-out"
    write(kafka, topic, range(100))
    for name, more in (("a", range(0)), ("b", range(100, 103))):
        if len(more):
            write(kafka, topic, more)
        with instance(kafka, tmp_path / f"{name}.duckdb", topic) as made:
            made.publish("totals", topic=out)
            made.run(progress=False)
    schema = {"sku": "str", "n": "int64", "total": "int64"}
    sent = kf.read(out, brokers=kafka.brokers, schema=schema, progress=False)
    assert sent["n"].gt(20).sum() == 3
    assert sent.groupby("sku")["total"].max().sum() == sum(range(103))


def test_a_copy_follows(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    write(kafka, topic, range(100))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        with kf.follow(topic, tmp_path / "copy.duckdb", brokers=kafka.brokers, progress=False) as copy:
            assert (tables(copy), ledger(copy)) == (tables(a), ledger(a))
            assert "as it was at batch" in repr(copy)
            write(kafka, topic, range(100, 200))
            a.run(progress=False)
            assert len(copy.read("rows")) == 100
            copy.start()
            while len(copy.read("rows")) < 200:
                both = copy.sql("SELECT sum(n) = (SELECT count(*) FROM rows) FROM totals").fetchall()
                assert both == [(True,)], "tables of two batches"
            copy.stop()
            assert (tables(copy), ledger(copy)) == (tables(a), ledger(a))
            with pytest.raises(kf.errors.KframeError, match="only reads"):
                copy.sql("DELETE FROM rows")
        with pytest.raises(ConfigError, match="own file"):
            kf.follow(topic, tmp_path / "a.duckdb", brokers=kafka.brokers, progress=False)
    with pytest.raises(ConfigError, match="publishes no changelog"):
        kf.follow("nobody", tmp_path / "n.duckdb", brokers=kafka.brokers, progress=False)


def test_a_copy_that_is_too_old_is_made_anew(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tombstones may be gone by then. Kills: following on from a position that they have expired behind."""
    write(kafka, topic, range(100))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        kf.follow(topic, tmp_path / "c.duckdb", brokers=kafka.brokers, progress=False).close()
        write(kafka, topic, range(100, 120))
        a.run(progress=False)
        monkeypatch.setattr("kframe.standby.standing.tombstones_kept", lambda *_: timedelta(0))
        with kf.Pipeline(tmp_path / "c.duckdb", source=MemorySource(), name="other") as other:
            other._store.cursor().execute("INSERT INTO latest (sku) VALUES ('gone')")
        with kf.follow(topic, tmp_path / "c.duckdb", brokers=kafka.brokers, progress=False) as copy:
            assert (tables(copy), ledger(copy)) == (tables(a), ledger(a))


def test_a_restore_that_is_cut_short_shows_nothing_and_goes_on(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: half-restored tables that can be read; a second restore that adds rows again."""
    write(kafka, topic, range(400))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        expected = tables(a), ledger(a)
    limits = standing.Follower.__module__ + "._LIMITS"
    monkeypatch.setattr(limits, kf.model.Limits(rows_max=100, bytes_max=1 << 20, interval_s=0.1))
    replica = kf.Replica(topic, tmp_path / "c.duckdb", brokers=kafka.brokers)
    replica._follower.catch_up(stopped=lambda: True)
    with pytest.raises(Restoring):
        replica.read("rows")
    with replica.update(progress=False) as copy:
        assert (tables(copy), ledger(copy)) == expected


def test_a_bounded_run_beside_an_active_instance_says_so(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kframe.run._PATIENCE_S", 2)
    write(kafka, topic, range(10))
    with (
        instance(kafka, tmp_path / "a.duckdb", topic, commit_interval_ms=20) as a,
        instance(kafka, tmp_path / "b.duckdb", topic) as b,
    ):
        a.start()
        while a.status().rows < 10:
            a.lag()
        with pytest.raises(InstanceActive):
            b.run(progress=False)
        assert tables(b)["totals"] == tables(a)["totals"]
        a.stop()
        assert b.run(progress=False).rows == 0


def test_a_file_that_has_stood_by_is_not_used_alone(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    """Kills: batches that the changelog lacks, so that the next instance is wrong."""
    write(kafka, topic, range(40))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    for name in "ba":  # in the end "a" knows most
        write(kafka, topic, range(40, 45))
        with instance(kafka, tmp_path / f"{name}.duckdb", topic) as made:
            assert made.run(progress=False).rows == 5
    write(kafka, topic, range(40, 60))
    with instance(kafka, tmp_path / "a.duckdb", topic, standby=False) as alone:
        for use in (alone.run, alone.rewind, lambda: alone.rebuild("rows")):
            with pytest.raises(ConfigError, match="standby=True"):
                use()
        changelog = f"kframe.{topic}.changelog"
        admin = AdminClient({"bootstrap.servers": kafka.brokers})
        admin.delete_topics([changelog])[changelog].result()
        until(lambda: changelog not in admin.list_topics(timeout=10).topics, lambda: "it is still there")
        with (
            instance(kafka, tmp_path / "b.duckdb", topic, standby=False) as older,
            pytest.raises(DeliveryUnknown, match="Use the newest file"),
        ):
            older.run(progress=False)
        assert alone.run(progress=False).rows == 20
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:  # stands by again: everything is told anew
        assert a.run(progress=False).rows == 0
        for name in ("b", "c"):  # one of the old changelog, and one of none
            with instance(kafka, tmp_path / f"{name}.duckdb", topic) as other:
                assert other.run(progress=False).rows == 0
                assert tables(other) == tables(a)


def test_a_standby_that_was_there_first_follows(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    """Kills: a file that counts as half restored for ever, because the changelog was empty when it joined."""
    joined = threading.Event()
    write(kafka, topic, range(10))

    def at_edge(edge: str) -> None:
        if edge == "delivering":
            assert joined.wait(30)

    with (
        instance(kafka, tmp_path / "a.duckdb", topic, commit_interval_ms=20, at_edge=at_edge) as a,
        instance(kafka, tmp_path / "b.duckdb", topic) as b,
    ):
        a.start()
        until(lambda: a.status().rows == 10, lambda: f"{a!r}")
        b.start()
        until(lambda: followed(b) is not None, lambda: f"{b!r}")
        joined.set()
        until(lambda: followed(b) == a.status().positions, lambda: f"{b!r}")
        assert tables(b)["totals"] == tables(a)["totals"]


def followed(made: kf.Pipeline) -> dict[TopicPartition, int] | None:
    """The positions that a standby's tables are as of; None while it restores."""
    try:
        return dict(made.sql("SELECT 1").positions)
    except Restoring:
        return None


def restored_by_command(kafka: kf.LocalKafka, pipeline: str, path: Path) -> int:
    return main(["restore", pipeline, str(path), "--brokers", kafka.brokers])


def test_the_command_restore_makes_a_file_to_go_on_from(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: a restore without positions, without state, or of another batch than it says."""
    write(kafka, topic, range(200))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
        before = tables(a), ledger(a)
        batch_id = a.sql("SELECT 1").batch_id
        ends = a.status().positions
    assert restored_by_command(kafka, topic, tmp_path / "b.duckdb") == 0
    told = capsys.readouterr().out
    assert f"as of batch {batch_id}, committed at 20" in told
    assert "  rows: 200 rows\n  totals: 5 rows\n" in told
    assert all(f"  {tp}: {offset}\n" in told for tp, offset in ends.items())
    assert f"name={topic!r}, standby=True" in told
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        assert (tables(b), ledger(b)) == before
        write(kafka, topic, range(200, 260))
        assert b.run(progress=False).rows == 60
        after = tables(b), ledger(b)
    restored = kf.restore(topic, tmp_path / "c.duckdb", brokers=kafka.brokers, progress=False)
    assert restored.tables["rows"] == 260
    with instance(kafka, tmp_path / "c.duckdb", topic) as c:
        assert (tables(c), ledger(c)) == after
    assert restored_by_command(kafka, topic, tmp_path / "c.duckdb") == 0  # again: nothing to do


def test_restore_says_why_it_restores_nothing(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: taking back batches that the file alone has; an empty file where there is no changelog."""
    assert restored_by_command(kafka, topic, tmp_path / "none.duckdb") == 2
    assert f"there is no topic 'kframe.{topic}.changelog'" in capsys.readouterr().err
    assert not (tmp_path / "none.duckdb").exists()
    kafka.create_topic(f"kframe.{topic}.changelog", 1)
    assert restored_by_command(kafka, topic, tmp_path / "b.duckdb") == 2
    assert "holds no batch yet" in capsys.readouterr().err
    write(kafka, topic, range(60))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    assert restored_by_command(kafka, topic, tmp_path / "a.duckdb") == 2
    assert "it lacks nothing" in capsys.readouterr().err
    assert restored_by_command(kafka, topic, tmp_path / "b.duckdb") == 0
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        assert b.run(progress=False).rows == 0  # the changelog's newest commit is this file's
    write(kafka, topic, range(60, 100))
    with instance(kafka, tmp_path / "a.duckdb", topic, at_edge=unpublished()) as a:
        with pytest.raises(InjectedFault):
            a.run(progress=False)
        alone = tables(a), ledger(a)
    assert restored_by_command(kafka, topic, tmp_path / "a.duckdb") == 2
    assert "never published" in capsys.readouterr().err
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        assert (tables(a), ledger(a)) == alone
        assert len(a.read("rows")) == 100


@pytest.mark.parametrize(("retention_ms", "left"), [("604800000", 1), ("1", 0)])
def test_what_tombstones_may_be_gone_for_is_restored_whole(
    kafka: kf.LocalKafka, topic: str, tmp_path: Path, retention_ms: str, left: int
) -> None:
    """A row that no changelog tells of shows which it was. Kills: another retention than the topic has."""
    write(kafka, topic, range(50))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        b.run(progress=False)
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        write(kafka, topic, range(50, 60))
        a.run(progress=False)
    with kf.Pipeline(tmp_path / "b.duckdb", source=MemorySource(), name="other") as other:
        other._store.cursor().execute("INSERT INTO latest (sku) VALUES ('gone')")
    change = ConfigEntry("delete.retention.ms", retention_ms, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(
        ConfigResource.Type.TOPIC, f"kframe.{topic}.changelog", incremental_configs=[change]
    )
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    admin.incremental_alter_configs([resource])[resource].result()
    with instance(kafka, tmp_path / "b.duckdb", topic) as b:
        assert b.run(progress=False).rows == 0
        assert len(b.read("rows")) == 60
        assert b.sql("SELECT count(*) FROM latest WHERE sku = 'gone'").fetchall() == [(left,)]


def test_progress_is_told_against_the_whole(kafka: kf.LocalKafka, topic: str, tmp_path: Path) -> None:
    """Kills: a bar that never reaches its end, or has none."""
    write(kafka, topic, range(100))
    with instance(kafka, tmp_path / "a.duckdb", topic) as a:
        a.run(progress=False)
    told: list[tuple[int, int]] = []
    with kf.Replica(topic, tmp_path / "c.duckdb", brokers=kafka.brokers) as replica:
        replica._follower.catch_up(lambda read, of: told.append((read, of)))
    assert {of for _, of in told} == {sum(read for read, _ in told)}
    assert told[0][1] > 100
