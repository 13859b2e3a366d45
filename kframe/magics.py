"""The notebook magics: ``%load_ext kframe``, then ``%kframe`` and ``%%kframe NAME``."""

from __future__ import annotations

from typing import Any

import pandas as pd
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class

from kframe.pipeline.showing import Showing, pipelines

_VERBS = ("pause", "resume", "stop")


@magics_class
class KframeMagics(Magics):
    """``%kframe`` and ``%%kframe``."""

    @line_cell_magic
    def kframe(self, line: str, cell: str | None = None) -> pd.DataFrame | None:
        """All pipelines of this process, one of them steered, or SQL on one's store.

        ::

            %kframe                        every pipeline: state, rows, rates, lag, file
            %kframe stop NAME              also: pause, resume
            %%kframe NAME [variable]       the cell is SQL; its rows are shown, or put into the variable
        """
        words = line.split()
        if cell is not None:
            return self._query(words, cell)
        if not words:
            return overview()
        if len(words) != 2 or words[0] not in _VERBS:
            raise UsageError(f"%kframe, or %kframe {'|'.join(_VERBS)} NAME, or %%kframe NAME [variable]")
        getattr(_find(words[1]), words[0])()
        return None

    def _query(self, words: list[str], sql: str) -> pd.DataFrame | None:
        if len(words) not in (1, 2) or (len(words) == 2 and not words[1].isidentifier()):
            raise UsageError("%%kframe NAME [variable], then SQL in the cell's other lines")
        rows = _find(words[0]).sql(sql).df()
        if len(words) == 1:
            return rows
        assert self.shell is not None
        self.shell.user_ns[words[1]] = rows
        return None


def overview() -> pd.DataFrame:
    """One row a pipeline: pipeline, state, rows, processed_per_s, arriving_per_s, lag, error, file."""
    columns = ["pipeline", "state", "rows", "processed_per_s", "arriving_per_s", "lag", "error", "file"]
    rows: list[tuple[Any, ...]] = []
    for pipeline in pipelines():
        s = pipeline.status()
        rates = round(s.processed_per_s), round(s.arriving_per_s)
        lag = sum(s.lag.values()) if s.lag else None
        rows.append((s.pipeline, s.state, s.rows, *rates, lag, s.error or "", pipeline._store.path))
    return pd.DataFrame(rows, columns=columns).astype({"lag": "Int64"})


def _find(name: str) -> Showing:
    found = [p for p in pipelines() if p.name == name]
    if len(found) == 1:
        return found[0]
    names = ", ".join(p.name for p in pipelines()) or "none"
    if found:
        raise UsageError(f"{len(found)} files have a pipeline {name!r}; use its object instead.")
    raise UsageError(f"There is no pipeline {name!r} in this process. Pipelines: {names}.")
