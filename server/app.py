"""The coordinator's Flower ServerApp: Flower calls `main`, which hands a courier to the study's loop.

The loop is `server/runs.drive`; it sees sites' names and envelopes, and nothing of Flower.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cohortium.common.errors import UsageError
from cohortium.server.transport import GridCourier

Work = Callable[[GridCourier], None]


def coordinator_app(work: Callable[[GridCourier, Context], None], *, stop: threading.Event | None = None) -> ServerApp:
    """The ServerApp that runs `work`; setting `stop` makes it end at its next wait."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        work(GridCourier(grid, stop=stop), context)

    return server


def _drive(courier: GridCourier, context: Context) -> None:
    from cohortium.server.runs import drive

    directory = context.run_config.get("run-directory")
    if not directory:
        raise UsageError(
            "RUN-DIRECTORY",
            "the run does not say where its study is",
            hint="start it with --run-config 'run-directory=\"PATH\"'",
        )
    drive(courier, Path(str(directory)))


app = coordinator_app(_drive)
