"""A pipeline's status as one static HTML page: in the live panel, in reprs, in saved notebooks."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from kframe.markup import (
    ARRIVING,
    PROCESSED,
    bar,
    card,
    count,
    counted,
    duration,
    figure,
    milliseconds,
    rate,
    sparkline,
    text,
)
from kframe.model import BatchReport, TopicPartition, show_ranges
from kframe.status import Failure, Status

_SIGNS = {
    "new": ("○", "#8b949e"),
    "running": ("▶\ufe0e", "#1a9c4b"),
    "paused": ("‖", ARRIVING),
    "stopping": ("■", ARRIVING),
    "stopped": ("■", "#8b949e"),
    "failed": ("✖", "#d1383f"),
}
"""Each state's sign and colour; its word always stands beside them."""

_STAGES = {
    "fetch": ("waiting for Kafka", "#2f81f7"),
    "decode": ("decoding", "#7d6fd6"),
    "steps": ("your functions", "#d97706"),
    "write": ("DuckDB", "#1a9c4b"),
}
_WORST = 5  # partitions whose lag is shown
_KEEPS_UP_S = 3.0  # a lag that is processed in this time is what commits and fetches hold, not a backlog
_ENDED = ("stopped", "failed")


def page(status: Status, *, id: str = "", static: bool = True) -> str:
    """The page. It says "as of" and needs no script, so it can be kept.

    Parameters
    ----------
    id : str, optional
        Of the outermost element.
    static : bool
        False: part of a living display, which has brought `kframe.markup.STYLE` and shows the present.
    """
    parts = [
        _head(status),
        _failure(status.failure),
        _trouble(status),
        _progress(status),
        _figures(status),
        _rates(status),
        _stages(status.last, status.limited_by),
        _lag(status.lag) if status.state not in _ENDED or any(status.lag.values()) else "",
        _as_of(status) if static else "",
    ]
    return card("".join(parts), id=id, static=static)


def _head(status: Status) -> str:
    sign, colour = _SIGNS.get(status.state, ("", "#8b949e"))
    last = status.last
    note = f"batch {count(last.batch_id)} committed {last.committed_at:%Y-%m-%d %H:%M:%S} UTC" if last else ""
    return (
        f'<div><strong style="font-size:17px;margin-right:10px">{text(status.pipeline)}</strong>'
        f'<span class="kf-state" style="margin-right:10px">'
        f'<span aria-hidden="true" style="color:{colour}">{sign}</span> {text(status.state)}</span>'
        f"<small>{text(note)}</small></div>"
    )


def _progress(status: Status) -> str:
    done = status.progress
    if done is None or (status.state in _ENDED and not status.bounded):
        return ""
    told = "of this run" if status.bounded else "of what has arrived"
    return (
        f'<div style="margin:8px 0 0 0"><progress max="100" value="{_percent(done)}" '
        f'aria-label="processed {told}"></progress> <span class="kf-n">{_percent(done)} %</span> '
        f"<small>{told}</small></div>"
    )


def _percent(share: float) -> int:
    return int(100 * share)  # 100 % only when all is done


def _figures(status: Status) -> str:
    dead = status.dead_letters
    shown = [figure("rows", count(status.rows), f"in {counted(status.batches, 'batch', 'batches')}")]
    if status.state in _ENDED and status.rows:
        shown.append(figure("on average", rate(status.rows_per_s), "rows"))
    if status.last:
        shown.append(
            figure("last batch", milliseconds(_work_ms(status.last)), counted(status.last.rows, "row"))
        )
    if status.lag:
        behind = sum(status.lag.values())
        shown.append(figure("lag", count(behind), _catching_up(status, behind)))
    if dead:
        shown.append(figure("dead letters", count(dead), "see dead_letters()"))
    return f"<div>{''.join(shown)}</div>"


def _work_ms(last: BatchReport) -> float:
    """A batch's own work, without the wait for records."""
    return sum(ms for stage, ms in last.timings_ms.items() if stage in _STAGES and stage != "fetch")


def _catching_up(status: Status, behind: int) -> str:
    if status.state in _ENDED:
        return "when it ended"
    if not behind:
        return "caught up"
    if status.state != "running":
        return "offsets behind"
    if behind <= _KEEPS_UP_S * status.processed_per_s:
        return "keeps up"
    return f"caught up in {duration(status.catch_up_s)}" if status.catch_up_s else "not catching up"


