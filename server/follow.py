"""How `run` and `watch` show a run: two moving bars on a terminal, a line for each change anywhere else."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cohortium.common.privacy.budget import rounded_up


class Display:
    """Call show(facts) as often as you like with what `watch --json` prints."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told = ""
        self._bars: Progress | None = None
        self._tasks: tuple[Any, Any] | None = None
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=console)
            self._bars.start()

    def show(self, facts: dict[str, Any]) -> None:
        line = summary(facts)
        if self._bars is None:
            if line != self._told:
                self._console.print(escape(line), soft_wrap=True)
        else:
            if self._tasks is None:
                self._tasks = (
                    self._bars.add_task("officers", total=len(facts["approvals"])),
                    self._bars.add_task("releases", total=facts["releases"]["planned"]),
                )
            approved = [site for site, state in facts["approvals"].items() if state == "approved"]
            waiting = sorted(set(facts["approvals"]) - set(approved))
            text = f"approved; waiting for {', '.join(waiting)}" if waiting else "approved by all"
            self._bars.update(self._tasks[0], completed=len(approved), description=escape(text))
            self._bars.update(self._tasks[1], completed=facts["releases"]["done"], description=escape(pace(facts)))
            change = f"{facts['state']}: {facts['message']}"
            if change != self._told and facts["message"]:
                self._bars.console.print(escape(change), soft_wrap=True)
            line = change
        self._told = line

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def summary(facts: dict[str, Any]) -> str:
    """One line that changes when something happened that a reader of a log wants to know."""
    if facts["state"] == "proposed":
        answers = ", ".join(f"{site} {state}" for site, state in sorted(facts["approvals"].items()))
        return f"proposed: {answers}"
    if facts["state"] == "running":
        return f"running: {pace(facts)}"
    return f"{facts['state']}: {facts['message']}"


def pace(facts: dict[str, Any]) -> str:
    """Releases, ε so far, time left."""
    done, epsilon = facts["releases"], facts["epsilon"]
    parts = [f"{done['done']} of {done['planned']} releases"]
    if epsilon["spent"] is not None:
        parts.append(f"ε {rounded_up(float(epsilon['spent']))} of {float(epsilon['planned']):g}")
    if facts["seconds_left"]:
        parts.append(f"about {max(round(facts['seconds_left'] / 60), 1)} min left")
    if facts["rehearsal"]:
        parts.append("rehearsal, NOT private")
    return ", ".join(parts)
