"""Live displays in a notebook. The only module that imports ipywidgets, and only when one is shown.

A display is two outputs of its cell. The first is a static page, which stays in the saved notebook; the
second is a widget, whose ``<style>`` hides the first for as long as the widget lives. So whenever the widget
cannot be shown (another kernel, a reopened file, no widgets, nbconvert) the last static page is there.
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kframe.markup import STYLE, text

TICK_S = 0.25
"""Between two looks, so at most four updates a second."""
IDLE_S = 5.0
"""Between two updates that nothing but time calls for: rates that fade."""
KEEP_S = 30.0
"""Between two updates of the static page that a living widget hides; the first one comes soon."""


class Shown(Protocol):
    """What a display shows. Any thread may call; nothing is raised."""

    def html(self, *, id: str = "", static: bool = True) -> str:
        """The content as it is now."""

    def moved(self) -> Hashable:
        """Another value when there is something new to show."""

    def going(self) -> bool:
        """Whether there may be something new later."""

    def __repr__(self) -> str:
        """The content as text."""


@dataclass(frozen=True)
class Action:
    """A button: what it is called and says, what it does, and when that makes sense."""

    name: str
    icon: str
    tip: str
    do: Callable[[], None]
    sensible: Callable[[], bool]


class Changes:
    """Decides which contents are worth sending: those that differ, soon when something moved, else seldom."""

    def __init__(self, shown: Shown, clock: Callable[[], float] = time.monotonic) -> None:
        self._shown = shown
        self._clock = clock
        self._moved: Hashable = object()
        self._looked = -IDLE_S
        self._sent = ""

    def next(self) -> str | None:
        """The content to send now, or None."""
        now, moved = self._clock(), self._shown.moved()
        if moved == self._moved and now - self._looked < IDLE_S:
            return None
        self._moved, self._looked = moved, now
        html = self._shown.html(static=False)
        if html == self._sent:
            return None
        self._sent = html
        return html


def show(shown: Shown, actions: Sequence[Action] = ()) -> None:
    """Display `shown` below the running cell: live while it goes on, where there are widgets; else static."""
    if shown.going() and _kernel_shell() is not None:
        with contextlib.suppress(ImportError):
            _remember(Live(shown, actions))
            return
    _publish({"text/plain": repr(shown), "text/html": shown.html()})


class Live:
    """One living display. Its thread sends what changes, and leaves a static page in the end."""

    def __init__(self, shown: Shown, actions: Sequence[Action]) -> None:
        import ipywidgets

        self._shown = shown
        self._actions = actions
        self._changes = Changes(shown)
        self._name = f"kf-{uuid.uuid4().hex[:12]}"
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._keep_due = time.monotonic() + KEEP_S / 10
        self._body = ipywidgets.HTML()
        self._notice = ipywidgets.HTML()
        self._buttons = [ipywidgets.Button(description=a.name, icon=a.icon, tooltip=a.tip) for a in actions]
        for button, action in zip(self._buttons, actions, strict=True):
            button.layout.width = "auto"
            button.on_click(lambda _button, action=action: self._do(action))
        row = ipywidgets.HBox(self._buttons, layout={"flex_flow": "row wrap"})
        style = ipywidgets.HTML(STYLE + _hiding(self._name))
        self._box = ipywidgets.VBox([style, self._body, *([row] if actions else []), self._notice])
        self._box.add_class(f"{self._name}-live")
        self._refresh()
        self._keep(update=False)
        view = {"version_major": 2, "version_minor": 0, "model_id": self._box.model_id}
        _publish(
            {"text/plain": "", "application/vnd.jupyter.widget-view+json": view},
            display_id=f"{self._name}-live",
        )
        _lives.add(self)
        threading.Thread(target=self._work, name="kframe-panel", daemon=True).start()

    def abandon(self) -> None:
        """Its cell runs again, so nobody sees it any more."""
        self._over.set()
        _lives.discard(self)
        for widget in (*self._box.children, *self._buttons, self._box):
            widget.close()

    def _work(self) -> None:
        while not self._over.wait(TICK_S):
            going = self._shown.going()
            try:
                self._refresh()
                if time.monotonic() >= self._keep_due and self._shown.moved() != self._kept:
                    self._keep_due = time.monotonic() + KEEP_S
                    self._keep()
            except Exception as error:
                self._tell(f"The panel cannot be drawn: {type(error).__name__}: {error}")
            if not going:
                self.settle()

    def _refresh(self) -> None:
        with self._lock:
            html = self._changes.next()
            if html is not None:
                self._body.value = html
            for button, action in zip(self._buttons, self._actions, strict=True):
                button.disabled = not action.sensible()

    def _keep(self, *, update: bool = True) -> None:
        """Bring the static page up to date; it is what the saved notebook holds."""
        self._kept = self._shown.moved()
        page = {"text/plain": repr(self._shown), "text/html": self._shown.html(id=self._name)}
        _publish(page, display_id=self._name, update=update)

    def settle(self) -> None:
        """When the content has ended: its last state stays as the static page, and the widget goes."""
        with self._lock:
            if self._over.is_set() or self._shown.going():
                return
            self._over.set()
        _lives.discard(self)
        self._refresh()  # for a browser that has loaded the page again: updates of outputs don't reach it
        self._keep()
        _publish({"text/plain": ""}, display_id=f"{self._name}-live", update=True)

    def _do(self, action: Action) -> None:
        """Run a button's action; its exception would otherwise be seen by nobody."""
        try:
            action.do()
            self._tell("")
        except Exception as error:
            self._tell(f"{action.name}: {type(error).__name__}: {error}")
        self._refresh()

    def _tell(self, told: str) -> None:
        notice = f'<div class="kf kf-error" role="alert">{text(told)}</div>' if told else ""
        if self._notice.value != notice:
            self._notice.value = notice


def _hiding(name: str) -> str:
    """Hides the static page while the widget lives, and the widget when its kernel is gone."""
    gone = f".{name}-live.jupyter-widgets-disconnected"
    return f"<style>{gone}{{display:none!important}}body:not(:has({gone})) #{name}{{display:none}}</style>"


# ---- the kernel -------------------------------------------------------------------------------------------

_lives: set[Live] = set()


def settle() -> None:
    """Have the displays whose content has ended show that now, before the running cell ends."""
    for live in list(_lives):
        live.settle()


_by_cell: dict[str, tuple[str, list[Live]]] = {}
"""Cell id -> its last execution, and the displays that this has made."""


def _remember(live: Live) -> None:
    """Keep a cell's displays; those that an earlier execution of the cell made are gone from the screen."""
    parent = _kernel_shell().get_parent()
    cell = parent.get("metadata", {}).get("cellId")
    if cell is None:
        return
    execution = parent["header"]["msg_id"]
    earlier, lives = _by_cell.get(cell, ("", []))
    if earlier != execution:
        for old in lives:
            old.abandon()
        lives = []
    _by_cell[cell] = (execution, [*lives, live])


def _kernel_shell() -> Any:
    """The kernel's IPython; None in a terminal, or without IPython."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return None
    shell = get_ipython()
    return shell if shell is not None and hasattr(shell, "kernel") else None


def _publish(data: dict[str, Any], *, display_id: str | None = None, update: bool = False) -> None:
    from IPython.display import display

    display(  # type: ignore[no-untyped-call]
        data, raw=True, display_id=display_id, update=update
    )
