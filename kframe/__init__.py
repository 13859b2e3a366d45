"""Kafka records to pandas and SQL to DuckDB tables; every record counts exactly once.

The layout, top to bottom; imports point down only::

    cli, demo                       commands
    pipeline                        what users touch
    run, rebuild, status, standalone    one run; a table anew; what a run tells; topics without a pipeline
    engine, worker                  the batch protocol; its pure part
    source  batch  transform  commit  sinks  executors      the protocol's stages; siblings don't meet
    schema, model, errors           values

`kframe.testing` and `kframe.broker` stand beside: a log in memory and faults for users' own tests, and a
real Apache Kafka on loopback.
"""

from kframe import errors
from kframe.broker import LocalKafka, local_kafka
from kframe.model import RunReport
from kframe.pipeline import Pipeline
from kframe.reading import Result
from kframe.schema import Schema
from kframe.standalone import peek, read, write
from kframe.status import Status

__all__ = [
    "LocalKafka",
    "Pipeline",
    "Result",
    "RunReport",
    "Schema",
    "Status",
    "errors",
    "local_kafka",
    "peek",
    "read",
    "write",
]
