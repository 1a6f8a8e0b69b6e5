"""GET /metrics: figures for Prometheus. A token of its own, not a session: a monitoring system signs in nowhere."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fastapi import APIRouter, Depends, HTTPException, Request
from starlette.responses import Response

from cohortium.server.console.access import desk_of
from cohortium.server.console.desk import Desk
from cohortium.server.console.metrics import Meter
from cohortium.server.console.metrics_requests import Requests
from cohortium.server.console.metrics_token import may_scrape
from cohortium.server.console.pages.runs import live_of

router = APIRouter()
_ONE = threading.Lock()


def bearer(request: Request) -> None:
    """A dependency: the request carries the token of CONSORTIUM/console/metrics.token; else 401, loopback included."""
    if not may_scrape(desk_of(request).folder, request.headers.get("authorization", "")):
        raise HTTPException(401, "METRICS-TOKEN: no such token", headers={"WWW-Authenticate": "Bearer"})


@router.get("/metrics", responses={401: {"description": "without the token"}})
def metrics(request: Request, _: None = Depends(bearer)) -> Response:
    """OpenMetrics where the client takes it, else Prometheus' text."""
    body, kind = meter_of(request).text(request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": kind})


def meter_of(request: Request) -> Meter:
    """The application's one meter, made with the first scrape; it counts what `app.state.requests` has seen."""
    state = request.app.state
    with _ONE:
        if getattr(state, "meter", None) is None:
            requests: Requests | None = getattr(state, "requests", None)
            desk = desk_of(request)
            state.meter = Meter(desk, requests=requests, viewers=lambda: _viewers(desk))
        found: Meter = state.meter
    return found


def _viewers(desk: Desk) -> int | None:
    streams: Callable[[], int] | None = getattr(live_of(desk), "streams", None)
    return None if streams is None else streams()
