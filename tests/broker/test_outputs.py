"""Output topics and published tables on the real broker."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import confluent_kafka as ck
import pandas as pd
import pytest
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

import kframe as kf
from kframe.deliver.kafka import TransactionalTopics
from kframe.errors import ConfigError, DefinitionError, DeliveryRefused, DeliveryUnknown, SchemaError
from kframe.testing import Fault, Faults, InjectedFault

pytestmark = pytest.mark.broker

SCHEMA = {"sku": "str", "qty": "int64"}
MakeTopic = Callable[..., str]


def produce(kafka: kf.LocalKafka, topic: str, rows: list[dict[str, Any]]) -> None:
    producer = ck.Producer({"bootstrap.servers": kafka.brokers})
    for row in rows:
        producer.produce(topic, json.dumps(row).encode())
    assert producer.flush(30) == 0


def consume(kafka: kf.LocalKafka, topic: str, **config: Any) -> list[tuple[bytes | None, Any]]:
    """All of a topic's records, read_committed unless told otherwise: (key, decoded value), in order."""
    settings = {
        "bootstrap.servers": kafka.brokers,
        "group.id": "reader",
        "enable.partition.eof": True,
        "enable.auto.commit": False,
        **{k.replace("_", "."): v for k, v in config.items()},
    }
    consumer = ck.Consumer(settings)
    partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
    consumer.assign([ck.TopicPartition(topic, p, 0) for p in partitions])
    found, ended = [], 0
    while ended < len(partitions):
        message = consumer.poll(10)
        assert message is not None, "the topic's end did not come"
        if message.error():
            assert message.error().code() == ck.KafkaError._PARTITION_EOF, message.error()
            ended += 1
            continue
        value = message.value()
        found.append((message.key(), None if value is None else json.loads(value)))
    consumer.close()
    return found


def shop(kafka: kf.LocalKafka, folder: Path, topic: str, name: str = "shop", **options: Any) -> kf.Pipeline:
    """A pipeline of a name of its own: delivered positions belong to the name."""
    made = kf.Pipeline(
        folder / f"{name}.duckdb", brokers=kafka.brokers, name=f"{name}-{topic}", batch_rows_max=10, **options
    )
    made.topic(topic, schema=SCHEMA, include=["offset"])
    return made


def rows(n: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"sku": f"s{i % 3}", "qty": i} for i in range(first, first + n)]


def outbox(made: kf.Pipeline) -> int:
    return int(made.sql("SELECT count(*) FROM _kframe.outbox").fetchall()[0][0])


@pytest.mark.parametrize("guarantee", ["exactly_once", "at_least_once"])
def test_rows_go_out_once_in_order_and_the_outbox_is_empty(
    guarantee: str, kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Consume, transform, produce, without a table; the client's queue holds 20 records. Kills: trim left
    out; a batch posted twice; BufferError taken for an end."""
    source, out = make_topic(), make_topic(2)
    produce(kafka, source, rows(95))
    config = {
        "processing.guarantee": guarantee + ("_v2" if guarantee == "exactly_once" else ""),
        "queue.buffering.max.messages": 20,
    }
    with shop(kafka, tmp_path, source, kafka_config=config) as made:

        @made.output(out, key="sku", inputs=[source])
        def doubled(orders: pd.DataFrame) -> pd.DataFrame:
            return orders.assign(qty=orders.qty * 2)[["sku", "qty"]]

        made.run(progress=False)
        assert outbox(made) == 0
        assert made.status().undelivered == 0
        produce(kafka, source, rows(5, first=95))
        made.run(progress=False)
        made.run(progress=False)
        assert made.sql("SELECT position FROM _kframe.deliveries").fetchall() == [(100,)]
    got = consume(kafka, out)
    assert sorted(v["qty"] for _, v in got) == [2 * i for i in range(100)]
    for sku in ("s0", "s1", "s2"):
        assert [v["qty"] for k, v in got if k == sku.encode()] == [
            2 * i for i in range(100) if f"s{i % 3}" == sku
        ]


def test_published_tables_are_the_last_record_of_each_key(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: the state published instead of what users see; tombstones left out; HAVING's rows kept."""
    source = make_topic()
    produce(kafka, source, rows(30))
    with shop(kafka, tmp_path, source) as made:

        @made.table("latest", key="sku", inputs=[source])
        def latest(orders: pd.DataFrame) -> pd.DataFrame:
            return orders.assign(_tombstone=orders.qty == 29)[["sku", "qty", "_tombstone"]]

        made.aggregate("revenue", source=source, by="sku", total=("qty", "sum"), mean=("qty", "mean"))
        made.sql_table("few", f'SELECT sku AS item, count(*) AS n FROM "{source}" GROUP BY sku HAVING n < 9')
        made.land(source, table="landed")
        topics = {t: f"{source}-{t}" for t in ("latest", "revenue", "few", "landed")}
        for table, topic in topics.items():
            made.publish(table, topic=topic, key="_offset" if table == "landed" else None)
        made.run(progress=False)
        produce(kafka, source, [{"sku": "s0", "qty": 100}])
        made.run(progress=False)
        last = {t: dict(consume(kafka, topic)) for t, topic in topics.items()}
        assert last["latest"] == {
            b"s0": {"sku": "s0", "qty": 100},
            b"s1": {"sku": "s1", "qty": 28},
            b"s2": None,
        }
        totals = made.read("revenue").set_index("sku")
        assert {k.decode(): v["total"] for k, v in last["revenue"].items()} == totals["total"].to_dict()
        assert {k.decode(): v["mean"] for k, v in last["revenue"].items()} == totals["mean"].to_dict()
        assert last["few"] == dict.fromkeys([b"s0", b"s1", b"s2"])
        assert ({b"s0", b"s1", b"s2"}, 31) == (set(dict(consume(kafka, topics["few"]))), len(last["landed"]))
        admin = AdminClient({"bootstrap.servers": kafka.brokers})
        policy = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topics["revenue"])])
        assert next(iter(policy.values())).result()["cleanup.policy"].value == "compact"


