"""What a pipeline is made of: its topics and its steps, replaced as a whole when one changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kframe.batch.decode import Decoder
from kframe.deliver.target import Target
from kframe.errors import DefinitionError
from kframe.model import Outlet
from kframe.schema import Schema
from kframe.transform.output import Output
from kframe.transform.step import Step

_RESERVED_PREFIX = "_kframe"


@dataclass(frozen=True)
class Topic:
    """A topic as the user declared it; ``schema`` None: inferred from the first records."""

    name: str
    schema: Schema | None
    format: str
    include: tuple[str, ...]
    on_new_field: str
    record_bytes_max: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def decoder(self, schema: Schema) -> Decoder:
        """The topic's decoder for a schema that is known by now."""
        return Decoder(
            self.name,
            schema,
            format=self.format,
            include=self.include,
            on_new_field=self.on_new_field,
            record_bytes_max=self.record_bytes_max,
            **self.options,
        )


class Definition:
    """The topics and steps of one pipeline. Steps are an immutable tuple: a run sees old or new, whole."""

    def __init__(self, pipeline: str) -> None:
        self.pipeline = pipeline
        self.topics: dict[str, Topic] = {}
        self.steps: tuple[Step, ...] = ()
        self.side_tables: list[str] = []
        self.outlets: dict[tuple[str, str], Outlet] = {}
        self.targets: dict[str, Target] = {}

    @property
    def tables(self) -> list[str]:
        """Names of the tables that its steps write, and of its side tables."""
        return [*(s.name for s in self.steps if not isinstance(s, Output)), *self.side_tables]

    def add_topic(self, topic: Topic) -> None:
        """Add a topic, or replace the one of the same name."""
        landed = any(s.name == topic.name and topic.name in s.topics for s in self.steps)
        if topic.name in self.tables and not landed:
            raise _taken(topic.name, "a table")
        self.topics[topic.name] = topic

    def add_step(self, step: Step) -> None:
        """Add a step, or put it in the place of the one of the same name."""
        check_name(step.name)
        if step.name in self.topics and step.name not in step.topics:
            raise _taken(step.name, "a topic")
        clash = [n for n in self.tables if n.lower() == step.name.lower() and n != step.name]
        if clash or step.name in self.side_tables:
            raise _taken(step.name, f"the table {(clash or [step.name])[0]!r}")
        names = [s.name for s in self.steps]
        if step.name in names:
            i = names.index(step.name)
            self.steps = (*self.steps[:i], step, *self.steps[i + 1 :])
        else:
            self.steps = (*self.steps, step)

    def topic(self, name: str) -> Topic:
        """A declared topic. Raises `DefinitionError` with the names there are."""
        if name not in self.topics:
            raise DefinitionError(
                f"Pipeline {self.pipeline!r} has no topic {name!r}.",
                hint=f"Declare it: pipeline.topic({name!r}). Declared: {', '.join(self.topics) or 'none'}.",
            )
        return self.topics[name]

    def check_runnable(self) -> None:
        """Raises `DefinitionError` when there is nothing to run."""
        if not self.steps:
            raise DefinitionError(
                f"Pipeline {self.pipeline!r} has no steps.",
                hint="Add one: land(), @table(), @output(), aggregate() or sql_table().",
            )

    def read_topics(self) -> list[str]:
        """The topics that some step reads, in order of declaration."""
        read = {topic for step in self.steps for topic in step.topics}
        return [name for name in self.topics if name in read]


def check_name(name: Any) -> None:
    """Raises `DefinitionError` for a name that no table can have."""
    if not isinstance(name, str) or not name or name.lower().startswith(_RESERVED_PREFIX):
        raise DefinitionError(
            f"{name!r} cannot name a table.",
            hint=f"Use non-empty text that does not begin with {_RESERVED_PREFIX}.",
        )


def as_columns(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """``"sku"``, ``["sku", "day"]`` or None as a tuple."""
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)


def _taken(name: str, by: str) -> DefinitionError:
    return DefinitionError(
        f"The name {name!r} is taken by {by} of this pipeline.", hint="Give one of the two another name."
    )
