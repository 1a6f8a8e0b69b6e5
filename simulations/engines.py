"""Two engines for the same ServerApp and ClientApp: our in-process grid, and Flower's own on Ray.

In process is the default: a message is a function call. Ray is how a simulation outgrows one machine: start a
cluster, give its address, and keep the site directories on storage that every machine sees.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flwr.app import Context

from cohortium.client.app import Courier, Opener, close_guards, courier_app, open_in_process, open_shared
from cohortium.common.errors import PeerUnreachable, UsageError
from cohortium.common.protocol.flower import blank_context
from cohortium.server.app import coordinator_app
from cohortium.server.transport import GridCourier
from cohortium.simulations.faults import Faults
from cohortium.simulations.grid import InProcessGrid

T = TypeVar("T")
STOP_WITHIN_S = 30.0
SITES_AT_ONCE = 4
"""Simulated sites that compute side by side where nobody says: also on two cores, because a site waits for its disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InProcess:
    """threads: sites that compute side by side. wire: every message through Flower's serialisation.
    faults: a script of what goes wrong."""

    threads: int = 1
    wire: bool = True
    faults: Faults | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ray:
    """cpus: what a new local Ray may use (None: all cores). address: an existing cluster instead.
    cpus_per_site, gpus_per_site: what one site's computation claims; .25 GPUs lets four sites share one."""

    cpus: int | None = None
    address: str | None = None
    cpus_per_site: float = 1.0
    gpus_per_site: float = 0.0


def run(
    work: Callable[[GridCourier], T],
    *,
    sites: Sequence[Path],
    engine: InProcess | Ray,
    log: Path,
    opener: Opener | None = None,
) -> T:
    """Run a coordinator's work against the simulated sites; return what it returns, raise what it raises.

    sites: one directory per site; the guard opened there says the site's name. log: where the words of Flower
    and Ray go; nothing of either keeps running afterwards. opener: another guard than ours, for tests.
    """
    if not sites:
        raise UsageError("ENGINE-NO-SITES", "a simulation needs at least one site")
    ours = open_in_process if isinstance(engine, InProcess) else open_shared
    courier = Courier(directories=tuple(path.resolve() for path in sites), opener=opener or ours)
    with _quiet(log):
        try:
            if isinstance(engine, InProcess):
                return _in_process(work, courier, engine)
            return _on_ray(work, courier, engine, log)
        finally:
            close_guards()


def _in_process(work: Callable[[GridCourier], T], courier: Courier, engine: InProcess) -> T:
    from cohortium.common.generators.threads import one_thread

    names = [path.name for path in courier.directories]
    grid = InProcessGrid(courier_app(courier), names, faults=engine.faults, wire=engine.wire, threads=engine.threads)
    box: list[T] = []
    server = coordinator_app(lambda grid_courier, _: box.append(work(grid_courier)))
    # Sites side by side share one setting of the process, how many threads a sum takes: it is held until the last ends.
    hold = one_thread() if engine.threads > 1 else contextlib.nullcontext()
    try:
        with hold:
            server(grid, blank_context(run_id=grid.run.run_id, node_id=1, node_config={}, run_config={}))
    finally:
        grid.close()
    return box[0]


def _on_ray(work: Callable[[GridCourier], T], courier: Courier, engine: Ray, log: Path) -> T:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError:
        raise UsageError(
            "ENGINE-NO-RAY", "Ray is not installed", hint="pip install 'cohortium[ray]', or drop --engine ray"
        ) from None
    stop, began, ended = threading.Event(), threading.Event(), threading.Event()
    box: list[T] = []
    failure: list[BaseException] = []

    def keep(grid_courier: GridCourier, _: Context) -> None:
        began.set()
        try:
            box.append(work(grid_courier))
        except BaseException as error:
            failure.append(error)
        finally:
            ended.set()

    start: dict[str, str | int | bool] = {"log_to_driver": False, "logging_level": "ERROR"}
    if engine.address is not None:
        start["address"] = engine.address
    elif engine.cpus is not None:
        start["num_cpus"] = engine.cpus
    try:
        run_simulation(
            server_app=coordinator_app(keep, stop=stop),
            client_app=courier_app(courier),
            num_supernodes=len(courier.directories),
            backend_config={
                "init_args": start,
                "client_resources": {"num_cpus": engine.cpus_per_site, "num_gpus": engine.gpus_per_site},
            },
        )
    except RuntimeError as error:
        if not failure:
            raise PeerUnreachable(
                "ENGINE-RAY", "Ray did not start or broke down", hint=f"read {log}, or drop --engine ray"
            ) from error
    finally:
        # Ctrl-C arrives here while the work still waits in its thread: let it end in its own way first.
        stop.set()
        if began.is_set():
            ended.wait(STOP_WITHIN_S)
    if failure:
        raise failure[0]
    return box[0]


@contextlib.contextmanager
def _quiet(log: Path) -> Iterator[None]:
    """Send what Flower and Ray log into one file instead of the terminal; put their handlers back after."""
    log.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(log, encoding="utf-8", delay=True)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("flwr", "flwr-telemetry", "ray")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [to_file], False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="ray")
            yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        to_file.close()
