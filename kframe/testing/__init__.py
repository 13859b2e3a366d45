"""For users' own tests: a log in memory, scripts as data, faults at every edge, and the law of the library.

`check_batch_equivalence` asks of one step what kframe's own tests ask of all: that the table does not depend
on how the log was cut into batches.
"""

from kframe.engine import EDGES
from kframe.source.memory import MemorySource

__all__ = ["EDGES", "MemorySource"]
