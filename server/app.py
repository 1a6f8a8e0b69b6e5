"""The coordinator's Flower ServerApp: Flower calls `main`, which hands a courier to the study's loop.

The loop is `server/runs.drive`; it sees sites' names and envelopes, and nothing of Flower. In the field the SuperLink
starts this in a process of its own, with three settings that the coordinator's conductor gives:

    run-directory   the run's directory; with COHORTIUM_CONSORTIUM set it lies in CONSORTIUM/runs, or nothing starts
    transport       "stream": envelopes travel over the coordinator's own service; "flower": in Flower's messages
    hub             the Unix socket of that service's hub; with COHORTIUM_CONSORTIUM set it is CONSORTIUM/hub.sock

A file RUN/stop ends the run between two releases. Whatever ends it early is one line in RUN/run/events.jsonl, and
Flower is told the code and no more. What broke in our own code is in RUN/run/serverapp.log.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cohortium.common.errors import CohortiumError, UsageError
from cohortium.server.driving import driving
from cohortium.server.transport import GridCourier

Work = Callable[[GridCourier], None]
CONSORTIUM = "COHORTIUM_CONSORTIUM"
TRANSPORTS = ("stream", "flower")


class RunFailed(Exception):
    """What Flower hears of a failure: a code."""


def coordinator_app(work: Callable[[GridCourier, Context], None], *, stop: threading.Event | None = None) -> ServerApp:
    """The ServerApp that runs `work`; setting `stop` makes it end at its next wait."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        work(GridCourier(grid, stop=stop), context)

    return server


def run_directory(context: Context) -> Path:
    """Where the run's study is; UsageError RUN-DIRECTORY unless the coordinator's own settings allow it."""
    named = str(context.run_config.get("run-directory") or "")
    root, consortium = Path(named), os.environ.get(CONSORTIUM)
    if not named or not root.is_absolute():
        raise UsageError(
            "RUN-DIRECTORY",
            "the run does not say where its study is",
            hint="start it with `cohortium run`",
        )
    if consortium is not None and root.resolve().parent != (Path(consortium) / "runs").resolve():
        raise UsageError("RUN-DIRECTORY", "the run's directory does not belong to this consortium", where=(named,))
    return root.resolve()


def quick_pulls() -> None:
    """A reply is announced before its objects have arrived: look again soon, where Flower looks after 1 s."""
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = partial(http_grid.pull_objects, initial_backoff=0.05)


def _courier(grid: GridCourier, context: Context, root: Path) -> Any:
    transport = str(context.run_config.get("transport") or "stream")
    if transport not in TRANSPORTS:
        raise UsageError("RUN-TRANSPORT", f"transport is one of {', '.join(TRANSPORTS)}", where=(transport,))
    if transport == "flower":
        quick_pulls()
        return grid
    hub, consortium = Path(str(context.run_config.get("hub") or "")), os.environ.get(CONSORTIUM)
    if consortium is not None and hub.resolve() != (Path(consortium) / "hub.sock").resolve():
        raise UsageError("RUN-HUB", "the hub's socket does not belong to this consortium", where=(str(hub),))
    from cohortium.server.runs import RunFolder
    from cohortium.server.stream import StreamCourier

    return StreamCourier(grid, socket=hub, run=str(RunFolder(root=root).facts()["run"]))


def _drive(grid: GridCourier, context: Context) -> None:
    root = run_directory(context)
    with contextlib.ExitStack() as stack:
        if root.is_dir():  # else `_driven` says what is missing
            try:
                stack.enter_context(driving(root, context.run_id))
            except CohortiumError as error:  # not in the run's events: those are the other process's
                raise RunFailed(error.code) from None
        _driven(grid, context, root)


def _driven(grid: GridCourier, context: Context, root: Path) -> None:
    courier: Any = None
    try:
        from cohortium.server.asking import Stopped
        from cohortium.server.runs import drive

        courier = _courier(grid, context, root)
        try:
            drive(courier, root, stop=(root / "stop").exists)
        except Stopped:
            _say(root, "stopped")
    except CohortiumError as error:
        facts = error.as_json()
        _say(root, "failed", code=facts.pop("error"), **facts)
        raise RunFailed(error.code) from None
    except Exception as error:
        # Our bug: the type for whoever watches, the rest for whoever mends it. Flower keeps no ServerApp's output.
        code, log = f"BUG-{type(error).__name__}", root / "run" / "serverapp.log"
        _say(root, "failed", code=code, sentence="the ServerApp broke down", where=[str(log)], fix="report the log")
        with open(log, "a", encoding="utf-8", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
            traceback.print_exception(error, file=file)
        raise RunFailed(code) from None
    except BaseException:
        _say(root, "interrupted")
        raise
    finally:
        if hasattr(courier, "close"):
            courier.close()


def _say(root: Path, name: str, /, **facts: object) -> None:
    """One line in the run's events, as server/runs writes them."""
    if not root.is_dir():
        return
    inner = root / "run"
    inner.mkdir(exist_ok=True)
    with open(inner / "events.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"at": round(time.time(), 3), "event": name, **facts}) + "\n")


app = coordinator_app(_drive)
