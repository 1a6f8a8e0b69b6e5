"""The console's whole OpenAPI under schemathesis: 5,000 requests, right and wrong ones, and no answer is a 5xx.

Half of the requests name things that exist and confirm what they do, so that they come further than the first check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from anyio.from_thread import BlockingPortal, start_blocking_portal
from console_worlds import HTML, bare, desk_over, signed_in, with_runs
from hypothesis import HealthCheck, strategies
from schemathesis import Case, GenerationMode

from cohortium.server.console.access import PUBLIC
from cohortium.server.console.accounts import AUDITOR, COORDINATOR, SITE
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk

CASES = 5000
ENDLESS = ("/events",)
"""Streams: their tests are their own."""
JOBS = ("/whatif",)
"""Starts processes: its tests are its own; it is read here and not started."""


class World:
    """A desk with runs, a client for each role, and the names that exist."""

    def __init__(self, desk: Desk, runs: list[str], portal: BlockingPortal) -> None:
        self.desk, self.runs, self.portal = desk, runs, portal
        self.answers: dict[int, int] = {}
        self.faults: list[str] = []
        self.clients: dict[str, Any] = {}

    def client(self, role: str) -> Any:
        client = self.clients.get(role)
        session = None if client is None else self.desk.accounts.session(client.cookies.get("cohortium-session", ""))
        if client is None or session is None:  # signed out, or its account closed, by an earlier request
            name = f"{role}{len(self.clients)}-{sum(self.answers.values())}"
            client = signed_in(self.desk, role, site="site-1" if role == SITE else "", name=name)
            client.portal = self.portal  # one loop for all requests: making one takes longer than most answers
            self.clients[role] = client
        return client


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    field, done, waiting = with_runs(tmp_path_factory.mktemp("fuzz"))
    with desk_over(field.made) as desk, start_blocking_portal() as portal:
        yield World(desk, [done, waiting], portal)


def operations(desk: Desk) -> list[Any]:
    schema = schemathesis.openapi.from_dict(create(desk).openapi())
    found = [operation.ok() for operation in schema.get_all_operations()]
    return [
        operation
        for operation in found
        if not operation.path.endswith(ENDLESS)
        and not (operation.path.startswith(JOBS) and operation.method.upper() == "POST")
    ]


def send(world: World, case: Case, role: str, deep: bool, run: str) -> None:
    client = world.client(role)
    path, body = case.formatted_path, case.body
    form = dict(body) if isinstance(body, dict) else {}
    if deep:
        for name in case.path_parameters or {}:
            real = {"run": run, "name": "site-1", "site": "site-1"}.get(name)
            if real is not None:
                path = case.path.replace("{" + name + "}", real)
        form |= {"confirm": "yes", "reason": "the fuzzer wants it"}
    headers = {**HTML, "x-csrf-token": client.csrf}
    query = {str(k): str(v) for k, v in (case.query or {}).items()} if isinstance(case.query, dict) else {}
    if "{" in path:
        path = path.replace("{", "").replace("}", "")
    content: dict[str, Any] = {}
    if case.method.upper() not in ("GET", "HEAD"):
        content = (
            {"data": {str(k): str(v) for k, v in form.items()}}
            if isinstance(body, dict) or deep
            else {"content": str(body)}
        )
    answer = client.request(case.method, path or "/", params=query, headers=headers, **content)
    world.answers[answer.status_code] = world.answers.get(answer.status_code, 0) + 1
    if answer.status_code >= 500:
        world.faults.append(f"{answer.status_code} {case.method} {path} {query} {content}"[:600])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_no_request_breaks_the_console(world: World) -> None:
    found = operations(world.desk)
    assert len(found) > 25
    each, seed = CASES // len(found) // 2 + 1, 11
    sent, whole = 0, False
    while sent < CASES or not whole:  # what takes little has few different requests: the others get more
        for operation, mode in product(found, (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)):
            if sent < CASES or not whole:
                ask = asking(world, operation, mode, each, seed)
                with suppress(hypothesis.errors.Unsatisfiable):  # nothing can be wrong with what takes nothing
                    ask()
                sent = sum(world.answers.values())
        each, seed, whole = each // 3 + 1, seed + 1, True
    print(sent, dict(sorted(world.answers.items())))
    assert not world.faults, world.faults[:10]
    assert world.answers.get(200, 0) > sent / 10  # the requests do come through


def asking(world: World, operation: Any, mode: GenerationMode, each: int, seed: int) -> Callable[[], None]:
    """A hypothesis test of one operation, to be called."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=each,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    @hypothesis.given(
        case=operation.as_strategy(generation_mode=mode),
        role=strategies.sampled_from((COORDINATOR, COORDINATOR, AUDITOR, SITE)),
        deep=strategies.booleans(),
        run=strategies.sampled_from(world.runs),
    )
    def ask(case: Case, role: str, deep: bool, run: str) -> None:
        send(world, case, role, deep, run)

    return ask  # type: ignore[no-any-return]


def test_a_page_that_breaks_would_be_found(tmp_path: Path) -> None:
    """The test's own power: a planted bug answers 500, in the console's words and without its inside."""
    with desk_over(bare(tmp_path)) as desk:
        client = signed_in(desk)
        desk.register.runs = lambda: 1 / 0  # type: ignore[assignment,method-assign,return-value]
        answer = client.get("/runs")
        assert answer.status_code == 500 and "INTERNAL" in answer.text and "division" not in answer.text


def test_all_public_paths_are_few() -> None:
    assert len(PUBLIC) < 10
