"""Small pieces of HTML and text that every repr and panel is made of. Whatever comes in is escaped.

Notebooks that are not trusted strip scripts, ``<style>``, inline ``<svg>``, ARIA attributes and most of CSS;
classes, ``<progress>``, ``<details>``, simple inline styles and ``<img src="data:...">`` stay. So inline
styles lay things out, `STYLE` only adds colour and polish, and nothing is said by either alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from urllib.parse import quote

PROCESSED, ARRIVING = "#2f81f7", "#d97706"
"""Colours of the two rates: each at least 3:1 against white and against JupyterLab's darkest background."""

STYLE = """<style>
.kf{--kf-ink:#1f2328;--kf-faint:#59636e;--kf-edge:#d1d9e0;--kf-back:#f6f8fa;--kf-bad:#c4232b}
@media (prefers-color-scheme:dark){
.kf{--kf-ink:#e6edf3;--kf-faint:#9198a1;--kf-edge:#3d444d;--kf-back:#161b22;--kf-bad:#ff7b72}}
body[data-jp-theme-light="true"] .kf{--kf-bad:#c4232b}
body[data-jp-theme-light="false"] .kf{--kf-bad:#ff7b72}
.kf{--ink:var(--jp-content-font-color1,var(--vscode-foreground,var(--kf-ink)));
--faint:var(--jp-content-font-color2,var(--vscode-descriptionForeground,var(--kf-faint)));
--edge:var(--jp-border-color2,var(--vscode-panel-border,var(--kf-edge)));
--back:var(--jp-layout-color2,var(--kf-back));
color:var(--ink);border:1px solid var(--edge);border-radius:8px;padding:12px 16px!important;max-width:720px;
font:13px/1.45 var(--jp-ui-font-family,system-ui,sans-serif);box-sizing:border-box;overflow-wrap:anywhere}
.kf.kf-wide{max-width:none}
.kf small,.kf figcaption,.kf summary,.kf .kf-faint{color:var(--faint)}
.kf .kf-n{font-variant-numeric:tabular-nums}
.kf .kf-state{border:1px solid var(--edge);background:var(--back);border-radius:99px;
padding:1px 10px!important}
.kf progress{accent-color:#2f81f7;height:10px}
.kf .kf-track{background:var(--back);border-radius:3px}
.kf .kf-bar{border-radius:3px}
.kf table.kf-plain{border-collapse:collapse;border:0;font-size:12px;margin:0}
.kf table.kf-plain th,.kf table.kf-plain td{text-align:left;padding:2px 12px 2px 0;border:0;background:none;
max-width:none;vertical-align:middle;color:inherit}
.kf table.kf-plain tr{background:none!important}
.kf table.kf-plain th{font-weight:600;color:var(--faint)}
.kf table.kf-plain .kf-n{text-align:right}
.kf table.dataframe{border-collapse:collapse;border:0;font-size:12px;margin:4px 0}
.kf table.dataframe th,.kf table.dataframe td{padding:3px 10px;border:0;text-align:right;color:inherit}
.kf table.dataframe thead{border-bottom:1px solid var(--edge)}
.kf .kf-error{border-left:4px solid var(--kf-bad);padding-left:12px!important;margin-top:10px!important}
.kf pre{background:var(--back);color:var(--ink);padding:8px;border-radius:4px;font-size:12px;line-height:1.4;
overflow-x:auto;white-space:pre-wrap}
.kf summary{cursor:pointer}
.kf img{background:none;max-width:100%}
</style>"""


def text(value: object) -> str:
    """`value` as HTML text, safe inside attributes too."""
    return escape(str(value), quote=True)


def card(body: str, *, id: str = "", static: bool = True, wide: bool = False) -> str:
    """A bordered panel around `body` (HTML); a static one brings `STYLE`, a wide one takes all the room."""
    named = f' id="{text(id)}"' if id else ""
    kind = "kf kf-wide" if wide else "kf"
    return f'{STYLE if static else ""}<div class="{kind}"{named} style="padding:8px">{body}</div>'


def heading(name: object, note: object = "") -> str:
    """A panel's first line: what it is, and a faint remark."""
    return f"<div><strong>{text(name)}</strong> <small>{text(note)}</small></div>"


