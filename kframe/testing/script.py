"""Scripts as data: append, run, crash, resume, check; a failure shows the script and where it was."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd

from kframe.pipeline import Pipeline
from kframe.source.memory import MemorySource
from kframe.testing.faults import Fault, Faults, InjectedFault
from kframe.testing.frames import difference

Expected = pd.DataFrame | Sequence[Mapping[str, Any]] | Callable[[pd.DataFrame], object]


class Action(Protocol):
    """One line of a script."""

    def do(self, stage: Stage) -> None:
        """Do it. An `AssertionError` says that it did not go as written."""


class Stage:
    """What a script acts on: a log in memory, a DuckDB file, and the pipeline that is open at the moment."""

    def __init__(
        self,
        source: MemorySource,
        path: str,
        define: Callable[[Pipeline], object],
        options: Mapping[str, Any],
    ) -> None:
        self.source = source
        self.path = path
        self.faults = Faults()
        self._define = define
        self._options = options
        self._pipeline: Pipeline | None = None

    @property
    def pipeline(self) -> Pipeline:
        """The open pipeline; a new object, defined anew, after a crash."""
        if self._pipeline is None:
            self._pipeline = Pipeline(self.path, source=self.source, at_edge=self.faults, **self._options)
            self._define(self._pipeline)
        return self._pipeline

    def drop(self) -> None:
        """Close the pipeline, as the end of its process does."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None


def play(
    script: Iterable[Action],
    define: Callable[[Pipeline], object],
    *,
    source: MemorySource | None = None,
    path: str | os.PathLike[str] | None = None,
    **options: Any,
) -> None:
    """Play a script against a `MemorySource` and a DuckDB file.

    Parameters
    ----------
    script : iterable of actions
        `add`, `skip`, `partitions`, `run`, `crash`, `resume`, `check`.
    define : callable
        Declares topics and steps on the pipeline that it is given; called again after each crash.
    source : MemorySource, optional
        Default: an empty one.
    path : path, optional
        Default: a temporary file.
    **options
        Of `Pipeline`, such as ``batch_rows_max``.

    Raises
    ------
    AssertionError
        An action did not go as written. The message holds the script with ``=>`` at that action.

    Examples
    --------
    >>> def define(shop):
    ...     shop.topic("orders", schema={"sku": "str", "qty": "int64"})
    ...     shop.aggregate("sold", source="orders", by="sku", n=("qty", "sum"))
    >>> play([
    ...     add("orders", {"sku": "a", "qty": 1}, {"sku": "a", "qty": 2}),
    ...     crash("rows_written"),
    ...     resume(),
    ...     check("sold", [{"sku": "a", "n": 3}]),
    ... ], define)
    """
    actions = list(script)
    with tempfile.TemporaryDirectory(prefix="kframe-script-") as folder:
        stage = Stage(
            source or MemorySource(), str(path or os.path.join(folder, "script.duckdb")), define, options
        )
        try:
            for i, action in enumerate(actions):
                try:
                    action.do(stage)
                except Exception as error:
                    raise AssertionError(f"{error}\n\n{_show(actions, i)}") from error
        finally:
            stage.drop()


def _show(actions: Sequence[Action], at: int) -> str:
    return "\n".join(f"{'=>' if i == at else '  '} {action!r}" for i, action in enumerate(actions))


# ---- actions ----------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class _Add:
    topic: str
    values: tuple[Any, ...]
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        told = [repr(self.topic), *map(repr, self.values), *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"add({', '.join(told)})"

    def do(self, stage: Stage) -> None:
        for value in self.values:
            stage.source.append(self.topic, value, **self.options)


@dataclass(frozen=True, repr=False)
class _Call:
    """A method of the log, by name."""

    name: str
    method: str
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]

    def __repr__(self) -> str:
        told = [*map(repr, self.arguments), *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"{self.name}({', '.join(told)})"

    def do(self, stage: Stage) -> None:
        getattr(stage.source, self.method)(*self.arguments, **self.options)


@dataclass(frozen=True, repr=False)
class _Run:
    fresh: bool

    def __repr__(self) -> str:
        return "resume()" if self.fresh else "run()"

    def do(self, stage: Stage) -> None:
        if self.fresh:
            stage.drop()
        stage.pipeline.run(progress=False)


@dataclass(frozen=True, repr=False)
class _Crash:
    fault: Fault

    def __repr__(self) -> str:
        return f"crash({self.fault.edge!r}, {self.fault.kind!r}, at={self.fault.at})"

    def do(self, stage: Stage) -> None:
        stage.faults.arm(self.fault)
        try:
            stage.pipeline.run(progress=False)
        except InjectedFault:
            pass
        except KeyboardInterrupt:
            if self.fault not in stage.faults.fired:
                raise
        if self.fault not in stage.faults.fired:
            stage.faults.disarm()
            raise AssertionError(
                f"The run ended before pass {self.fault.at} of {self.fault.edge!r}: no crash."
            )
        stage.faults.fired.clear()
        stage.drop()


@dataclass(frozen=True, repr=False)
class _Check:
    table: str
    expected: Expected

    def __repr__(self) -> str:
        return f"check({self.table!r}, {getattr(self.expected, '__name__', None) or self.expected!r})"

    def do(self, stage: Stage) -> None:
        got = stage.pipeline.read(self.table)
        if not callable(self.expected):
            told = difference(got, self.expected)
            assert not told, f"Table {self.table!r}: {told}"
        elif self.expected(got) is False:
            raise AssertionError(f"Table {self.table!r} is not as checked:\n{got}")


def add(topic: str, *values: Any, **options: Any) -> Action:
    """Append records: bytes as they are, None a tombstone, anything else as JSON.

    Options are those of `MemorySource.append`: key, partition, timestamp_ms, headers, gap.
    """
    return _Add(topic, values, options)


def skip(topic: str, count: int = 1, *, partition: int = 0) -> Action:
    """Move a partition's end without a record, as a transaction marker does."""
    return _Call("skip", "skip", (topic, count), {"partition": partition})


def partitions(topic: str, count: int) -> Action:
    """Add `count` partitions to a topic."""
    return _Call("partitions", "add_partitions", (topic, count), {})


def run() -> Action:
    """Run the pipeline to the log's end."""
    return _Run(fresh=False)


def crash(edge: str, kind: str = "exception", at: int = 1) -> Action:
    """Run, and fall at an edge's `at`-th pass; the pipeline object is lost. Falling short is a failure.

    Parameters
    ----------
    edge : str
        One of `kframe.testing.EDGES`.
    kind : "exception" or "interrupt"
    at : int
    """
    if kind == "kill":
        raise ValueError("crash(kind='kill') would kill the test itself; use Faults in a process of its own.")
    return _Crash(Fault(edge, kind, at))


def resume() -> Action:
    """Open the file with a new `Pipeline`, as a new process does, and run to the log's end."""
    return _Run(fresh=True)


def check(table: str, expected: Expected) -> Action:
    """Compare a table, in any order of rows.

    Parameters
    ----------
    table : str
    expected : DataFrame, sequence of rows as mappings, or callable
        A callable gets the table's DataFrame and returns False, or raises, when it is wrong.
    """
    return _Check(table, expected)
