"""The progress bar, on a terminal or in a notebook."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

from tqdm.auto import tqdm


class Advance(Protocol):
    """Tells a bar how much more has been done; and of how much in all, where that was not known before."""

    def __call__(self, more: int, of: int | None = None) -> None: ...


@contextlib.contextmanager
def progress_bar(doing: str, unit: str, *, shown: bool, total: int | None = None) -> Iterator[Advance]:
    """A bar for the block's duration. Not `shown`, or neither a terminal nor a notebook: none."""
    with tqdm(desc=doing, unit=unit, unit_scale=True, total=total, disable=None if shown else True) as bar:

        def advance(more: int, of: int | None = None) -> None:
            if of is not None and bar.total != of:
                bar.reset(of)
            bar.update(more)

        yield advance
