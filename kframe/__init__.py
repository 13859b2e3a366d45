"""Kafka records to pandas and SQL to DuckDB tables; every record counts exactly once.

The layout, top to bottom; imports point down only::

    cli, demo                       commands
    magics                          %kframe
    carrying                        a pipeline that carries a published topic to a store
    pipeline                        what users touch
    run, taking_over, rebuild, ...  one run, and before it; a table anew; queries; what a run tells
    notebook, meter                 pages, live panels and results; rates
    standalone, replica, restoring  topics without a pipeline; a copy of another's tables; its state anew
    definition, config              what a pipeline is made of; its options
    standby                         the changelog, restoring from it, which instance is active
    engine, worker, ahead           the batch protocol; its pure part; the next batch in advance
    source  batch  transform  commit  sinks  deliver  executors     its stages; siblings don't meet
    schema, model, errors, timings  values
    markup                          pieces of HTML

`kframe.testing` and `kframe.broker` stand beside: a log in memory and faults for users' own tests, and a
real Apache Kafka on loopback.
"""

from kframe import errors
from kframe.broker import LocalKafka, local_kafka
from kframe.carrying import carry
from kframe.model import RunReport
from kframe.notebook.live import LiveView, report
from kframe.pipeline import Pipeline
from kframe.reading import Result
from kframe.replica import Replica, follow
from kframe.restoring import Restored, restore
from kframe.schema import Schema
from kframe.standalone import peek, read, write
from kframe.status import Status

__all__ = [
    "LiveView",
    "LocalKafka",
    "Pipeline",
    "Replica",
    "Restored",
    "Result",
    "RunReport",
    "Schema",
    "Status",
    "carry",
    "errors",
    "follow",
    "local_kafka",
    "peek",
    "read",
    "report",
    "restore",
    "write",
]


def load_ipython_extension(shell: object) -> None:
    """``%load_ext kframe``: the magics ``%kframe`` and ``%%kframe``."""
    from kframe.magics import KframeMagics  # needs IPython

    shell.register_magics(KframeMagics)  # type: ignore[attr-defined]
