"""Spark Structured Streaming, from PyPI's pyspark and the Kafka connector from Maven Central."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from benchmarks import marks
from benchmarks.peers import HERE, WORK, Run, own_python, program, run_of, tool

if TYPE_CHECKING:
    from benchmarks.data import Sums

POM = HERE / "spark.pom.xml"
OFFSETS_PER_BATCH = 500_000
ORDER = "order_id BIGINT, sku STRING, qty BIGINT, price DOUBLE, ts BIGINT, region STRING, user STRING"


class Spark:
    """Both cores, whole micro-batches: its own columns throughout, no Python function."""

    name = "Spark Structured Streaming"
    jobs: tuple[str, ...] = ("land", "aggregate")
    guarantee = "exactly once"
    settings = f"local[2], availableNow, {OFFSETS_PER_BATCH:,} records a micro-batch, 2 shuffle partitions"

    def set_up(self) -> str:
        found = re.search(r"<spark.version>(.*)</", POM.read_text())
        assert found is not None
        tool(["java", "-version"])
        own_python("spark", f"pyspark=={found[1]}")
        tool(["mvn", "-q", "-B", "-f", str(POM), f"-Dwork={WORK}", "package"])
        return found[1]

    def command(self, run: Run) -> list[str]:
        return program("benchmarks.peers.spark", run, python=str(WORK / "spark" / "bin" / "python"))

    def sums(self, run: Run, said: str) -> Sums:
        from benchmarks.verify import sums_of_parquet

        return sums_of_parquet(f"{run.folder}/result/*.parquet", run.job)


def main(run: Run) -> None:
    """One streaming query to the end of the topic: Parquet files, or totals kept in its state store."""
    from pyspark.sql import DataFrame, SparkSession, functions

    jars = ",".join(str(jar) for jar in (WORK / "spark" / "kafka-jars").glob("*.jar"))
    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.jars", jars)
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.ui.enabled", False)
        .config("spark.log.level", "ERROR")
        .config("spark.sql.shuffle.partitions", 2)
        .getOrCreate()
    )
    marks.consuming()
    orders = (
        spark.readStream.format("kafka")
        .option("kafka.bootstrap.servers", run.brokers)
        .option("subscribe", run.topic)
        .option("startingOffsets", "earliest")
        .option("maxOffsetsPerTrigger", OFFSETS_PER_BATCH)
        .load()
        .select(functions.from_json(functions.col("value").cast("string"), ORDER).alias("o"))
        .select("o.*")
    )
    result = str(run.folder / "result")
    if run.job == "land":
        writer = orders.writeStream.format("parquet").option("path", result)
    else:
        totals = orders.groupBy("sku").agg(
            functions.count("*").alias("n"),
            functions.sum("qty").alias("qty"),
            functions.sum(functions.expr("qty * price")).alias("revenue"),
        )

        def replace(frame: DataFrame, _batch_id: int) -> None:
            frame.write.mode("overwrite").parquet(result)

        writer = totals.writeStream.outputMode("complete").foreachBatch(replace)
    checkpoints = str(run.folder / "checkpoints")
    query = writer.option("checkpointLocation", checkpoints).trigger(availableNow=True).start()
    query.awaitTermination()
    marks.done()
    spark.stop()


if __name__ == "__main__":
    main(run_of(sys.argv))
