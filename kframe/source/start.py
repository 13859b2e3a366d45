"""Points in time as users write them: an ISO time, a datetime, epoch milliseconds, or ``"-1h"``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kframe.errors import ConfigError
from kframe.model import TopicPartition

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def to_epoch_ms(at: Any, now: datetime | None = None) -> int:
    """A point in time as milliseconds since the Unix epoch.

    Parameters
    ----------
    at : str, datetime or int
        ``"-1h"`` (s, m, h, d: that long before `now`), an ISO 8601 time, or milliseconds. A time without a
        zone is read as UTC.
    now : datetime, optional
        Default: the current time.

    Raises
    ------
    ConfigError
        It is none of these.
    """
    if isinstance(at, int) and not isinstance(at, bool):
        return at
    if isinstance(at, str) and (ago := re.fullmatch(r"-(\d+)([smhd])", at)):
        moment = (now or datetime.now(UTC)) - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    elif isinstance(at, str):
        try:
            moment = datetime.fromisoformat(at)
        except ValueError:
            raise _not_a_time(at) from None
    elif isinstance(at, datetime):
        moment = at
    else:
        raise _not_a_time(at)
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return round(moment.timestamp() * 1000)


def offset_at(offsets: Mapping[int, int], tp: TopicPartition) -> int:
    """The offset that a user's ``{partition: offset}`` gives for `tp`; `ConfigError` where it has none."""
    if tp.partition not in offsets:
        raise ConfigError(
            f"No offset is given for {tp.topic!r}, partition {tp.partition}.",
            hint="Give every partition of the topic, or use a time.",
        )
    return int(offsets[tp.partition])


def _not_a_time(at: Any) -> ConfigError:
    return ConfigError(
        f"{at!r} is not a point in the log.",
        hint='Use "earliest", "latest", "-1h", an ISO time, a datetime, or {partition: offset}.',
    )
