"""A query's rows as a chart: an image drawn by matplotlib, which pandas users know."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from kframe.errors import ConfigError
from kframe.markup import text

CHARTS = ("line", "bar")
_INK = "#767d86"  # at least 4:1 on white and on JupyterLab's dark background, since an image knows no theme
_COLOURS = ("#2f81f7", "#d97706", "#1a9c4b", "#a371f7", "#d1383f", "#0e9aa7")
_DASHES = ("-", "--", ":", "-.")
_HATCHES = ("", "///", "...", "xxx")
_SIZE = (5.2, 2.6)  # inches
_DPI = 144  # shown at half of it, so sharp on fine screens


def draw(frame: pd.DataFrame, chart: str, *, alt: str) -> str:
    """An ``<img>`` of the frame's numeric columns over its first column.

    Parameters
    ----------
    frame : DataFrame, shape (n_rows, n_columns)
        Column 0 is the horizontal axis; each further numeric column a line, or a group of bars. With one
        column alone, the row number is the axis.
    chart : "line" or "bar"
    alt : str
        Said to those who cannot see it.

    Raises
    ------
    ConfigError
        matplotlib is not installed, or there is no numeric column to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "Charts need matplotlib.", hint="pip install 'kframe-duckdb[plot]', or chart=None for a table."
        ) from None
    across = pd.Series(range(len(frame))) if frame.shape[1] == 1 else frame.iloc[:, 0]
    columns = frame.columns if frame.shape[1] == 1 else frame.columns[1:]
    lines = {
        str(c): frame[c].to_numpy("float64", na_value=np.nan) for c in columns if _numeric(frame[c].dtype)
    }
    if not lines:
        raise ConfigError("There is no numeric column to draw.", hint="SELECT the axis first, then numbers.")
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")  # not pyplot: no state shared by threads
    axes = figure.add_subplot()
    (_lines if chart == "line" else _bars)(axes, across, lines)
    _quiet(axes, legend=len(lines) > 1)
    image = io.BytesIO()
    figure.savefig(image, format="png", transparent=True, metadata={"Software": None})
    source = base64.b64encode(image.getvalue()).decode()
    return f'<img src="data:image/png;base64,{source}" alt="{text(alt)}" width="374" style="display:block">'


def _lines(axes: Any, across: pd.Series, lines: Mapping[str, np.ndarray]) -> None:
    at = (
        across.to_numpy("float64", na_value=np.nan)
        if _numeric(across.dtype)
        else across.astype(object).tolist()
    )
    if all(value is None or isinstance(value, str) for value in at):
        at = [str(value) for value in at]
    for i, (name, values) in enumerate(lines.items()):
        axes.plot(at, values, _DASHES[i % len(_DASHES)], color=_COLOURS[i % len(_COLOURS)], label=name)


def _bars(axes: Any, across: pd.Series, lines: Mapping[str, np.ndarray]) -> None:
    at, width = np.arange(len(across)), 0.8 / len(lines)
    for i, (name, values) in enumerate(lines.items()):
        place = at + (i - (len(lines) - 1) / 2) * width
        colour, hatch = _COLOURS[i % len(_COLOURS)], _HATCHES[i % len(_HATCHES)]
        axes.bar(place, values, width, color=colour, hatch=hatch, edgecolor=_INK, linewidth=0, label=name)
    crowded = len(across) * max((len(str(v)) for v in across), default=0) > 70
    axes.set_xticks(
        at, [str(v) for v in across], rotation=60 if crowded else 0, ha="right" if crowded else "center"
    )


def _numeric(dtype: Any) -> bool:
    kinds = pd.api.types
    return "decimal" in str(dtype) or (kinds.is_numeric_dtype(dtype) and not kinds.is_bool_dtype(dtype))


def _quiet(axes: Any, *, legend: bool) -> None:
    """Grey ink, light lines, no box."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.tick_params(colors=_INK)
    axes.grid(axis="y", color=_INK, alpha=0.25)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    axes.xaxis.get_offset_text().set_color(_INK)
    if legend:
        axes.legend(frameon=False, labelcolor=_INK)
