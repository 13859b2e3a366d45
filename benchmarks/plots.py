"""The plots of docs/performance.md: SVG, the same bytes for the same figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams |= {"svg.hashsalt": "kframe", "svg.fonttype": "none"}

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import NullFormatter  # noqa: E402

from benchmarks.measure import ROOT  # noqa: E402

FOLDER = ROOT / "docs" / "images"
OURS, THEIRS, LIMIT = "#1f6feb", "#9aa4b2", "#d1242f"
IN_MEMORY = ("bytes a record", "records of 1 kB")
"""What grows there should leave memory alone; elsewhere time is what is drawn."""
Row = dict[str, Any]


def _throughput(rows: Sequence[Row]) -> None:
    """Bars of records a second, job by job, with the C limit as a line."""
    jobs = ("land", "aggregate", "pandas")
    bars = [[row for row in rows if row["job"] == job and not row["problem"]] for job in jobs]
    figure, panels = plt.subplots(
        len(jobs), 1, figsize=(8, 5), sharex=True, height_ratios=[max(1, len(b)) for b in bars]
    )
    limit = next((row["rate"] for row in rows if row["job"] == "copy"), None)
    for panel, job, found in zip(panels, jobs, bars, strict=True):
        names = [row["peer"] for row in found][::-1]
        rates = [row["rate"] / 1e6 for row in found][::-1]
        panel.barh(names, rates, color=[OURS if name == "kframe" else THEIRS for name in names])
        panel.set_title(job if job != "pandas" else "aggregate, pandas function", loc="left", fontsize=10)
        if limit:
            panel.axvline(limit / 1e6, color=LIMIT)
    panels[-1].set_xlabel("million records/s; the line is the C limit, reading and copying")
    _save(figure, "throughput")


def _latency(rows: Sequence[Row]) -> None:
    """Latency against the commit interval, on logarithmic axes."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for system, marker in (("kframe", "o"), ("by hand", "s")):
        found = [row for row in rows if row["system"] == system]
        intervals = [row["commit_interval_ms"] for row in found]
        color = OURS if system == "kframe" else THEIRS
        for name, style in (("p50_ms", "--"), ("p99_ms", "-")):
            values = [row[name] for row in found]
            panel.plot(intervals, values, style, marker=marker, color=color, label=f"{system} {name[:3]}")
    panel.set(xscale="log", yscale="log", xlabel="commit interval, ms", ylabel="produce to committed, ms")
    panel.grid(alpha=0.3)
    panel.legend()
    _save(figure, "latency")


def _growth(rows: Sequence[Row]) -> None:
    """A batch's milliseconds, or megabytes of memory for record sizes, against what grows."""
    rows = [row for row in rows if not row["problem"]]
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, (len(axes) + 1) // 2, figsize=(9, 6), layout="constrained")
    for panel, axis in zip(panels.flat, axes, strict=False):
        column, unit = ("memory_mb", "peak MB") if axis in IN_MEMORY else ("batch_ms", "ms a batch")
        for step, color in (("upsert", OURS), ("aggregate", "#8250df"), ("land", "#1a7f37")):
            found = [row for row in rows if row["axis"] == axis and row["step"] == step]
            if found:
                sizes, values = [row["size"] for row in found], [row[column] for row in found]
                panel.plot(sizes, values, marker="o", color=color, label=step)
        panel.set(xscale="log", xlabel=axis, ylabel=unit)
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend()
    _save(figure, "growth")


def _backpressure(rows: Sequence[Row]) -> None:
    """Resident memory over the run with the slow function."""
    figure, panel = plt.subplots(figsize=(6, 3))
    slow = rows[-1]["memory_over_time_mb"]
    panel.plot([i / 2 for i in range(1, len(slow) + 1)], slow, color=OURS)
    panel.set(xlabel="seconds with the slow function", ylabel="resident MB")
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    _save(figure, "backpressure")


def _restart(rows: Sequence[Row]) -> None:
    """Bars of seconds to the first new commit; a dot a round."""
    rows = [row for row in rows if not row["problem"]][::-1]
    figure, panels = plt.subplots(2, 1, figsize=(8, 3), layout="constrained")
    titles = ("restore in an empty folder", "takeover by a standby")
    for panel, what, title in zip(panels, ("restore", "takeover"), titles, strict=True):
        names = [row["peer"] for row in rows]
        seconds = [row[f"{what}_s"] for row in rows]
        panel.barh(names, seconds, color=[OURS if name == "kframe" else THEIRS for name in names])
        for row in rows:
            rounds = row[f"{what}s_s"]
            panel.plot(rounds, [row["peer"]] * len(rounds), "o", color="black", markersize=3)
        panel.set_title(title, loc="left", fontsize=10)
    panels[-1].set_xlabel("seconds to the first new commit")
    _save(figure, "restart")


PLOTS = {
    "throughput": _throughput,
    "latency": _latency,
    "growth": _growth,
    "backpressure": _backpressure,
    "restart": _restart,
}


def _save(figure: Figure, name: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
