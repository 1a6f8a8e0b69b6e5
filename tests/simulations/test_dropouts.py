"""Hospitals that vanish, stammer or are tampered with, at every step of a secure sum and in every kind of round."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohortium.client.sources.base import read
from cohortium.common.errors import PeerUnreachable
from cohortium.common.privacy import chain
from cohortium.common.privacy.chain import Book
from cohortium.common.privacy.ledger import Ledger
from cohortium.common.queries import Counts
from cohortium.server.asking import FederatedAsk
from cohortium.server.audit import audit
from cohortium.server.runs import RunFolder
from cohortium.simulations.engines import InProcess
from cohortium.simulations.faults import Fault, Faults
from cohortium.simulations.finish import finish
from cohortium.simulations.run import events_of, run

Simulate = Callable[..., Path]
# joined with two rounds: 0-2 counts, 3 moments, 4-5 gradients
FOUR: dict[str, Any] = {"split": "iid:4", "survivors": 3, "generator": "joined", "rounds": 2, "noise": False}
KINDS = {0: "counts", 3: "moments", 4: "gradient"}


def last_releases(out: Path) -> dict[int, dict[str, Any]]:
    return {event["index"]: event for event in events_of(out) if event["event"] == "release"}


def book(out: Path, owner: str) -> Book:
    path = out / "run" / "ledger.db" if owner == "coordinator" else out / "sites" / owner / "ledger.db"
    ledger = Ledger.open(path)
    lines = ledger.lines()
    ledger.close()
    return chain.replay(lines, owner=owner, public=_public(out, owner))[0]


def _public(out: Path, owner: str) -> Any:
    from cohortium.common.protocol.signing import public_from_raw

    folder = RunFolder(root=out)
    if owner == "coordinator":
        return folder.key().public_key()
    return public_from_raw(bytes.fromhex(folder.facts()["public_keys"][owner]))


def states(out: Path, owner: str) -> dict[int, str]:
    """release -> state; reserving one twice is an error of the chain itself, so a charge is there once."""
    return {int(release): entry.state for (_, release), entry in book(out, owner).entries.items()}


def patients(out: Path, sites: list[str]) -> int:
    return sum(read(out / "sites" / site / "data.parquet")["id"].nunique() for site in sites)


@pytest.fixture(autouse=True)
def first_counts(monkeypatch: pytest.MonkeyPatch) -> list[Counts]:
    """The first question of each run in a test: its histograms hold each patient once a column."""
    found: list[Counts] = []
    really = FederatedAsk.__call__

    def noted(self: FederatedAsk, phase: str, query: Any) -> Any:
        if not self.rounds:
            found.append(query)
        return really(self, phase, query)

    monkeypatch.setattr(FederatedAsk, "__call__", noted)
    return found


def counted_patients(out: Path, query: Counts) -> float:
    return float(answer(out, 0).sum() * query.lattice / len(query.columns))


def answer(out: Path, index: int) -> np.ndarray:
    return np.asarray(np.load(out / "run" / "answers" / f"{index:05d}.npz")["values"])


def holds(out: Path) -> bool:
    """Finished, and audited: all holds but the budget, which a run without noise passes by definition."""
    finish(out, score=False)
    wrong = [check for check in audit(out).checks if not check.ok and check.name != "budget"]
    assert not wrong, wrong
    return True


@pytest.mark.parametrize(
    ("phase", "kind"),
    [(phase, kind) for phase in ("prepare", "mask") for kind in ("crash", "crash-after", "lost")]
    + [("agree", "crash"), ("unmask", "crash")],
)
def test_one_hospital_less_at_each_step(simulate: Simulate, first_counts: list[Counts], phase: str, kind: Any) -> None:
    """A round goes on with t = 3 of 4, and its answer is exactly the sum of those it names."""
    script = [Fault(kind=kind, site=f"site-{n}", label=f"{i}/{phase}") for n, i in enumerate(KINDS, start=1)]
    out = simulate(faults=script, **FOUR)
    releases = last_releases(out)
    assert sorted(releases) == list(range(6)) and not any(event["void"] for event in releases.values())
    gone_early = phase in ("prepare", "mask")
    for n, index in enumerate(KINDS, start=1):
        # A hospital that goes after its masked vector came in is in the sum: its masks are opened without it.
        assert releases[index]["dropped"] == ([f"site-{n}"] if gone_early else [])
    for index, event in releases.items():
        if index not in KINDS:
            assert event["dropped"] == []
    assert abs(counted_patients(out, first_counts[0]) - patients(out, releases[0]["sites"])) < 0.01
    for n, index in enumerate(KINDS, start=1):
        charged = not (phase == "prepare" or (phase == "mask" and kind in ("crash", "lost")))
        assert (index in states(out, f"site-{n}")) == charged
    assert holds(out)


@pytest.mark.parametrize("phase", ["prepare", "mask", "agree", "unmask"])
@pytest.mark.parametrize("index", [0, 3])
def test_too_few_is_void_and_stays_charged(simulate: Simulate, phase: str, index: int) -> None:
    """Counts and moments cannot do without an answer: the run ends, says so, and says so again when resumed."""
    out = simulate(run=False, **{**FOUR, "generator": "mixture", "rounds": None})
    script = Faults([Fault(kind="crash", site=f"site-{n}", label=f"{index}/{phase}") for n in (1, 2)])
    with pytest.raises(PeerUnreachable) as caught:
        run(out, engine=InProcess(faults=script))
    assert caught.value.code == "RUN-VOID" and caught.value.hint and "charged" in caught.value.left
    assert states(out, "coordinator")[index] == "BURNED"
    assert not answer(out, index).any()
    before = {site: states(out, site) for site in (f"site-{n}" for n in range(1, 5))}
    asked = phase != "prepare"
    assert (index in before["site-4"]) == asked  # it had answered: charged, though nothing came of it
    assert (index in before["site-1"]) == (phase in ("agree", "unmask"))
    if asked:
        assert before["site-4"][index] in ("SEALED", "UNMASKED", "RELEASED")
    with pytest.raises(PeerUnreachable, match="RUN-VOID"):
        run(out)
    assert {site: states(out, site) for site in before} == before
    assert not (out / "run" / "model.npz").exists()


@pytest.mark.parametrize("phase", ["prepare", "mask", "agree", "unmask"])
def test_a_void_gradient_step_is_skipped(simulate: Simulate, phase: str) -> None:
    """DP-SGD goes on without the step; it is paid for all the same."""
    script = [Fault(kind="crash", site=f"site-{n}", label=f"4/{phase}") for n in (1, 2)]
    out = simulate(faults=script, **FOUR)
    releases = last_releases(out)
    assert releases[4]["void"].startswith("SUM-") and not releases[5]["void"]
    assert not answer(out, 4).any() and answer(out, 5).any()
    assert states(out, "coordinator")[4] == "BURNED" and states(out, "coordinator")[5] == "RELEASED"
    assert all(np.isfinite(value).all() for value in RunFolder(root=out).model().to_arrays()[0].values())
    assert holds(out)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("tamper-reply", {"bit": 4001}),
        ("tamper-request", {"bit": 4001}),
        ("tamper-reply", {"bit": 3}),
        ("stale", {}),
        ("twice", {}),
        ("replay", {}),
        ("held", {}),
        ("reply-lost", {}),
        ("late", {"seconds": 5.0}),
        ("late", {"seconds": 9999.0}),
    ],
)
def test_one_bad_line_spoils_at_most_its_own_hospital(
    simulate: Simulate, first_counts: list[Counts], kind: Any, options: dict[str, Any]
) -> None:
    """One message in every step of every round is spoilt for site-2. The run ends; what it says holds; nothing is
    charged twice; no other hospital drops."""
    labels = [f"{index}/{phase}" for index in (0, 3, 4) for phase in ("mask", "agree", "unmask")]
    out = simulate(faults=[Fault(kind=kind, site="site-2", label=label, **options) for label in labels], **FOUR)
    releases = last_releases(out)
    assert sorted(releases) == list(range(6))
    for index, event in releases.items():
        assert not event["void"] and set(event["dropped"]) <= {"site-2"}, event
        assert event["dropped"] == [] or index in (0, 3, 4)
    harmless = kind in ("twice", "replay") or options == {"seconds": 5.0}
    assert (not any(event["dropped"] for event in releases.values())) == harmless
    assert abs(counted_patients(out, first_counts[0]) - patients(out, releases[0]["sites"])) < 0.01
    assert holds(out)


def test_a_hospital_that_is_down_from_the_start_may_come_back(simulate: Simulate) -> None:
    """Absent at the hello and in the first round; then it is there, but the run's keys were dealt without it."""
    script = [
        Fault(kind="absent", site="site-3", label="hello"),
        Fault(kind="absent", site="site-3", label="0/*", times=None),
    ]
    out = simulate(faults=script, **{**FOUR, "generator": "mixture", "rounds": None})
    assert all(event["dropped"] == ["site-3"] for event in last_releases(out).values())
    assert states(out, "site-3") == {}


def test_too_few_at_the_hello_costs_nothing(simulate: Simulate) -> None:
    out = simulate(run=False, **FOUR)
    script = Faults([Fault(kind="absent", site=f"site-{n}", label="*", times=None) for n in (1, 2)])
    with pytest.raises(PeerUnreachable) as caught:
        run(out, engine=InProcess(faults=script))
    assert caught.value.code in ("RUN-TOO-FEW", "GRID-TOO-FEW-SITES")
    assert all(states(out, f"site-{n}") == {} for n in range(1, 5))
    run(out)  # they are back: the same run goes on
    assert len(last_releases(out)) == 6


@pytest.mark.parametrize("kind", ["lost", "tamper-reply", "twice", "replay"])
def test_local_sums_whoever_answered(simulate: Simulate, kind: Any) -> None:
    script = [Fault(kind=kind, site="site-2", label="1/noised", bit=2000 if kind == "tamper-reply" else 0)]
    out = simulate("iid:3", strategy="local", noise=False, faults=script)
    gone = kind in ("lost", "tamper-reply")
    assert last_releases(out)[1]["dropped"] == (["site-2"] if gone else [])
    assert last_releases(out)[2]["dropped"] == []
    assert holds(out)
