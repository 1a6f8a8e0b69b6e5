"""Consortiums for the console's tests: bare, and with a run that hospitals in this process really answered."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conducting import Field, in_the_field, make, say_yes
from small import make_quick, small_study
from starlette.testclient import TestClient

from cohortium.server.conduct import Conductor
from cohortium.server.console.accounts import COORDINATOR
from cohortium.server.console.app import create
from cohortium.server.console.desk import Desk
from cohortium.server.console.settings import Settings
from cohortium.server.consortium import Consortium
from cohortium.server.finish import finish_run

BASE = "http://127.0.0.1:7445"
HTML = {"accept": "text/html"}
PASSWORD = "correct horse battery"
HOLDOUT = "[evaluation]\nepsilon = 1.0\nholdout = 0.2\n"


def bare(folder: Path) -> Consortium:
    """Three enrolled sites, no run."""
    return make(folder / "consortium")


def with_runs(folder: Path, *, seed: int = 5, title: str = "", **study: Any) -> tuple[Field, str, str]:
    """(field, finished run, proposed run): hospitals of a small simulation. evaluation=HOLDOUT: with scores."""
    from cohortium.simulations.run import Request, prepare

    # Undone at the end: forecasts of whatever runs later in this process count the fit's real steps.
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        study_file, table = small_study(folder / "study", **study)
        if title:
            study_file.write_text(re.sub(r"(?m)^title = .*$", f"title = {json.dumps(title)}", study_file.read_text()))
        prepared = folder / "prepared"
        prepare(Request(study=study_file, table=table, split="iid:3", out=prepared, seed=seed))
        field = in_the_field(folder / "consortium", prepared)
        done = field.made.propose(prepared / "study.toml", seed=seed)
        field.approve(done)
        ran = field.drive(done)
        finish_run(ran.root, mirror=field.made.mirror)
        register = field.made.register()
    register.set_run(done, state="running", message="", flower_id="1", attempts=1)
    register.set_run(done, state="finished", message="published.")
    waiting = field.made.propose(prepared / "study.toml", seed=seed + 1)
    say_yes(field.made, waiting, "site-1")
    return field, done, waiting


@contextmanager
def desk_over(made: Consortium, settings: Settings | None = None, **options: Any) -> Iterator[Desk]:
    desk = Desk(made, settings or Settings(), **options)
    try:
        yield desk
    finally:
        desk.close()


def visitor(desk: Desk, **options: Any) -> TestClient:
    """Somebody who has not signed in. Redirects are not followed: a test looks at each answer."""
    return TestClient(
        create(desk), base_url=BASE, headers=HTML, follow_redirects=False, raise_server_exceptions=False, **options
    )


def signed_in(desk: Desk, role: str = COORDINATOR, *, site: str = "", name: str = "") -> TestClient:
    """Somebody with both factors shown. `client.csrf` is the token for its forms."""
    name = name or f"{role}-{site}".strip("-")
    if desk.accounts.account(name) is None:
        desk.accounts.add(name, role=role, password=None, site=site)
    token = desk.accounts.begin(name, complete=True)
    client = visitor(desk)
    client.cookies.set("cohortium-session", token)
    session = desk.accounts.session(token)
    assert session is not None
    client.csrf = session.csrf  # type: ignore[attr-defined]
    return client


def act(client: TestClient, path: str, *, reason: str = "because a test wants it", **fields: Any) -> Any:
    """POST a confirmed action."""
    return client.post(path, data={"csrf": client.csrf, "reason": reason, "confirm": "yes", **fields})  # type: ignore[attr-defined]


__all__ = [
    "BASE",
    "HOLDOUT",
    "HTML",
    "PASSWORD",
    "Conductor",
    "act",
    "bare",
    "desk_over",
    "signed_in",
    "visitor",
    "with_runs",
]