def figure(label: str, value: str, note: str = "") -> str:
    """One labelled number; figures flow side by side and wrap where it is narrow."""
    return (
        '<div style="display:inline-block;vertical-align:top;min-width:100px;margin:8px 20px 0 0">'
        f'<small>{text(label)}</small><br><strong class="kf-n" style="font-size:17px">{text(value)}</strong>'
        f"{f'<br><small>{text(note)}</small>' if note else ''}</div>"
    )


def pairs(rows: Mapping[str, object] | Iterable[tuple[str, object]]) -> str:
    """A two-column table of names and values."""
    items = rows.items() if isinstance(rows, Mapping) else rows
    lines = "".join(f'<tr><th scope="row">{text(k)}</th><td>{text(v)}</td></tr>' for k, v in items)
    return f'<table class="kf-plain">{lines}</table>'


def bar(share: float, colour: str, width: int = 120) -> str:
    """A horizontal bar, for the eye only: the number stands beside it."""
    filled = round(width * min(max(share, 0.0), 1.0))
    return (
        f'<div class="kf-track" aria-hidden="true" style="width:{width}px;height:8px;display:inline-block">'
        f'<div class="kf-bar" style="width:{filled}px;height:8px;background-color:{colour}"></div></div>'
    )


def image(svg: str, alt: str, height: int) -> str:
    """An SVG as an ``<img>``, which notebooks keep where they strip ``<svg>``."""
    source = "data:image/svg+xml," + quote(svg, safe=" =:/',;()-.")
    return (
        f'<img src="{source}" alt="{text(alt)}" width="100%" height="{height}" decoding="sync" '
        'style="display:block">'
    )


def sparkline(points: Sequence[tuple[float, float, float]], alt: str, *, span_s: float = 60.0) -> str:
    """Two lines over the last `span_s` seconds: processed (solid, filled) and arriving (dashed).

    Parameters
    ----------
    points : sequence of (seconds, processed, arriving)
        Oldest first, any clock.
    """
    width, height = 600, 44
    now = points[-1][0] if points else 0.0
    top = max((max(p[1:]) for p in points if now - p[0] <= span_s), default=0.0)

    def path(which: int) -> str:
        steps = [
            f"{width * (1 - (now - p[0]) / span_s):.0f},{height - 2 - (height - 6) * p[which] / top:.0f}"
            for p in points
            if now - p[0] <= span_s
        ]
        return "M" + "L".join(steps)

    lines = ""
    if len(points) > 1 and top:  # a flat line would differ from second to second, and say no more
        begin = max(0.0, width * (1 - (now - points[0][0]) / span_s))
        area = f"{path(1)}L{width},{height}L{begin:.0f},{height}Z"
        lines = (
            f"<path d='{area}' fill='{PROCESSED}' fill-opacity='.18'/>"
            f"<path d='{path(1)}' fill='none' stroke='{PROCESSED}' stroke-width='2' "
            "vector-effect='non-scaling-stroke'/>"
            f"<path d='{path(2)}' fill='none' stroke='{ARRIVING}' stroke-width='2' stroke-dasharray='5 3' "
            "vector-effect='non-scaling-stroke'/>"
        )
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' preserveAspectRatio='none'>"
        f"<path d='M0,{height - 1}H{width}' stroke='#8b949e' stroke-opacity='.5'/>{lines}</svg>"
    )
    return image(svg, alt, height)


# ---- numbers as people read them --------------------------------------------------------------------------


def count(n: int) -> str:
    """``1,234,567``."""
    return f"{n:,}"


def counted(n: int, what: str, plural: str = "") -> str:
    """``1 batch``, ``2 batches``."""
    return f"{n:,} {what if n == 1 else plural or what + 's'}"


def rate(per_s: float) -> str:
    """``52,300/s``; three digits are enough."""
    rounded = round(per_s) if per_s < 1000 else round(per_s, 2 - len(str(int(per_s))) + 1)
    return f"{rounded:,.0f}/s" if per_s >= 10 or per_s == 0 else f"{per_s:.1f}/s"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``5 h 12 min``, ``4 days``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60} s"
    if s < 86_400:
        return f"{s // 3600} h {s % 3600 // 60} min"
    return f"{s // 86_400} days"


def milliseconds(ms: float) -> str:
    """``3.2 ms``, ``140 ms``, ``2.4 s``."""
    if ms < 10:
        return f"{ms:.1f} ms"
    return f"{ms:.0f} ms" if ms < 1000 else duration(ms / 1000)
