"""What routes the console has, and whom each lets in: read off the application itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi.routing import APIRoute
from starlette.routing import Mount


def roles_of(route: APIRoute) -> tuple[str, ...] | None:
    """What `may` of a route lets in; None where there is no guard. Looks at what FastAPI really calls."""
    todo, found = [route.dependant], None
    while todo:
        dependant = todo.pop()
        roles = getattr(dependant.call, "roles", None)
        if roles is not None:
            found = tuple(set(roles) & set(found)) if found is not None else tuple(roles)
        todo += dependant.dependencies
    return found


def routes_of(router: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every route, also of routers that were included."""
    for route in router.routes:
        inner = getattr(route, "original_router", None) or getattr(route, "router", None)
        if inner is not None and not isinstance(route, (APIRoute, Mount)):
            yield from routes_of(inner, prefix + getattr(route, "prefix", ""))
        else:
            yield prefix + route.path, route
