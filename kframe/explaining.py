"""What a pipeline is made of, as a drawing: topics, steps, tables, and what leaves."""

from __future__ import annotations

from kframe.definition import Definition
from kframe.drawing import Drawing, Node, connected
from kframe.transform.aggregate import Aggregate
from kframe.transform.algebra import Incremental
from kframe.transform.rows import Land, RowStep
from kframe.transform.step import Step


def explained(definition: Definition) -> Drawing:
    """The pipeline from left to right, as it is declared now. Asks neither the broker nor the store."""
    nodes = {f"topic {t.name}": Node("topic", t.name, t.format) for t in definition.topics.values()}
    nodes |= {f"table {name}": Node("side table", name) for name in definition.side_tables}
    edges = []
    for step in definition.steps:
        nodes[f"step {step.name}"] = _step_node(step)
        if step.name in definition.tables:
            nodes[f"table {step.name}"] = Node("table", step.name, _keyed(step))
        edges += [(f"topic {t}", f"step {step.name}") for t in step.topics]
        edges += [(f"table {t}", f"step {step.name}") for t in step.tables]
        edges.append((f"step {step.name}", f"table {step.name}"))
    for outlet in getattr(definition, "outlets", {}).values():
        id_ = f"output {outlet.target} {outlet.name}"
        nodes[id_] = Node("output", outlet.name, outlet.target)
        edges.append((f"{'table' if outlet.step in definition.tables else 'step'} {outlet.step}", id_))
    return Drawing(f"pipeline {definition.pipeline}", nodes, connected(edges, nodes))


def _step_node(step: Step) -> Node:
    if isinstance(step, Land):
        return Node("step", "land", "every record")
    if isinstance(step, RowStep):
        name = getattr(step.function, "__name__", type(step.function).__name__)
        looked = ", ".join(f"{table} by {column}" for table, column in step.lookup.items())
        return Node("step", f"{name}()", f"lookup {looked}" if looked else "pandas")
    if isinstance(step, Aggregate):
        return Node("step", ", ".join(step.measures), f"aggregate by {', '.join(step.by)}")
    return Node("step", "SQL", "grouped" if isinstance(step, Incremental) else "row by row")


def _keyed(step: Step) -> str:
    if isinstance(step, RowStep) and step.key:
        return f"key {', '.join(step.key)}"
    if isinstance(step, Aggregate):
        return f"key {', '.join(step.by)}"
    return "one row a group" if isinstance(step, Incremental) else "rows added"
