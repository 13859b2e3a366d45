"""What every step can do, whatever it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import duckdb
import pyarrow as pa

from kframe.model import Change, Defined


class Step(Protocol):
    """One named table's way from a batch's records to changed rows.

    `partial` is pure and may run anywhere; `merge` reads the store and writes nothing.
    """

    @property
    def name(self) -> str:
        """The table it makes."""

    @property
    def topics(self) -> tuple[str, ...]:
        """The topics whose records it reads."""

    @property
    def tables(self) -> tuple[str, ...]:
        """The tables whose rows it reads; with any, it runs where the store is."""

    def fingerprint(self) -> str:
        """A text that changes when the definition does."""

    def form(self) -> str:
        """How its rows or groups are kept: with another one, what is stored cannot be gone on with."""

    def partial(
        self,
        con: duckdb.DuckDBPyConnection,
        frames: Mapping[str, pa.Table],
        tables: Mapping[str, pa.Table],
    ) -> pa.Table:
        """What this step makes of some records, on a private in-memory connection."""

    def combine(self, con: duckdb.DuckDBPyConnection, partials: Sequence[pa.Table]) -> pa.Table:
        """Several partials, at least one, as if their records had come together."""

    def merge(self, cur: duckdb.DuckDBPyConnection, partial: pa.Table) -> list[Change]:
        """The rows that change in the store, given what a partial says and what the store holds."""


def defined(steps: Iterable[Step]) -> dict[str, Defined]:
    """The definitions of steps by name, as the ledger keeps them."""
    return {step.name: Defined(step.fingerprint(), step.form()) for step in steps}
