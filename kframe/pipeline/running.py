"""Running what has been declared: in the foreground, in the background, and stopping it."""

from __future__ import annotations

import atexit
import difflib
import os
import threading
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

from kframe.commit.ledger import Ledger
from kframe.commit.store import Store, open_store
from kframe.config import Options, options_of
from kframe.definition import Definition
from kframe.errors import ConfigError, Fenced, KframeError, interruptible
from kframe.executors.local import Executor
from kframe.model import RunReport
from kframe.pipeline.delivering import Delivering
from kframe.run import Run, stop_on_sigterm
from kframe.source.kafka import KafkaSource
from kframe.source.protocol import Source
from kframe.source.settings import Settings
from kframe.standby.standing import Standby, leave
from kframe.worker import AtEdge

_ARGUMENTS = ("brokers", "name", "kafka_config", "source", "executor")
_pipelines: dict[tuple[str, str], Running] = {}


class Running(Delivering):
    """The part of `Pipeline` that holds the file and runs the steps."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        brokers: str | None = None,
        name: str | None = None,
        kafka_config: Mapping[str, Any] | None = None,
        source: Source | None = None,
        executor: Executor | None = None,
        at_edge: AtEdge | None = None,
        **options: Any,
    ) -> None:
        self.name = name or Path(path).stem
        self._options = _options(options, kafka_config)
        self._settings = Settings(brokers, kafka_config) if brokers is not None else None
        if (source is None) == (self._settings is None):
            raise ConfigError("Give either brokers= or source=.", hint='brokers="localhost:9092"')
        self._source = source
        self._executor = executor
        self._at_edge = at_edge or (lambda _edge: None)
        self._definition = Definition(self.name)
        self._run: Run | None = None
        self._thread: threading.Thread | None = None
        self._replaced = False
        self._store = _take_over(self, path, self._options.memory_limit)
        self._ledger = Ledger(self._store, self.name)
        self._definition.side_tables = self._ledger.side_tables()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, until: str | None = "end", *, progress: bool = True) -> RunReport:
        """Run on this thread: to the end offsets seen now, or for ever.

        Parameters
        ----------
        until : "end" or None
            None follows the topics until SIGTERM or `stop` (the running batch is finished), or Ctrl-C (it is
            rolled back and KeyboardInterrupt raised).
        progress : bool
            A bar over the records to the end, on a terminal or in a notebook.

        Returns
        -------
        RunReport

        Raises
        ------
        KframeError
            Every error says what was kept. Committed batches stand, in every case.
        """
        if until not in ("end", None):
            raise ConfigError(f"run(until={until!r}): until is 'end' or None.")
        run = self._new_run(until_end=until == "end", progress=progress)
        with stop_on_sigterm(run):
            return run.execute()

    def start(self) -> None:
        """Run in the background, until `stop`. Errors show in `status` and are raised by `wait`."""
        run = self._new_run(until_end=False, progress=False)

        def work() -> None:
            try:
                run.execute()
            except BaseException:
                return

        self._thread = threading.Thread(target=work, name=f"kframe-{self.name}", daemon=True)
        self._thread.start()

    def pause(self) -> None:
        """Hold the background run after its running batch."""
        self._current("pause()").pause()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._current("resume()").resume()

    @interruptible(lambda: "the run ends after its running batch, in the background.")
    def stop(self) -> None:
        """End the run after its running batch, and wait for that. Nothing to do is no error.

        What is committed is delivered, for at most 10 seconds; the next run delivers the rest.
        """
        run = self._run
        if run is None:
            return
        run.stop()
        if self._thread is not None:
            run.ended.wait()
            self._thread = None

    @interruptible(lambda: "the pipeline goes on in the background; stop() ends it.")
    def wait(self, timeout: float | None = None) -> RunReport:
        """Wait for the background run to end.

        Raises
        ------
        TimeoutError
            It still runs after `timeout` seconds.
        KframeError
            What ended it.
        """
        run = self._current("wait()")
        if not run.ended.wait(timeout):
            raise TimeoutError(f"Pipeline {self.name!r} still runs after {timeout} s.")
        if run.error is not None:
            raise run.error
        return run.report()

    def close(self) -> None:
        """Stop, and give up the file, unless another pipeline of this process uses it."""
        self.stop()
        self._store.release(self)
        key = (self._store.path, self.name)
        if _pipelines.get(key) is self:
            del _pipelines[key]

    # ---- inside -------------------------------------------------------------------------------------

    def _new_run(self, *, until_end: bool, progress: bool) -> Run:
        if self._replaced:
            raise Fenced(
                f"Pipeline {self.name!r} was made again; this object is the old one.",
                kept="Nothing was changed.",
                hint="Use the newer object.",
            )
        self.stop()
        self._run = Run(
            definition=self._definition,
            options=self._options,
            store=self._store,
            ledger=self._ledger,
            source=self._open_source(),
            executor=self._executor,
            until_end=until_end,
            progress=progress,
            at_edge=self._at_edge,
            outlets=self._outlets,
            targets=self._targets,
            standby=self._standby(),
        )
        return self._run

    def _standby(self) -> Standby | None:
        if not self._options.standby:
            leave(self._settings, self._ledger, "run()")
            return None
        if self._settings is None:
            raise ConfigError(
                "standby=True publishes a changelog to Kafka: give brokers= instead of source=."
            )
        return Standby(self._settings, self._ledger, self._at_edge)

    def _open_source(self) -> Source:
        if self._source is not None:
            return self._source
        assert self._settings is not None
        return KafkaSource(
            self._settings,
            group_id=f"kframe.{self.name}",
            headers=[t.name for t in self._definition.topics.values() if "headers" in t.include],
        )

    def _current(self, what: str) -> Run:
        if self._run is None:
            raise KframeError(f"{what}: pipeline {self.name!r} has not been started.", hint="start() first.")
        return self._run


def _take_over(pipeline: Running, path: str | os.PathLike[str], memory_limit: str) -> Store:
    """Open the file for `pipeline`; an older object of the same name in this process gives way."""
    key = (os.path.realpath(os.fspath(path)), pipeline.name)
    older = _pipelines.get(key)
    if older is not None and older._store.pid == os.getpid():
        older.stop()
        older._replaced = True
    store = open_store(path, memory_limit)
    store.use(pipeline)
    if older is not None:
        store.release(older)
    _pipelines[key] = pipeline
    return store


@atexit.register
def _stop_all() -> None:
    for pipeline in list(_pipelines.values()):
        if pipeline._store.pid == os.getpid():
            pipeline.stop()


def _options(given: Mapping[str, Any], kafka_config: Mapping[str, Any] | None) -> Options:
    known = [f.name for f in fields(Options)]
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, [*_ARGUMENTS, *known], n=1)
            raise ConfigError(
                f"Pipeline() has no option {name!r}.",
                hint=f"Did you mean {near[0]}?" if near else ", ".join(known),
            )
    return options_of(given, kafka_config)
