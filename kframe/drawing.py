"""A small graph drawn in layers, as SVG that any notebook shows, or as lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
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
    """A node's place; one of a lane, which a long edge runs along, has no height."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


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
        height = max((b.y + b.height for b in boxes.values()), default=0) + _PAD
        drawn = [_arrow([boxes[id_] for id_ in chain]) for chain in self._chains(self._depths())]
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

    def _depths(self) -> dict[str, int]:
        """Each node's layer: behind those that lead to it; a first one right before what it leads to."""
        depth: dict[str, int] = {}
        for id_ in self.nodes:
            depth[id_] = 1 + max((depth[a] for a, b in self.edges if b == id_ and a in depth), default=-1)
        led_to = {b for _, b in self.edges}
        for id_ in self.nodes:
            if id_ not in led_to:
                depth[id_] = max(0, min((depth[b] for a, b in self.edges if a == id_), default=1) - 1)
        return depth

    def _chains(self, depth: Mapping[str, int]) -> list[list[str]]:
        """Each edge as the ids it runs along: its ends, and a lane in every layer that it crosses."""
        return [[a, *(f"{a} lane {d}" for d in range(depth[a] + 1, depth[b])), b] for a, b in self.edges]

    def _boxes(self) -> dict[str, _Box]:
        """Layer by layer from the left, each node as near to those before it as there is room."""
        depth = self._depths()
        chains = self._chains(depth)
        layers: dict[int, dict[str, None]] = {d: {} for d in range(max(depth.values(), default=-1) + 1)}
        for id_, d in depth.items():
            layers[d][id_] = None
        for chain in chains:
            for lane, id_ in enumerate(chain[1:-1], depth[chain[0]] + 1):
                layers[lane][id_] = None
        links = [link for chain in chains for link in pairwise(chain)]
        boxes: dict[str, _Box] = {}
        x = float(_PAD)
        for layer in layers.values():
            width = max((_width(self.nodes[i]) for i in layer if i in self.nodes), default=0.0)
            self._place(layer, links, x, width, boxes)
            x += width + _GAP_X
        return boxes

    def _place(
        self,
        layer: Iterable[str],
        links: Sequence[tuple[str, str]],
        x: float,
        width: float,
        boxes: dict[str, _Box],
    ) -> None:
        before = {i: [boxes[a].middle for a, b in links if b == i and a in boxes] for i in layer}
        wanted = {i: sum(found) / len(found) if found else 0.0 for i, found in before.items()}
        y = float(_PAD)
        for id_ in sorted(layer, key=lambda i: (wanted[i], i in self.nodes)):
            height = _HEIGHT if id_ in self.nodes else 0
            y = max(y, wanted[id_] - height / 2)
            boxes[id_] = _Box(x, y, width, height)
            y += height + _GAP_Y


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


def _arrow(chain: Sequence[_Box]) -> str:
    path = f"M{chain[0].x + chain[0].width:.1f},{chain[0].middle:.1f}"
    for a, b in pairwise(chain):
        x0, x1 = a.x + a.width, b.x
        bend = max(_GAP_X, abs(x1 - x0)) / 2
        path += f" C{x0 + bend:.1f},{a.middle:.1f} {x1 - bend:.1f},{b.middle:.1f} {x1:.1f},{b.middle:.1f}"
        path += f" H{x1 + b.width:.1f}" if b.height == 0 else ""
    return f'<path d="{path}" fill="none" stroke="{_LINE}" stroke-width="1.5" marker-end="url(#tip)"/>'


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
