"""What a pipeline shows of itself: status, queries, live views, and its panel in a notebook."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from kframe.markup import card, heading
from kframe.notebook.live import LiveView
from kframe.notebook.page import page
from kframe.notebook.panel import Action, settle, show
from kframe.pipeline.exploring import Exploring
from kframe.pipeline.running import _pipelines
from kframe.reading import Result, query
from kframe.status import Status, status_of


class Showing(Exploring):
    """The part of `Pipeline` that people look at."""

    def status(self) -> Status:
        """What the pipeline is doing; asks no broker."""
        redact = self._settings.redact if self._settings is not None else str
        return status_of(self.name, self._run, self._ledger, redact)

    def sql(self, query_text: str, parameters: object = None) -> Result:
        """Run one read-only query, from any thread, also while the pipeline runs.

        Returns
        -------
        Result
            ``.df()``, ``.arrow()``; all rows are of one snapshot, whose positions it names. A declared table
            that no batch has made yet is empty, where its columns are known: of `land`, `aggregate` and
            `sql_table` over a topic with a schema.

        Raises
        ------
        KframeError
            The query would write, or reads a table that no batch has made and whose columns are not known.
        """
        return query(self._ledger, query_text, parameters, self._unmade)

    def live(
        self, query_text: str, *, chart: str | None = None, title: str | None = None, rows: int = 20
    ) -> LiveView:
        """A query whose display follows the running pipeline: asked again after commits, and only then.

        Parameters
        ----------
        query_text : str
            As for `sql`.
        chart : "line", "bar" or None
            The numeric columns over the first one, drawn by matplotlib (the extra ``[plot]``). None: a table.
        title : str, optional
            Default: the query.
        rows : int
            What a table shows at most.

        Returns
        -------
        LiveView
            Display it, alone or in a `kframe.report`; ``.df()`` holds the rows last shown. When the pipeline
            stops, or the query fails, the last rows stay.

        Raises
        ------
        ConfigError
            There is no such chart. A query that fails says so in the display.
        """
        return LiveView(
            lambda: self.sql(query_text),
            self._commits,
            self._going,
            title=title if title is not None else " ".join(query_text.split()),
            chart=chart,
            rows=rows,
        )

    def stop(self) -> None:
        """End the run after its running batch, and wait for that. Nothing to do is no error."""
        super().stop()
        settle()

    # ---- in a notebook ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        run = self._run
        report = run.report() if run else None
        state = (
            f"{run.state}: {report.rows:,} rows in {report.batches:,} batches" if run and report else "new"
        )
        tables = ", ".join(self._definition.tables) or "none"
        topics = ", ".join(self._definition.topics) or "none"
        return f"<Pipeline {self.name!r}, {state}; topics: {topics}; tables: {tables}>"

    def _repr_html_(self) -> str:
        return _Panel(self).html()

    def _ipython_display_(self) -> None:
        """The live panel while it runs, where there are widgets; else the static page, or text."""
        show(
            _Panel(self),
            [
                Action("Pause", "pause", "Hold after the running batch", self.pause, self._in("running")),
                Action("Resume", "play", "Go on", self.resume, self._in("paused")),
                Action("Stop", "stop", "End after the running batch", self._ask_to_stop, self._going),
            ],
        )

    def _ask_to_stop(self) -> None:
        """As `stop`, without waiting: a button's click must not hold the kernel up."""
        if self._run is not None:
            self._run.stop()

    def _in(self, state: str) -> Callable[[], bool]:
        return lambda: self._run is not None and self._run.state == state

    def _going(self) -> bool:
        return self._run is not None and not self._run.ended.is_set()

    def _commits(self) -> Hashable:
        run = self._run
        return (id(run), run.last.batch_id if run and run.last else None)


class _Panel:
    """A pipeline's page, as displays want it."""

    def __init__(self, pipeline: Showing) -> None:
        self._pipeline = pipeline

    def __repr__(self) -> str:
        return (
            f"{self._pipeline!r}\n{self._pipeline.status()}" if self._pipeline._run else repr(self._pipeline)
        )

    def html(self, *, id: str = "", static: bool = True) -> str:
        """The page; where it cannot be drawn, why."""
        try:
            return page(self._pipeline.status(), id=id, static=static)
        except Exception as error:  # a repr that raises would hide what it is asked for
            return card(
                heading(self._pipeline.name, f"{type(error).__name__}: {error}"), id=id, static=static
            )

    def moved(self) -> Hashable:
        """State, counts, trouble."""
        run = self._pipeline._run
        if run is None:
            return None
        engine = run.engine
        return (
            id(run),
            run.state,
            engine.rows if engine else 0,
            engine.batches if engine else 0,
            run.trouble,
        )

    def going(self) -> bool:
        """Whether there is a run that has not ended."""
        return self._pipeline._going()


def pipelines() -> list[Showing]:
    """The pipelines of this process whose files are open, in the order of their making."""
    return [p for p in _pipelines.values() if isinstance(p, Showing)]
