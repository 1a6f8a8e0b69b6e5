"""Five hospitals in five network namespaces; their links are cut at every phase of a run.

Real: guard and courier processes, each in its site's namespace; streams over TLS to the coordinator's service and hub,
a process of its own; `drive` with its ledger, mirror and strategy. Left out is Flower, which brings a hello and one
message a stream: both go through a pipe here, and not at all while the link is down. A dead link is noticed within a
second or so instead of 20 s, and lost sites are given up after 1 s or so instead of 60 s, so that a case takes seconds.

Each run cuts many links, one after another. "Short": the link is back within the time that sites are given; the run
must not notice, which means the same model, byte for byte. "Long": it is not; each release is the sum of the sites it
names, or void. Sums are compared with the sites' own records and noise, which a rehearsal's seed gives again.

Planted bugs that turn this red: a courier that forgets its answers when it reconnects (sites drop after short cuts); a
server that names more sites than it summed up.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cutting import Cut, Moment, Script, Seen, answer, check_exact, records_of, releases, run_once, states
from net_party import Party
from netspaces import Net, needs_root
from small import make_quick, small_study

from cohortium.common.encoding import Records
from cohortium.common.errors import PeerUnreachable
from cohortium.server.audit import audit
from cohortium.server.finish import finish_run
from cohortium.simulations.engines import InProcess
from cohortium.simulations.run import Request, prepare, run

pytestmark = pytest.mark.slow
SITES = tuple(f"site-{n}" for n in range(1, 6))
ONE, TWO, THREE, FOUR, FIVE = SITES
BRIEF, LOST_AND_BACK = 0.3, 1.5
"""Seconds: TCP sends again and nobody notices; the stream is given up by both ends, and comes back."""
PATIENT = {"lost_s": 40.0, "answer_s": 60.0}
HASTY = {"lost_s": 1.0, "answer_s": 12.0}
ROUNDS = 5  # joined: releases 0-2 are counts, 3 moments, 4-8 gradients


@pytest.fixture(scope="module")
def net() -> Iterator[Net]:
    needs_root()
    with Net(SITES) as made:
        yield made


@pytest.fixture(scope="module")
def quick_fits() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        make_quick(patch.setattr)
        yield


@pytest.fixture(scope="module")
def party(net: Net, quick_fits: None) -> Iterator[Party]:
    # A short path: the paths of Unix sockets are.
    with tempfile.TemporaryDirectory(prefix="cuts") as name:
        folder = Path(name)
        study, table = small_study(folder / "study", generator="joined", survivors=3, rounds=ROUNDS)
        made = Party(folder, study=study, table=table, sites=5, host=net.host)
        with made.running():
            made.start_coordinator()
            for site in SITES:
                made.start_site(site, within=net.within(site))
            yield made


@pytest.fixture(scope="module")
def study(party: Party) -> Path:
    return party.folder / "study" / "study.toml"


@pytest.fixture(scope="module")
def records(party: Party, first: Path) -> dict[str, Records]:
    return records_of(party, first)


@pytest.fixture(scope="module")
def first(party: Party, study: Path) -> Path:
    return party.new_run(study)


def holds(party: Party, root: Path) -> None:
    """Finished, and audited from the mirror's copies of the ledgers. A rehearsal's budget is never private."""
    finish_run(root, mirror=party.coordinator / "mirror.db")
    wrong = [check for check in audit(root).checks if not check.ok and check.name != "budget"]
    assert not wrong, wrong


def short_cuts() -> list[Cut]:
    """Every phase, for one and for two of the five, briefly and for so long that the streams are lost."""
    cuts = [
        Cut(site=ONE, label="hello", seconds=BRIEF),
        Cut(site=TWO, label="witness", seconds=LOST_AND_BACK),
        Cut(site=THREE, label="witness", moment="answered", seconds=BRIEF),
        Cut(site=FOUR, label="start", moment="answered", seconds=LOST_AND_BACK),
    ]
    moments: list[Moment] = ["asked", "answered", "asked", "answered"]
    for at, word in enumerate(("prepare", "mask", "agree", "unmask")):  # one of five
        cuts.append(Cut(site=SITES[at], label=f"0/{word}", moment=moments[at], seconds=LOST_AND_BACK))
        cuts.append(Cut(site=SITES[at + 1], label=f"1/{word}", moment=moments[at - 1], seconds=BRIEF))
    for at, word in enumerate(("prepare", "mask", "agree", "unmask")):  # two of five
        cuts.append(Cut(site=SITES[at], label=f"4/{word}", seconds=LOST_AND_BACK))
        cuts.append(Cut(site=SITES[(at + 2) % 5], label=f"4/{word}", moment="answered", seconds=BRIEF))
    cuts.append(Cut(site=ONE, label="5/unmask", moment="after", seconds=LOST_AND_BACK))
    cuts.append(Cut(site=TWO, label="6/unmask", moment="after", seconds=BRIEF))
    cuts.append(Cut(site=THREE, label="6/unmask", moment="after", seconds=LOST_AND_BACK))
    return cuts


def test_short_cuts_change_nothing(
    party: Party, net: Net, study: Path, first: Path, records: dict[str, Records]
) -> None:
    """The model of a run whose links were cut 23 times is that of a run in one process, byte for byte."""
    uncut = party.folder / "uncut"
    prepare(Request(study=study, table=study.with_name("table.parquet"), split="iid:5", out=uncut, seed=5))
    run(uncut, engine=InProcess())
    party.ready()
    script, seen = Script(net=net, cuts=short_cuts()), Seen()
    run_once(party, first, script, seen, **PATIENT)
    assert script.cuts == [] and len(script.done) == 23
    found = check_exact(party, first, seen, records)
    assert sorted(found) == list(range(4 + ROUNDS)) and not any(event["dropped"] for event in found.values())
    assert (first / "run" / "model.npz").read_bytes() == (uncut / "run" / "model.npz").read_bytes()
    assert all(set(states(party, first, site).values()) == {"RELEASED"} for site in SITES)
    holds(party, first)


def test_long_cuts_leave_the_sum_of_those_named(
    party: Party, net: Net, study: Path, records: dict[str, Records]
) -> None:
    """t = 3 of 5: with two gone in any phase the round is completed without them, or with them if they had answered."""
    root = party.new_run(study, name="long")
    expected: dict[int, tuple[list[Cut], set[str]]] = {
        0: ([Cut(site=ONE, label="0/prepare"), Cut(site=TWO, label="0/prepare", moment="answered")], {ONE, TWO}),
        1: ([Cut(site=THREE, label="1/mask"), Cut(site=FOUR, label="1/mask", moment="answered")], {THREE, FOUR}),
        2: ([Cut(site=ONE, label="2/agree"), Cut(site=FIVE, label="2/agree", moment="answered")], set()),
        3: ([Cut(site=TWO, label="3/unmask"), Cut(site=THREE, label="3/unmask", moment="answered")], set()),
        4: ([Cut(site=FOUR, label="4/mask", moment="answered")], {FOUR}),
        5: ([Cut(site=ONE, label="4/unmask", moment="after")], {ONE}),
        6: ([Cut(site=TWO, label="6/agree")], set()),
        7: ([Cut(site=THREE, label="7/unmask")], set()),
        8: ([], set()),
    }
    script, seen = Script(net=net, cuts=[cut for cuts, _ in expected.values() for cut in cuts]), Seen()
    run_once(party, root, script, seen, **HASTY)
    assert script.cuts == []
    found = check_exact(party, root, seen, records)
    assert {index: set(event["dropped"]) for index, event in found.items()} == {i: d for i, (_, d) in expected.items()}
    assert not any(event["void"] for event in found.values())
    # A site whose masked vector was on its way is charged, although the sum went without it; so is one that the
    # question reaches when its link is back. One that had no keys in the round was never asked.
    assert states(party, root, FOUR)[1] == states(party, root, FOUR)[4] == "SEALED"
    assert states(party, root, THREE).get(1, "SEALED") == "SEALED" and 0 not in states(party, root, ONE)
    holds(party, root)


def test_with_too_few_left_a_round_is_void_and_charged(
    party: Party, net: Net, study: Path, records: dict[str, Records]
) -> None:
    """t = 4 of 5: one may go; with two gone the gradient step is void, paid for, named by its code, and skipped."""
    four, _ = small_study(party.folder / "four", generator="joined", survivors=4, rounds=ROUNDS)
    root = party.new_run(four, name="void")
    script = Script(
        net=net,
        cuts=[
            Cut(site=FIVE, label="0/mask"),
            *(Cut(site=site, label="4/prepare") for site in (ONE, THREE)),
            *(Cut(site=site, label="5/mask") for site in (ONE, TWO)),
            *(Cut(site=site, label="6/agree", moment="answered") for site in (THREE, FOUR)),
            *(Cut(site=site, label="7/unmask", moment="answered") for site in (TWO, FIVE)),
        ],
    )
    seen = Seen()
    run_once(party, root, script, seen, **HASTY)
    assert script.cuts == []
    found = check_exact(party, root, seen, records)
    assert [i for i, event in found.items() if event["void"]] == [4, 5, 6, 7]
    assert found[0]["dropped"] == [FIVE] and found[8]["dropped"] == []
    books = {site: states(party, root, site) for site in SITES}
    for index, asked in {4: (), 5: (THREE, FOUR, FIVE), 6: SITES, 7: SITES}.items():
        charged = {site for site in SITES if index in books[site]}
        # Nobody is asked where too few have keys. Whom a question reaches later, he is charged later.
        assert set(asked) <= charged and (asked or not charged), f"release {index} is charged at {charged}"
    holds(party, root)


def test_cut_at_the_start(party: Party, net: Net, study: Path, records: dict[str, Records]) -> None:
    """A run begins with 4 of 5 or not at all; nothing is charged before, and the same run goes on when links are back.
    Then counts that are void end it: charged, and not asked a second time."""
    plain, _ = small_study(party.folder / "plain", generator="mixture", survivors=4)
    root, seen = party.new_run(plain, name="start"), Seen()
    for label in ("discover", "hello"):
        script = Script(net=net, cuts=[Cut(site=site, label=label) for site in (ONE, TWO)])
        with pytest.raises(PeerUnreachable) as caught:
            run_once(party, root, script, seen, **HASTY)
        assert caught.value.code in ("GRID-TOO-FEW-SITES", "RUN-TOO-FEW") and script.cuts == []
        assert not any(states(party, root, site) for site in SITES)
    script = Script(
        net=net,
        cuts=[
            Cut(site=ONE, label="start", moment="answered"),
            *(Cut(site=site, label="1/agree") for site in (THREE, FOUR)),
        ],
    )
    with pytest.raises(PeerUnreachable) as caught:
        run_once(party, root, script, seen, **HASTY)
    assert caught.value.code == "RUN-VOID" and "charged" in caught.value.left and script.cuts == []
    found = check_exact(party, root, seen, records)
    assert found[0]["dropped"] == [ONE]
    assert not answer(root, 1).any() and states(party, root, "coordinator")[1] == "BURNED"
    before = {site: states(party, root, site) for site in SITES}
    assert before[ONE] == {} and all(1 in before[site] for site in SITES[1:])
    with pytest.raises(PeerUnreachable, match="RUN-VOID"):
        run_once(party, root, Script(net=net, cuts=[]), seen, **HASTY)
    assert {site: states(party, root, site) for site in SITES} == before
    assert sorted(releases(root)) == [0] and np.array_equal(answer(root, 0), np.frombuffer(seen.sums[0][0][1], "<i8"))