def test_a_table_made_anew_is_what_its_topic_says(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: keys that are gone from the table and stay in the topic; rows sent that are the same."""
    source = make_topic()
    produce(kafka, source, rows(30))
    with shop(kafka, tmp_path, source) as made:

        def define(more: int, without: str) -> None:
            @made.table("latest", key="sku", inputs=[source])
            def latest(orders: pd.DataFrame) -> pd.DataFrame:
                last = orders[orders.sku != without].drop_duplicates("sku", keep="last")
                return last.assign(qty=last.qty + more * (last.sku == "s0"))[["sku", "qty"]]

        def check(sent: int) -> None:
            made.run(progress=False)
            records = consume(kafka, f"{source}-latest")
            last = {key.decode(): value for key, value in records if key is not None}
            table = {row["sku"]: row for row in made.read("latest").to_dict("records")}
            assert {sku: value for sku, value in last.items() if value is not None} == table
            assert len(records) == sent

        define(0, "none")
        made.publish("latest", topic=f"{source}-latest")
        check(9)
        define(1000, "s1")
        made.rebuild("latest", progress=False)
        check(9 + 2)  # s0 is another, s1 is gone, s2 is what it was
        define(1000, "s2")
        made.rewind()
        check(9 + 2 + 2 + 6)  # two are gone; three batches with two each


def test_a_table_published_later_sends_what_it_holds(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: only new changes published, so that the topic is not the table."""
    source = make_topic()
    produce(kafka, source, rows(30))
    with shop(kafka, tmp_path, source) as made:
        made.aggregate("revenue", source=source, by="sku", total=("qty", "sum"))
        made.run(progress=False)
        made.publish("revenue", topic=f"{source}-revenue")
        made.run(progress=False)
        made.run(progress=False)
    got = consume(kafka, f"{source}-revenue")
    assert sorted((v["sku"], v["total"]) for _, v in got) == [
        (f"s{s}", sum(range(s, 30, 3))) for s in range(3)
    ]


def test_a_chain_of_pipelines_is_exactly_once(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """One's output is another's input; both fall at every edge of delivery. Kills: resending from the file's
    position, or going on before init_transactions."""
    source, middle = make_topic(2), make_topic(2)
    faults = Faults()

    def first() -> kf.Pipeline:
        made = shop(kafka, tmp_path, source, "first", at_edge=faults)
        made.output(middle, key="sku", inputs=[source])(lambda orders: orders[["sku", "qty"]])
        return made

    for i, edge in enumerate(("delivering", "delivered") * 2):
        produce(kafka, source, rows(100, first=100 * i))
        faults.arm(Fault(edge))
        with first() as made, pytest.raises(InjectedFault):
            made.run(progress=False)
    assert len(faults.fired) == 4
    with first() as made:
        made.run(progress=False)
    with shop(kafka, tmp_path, middle, "second") as made:
        made.aggregate("sold", source=middle, by="sku", n=("qty", "count"), total=("qty", "sum"))
        made.run(progress=False)
        got = {sku: (n, int(total)) for sku, n, total in made.sql("FROM sold").fetchall()}
    expected = {f"s{s}": (len(range(s, 400, 3)), sum(range(s, 400, 3))) for s in range(3)}
    assert got == expected
    uncommitted = consume(kafka, middle, isolation_level="read_uncommitted")
    assert len(uncommitted) > 400  # the aborted ones are there


@pytest.mark.parametrize(("guarantee", "times"), [("exactly_once", 1), ("at_least_once", 2)])
def test_what_the_guarantees_differ_in(
    guarantee: str, times: int, kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """A fall when the topic has the rows and the file does not know it. Kills: a position in the file alone
    where it says exactly once; rows lost where it says at least once."""
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(10))
    faults = Faults(Fault("delivered"))
    with shop(kafka, tmp_path, source, processing_guarantee=guarantee, at_edge=faults) as made:
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        with pytest.raises(InjectedFault):
            made.run(progress=False)
        made.run(progress=False)
        assert outbox(made) == 0
    assert [v["qty"] for _, v in consume(kafka, out)] == list(range(10)) * times


def test_stop_delivers_what_is_committed(kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path) -> None:
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(50))
    committed = threading.Event()
    seen: list[str] = []

    def at_edge(edge: str) -> None:
        seen.append(edge)
        if seen.count("committed") == 5:
            committed.set()

    with shop(kafka, tmp_path, source, at_edge=at_edge) as made:
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        made.start()
        assert committed.wait(30)
        made.stop()
        assert made.wait().rows == 50
        assert outbox(made) == 0
    assert [v["qty"] for _, v in consume(kafka, out)] == list(range(50))


def test_a_fault_of_delivery_rolls_no_batch_back(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kills: delivering inside of the batch's transaction."""
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(10))
    with shop(kafka, tmp_path, source, at_edge=Faults(Fault("delivering"))) as made:
        made.land(source, table="landed")
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        with pytest.raises(InjectedFault):
            made.run(progress=False)
        assert len(made.read("landed")) == 10
        assert made.status().undelivered == 10
        assert "10 committed rows are still to be delivered" in repr(made.status())
        made.run(progress=False)
        assert len(consume(kafka, out)) == 10


@pytest.mark.parametrize("limit", ["client", "broker"])
def test_an_oversize_record_is_named_and_kept(
    limit: str, kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Code 10, raised by the client itself or told by the broker. Kills: an oversize record dropped."""
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(3))
    config = {"message.max.bytes": 2_000_000 if limit == "broker" else 200_000, "compression.type": "none"}
    if limit == "broker":
        _alter(kafka, out, "max.message.bytes", "200000")

    def define(made: kf.Pipeline) -> None:
        made.output(out, key="sku", inputs=[source])(
            lambda orders: orders.assign(text=["x" * (300_000 if q == 1 else 1) for q in orders.qty])
        )

    with shop(kafka, tmp_path, source, kafka_config=config) as made:
        define(made)
        with pytest.raises(DeliveryRefused, match=r"refuses the record with key b's1' \(300,\d+ bytes\)"):
            made.run(progress=False)
        assert made.status().undelivered == 3
    assert consume(kafka, out) == []
    _alter(kafka, out, "max.message.bytes", "2000000")
    with shop(kafka, tmp_path, source, kafka_config={"message.max.bytes": 2_000_000}) as made:
        define(made)
        made.run(progress=False)
    assert [v["qty"] for _, v in consume(kafka, out)] == [0, 1, 2]


def test_a_compacted_topic_needs_keys(kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path) -> None:
    """Code 87, before anything is committed. Kills: a poisonous row in the outbox."""
    source, out = make_topic(), make_topic(cleanup_policy="compact")
    produce(kafka, source, [{"sku": "a", "qty": 1}, {"qty": 2}])
    with shop(kafka, tmp_path, source) as made:
        made.output(out, inputs=[source])(lambda orders: orders)
        with pytest.raises(ConfigError, match="takes no records without a key"):
            made.run(progress=False)
    with shop(kafka, tmp_path, source) as made:
        made.output(out, key="sku", inputs=[source])(lambda orders: orders)
        with pytest.raises(SchemaError, match=r"a row has no key \(sku\)"):
            made.run(progress=False)
        assert made.batches().empty
        made.output(out, key="sku", inputs=[source])(lambda orders: orders.dropna())
        made.run(progress=False)
    assert [k for k, _ in consume(kafka, out)] == [b"a"]


def test_an_expired_position_stops_rather_than_doubles(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path
) -> None:
    """Kafka forgets a group's offsets in time; the dense ids tell. Kills: going on without a position."""
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(10))
    faults = Faults()
    with shop(kafka, tmp_path, source, at_edge=faults) as made:
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        made.run(progress=False)
        _forget(kafka, made.name)
        made.run(progress=False)  # nothing undelivered: nothing is in doubt
        produce(kafka, source, rows(10, first=10))
        faults.arm(Fault("delivered"))
        with pytest.raises(InjectedFault):
            made.run(progress=False)
        _forget(kafka, made.name)
        with pytest.raises(DeliveryUnknown, match=r"Whether the rows \[10, 20\) have been delivered"):
            made.run(progress=False)
        assert made.status().undelivered == 10
    assert [v["qty"] for _, v in consume(kafka, out)] == list(range(20))


def test_an_older_copy_of_the_file_is_refused(
    kafka: kf.LocalKafka, make_topic: MakeTopic, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills: rows of this run taken for those that another file has delivered under their ids."""
    source, out = make_topic(), make_topic()
    produce(kafka, source, rows(10))
    committed = threading.Event()
    open_at_once = TransactionalTopics.open

    def open_late(target: TransactionalTopics, kept: int) -> int | None:
        assert committed.wait(30)
        return open_at_once(target, kept)

    for folder in (tmp_path / "one", tmp_path / "other"):
        folder.mkdir()
    with shop(kafka, tmp_path / "one", source) as made:
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        made.run(progress=False)
    monkeypatch.setattr(TransactionalTopics, "open", open_late)
    produce(kafka, source, rows(10, first=10))

    def at_edge(edge: str) -> None:
        if edge == "committed":
            committed.set()

    with shop(kafka, tmp_path / "other", source, at_edge=at_edge) as made:
        made.output(out, inputs=[source])(lambda orders: orders[["qty"]])
        with pytest.raises(DeliveryUnknown, match="this file has only ever made 0"):
            made.run(progress=False)
    assert len(consume(kafka, out)) == 10


def test_an_output_needs_brokers_and_a_free_topic(kafka: kf.LocalKafka, tmp_path: Path) -> None:
    with kf.Pipeline(tmp_path / "m.duckdb", source=kf.testing.MemorySource()) as made:
        made.topic("orders", schema=SCHEMA)
        with pytest.raises(DefinitionError, match="no brokers"):
            made.output("out")(lambda orders: orders)
    with kf.Pipeline(tmp_path / "k.duckdb", brokers=kafka.brokers) as made:
        made.topic("orders", schema=SCHEMA)
        made.land("orders")
        made.aggregate("total", source="orders", by="sku", n=("qty", "count"))
        made.output("out")(lambda orders: orders)
        with pytest.raises(DefinitionError, match="gets the rows of 'output:out' already"):
            made.publish("total", topic="out")
        with pytest.raises(DefinitionError, match="No step makes the table 'nothing'"):
            made.publish("nothing")
        with pytest.raises(DefinitionError, match="key is sku, not n"):
            made.publish("total", key="n")
        made.sql_table("all", "SELECT count(*) AS n FROM orders")
        with pytest.raises(DefinitionError, match="does not show any group column"):
            made.publish("all")
        assert "out" not in repr(made).split("tables:")[1]
        with pytest.raises(DefinitionError, match="No step makes 'output:out'"):
            made.rebuild("output:out")


def _alter(kafka: kf.LocalKafka, topic: str, name: str, value: str) -> None:
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(10)


def _forget(kafka: kf.LocalKafka, pipeline: str) -> None:
    admin = AdminClient({"bootstrap.servers": kafka.brokers})
    for future in admin.delete_consumer_groups([f"kframe.{pipeline}.delivery"]).values():
        future.result(10)
