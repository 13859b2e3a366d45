"""What a pipeline says about itself."""

from __future__ import annotations

import pytest

from kframe.status import limited_by


@pytest.mark.parametrize(
    ("timings", "said"),
    [
        ({"fetch": 900.0, "decode": 80.0, "steps": 10.0, "write": 10.0}, "waiting for records"),
        ({"fetch": 5.0, "decode": 400.0, "steps": 90.0, "write": 200.0}, "decoding"),
        ({"fetch": 5.0, "decode": 400.0, "steps": 300.0, "write": 200.0}, "your functions"),
        ({"fetch": 5.0, "decode": 10.0, "write": 200.0}, "writing to DuckDB"),
    ],
)
def test_the_pace_is_set_by_the_slower_half(timings: dict[str, float], said: str) -> None:
    """Kills: the longest single stage, though two others together take longer beside it."""
    assert said in limited_by(timings)
