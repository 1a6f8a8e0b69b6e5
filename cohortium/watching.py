"""How `simulate` tells how far it is: a bar on a terminal, a line with a bar in a notebook, nothing elsewhere."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]
EVERY_S = 0.2
"""A notebook's line is drawn again at most so often."""


def where() -> str:
    """ "notebook", "terminal" or "": where a bar can be shown now."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if type(shell).__name__ == "ZMQInteractiveShell":
        return "notebook"
    return "terminal" if sys.stderr is not None and sys.stderr.isatty() else ""


@contextmanager
def bar(releases: int, *, shown: bool | None = None, place: str | None = None) -> Iterator[OnEvent]:
    """What to call with a run's events. shown: None shows it where there is somebody to see it."""
    place = (where() or ("terminal" if shown else "")) if place is None else place
    if shown is False or not place:
        yield lambda event: None
        return
    kind = _Notebook if place == "notebook" else _Terminal
    drawn = kind(releases)
    try:
        yield lambda event: drawn.tell(*_said(event))
    finally:
        drawn.close()


def _said(event: dict[str, Any]) -> tuple[int | None, str]:
    """(releases done, what happens now) of an event."""
    kind = event.get("event")
    if kind == "release":
        without = f", without {', '.join(event['dropped'])}" if event["dropped"] else ""
        return int(event["index"]) + 1, f"asked: {event['purpose']}{without}"
    if kind == "fit":
        return None, f"{event['what']}, {round(100 * event['share'])} %"
    if kind == "evaluate":
        return None, f"evaluated: {event['what']}"
    if kind in ("fitted", "finish"):
        return None, "sampling, scoring, writing the report" if kind == "fitted" else str(event["what"])
    return None, str(kind)


class _Terminal:
    """A bar on stderr."""

    def __init__(self, releases: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task = self._bar.add_task("hospitals answer", total=releases)
        self._bar.start()

    def tell(self, done: int | None, text: str) -> None:
        self._bar.update(self._task, completed=done, description=text)

    def close(self) -> None:
        self._bar.stop()


class _Notebook:
    """One output that is drawn over. No widget and no script: any notebook shows it."""

    def __init__(self, releases: int) -> None:
        import importlib

        notebook: Any = importlib.import_module("IPython.display")  # there, or nobody would have found a notebook
        self._html: Any = notebook.HTML
        self._releases, self._done, self._text = releases, 0, "hospitals answer"
        self._began, self._drawn = time.monotonic(), 0.0
        self._handle: Any = notebook.display(self._html(self._line()), display_id=True)

    def tell(self, done: int | None, text: str) -> None:
        self._done, self._text = self._done if done is None else done, text
        if time.monotonic() - self._drawn >= EVERY_S:
            self._draw()

    def close(self) -> None:
        took = time.monotonic() - self._began
        self._text = f"{self._done} releases answered; {took:.0f} s"
        self._draw()

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        self._handle.update(self._html(self._line()))

    def _line(self) -> str:
        told = html.escape(self._text)
        count = f"{self._done} of {self._releases} releases"
        return (
            f'<progress max="{self._releases}" value="{self._done}" aria-label="{count}">{count}</progress> '
            f"<span>{count}: {told}</span>"
        )
