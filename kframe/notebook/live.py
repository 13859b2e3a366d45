"""Live results: a query's rows or chart, asked again after commits, alone or several in a report."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable

import duckdb
import pandas as pd

from kframe.errors import ConfigError, KframeError
from kframe.markup import card, heading, text
from kframe.notebook.chart import CHARTS, draw
from kframe.notebook.panel import show
from kframe.reading import Result

_SHARE = 10  # a query that takes long is asked again after this many times as long


class LiveView:
    """A query whose display follows the commits of a running pipeline. Made by `Pipeline.live`.

    Parameters
    ----------
    query : callable
        Runs it.
    commits : callable
        Another value after each commit.
    going : callable
        Whether more commits may come.
    title : str
    chart : "line", "bar" or None
        None: a table.
    rows : int
        The table's first rows that are shown.
    """

    def __init__(
        self,
        query: Callable[[], Result],
        commits: Callable[[], Hashable],
        going: Callable[[], bool],
        *,
        title: str,
        chart: str | None,
        rows: int,
    ) -> None:
        if chart not in (None, *CHARTS):
            raise ConfigError(f"chart={chart!r} is not one of {', '.join(map(repr, CHARTS))} or None.")
        self._query = query
        self._commits = commits
        self._going = going
        self._title = title
        self._chart = chart
        self._rows = rows
        self._lock = threading.Lock()
        self._seen: Hashable = object()
        self._due = 0.0
        self._result: Result | None = None
        self._content = ""
        self._error = ""

    def __repr__(self) -> str:
        self._ask()
        rows = str(self._result) if self._result is not None else "no rows yet"
        return f"{self._title}\n{rows}{f'{chr(10)}{self._error}' if self._error else ''}"

    def _repr_html_(self) -> str:
        return self.html()

    def _ipython_display_(self) -> None:
        show(self)

    def df(self) -> pd.DataFrame | None:
        """The rows as last shown, as of ``attrs["batch_id"]``; None before there were any."""
        return self._result.df() if self._result is not None else None

    def html(self, *, id: str = "", static: bool = True) -> str:
        """The rows or the chart; asked again when something was committed since."""
        self._ask()
        return card(self.body(), id=id, static=static)

    def body(self) -> str:
        """The content without its frame, as last asked for."""
        failed = f'<div class="kf-error" role="alert">{text(self._error)}</div>' if self._error else ""
        return f"{heading(self._title)}{self._content or '<small>no rows yet</small>'}{failed}"

    def moved(self) -> Hashable:
        """Another value after a commit, but not soon after a query that took long."""
        due = time.monotonic() >= self._due or not self._going()
        return self._commits() if due else self._seen

    def going(self) -> bool:
        """Whether the pipeline runs."""
        return self._going()

    def _ask(self) -> None:
        """Run the query if something was committed since; what fails keeps the last rows."""
        with self._lock:
            commits = self.moved()
            if commits == self._seen:
                return
            began = time.monotonic()
            try:
                self._result = self._query()
                self._content = self._drawn(self._result)
                self._error = ""
            except (duckdb.Error, KframeError, ValueError, TypeError) as error:
                self._error = str(error)
            self._seen = commits
            self._due = time.monotonic() + _SHARE * (time.monotonic() - began)

    def _drawn(self, result: Result) -> str:
        if self._chart is None:
            return result.html(self._rows)
        note = f"{result.table.num_rows:,} rows, as of {result.as_of}"
        chart = draw(result.df(), self._chart, alt=f"{self._chart} chart of {self._title}; {note}")
        return f"{chart}<div><small>{text(note)}</small></div>"


class Report:
    """Several live views in one display. Made by `report`."""

    def __init__(self, views: tuple[LiveView, ...], title: str) -> None:
        self._views = views
        self._title = title

    def __repr__(self) -> str:
        return "\n\n".join([*([self._title] if self._title else []), *map(repr, self._views)])

    def _repr_html_(self) -> str:
        return self.html()

    def _ipython_display_(self) -> None:
        show(self)

    def html(self, *, id: str = "", static: bool = True) -> str:
        """All views, side by side where there is room."""
        for view in self._views:
            view._ask()
        cells = "".join(
            '<div style="display:inline-block;vertical-align:top;margin:8px 16px 8px 0;max-width:100%">'
            f"{view.body()}</div>"
            for view in self._views
        )
        title = (
            f'<div><strong style="font-size:17px">{text(self._title)}</strong></div>' if self._title else ""
        )
        return card(title + cells, id=id, static=static, wide=True)

    def moved(self) -> Hashable:
        """Another value when any view's is."""
        return tuple(view.moved() for view in self._views)

    def going(self) -> bool:
        """Whether any view's pipeline runs."""
        return any(view.going() for view in self._views)


def report(*views: LiveView, title: str = "") -> Report:
    """Several live views as one display that follows all of their pipelines.

    Parameters
    ----------
    views : LiveView
        Made by `Pipeline.live`, of one pipeline or several.

    Examples
    --------
    >>> kf.report(shop.live("FROM revenue"), shop.live("FROM by_region", chart="bar"))  # doctest: +SKIP
    """
    if not views or not all(isinstance(view, LiveView) for view in views):
        raise ConfigError("report() takes live views.", hint='kf.report(shop.live("FROM revenue"), ...)')
    return Report(views, title)
