"""For users' own tests: a log in memory, scripts as data, faults at every edge, and the law of the library.

A step is a plain function, so call it first. Then ask what kframe's own tests ask:

`check_batch_equivalence`
    Does the table depend on how the log was cut into batches?
`play`
    A script of `add`, `skip`, `partitions`, `run`, `crash`, `resume` and `check`; a failure shows where.
`Faults`
    An exception, a KeyboardInterrupt or a SIGKILL at any of `EDGES`, of `DELIVERY_EDGES` or of
    `STANDBY_EDGES`: ``Pipeline(..., at_edge=faults)``.
`MemorySource`
    A log with Kafka's offsets, gaps and tombstones: ``Pipeline(..., source=log)``.

Examples
--------
>>> import pandas as pd
>>> from kframe.testing import check_batch_equivalence
>>> def big(orders):
...     return orders[orders.qty > 1]
>>> check_batch_equivalence(big, pd.DataFrame({"sku": ["a", "b"], "qty": [1, 2]}))
"""

from kframe.deliver.deliverer import EDGES as DELIVERY_EDGES
from kframe.engine import EDGES
from kframe.source.memory import MemorySource
from kframe.standby.standing import EDGES as STANDBY_EDGES
from kframe.testing.equivalence import check_batch_equivalence
from kframe.testing.faults import Fault, Faults, InjectedFault
from kframe.testing.frames import difference
from kframe.testing.script import add, check, crash, partitions, play, resume, run, skip

__all__ = [
    "DELIVERY_EDGES",
    "EDGES",
    "STANDBY_EDGES",
    "Fault",
    "Faults",
    "InjectedFault",
    "MemorySource",
    "add",
    "check",
    "check_batch_equivalence",
    "crash",
    "difference",
    "partitions",
    "play",
    "resume",
    "run",
    "skip",
]
