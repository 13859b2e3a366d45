"""A small graph drawn in layers, as SVG that any notebook shows, or as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple
from urllib.parse import quote

_SHOWN_CHARS = 30
_CHAR, _HEIGHT, _GAP_X, _GAP_Y, _PAD = 7.3, 44, 56, 16, 8
_FILLS = {
    "topic": "#fde7c7",
    "step": "#e4e4ea",
    "table": "#cfe6d4",
    "side table": "#dbe9f6",
    "output": "#f9d8d6",
}
_LINE, _INK, _FAINT = "#8a8a8a", "#1b1b1b", "#555555"


@dataclass(frozen=True)
class Node:
    """A box: what it is (a key of the colours), its name, and a line of detail."""

    kind: str
    name: str
    detail: str = ""


class _Box(NamedTuple):
    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Drawing:
    """A graph from left to right. Displayed in a notebook it is a picture; its text is for terminals.

    Attributes
    ----------
    title : str
    nodes : mapping of str to Node
        By an id of their own.
    edges : sequence of (str, str)
        Ids, from and to. One that goes backwards is drawn as such.
    """

    title: str
    nodes: Mapping[str, Node]
    edges: Sequence[tuple[str, str]]

    def __repr__(self) -> str:
        return "\n".join([self.title, *(f"  {line}" for line in self._lines())])

    def _repr_html_(self) -> str:
        source = "data:image/svg+xml," + quote(self.svg())
        return f'<img src="{source}" alt="{escape(repr(self))}" style="max-width:100%">'

    def svg(self) -> str:
        """The picture as a document of its own, readable on light and on dark ground."""
        boxes = self._boxes()
        width = max((b.x + b.width for b in boxes.values()), default=0) + _PAD
        height = max((b.y for b in boxes.values()), default=0) + _HEIGHT + _PAD
        drawn = [_arrow(boxes[a], boxes[b]) for a, b in self.edges]
        drawn += [_drawn(node, boxes[id_]) for id_, node in self.nodes.items()]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="ui-monospace, Menlo, monospace">'
            f"<title>{_xml(self.title)}</title>"
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{_LINE}"/></marker></defs>'
            f"{''.join(drawn)}</svg>"
        )

    # ---- layout -------------------------------------------------------------------------------------

    def _lines(self) -> list[str]:
        """One line a step: what it reads, what it is, what it makes."""
        lines = []
        for id_, node in self.nodes.items():
            if node.kind == "step":
                before = ", ".join(self.nodes[a].name for a, b in self.edges if b == id_)
                after = [self.nodes[b] for a, b in self.edges if a == id_]
                made = ", ".join(_told(n) for n in after)
                lines.append(f"{before} -> {_told(node)} -> {made}")
        published = [(a, b) for a, b in self.edges if self.nodes[a].kind != "step" != self.nodes[b].kind]
        return lines + [f"{self.nodes[a].name} -> {_told(self.nodes[b])}" for a, b in published]

    def _layers(self) -> list[list[str]]:
        """Each node behind those that lead to it; a first one right before what it leads to."""
        depth: dict[str, int] = {}
        for id_ in self.nodes:
            depth[id_] = 1 + max((depth[a] for a, b in self.edges if b == id_ and a in depth), default=-1)
        led_to = {b for _, b in self.edges}
        for id_ in self.nodes:
            if id_ not in led_to:
                depth[id_] = max(0, min((depth[b] for a, b in self.edges if a == id_), default=1) - 1)
        layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
        for id_, d in depth.items():
            layers[d].append(id_)
        return layers

    def _boxes(self) -> dict[str, _Box]:
        """Layer by layer from the left, each node as near to those before it as there is room."""
        boxes: dict[str, _Box] = {}
        x = float(_PAD)
        for layer in self._layers():
            wanted = {id_: self._middle(id_, boxes) for id_ in layer}
            width = max(map(_width, (self.nodes[i] for i in layer)), default=0.0)
            y = float(_PAD)
            for id_ in sorted(layer, key=lambda i: wanted[i]):
                y = max(y, wanted[id_])
                boxes[id_] = _Box(x, y, width)
                y += _HEIGHT + _GAP_Y
            x += width + _GAP_X
        return boxes

    def _middle(self, id_: str, boxes: Mapping[str, _Box]) -> float:
        before = [boxes[a].y for a, b in self.edges if b == id_ and a in boxes]
        return sum(before) / len(before) if before else 0.0


def _width(node: Node) -> float:
    return _CHAR * max(len(_short(node.name)), len(_short(_label(node)))) + 20


def _drawn(node: Node, box: _Box) -> str:
    return (
        f"<g><title>{_xml(_told(node))}</title>"
        f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{_HEIGHT}" '
        f'rx="{3 if node.kind == "step" else 9}" fill="{_FILLS[node.kind]}" stroke="{_LINE}"/>'
        f'<text x="{box.x + 10:.1f}" y="{box.y + 18:.1f}" font-size="12" fill="{_INK}">'
        f"{_xml(_short(node.name))}</text>"
        f'<text x="{box.x + 10:.1f}" y="{box.y + 34:.1f}" font-size="10.5" fill="{_FAINT}">'
        f"{_xml(_short(_label(node)))}</text></g>"
    )


def _arrow(a: _Box, b: _Box) -> str:
    x0, y0, x1, y1 = a.x + a.width, a.y + _HEIGHT / 2, b.x, b.y + _HEIGHT / 2
    bend = max(_GAP_X / 2, abs(x1 - x0) / 2)
    return (
        f'<path d="M{x0:.1f},{y0:.1f} C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}" '
        f'fill="none" stroke="{_LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'
    )


def _label(node: Node) -> str:
    return f"{node.kind}, {node.detail}" if node.detail else node.kind


def _told(node: Node) -> str:
    return f"{node.name} ({_label(node)})"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _xml(text: str) -> str:
    """Escaped, without the control characters that XML does not have."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text))


def connected(pairs: Iterable[tuple[str, str]], nodes: Mapping[str, Node]) -> list[tuple[str, str]]:
    """The edges both of whose ends are drawn, each once."""
    return [(a, b) for a, b in dict.fromkeys(pairs) if a in nodes and b in nodes]
