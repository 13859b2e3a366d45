"""docs/performance.md: its tables, written between markers from the results; `benchmarks.plots` draws."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks import results
from benchmarks.measure import ROOT

PAGE = ROOT / "docs" / "performance.md"
JOBS = {
    "read": "read only",
    "copy": "read and copy: **the limit**",
    "land": "land",
    "aggregate": "aggregate",
    "pandas": "aggregate, pandas function",
}
Row = dict[str, Any]


def draw() -> None:
    """Write every table that has results into the page, and its plots beside it."""
    from benchmarks import plots

    text = PAGE.read_text()
    for name, tables in TABLES.items():
        found = results.load(name)
        if found is not None:
            text = _between_markers(text, name, _origin(found) + tables(found["rows"]))
            plots.PLOTS[name](found["rows"])
    PAGE.write_text(text)


def throughput_table(rows: Sequence[Row]) -> str:
    """Every figure, with its ratio to the C limit and to the script by hand, job by job."""
    rates = {(row["peer"], row["job"]): row["rate"] for row in rows}
    limit = next((row["rate"] for row in rows if row["job"] == "copy"), 0)
    lines = []
    for job, name in JOBS.items():
        hand = rates.get(("by hand", "aggregate" if job == "pandas" else job), 0)
        ours = rates.get(("kframe", job), 0)
        for row in (row for row in rows if row["job"] == job):
            rate = row["rate"]
            figures = [row["problem"]]
            if not row["problem"]:
                figures = [
                    f"{rate:,}", f"{row['rate_from_start']:,}", _ratio(rate, limit), _ratio(rate, hand),
                    _ratio(ours, rate), f"{row['cpu_s']:.1f}", f"{row['memory_mb']:,}",
                ]  # fmt: skip
            lines.append([name, row["peer"], *figures])
    head = (
        "job", "system", "records/s", "from process start", "of the C limit", "x by hand", "kframe / it",
        "CPU s", "peak MB",
    )  # fmt: skip
    return _table(head, lines)


def _peers_table(rows: Sequence[Row]) -> str:
    """Version, guarantee and settings, a row a system."""
    systems = {row["peer"]: row for row in rows}.values()
    head = ("system", "version", "guarantee", "settings")
    return _table(
        head, [[r["peer"], r["version"] or r["problem"], r["guarantee"], r["settings"]] for r in systems]
    )


def _latency_table(rows: Sequence[Row]) -> str:
    head = ("system", "commit interval, ms", "p50, ms", "p99, ms", "longest, ms", "of one core")
    columns = ("system", "commit_interval_ms", "p50_ms", "p99_ms", "max_ms", "cpu_share")
    return _table(head, [[_show(row[c]) for c in columns] for row in rows])


def _growth_table(rows: Sequence[Row]) -> str:
    head = (
        "what grows", "step", "to", "records/s", "a batch, ms", "slowest", "resume, ms", "first batch, ms",
        "peak MB", "file MB",
    )  # fmt: skip
    columns = (
        "rate", "batch_ms", "slowest_batch_ms", "resume_ms", "first_batch_ms", "memory_mb", "file_mb"
    )  # fmt: skip
    lines = []
    for row in rows:
        figures = [row["problem"]] if row["problem"] else [_show(row[c]) for c in columns]
        lines.append([row["axis"], row["step"], _show(row["size"]), *figures])
    return _table(head, lines)


def _backpressure_table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        memory = row["memory_over_time_mb"]
        halves = [max(part, default=0) for part in (memory[: len(memory) // 2], memory[len(memory) // 2 :])]
        result = row["wrong"] or "every record once"
        lines.append(
            [row["function"], _show(row["rate"]), result, *map(_show, halves), _show(row["memory_mb"])]
        )
    head = ("function", "records/s", "result", "most MB, first half", "second half", "peak MB")
    return _table(head, lines)


def restart_table(rows: Sequence[Row]) -> str:
    """Seconds of each system: the middle round's, and the range of all."""
    head = (
        "system", "version", "rows", "restoring, s", "rows/s", "empty folder to first new commit, s",
        "SIGKILL to first new commit, s", "peak MB",
    )  # fmt: skip
    lines = []
    for row in rows:
        figures = [row["problem"]]
        if not row["problem"]:
            figures = [
                _show(row["rows"]), _show(row["restoring_s"]), _show(row["rate"]),
                _with_range(row["restore_s"], row["restores_s"]),
                _with_range(row["takeover_s"], row["takeovers_s"]), _show(row["memory_mb"]),
            ]  # fmt: skip
        lines.append([row["peer"], row["version"], *figures])
    return _table(head, lines)


TABLES = {
    "throughput": lambda rows: throughput_table(rows) + "\n" + _peers_table(rows),
    "latency": _latency_table,
    "growth": _growth_table,
    "backpressure": _backpressure_table,
    "restart": restart_table,
}


def _origin(found: Row) -> str:
    machine, settings = found["machine"], found["settings"]
    told = ", ".join(f"{name.replace('_', ' ')} {_show(value)}" for name, value in settings.items())
    return (
        f"Measured at {found['measured_at']} on {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}; {told}.\n\n"
    )


def _between_markers(text: str, name: str, content: str) -> str:
    begin, end = f"<!-- {name}: written by ./run-benchmarks -->", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{PAGE} lacks the markers of {name!r}")
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{content}{end}", text)


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *([*line, *[""] * (len(head) - len(line))] for line in lines)]
    return "".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |\n" for row in rows)


def _with_range(middle: float, found: Sequence[float]) -> str:
    return f"{middle} ({min(found)} to {max(found)})"


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if value and base else ""


def _show(value: object) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