def _rates(status: Status) -> str:
    if not status.history or status.state == "failed" or (status.state == "stopped" and status.bounded):
        return ""
    processed, arriving = rate(status.processed_per_s), rate(status.arriving_per_s)
    alt = f"The last minute: processed {processed}, arriving {arriving} at its end."
    legend = (
        f'<span style="color:{PROCESSED}" aria-hidden="true">━━</span> processed '
        f'<strong class="kf-n">{processed}</strong>'
    )
    if not status.bounded:
        legend += (
            f' &ensp; <span style="color:{ARRIVING}" aria-hidden="true">╍╍</span> arriving '
            f'<strong class="kf-n">{arriving}</strong>'
        )
    return (
        f'<div style="margin:12px 0 0 0">{sparkline(status.history, alt)}'
        f"<div>{legend} <small>&ensp;offsets, last minute{_records_among(status)}</small></div></div>"
    )


def _records_among(status: Status) -> str:
    """How many of the processed offsets held records, where not all of them did."""
    if status.records_per_s >= 0.99 * status.processed_per_s:
        return ""
    return f"; {rate(status.records_per_s)} of them records"


def _stages(last: BatchReport | None, limit: str | None) -> str:
    """Where a batch's time goes, most first."""
    if last is None:
        return ""
    spent = {stage: last.timings_ms[stage] for stage in _STAGES if last.timings_ms.get(stage)}
    total = sum(spent.values())
    if not total:
        return ""
    parts = [(100 * ms / total, *_STAGES[stage]) for stage, ms in sorted(spent.items(), key=lambda x: -x[1])]
    strip = "".join(
        f'<div style="display:inline-block;width:{round(0.8 * share)}px;height:8px;'
        f'background-color:{colour}"></div>'
        for share, _, colour in parts
    )
    told = "&ensp; ".join(
        f'<span style="white-space:nowrap"><span style="color:{colour}" aria-hidden="true">■</span> '
        f'{name} <span class="kf-n">{share:.0f} %</span></span>'
        for share, name, colour in parts
    )
    pace = f"; the pace is set by {limit}" if limit else ""
    return (
        f'<div style="margin:10px 0 0 0"><small>time of a batch{text(pace)}</small><br>'
        f'<div aria-hidden="true" style="display:inline-block;margin-right:10px">{strip}</div>{told}</div>'
    )


def _lag(lag: Mapping[TopicPartition, int]) -> str:
    """The partitions that lag most, as bars beside their numbers, and how many more there are."""
    worst = sorted(((n, tp) for tp, n in lag.items()), key=lambda item: (-item[0], item[1]))
    if not worst:
        return ""
    most = worst[0][0] or 1
    rows = "".join(
        f'<tr><th scope="row">{text(tp)}</th><td>{bar(n / most, PROCESSED)}</td>'
        f'<td class="kf-n">{count(n)}</td></tr>'
        for n, tp in worst[:_WORST]
    )
    rest = worst[_WORST:]
    others = f"and {count(len(rest))} more, {count(sum(n for n, _ in rest))} together" if rest else ""
    return (
        '<div style="margin:10px 0 0 0"><small>lag by partition, in offsets</small>'
        f'<table class="kf-plain">{rows}</table><small>{text(others)}</small></div>'
    )


def _as_of(status: Status) -> str:
    """When this was so, on a page that stays while the pipeline goes on."""
    if status.state in ("new", *_ENDED):
        return ""
    return (
        f'<div style="margin:8px 0 0 0"><small>as of {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC</small></div>'
    )


def _trouble(status: Status) -> str:
    if not status.trouble or status.failure:
        return ""
    return (
        '<div class="kf-error" role="status" style="margin:8px 0 0 0">'
        f"<strong>Waiting for the brokers.</strong> <span>{text(status.trouble)}</span></div>"
    )


def _failure(failure: Failure | None) -> str:
    if failure is None:
        return ""
    lines = [f"<strong>{text(failure.kind)}: {text(failure.what)}</strong>"]
    if failure.where:
        lines.append(f"<code>{text(failure.where)}</code>")
    if failure.ranges:
        lines.append(f"Rolled back: {text(show_ranges(failure.ranges))}")
    lines += [f'<span class="kf-faint">{text(line)}</span>' for line in (failure.kept, failure.hint) if line]
    return (
        f'<div class="kf-error" role="alert" style="margin:8px 0 0 0">{"<br>".join(lines)}'
        f"<details><summary>Traceback</summary><pre>{text(failure.traceback)}</pre></details></div>"
    )
