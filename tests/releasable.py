"""A consortium with finished runs that may be released: made by hand in a blink, with results as a run leaves them.

`world` has one run, small-1, whose hospitals can sign a release. `another` copies it under another name: its result is
to be looked at, its ledgers name the first.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import console_worlds
from conducting import PORTS
from consortium import PASSPHRASE, public, supernode
from hospital import key
from releasing import RUN, SITES, Finished, edit_json, finished
from starlette.testclient import TestClient

from cohortium.common.evaluation.base import Figure, NamedFigure, Verdict, to_json
from cohortium.common.evaluation.findings import (
    Curves,
    DifferenceMap,
    Finding,
    Findings,
    Line,
    PairRow,
    Section,
    Shares,
)
from cohortium.common.protocol.signing import save_private
from cohortium.server.console.accounts import COORDINATOR
from cohortium.server.console.desk import Desk
from cohortium.server.consortium import Addresses, Consortium

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)>\u202e\u0000'


def world(root: Path, **options: Any) -> tuple[Consortium, Finished]:
    """options: those of releasing.finished."""
    addresses = Addresses(host="127.0.0.1", listen="127.0.0.1", **PORTS)
    made = Consortium.create(root, name="rare-tumours", addresses=addresses, passphrase=PASSPHRASE)
    (root / "coordinator.key").unlink()
    save_private(key("coordinator"), root / "coordinator.key")
    register = made.register()
    for site in SITES:
        identity = key(site).public_key().public_bytes_raw()
        officer = public("officer of " + site)
        register.enrol(name=site, role="site", identity=identity, officer=officer, supernode=supernode(site))
    run = finished(root, **options)
    enter(made, RUN)
    return made, run


def enter(made: Consortium, run: str, *, sites: Sequence[str] = SITES, ended: bool = True) -> None:
    """A run's folder into the register."""
    envelope = (made.runs / run / "proposal.bin").read_bytes()
    register = made.register()
    register.propose(run, folder=f"runs/{run}", envelope=envelope, sites=list(sites))
    register.set_run(run, state="running", message="", flower_id="1", attempts=1)
    if ended:
        register.set_run(run, state="finished", message="published.")


def another(
    made: Consortium,
    run: str,
    edit: Callable[[dict[str, Any]], object] = lambda result: None,
    *,
    sites: Sequence[str] = SITES,
    ended: bool = True,
) -> Path:
    """The first run's folder once more, with a result to taste."""
    folder = Path(shutil.copytree(made.runs / RUN, made.runs / run))
    edit_json(folder / "result.json", edit)
    enter(made, run, sites=sites, ended=ended)
    return folder


def evaluated(result: dict[str, Any], *, shift: float = 0.0, name: str = "age") -> None:
    """Findings of every kind that the report draws; all known values lie `shift` higher."""
    findings = made_findings(shift, name)
    result["evaluation"] = findings.to_json()
    result["verdicts"] = to_json(findings.verdicts)


def made_findings(shift: float, name: str) -> Findings:
    agreement = _figure("column_agreement", f"Mean column agreement of {name}", 0.60 + shift)
    unknown = Finding(
        key="mean_smd",
        named=NamedFigure(label="Mean difference", figure=Figure.unknown("The noise is larger than the figure.")),
    )
    auc = _figure("tstr_auc", "Area under the ROC curve", 0.70 + shift, width=0.3)
    distance = Figure(value=0.1, low=0.05, high=0.2, reference=0.04, direction="lower")
    shares = Shares(
        name=name,
        unit="years",
        labels=("young", "old"),
        synthetic=(0.4, 0.6),
        real=(0.5, 0.5),
        low=(0.4, 0.4),
        high=(0.6, 0.6),
        distance=distance,
    )
    real = Figure(value=0.3, low=0.2, high=0.4)
    pair = PairRow(first=name, second="dose", real=real, synthetic=0.35, difference=0.05)
    square = ((1.0, 0.3), (0.3, 1.0))
    maps = DifferenceMap(title="Correlations", names=(name, "dose"), real=square, synthetic=square, worst=(pair,))
    roc = Curves(
        title=f"ROC of {name}",
        x_label="false alarms",
        y_label="found",
        x_range=(0.0, 1.0),
        y_range=(0.0, 1.0),
        lines=(Line(label="synthetic", x=(0.0, 0.5, 1.0), y=(0.0, 0.8, 1.0), style="synthetic"),),
    )
    sections = (
        Section(
            key="fidelity",
            title="Columns",
            intro="One at a time.",
            findings=(agreement, unknown),
            shares=(shares,),
            notes=(f"A note on {name}.",),
        ),
        Section(key="associations", title="Associations", intro="", maps=(maps,)),
        Section(key="prediction", title=f"Prediction of {name}", intro="", findings=(auc,), curves=(roc,)),
    )
    verdict = Verdict(
        use="Describing one column at a time",
        word="usable with care",
        sentence=f"It describes {name} with care.",
        thresholds="at most 0.06 below the reference",
        figure=agreement.named.figure,
    )
    return Findings(sections=sections, verdicts=(verdict,), headline="Usable with care.", patients=195.0, epsilon=1.0)


def _figure(key_: str, label: str, value: float, *, width: float = 0.02) -> Finding:
    figure = Figure(
        value=value, low=value - width, high=value + width, reference=0.95, direction="higher", unit="share of rows"
    )
    return Finding(key=key_, named=NamedFigure(label=label, figure=figure))


def as_rehearsal(result: dict[str, Any]) -> None:
    result["privacy"]["rehearsal"] = True


def hostile(result: dict[str, Any]) -> None:
    """Other people's words, as bad as they come, wherever a result holds any."""
    evaluated(result, name=HOSTILE)
    result["study"]["title"] = result["facts"]["title"] = HOSTILE
    result["warnings"] = [HOSTILE]
    result["facts"]["provenance"][HOSTILE] = HOSTILE
    result["evaluation"]["headline"] = HOSTILE
    for tile in result["verdicts"]:
        tile["use"] = tile["sentence"] = HOSTILE


_CLIENTS: WeakKeyDictionary[Desk, dict[tuple[str, str], TestClient]] = WeakKeyDictionary()


def signed_in(desk: Desk, role: str = COORDINATOR, *, site: str = "") -> TestClient:
    """As console_worlds has it, once for each who asks: the application is made once for a desk."""
    known = _CLIENTS.setdefault(desk, {})
    if ("", "") not in known:
        known["", ""] = console_worlds.visitor(desk)
    if (role, site) not in known:
        name = f"{role}-{site}".strip("-")
        desk.accounts.add(name, role=role, password=None, site=site)
        token = desk.accounts.begin(name, complete=True)
        client = TestClient(
            known["", ""].app,
            base_url=console_worlds.BASE,
            headers=console_worlds.HTML,
            follow_redirects=False,
            raise_server_exceptions=False,
        )
        client.cookies.set("cohortium-session", token)
        session = desk.accounts.session(token)
        assert session is not None
        client.csrf = session.csrf  # type: ignore[attr-defined]
        known[role, site] = client
    return known[role, site]


def visitor(desk: Desk) -> TestClient:
    signed_in(desk)
    return _CLIENTS[desk]["", ""]


def journal_of(desk: Desk) -> list[tuple[str, dict[str, Any]]]:
    """(about, fields) of every note in the console's journal."""
    return [(line.body["about"], line.body["fields"]) for line in desk.journal.lines() if "about" in line.body]
